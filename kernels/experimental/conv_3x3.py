"""Compute 3×3 convolutions of few channels; normalise the input in the prologue, sum the output in the epilogue.

The forward is z = conv(relu(norm(x)), weight), stride 1, zero padding, with the statistics of z. The backward computes
x's gradient from z's. The gradient of a stride-1 convolution is a convolution with the filter rotated by 180°, so one
kernel computes both.

Bytes per element of one activation, in bf16, with C = K:

    forward          reads x            2    writes z     2
    input gradient   reads z, dz and x  6    writes dx    2
    weight gradient  reads x, z and dz  6

In separate kernels, statistics and normalisation would add 6 to the forward's 4. None of this has been measured yet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..grid_sync import final_reducers
from ..tiling import MIN_CTAS, ceil_div
from ..triton_launch import launchable
from .conv_common import (
    BLOCK_SUMS,
    NO_GRADIENT,
    Gradient,
    Norm,
    Results,
    input_terms,
    load_input,
    partials_at_once,
    reduce_convolution_sums,
    results,
    store_input_gradient,
    store_output,
    store_statistics,
    store_sums,
)


@triton.jit
def load_column(weight, s, i, o, strides, dtype: tl.constexpr):
    """Load column s of the filter: for each of its rows 0, 1, 2 a matrix of input channels i × output channels o."""
    stride_i, stride_o, stride_r, stride_s = strides
    addresses = weight + s * stride_s + i[:, None] * stride_i + o[None, :] * stride_o
    return (
        tl.load(addresses).to(dtype),
        tl.load(addresses + stride_r).to(dtype),
        tl.load(addresses + 2 * stride_r).to(dtype),
    )


@triton.jit
def conv_3x3_kernel(
    x,  # [N, H, W, C]
    mean,  # (C,) float32, as the next three
    var,
    gamma,
    beta,
    eps,
    dz,  # [N, H, W, K]; dz to mean_z are None in the forward
    dmean_z,  # (K,) float32
    dvar_z,
    z,  # [N, H, W, K]
    mean_z,
    weight,  # (K, C, 3, 3)
    stride_k,
    stride_c,
    stride_r,
    stride_s,
    out,  # forward [N, H, W, K], z; backward [N, H, W, C], dx
    partials,  # float32; forward (P, 3, K): origin, mean, M2; backward (P, 2, C): Σ g, Σ g·(x - mean), or None
    arrived,  # () int32: see grid_sync.py
    mean_out,  # (K,) float32, mean of z; None in the backward, as var_out
    var_out,
    dmean,  # (C,) float32; dmean to dbeta are None in the forward, and if their vector is None
    dvar,
    dgamma,
    dbeta,
    N,
    H,
    W,
    ROWS,  # per CTA
    FINAL_REDUCERS: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_SUMS: tl.constexpr,
):
    """Compute BLOCK columns × ROWS rows per CTA, row by row; with z, the input gradient, else the forward.

    The columns of a CTA may belong to several images if the images are narrow.

    Each input row is loaded three times, shifted for the filter's columns, and added to the three output rows that it
    contributes to: the row below starts, the row above is complete. Nine loads per pixel, one per tap, would apply the
    prologue three times as often, and the prologue would then be the limit, not memory.

    A row takes nine dots, one per tap. The alternative is three dots over the 3·C contiguous numbers of a row of the
    window, but they would have to be padded to 4·C, a power of two, which is a third more matrix instructions.
    """
    BACKWARD: tl.constexpr = z is not None
    AFFINE: tl.constexpr = ((dmean_z is not None) or (dvar_z is not None)) if BACKWARD else mean is not None
    IN: tl.constexpr = K if BACKWARD else C
    OUT: tl.constexpr = C if BACKWARD else K
    dtype: tl.constexpr = out.dtype.element_ty
    M = N * H * W
    block = tl.program_id(0)
    q = block * BLOCK + tl.arange(0, BLOCK)
    valid = q < N * W
    column = q % W
    # Only the base of the block's first image needs 64 bits; 32 bits are enough for offsets from it.
    image = block * BLOCK // W
    base = image.to(tl.int64) * (H * W)
    pixel = ((q // W - image) * (H * W) + column)[:, None]
    o = tl.program_id(2) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)

    if BACKWARD:
        # The input gradient is a convolution from output to input channels, its filter rotated by 180°.
        strides = (stride_k, stride_c, -stride_r, -stride_s)
        weight += 2 * stride_r + 2 * stride_s
    else:
        strides = (stride_c, stride_k, stride_r, stride_s)
    # If a tile has all input channels, everything that does not depend on the row stays on chip: the filter in shared
    # memory.
    WHOLE: tl.constexpr = BLOCK_IN == IN
    if WHOLE:
        i = tl.arange(0, IN)
        terms = input_terms(mean, var, gamma, beta, eps, dmean_z, dvar_z, mean_z, M, i, IN, BACKWARD)
        taps = (
            load_column(weight, 0, i, o, strides, dtype),
            load_column(weight, 1, i, o, strides, dtype),
            load_column(weight, 2, i, o, strides, dtype),
        )

    # Partial sums of rows h - 1 and h of the output.
    above = tl.zeros([BLOCK, BLOCK_OUT], tl.float32)
    here = tl.zeros([BLOCK, BLOCK_OUT], tl.float32)
    # Per column, sums over the completed rows. Forward: Σ v and Σ v² of v = z - origin, which is small, because origin
    # is z in the first row. Backward: Σ g and Σ g·(x - mean).
    origin = tl.zeros([BLOCK, BLOCK_OUT], dtype)
    first_sum = tl.zeros([BLOCK, BLOCK_OUT], tl.float32)
    second_sum = tl.zeros([BLOCK, BLOCK_OUT], tl.float32)
    first = tl.program_id(1) * ROWS
    for h in range(first - 1, tl.minimum(first + ROWS, H) + 1):
        below = tl.zeros([BLOCK, BLOCK_OUT], tl.float32)
        for s in tl.static_range(3):
            beside = column + s - 1
            inside = (valid & (beside >= 0) & (beside < W) & (h >= 0) & (h < H))[:, None]
            for start in range(0, IN, BLOCK_IN):
                i = start + tl.arange(0, BLOCK_IN)
                if WHOLE:
                    tap = taps[s]
                else:
                    terms = input_terms(mean, var, gamma, beta, eps, dmean_z, dvar_z, mean_z, M, i, IN, BACKWARD)
                    tap = load_column(weight, s, i, o, strides, dtype)
                row_base = (base + h * W + s - 1) * IN
                tile = load_input(x, dz, z, row_base, pixel * IN + i[None, :], inside, terms, AFFINE, BACKWARD)
                below = tl.dot(tile, tap[0], below, input_precision="ieee")
                here = tl.dot(tile, tap[1], here, input_precision="ieee")
                above = tl.dot(tile, tap[2], above, input_precision="ieee")
        # Outside the `if`, because Triton 3.6 cannot compile a dot for sm_90 if only an `if` uses its result.
        done = tl.where(valid[:, None], above, 0.0)
        if h > first:
            row_base = (base + (h - 1) * W) * OUT
            offsets = pixel * OUT + o[None, :]
            if BACKWARD:
                g, projected = store_input_gradient(
                    out, done, x, row_base, offsets, valid[:, None], mean, var, gamma, beta, eps, o, OUT
                )
                first_sum += g
                second_sum += projected
            else:
                rounded = store_output(out, done, row_base, offsets, valid[:, None])
                origin = tl.where(h == first + 1, rounded, origin)
                value = rounded.to(tl.float32) - origin.to(tl.float32)
                first_sum += value
                second_sum += value * value
        above = here
        here = below

    program = tl.program_id(1) * tl.num_programs(0) + block
    if not BACKWARD:
        rows = tl.minimum(ROWS, H - first)
        mean_of_rows = first_sum / rows
        m2 = second_sum - first_sum * mean_of_rows
        store_statistics(partials, program, tl.where(valid, rows, 0), origin, mean_of_rows, m2, o, OUT)
    elif partials is not None:
        store_sums(partials, program, first_sum, second_sum, o, OUT)
    reduce_convolution_sums(
        arrived, partials, mean_out, var_out, var, gamma, eps, dmean, dvar, dgamma, dbeta, N * W, H, BLOCK, ROWS,
        tl.num_programs(0) * tl.num_programs(1), C, K, BACKWARD, FINAL_REDUCERS, BLOCK_P, BLOCK_SUMS,
    )  # fmt: skip


def options(dtype: torch.dtype, c_in: int, c_out: int) -> dict[str, int]:
    """Return the tile's shape, warps and stages; they compile for sm_80 and sm_90 without spilling registers."""
    if dtype == torch.float32:
        # Without tensor cores, a dot keeps its whole inner dimension in registers, so tiles are small.
        return {"BLOCK": 64, "BLOCK_IN": 16, "BLOCK_OUT": 16, "num_warps": 8, "num_stages": 1}
    warps = 8 if c_in == 64 else 4
    return {"BLOCK": 64, "BLOCK_IN": c_in, "BLOCK_OUT": min(c_out, 32), "num_warps": warps, "num_stages": 3}


