"""The loops that the engine is compared with: plain PyTorch as one writes it first, and the same loop tuned by hand.

The plain loop takes too long for the 64k-step schedule with several seeds, so its accuracy comes from a twin whose
steps are replayed from CUDA graphs. `difference` shows that loop and twin are bitwise identical. The capture has not
yet run on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.lib.workloads import DEVICE, GPU, HE, LR, Batches, Net, Steps, repeated_batch
from fastres.config.schema import Config, EngineConfig, ModelConfig, OptimConfig
from fastres.data.loaders.build import classes_of
from fastres.data.sources.source import Source
from fastres.training.build import build_network, learning_rate, split_loader
from fastres.training.cuda_graph import capturing
from fastres.training.engine import Engine, resolve_engine
from fastres.training.evaluator import Evaluator

# Convolutions use TF32 by torch's default if the GPU has it. A slower baseline would flatter the engine.
TORCH_FP32 = "tf32" if GPU and torch.cuda.get_device_capability() >= (8, 0) else "fp32"


def plain_engine(*, tuned: bool = False, deterministic: bool = False) -> Engine:
    """Return the engine of a plain loop.

    Args:
        tuned: use bf16 and channels-last.
        deterministic: repeat bitwise, without TF32.
    """
    precision: Any = "bf16" if tuned else "fp32" if deterministic else TORCH_FP32
    eager: dict[str, Any] = {"compile": False, "cuda_graph": False, "conv": "torch"}
    fields = EngineConfig(precision=precision, channels_last=tuned, deterministic=deterministic, **eager)
    return resolve_engine(Config(engine=fields, model=ModelConfig(norm="torch")))


class PlainLoop:
    """The training step of the tutorials: eager, fp32, NCHW, torch.optim.SGD.

    Args:
        model: the network.
        engine: from plain_engine(); a tuned one adds autocast and fused SGD.
        compiled: run the network under torch.compile.
        optim: the optimizer's fields, for one group of parameters.
        label_smoothing: in [0, 1).
    """

    def __init__(
        self,
        model: nn.Module,
        engine: Engine,
        *,
        compiled: bool = False,
        optim: OptimConfig = HE,
        label_smoothing: float = 0.0,
    ) -> None:
        assert optim.norm_bias_lr_scale == 1, "one group of parameters"
        assert optim.decay_norm_and_bias, "one group of parameters"
        self.engine, self.tuned, self.label_smoothing = engine, engine.precision == "bf16", label_smoothing
        self.model = engine.place(model)
        self.forward: Any = torch.compile(self.model) if compiled else self.model
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=optim.lr,
            momentum=optim.momentum,
            weight_decay=optim.weight_decay,
            nesterov=optim.nesterov,
            fused=self.tuned or None,
        )

    def __call__(self, images: Tensor, labels: Tensor, lr: float = LR) -> Tensor:
        """Run one step and return its loss, (), on the device.

        Args:
            images: (b, C, S, S) in the engine's memory format.
            labels: (b,) int64.
            lr: the learning rate.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        with torch.autocast(self.engine.device.type, torch.bfloat16, enabled=self.tuned):
            loss = F.cross_entropy(self.forward(images), labels, label_smoothing=self.label_smoothing)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def loop_training(loop: PlainLoop, batches: Batches | None, net: Net) -> Steps:
    """Return the loop's training steps on `batches`, or on one batch of the net."""
    loop.engine.apply_torch_settings()
    feed = batches or repeated_batch(net, loop.engine, torch.float32)

    def steps(n: int) -> None:
        loop.engine.apply_torch_settings()
        loop.model.train()
        for _ in range(n):
            images, labels = next(feed)
            loop(images.contiguous(memory_format=loop.engine.memory_format), labels)

    return steps


def loop_inference(loop: PlainLoop, net: Net) -> Steps:
    """Return the forward passes of the loop's network, on one batch."""
    images, _ = net.batch_for(loop.engine, torch.float32)

    @torch.no_grad()
    def steps(n: int) -> None:
        loop.engine.apply_torch_settings()
        loop.model.eval()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=loop.tuned):
            for _ in range(n):
                loop.forward(images)

    return steps


def plain_steps(net: Net, *, training: bool, tuned: bool = False) -> Steps:
    """Return the training steps or forward passes of the plain loop, or of the one tuned by hand, on one batch."""
    loop = PlainLoop(net.build(), plain_engine(tuned=tuned), compiled=tuned and GPU)
    return loop_training(loop, None, net) if training else loop_inference(loop, net)


