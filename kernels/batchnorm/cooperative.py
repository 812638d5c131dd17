"""Compute forward and backward in one kernel each, for tensors that fit in the GPU's registers.

Each CTA of the grid keeps one tile on chip, and a barrier separates the two passes, so every tensor is read from global
memory once. Bytes per element in bf16 are 4 (BN + ReLU) and 6⅛ (BN + add + ReLU) forward, 6 and 10⅛ backward. All CTAs
have to be on the GPU at once; a cooperative launch guarantees that, or fails. Not yet run on a GPU.

The interpreter runs CTAs one after another, so a barrier would wait for ever. Under the interpreter each kernel is
therefore launched twice, once for the part before the barrier and once for the part after it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..grid_sync import counter, grid_barrier
from ..tiling import BACKWARD_TILE, FORWARD_TILE, ON_CHIP_WARPS, OnChipTile, Tiles, matrix_shape, one_pass_tiles
from ..triton_launch import INTERPRETED, launchable, pointers
from .backward import gate, gated_gradient, sum_partials
from .forward import (
    affine_terms,
    empty_partials,
    merge_partials,
    merge_rows,
    origin,
    outputs,
    tile_offsets,
    vector,
    write_tile,
)

WHOLE, BEFORE, AFTER = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # which part of a kernel to run
INTERPRETED_AS = 128  # multiprocessors that the interpreter is taken to have


@triton.jit
def forward_kernel(
    x,  # [M, C]
    residual,  # [M, C]
    weight,  # (C,)
    bias,  # (C,)
    partials,  # (P, 2, C) float32: mean about origin and M2 of each CTA's rows
    arrived,  # () int32: see grid_sync.py
    y,  # [M, C]
    mask,  # (⌈M/8⌉, C) uint8
    mean_out,  # (C,) float32
    var_out,  # (C,) float32
    skip,  # (1,) of y's dtype, set to 0
    M,
    C,
    P,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    SAVE_MASK: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    PART: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Read x and residual, write y and one bit of mask per element: forward.py's two kernels with a barrier between."""
    pid = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = cols < C
    start = pid * BLOCK_M
    base, offsets, valid = tile_offsets(start, cols, inside, M, C, BLOCK_M)
    value = tl.load(x + base + offsets, valid, other=0.0).to(tl.float32)
    about = origin(x, cols, inside)

    if PART != AFTER:
        _, mean, m2 = merge_rows(tl.where(valid, 1.0, 0.0), value - about[None, :], tl.zeros_like(value))
        out = partials + pid * (2 * C) + cols
        tl.store(out, mean, inside)
        tl.store(out + C, m2, inside)
    if PART == WHOLE:
        grid_barrier(arrived)
    if PART != BEFORE:
        count, mean, m2 = merge_partials(partials, cols, inside, M, C, BLOCK_M, P, BLOCK_C, BLOCK_P)
        mean += about
        var = m2 / tl.maximum(count, 1)
        if pid == 0:
            tl.store(mean_out + cols, mean, inside)
            tl.store(var_out + cols, var, inside)
            if HAS_SKIP:
                tl.store(skip, 0.0)
        _, scale, shift = affine_terms(var, weight, bias, cols, inside, HAS_WEIGHT, HAS_BIAS, EPS)
        write_tile(
            value, residual, y, mask, mean, scale, shift, start, cols, inside, M, C,
            HAS_RESIDUAL, RELU, SAVE_MASK, BLOCK_M, BLOCK_C,
        )  # fmt: skip


