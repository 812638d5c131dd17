"""Blocks, shortcuts and norms that the families of networks share, and the integration point of the fused kernels.

A block's modules have torchvision's names (conv1, bn1, …, downsample.0), so state_dict keys are torchvision's. The
function `norm_act` computes norm + add + ReLU, and is the place where a fused kernel is plugged in; `conv_norm_act`
computes the convolution before it too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastres.models.apex_norm import ApexBatchNormAct2d
from fastres.models.fusion.modules import hooked
from fastres_kernels import BatchNormAct2d, Conv2d

Norm = Callable[[int], nn.Module]  # returns a module that normalises this number of channels

NORMS: dict[str, Norm] = {
    "torch": nn.BatchNorm2d,
    "fused": BatchNormAct2d,
    "measured": partial(BatchNormAct2d, algorithm="measured"),  # auto's choice on a device that was measured
    "apex": ApexBatchNormAct2d,
}


# ---- the integration point ---------------------------------------------------------------------------------


def norm_act(norm: nn.Module, x: Any, residual: Any = None, into: nn.Module | None = None) -> Any:
    """Return relu(norm(x) + residual), (N, C, H, W).

    Args:
        norm: a norm, or, if its attribute `act` is "relu", a module that computes the result as norm(x, residual).
        x: (N, C, H, W).
        residual: (N, C, H, W), or the second result of norm_act_fork(); None for no addition.
        into: the convolution that alone reads the result. If it has the attribute `normalises_input`, it is given
            norm.deferred(x) instead of the result.
    """
    if getattr(into, "normalises_input", False):
        return norm.deferred(x)  # type: ignore[operator]
    if getattr(norm, "act", None) == "relu":
        return norm(x, residual)
    y = norm(x)
    if residual is not None:
        y += residual  # in place, because normalisation's backward reads its input and not its output
    return F.relu(y, inplace=True)


def norm_act_fork(norm: nn.Module, x: Any, residual: Any = None) -> tuple[Tensor, Any]:
    """Return norm_act's result twice. The second is for a skip connection, as the `residual` of another norm_act.

    A norm with the attribute `forks` may return the second in its own form, so that its gradient arrives separately.
    """
    if getattr(norm, "act", None) == "relu" and getattr(norm, "forks", False):
        pair: tuple[Tensor, Any] = norm(x, residual, fork=True)
        return pair
    y = norm_act(norm, x, residual)
    return y, y


def conv_norm_act(
    conv: nn.Module, norm: nn.Module, x: Any, residual: Any = None, *, into: nn.Module | None = None, fork: bool = False
) -> Any:
    """Return norm_act(norm, conv(x), residual, into), or with `fork` norm_act_fork(norm, conv(x), residual).

    A norm with the method `convolve` may compute the convolution together with itself.
    """
    together = getattr(norm, "convolve", None) if getattr(norm, "act", None) == "relu" else None
    if together is not None and not getattr(into, "normalises_input", False) and not hooked(conv, norm):
        result = together(conv, x, residual, fork)
        if result is not None:
            return result
    return norm_act_fork(norm, conv(x), residual) if fork else norm_act(norm, conv(x), residual, into)


def norm_only(norm: nn.Module) -> nn.Module:
    """Return the norm without an activation, which a norm with `act` would otherwise fuse."""
    if getattr(norm, "act", None) == "relu":
        norm.act = "none"  # type: ignore[assignment]
    return norm


def global_pool(x: Tensor) -> Tensor:
    """Return the mean over H and W: (N, C, H, W) -> (N, C)."""
    # Reduce as NHWC, so that the gradient is channels-last; the gradient of mean((2, 3)) is NCHW.
    return x.permute(0, 2, 3, 1).mean((1, 2))


# ---- shortcuts that change the shape (He et al. 2015, section 3.3) -----------------------------------------


class ZeroChannels(nn.Module):
    """Append `extra` zero channels: (N, C, H, W) -> (N, C + extra, H, W)."""

    def __init__(self, extra: int) -> None:
        super().__init__()
        self.extra = extra

    def forward(self, x: Tensor) -> Tensor:
        """Return x with the zero channels."""
        return F.pad(x, (0, 0, 0, 0, 0, self.extra))

    def extra_repr(self) -> str:
        """Return the number of zero channels."""
        return str(self.extra)


def pad(in_channels: int, out_channels: int, stride: int, norm: Norm) -> nn.Module:
    """Return option A: take every second row and column and append zero channels. No parameters."""
    # A 1×1 average equals x[..., ::stride, ::stride], but is channels-last forward and backward; a slice is neither.
    return nn.Sequential(nn.AvgPool2d(1, stride), ZeroChannels(out_channels - in_channels))


def maxpool_pad(in_channels: int, out_channels: int, stride: int, norm: Norm) -> nn.Module:
    """Return the tutorial's shortcut: append zero channels, then 2×2 max-pool. No parameters."""
    # Pool first, because the maximum of zeros is zero, so the values are the same for half the bytes.
    return nn.Sequential(nn.MaxPool2d(stride, ceil_mode=True), ZeroChannels(out_channels - in_channels))


def conv1x1(in_channels: int, out_channels: int, stride: int, norm: Norm) -> nn.Module:
    """Return option B: 1×1 convolution with the stride, then BN, with the keys 0.weight and 1.* as in torchvision."""
    return nn.Sequential(Conv2d(in_channels, out_channels, 1, stride, bias=False), norm_only(norm(out_channels)))


SHORTCUTS: dict[str, Callable[[int, int, int, Norm], nn.Module]] = {
    "pad": pad,
    "maxpool_pad": maxpool_pad,
    "conv1x1": conv1x1,
}