def convolve(x: Tensor, weight: Tensor, norm: Norm, gradient: Gradient | None = None) -> Results:
    """Compute z and its statistics; with a `gradient`, dx and the gradients of the normalisation."""
    n, c, h, w = x.shape
    k = weight.shape[0]
    c_in, c_out = (c, k) if gradient is None else (k, c)
    tile = options(x.dtype, c_in, c_out)
    columns, outs = ceil_div(n * w, tile["BLOCK"]), c_out // tile["BLOCK_OUT"]
    # As many rows per CTA as leave enough CTAs, but at least two, because the rows above and below are read too.
    rows = min(h, max(2, h * columns * outs // MIN_CTAS))
    down = ceil_div(h, rows)
    found = results(x, c_out, columns * down, norm, gradient)
    launchable(conv_3x3_kernel, opaque=True)[(columns, down, outs)](
        x,
        *norm,
        *(gradient or NO_GRADIENT),
        weight,
        *weight.stride(),
        *found,
        n,
        h,
        w,
        rows,
        FINAL_REDUCERS=final_reducers(ceil_div(c_out, BLOCK_SUMS), x),
        C=c,
        K=k,
        BLOCK_P=partials_at_once(columns * down),
        BLOCK_SUMS=BLOCK_SUMS,
        **tile,
    )
    return found
