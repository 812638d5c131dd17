"""Compute the training forward in two kernels: partial statistics, then finalise + normalise + add + ReLU.

The maths is reference.batch_norm_act. A channels-last tensor is the matrix [M = N·H·W, C] in memory.

    statistics   reads x                                       → partials
    normalise    reads x (from the L2, if it fits), residual   → y, 1 bit of mask, mean, var

Bytes per element in bf16: 2 + 4 without a residual, 2 + 6⅛ with one. Statistics are centred, so the variance of a
tensor of mean 1,000 and standard deviation 1 is exact to 1e-6; from sums of squares in float32 it would be off by 18 %.
There are no atomics and every sum has one fixed order, so equal inputs give bitwise identical results.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiling import STAGES as STAGES_OF_A_LOOP
from ..tiling import WARPS, Tiles, ceil_div, matrix_shape
from ..triton_launch import launchable, pointers

STAGES = tl.constexpr(STAGES_OF_A_LOOP)


@triton.jit
def merge(count_a, mean_a, m2_a, count_b, mean_b, m2_b):
    """Merge (count, mean, M2 = Σ(v - mean)²) of two sets of values (Chan, Golub & LeVeque 1979, equation 2.1)."""
    count = count_a + count_b
    share = count_b / tl.maximum(count, 1)
    delta = mean_b - mean_a
    return count, mean_a + delta * share, m2_a + m2_b + delta * delta * count_a * share


@triton.jit
def merge_rows(count, mean, m2):
    """Merge the R sets of each column about their common mean; return count, mean and M2.

    mean and M2 are (R, B) and become (B,). count is (R, 1) or (R, B) and becomes (1,) or (B,).
    """
    total = tl.sum(count, 0)
    common = tl.sum(count * mean, 0) / tl.maximum(total, 1)
    delta = mean - common[None, :]
    return total, common, tl.sum(m2 + count * delta * delta, 0)


@triton.jit
def merge_partials(partials, cols, inside, M, C, ROWS, P, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """Merge the P partials (P, 2, C); return count (1,), mean about origin and M2, (BLOCK_C,) each.

    Each partial covers ROWS rows, the last one may cover fewer. Partials are merged into BLOCK_P slots element by
    element, and the slots only at the end, because a reduction costs barriers and every CTA waits for it.
    """
    count = tl.zeros([BLOCK_P, 1], tl.float32)
    mean = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        mask = (p < P)[:, None] & inside[None, :]
        addresses = partials + p[:, None] * (2 * C) + cols[None, :]
        counts = tl.minimum(tl.maximum(M - p * ROWS, 0), ROWS).to(tl.float32)[:, None]
        means, m2s = tl.load(addresses, mask, other=0.0), tl.load(addresses + C, mask, other=0.0)
        count, mean, m2 = merge(count, mean, m2, counts, means, m2s)
    return merge_rows(count, mean, m2)


@triton.jit
def vector(pointer, cols, inside):
    """Load a (C,) vector as float32 (BLOCK_C,), with 0 beyond its end."""
    return tl.load(pointer + cols, inside, other=0.0).to(tl.float32)


@triton.jit
def origin(x, cols, inside):
    """Load row 0 of x as float32, the point about which statistics are computed.

    Any point of the data will do: partial means are then as small as the deviations, and so are their rounding errors.
    About 0, a mean 1,000 deviations away cost the variance 1.5e-6.
    """
    return vector(x, cols, inside)


@triton.jit
def parameter(pointer, cols, inside, PRESENT: tl.constexpr, default: tl.constexpr):
    """Load a (C,) parameter as float32 (BLOCK_C,), or return `default` if the module has none."""
    if PRESENT:
        return vector(pointer, cols, inside)
    return tl.full(cols.shape, default, tl.float32)


@triton.jit
def affine_terms(var, weight, bias, cols, inside, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, EPS: tl.constexpr):
    """Return invstd, scale and shift, (BLOCK_C,) each, for x̂ = (x - mean)·invstd and for `affine`.

    EPS is a constexpr, because torch.compile would pass a runtime float as float64.
    """
    invstd = tl.rsqrt(var + EPS)
    scale = invstd * parameter(weight, cols, inside, HAS_WEIGHT, 1.0)
    return invstd, scale, parameter(bias, cols, inside, HAS_BIAS, 0.0)


@triton.jit
def affine(x, mean, scale, shift):
    """Return (x - mean)·scale + shift of a tile, without the cancellation of x·scale - mean·scale for large means."""
    return (x - mean[None, :]) * scale[None, :] + shift[None, :]


@triton.jit
def tile_offsets(start, cols, inside, M, C, BLOCK_M: tl.constexpr):
    """Return base, offsets and mask of the tile (BLOCK_M, BLOCK_C) that begins at row `start` of a matrix [M, C].

    Element offsets are relative to the base. Only the base has 64 bits: M·C exceeds 2³¹ from batch 2,700 of ResNet-50
    on, and the size of a tile never does.
    """
    rows = tl.arange(0, BLOCK_M)
    valid = (rows < M - start)[:, None] & inside[None, :]
    return start.to(tl.int64) * C, rows[:, None] * C + cols[None, :], valid


@triton.jit
def statistics_kernel(
    x,  # [M, C]
    partials,  # (P, 2, C) float32: mean about origin and M2 of each CTA's rows
    M,
    C,
    ROWS,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute the partial statistics of each CTA's rows; reads x once.

    Welford's update (1962) runs per element of the tile, and the tile's rows are merged at the end.
    """
    pid = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = cols < C
    about = origin(x, cols, inside)[None, :]
    rows = tl.arange(0, BLOCK_M)
    count = tl.zeros([BLOCK_M], tl.float32)
    mean = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    first = pid * ROWS
    for i in tl.range(0, tl.cdiv(tl.minimum(ROWS, M - first), BLOCK_M), num_stages=STAGES):
        start = first + i * BLOCK_M
        base, offsets, valid = tile_offsets(start, cols, inside, M, C, BLOCK_M)
        # evict_last keeps x in the L2 for the second pass.
        value = tl.load(x + base + offsets, valid, other=0.0, eviction_policy="evict_last").to(tl.float32) - about
        count += tl.where(rows < M - start, 1.0, 0.0)
        delta = tl.where(valid, value - mean, 0.0)
        mean += delta * (1 / tl.maximum(count, 1))[:, None]
        m2 += delta * tl.where(valid, value - mean, 0.0)
    _, mean, m2 = merge_rows(count[:, None], mean, m2)
    out = partials + pid * (2 * C) + cols
    tl.store(out, mean, inside)
    tl.store(out + C, m2, inside)