def shortcut_of(downsample: nn.Module | None, x: Tensor, skip: Any) -> Any:
    """Return the residual that a block adds.

    Args:
        downsample: the block's shortcut; None for a plain net, which adds nothing.
        x: the block's input.
        skip: the second result of norm_act_fork for x, which an identity shortcut prefers; or None.
    """
    if downsample is None:
        return None
    if isinstance(downsample, nn.Identity) and skip is not None:
        return skip
    return downsample(x)


def make_shortcut(kind: str | None, in_channels: int, out_channels: int, stride: int, norm: Norm) -> nn.Module | None:
    """Return a block's `downsample`: identity if the shape stays, else of SHORTCUTS[kind]; None for a plain net."""
    if kind is None:
        return None
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return SHORTCUTS[kind](in_channels, out_channels, stride, norm)


# ---- residual blocks ---------------------------------------------------------------------------------------


class Stage(nn.Sequential):
    """Blocks in a row. Each passes its output to the next twice, for the convolutions and for the skip connection.

    (N, C, H, W), and optionally the same from norm_act_fork -> (N, C', H', W').
    """

    def forward(self, x: Tensor, skip: Any = None) -> Tensor:
        """Return the last block's output."""
        *blocks, last = self
        for block in blocks:
            x, skip = block(x, skip, fork=True)
        y: Tensor = last(x, skip)  # not forked, because the next stage changes the shape and has no identity skip
        return y


class BasicBlock(nn.Module):
    """conv 3×3 – BN – ReLU – conv 3×3 – BN – (+ shortcut) – ReLU.

    (N, in_channels, H, W) -> (N, channels, ⌈H/stride⌉, ⌈W/stride⌉), or with `fork` a pair as from norm_act_fork.
    `skip` is the input from norm_act_fork. `shortcut` is a name in SHORTCUTS, used if the shape changes, or None for a
    plain net. `v1` makes no difference, because only one convolution can have the stride.
    """

    expansion = 1

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int = 1,
        *,
        norm: Norm = nn.BatchNorm2d,
        shortcut: str | None = "conv1x1",
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        v1: bool = False,
    ) -> None:
        if groups != 1 or base_width != 64:
            raise ValueError(
                f"BasicBlock has groups=1 and base width 64 only, not {groups} and {base_width}; "
                "a Bottleneck net (resnet50 and deeper) takes others"
            )
        if dilation > 1:
            raise ValueError(
                f"BasicBlock has dilation 1 only, not {dilation}; "
                "a Bottleneck net (resnet50 and deeper) can replace stride with dilation"
            )
        super().__init__()
        self.conv1 = Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = norm(channels)
        self.conv2 = Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = norm(channels)
        self.downsample = make_shortcut(shortcut, in_channels, channels, stride, norm)

    def forward(self, x: Tensor, skip: Any = None, fork: bool = False) -> Any:
        """Return the block's output, or with `fork` a pair as from norm_act_fork."""
        residual = shortcut_of(self.downsample, x, skip)
        y = conv_norm_act(self.conv1, self.bn1, x, into=self.conv2)
        return conv_norm_act(self.conv2, self.bn2, y, residual, fork=fork)


class Bottleneck(nn.Module):
    """conv 1×1 – BN – ReLU – conv 3×3 – BN – ReLU – conv 1×1 – BN – (+ shortcut) – ReLU.

    (N, in_channels, H, W) -> (N, 4·channels, ⌈H/stride⌉, ⌈W/stride⌉); `skip` and `fork` as in BasicBlock. The stride
    sits on the 3×3 convolution ("v1.5"), or with `v1` on the first 1×1, as in the paper.
    """

    expansion = 4  # output channels per channel of the 3×3 convolution, at base width 64

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int = 1,
        *,
        norm: Norm = nn.BatchNorm2d,
        shortcut: str | None = "conv1x1",
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        v1: bool = False,
    ) -> None:
        out_channels = channels * self.expansion
        width = int(channels * (base_width / 64)) * groups
        first, second = (stride, 1) if v1 else (1, stride)
        super().__init__()
        self.conv1 = Conv2d(in_channels, width, 1, first, bias=False)
        self.bn1 = norm(width)
        self.conv2 = Conv2d(width, width, 3, second, padding=dilation, dilation=dilation, groups=groups, bias=False)
        self.bn2 = norm(width)
        self.conv3 = Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = norm(out_channels)
        self.downsample = make_shortcut(shortcut, in_channels, out_channels, stride, norm)

    def forward(self, x: Tensor, skip: Any = None, fork: bool = False) -> Any:
        """Return the block's output, or with `fork` a pair as from norm_act_fork."""
        residual = shortcut_of(self.downsample, x, skip)
        y = norm_act(self.bn1, self.conv1(x), into=self.conv2)
        y = norm_act(self.bn2, self.conv2(y), into=self.conv3)
        return (norm_act_fork if fork else norm_act)(self.bn3, self.conv3(y), residual)


def init_weights(module: nn.Module, zero_init_residual: bool = False) -> None:
    """Initialise convolutions with Kaiming normal (fan-out, ReLU) and biases 0, and norms with weight 1 and bias 0.

    Args:
        module: changed in place.
        zero_init_residual: start the last norm of each block at weight 0, so that the block starts as its shortcut
            (Goyal et al. 2017, section 5.1).
    """
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            if m.weight.is_meta:  # without values; drawing normal ones would import torch's compiler, for a second
                continue
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            if m.bias is not None:
                nn.init.zeros_(m.bias)
        elif isinstance(m, (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)):
            m.reset_parameters()
    for m in module.modules() if zero_init_residual else ():
        if isinstance(m, (BasicBlock, Bottleneck)):
            last_norm = m.bn3 if isinstance(m, Bottleneck) else m.bn2
            if isinstance(weight := getattr(last_norm, "weight", None), Tensor):
                nn.init.zeros_(weight)
