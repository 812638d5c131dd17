"""The engine's training and evaluation steps as the benchmarks measure them: networks, batches, recorded steps."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastres import build_model
from fastres.config.schema import Config, DataConfig, EngineConfig, ModelConfig, OptimConfig, TrainConfig
from fastres.data.loaders.build import Loader
from fastres.data.sources.load import load_source
from fastres.distributed.process_group import data_parallel
from fastres.training.build import split_loader
from fastres.training.cuda_graph import CudaRecorder, FixedBatch, GraphedStep
from fastres.training.engine import Engine, resolve_engine
from fastres.training.evaluator import Evaluator, for_inference
from fastres.training.step import TrainStep

# Runs the given number of steps, and applies the engine's torch settings before, because they are process-wide.
Steps = Callable[[int], None]
Batches = Iterator[tuple[Tensor, Tensor]]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GPU = DEVICE.type == "cuda"
HE = OptimConfig()  # lr 0.1, momentum 0.9, weight decay 1e-4
LR = HE.lr


@dataclass(frozen=True, kw_only=True)
class Net:
    """A network and its batch."""

    name: str
    batch: int
    side: int
    channels: int = 3
    classes: int = 10
    options: tuple[tuple[str, Any], ...] = field(default=())

    def build(self, norm: str = "torch") -> nn.Module:
        """Return the network with weights from seed 0."""
        torch.manual_seed(0)
        return build_model(
            self.name, num_classes=self.classes, in_channels=self.channels, norm=norm, **dict(self.options)
        )

    def batch_for(self, engine: Engine, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Return images of noise, (b, C, S, S), and labels, (b,).

        The images are never zeros, because a GPU needs less power to compute with zeros.
        """
        shape, device = (self.batch, self.channels, self.side, self.side), engine.device
        images = torch.randn(shape, device=device, dtype=dtype or engine.dtype)
        labels = torch.randint(self.classes, (self.batch,), device=device)
        return images.to(memory_format=engine.memory_format), labels


def repeated_batch(net: Net, engine: Engine, dtype: torch.dtype | None = None) -> Batches:
    """Yield the same batch for ever, so that a step is measured without its data."""
    return itertools.repeat(net.batch_for(engine, dtype))


def engine_for(**fields: Any) -> Engine:
    """Resolve the engine for these fields of EngineConfig; `norm` is the model's.

    Raises:
        UsageError: if a field's value is unavailable here.
    """
    norm = fields.pop("norm", "auto")
    if norm == "torch":  # in a benchmark, norm torch means that all operations are torch's, convolutions too
        fields.setdefault("conv", "torch")
    return resolve_engine(Config(model=ModelConfig(norm=norm), engine=EngineConfig(**fields)))


def engine_training(
    net: Net,
    ddp: bool = False,
    batches: Batches | None = None,
    inductor: dict[str, Any] | None = None,
    with_data: bool = False,
    **fields: Any,
) -> Steps:
    """Return the engine's training steps.

    Args:
        net: the network and its batch, which is the same at every step unless `batches` or `with_data` is given.
        ddp: wrap the step in DDP, in the current process group.
        batches: the steps' batches.
        inductor: options of torch.compile that replace the engine's.
        with_data: take the batches of the resident loader, as fastres.train does.
        fields: fields of EngineConfig, and `norm`.
    """
    engine = engine_for(**fields)
    engine.apply_torch_settings()
    step = TrainStep(engine.place(net.build(engine.norm)), engine, HE)
    if inductor is not None:
        # Pass options instead of patching inductor's configuration, because dynamo reuses the code that it compiled for
        # another step of the same network unless the backend differs.
        step.forward_loss.compile(fullgraph=True, dynamic=False, options=inductor)
    if ddp:
        step.forward_loss = data_parallel(step.forward_loss, engine.device)
    loader = resident_loader(net, engine) if with_data else None
    if engine.cuda_graph and batches is None and not ddp:
        images, labels = net.batch_for(engine)
        step.warm_up(images, labels)
        return replayed(step, loader or FixedBatch(images, labels))
    if loader is not None:
        batches = loader.train(0, 1_000_000)
    feed = batches or repeated_batch(net, engine)

    def steps(n: int) -> None:
        engine.apply_torch_settings()
        for i in range(n):
            step(*next(feed), LR, i)

    return steps


def resident_loader(net: Net, engine: Engine) -> Any:
    """Return the resident loader of as many random images as CIFAR-10 has, cropped and flipped."""
    fields = {"source": "synthetic", "image_size": net.side, "synthetic_samples": 50_000}
    return training_loader(engine, net.batch, loader="resident", **fields)


def training_loader(engine: Engine, batch: int, **fields: Any) -> Loader:
    """Return the loader of the training images for these fields of DataConfig."""
    config = Config(data=DataConfig(**fields), train=TrainConfig(batch_size=batch))
    source = load_source(config.data)
    return split_loader(config, engine, source, source.train)


def replayed(step: TrainStep, batches: Any) -> Steps:
    """Return steps that replay a CUDA graph of the warm step and its batches, as fastres.train does."""
    engine = step.engine
    graphed = GraphedStep(step, batches, lambda i: LR, CudaRecorder(engine.device))

    def steps(n: int) -> None:
        engine.apply_torch_settings()
        for i, batch in enumerate(graphed.train(0, n)):
            graphed(*batch, LR, i)

    return steps


def engine_inference(net: Net, **fields: Any) -> Steps:
    """Return the engine's evaluation steps: logits, loss and the outcome of each sample.

    The network is that of `evaluate --fold`, of `predict` for many files and of load_run: folded on a CPU.
    """
    engine = engine_for(**fields)
    engine.apply_torch_settings()
    model = for_inference(engine.place(net.build(engine.norm)).eval(), engine)
    evaluator = Evaluator(model, engine, net.classes)
    images, labels = net.batch_for(engine)

    @torch.no_grad()
    def steps(n: int) -> None:
        engine.apply_torch_settings()
        for _ in range(n):
            evaluator.forward(images, labels)

    return steps
