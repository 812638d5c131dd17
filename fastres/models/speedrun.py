"""The speed-run's network: a frozen whitening stem, then stages of one convolution that pools and one residual block.

Its ideas come from other projects. The stages and the scaled logits are from David Page's ResNet-9 for DAWNBench ("How
to Train Your ResNet", github.com/davidcpage/cifar10-fast). The frozen stem that whitens patches, with filters in pairs
of opposite sign, is from tysam-code/hlb-CIFAR10 after Page. Its size of 2×2, the pool before the normalisation, and
convolutions that start as the identity are from KellerJordan/cifar10-airbench (Jordan 2024, "94% on CIFAR-10 in 3.29
Seconds on a Single GPU").
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastres.models.blocks import Norm, norm_act, norm_act_fork
from fastres_kernels import Conv2d

LOGIT_SCALE = 1 / 8  # Page's
EPSILON = 0.02  # added to variances, 1 per pixel, so that directions with hardly any (a JPEG's colours) stay small


class WhiteningConv(nn.Module):
    """k×k convolution, stride 1, no padding, whose 2·C·k² filters are a buffer and are never trained.

    The filters are random directions until `fit`, and then the eigenvectors of the patches' covariance divided by the
    roots of their variances. Each comes with its negative, so that the ReLU that follows loses nothing.

    (N, C, H, W) -> (N, 2·C·k², H-k+1, W-k+1).
    """

    weight: Tensor  # (2·C·k², C, k, k), with the same key in the state_dict as any convolution's

    def __init__(self, in_channels: int, kernel_size: int) -> None:
        super().__init__()
        size = in_channels * kernel_size**2
        directions = nn.init.orthogonal_(torch.empty(size, size))
        self.register_buffer("weight", _filters_of(directions, in_channels, kernel_size))

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of x."""
        return F.conv2d(x, self.weight)

    @torch.no_grad()
    def fit(self, images: Tensor, epsilon: float = EPSILON) -> None:
        """Fit the filters to images (N, C, H, W), normalised as in training. The fit is deterministic, in float64."""
        _, channels, k, _ = self.weight.shape
        patches = F.unfold(images.double(), k).transpose(1, 2).flatten(0, 1)  # (patches, C·k²)
        variances, directions = torch.linalg.eigh(patches.T.cov())
        whitening = (directions / (variances + epsilon).sqrt()).T
        self.weight.copy_(_filters_of(whitening, channels, k))


def _filters_of(directions: Tensor, channels: int, k: int) -> Tensor:
    """Return the directions, the rows of (C·k², C·k²), and their negatives as filters (2·C·k², C, k, k)."""
    filters: Tensor = torch.cat([directions, -directions]).unflatten(1, (channels, k, k))
    return filters


class PooledConv(Conv2d):
    """conv 3×3 – max-pool 2×2: (N, in_channels, H, W) -> (N, out_channels, ⌊H/2⌋, ⌊W/2⌋), or with `ceil_mode` ⌈⌉."""

    def __init__(self, in_channels: int, out_channels: int, *, ceil_mode: bool = False) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1, bias=False)
        self.ceil_mode = ceil_mode

    def forward(self, x: Tensor) -> Tensor:
        """Return the pooled convolution of x."""
        return F.max_pool2d(super().forward(x), 2, ceil_mode=self.ceil_mode)


class SpeedStage(nn.Module):
    """conv 3×3 – pool – BN – ReLU, and a residual block of one convolution: conv 3×3 – BN – add – ReLU.

    (N, in_channels, H, W) -> (N, channels, H/2, W/2), rounded as PooledConv does.
    """

    def __init__(self, in_channels: int, channels: int, norm: Norm, *, ceil_mode: bool) -> None:
        super().__init__()
        self.conv1 = PooledConv(in_channels, channels, ceil_mode=ceil_mode)
        self.bn1 = norm(channels)
        self.conv2 = Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return the residual block's output."""
        x, skip = norm_act_fork(self.bn1, self.conv1(x))
        y: Tensor = norm_act(self.bn2, self.conv2(x), skip)
        return y


class SpeedResNet(nn.Module):
    """Whitening stem 2×2 – ReLU, a SpeedStage for each of `widths`, global max-pool, linear head without bias.

    (N, in_channels, H, W) -> (N, num_classes) logits; H and W are at least 8 for three stages. A new run passes images
    of its training set to `whiten`. `norm_momentum` is the weight of a batch in BatchNorm's running statistics.
    """

    def __init__(
        self,
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        norm: Norm = nn.BatchNorm2d,
        widths: Sequence[int] = (64, 128, 256),
        norm_momentum: float = 0.1,
    ) -> None:
        super().__init__()
        kinds = [type(width) for width in widths] if isinstance(widths, (list, tuple)) else []
        if set(kinds) != {int} or min(widths) < 1:
            raise ValueError(f"widths takes channels, a whole number for each stage, not {widths!r}")
        if type(norm_momentum) not in (int, float) or not 0 < norm_momentum <= 1:
            raise ValueError(f"norm_momentum takes a number above 0 and up to 1, not {norm_momentum!r}")
        self.conv1 = WhiteningConv(in_channels, 2)
        before = [self.conv1.weight.shape[0], *widths]
        last = len(widths) - 1  # its pool drops no row or column, so 32 px become 4 and 8 px 1
        stages = (SpeedStage(before[i], width, norm, ceil_mode=i == last) for i, width in enumerate(widths))
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(widths[-1], num_classes, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # the first filters are the identity, the rest stay torch's
                nn.init.dirac_(module.weight.data[: module.in_channels])
            elif isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = norm_momentum

    def whiten(self, images: Tensor) -> None:
        """Fit the stem to images (N, in_channels, H, W), normalised as in training."""
        self.conv1.fit(images)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        x = self.stages(F.relu(self.conv1(x)))
        logits: Tensor = self.fc(x.permute(0, 2, 3, 1).amax((1, 2)))
        return logits * LOGIT_SCALE