class PlainRun:
    """A configured run in a plain loop, with the weights, batches and schedule of the engine's run of `config`.

    Args:
        config: the run's configuration.
        source: the run's data.
        compiled: run the network under torch.compile.
        how: arguments of plain_engine().
    """

    def __init__(self, config: Config, source: Source, *, compiled: bool = False, **how: bool) -> None:
        engine = plain_engine(**how)
        engine.apply_torch_settings()
        self.config = config
        self.loop = PlainLoop(
            build_network(config, engine, source),
            engine,
            compiled=compiled,
            optim=config.optim,
            label_smoothing=config.train.label_smoothing,
        )
        self.loader = split_loader(config, engine, source, source.train)
        self.test_loader = split_loader(config, engine, source, source.test)
        self.classes = classes_of(config, source)

    def steps(self, first: int, last: int) -> Tensor:
        """Run the steps [first, last) and return their losses, (last - first,), on the device."""
        self.loop.engine.apply_torch_settings()
        self.loop.model.train()
        losses = []
        for i, (images, labels) in enumerate(self.loader.train(first, last), first):
            images = images.contiguous(memory_format=self.loop.engine.memory_format)
            losses.append(self.step(images, labels, learning_rate(self.config, i)))
        return torch.stack(losses)

    def step(self, images: Tensor, labels: Tensor, lr: float) -> Tensor:
        """Run one step and return its loss, ()."""
        return self.loop(images, labels, lr)

    def test_accuracy(self) -> float:
        """Return the accuracy on the test images."""
        self.loop.engine.apply_torch_settings()
        return Evaluator(self.loop.model, self.loop.engine, self.classes)(self.test_loader.evaluate()).accuracy


class GraphedTwin(PlainRun):
    """The plain run with each step replayed from a CUDA graph, which saves the host's work and nothing else.

    SGD passes the learning rate to its kernels as a number, so each learning rate of the schedule has its own graph:
    three in 64k steps. The first steps of the run are eager, so that momentum exists. It has not yet run on a GPU.
    """

    EAGER_STEPS = 3

    def __init__(self, config: Config, source: Source) -> None:
        super().__init__(config, source, deterministic=True)
        self.stream = torch.cuda.Stream(self.loop.engine.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.loss: Tensor | None = None
        self.captured_lr: float | None = None
        self.steps_run = 0

    def steps(self, first: int, last: int) -> Tensor:
        """Run the steps as PlainRun does, on the stream of the captures."""
        # All steps run on one stream, the eager ones too, because autograd uses the stream that a forward ran on.
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            losses = super().steps(first, last)
        torch.cuda.current_stream().wait_stream(self.stream)
        return losses

    def step(self, images: Tensor, labels: Tensor, lr: float) -> Tensor:
        """Replay one step, and capture it before if the learning rate is new. Return its loss, ()."""
        self.steps_run += 1
        if self.steps_run <= self.EAGER_STEPS:
            return super().step(images, labels, lr)
        if self.captured_lr != lr:
            self.capture(images, labels, lr)
        self.images.copy_(images)
        self.labels.copy_(labels)
        assert self.graph is not None
        assert self.loss is not None
        self.graph.replay()
        return self.loss.clone()

    def capture(self, images: Tensor, labels: Tensor, lr: float) -> None:
        """Capture one step. Capturing runs nothing, so weights and momentum stay as they are."""
        # Free the former graph's memory first, because freeing it during the capture would disturb the capture.
        self.graph = self.loss = None
        self.loop.optimizer.zero_grad()
        self.images, self.labels = torch.empty_like(images), torch.empty_like(labels)
        graph = torch.cuda.CUDAGraph()
        with capturing(graph, stream=self.stream):
            self.loss = super().step(self.images, self.labels, lr)
        self.graph, self.captured_lr = graph, lr


def difference(one: PlainRun, other: PlainRun, steps: int) -> dict[str, Any]:
    """Run the first steps of both, and compare every loss and the final state bitwise."""
    losses = [run.steps(0, steps).cpu() for run in (one, other)]
    different = (losses[0] != losses[1]).nonzero().flatten().tolist()
    states = [run.loop.model.state_dict().values() for run in (one, other)]
    return {
        "steps": steps,
        "first_different_step": different[0] if different else None,
        "state_equal": all(torch.equal(a, b) for a, b in zip(*states, strict=True)),
        "last_losses": [float(of_run[-1]) for of_run in losses],
    }
