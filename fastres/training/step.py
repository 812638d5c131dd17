"""One training step and one evaluation. The only autocast and the only compile are here.

Forward and loss are one graph, compiled without breaks; the backward pass comes from AOTAutograd; the optimizer
is one fused kernel. Nothing here waits for the device: metrics stay on it until somebody reads them.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch._dynamo.config
import torch.nn.functional as F
from torch import Tensor, nn

from fastres.data.loaders.build import IGNORED, Loader
from fastres.distributed import process_group
from fastres.training.engine import Engine
from fastres.training.optim import learning_rates
from fastres.utils import ranks
from fastres.utils.errors import UsageError, first_line, out_of_memory
from fastres_kernels import defer_running_stats

Batch = tuple[
    Tensor, Tensor
]  # images (b, C, S, S) in the engine's dtype, labels (b,) int64 or (b, classes) shares


def compiled(work: Callable[..., Any]) -> Callable[..., Any]:
    """`work` as inductor makes it, with the bits of eager execution where it only copies, adds and divides."""
    return torch.compile(
        work, fullgraph=True, dynamic=False, options={"eager_numerics.division_rounding": True}
    )


def raise_recompile_limit(count: int) -> None:
    """Of one step's code: dynamo keeps what it compiles by code, which all networks and settings of a process share,
    and gives up at the ninth."""
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, count)


class BatchedCast(torch.autograd.Function):
    """(dtype, *weights) -> the weights in dtype. Two kernels under inductor and one for their gradients, where casting
    each takes a launch, and its gradient another (docs/EXPERIMENTS.md, "The fused kernels, without a GPU")."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.dtype = weights[0].dtype
        # As they lie in memory, and each to have its strides again.
        orders = [sorted(range(w.ndim), key=w.stride, reverse=True) for w in weights]
        dense = [w.permute(order) for w, order in zip(weights, orders, strict=True)]
        parts = torch.cat([w.flatten() for w in dense]).to(dtype).split([w.numel() for w in weights])
        cast = [part.view(w.shape) for part, w in zip(parts, dense, strict=True)]
        back = [[order.index(d) for d in range(len(order))] for order in orders]
        return tuple(w.permute(order) for w, order in zip(cast, back, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # There is no cast of a list that inductor makes one kernel of; times one in the wider dtype is one, and exact.
        one = torch.ones((), dtype=ctx.dtype, device=grads[0].device)
        return None, *torch._foreach_mul(list(grads), [one.view((1,) * grad.ndim) for grad in grads])


class ForwardLoss(nn.Module):
    """(images, labels) -> (loss, number of right answers), both () and on the device.

    mirrored: the logits are the mean of an image's and its mirror image's.
    """

    def __init__(
        self,
        model: nn.Module,
        engine: Engine,
        reduction: str,
        label_smoothing: float = 0.0,
        mirrored: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.engine, self.reduction, self.label_smoothing = engine, reduction, label_smoothing
        self.mirrored = mirrored
        self.mixed = engine.precision in ("bf16", "fp16")
        self.casts_together = self.mixed and engine.compile
        self.running_stats = defer_running_stats(model)

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with self.running_stats:
            logits = self._logits(images)
        if self.mirrored:
            logits = (logits + self._logits(images.flip(3))) / 2
        loss = F.cross_entropy(
            logits,
            labels.to(logits.dtype) if labels.is_floating_point() else labels,
            ignore_index=IGNORED,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )
        # The right answer for a mixture is the larger part of it.
        right = labels.argmax(1) if labels.is_floating_point() else labels
        return loss, (logits.argmax(1) == right).sum()

    def _logits(self, images: Tensor) -> Tensor:
        """(N, classes), float32 or wider."""
        dtype = self.engine.dtype if self.mixed else None
        with torch.autocast(self.engine.device.type, dtype, enabled=self.mixed):
            if self.casts_together:
                logits = torch.func.functional_call(self.model, self._cast_weights(), (images,))
            else:
                logits = self.model(images)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _cast_weights(self) -> dict[str, Tensor]:
        """By their names, those that autocast would cast one by one."""
        found = {
            f"{name}.{kind}": parameter
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Conv2d | nn.Linear)
            for kind, parameter in module.named_parameters(recurse=False)
            if parameter.requires_grad
        }
        # Multiples of eight first: so each of those begins at 16 bytes, as tensor cores want it.
        names = sorted(found, key=lambda name: found[name].numel() % 8 != 0)
        if not names:
            return {}
        cast = BatchedCast.apply(self.engine.dtype, *(found[name] for name in names))
        return dict(zip(names, cast, strict=True))

    @property
    def compiled(self) -> bool:
        return self._compiled_call_impl is not None

    def run_eagerly(self) -> None:
        """Takes compile() back."""
        self._compiled_call_impl = None
        self.casts_together = False


@dataclass
class Metrics:
    """Sums of a window of steps, on the host."""

    loss: float = 0.0  # summed over samples
    correct: int = 0
    samples: int = 0

    def __add__(self, other: Metrics) -> Metrics:
        return Metrics(self.loss + other.loss, self.correct + other.correct, self.samples + other.samples)

    @property
    def mean_loss(self) -> float:
        return self.loss / max(1, self.samples)

    @property
    def accuracy(self) -> float:
        return self.correct / max(1, self.samples)


class DeviceMetrics:
    """Metrics that grow on the device; reading them is the only synchronisation."""

    def __init__(self, device: torch.device) -> None:
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        # By themselves and not as two of one tensor, which would take four times as many operators a step.
        self.correct, self.samples = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
        # What is being added, and the first step of non-finite loss. On the device, where a replay can set it.
        self.step, self.bad_step = (torch.full((), -1, dtype=torch.int64, device=device) for _ in range(2))

    def add(self, loss: Tensor, correct: Tensor, samples: int | Tensor) -> None:
        """loss: () summed over the samples."""
        self.loss += loss
        self.correct += correct
        self.samples += samples
        fine = torch.isfinite(loss) | (self.bad_step >= 0)
        self.bad_step.copy_(torch.where(fine, self.bad_step, self.step))

    def read(self) -> tuple[Metrics, int]:
        """The sums over all processes since the last reset, and the first bad step (-1: none)."""
        sums, bad = self.state_dict(), self.bad_step.clone()
        process_group.all_max(bad)
        return Metrics(sums["loss"].item(), *sums["counts"].tolist()), int(bad.item())

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.loss, self.correct, self.samples, self.step, self.bad_step

    def reset(self) -> None:
        for tensor in (self.loss, self.correct, self.samples):
            tensor.zero_()
        self.bad_step.fill_(-1)

    def state_dict(self) -> dict[str, Tensor]:
        """The sums over all processes. Collective."""
        loss, counts = self.loss.clone(), torch.stack([self.correct, self.samples])
        process_group.all_sum(loss, counts)
        return {"loss": loss, "counts": counts}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Rank 0 takes the sums, the others start from nothing: together they are what was saved."""
        self.reset()
        if ranks.rank() == 0:
            self.loss.copy_(state["loss"])
            self.correct.copy_(state["counts"][0])
            self.samples.copy_(state["counts"][1])


class TrainStep:
    """Forward, loss, backward, update. `totals` gathers what the steps did.

    accumulate: the parts in which a batch is taken, one after another, for the memory of one of them.
    """

    def __init__(
        self,
        model: nn.Module,
        engine: Engine,
        build_optimizer: Callable[[nn.Module, Tensor], torch.optim.Optimizer],
        label_smoothing: float = 0.0,
        accumulate: int = 1,
    ) -> None:
        self.engine = engine
        self.model = model
        self.accumulate = accumulate
        self.lr = torch.zeros((), device=engine.device)
        # What a backward starts from, which it would fill anew at each step.
        self.one = torch.ones(
            (), device=engine.device, dtype=torch.promote_types(engine.dtype, torch.float32)
        )
        self.optimizer = build_optimizer(model, self.lr)
        self.learning_rates = learning_rates(self.optimizer)
        self.scaler = torch.amp.GradScaler(engine.device.type, enabled=engine.precision == "fp16")
        self.totals = DeviceMetrics(engine.device)
        self.inner = ForwardLoss(model, engine, "mean", label_smoothing)
        if engine.compile:
            self.inner.compile(fullgraph=True, dynamic=False)
        self.count = compiled(self._count) if engine.compile else self._count
        # DDP goes around what is compiled: inside, its hooks would break the graph.
        self.forward_loss = process_group.wrap(self.inner, engine.device, engine.compress_gradients)

    def __call__(self, images: Tensor, labels: Tensor, lr: float, step: int) -> None:
        """Takes step `step` on this process's share of the batch."""
        for tensor, scale in self.learning_rates.items():
            tensor.fill_(lr * scale)
        self.totals.step.fill_(step)
        self.take(images, labels)

    def take(self, images: Tensor, labels: Tensor) -> None:
        """The step of the number and the learning rates that are there. Its work on the device is the same every time,
        and nothing in it depends on values there: it can be recorded and replayed (fastres/training/cuda_graph.py)."""
        if not self.model.training:  # train() walks through all modules
            self.model.train()
        *parts, last = self._parts(images, labels)
        for part in parts:
            with process_group.no_sync(self.forward_loss):
                self._add(part)
        self._add(last)
        self.update()

    def backward(self, loss: Tensor) -> None:
        """Adds to the gradients. loss: (), the mean over one part of the batch."""
        self.scaler.scale(loss if self.accumulate == 1 else loss / self.accumulate).backward(self.one)

    def update(self) -> None:
        """The optimizer's step; the gradients are gone after it."""
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def warm_up(self, images: Tensor, labels: Tensor) -> None:
        """Compiles everything by running forward and backward, and leaves no trace in the model's state."""
        with unchanged([*self.model.buffers(), *self.totals.tensors]):
            self.model.train()
            self._add(self._parts(images, labels)[0])
        self.model.zero_grad()

    def abort_step(self) -> None:
        """Forgets a step that did not come to its end: gradients, and what the scaler knows of them."""
        self.optimizer.zero_grad()
        state = self.scaler.state_dict()
        self.scaler = torch.amp.GradScaler(self.engine.device.type, enabled=self.scaler.is_enabled())
        self.scaler.load_state_dict(state)

    def run_eagerly(self) -> None:
        """As if the engine did not compile."""
        self.inner.run_eagerly()
        self.count = self._count

    def _parts(self, images: Tensor, labels: Tensor) -> list[Batch]:
        if self.accumulate == 1:
            return [(images, labels)]
        return list(zip(images.chunk(self.accumulate), labels.chunk(self.accumulate), strict=True))

    def _add(self, part: Batch) -> None:
        """Adds one part of the batch to the gradients and to the totals."""
        images, labels = part
        loss, correct = self.forward_loss(images, labels)
        self.backward(loss)
        self.count(loss.detach(), correct, len(labels))

    def _count(self, mean_loss: Tensor, correct: Tensor, samples: int) -> None:
        self.totals.add(mean_loss * samples, correct, samples)

    @property
    def changed(self) -> list[Tensor]:
        """All that a step changes, in place."""
        scaler: list[Any] = []
        if self.scaler.is_enabled():
            self.scaler.scale(self.lr)  # it makes its tensors when it is first used
            scaler = [self.scaler._scale, self.scaler._growth_tracker]
        state = [value for _, _, value in self._optimizer_tensors()]
        model = [*self.model.parameters(), *self.model.buffers()]
        return [*model, *state, *self.learning_rates, *scaler, *self.totals.tensors]

    def _optimizer_tensors(self) -> list[tuple[Tensor, str, Tensor]]:
        state = self.optimizer.state.items()
        return [
            (p, key, value) for p, of_p in state for key, value in of_p.items() if isinstance(value, Tensor)
        ]

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on. Collective."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "totals": self.totals.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """In place: a recorded step goes on from it."""
        self.model.load_state_dict(state["model"])
        held = self._optimizer_tensors()
        filled = [group["lr"] for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, lr in zip(self.optimizer.param_groups, filled, strict=True):
            group["lr"] = lr  # load_state_dict put a copy there that nobody fills
        for p, key, tensor in held:  # and others in place of these, which a graph has by their address
            self.optimizer.state[p][key] = tensor.copy_(self.optimizer.state[p][key])
        self.scaler.load_state_dict(state["scaler"])
        self.totals.load_state_dict(state["totals"])


class Evaluator:
    """Loss and accuracy over all samples of a loader, on all processes. mirrored: see ForwardLoss."""

    def __init__(self, model: nn.Module, engine: Engine, mirrored: bool = False) -> None:
        self.model = model
        self.totals = DeviceMetrics(engine.device)
        self.time_s = 0.0  # of the last one
        self.forward_loss = ForwardLoss(model, engine, "sum", mirrored=mirrored)
        if engine.compile:
            self.forward_loss.compile(fullgraph=True, dynamic=False)

    @torch.no_grad()
    def __call__(self, batches: Iterable[Batch | tuple[()]]) -> Metrics:
        start = time.perf_counter()
        self.model.eval()
        process_group.broadcast_buffers(self.model)  # BatchNorm statistics are each process's own until here
        self.totals.reset()
        for batch in batches:
            if batch:  # an empty one stands for a replay, which has added its own
                self.add(*batch)
        totals, _ = self.totals.read()  # waits for the device
        self.time_s = time.perf_counter() - start
        return totals

    def add(self, images: Tensor, labels: Tensor) -> None:
        loss, correct = self.forward_loss(images, labels)
        self.totals.add(loss, correct, (labels != IGNORED).sum())


def warm_up(
    train_step: TrainStep, evaluate: Evaluator, batch: Batch, evaluation: Loader, say: Callable[[str], None]
) -> None:
    """Compiles training and evaluation before the clock starts, leaving no trace in the model's state. Where
    compiling was auto's choice and the compiler turns out broken, everything runs eager instead, and `say`
    is told so."""
    try:
        train_step.warm_up(*batch)
        evaluate(itertools.islice(evaluation.evaluate(), 1))
    except UsageError:  # the data's fault, not the compiler's
        raise
    except Exception as error:
        if out_of_memory(error) or not (
            train_step.engine.compile and train_step.engine.compile_may_fall_back
        ):
            raise
        say(f"compile: false (the compiler failed: {first_line(error)})")
        train_step.run_eagerly()
        evaluate.forward_loss.run_eagerly()
        train_step.warm_up(*batch)


def check_channels_last(model: nn.Module, engine: Engine, batch: Batch) -> None:
    """Runs one eager forward and backward in the engine's precision, and raises AssertionError at the first convolution
    or normalisation whose activations or gradients are not channels-last; leaves no trace in the model's state."""
    wrong: list[str] = []

    def check(what: str, tensor: Tensor) -> None:
        if not tensor.is_contiguous(memory_format=torch.channels_last):
            wrong.append(f"{what} has strides {tuple(tensor.stride())} for shape {tuple(tensor.shape)}")

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], out: Any) -> None:
            # The input too: a convolution with channels-last weights gives channels-last whatever it is given.
            for what, tensor in (("input", inputs[0]), ("output", out)):
                # A norm that forks and a convolution that normalises have tuples, the tensor first.
                tensor = tensor[0] if isinstance(tensor, tuple) else tensor
                check(f"the {what} of {name}", tensor)
                if tensor.requires_grad:
                    tensor.register_hook(partial(check, f"the gradient of the {what} of {name}"))

        return hook

    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]
    handles = [module.register_forward_hook(watch(name)) for name, module in layers]
    try:
        with unchanged(model.buffers()):
            model.train()
            forward_loss = ForwardLoss(model, engine, "mean")
            forward_loss.run_eagerly()
            loss, _ = forward_loss(batch[0][:2], batch[1][:2])
            # Not backward(): DDP's hooks would count it as the first step, and never average a gradient after that.
            torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    if wrong:
        raise AssertionError(wrong[0])


@contextmanager
def unchanged(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Puts the tensors' values back afterwards."""
    before = [(tensor, tensor.detach().clone()) for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, values in before:
                tensor.copy_(values)
