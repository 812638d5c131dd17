"""The modules that networks are built of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .batchnorm.dispatch_table import fastest
from .batchnorm.ops import batch_norm_act, update_running_statistics
from .cpu import ops as cpu_ops
from .experimental.ops import CHANNELS_3X3, conv_norm
from .triton_launch import INTERPRETED


class Skip(NamedTuple):
    """An activation on its way over a skip connection: given by BatchNormAct2d with `fork`, taken as its `residual`."""

    y: Tensor  # (N, C, H, W)
    gradient: Tensor  # takes y's gradient in its stead, so that it arrives apart: see ops.py


class WithStatistics(NamedTuple):
    """What a NormConv2d gives: its output and, of it, the statistics that BatchNormAct2d needs."""

    z: Tensor  # (N, C, H, W)
    mean: Tensor  # (C,)
    var: Tensor  # (C,), biased


class DeferredNormAct(NamedTuple):
    """relu(BatchNorm(z)), yet to be computed by the convolution that reads it."""

    z: Tensor  # (N, C, H, W)
    mean: Tensor  # (C,); these four as BatchNormAct2d would use them
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float


class Statistics(NamedTuple):
    """Of a batch: what the running statistics of `norm` are to be moved towards."""

    norm: Any
    mean: Tensor  # (C,)
    var: Tensor  # (C,), biased
    values: int  # how many they are of; 1: var is the unbiased estimate already


class Waiting(NamedTuple):
    """What is to be done at the end of defer_running_stats."""

    statistics: list[Statistics]
    counters: list[Any]  # num_batches_tracked, () int64 each: one more


_waiting: Waiting | None = None  # inside of defer_running_stats


@contextmanager
def defer_running_stats() -> Iterator[None]:
    """Inside of it the running statistics of BatchNormAct2d stay; at its end those of all modules move at once, in two
    kernels under inductor and few in eager execution, where each on its own has one or more. For a forward that calls
    each module once: a module that is called twice may move once."""
    global _waiting
    waiting = _waiting = Waiting([], [])
    try:
        yield
    finally:
        _waiting = None
    with torch.no_grad():
        for momentum in {of.norm.momentum for of in waiting.statistics}:
            running: list[Any] = []
            batch: list[Tensor] = []
            for norm, mean, var, values in waiting.statistics:
                if norm.momentum == momentum:
                    running += [norm.running_mean, norm.running_var]
                    batch += [mean, var * (values / max(1, values - 1))]
            batch = [new.to(old.dtype) for new, old in zip(batch, running, strict=True)]
            torch._foreach_lerp_(running, batch, momentum)
        if waiting.counters:
            torch._foreach_add_(waiting.counters, 1)


class BatchNormAct2d(nn.BatchNorm2d):
    """act(BatchNorm2d(x) + residual) in one operation, with the parameters and the state_dict of torch.nn.BatchNorm2d.

    (N, C, H, W) channels-last -> (N, C, H, W) channels-last, of x's dtype: bf16, fp16 or fp32 through Triton kernels on
    a GPU; bf16 in training through C++ on a CPU that has what cpu.py asks for; anything through the reference
    elsewhere. Parameters and statistics are float32. `act`: "relu" or "none"; `algorithm`, on a GPU: "two_pass" for any
    size, "cooperative" for what fits at once, the other elsewhere, or "measured": what tables.py names for the device
    and the shape, torch's own operations elsewhere. Gradients of gradients are refused by a NotImplementedError.
    """

    forks = True  # forward has an argument `fork`

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
        self.group_name = ""  # of the processes that share the statistics: see convert_sync_batchnorm

    def forward(
        self, x: Tensor | WithStatistics, residual: Tensor | Skip | None = None, fork: bool = False
    ) -> Any:
        """x, residual: (N, C, H, W) of one shape -> the same; with `fork` a tuple of it and, for a skip connection
        around what follows, a Skip of it: handed to another BatchNormAct2d as its residual, it brings its gradient
        into this one's backward apart, which adds the two on its way. ValueError on any other shape, and in training
        on one value per channel.
        """
        algorithm = self.algorithm
        if isinstance(x, Tensor) and self._runs_in_cpp(x):
            y, gradient = cpu_ops.batch_norm_act(x, *_parts(residual, x), self, self.act == "relu")
            return (y, Skip(y, gradient)) if fork else y
        if algorithm == "measured":
            algorithm = "torch" if isinstance(x, WithStatistics) else fastest(x, residual is not None)
        if algorithm == "torch":
            y = self._unfused(x.z if isinstance(x, WithStatistics) else x, residual)
            return (y, Skip(y, y)) if fork else y
        x, mean, var = self._statistics(x)
        added, skip = _parts(residual, x)
        group = self.group_name if mean is None else ""
        y, used_mean, used_var, count, _, gradient = batch_norm_act(
            x,
            added,
            skip,
            self.weight,
            self.bias,
            mean,
            var,
            self.eps,
            self.act == "relu",
            fork,
            group,
            algorithm,
        )
        if group:
            self._track(used_mean, used_var * (count / (count - 1)), 1)
        else:
            self._track(used_mean, used_var, x.numel() // x.shape[1])
        return (y, Skip(y, gradient)) if fork else y

    def _runs_in_cpp(self, x: Tensor) -> bool:
        """Whether cpu.py takes x: not where processes share statistics, nor where Triton's kernels are interpreted."""
        wanted = self.algorithm == "measured" or not INTERPRETED
        return wanted and not self.group_name and cpu_ops.normalises(self, x)

    def pending(self, x: Tensor | WithStatistics) -> Any:
        """forward(x) for a NormConv2d, which computes it as it reads; forward(x) itself where x brings no statistics,
        and where the activation is not ReLU."""
        if self.act != "relu" or not isinstance(x, WithStatistics):
            return self(x)
        z, mean, var = self._statistics(x)
        assert mean is not None and var is not None
        self._track(mean.detach(), var.detach(), z.numel() // z.shape[1])
        return DeferredNormAct(z, mean, var, self.weight, self.bias, self.eps)

    def _statistics(self, x: Tensor | WithStatistics) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """x, and the mean and variance to normalise it with; None: those of x, which nobody has taken yet."""
        mean = var = None
        if isinstance(x, WithStatistics):
            if self.group_name:
                raise ValueError("BatchNormAct2d: NormConv2d does not share its statistics between processes")
            x, mean, var = x
        self._check_input_dim(x)
        if x.shape[1] != self.num_features:
            raise ValueError(f"BatchNormAct2d({self.num_features}): the input has {x.shape[1]} channels")
        if not self.training and self.running_mean is not None:
            return x, self.running_mean, self.running_var
        if x.numel() == x.shape[1] and not self.group_name:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size {x.shape}"
            )
        return x, mean, var

    @property
    def _tracks(self) -> bool:
        return self.training and self.track_running_stats

    @property
    def _with_others(self) -> Waiting | None:
        """Where its running statistics are to move with those of others."""
        return _waiting if self._tracks and self.momentum is not None else None

    def _track(self, mean: Tensor, var: Tensor, count: int) -> None:
        """Where running statistics are kept, moves them towards a batch's."""
        if (waiting := self._with_others) is not None:
            waiting.statistics.append(Statistics(self, mean, var, count))
            waiting.counters.append(self.num_batches_tracked)
        elif self._tracks:
            update_running_statistics(
                mean,
                var,
                self.running_mean,
                self.running_var,
                self.num_batches_tracked,
                count,
                self.momentum,
            )

    def _unfused(self, x: Tensor, residual: Tensor | Skip | None) -> Tensor:
        """The same through torch, for torch.compile to fuse as it can."""
        if (waiting := self._with_others) is not None:
            # As its own forward, but for the counter's launch.
            self._check_input_dim(x)
            running, momentum = (self.running_mean, self.running_var), self.momentum
            assert momentum is not None  # says _with_others
            y = F.batch_norm(x, *running, self.weight, self.bias, True, momentum, self.eps)
            waiting.counters.append(self.num_batches_tracked)
        else:
            y = super().forward(x)
        if residual is not None:
            y += residual.y if isinstance(residual, Skip) else residual
        return F.relu(y, inplace=True) if self.act == "relu" else y

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, act={self.act!r}"


