"""The CIFAR family: ResNet-20 to 1202 and their plain counterparts (He et al. 2015, section 4.2)."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from fastres.models.blocks import SHORTCUTS, BasicBlock, Norm, Stage, global_pool, init_weights, norm_act_fork
from fastres.utils.suggest import unknown
from fastres_kernels import Conv2d

MOST_BLOCKS = 10_000  # per stage, for a depth of 60,002, so that a typing error cannot fill the memory


class CifarResNet(nn.Module):
    """Stem 3×3 of 16 channels, three stages of n blocks (16, 32, 64), linear head; depth 6n+2.

    (N, in_channels, 32, 32) -> (N, num_classes) logits. Any other height and width works.
    """

    def __init__(
        self, blocks_per_stage: int, num_classes: int, in_channels: int, norm: Norm, shortcut: str | None
    ) -> None:
        super().__init__()
        block = partial(BasicBlock, norm=norm, shortcut=shortcut)

        def stage(in_channels: int, channels: int, stride: int) -> Stage:
            rest = (block(channels, channels) for _ in range(blocks_per_stage - 1))
            return Stage(block(in_channels, channels, stride), *rest)

        self.conv1 = Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = norm(16)
        self.layer1 = stage(16, 16, stride=1)
        self.layer2 = stage(16, 32, stride=2)
        self.layer3 = stage(32, 64, stride=2)
        self.fc = nn.Linear(64, num_classes)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        x, skip = norm_act_fork(self.bn1, self.conv1(x))
        x = self.layer3(self.layer2(self.layer1(x, skip)))
        logits: Tensor = self.fc(global_pool(x))
        return logits


def cifar_resnet(
    blocks_per_stage: int,
    *,
    num_classes: int = 10,
    in_channels: int = 3,
    norm: Norm = nn.BatchNorm2d,
    shortcut: str | None = None,
    plain: bool = False,
) -> CifarResNet:
    """Return the network of depth 6·blocks_per_stage + 2.

    Args:
        blocks_per_stage: n, at least 1.
        num_classes: outputs of the head.
        in_channels: channels of the images.
        norm: returns the module that follows a convolution.
        shortcut: a name in SHORTCUTS; None for the paper's, pad.
        plain: leave out all shortcuts, for the degradation experiment (section 4.2, figure 6).

    Raises:
        ValueError: if the arguments contradict each other or are unknown.
    """
    if blocks_per_stage > MOST_BLOCKS:
        raise ValueError(f"blocks_per_stage {blocks_per_stage} is more than {MOST_BLOCKS:,}")
    if plain and shortcut is not None:
        raise ValueError(f"a plain net has no shortcut: leave out shortcut={shortcut!r}, or ask for a resnet")
    if shortcut is not None and shortcut not in SHORTCUTS:
        raise unknown("shortcut", shortcut, SHORTCUTS)
    return CifarResNet(blocks_per_stage, num_classes, in_channels, norm, None if plain else shortcut or "pad")
