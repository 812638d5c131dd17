"""Modules for networks: BatchNormAct2d and Conv2d, with the parameters and state_dict keys of torch's own modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from . import batchnorm
from .batchnorm.dispatch_table import fastest
from .cpu import batchnorm as cpp_norm
from .cpu import conv_norm as cpp_conv_norm
from .cpu import convolution as cpp_conv
from .cpu import dispatch_table as cpu_table
from .triton_launch import INTERPRETED, runs_kernels

# batchnorm.ops is imported at its first use, because registering an op with Triton kernels imports torch's compiler,
# which takes a second. The C++ kernels and torch's own operations do without it.


class Skip(NamedTuple):
    """An activation on a skip connection: returned by BatchNormAct2d with `fork`, accepted as its `residual`.

    Attributes:
        y: the activation, (N, C, H, W).
        gradient: token that receives y's gradient, so that it arrives separately: see batchnorm/ops.py.
    """

    y: Tensor
    gradient: Tensor


# ---- running statistics ------------------------------------------------------------------------------------


class BatchStatistics(NamedTuple):
    """The statistics of one batch, towards which the running statistics of `norm` move."""

    norm: Any
    mean: Tensor  # (C,)
    var: Tensor  # (C,), biased
    values: int  # number of values per channel; 1 if var is the unbiased estimate already


class DeferredRunningStats:
    """A reusable context manager that updates the running statistics of many BatchNormAct2d modules on exit.

    The updates of all modules take two kernels under inductor and a few in eager execution; on their own, each module
    takes at least one. Each module must be called at most once inside the block; otherwise one of its updates may be
    lost. A module with `momentum=None` updates at once, because its rate depends on its own counter. The C++ kernels
    also update at once, and torch's own operations defer only the counter.

    Blocks may nest: the outermost one applies the updates. An exception discards all pending updates. A copy, by
    copy.deepcopy or pickle, has no pending updates and is outside of any block.
    """

    def __init__(self) -> None:
        self.depth = 0  # number of open blocks
        self.statistics: list[BatchStatistics] = []
        self.counters: list[Any] = []  # num_batches_tracked of the modules, () int64 each, to be incremented

    @property
    def active(self) -> bool:
        """True inside a block."""
        return self.depth > 0

    def __enter__(self) -> DeferredRunningStats:
        self.depth += 1
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.depth -= 1
        if self.depth > 0 and kind is None:
            return
        statistics, counters = self.statistics, self.counters
        self.statistics, self.counters = [], []
        if kind is None:
            with torch.no_grad():
                _apply(statistics, counters)

    def around(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return function(*args), called inside the block. In contrast to `with`, torch 2.11 compiles it."""
        if not torch.compiler.is_compiling():
            with self:
                return function(*args)
        self.__enter__()
        result = function(*args)
        self.__exit__(None, None, None)
        return result

    def __reduce__(self) -> tuple[Any, ...]:
        return DeferredRunningStats, ()


def _apply(statistics: list[BatchStatistics], counters: list[Any]) -> None:
    """Move the running statistics towards the batches' in place, and increment the counters."""
    for momentum in {of.norm.momentum for of in statistics}:
        running: list[Any] = []
        batch: list[Tensor] = []
        for norm, mean, var, values in statistics:
            if norm.momentum == momentum:
                running += [norm.running_mean, norm.running_var]
                batch += [mean, var * (values / max(1, values - 1))]
        batch = [new.to(old.dtype) for new, old in zip(batch, running, strict=True)]
        torch._foreach_lerp_(running, batch, momentum)
    if counters:
        torch._foreach_add_(counters, 1)


def defer_running_stats(model: nn.Module) -> DeferredRunningStats:
    """Return the context manager inside which the BatchNormAct2d modules of `model` defer their updates.

    A second call for the same modules returns the same object, so that training and evaluation can share a model. If
    the modules have different objects, or some have none, all of them get a new one; entering an older one then has no
    effect.

    Args:
        model: gets the deferral as an attribute of its BatchNormAct2d modules.

    Returns:
        The context manager; the updates happen at its end.
    """
    norms = [module for module in model.modules() if isinstance(module, BatchNormAct2d)]
    first = norms[0].deferral if norms else None
    if first is not None and all(norm.deferral is first for norm in norms):
        return first
    deferral = DeferredRunningStats()
    for norm in norms:
        norm.deferral = deferral
    return deferral


