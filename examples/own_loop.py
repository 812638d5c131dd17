"""A training loop of one's own from the parts of fastres: data, network, step, schedule, evaluation."""

import math
import sys

import fastres
from fastres.config.schema import Config, DataConfig, TrainConfig

STEPS, PEAK = int(sys.argv[1]) if len(sys.argv) > 1 else 300, 0.1

config = Config(data=DataConfig(source="digits", flip=False, pad=1), train=TrainConfig(batch_size=128))
engine = fastres.resolve_engine(config)  # decides device, precision and kernels; engine.reasons says why
engine.apply_torch_settings()

source = fastres.load_source(config.data)
loaders = [fastres.build_loader(config, source, split, device=engine.device, dtype=engine.dtype)
           for split in (source.train, source.test)]  # fmt: skip

model = engine.place(fastres.build_model("resnet20", num_classes=10, in_channels=source.channels, norm=engine.norm))
step = fastres.TrainStep(model, engine, config.optim)
evaluate = fastres.Evaluator(model, engine, classes=10)

for i, (images, labels) in enumerate(loaders[0].train(0, STEPS)):
    step(images, labels, lr=PEAK * min(i / 50, (1 + math.cos(math.pi * i / STEPS)) / 2))
    if (i + 1) % 100 == 0 or i + 1 == STEPS:
        metrics, _ = step.metrics.read()  # synchronises with the device
        step.metrics.reset()
        result = evaluate(loaders[1].evaluate())
        print(f"step {i + 1}: train loss {metrics.mean_loss:.4f}, test accuracy {result.accuracy:.4f}")