def _parts(residual: Tensor | Skip | None, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """What is added to x normalised, and where it is a Skip what takes its gradient. ValueError on another shape."""
    added = residual.y.detach() if isinstance(residual, Skip) else residual
    if added is not None and added.shape != x.shape:
        raise ValueError(
            f"BatchNormAct2d: the residual has shape {tuple(added.shape)}, the input {tuple(x.shape)}"
        )
    return None if added is None else added.to(x.dtype), getattr(residual, "gradient", None)


class Conv2d(nn.Conv2d):
    """torch.nn.Conv2d; with `algorithm` "cpp" through the C++ of cpu.py in training, where it takes the tensor."""

    algorithm = "torch"

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.algorithm == "cpp" and cpu_ops.convolves(self, input):
            return cpu_ops.conv2d(input, weight, bias, self.stride[0])
        return super()._conv_forward(input, weight, bias)


class NormConv2d(nn.Conv2d):
    """A convolution that normalises its input as it reads, and takes the statistics of its output as it writes.

    Experimental: not yet run on a GPU. (N, C, H, W), or a DeferredNormAct of it -> (N, K, H, W) with its statistics. 3×3 or
    1×1, stride 1, "same" zero padding, no bias, groups or dilation; Triton kernels for every 1×1, and for the 3×3 of
    16, 32 and 64 channels. Made of Conv2d modules by fuse_convolutions.
    """

    normalises_input = True

    def forward(self, x: Tensor | DeferredNormAct) -> WithStatistics:  # type: ignore[override]
        norm: Any = (None, None, None, None, 0.0)
        if isinstance(x, DeferredNormAct):
            x, norm = x.z, x[1:]
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        return WithStatistics(*conv_norm(x, self.weight, *norm))


def fuse_convolutions(model: nn.Module) -> nn.Module:
    """Makes a NormConv2d, with the same parameter, of each Conv2d that can be one and is 1×1 or has few channels. What
    follows each has to be a BatchNormAct2d. Returns the model."""
    for parent in list(model.modules()):
        for name, conv in parent.named_children():
            if isinstance(conv, nn.Conv2d) and type(conv) in (nn.Conv2d, Conv2d) and _fusable(conv):
                size = conv.kernel_size[0]
                fused = NormConv2d(
                    conv.in_channels, conv.out_channels, size, padding="same", bias=False, device="meta"
                )
                fused.weight = conv.weight
                setattr(parent, name, fused)
    return model


def _fusable(conv: nn.Conv2d) -> bool:
    size = conv.kernel_size
    plain = conv.bias is None and conv.groups == 1 and conv.stride == conv.dilation == (1, 1)
    few = {conv.in_channels, conv.out_channels} <= CHANNELS_3X3
    return plain and (
        (size == (1, 1) and conv.padding == (0, 0)) or (size == (3, 3) and conv.padding == (1, 1) and few)
    )


def convert_sync_batchnorm(model: nn.Module, group: dist.ProcessGroup | None = None) -> nn.Module:
    """Makes every BatchNorm2d of the model, on its device already, share its training statistics with the processes of
    the group (None: all of them), forward and backward. torch's own become torch.nn.SyncBatchNorm on a GPU; that
    refuses the CPU, where they become BatchNormAct2d without activation, parameters and keys unchanged. Returns the
    model."""
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
    """A norm of the same parameters and statistics that can share the latter."""
    tensor = next(norm.parameters(), norm.running_mean)
    if tensor is not None and tensor.device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(norm, group)
    shared = BatchNormAct2d(
        norm.num_features,
        norm.eps,
        norm.momentum,
        norm.affine,
        norm.track_running_stats,
        "none",
        device="meta",
    )
    shared.weight, shared.bias = norm.weight, norm.bias
    for name, buffer in norm.named_buffers(recurse=False):
        setattr(shared, name, buffer)
    return shared
