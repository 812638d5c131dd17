"""What is measured: steps of training and inference, the plain ones that one writes first and the engine's."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from bench.lib.paired import interleaved
from fastres import build_model
from fastres.config.schema import Config, DataConfig, EngineConfig, ModelConfig, OptimConfig, TrainConfig
from fastres.data.loaders.build import build_loader
from fastres.data.sources.load import load_source
from fastres.distributed.process_group import data_parallel
from fastres.training.cuda_graph import Batches as RecordedBatches
from fastres.training.cuda_graph import FixedBatch, GraphedStep, recorder_for
from fastres.training.engine import Engine, resolve_engine
from fastres.training.evaluator import Evaluator
from fastres.training.optim import build_optimizer
from fastres.training.step import TrainStep
from fastres.utils.hardware import peaks_of
from fastres.utils.timing import time_region

# Takes that many steps. First it sets torch's switches, tf32's for one, which belong to the whole process.
Steps = Callable[[int], None]
Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# As torch has it switched on: convolutions in TF32 where a GPU has that. Less would flatter the engine.
TORCHS_FP32: Literal["fp32", "tf32"] = (
    "tf32" if DEVICE.type == "cuda" and torch.cuda.get_device_capability() >= (8, 0) else "fp32"
)
PLAIN = Config(engine=EngineConfig(precision=TORCHS_FP32, compile=False))
HE = OptimConfig()  # lr 0.1, momentum 0.9, weight decay 1e-4

ROUND_S = 0.4  # of the engine: long against the timer and one wait, short against a drift
BUDGET_S = 14.0  # of a comparison, warm-up apart
ROUNDS = (5, 15)  # at least, at most


@dataclass(frozen=True, kw_only=True)
class Net:
    """A network and its batch."""

    name: str
    batch: int
    side: int
    channels: int = 3
    classes: int = 10
    options: tuple[tuple[str, Any], ...] = field(default=())

    def build(self, norm: str = "torch") -> torch.nn.Module:
        torch.manual_seed(0)
        return build_model(
            self.name, num_classes=self.classes, in_channels=self.channels, norm=norm, **dict(self.options)
        )

    def batch_on(self, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Images of noise, (b, C, S, S), and labels: never zeros, which a GPU computes with less power."""
        images = torch.randn(self.batch, self.channels, self.side, self.side, device=device, dtype=dtype)
        return images, torch.randint(self.classes, (self.batch,), device=device)


def held(net: Net, engine: Engine, dtype: torch.dtype) -> Batches:
    """The same batch for ever: what a step costs without its data."""
    images, labels = net.batch_on(engine.device, dtype)
    return itertools.repeat((images.to(memory_format=engine.memory_format), labels))


# ---- plain: eager, fp32, NCHW, torch.optim.SGD ------------------------------------------------------------------