@triton.jit
def write_tile(
    value, residual, y, mask, mean, scale, shift, start, cols, inside, M, C,
    HAS_RESIDUAL: tl.constexpr, RELU: tl.constexpr, SAVE_MASK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Normalise, add, activate and store a tile; `value` is x from row `start` on, (BLOCK_M, BLOCK_C) float32."""
    base, offsets, valid = tile_offsets(start, cols, inside, M, C, BLOCK_M)
    out = affine(value, mean, scale, shift)
    if HAS_RESIDUAL:
        out += tl.load(residual + base + offsets, valid, other=0.0, eviction_policy="evict_first").to(tl.float32)
    out = out.to(y.dtype.element_ty)
    if RELU:
        passes = relu_mask(out)
        out = tl.where(passes, out, 0.0)
        if SAVE_MASK:
            store_bits(mask, passes & valid, start, cols, inside, M, C, BLOCK_M, BLOCK_C)
    tl.store(y + base + offsets, out, valid)


@triton.jit
def normalise_kernel(
    x,  # [M, C]
    residual,  # [M, C]
    weight,  # (C,)
    bias,  # (C,)
    partials,  # (P, 2, C) float32; unused without BATCH_STATISTICS
    mean_in,  # (C,) float32, with var_in the given statistics; unused with BATCH_STATISTICS
    var_in,  # (C,) float32
    y,  # [M, C]
    mask,  # (⌈M/8⌉, C) uint8, bit r of byte b: ReLU let row 8b + r through
    mean_out,  # (C,) float32
    var_out,  # (C,) float32
    skip,  # (1,) of y's dtype, set to 0
    M,
    C,
    ROWS,
    P,
    BATCH_STATISTICS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    SAVE_MASK: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Read x and residual, write y and one bit of mask per element.

    Rows are visited in the reverse order of statistics_kernel, because the rows that it read last are still in the L2.
    """
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = cols < C
    if BATCH_STATISTICS:
        count, mean, m2 = merge_partials(partials, cols, inside, M, C, ROWS, P, BLOCK_C, BLOCK_P)
        mean += origin(x, cols, inside)
        var = m2 / tl.maximum(count, 1)
    else:
        mean, var = vector(mean_in, cols, inside), vector(var_in, cols, inside)
    if pid == 0:
        tl.store(mean_out + cols, mean, inside)
        tl.store(var_out + cols, var, inside)
        if HAS_SKIP:
            tl.store(skip, 0.0)
    _, scale, shift = affine_terms(var, weight, bias, cols, inside, HAS_WEIGHT, HAS_BIAS, EPS)

    first = pid * ROWS
    tiles = tl.cdiv(tl.minimum(ROWS, M - first), BLOCK_M)
    for i in tl.range(0, tiles, num_stages=STAGES):
        start = first + (tiles - 1 - i) * BLOCK_M
        base, offsets, valid = tile_offsets(start, cols, inside, M, C, BLOCK_M)
        value = tl.load(x + base + offsets, valid, other=0.0, eviction_policy="evict_first").to(tl.float32)
        write_tile(
            value, residual, y, mask, mean, scale, shift, start, cols, inside, M, C,
            HAS_RESIDUAL, RELU, SAVE_MASK, BLOCK_M, BLOCK_C,
        )  # fmt: skip


@triton.jit
def relu_mask(out):
    """Return ReLU's mask of `out`. NaN passes, as in torch, so that a bad value is seen and not hidden."""
    return (out <= 0) == 0


@triton.jit
def store_bits(mask, passes, start, cols, inside, M, C, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """Pack eight rows of a tile into one byte per channel, and store the bytes."""
    place = tl.arange(0, 8)[None, :, None]
    bits = tl.reshape(passes.to(tl.int32), [BLOCK_M // 8, 8, BLOCK_C])
    bits = tl.sum(bits << place, 1).to(tl.uint8)
    rows = tl.arange(0, BLOCK_M // 8)
    valid = (rows < tl.cdiv(M - start, 8))[:, None] & inside[None, :]
    tl.store(mask + (start // 8).to(tl.int64) * C + rows[:, None] * C + cols[None, :], bits, valid)


@triton.jit
def load_bits(mask, start, cols, inside, M, C, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """Load the bits that store_bits stored, as (BLOCK_M, BLOCK_C) bool."""
    rows = tl.arange(0, BLOCK_M // 8)
    valid = (rows < tl.cdiv(M - start, 8))[:, None] & inside[None, :]
    addresses = mask + (start // 8).to(tl.int64) * C + rows[:, None] * C + cols[None, :]
    bits = tl.load(addresses, valid, other=0).to(tl.int32)
    place = tl.arange(0, 8)[None, :, None]
    return tl.reshape((bits[:, None, :] >> place) & 1, [BLOCK_M, BLOCK_C]) != 0


def empty_partials(x: Tensor, tiles: Tiles) -> Tensor:
    """Allocate (P, 2, C) float32: two numbers per channel for the rows of each of P CTAs."""
    return torch.empty((tiles.partials, 2, x.shape[1]), dtype=torch.float32, device=x.device)


def outputs(x: Tensor, save_mask: bool, fork: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Allocate the results of the forward.

    Returns:
        y: like x.
        mean, var: (C,) float32.
        mask: (⌈M/8⌉, C) uint8; empty without `save_mask`.
        skip: (1,); empty without `fork`.
    """
    m, c = matrix_shape(x)
    mean, var = (torch.empty(c, dtype=torch.float32, device=x.device) for _ in range(2))
    mask = torch.empty((ceil_div(m, 8), c) if save_mask else 0, dtype=torch.uint8, device=x.device)
    skip = torch.empty(1 if fork else 0, dtype=x.dtype, device=x.device)
    return torch.empty_like(x), mean, var, mask, skip


def statistics(x: Tensor, tiles: Tiles) -> Tensor:
    """Compute partial statistics of x, (N, C, H, W) channels-last.

    Returns:
        (P, 2, C) float32: mean about x's first row, and M2, of each CTA's rows.
    """
    m, c = matrix_shape(x)
    partials = empty_partials(x, tiles)
    launchable(statistics_kernel)[tiles.grid](
        x, partials, m, c, tiles.rows, BLOCK_M=tiles.block_m, BLOCK_C=tiles.block_c, num_warps=WARPS
    )
    return partials


def normalise(
    x: Tensor,  # (N, C, H, W) channels-last
    residual: Tensor | None,  # like x
    weight: Tensor | None,  # (C,)
    bias: Tensor | None,  # (C,)
    statistics: Tensor | tuple[Tensor, Tensor],  # partials (P, 2, C), or mean and var, each (C,)
    eps: float,
    relu: bool,
    save_mask: bool,
    fork: bool,
    tiles: Tiles,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Normalise, add and activate; return y, mean, var, mask and skip as `outputs` describes them."""
    m, c = matrix_shape(x)
    y, mean, var, mask, skip = outputs(x, save_mask, fork)
    given = isinstance(statistics, tuple)
    sources = (None, *statistics) if given else (statistics, None, None)
    results = (y, mask if save_mask else None, mean, var, skip if fork else None)
    launchable(normalise_kernel)[tiles.grid](
        x,
        *pointers(residual, weight, bias, *sources, *results, unused=x),
        m,
        c,
        tiles.rows,
        tiles.partials,
        BATCH_STATISTICS=not given,
        HAS_RESIDUAL=residual is not None,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        RELU=relu,
        SAVE_MASK=save_mask,
        HAS_SKIP=fork,
        EPS=eps,
        BLOCK_M=tiles.block_m,
        BLOCK_C=tiles.block_c,
        BLOCK_P=tiles.block_p,
        num_warps=WARPS,
    )
    return y, mean, var, mask, skip
