"""Compute the training backward in two kernels, channel sums and input gradient; in one if the statistics were given.

The maths is reference.channel_sums and reference.input_gradient. Tensors are matrices [M = N·H·W, C].

    channel_sums    reads dy, (dskip), x, 1 bit of mask → partial sums, dz if needed
    input_gradient  reads dz or dy, x                   → dx, dweight, dbias

`dskip` is the gradient that arrives over the skip connection. It is added here, so it costs no pass of its own. dz is
dy + dskip masked by ReLU, and is the gradient of the residual too. It is written if there is a residual or a dskip.
Without a residual the mask is recomputed from x. Bytes per element in bf16: BN + ReLU 4 + 6; BN + add + ReLU with two
gradients 8⅛ + 6. Every sum has one fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..grid_sync import counter, final_reducer, final_reducers
from ..tiling import WARPS, Tiles, matrix_shape
from ..triton_launch import launchable, pointers
from .forward import STAGES, affine, affine_terms, empty_partials, load_bits, relu_mask, tile_offsets, vector


@triton.jit
def gate_from_input(x, mean, scale, shift, dtype: tl.constexpr):
    """Recompute ReLU's mask from x exactly as normalise_kernel computed it, rounding included."""
    return relu_mask(affine(x, mean, scale, shift).to(dtype))