class PlainLoop:
    """One step of the loop of the tutorials. `tuned` (bf16 autocast, channels-last, fused SGD) and `compiled` are what
    one switches on next; a `deterministic` one repeats bit for bit, and has no TF32."""

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        tuned: bool = False,
        compiled: bool = False,
        deterministic: bool = False,
        optim: OptimConfig = HE,
        label_smoothing: float = 0.0,
    ) -> None:
        assert optim.norm_bias_lr_scale == 1 and optim.decay_norm_and_bias, "one group of parameters"
        self.config = Config(
            engine=EngineConfig(
                precision="bf16" if tuned else "fp32" if deterministic else TORCHS_FP32,
                compile=False,
                cuda_graph=False,
                channels_last=tuned,
                conv="torch",
                deterministic=deterministic,
            ),
            model=ModelConfig(norm="torch"),
        )
        self.engine = self.switch()
        self.model, self.tuned, self.label_smoothing = self.engine.place(model), tuned, label_smoothing
        self.forward: Any = torch.compile(self.model) if compiled else self.model
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=optim.lr,
            momentum=optim.momentum,
            weight_decay=optim.weight_decay,
            nesterov=optim.nesterov,
            fused=tuned or None,
        )

    def switch(self) -> Engine:
        """torch's switches, which belong to the whole process, to this loop's; before its steps."""
        return resolve_engine(self.config)

    def __call__(self, images: torch.Tensor, labels: torch.Tensor, lr: float = 0.1) -> torch.Tensor:
        """images: (b, C, S, S) in the engine's memory format, labels: (b,) -> the loss, () on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        with torch.autocast(self.engine.device.type, torch.bfloat16, enabled=self.tuned):
            loss = F.cross_entropy(self.forward(images), labels, label_smoothing=self.label_smoothing)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def loop_training(loop: PlainLoop, batches: Batches) -> Steps:
    def steps(n: int) -> None:
        loop.switch()
        loop.model.train()
        for _ in range(n):
            images, labels = next(batches)
            loop(images.contiguous(memory_format=loop.engine.memory_format), labels)

    return steps


def plain_training(net: Net, model: torch.nn.Module | None = None) -> Steps:
    """The loop of the tutorials on a batch that stays; of `model` where it is somebody else's."""
    loop = PlainLoop(net.build() if model is None else model)
    return loop_training(loop, held(net, loop.engine, torch.float32))


def plain_inference(net: Net) -> Steps:
    model, (images, _) = net.build().to(DEVICE).eval(), net.batch_on(DEVICE, torch.float32)

    @torch.no_grad()
    def steps(n: int) -> None:
        resolve_engine(PLAIN)
        for _ in range(n):
            model(images)

    return steps


# ---- the engine's -----------------------------------------------------------------------------------------------


def engine_for(**fields: Any) -> tuple[Config, Engine]:
    """What the engine makes of these fields here; `norm` is the model's. Raises UsageError where they cannot be had."""
    norm = fields.pop("norm", "auto")
    if norm == "torch":  # the word says whose operations they are, the convolutions' too
        fields.setdefault("conv", "torch")
    config = Config(model=ModelConfig(norm=norm), engine=EngineConfig(**fields))
    return config, resolve_engine(config)


def engine_training(
    net: Net,
    ddp: bool = False,
    batches: Batches | None = None,
    inductor: dict[str, Any] | None = None,
    with_data: bool = False,
    **fields: Any,
) -> Steps:
    """The engine's TrainStep under these fields of EngineConfig, and `norm`; inside DDP where that is asked for, in the
    process group that is there; compiled under these settings of inductor's in place of its own. On a batch that stays,
    on `batches`, or `with_data`: on those of the resident loader, as fastres.train has them."""
    config, engine = engine_for(**fields)
    model = engine.place(net.build(engine.norm))
    step = TrainStep(model, engine, lambda m, lr: build_optimizer(m, config.optim, lr))
    if inductor is not None:
        # As options, not as a patch of the configuration: dynamo takes what it compiled for another step of the same
        # network, unless the backend is another one.
        step.forward_loss.compile(fullgraph=True, dynamic=False, options=inductor)
    if ddp:
        step.forward_loss = data_parallel(step.forward_loss, engine.device)
    loader = resident(net, engine) if with_data else None
    if engine.cuda_graph and batches is None and not ddp:
        images, labels = next(held(net, engine, engine.dtype))
        step.warm_up(images, labels)
        return replayed(step, loader or FixedBatch(images, labels), lambda: resolve_engine(config))
    if loader is not None:
        batches = loader.train(0, 1_000_000)
    feed = held(net, engine, engine.dtype) if batches is None else batches

    def steps(n: int) -> None:
        resolve_engine(config)
        for i in range(n):
            step(*next(feed), 0.1, i)

    return steps


