"""Declare the compiled variants of the fused convolutions, and the bytes that each moves, for the report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..experimental import conv_1x1, conv_3x3
from ..experimental.conv_common import Gradient, Norm, weight_gradient
from .compiled_variants import CompiledVariant, variant_from_launch

DTYPE = torch.bfloat16
# (C, K, H = W): ResNet-20's stages at batch 128; ResNet-50's bandwidth-bound 1×1 convolutions at batch 256, and its
# widest one.
RESNET20_3X3 = ((16, 16, 32), (32, 32, 16), (64, 64, 8))
RESNET50_1X1 = ((64, 64, 56), (64, 256, 56), (256, 64, 56), (512, 2048, 7))


def variants() -> list[CompiledVariant]:
    """Return the variants of all layers, the 3×3 convolutions first."""
    found = []
    for c, k, size in RESNET20_3X3:
        found += _of_layer(conv_3x3.convolve, 128, c, k, size, 3)
    for c, k, size in RESNET50_1X1:
        found += _of_layer(conv_1x1.convolve, 256, c, k, size, 1)
    return found


def _of_layer(convolve: Callable[..., Any], n: int, c: int, k: int, size: int, r: int) -> list[CompiledVariant]:
    """Return forward, input gradient and weight gradient of an r × r convolution of n images of size × size.

    Bytes are per element of the convolution's input x.
    """
    weight = torch.empty((k, c, r, r), device="meta").to(memory_format=torch.channels_last)
    x, z = (
        torch.empty((n, channels, size, size), dtype=DTYPE, device="meta").to(memory_format=torch.channels_last)
        for channels in (c, k)
    )
    of_x, of_z = (torch.empty(channels, device="meta") for channels in (c, k))
    norm, gradient = Norm(of_x, of_x, of_x, of_x, 1e-5), Gradient(z, of_z, of_z, z, of_z)
    name = f"{r}×{r} convolution, {str(DTYPE).removeprefix('torch.')}, {c} -> {k}"
    wider, itemsize = k / c, DTYPE.itemsize
    return [
        variant_from_launch(f"{name}, forward", lambda: convolve(x, weight, norm), lambda _: itemsize * (1 + wider)),
        variant_from_launch(
            f"{name}, input gradient", lambda: convolve(x, weight, norm, gradient), lambda _: itemsize * (2 + 2 * wider)
        ),
        variant_from_launch(
            f"{name}, weight gradient",
            lambda: weight_gradient(x, weight, norm, gradient),
            lambda _: itemsize * (1 + 2 * wider),
        ),
    ]