# ---- BatchNorm + ReLU (+ add) ------------------------------------------------------------------------------


class BatchNormAct2d(nn.BatchNorm2d):
    """act(BatchNorm2d(x) + residual) in one operation, with the parameters and state_dict of torch.nn.BatchNorm2d.

        norm = BatchNormAct2d(64)
        y = norm(x, residual)  # relu(norm(x) + residual)

    Batch normalisation is that of Ioffe and Szegedy 2015, with biased variance in the forward and unbiased variance in
    the running statistics, as in torch.

    (N, C, H, W) channels-last -> (N, C, H, W) channels-last, of x's dtype. On a GPU, Triton kernels take bf16, fp16
    and fp32. On a CPU, C++ takes bf16 and fp32, in training and for inference without gradients, if cpu/library.py
    finds the instructions and the compiler that it needs. torch's own operations take everything else. Parameters and
    statistics are float32.

    Args:
        num_features: C, the number of channels.
        eps: added to the variance.
        momentum: weight of a batch in the running statistics; None for the mean over all batches.
        affine: have a weight and a bias, (C,) each.
        track_running_stats: keep running statistics, which normalise in eval mode.
        act: "relu" or "none".
        algorithm: "two_pass" for tensors of any size; "cooperative" for tensors that fit on the GPU at once, with
            two_pass for the others; "measured" for the algorithm that batchnorm/dispatch_table.py, or
            cpu/dispatch_table.py on a CPU, names for the device and shape, with torch's own operations for shapes that
            it does not name.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Raises:
        ValueError: if `act` or `algorithm` is another text.
        NotImplementedError: if gradients of gradients are computed.
    """

    forks = True  # forward has an argument `fork`
    deferral: DeferredRunningStats | None = None  # set by defer_running_stats

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        act: str = "relu",
        *,
        algorithm: str = "two_pass",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if act not in ("relu", "none"):
            raise ValueError(f"BatchNormAct2d: act should be 'relu' or 'none', not {act!r}")
        if algorithm not in ("two_pass", "cooperative", "measured"):
            raise ValueError(
                f"BatchNormAct2d: algorithm should be 'two_pass', 'cooperative' or 'measured', not {algorithm!r}"
            )
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.act = act
        self.algorithm = algorithm
        self.group_name = ""  # the process group that shares the statistics: see convert_sync_batchnorm

    def forward(self, x: Tensor, residual: Tensor | Skip | None = None, fork: bool = False) -> Any:
        """Return y = act(BatchNorm(x) + residual), or (y, Skip) with `fork`.

        Args:
            x: (N, C, H, W); channels-last for the kernels.
            residual: of x's shape, cast to its dtype; None adds nothing.
            fork: also return a Skip for a skip connection around the next layers. Another BatchNormAct2d takes the Skip
                as its residual and returns its gradient separately to this module's backward, which adds the two
                gradients in a pass that it makes anyway.

        Raises:
            ValueError: if a shape does not fit, or if there is only one value per channel in training.
        """
        return self._normalise(x, residual, fork, self.act == "relu")

    def _normalise(self, x: Tensor, residual: Tensor | Skip | None, fork: bool, relu: bool) -> Any:
        """Return forward's result, with ReLU if `relu` is true, whatever the attribute `act` says."""
        backend = self._backend(x, residual.y if isinstance(residual, Skip) else residual)
        if backend == "cpp" and self.training:
            y, gradient = cpp_norm.batch_norm_act(x, *_added_and_skip(residual, x), self, relu)
        elif backend == "cpp":
            y = gradient = cpp_norm.inference(x, _added_and_skip(residual, x)[0], self, relu)
        elif backend == "torch":
            y = gradient = self._unfused(x, residual, relu)
        else:
            y, gradient = self._fused(x, residual, fork, backend, *self._statistics(x), relu)
        return (y, Skip(y, gradient)) if fork else y

    def convolve(self, conv: nn.Module, x: Tensor, residual: Tensor | Skip | None = None, fork: bool = False) -> Any:
        """Return the result of self(conv(x), residual, fork), or None if no kernel computes both together.

        Hooks of the modules do not run.

        Raises:
            ValueError: as forward.
        """
        if type(x) is not Tensor or not self.training or type(self) is not BatchNormAct2d:
            return None
        if type(conv) is not Conv2d or conv.algorithm != "cpp" or not cpp_conv_norm.can_convolve_normalise(conv, x):
            return None
        # x has the shape and dtype of the convolution's output.
        if self._backend(x, residual.y if isinstance(residual, Skip) else residual) != "cpp":
            return None
        relu = self.act == "relu"
        y, gradient = cpp_conv_norm.conv_norm_act(x, conv.weight, *_added_and_skip(residual, x), self, relu)
        return (y, Skip(y, gradient)) if fork else y

    def _backend(self, x: Tensor, residual: Tensor | None) -> str:
        """Return "cpp", "torch", or the algorithm of the op batch_norm_act: "two_pass" or "cooperative".

        torch's operations take what no kernel takes, unless the ranks share statistics, which they cannot do on a CPU.
        The op itself then falls back to the reference.
        """
        # The C++ kernels cannot share statistics between ranks, and must not replace interpreted Triton kernels.
        measured, adds = self.algorithm == "measured", residual is not None
        # The shape of a subclass of Tensor may be symbolic, which the table cannot look up.
        wants_cpp = type(x) is Tensor and x.is_cpu and not self.group_name and (measured or not INTERPRETED)
        if (
            wants_cpp
            and not torch.compiler.is_compiling()
            and (not measured or cpu_table.is_faster(x, self.training, adds))  # first, because it takes the least time
            and cpp_norm.can_normalise(self, x, residual)
            and cpp_norm.available()[0]  # last, because the first call builds them
        ):
            return "cpp"
        if self.group_name:  # torch's own operations cannot share statistics
            return "two_pass" if measured else self.algorithm
        if measured:
            return fastest(x, adds)
        return self.algorithm if x.is_cuda or runs_kernels(x) else "torch"

    def _fused(
        self,
        x: Tensor,
        residual: Tensor | Skip | None,
        fork: bool,
        algorithm: str,
        mean: Tensor | None,  # (C,), with var: given statistics; None: use the statistics of x
        var: Tensor | None,  # (C,), biased
        relu: bool,
    ) -> tuple[Tensor, Tensor]:
        """Call the op batch_norm_act and update the running statistics; return y and the token for a Skip."""
        group = self.group_name if mean is None else ""
        y, used_mean, used_var, count, _, gradient = batchnorm.ops.batch_norm_act(
            x,
            *_added_and_skip(residual, x),
            self.weight,
            self.bias,
            mean,
            var,
            self.eps,
            relu,
            fork,
            group,
            algorithm,
        )
        if group:
            self._track(used_mean, used_var * (count / (count - 1)), 1)
        else:
            self._track(used_mean, used_var, x.numel() // x.shape[1])
        return y, gradient

    def _unfused(self, x: Tensor, residual: Tensor | Skip | None, relu: bool) -> Tensor:
        """Compute y with torch's own operations, which torch.compile may fuse."""
        if (deferral := self._open_deferral) is not None:
            # This is nn.BatchNorm2d.forward with the counter's increment deferred.
            self._check_input_dim(x)
            running, momentum = (self.running_mean, self.running_var), self.momentum
            assert momentum is not None  # because of _open_deferral
            y = F.batch_norm(x, *running, self.weight, self.bias, True, momentum, self.eps)
            deferral.counters.append(self.num_batches_tracked)
        else:
            y = nn.BatchNorm2d.forward(self, x)  # not super(), because a subclass may have a second base class
        if residual is not None:
            y += residual.y if isinstance(residual, Skip) else residual
        return F.relu(y, inplace=True) if relu else y

    def _statistics(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return the running mean and variance if they normalise x, else (None, None). Raise ValueError as forward."""
        self._check_input_dim(x)
        if x.shape[1] != self.num_features:
            raise ValueError(f"BatchNormAct2d({self.num_features}): the input has {x.shape[1]} channels")
        if not self.training and self.running_mean is not None:
            return self.running_mean, self.running_var
        if x.numel() == x.shape[1] and not self.group_name:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")
        return None, None

    @property
    def _tracks(self) -> bool:
        """True if this forward updates the running statistics."""
        return self.training and self.track_running_stats

    @property
    def _open_deferral(self) -> DeferredRunningStats | None:
        """The open block that defers this module's update of its running statistics, or None."""
        deferral = self.deferral
        if deferral is None or not deferral.active or not self._tracks or self.momentum is None:
            return None
        return deferral

    def _track(self, mean: Tensor, var: Tensor, count: int) -> None:
        """Move the running statistics, if there are any, towards a batch's: at the end of the open block, or now.

        mean is (C,), var (C,) biased, and count the number of values per channel (1 if var is unbiased already).
        """
        if (deferral := self._open_deferral) is not None:
            deferral.statistics.append(BatchStatistics(self, mean, var, count))
            deferral.counters.append(self.num_batches_tracked)
        elif self._tracks:
            running = (self.running_mean, self.running_var, self.num_batches_tracked)
            batchnorm.ops.update_running_statistics(mean, var, *running, count, self.momentum)

    def extra_repr(self) -> str:
        """Return torch's description of the module with the activation."""
        return f"{super().extra_repr()}, act={self.act!r}"  # type: ignore[no-untyped-call]


def _added_and_skip(residual: Tensor | Skip | None, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return the tensor to add, of x's dtype, and the token that takes its gradient if the residual is a Skip.

    Raises:
        ValueError: if the residual does not have x's shape.
    """
    added = residual.y.detach() if isinstance(residual, Skip) else residual
    if added is not None and added.shape != x.shape:
        raise ValueError(f"BatchNormAct2d: the residual has shape {tuple(added.shape)}, the input {tuple(x.shape)}")
    return None if added is None else added.to(x.dtype), getattr(residual, "gradient", None)


Norm = TypeVar("Norm", bound=BatchNormAct2d)


def converted(norm: nn.BatchNorm2d, kind: type[Norm], **options: Any) -> Norm:
    """Return a module of class `kind` with the parameters, buffers and settings of `norm`; `options` are kind's."""
    settings = (norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    new = kind(*settings, **options, device="meta")
    new.weight, new.bias = norm.weight, norm.bias
    for name, buffer in norm.named_buffers(recurse=False):
        setattr(new, name, buffer)
    return new.train(norm.training)


def convert_sync_batchnorm(model: nn.Module, group: dist.ProcessGroup | None = None) -> nn.Module:
    """Make every BatchNorm2d of `model` share its training statistics, forward and backward, within `group`.

    A torch.nn.BatchNorm2d becomes a torch.nn.SyncBatchNorm on a GPU. That class rejects CPUs, so on a CPU it becomes a
    BatchNormAct2d without activation. Parameters, buffers and keys are unchanged.

    Args:
        model: modified in place; it has to be on its device already.
        group: the process group; None for all processes.

    Returns:
        The model.
    """
    name = (group or dist.group.WORLD).group_name  # type: ignore[union-attr]
    for parent in list(model.modules()):
        for child, module in parent.named_children():
            if type(module) is nn.BatchNorm2d:
                setattr(parent, child, _shared(module, group))
    for module in model.modules():
        if isinstance(module, BatchNormAct2d):
            module.group_name = name
    return model


def _shared(norm: nn.BatchNorm2d, group: dist.ProcessGroup | None) -> nn.Module:
    """Return a module with the parameters and statistics of `norm` that can share the statistics."""
    tensor = next(norm.parameters(), norm.running_mean)
    if tensor is not None and tensor.device.type == "cuda":
        sync: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(norm, group)
        return sync
    return converted(norm, BatchNormAct2d, act="none")


# ---- convolutions ------------------------------------------------------------------------------------------


class Conv2d(nn.Conv2d):
    """torch.nn.Conv2d that runs cpu/convolution.py if `algorithm` is "cpp" and `can_convolve` says that it pays.

    It does for many 3×3 convolutions in channels-last bf16 or float32, on a CPU. Arguments, parameters and state_dict
    are those of torch.nn.Conv2d.
    """

    algorithm = "torch"  # or "cpp"

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.algorithm == "cpp" and cpp_conv.can_convolve(self, input):
            return cpp_conv.conv2d(input, weight, bias, self.stride[0])
        y: Tensor = super()._conv_forward(input, weight, bias)
        return y