def resident(net: Net, engine: Engine) -> Any:
    """The resident loader of as many random images as CIFAR-10 has, cropped and flipped."""
    fields = {
        "source": "synthetic",
        "image_size": net.side,
        "synthetic_samples": 50_000,
        "loader": "resident",
    }
    config = Config(data=DataConfig(**fields), train=TrainConfig(batch_size=net.batch))
    source = load_source(config.data)
    place = {"device": engine.device, "dtype": engine.dtype}
    return build_loader(config, source, source.train, **place)


def replayed(step: TrainStep, batches: RecordedBatches, switch: Callable[[], object]) -> Steps:
    """The step, warmed up, and its batches as one recording: on a GPU as a CUDA graph, as fastres.train takes it."""
    graphed = GraphedStep(step, batches, lambda i: 0.1, recorder_for(step.engine.device))

    def steps(n: int) -> None:
        switch()
        for i, batch in enumerate(graphed.train(0, n)):
            graphed(*batch, 0.1, i)

    return steps


def engine_inference(net: Net, **fields: Any) -> Steps:
    """The engine's evaluation step: logits, loss and right answers."""
    config, engine = engine_for(**fields)
    model = engine.place(net.build(engine.norm))
    evaluate = Evaluator(model.eval(), engine)
    images, labels = net.batch_on(engine.device, engine.dtype)
    images = images.to(memory_format=engine.memory_format)

    @torch.no_grad()
    def steps(n: int) -> None:
        resolve_engine(config)
        for _ in range(n):
            evaluate.forward_loss(images, labels)

    return steps


# ---- both, measured ---------------------------------------------------------------------------------------------


def compare(
    benchmark: Any,
    net: Net,
    build_baseline: Callable[[], Steps],
    ours: Steps,
    *,
    training: bool,
    precision: str,
    **facts: Any,
) -> None:
    """Measures both in turns, as long as the budget allows, and leaves all that the tables show in extra_info."""
    ours(2)
    memory = peak_memory(ours)  # before the baseline lies there too
    baseline = build_baseline()
    for warm_up in (baseline, ours):
        warm_up(2)
    step_s, baseline_s = (time_region(lambda steps=steps: steps(1), DEVICE) for steps in (ours, baseline))
    n = max(1, round(ROUND_S / step_s))
    low, high = ROUNDS
    rounds = min(high, max(low, int(BUDGET_S / (n * (step_s + baseline_s)))))
    interleaved(benchmark, lambda: baseline(n), lambda: ours(n), n * net.batch, rounds)
    flops_per_s = benchmark.extra_info["images_per_s"] * flops_per_image(net, training)
    peaks = peaks_of(DEVICE)
    peak = peaks.flops.get(precision) if peaks else None
    benchmark.extra_info.update(
        model=net.name,
        batch=net.batch,
        side=net.side,
        training=training,
        precision=precision,
        steps_per_round=n,
        gflop_per_s=flops_per_s / 1e9,
        share_of_peak=flops_per_s / peak if peak else None,
        peak_memory_bytes=memory,
        **facts,
    )


def peak_memory(steps: Steps) -> int | None:
    """Bytes that a step takes at most on a GPU; None on a CPU, where nobody counts, and of a replay, which allocates
    nothing: its memory is the graph's own."""
    if DEVICE.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(DEVICE)
    allocations = torch.cuda.memory_stats(DEVICE)["allocation.all.allocated"]
    steps(1)
    if torch.cuda.memory_stats(DEVICE)["allocation.all.allocated"] == allocations:
        return None
    return torch.cuda.max_memory_allocated(DEVICE)


@cache
def flops_per_image(net: Net, training: bool) -> int:
    """Of convolutions and matrices, a multiply-add as two, counted by torch on tensors without memory."""
    with torch.device("meta"):
        model = net.build().train(training)
        images = torch.empty(2, net.channels, net.side, net.side)
        with (
            FlopCounterMode(display=False) as counter,
            contextlib.nullcontext() if training else torch.no_grad(),
        ):
            logits = model(images)
            if training:
                logits.sum().backward()
    return counter.get_total_flops() // 2
