"""The 3×3 convolution of few channels, with its input made in the prologue and its output summed in the epilogue.

z = conv(relu(norm(x)), weight), stride 1, zero padding, and the statistics of z; backward, from z's gradient, that of
x. Stride-1 convolutions differentiate to convolutions: one kernel does both, with the filter turned half around.

Bytes per element of one activation, in bf16, with C = K:

    forward          reads x            2    writes z     2
    input gradient   reads z, dz and x  6    writes dx    2
    weight gradient  reads x, z and dz  6

As kernels of their own, statistics and normalisation add 6 to the forward's 4. None of it has been measured yet.
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
    """Column s of the filter: for its rows 0, 1, 2 the matrix from the input channels i to the output channels o."""
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
    dz,  # [N, H, W, K]; the gradient's five are None forward
    dmean_z,  # (K,) float32
    dvar_z,
    z,  # [N, H, W, K]
    mean_z,
    weight,  # (K, C, 3, 3)
    stride_k,
    stride_c,
    stride_r,
    stride_s,
    out,  # [N, H, W, K], z; backward [N, H, W, C], dx
    partials,  # (P, 3, K) float32: origin, mean, M2; backward (P, 2, C): Σ g, Σ g·(x - mean), or None
    arrived,  # () int32: see grid_sync.py
    mean_out,  # (K,) float32, of z, as the next one; None backward
    var_out,
    dmean,  # (C,) float32; these four are None forward, and where their vector is
    dvar,
    dgamma,
    dbeta,
    N,
    H,
    W,
    ROWS,  # of one CTA
    FINAL_REDUCERS: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_SUMS: tl.constexpr,
):
    """A CTA takes BLOCK columns, of several images where those are narrow, and walks down ROWS rows of them.

    Each row of the input is loaded three times, shifted for the filter's columns, and added to the three rows of the
    output that it touches: the one below begins, the one above is complete. Nine loads a pixel, one for each tap, would
    apply the prologue three times as often, and that, not memory, would then be the limit.

    Nine dots a row, one for each tap. Three dots over the 3·C contiguous numbers that a row of the window is would have
    to be padded to 4·C, a power of two: a third more matrix instructions.
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
    # 64 bits for the base of the block's first image only; from there 32 will do.
    image = block * BLOCK // W
    base = image.to(tl.int64) * (H * W)
    pixel = ((q // W - image) * (H * W) + column)[:, None]
    o = tl.program_id(2) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)

    if BACKWARD:
        # The transpose of a convolution takes the filter from output to input channels, turned half around.
        strides = (stride_k, stride_c, -stride_r, -stride_s)
        weight += 2 * stride_r + 2 * stride_s
    else:
        strides = (stride_c, stride_k, stride_r, stride_s)
    # Where a tile has all the input's channels, what depends on no row stays on chip, the filter in shared memory.
    WHOLE: tl.constexpr = BLOCK_IN == IN
    if WHOLE:
        i = tl.arange(0, IN)
        terms = input_terms(mean, var, gamma, beta, eps, dmean_z, dvar_z, mean_z, M, i, IN, BACKWARD)
        taps = (
            load_column(weight, 0, i, o, strides, dtype),
            load_column(weight, 1, i, o, strides, dtype),
            load_column(weight, 2, i, o, strides, dtype),
        )

    # Rows h - 1 and h of the output, as far as they are summed.
    above = tl.zeros([BLOCK, BLOCK_OUT], tl.float32)
    here = tl.zeros([BLOCK, BLOCK_OUT], tl.float32)
    # Of every column, over the rows that are done: Σ v and Σ v², where v is z about its value in the first of them, and
    # so small; backward, Σ g and Σ g·(x - mean).
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
        # Outside the `if`, for Triton 3.6 cannot compile a dot's result that only an `if` uses for sm_90.
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
    """The tile's shape, warps and stages: what compiles for sm_80 and sm_90 without spilling registers."""
    if dtype == torch.float32:
        # No tensor cores take part, and a dot holds its whole depth in registers.
        return {"BLOCK": 64, "BLOCK_IN": 16, "BLOCK_OUT": 16, "num_warps": 8, "num_stages": 1}
    warps = 8 if c_in == 64 else 4
    return {"BLOCK": 64, "BLOCK_IN": c_in, "BLOCK_OUT": min(c_out, 32), "num_warps": warps, "num_stages": 3}


def convolve(x: Tensor, weight: Tensor, norm: Norm, gradient: Gradient | None = None) -> Results:
    """z and its statistics; with a gradient dx and the gradients of the normalisation."""
    n, c, h, w = x.shape
    k = weight.shape[0]
    c_in, c_out = (c, k) if gradient is None else (k, c)
    tile = options(x.dtype, c_in, c_out)
    columns, outs = ceil_div(n * w, tile["BLOCK"]), c_out // tile["BLOCK_OUT"]
    # As tall as leaves enough CTAs, but two rows at least, since the rows above and below are read too.
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
