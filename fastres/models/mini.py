"""The mini ResNet of the third tutorial (Keras): two identity blocks, for MNIST.

Its convolutions have biases, as Keras's do: 152,202 parameters at 1 channel and 10 classes.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastres.models.blocks import Norm, Stage, global_pool, init_weights, norm_act, norm_act_fork
from fastres_kernels import Conv2d


class IdentityBlock(nn.Module):
    """conv – BN – ReLU – conv – BN – add input – ReLU, "same" padding: (N, filters, H, W) -> the same.

    `skip` and `fork` are as in BasicBlock.
    """

    def __init__(self, filters: int, kernel_size: int, norm: Norm = nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv1 = Conv2d(filters, filters, kernel_size, padding="same")
        self.bn1 = norm(filters)
        self.conv2 = Conv2d(filters, filters, kernel_size, padding="same")
        self.bn2 = norm(filters)
        init_weights(self)

    def forward(self, x: Tensor, skip: Any = None, fork: bool = False) -> Any:
        """Return the block's output, or with `fork` a pair as from norm_act_fork."""
        y = norm_act(self.bn1, self.conv1(x), into=self.conv2)
        return (norm_act_fork if fork else norm_act)(self.bn2, self.conv2(y), x if skip is None else skip)


class MiniResNet(nn.Module):
    """conv 7×7 – BN – ReLU – max-pool 3×3/3 – two IdentityBlock(64, 3) – global pool – linear.

    (N, in_channels, 28, 28) -> (N, num_classes) logits; the pool reduces 28 to 9.
    """

    def __init__(self, num_classes: int, in_channels: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = Conv2d(in_channels, 64, 7, padding="same")
        self.bn1 = norm(64)
        self.maxpool = nn.MaxPool2d(3)
        self.layer1 = Stage(IdentityBlock(64, 3, norm), IdentityBlock(64, 3, norm))
        self.fc = nn.Linear(64, num_classes)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        x = self.maxpool(norm_act(self.bn1, self.conv1(x)))
        logits: Tensor = self.fc(global_pool(self.layer1(x)))
        return logits


def mini_resnet(*, num_classes: int = 10, in_channels: int = 1, norm: Norm = nn.BatchNorm2d) -> MiniResNet:
    """Return the tutorial's network."""
    return MiniResNet(num_classes, in_channels, norm)
