"""Declare the compiled variants of BatchNorm's kernels, and the bytes that each moves, for the report."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ..batchnorm import backward, cooperative, forward, running_stats
from ..tiling import BACKWARD_TILE, FORWARD_TILE, H100, matrix_shape, one_pass_tiles, two_pass_tiles
from .compiled_variants import RESNET20, CompiledVariant, variant_from_launch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# ResNet-20's stages at batch 128, the largest and the widest tensor of ResNet-50 at batch 256, and an odd shape.
SHAPES = {
    "bf16": [*RESNET20, (256, 256, 56, 56), (256, 2048, 7, 7), (3, 5, 7, 7)],
    "fp16": [RESNET20[0]],
    "fp32": [RESNET20[0], (3, 5, 7, 7)],
}

# Bytes per element from s, the bytes of an activation's element, and the kernel's flags; one term per tensor access.
Moved = Callable[[int, dict[str, Any]], float]
BYTES: dict[str, Moved] = {
    "statistics": lambda s, flags: s,
    "normalise": lambda s, flags: s * (2 + flags["HAS_RESIDUAL"]) + flags["SAVE_MASK"] / 8,
    "channel sums": lambda s, flags: (
        s * (2 + flags["HAS_SKIP"] + flags["STORE_DZ"] + flags["STORE_DX"]) + (flags["GATE"] == "bits") / 8
    ),
    "input gradient": lambda s, flags: s * 3,
    "cooperative forward": lambda s, flags: s * (2 + flags["HAS_RESIDUAL"]) + flags["SAVE_MASK"] / 8,
    "cooperative backward": lambda s, flags: (
        s * (3 + flags["HAS_SKIP"] + flags["STORE_DZ"]) + (flags["GATE"] == "bits") / 8
    ),
}


def variants() -> list[CompiledVariant]:
    """Return the variants of all dtypes and shapes, and the running statistics' kernels last."""
    found = [variant for dtype, shapes in SHAPES.items() for shape in shapes for variant in _of(dtype, shape)]
    p = torch.empty(64, device="meta")
    batches = torch.empty((), dtype=torch.int64, device="meta")
    for momentum in (0.1, None):
        launch = partial(running_stats.update, p, p, p, p, batches, 8192, momentum)
        found.append(variant_from_launch(f"running statistics, momentum {momentum}", launch, lambda flags: None))
    return found


def _of(dtype: str, shape: tuple[int, int, int, int]) -> list[CompiledVariant]:
    """Return the variants of all kernels for a tensor of that dtype and shape, (N, C, H, W)."""
    meta = partial(torch.empty, device="meta")
    x = meta(shape, dtype=DTYPES[dtype]).to(memory_format=torch.channels_last)
    m, c = matrix_shape(x)
    p, partials, bits = meta(c), meta(1, 2, c), meta(1, dtype=torch.uint8)
    tiles = two_pass_tiles(m, c)
    ahead, back = (one_pass_tiles(m, c, on_chip, H100) for on_chip in (FORWARD_TILE, BACKWARD_TILE))
    found = []

    def add(kernel: str, act: str, launch: Callable[..., Any], *arguments: Any) -> None:
        name = f"{kernel}, {dtype}, {act}, C={c}"
        moved = partial(BYTES[kernel], x.element_size())
        found.append(variant_from_launch(name, partial(launch, *arguments), moved))

    add("statistics", "-", forward.statistics, x, tiles)
    # Residual, mask, and whether the output forks: if so, the backward adds the skip connection's gradient.
    forms = {
        "ReLU": (None, None, False),
        "ReLU, forked": (None, None, True),  # as in a stem
        "add + ReLU": (x, bits, True),
    }
    norm, eps = (p, p), 1e-5
    for act, (residual, mask, forks) in forms.items():
        ends = (mask is not None, forks, tiles)
        add("normalise", act, forward.normalise, x, residual, *norm, partials, eps, True, *ends)
        sums = (x, x if forks else None, x, mask, *norm, p, p, eps, True, forks)
        add("channel sums", act, backward.channel_sums, *sums, tiles)
        gradient = (x, x, *norm, p, p, partials.expand(tiles.partials, 2, c), eps, m, not forks, tiles)
        add("input gradient", act, backward.input_gradient, *gradient)
        given = f"{act}, given statistics"
        add("normalise", given, forward.normalise, x, residual, *norm, (p, p), eps, True, *ends)
        add("channel sums", given, backward.with_fixed_stats, *sums, tiles)
        if ahead:
            fused = (x, residual, *norm, eps, True, mask is not None, forks, ahead)
            add("cooperative forward", act, cooperative.forward, *fused)
        if back:
            add("cooperative backward", act, cooperative.backward, *sums, back)
    return found