@triton.jit
def gated_gradient(
    dy, dskip, mask, dz_out, value, dtype: tl.constexpr, mean, scale, shift, start, cols, inside, M, C,
    HAS_SKIP: tl.constexpr, GATE: tl.constexpr, STORE_DZ: tl.constexpr, AGAIN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Return dz of the tile from row `start` on, (BLOCK_M, BLOCK_C) float32, 0 outside; with STORE_DZ, store it too.

    `value` is x of the same tile. GATE is ReLU's mask: "none", the stored "bits", or recomputed from the "input". AGAIN
    is dy's eviction policy: "evict_last" if a second pass reads dy again, else "evict_first".
    """
    base, offsets, valid = tile_offsets(start, cols, inside, M, C, BLOCK_M)
    dz = tl.load(dy + base + offsets, valid, other=0.0, eviction_policy=AGAIN).to(tl.float32)
    if HAS_SKIP:
        dz += tl.load(dskip + base + offsets, valid, other=0.0, eviction_policy="evict_first").to(tl.float32)
    if GATE == "bits":
        dz = tl.where(load_bits(mask, start, cols, inside, M, C, BLOCK_M, BLOCK_C), dz, 0.0)
    elif GATE == "input":
        dz = tl.where(gate_from_input(value, mean, scale, shift, dtype), dz, 0.0)
    if STORE_DZ:
        rounded = dz.to(dz_out.dtype.element_ty)
        tl.store(dz_out + base + offsets, rounded, valid)
        dz = rounded.to(tl.float32)  # sums and dx use the rounded values, which the residual receives too
    return dz


@triton.jit
def channel_sums_kernel(
    dy,  # [M, C]
    dskip,  # [M, C]
    x,  # [M, C]
    mask,  # (⌈M/8⌉, C) uint8
    weight,  # (C,)
    bias,  # (C,)
    mean,  # (C,) float32
    var,  # (C,) float32
    dz_out,  # [M, C], with STORE_DZ
    dx,  # [M, C], with STORE_DX: if the statistics were given, dx depends on no sum
    partials,  # (P, 2, C) float32: Σ dz and Σ dz·x̂ of each CTA's rows
    arrived,  # () int32: see grid_sync.py; used with STORE_DX, as the next four
    dweight,  # (C,) float32
    dbias,  # (C,) float32
    dmean,  # (C,) float32, of the given statistics
    dvar,  # (C,) float32
    M,
    C,
    ROWS,
    HAS_SKIP: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATE: tl.constexpr,
    STORE_DZ: tl.constexpr,
    STORE_DX: tl.constexpr,
    EPS: tl.constexpr,
    FINAL_REDUCERS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Compute Σ dz and Σ dz·x̂ of each CTA's rows; reads the gradients and x once.

    The sums run per element of the tile, and over the tile's rows at the end. If the statistics were given (STORE_DX),
    no second kernel follows, so this one also writes dx and does the final reduction.
    """
    pid = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = cols < C
    centre, variance = vector(mean, cols, inside), vector(var, cols, inside)
    invstd, scale, shift = affine_terms(variance, weight, bias, cols, inside, HAS_WEIGHT, HAS_BIAS, EPS)

    total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    projected = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    first = pid * ROWS
    for i in tl.range(0, tl.cdiv(tl.minimum(ROWS, M - first), BLOCK_M), num_stages=STAGES):
        start = first + i * BLOCK_M
        base, offsets, valid = tile_offsets(start, cols, inside, M, C, BLOCK_M)
        value = tl.load(x + base + offsets, valid, other=0.0, eviction_policy="evict_last").to(tl.float32)
        dz = gated_gradient(
            dy, dskip, mask, dz_out, value, x.dtype.element_ty, centre, scale, shift, start, cols, inside, M, C,
            HAS_SKIP, GATE, STORE_DZ, "evict_first" if STORE_DZ else "evict_last", BLOCK_M, BLOCK_C,
        )  # fmt: skip
        if STORE_DX:
            tl.store(dx + base + offsets, (dz * scale[None, :]).to(dx.dtype.element_ty), valid)
        total += dz
        projected += dz * ((value - centre[None, :]) * invstd[None, :])
    to = partials + pid * (2 * C) + cols
    tl.store(to, tl.sum(total, 0), inside)
    tl.store(to + C, tl.sum(projected, 0), inside)
    if STORE_DX:
        index, reducers = final_reducer(arrived, FINAL_REDUCERS)
        if index >= 0:
            reduce_fixed_stats_gradients(
                partials, weight, bias, var, dweight, dbias, dmean, dvar, C, index, reducers,
                HAS_WEIGHT, HAS_BIAS, EPS, BLOCK_C, BLOCK_P,
            )  # fmt: skip


@triton.jit
def reduce_fixed_stats_gradients(
    partials, weight, bias, var, dweight, dbias, dmean, dvar, C, index, reducers,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, EPS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Store the gradients of parameters and given statistics for every `reducers`-th block of channels."""
    for block in range(index, tl.num_programs(1), reducers):
        cols = block * BLOCK_C + tl.arange(0, BLOCK_C)
        inside = cols < C
        total, projected = sum_partials(partials, cols, inside, C, tl.num_programs(0), BLOCK_C, BLOCK_P)
        variance = vector(var, cols, inside)
        invstd, scale, _ = affine_terms(variance, weight, bias, cols, inside, HAS_WEIGHT, HAS_BIAS, EPS)
        store_norm_gradients(total, projected, scale, invstd, dmean, dvar, dweight, dbias, cols, inside)


@triton.jit
def store_norm_gradients(total, projected, scale, invstd, dmean, dvar, dweight, dbias, cols, inside):
    """Store the gradients of y = weight·x̂ + bias, x̂ = (x - mean)/√(var + eps), for statistics independent of x.

    With g, the gradient of y, `total` = Σ g and `projected` = Σ g·x̂:

        dbias = Σ g    dweight = Σ g·x̂    dmean = -Σ g·weight/√(var + eps)    dvar = -Σ g·x̂·weight/2(var + eps)

    dweight and dbias may be None.
    """
    tl.store(dmean + cols, -total * scale, inside)
    tl.store(dvar + cols, -0.5 * projected * scale * invstd, inside)
    if dweight is not None:
        tl.store(dweight + cols, projected, inside)
    if dbias is not None:
        tl.store(dbias + cols, total, inside)


@triton.jit
def sum_partials(partials, cols, inside, C, P, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """Sum the P partials (P, 2, C) in BLOCK_P slots, as merge_partials does; return both sums, (BLOCK_C,) each."""
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    projected = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        mask = (p < P)[:, None] & inside[None, :]
        addresses = partials + p[:, None] * (2 * C) + cols[None, :]
        total += tl.load(addresses, mask, other=0.0)
        projected += tl.load(addresses + C, mask, other=0.0)
    return tl.sum(total, 0), tl.sum(projected, 0)


@triton.jit
def input_gradient_kernel(
    dz,  # [M, C]: masked already; with RECOMPUTE_GATE dy
    x,  # [M, C]
    weight,  # (C,)
    bias,  # (C,)
    mean,  # (C,) float32
    var,  # (C,) float32
    partials,  # (P, 2, C) float32, from channel_sums_kernel
    dx,  # [M, C]
    dweight,  # (C,) float32
    dbias,  # (C,) float32
    count,  # number of values per channel in the statistics
    M,
    C,
    ROWS,
    P,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RECOMPUTE_GATE: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Read dz and x, write dx, dweight and dbias; visit rows in the reverse order of channel_sums_kernel."""
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = cols < C
    centre, variance = vector(mean, cols, inside), vector(var, cols, inside)
    invstd, scale, shift = affine_terms(variance, weight, bias, cols, inside, HAS_WEIGHT, HAS_BIAS, EPS)
    total, projected = sum_partials(partials, cols, inside, C, P, BLOCK_C, BLOCK_P)
    if pid == 0:
        tl.store(dbias + cols, total, inside)
        tl.store(dweight + cols, projected, inside)
    mean_dz = total / count
    slope = invstd * projected / count

    first = pid * ROWS
    tiles = tl.cdiv(tl.minimum(ROWS, M - first), BLOCK_M)
    for i in tl.range(0, tiles, num_stages=STAGES):
        start = first + (tiles - 1 - i) * BLOCK_M
        base, offsets, valid = tile_offsets(start, cols, inside, M, C, BLOCK_M)
        value = tl.load(x + base + offsets, valid, other=0.0, eviction_policy="evict_first").to(tl.float32)
        grad = tl.load(dz + base + offsets, valid, other=0.0, eviction_policy="evict_first").to(tl.float32)
        if RECOMPUTE_GATE:
            grad = tl.where(gate_from_input(value, centre, scale, shift, x.dtype.element_ty), grad, 0.0)
        out = scale[None, :] * (grad - mean_dz[None, :] - (value - centre[None, :]) * slope[None, :])
        tl.store(dx + base + offsets, out.to(dx.dtype.element_ty), valid)


def gate(relu: bool, mask: Tensor | None) -> str:
    """Return the value of gated_gradient's GATE."""
    if not relu:
        return "none"
    return "input" if mask is None else "bits"


def channel_sums(
    dy: Tensor,  # (N, C, H, W) channels-last, as dskip, x and dz
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
    tiles: Tiles,
) -> tuple[Tensor, Tensor]:
    """Return partial sums (P, 2, C) float32, Σ dz and Σ dz·x̂ of each CTA's rows, and dz, empty without `store_dz`."""
    partials = empty_partials(x, tiles)
    dz = torch.empty_like(x) if store_dz else x.new_empty(0)
    sources = (dy, dskip, x, mask, weight, bias, mean, var)
    results = (dz if store_dz else None, None, partials, *(None,) * 5)
    _launch(launchable(channel_sums_kernel), sources, results, eps, relu, tiles)
    return partials, dz


def with_fixed_stats(
    dy: Tensor,  # (N, C, H, W) channels-last, as dskip, x, dx and dz
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
    tiles: Tiles,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the whole backward of a normalisation by given statistics, which do not depend on x.

    Returns:
        dx, dz: (N, C, H, W) channels-last; dz is empty without `store_dz`.
        dbias, dweight, dmean, dvar: (C,) float32.
    """
    dx = torch.empty_like(x)
    dz = torch.empty_like(x) if store_dz else x.new_empty(0)
    dweight, dbias, dmean, dvar = (torch.empty_like(mean) for _ in range(4))
    sources = (dy, dskip, x, mask, weight, bias, mean, var)
    results = (*(dz if store_dz else None, dx, empty_partials(x, tiles), counter(x)), *(dweight, dbias, dmean, dvar))
    _launch(launchable(channel_sums_kernel, opaque=True), sources, results, eps, relu, tiles)
    return dx, dz, dbias, dweight, dmean, dvar


def _launch(
    kernel: Any,  # launchable(channel_sums_kernel)
    sources: tuple[Tensor | None, ...],  # dy to var, in the order of the kernel's arguments
    results: tuple[Tensor | None, ...],  # dz_out to dvar, in the same order
    eps: float,
    relu: bool,
    tiles: Tiles,
) -> None:
    """Launch channel_sums_kernel with the flags that follow from which tensors are None."""
    _, dskip, x, mask, weight, bias, *_ = sources
    dz, dx, *_ = results
    assert x is not None
    kernel[tiles.grid](
        *pointers(*sources, *results, unused=x),
        *matrix_shape(x),
        tiles.rows,
        HAS_SKIP=dskip is not None,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        GATE=gate(relu, mask),
        STORE_DZ=dz is not None,
        STORE_DX=dx is not None,
        EPS=eps,
        FINAL_REDUCERS=final_reducers(tiles.c_blocks, x),
        BLOCK_M=tiles.block_m,
        BLOCK_C=tiles.block_c,
        BLOCK_P=tiles.block_p,
        num_warps=WARPS,
    )


def input_gradient(
    dz: Tensor,  # (N, C, H, W) channels-last, as x and dx; with `recompute_gate` dy
    x: Tensor,
    weight: Tensor | None,  # (C,)
    bias: Tensor | None,  # (C,)
    mean: Tensor,  # (C,) float32
    var: Tensor,  # (C,) float32
    partials: Tensor,  # (P, 2, C) float32
    eps: float,
    count: int,  # number of values per channel in the statistics
    recompute_gate: bool,
    tiles: Tiles,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx, and the partials' totals dbias and dweight, (C,) float32."""
    m, c = matrix_shape(x)
    dx = torch.empty_like(x)
    dweight, dbias = (torch.empty(c, dtype=torch.float32, device=x.device) for _ in range(2))
    launchable(input_gradient_kernel)[tiles.grid](
        dz,
        x,
        *pointers(weight, bias, unused=x),
        mean,
        var,
        partials,
        dx,
        dweight,
        dbias,
        count,
        m,
        c,
        tiles.rows,
        partials.shape[0],
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        RECOMPUTE_GATE=recompute_gate,
        EPS=eps,
        BLOCK_M=tiles.block_m,
        BLOCK_C=tiles.block_c,
        BLOCK_P=tiles.block_p,
        num_warps=WARPS,
    )
    return dx, dbias, dweight