@triton.jit
def backward_kernel(
    dy,  # [M, C]
    dskip,  # [M, C]
    x,  # [M, C]
    mask,  # (⌈M/8⌉, C) uint8
    weight,  # (C,)
    bias,  # (C,)
    mean,  # (C,) float32
    var,  # (C,) float32
    partials,  # (P, 2, C) float32: Σ dz and Σ dz·x̂ of each CTA's rows
    arrived,  # () int32: see grid_sync.py
    dz_out,  # [M, C], with STORE_DZ
    dx,  # [M, C]
    dweight,  # (C,) float32
    dbias,  # (C,) float32
    M,
    C,
    P,
    HAS_SKIP: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATE: tl.constexpr,
    STORE_DZ: tl.constexpr,
    PART: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Read the gradients, x and the mask's bits, write dx: backward.py's two kernels with a barrier between."""
    pid = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = cols < C
    start = pid * BLOCK_M
    base, offsets, valid = tile_offsets(start, cols, inside, M, C, BLOCK_M)
    centre, variance = vector(mean, cols, inside), vector(var, cols, inside)
    invstd, scale, shift = affine_terms(variance, weight, bias, cols, inside, HAS_WEIGHT, HAS_BIAS, EPS)
    value = tl.load(x + base + offsets, valid, other=0.0).to(tl.float32)
    dz = gated_gradient(
        dy, dskip, mask, dz_out, value, x.dtype.element_ty, centre, scale, shift, start, cols, inside, M, C,
        HAS_SKIP, GATE, STORE_DZ, "evict_first", BLOCK_M, BLOCK_C,
    )  # fmt: skip
    normalised = (value - centre[None, :]) * invstd[None, :]

    if PART != AFTER:
        out = partials + pid * (2 * C) + cols
        tl.store(out, tl.sum(dz, 0), inside)
        tl.store(out + C, tl.sum(dz * normalised, 0), inside)
    if PART == WHOLE:
        grid_barrier(arrived)
    if PART != BEFORE:
        total, projected = sum_partials(partials, cols, inside, C, P, BLOCK_C, BLOCK_P)
        if pid == 0:
            tl.store(dbias + cols, total, inside)
            tl.store(dweight + cols, projected, inside)
        gradient = dz - (total / M)[None, :] - normalised * (projected / M)[None, :]
        tl.store(dx + base + offsets, (scale[None, :] * gradient).to(dx.dtype.element_ty), valid)


def tiles_for(x: Tensor, on_chip: OnChipTile) -> Tiles | None:
    """Return the tiles for x, (N, C, H, W), if every CTA keeps an `on_chip` tile; None if x does not fit on its GPU."""
    multiprocessors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else INTERPRETED_AS
    return one_pass_tiles(*matrix_shape(x), on_chip, multiprocessors)


def forward(
    x: Tensor,  # (N, C, H, W) channels-last
    residual: Tensor | None,  # like x
    weight: Tensor | None,  # (C,)
    bias: Tensor | None,  # (C,)
    eps: float,
    relu: bool,
    save_mask: bool,
    fork: bool,
    tiles: Tiles,  # from tiles_for(x, FORWARD_TILE)
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the forward with batch statistics; return y, mean, var, mask and skip as forward.outputs describes."""
    m, c = matrix_shape(x)
    y, mean, var, mask, skip = outputs(x, save_mask, fork)
    results = (y, mask if save_mask else None, mean, var, skip if fork else None)
    _launch(
        forward_kernel,
        FORWARD_TILE,
        tiles,
        x,
        *pointers(residual, weight, bias, empty_partials(x, tiles), counter(x), *results, unused=x),
        m,
        c,
        tiles.partials,
        HAS_RESIDUAL=residual is not None,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        RELU=relu,
        SAVE_MASK=save_mask,
        HAS_SKIP=fork,
        EPS=eps,
    )
    return y, mean, var, mask, skip


def backward(
    dy: Tensor,  # (N, C, H, W) channels-last, as dskip, x, dz and dx
    dskip: Tensor | None,
    x: Tensor,
    mask: Tensor | None,  # (⌈M/8⌉, C) uint8
    weight: Tensor | None,  # (C,)
    bias: Tensor | None,  # (C,)
    mean: Tensor,  # (C,) float32
    var: Tensor,  # (C,) float32
    eps: float,
    relu: bool,
    store_dz: bool,
    tiles: Tiles,  # from tiles_for(x, BACKWARD_TILE)
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the backward with batch statistics.

    Returns:
        dx, dz: (N, C, H, W) channels-last; dz is empty without `store_dz`.
        dbias, dweight: (C,) float32.
    """
    m, c = matrix_shape(x)
    dx = torch.empty_like(x)
    dz = torch.empty_like(x) if store_dz else x.new_empty(0)
    dweight, dbias = (torch.empty(c, dtype=torch.float32, device=x.device) for _ in range(2))
    sources = (dy, dskip, x, mask, weight, bias, mean, var)
    results = (dz if store_dz else None, dx, dweight, dbias)
    _launch(
        backward_kernel,
        BACKWARD_TILE,
        tiles,
        *pointers(*sources, empty_partials(x, tiles), counter(x), *results, unused=x),
        m,
        c,
        tiles.partials,
        HAS_SKIP=dskip is not None,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        GATE=gate(relu, mask),
        STORE_DZ=store_dz,
        EPS=eps,
    )
    return dx, dz, dbias, dweight


def _launch(kernel: Any, on_chip: OnChipTile, tiles: Tiles, *args: Any, **flags: bool | str | float) -> None:
    """Launch a kernel cooperatively; under the interpreter, launch its two parts one after the other."""
    blocks = {"BLOCK_M": tiles.block_m, "BLOCK_C": tiles.block_c, "BLOCK_P": tiles.block_p}
    for part in (BEFORE, AFTER) if INTERPRETED else (WHOLE,):
        options = {} if INTERPRETED else {"launch_cooperative_grid": True, "maxnreg": on_chip.max_registers}
        launchable(kernel, opaque=True)[tiles.grid](
            *args, **flags, PART=part, **blocks, num_warps=ON_CHIP_WARPS, **options
        )
