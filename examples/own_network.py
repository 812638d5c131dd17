"""Train a network of one's own on arrays, and predict with the run."""

import sys

from torch import nn

import fastres
from fastres.config.schema import DataConfig

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 300


def block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """Return convolution, BatchNorm and ReLU."""
    conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


net = nn.Sequential(block(1, 32, 1), block(32, 64, 2), block(64, 64, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                    nn.Linear(64, 10))  # fmt: skip

digits = fastres.load_source(DataConfig(source="digits"))
train, test = ((split.images, split.labels) for split in (digits.train, digits.test))  # (N, 8, 8, 1) uint8, (N,) int64

summary = fastres.fit(net, train, test, steps=steps, optim={"lr": 0.1}, schedule={"name": "cosine", "warmup_steps": 20},
                      data={"flip": False, "pad": 1}, eval_every=100, run={"checkpoint_every": 100})  # fmt: skip
print(f"test accuracy {summary['test_accuracy']:.4f} in {summary['run_dir']}")

run = fastres.load_run(summary["run_dir"], model=net)
print(run.predict(test[0][:3], top=2), test[1][:3])
