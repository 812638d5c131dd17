"""The ImageNet family: ResNet-18 to 152, ResNeXt and Wide ResNet, key for key torchvision's.

He et al. 2015, table 1; Xie et al. 2017 (ResNeXt, `groups`); Zagoruyko and Komodakis 2016 (Wide ResNet,
`width_per_group`).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fastres.models.blocks import BasicBlock, Bottleneck, Norm, Stage, global_pool, init_weights, norm_act
from fastres.utils.suggest import unknown
from fastres_kernels import Conv2d

BLOCKS: dict[str, type[BasicBlock | Bottleneck]] = {"basic": BasicBlock, "bottleneck": Bottleneck}
STEMS = ("imagenet", "small")


class ResNet(nn.Module):
    """Stem, four stages of 64, 128, 256 and 512 channels times the block's expansion, linear head.

    (N, in_channels, H, W) -> (N, num_classes) logits. The options are torchvision's and two more: `stem` is "imagenet"
    (7×7/2 and 3×3/2 max-pool) or "small" (3×3/1 without a pool, for 32×32 images), and `v1` puts the stride of a
    Bottleneck on its first 1×1, as in the paper, and not on its 3×3.
    """

    def __init__(
        self,
        block: str,  # a name in BLOCKS
        blocks: tuple[int, int, int, int],  # per stage
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        norm: Norm = nn.BatchNorm2d,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] | None = None,  # of layer2, layer3 and layer4
        stem: str = "imagenet",
        v1: bool = False,
    ) -> None:
        super().__init__()
        if stem not in STEMS:
            raise unknown("stem", stem, STEMS)
        dilate = (False,) * 3 if replace_stride_with_dilation is None else replace_stride_with_dilation
        if not isinstance(dilate, (list, tuple)) or [type(each) for each in dilate] != [bool] * 3:
            raise ValueError(
                "replace_stride_with_dilation takes three booleans, for layer2, layer3 and layer4, "
                f"not {replace_stride_with_dilation!r}"
            )
        block_type = BLOCKS[block]
        channels, dilation = 64, 1  # of the next stage's input

        def stage(width: int, count: int, stride: int, replace: bool = False) -> Stage:
            nonlocal channels, dilation

            def make(stride: int = 1) -> nn.Module:
                return block_type(
                    channels,
                    width,
                    stride,
                    norm=norm,
                    groups=groups,
                    base_width=width_per_group,
                    dilation=dilation,
                    v1=v1,
                )

            # The first block, which would have had the stride, still has the previous dilation.
            first = make(1 if replace else stride)
            channels = width * block_type.expansion
            dilation *= stride if replace else 1
            return Stage(first, *(make() for _ in range(count - 1)))

        small = stem == "small"
        self.conv1 = Conv2d(
            in_channels, 64, 3 if small else 7, 1 if small else 2, padding=1 if small else 3, bias=False
        )
        self.bn1 = norm(64)
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, 2, padding=1)
        self.layer1 = stage(64, blocks[0], 1)
        self.layer2 = stage(128, blocks[1], 2, dilate[0])
        self.layer3 = stage(256, blocks[2], 2, dilate[1])
        self.layer4 = stage(512, blocks[3], 2, dilate[2])
        self.fc = nn.Linear(channels, num_classes)
        init_weights(self, zero_init_residual)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        x = self.maxpool(norm_act(self.bn1, self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(global_pool(x))
        return logits
