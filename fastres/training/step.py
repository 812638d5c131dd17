"""One training step. In fastres, only this module calls torch.autocast and torch.compile.

Forward and loss are one graph, compiled without breaks. The backward pass comes from AOTAutograd, and the optimizer is
one fused kernel. A step never makes the host wait for the device, because metrics stay there until they are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastres.config.schema import OptimConfig
from fastres.distributed import process_group
from fastres.models.freeze import training_mode
from fastres.training.engine import Engine
from fastres.training.metrics import DeviceMetrics
from fastres.training.optim import build_optimizer, learning_rates
from fastres_kernels import defer_running_stats

# Images (b, C, S, S) of b samples with S × S pixels, in the engine's dtype; labels (b,) int64, or (b, classes) float32
# if images are mixed: the share of each class, summing to 1 for each sample.
Batch = tuple[Tensor, Tensor]


def compiled(work: Callable[..., Any]) -> Callable[..., Any]:
    """Return `work` compiled by inductor.

    If `work` only copies, adds and divides, the result is bitwise identical to eager execution, because
    eager_numerics.division_rounding makes inductor round divisions as eager execution does.
    """
    return torch.compile(work, fullgraph=True, dynamic=False, options={"eager_numerics.division_rounding": True})


def raise_recompile_limit(count: int) -> None:
    """Raise dynamo's recompile limit to at least `count`.

    Dynamo gives up after eight compilations of a code object, and all models and settings in a process share the code
    objects of this module.
    """
    import torch._dynamo.config  # takes a second, which a run without torch.compile saves

    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, count)


class BatchedCast(torch.autograd.Function):
    """Cast all weights together: (dtype, *weights) -> the same weights in `dtype`.

    The weights may have different shapes and memory orders, but must be dense and share one dtype. Under inductor the
    forward takes two kernels and the backward takes one. Casting the weights one by one takes a launch for each, and
    another for each gradient (docs/EXPERIMENTS.md, "The fused kernels, without a GPU").
    """

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        """Return the weights in `dtype`, each with its shape and strides."""
        ctx.dtype = weights[0].dtype
        # Flatten in memory order; restore each weight's strides afterwards.
        orders = [sorted(range(w.ndim), key=w.stride, reverse=True) for w in weights]
        dense = [w.permute(order) for w, order in zip(weights, orders, strict=True)]
        parts = torch.cat([w.flatten() for w in dense]).to(dtype).split([w.numel() for w in weights])
        cast = [part.view(w.shape) for part, w in zip(parts, dense, strict=True)]
        back = [[order.index(d) for d in range(len(order))] for order in orders]
        return tuple(w.permute(order) for w, order in zip(cast, back, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return None for `dtype`, then the gradients in the weights' dtype."""
        # Cast by multiplying by one in the weights' dtype, which is exact. Inductor compiles _foreach_mul to one
        # kernel, but separate casts to several. The result takes the dtype of `one` only if `one` has as many
        # dimensions as the gradient: a 0-dimensional tensor does not promote.
        one = torch.ones((), dtype=ctx.dtype, device=grads[0].device)
        return None, *torch._foreach_mul(list(grads), [one.view((1,) * grad.ndim) for grad in grads])


class Forward(nn.Module):
    """The forward pass in the engine's precision. Subclasses add the loss and what they count, and may be compiled.

    Args:
        model: the network.
        engine: the resolved engine.
        mirrored: average the logits of each image and of its mirror image.
    """

    def __init__(self, model: nn.Module, engine: Engine, mirrored: bool = False) -> None:
        super().__init__()
        self.model, self.engine, self.mirrored = model, engine, mirrored
        self.mixed = engine.precision in ("bf16", "fp16")
        self.cast_together = self.mixed and engine.compile  # eager execution gains nothing: autocast casts
        self.deferred_stats = defer_running_stats(model)

    def logits(self, images: Tensor) -> Tensor:
        """Return the logits, (b, classes) float32 or wider, of images (b, C, S, S)."""
        # On leaving the block, the running statistics of all layers are updated together, which takes two kernels. A
        # block covers one pass, because each layer may be called once in it. Only evaluations mirror, and they update
        # no statistics.
        logits: Tensor = self.deferred_stats.around(self._one_pass, images)
        if self.mirrored:
            logits = (logits + self._one_pass(images.flip(3))) / 2
        return logits

    def _one_pass(self, images: Tensor) -> Tensor:
        """Return the logits of the images as they are."""
        dtype = self.engine.dtype if self.mixed else None
        with torch.autocast(self.engine.device.type, dtype, enabled=self.mixed):
            if self.cast_together:
                logits = torch.func.functional_call(self.model, self._cast_weights(), (images,))
            else:
                logits = self.model(images)
        widened: Tensor = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return widened

    def _cast_weights(self) -> dict[str, Tensor]:
        """Return the weights and biases of all convolutions and linear layers, cast to the engine's dtype.

        They are cast in one operation; autocast would cast them one by one. Frozen weights, which have no gradient to
        cast back, are left to autocast. BatchNorm's parameters stay in fp32.

        Returns:
            The cast tensors by parameter name.
        """
        found = {
            f"{name}.{kind}": parameter
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Conv2d | nn.Linear)
            for kind, parameter in module.named_parameters(recurse=False)
            if parameter.requires_grad
        }
        # Sort weights with a multiple of eight elements to the front, so that these begin at a multiple of 16 bytes (2
        # bytes per element), which tensor cores require.
        names = sorted(found, key=lambda name: found[name].numel() % 8 != 0)
        if not names:
            return {}
        cast = BatchedCast.apply(self.engine.dtype, *(found[name] for name in names))
        return dict(zip(names, cast, strict=True))

    @property
    def compiled(self) -> bool:
        """Return True if calls run compiled code."""
        return self._compiled_call_impl is not None

    def run_eagerly(self) -> None:
        """Run eagerly from now on, and let autocast cast the weights one by one."""
        self._compiled_call_impl = None
        self.cast_together = False


