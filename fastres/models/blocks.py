"""The seam and the blocks: everything that the three families share.

A block's modules are named as torchvision names them (conv1, bn1, …, downsample.0), so that its state_dict
keys hold. What joins them, norm + add + ReLU, is the function `norm_act`: the one place where a fused kernel
enters.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastres.models.apex_norm import ApexBatchNormAct2d
from fastres_kernels import BatchNormAct2d, Conv2d

Norm = Callable[[int], nn.Module]  # channels -> the module that normalises them

NORMS: dict[str, Norm] = {
    "torch": nn.BatchNorm2d,
    "fused": BatchNormAct2d,
    "measured": partial(BatchNormAct2d, algorithm="measured"),  # auto's choice on a device that was measured
    "apex": ApexBatchNormAct2d,
}


# ---- the seam ----------------------------------------------------------------------------------------------


def norm_act(norm: nn.Module, x: Any, residual: Any = None, into: nn.Module | None = None) -> Any:
    """relu(norm(x) + residual); x, residual and the result: (N, C, H, W).

    A norm whose attribute `act` is "relu" does all of it, called as norm(x, residual). `into`: the convolution that
    reads the result, and nothing else does; one with the attribute `normalises_input` takes norm.deferred(x) in its
    place.
    """
    if getattr(into, "normalises_input", False):
        return norm.deferred(x)  # type: ignore[operator]
    if getattr(norm, "act", None) == "relu":
        return norm(x, residual)
    y = norm(x)
    if residual is not None:
        y += residual  # in place: normalisation's backward reads its input, never its output
    return F.relu(y, inplace=True)


def norm_act_fork(norm: nn.Module, x: Any, residual: Any = None) -> tuple[Tensor, Any]:
    """norm_act's result, and the same for a skip connection: the `residual` of another norm_act.

    A norm with the attribute `forks` may give the second in a form of its own, to receive its gradient apart.
    """
    if getattr(norm, "act", None) == "relu" and getattr(norm, "forks", False):
        return norm(x, residual, fork=True)
    y = norm_act(norm, x, residual)
    return y, y


def norm_only(norm: nn.Module) -> nn.Module:
    """The same norm for where no activation follows: one that would fuse it is told not to."""
    if getattr(norm, "act", None) == "relu":
        norm.act = "none"  # type: ignore[assignment]
    return norm


def global_pool(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C), the mean over H and W."""
    # Reduced as NHWC so that its gradient is born channels-last; that of mean((2, 3)) is born NCHW.
    return x.permute(0, 2, 3, 1).mean((1, 2))


# ---- shortcuts where the shape changes (He et al. 2015, section 3.3) ---------------------------------------


class ZeroChannels(nn.Module):
    """Appends `extra` zero channels after the existing ones: (N, C, H, W) -> (N, C + extra, H, W)."""

    def __init__(self, extra: int) -> None:
        super().__init__()
        self.extra = extra

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, 0, 0, self.extra))

    def extra_repr(self) -> str:
        return str(self.extra)


def pad(in_channels: int, out_channels: int, stride: int, norm: Norm) -> nn.Module:
    """Option A: every second row and column, zero channels appended; no parameters."""
    # A 1×1 average is x[..., ::stride, ::stride], but channels-last forward and backward; a slice is neither.
    return nn.Sequential(nn.AvgPool2d(1, stride), ZeroChannels(out_channels - in_channels))


def maxpool_pad(in_channels: int, out_channels: int, stride: int, norm: Norm) -> nn.Module:
    """The tutorial's: zero channels appended, then 2×2 max-pool; no parameters."""
    # The order is exchanged because the maximum of zeros is zero: the same values, half the bytes.
    return nn.Sequential(nn.MaxPool2d(stride, ceil_mode=True), ZeroChannels(out_channels - in_channels))


def conv1x1(in_channels: int, out_channels: int, stride: int, norm: Norm) -> nn.Module:
    """Option B: 1×1 convolution with the stride, then BN; keys 0.weight, 1.*, as torchvision's downsample."""
    return nn.Sequential(
        Conv2d(in_channels, out_channels, 1, stride, bias=False), norm_only(norm(out_channels))
    )


SHORTCUTS: dict[str, Callable[[int, int, int, Norm], nn.Module]] = {
    "pad": pad,
    "maxpool_pad": maxpool_pad,
    "conv1x1": conv1x1,
}


def shortcut_of(downsample: nn.Module | None, x: Tensor, skip: Any) -> Any:
    """What a block adds at its end: x, or rather `skip`, which is x from norm_act_fork; or x in its new shape."""
    if downsample is None:
        return None
    if isinstance(downsample, nn.Identity) and skip is not None:
        return skip
    return downsample(x)


def make_shortcut(
    kind: str | None, in_channels: int, out_channels: int, stride: int, norm: Norm
) -> nn.Module | None:
    """A block's `downsample`: identity where the shape stays, else SHORTCUTS[kind]; None for a plain net."""
    if kind is None:
        return None
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return SHORTCUTS[kind](in_channels, out_channels, stride, norm)


# ---- residual blocks ---------------------------------------------------------------------------------------


class Stage(nn.Sequential):
    """Blocks in a row, each handing its output to the next one twice: for its convolutions, and for its skip
    connection.

    (N, C, H, W), and optionally the same from norm_act_fork -> (N, C', H', W').
    """

    def forward(self, x: Tensor, skip: Any = None) -> Tensor:
        *blocks, last = self
        for block in blocks:
            x, skip = block(x, skip, fork=True)
        return last(x, skip)  # what follows changes the shape: there is no skip connection to fork for


class BasicBlock(nn.Module):
    """conv 3×3 – BN – ReLU – conv 3×3 – BN – (+ shortcut) – ReLU.

    (N, in_channels, H, W) -> (N, channels, ⌈H/stride⌉, ⌈W/stride⌉), with `fork` as norm_act_fork gives it; `skip`: the
    input from norm_act_fork. `shortcut`: a name in SHORTCUTS, for
    where the shape changes, or None for a plain net. `v1` makes no difference: the stride has one place only.
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
        residual = shortcut_of(self.downsample, x, skip)
        y = norm_act(self.bn1, self.conv1(x), into=self.conv2)
        return (norm_act_fork if fork else norm_act)(self.bn2, self.conv2(y), residual)


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
        self.conv2 = Conv2d(
            width, width, 3, second, padding=dilation, dilation=dilation, groups=groups, bias=False
        )
        self.bn2 = norm(width)
        self.conv3 = Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = norm(out_channels)
        self.downsample = make_shortcut(shortcut, in_channels, out_channels, stride, norm)

    def forward(self, x: Tensor, skip: Any = None, fork: bool = False) -> Any:
        residual = shortcut_of(self.downsample, x, skip)
        y = norm_act(self.bn1, self.conv1(x), into=self.conv2)
        y = norm_act(self.bn2, self.conv2(y), into=self.conv3)
        return (norm_act_fork if fork else norm_act)(self.bn3, self.conv3(y), residual)


def init_weights(module: nn.Module, zero_init_residual: bool = False) -> None:
    """Kaiming normal, fan-out, ReLU, for convolutions, their biases 0; norms: weight 1, bias 0.

    `zero_init_residual`: the last norm of each block starts at weight 0, so that the block starts as its
    shortcut (Goyal et al. 2017, section 5.1).
    """
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
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
