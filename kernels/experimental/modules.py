"""Modules for convolutions that normalise their own input, and fuse_convolutions, which puts them into a network."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..modules import BatchNormAct2d, Conv2d, Skip, converted
from .ops import CHANNELS_3X3, conv_norm


class WithStatistics(NamedTuple):
    """The output of a NormConv2d with its statistics, for PrecomputedStatsNormAct2d."""

    z: Tensor  # (N, C, H, W)
    mean: Tensor  # (C,)
    var: Tensor  # (C,), biased


class DeferredNormAct(NamedTuple):
    """A deferred relu(BatchNorm(z)): the convolution that reads it computes it."""

    z: Tensor  # (N, C, H, W)
    mean: Tensor  # (C,), as the next three
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float


class PrecomputedStatsNormAct2d(BatchNormAct2d):
    """BatchNormAct2d that also accepts the output of a NormConv2d and does not compute its statistics again."""

    def forward(self, x: Tensor | WithStatistics, residual: Tensor | Skip | None = None, fork: bool = False) -> Any:
        """Return BatchNormAct2d.forward's result. Raise ValueError if ranks have to share the given statistics."""
        if not isinstance(x, WithStatistics):
            return super().forward(x, residual, fork)
        if self.algorithm == "measured":  # dispatch_table.py has no measurements with given statistics
            y = gradient = self._unfused(x.z, residual, self.act == "relu")
        else:
            statistics, relu = self._given_statistics(x), self.act == "relu"
            y, gradient = self._fused(x.z, residual, fork, self.algorithm, *statistics, relu)
        return (y, Skip(y, gradient)) if fork else y

    def deferred(self, x: Tensor | WithStatistics) -> Any:
        """Return forward(x) as a DeferredNormAct, for a NormConv2d that computes it while reading z.

        Return forward(x) itself if x has no statistics or the activation is not ReLU.
        """
        if self.act != "relu" or not isinstance(x, WithStatistics):
            return self(x)
        mean, var = self._given_statistics(x)
        self._track(mean.detach(), var.detach(), x.z.numel() // x.z.shape[1])
        return DeferredNormAct(x.z, mean, var, self.weight, self.bias, self.eps)

    def _given_statistics(self, x: WithStatistics) -> tuple[Tensor, Tensor]:
        """Return the mean and variance to normalise x.z with: the running ones in inference, else x's own."""
        if self.group_name:
            raise ValueError("BatchNormAct2d: NormConv2d does not share its statistics between processes")
        mean, var = self._statistics(x.z)
        return (x.mean, x.var) if mean is None or var is None else (mean, var)


class NormConv2d(nn.Conv2d):
    """A convolution that normalises its input while reading it and computes statistics while writing its output.

    (N, C, H, W), or a DeferredNormAct of that shape -> (N, K, H, W) with its statistics. The convolution is 3×3 or 1×1
    with stride 1, "same" zero padding, and no bias, groups or dilation. Triton kernels exist for every 1×1 convolution,
    and for 3×3 convolutions of 16, 32 and 64 channels. fuse_convolutions converts Conv2d modules to this class.
    Experimental: not yet run on a GPU.
    """

    normalises_input = True

    def forward(self, x: Tensor | DeferredNormAct) -> WithStatistics:  # type: ignore[override]
        """Return the convolution of x, normalised first if it is a DeferredNormAct, and its statistics."""
        norm: Any = (None, None, None, None, 0.0)
        if isinstance(x, DeferredNormAct):
            x, norm = x.z, x[1:]
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        return WithStatistics(*conv_norm(x, self.weight, *norm))


def fuse_convolutions(model: nn.Module) -> nn.Module:
    """Replace convolutions by NormConv2d and every BatchNormAct2d by PrecomputedStatsNormAct2d, in place.

    A convolution is replaced if NormConv2d can compute it and it is 1×1, or 3×3 with channels that have a kernel. Each
    replaced convolution has to be followed by a BatchNormAct2d. Parameters, buffers and keys are unchanged.

    Returns:
        The model.
    """
    for parent in list(model.modules()):
        for name, module in parent.named_children():
            if type(module) is BatchNormAct2d:
                setattr(parent, name, _with_precomputed_stats(module))
            elif isinstance(module, nn.Conv2d) and type(module) in (nn.Conv2d, Conv2d) and _fusable(module):
                setattr(parent, name, _norm_conv(module))
    return model


def _with_precomputed_stats(norm: BatchNormAct2d) -> PrecomputedStatsNormAct2d:
    new = converted(norm, PrecomputedStatsNormAct2d, act=norm.act, algorithm=norm.algorithm)
    new.group_name, new.deferral = norm.group_name, norm.deferral
    return new


def _norm_conv(conv: nn.Conv2d) -> NormConv2d:
    size = conv.kernel_size[0]
    fused = NormConv2d(conv.in_channels, conv.out_channels, size, padding="same", bias=False, device="meta")
    fused.weight = conv.weight
    return fused.train(conv.training)


def _fusable(conv: nn.Conv2d) -> bool:
    """Return True if a Triton kernel of NormConv2d computes `conv`."""
    size = conv.kernel_size
    plain = conv.bias is None and conv.groups == 1 and conv.stride == conv.dilation == (1, 1)
    few = {conv.in_channels, conv.out_channels} <= CHANNELS_3X3
    return plain and (
        (size == (1, 1) and conv.padding == (0, 0)) or (size == (3, 3) and conv.padding == (1, 1) and few)
    )