class ForwardLoss(Forward):
    """Forward and training loss: (images, labels) -> (loss, number of correct predictions), both () on the device.

    Args:
        model: the network.
        engine: the resolved engine.
        label_smoothing: label smoothing of the loss, in [0, 1).
        class_weights: (classes,) factors of the loss of each class's samples; None for 1.
    """

    def __init__(
        self, model: nn.Module, engine: Engine, label_smoothing: float = 0.0, class_weights: Tensor | None = None
    ) -> None:
        super().__init__(model, engine)
        self.label_smoothing, self.class_weights = label_smoothing, class_weights

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean loss over the samples, () float32 or wider, and the correct predictions, () int64."""
        logits = self.logits(images)
        mixed = labels.is_floating_point()
        target = labels.to(logits.dtype) if mixed else labels
        if self.class_weights is None:
            loss = F.cross_entropy(logits, target, label_smoothing=self.label_smoothing)
        else:
            # torch's mean would divide by the weights of these samples, so the gradient of a batch would depend on how
            # it is divided into micro-batches and processes.
            weights, smoothing = self.class_weights, self.label_smoothing
            loss = F.cross_entropy(logits, target, weights, reduction="sum", label_smoothing=smoothing) / len(labels)
        # The correct class of a mixed sample is the class with the largest share.
        return loss, (logits.argmax(1) == (labels.argmax(1) if mixed else labels)).sum()


class TrainStep:
    """One optimizer step: forward, loss, backward, update.

        step = TrainStep(engine.place(model), engine, config.optim)
        step(images, labels, lr=0.1)

    `metrics` accumulates the loss, correct predictions and samples of all steps on the device. `metrics.read()` returns
    their sums as Metrics with the number of the first step whose loss was not finite (-1: none), and synchronises with
    the device; `metrics.reset()` sets them to zero.

    Args:
        model: the network, already on the engine's device: see Engine.place.
        engine: the resolved engine.
        optim: the optimizer's fields.
        label_smoothing: label smoothing of the training loss, in [0, 1).
        accumulate: number of micro-batches per step. It must divide the per-rank batch. Only one micro-batch at a time
            has to fit in memory.
        class_weights: (classes,) factors of the loss of each class's samples, on the device; None for 1.

    Raises:
        UsageError: if the optimizer is unavailable.
    """

    def __init__(
        self,
        model: nn.Module,
        engine: Engine,
        optim: OptimConfig,
        label_smoothing: float = 0.0,
        accumulate: int = 1,
        class_weights: Tensor | None = None,
    ) -> None:
        self.engine = engine
        self.model = model
        self.accumulate = accumulate
        self.lr = torch.zeros((), device=engine.device)
        # The gradient of the loss itself, 1, from which each backward starts. Without it autograd would allocate and
        # fill a tensor of ones.
        self.one = torch.ones((), device=engine.device, dtype=torch.promote_types(engine.dtype, torch.float32))
        self.optimizer = build_optimizer(model, optim, self.lr)
        self.learning_rates = learning_rates(self.optimizer)
        self.scaler = torch.amp.GradScaler(engine.device.type, enabled=engine.precision == "fp16")
        self.metrics = DeviceMetrics(engine.device)
        self.inner = ForwardLoss(model, engine, label_smoothing, class_weights)
        if engine.compile:
            self.inner.compile(fullgraph=True, dynamic=False)
        self.add_to_metrics = compiled(self._add_to_metrics) if engine.compile else self._add_to_metrics
        # DDP wraps the compiled module, because DDP's hooks inside the compiled module would cause graph breaks.
        self.forward_loss = process_group.wrap(self.inner, engine.device, engine.compress_gradients)

    def __call__(self, images: Tensor, labels: Tensor, lr: float, step: int | None = None) -> None:
        """Run a training step on this rank's batch.

        Args:
            images: (b, C, S, S) in the engine's dtype and memory format, on its device.
            labels: (b,) int64, or (b, classes) float32 shares.
            lr: the schedule's learning rate. Each parameter group multiplies it by its own scale.
            step: the step's number, for the report of a non-finite loss; None for the next one, from 0.
        """
        for tensor, scale in self.learning_rates.items():
            tensor.fill_(lr * scale)
        if step is None:
            self.metrics.step += 1
        else:
            self.metrics.step.fill_(step)
        self.run_on_device(images, labels)

    def run_on_device(self, images: Tensor, labels: Tensor) -> None:
        """Run one training step with the step number and learning rates already on the device.

        It launches the same work on every call and never branches on device values, so it can be captured in a CUDA
        graph (training/cuda_graph.py).
        """
        if not self.model.training:  # checked first, because training_mode() walks through all modules
            training_mode(self.model)
        *first, last = self._micro_batches(images, labels)
        for micro_batch in first:
            with process_group.no_sync(self.forward_loss):
                self._accumulate_gradients(micro_batch)
        self._accumulate_gradients(last)
        self.update()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of loss / accumulate, times the fp16 loss scale, to the parameters' .grad.

        `loss` is () and the mean over one micro-batch.
        """
        self.scaler.scale(loss if self.accumulate == 1 else loss / self.accumulate).backward(self.one)

    def update(self) -> None:
        """Run the optimizer's step, update the fp16 loss scale and drop the gradients."""
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def warm_up(self, images: Tensor, labels: Tensor) -> None:
        """Compile forward, loss, backward and counting by running one micro-batch of the batch (images, labels).

        Parameters, buffers and metrics keep their values, gradients are dropped, and the model stays in training mode.
        """
        with preserving([*self.model.buffers(), *self.metrics.tensors]):
            training_mode(self.model)
            self._accumulate_gradients(self._micro_batches(images, labels)[0])
        self.model.zero_grad()

    def abort_step(self) -> None:
        """Discard a step that has raised: drop its gradients, and replace the loss scaler by one with the same scale.

        A scaler that was interrupted between its step() and update() would reject the next step. Weights and metrics
        are not restored; `preserving` does that.
        """
        self.optimizer.zero_grad()
        state = self.scaler.state_dict()
        self.scaler = torch.amp.GradScaler(self.engine.device.type, enabled=self.scaler.is_enabled())
        self.scaler.load_state_dict(state)

    def run_eagerly(self) -> None:
        """Run eagerly from now on, as if the engine did not compile."""
        self.inner.run_eagerly()
        self.add_to_metrics = self._add_to_metrics

    def _micro_batches(self, images: Tensor, labels: Tensor) -> list[Batch]:
        """Split a batch into `accumulate` micro-batches of equal size."""
        if self.accumulate == 1:
            return [(images, labels)]
        return list(zip(images.chunk(self.accumulate), labels.chunk(self.accumulate), strict=True))

    def _accumulate_gradients(self, micro_batch: Batch) -> None:
        """Run forward, loss and backward on one micro-batch, and count it in the metrics."""
        images, labels = micro_batch
        loss, correct = self.forward_loss(images, labels)
        self.backward(loss)
        self.add_to_metrics(loss.detach(), correct, len(labels))

    def _add_to_metrics(self, mean_loss: Tensor, correct: Tensor, samples: int) -> None:
        """Add one micro-batch to the metrics."""
        self.metrics.add(mean_loss * samples, correct, samples)

    @property
    def mutated_tensors(self) -> list[Tensor]:
        """Return all tensors that a step changes in place. build_optimizer has made the optimizer's state already."""
        scaler: list[Any] = []
        if self.scaler.is_enabled():
            self.scaler.scale(self.lr)  # any tensor will do: the scaler makes its own tensors when it is first used
            scaler = [self.scaler._scale, self.scaler._growth_tracker]
        state = [value for _, _, value in self._optimizer_tensors()]
        model = [*self.model.parameters(), *self.model.buffers()]
        return [*model, *state, *self.learning_rates, *scaler, *self.metrics.tensors]

    def _optimizer_tensors(self) -> list[tuple[Tensor, str, Tensor]]:
        """Return parameter, name and tensor of each tensor in the optimizer's state."""
        return [
            (parameter, key, value)
            for parameter, state in self.optimizer.state.items()
            for key, value in state.items()
            if isinstance(value, Tensor)
        ]

    def state_dict(self) -> dict[str, Any]:
        """Return the state to resume from: model, optimizer, loss scale and metric sums over all ranks. Collective."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "totals": self.metrics.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copy the state into the existing tensors, so that a captured step continues from it.

        The saved learning rates are ignored, because every step sets them.
        """
        self.model.load_state_dict(state["model"])
        tensors = self._optimizer_tensors()
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, lr in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = lr  # the optimizer has replaced our tensor, which __call__ fills, by a copy
        # It has replaced the state's tensors too, although a CUDA graph reads and writes the old ones.
        for parameter, key, tensor in tensors:
            self.optimizer.state[parameter][key] = tensor.copy_(self.optimizer.state[parameter][key])
        self.scaler.load_state_dict(state["scaler"])
        self.metrics.load_state_dict(state["totals"])


@contextmanager
def preserving(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Restore the tensors' values when the block ends, also if it raises."""
    before = [(tensor, tensor.detach().clone()) for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, values in before:
                tensor.copy_(values)
