"""Compute 1×1 convolutions as matrix products; normalise the input in the prologue, sum the output in the epilogue.

    forward          z  = a · weightᵀ     [M, C] × [C, K], a = relu(norm(x))
    input gradient   da = dz · weight     [M, K] × [K, C]

One kernel computes both; the weight gradient is in conv_common.py. Bytes per pixel, in bf16:

    forward          reads x            2·C          writes z     2·K
    input gradient   reads z, dz and x  4·K + 2·C    writes dx    2·C
    weight gradient  reads x, z and dz  2·C + 4·K
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..grid_sync import final_reducers
from ..tiling import ceil_div, matrix_shape, next_power_of_two
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
def conv_1x1_kernel(
    x,  # [M, C]
    mean,  # (C,) float32, as the next three
    var,
    gamma,
    beta,
    eps,
    dz,  # [M, K]; dz to mean_z are None in the forward
    dmean_z,  # (K,) float32
    dvar_z,
    z,  # [M, K]
    mean_z,
    weight,  # (K, C) of x's dtype
    stride_k,
    stride_c,
    out,  # forward [M, K], z; backward [M, C], dx
    partials,  # float32; forward (P, 3, K): origin, mean, M2; backward (P, 2, C): Σ g, Σ g·(x - mean), or None
    arrived,  # () int32: see grid_sync.py
    mean_out,  # (K,) float32, mean of z; None in the backward, as var_out
    var_out,
    dmean,  # (C,) float32; dmean to dbeta are None in the forward, and if their vector is None
    dvar,
    dgamma,
    dbeta,
    M,
    FINAL_REDUCERS: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_SUMS: tl.constexpr,
):
    """Compute BLOCK pixels × BLOCK_OUT channels per CTA; with z, the input gradient, else the forward.

    CTAs of the same pixels have consecutive numbers, so that all but the first find the input in the L2.
    """
    BACKWARD: tl.constexpr = z is not None
    AFFINE: tl.constexpr = ((dmean_z is not None) or (dvar_z is not None)) if BACKWARD else mean is not None
    IN: tl.constexpr = K if BACKWARD else C
    OUT: tl.constexpr = C if BACKWARD else K
    OUTS: tl.constexpr = (OUT + BLOCK_OUT - 1) // BLOCK_OUT
    if BACKWARD:
        stride_i, stride_o = stride_k, stride_c
    else:
        stride_i, stride_o = stride_c, stride_k
    program = tl.program_id(0) // OUTS
    o = tl.program_id(0) % OUTS * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    lane = tl.arange(0, BLOCK)
    base = program.to(tl.int64) * BLOCK
    valid = lane < M - program * BLOCK

    sums = tl.zeros([BLOCK, BLOCK_OUT], tl.float32)
    for start in range(0, IN, BLOCK_IN):
        i = start + tl.arange(0, BLOCK_IN)
        terms = input_terms(mean, var, gamma, beta, eps, dmean_z, dvar_z, mean_z, M, i, IN, BACKWARD)
        inside = valid[:, None] & (i < IN)[None, :]
        tile = load_input(x, dz, z, base * IN, lane[:, None] * IN + i[None, :], inside, terms, AFFINE, BACKWARD)
        addresses = weight + i[:, None] * stride_i + o[None, :] * stride_o
        tap = tl.load(addresses, (i < IN)[:, None] & (o < OUT)[None, :], other=0.0)
        sums = tl.dot(tile, tap, sums, input_precision="ieee")

    offsets = lane[:, None] * OUT + o[None, :]
    inside = valid[:, None] & (o < OUT)[None, :]
    if BACKWARD:
        g, projected = store_input_gradient(
            out, sums, x, base * OUT, offsets, inside, mean, var, gamma, beta, eps, o, OUT
        )
        if partials is not None:
            store_sums(partials, program, g, projected, o, OUT)
    else:
        rounded = store_output(out, sums, base * OUT, offsets, inside)
        zeros = tl.zeros([BLOCK, BLOCK_OUT], tl.float32)
        store_statistics(partials, program, valid, rounded, zeros, zeros, o, OUT)
    reduce_convolution_sums(
        arrived, partials, mean_out, var_out, var, gamma, eps, dmean, dvar, dgamma, dbeta, M, 1, BLOCK, 1,
        tl.num_programs(0) // OUTS, C, K, BACKWARD, FINAL_REDUCERS, BLOCK_P, BLOCK_SUMS,
    )  # fmt: skip


def options(dtype: torch.dtype, c_in: int, c_out: int, backward: bool) -> dict[str, int]:
    """Return the tile's shape, warps and stages; they compile for sm_80 and sm_90 without spilling registers."""
    block_in, block_out = (max(16, next_power_of_two(n)) for n in (c_in, c_out))
    if dtype == torch.float32:
        return {"BLOCK": 32, "BLOCK_IN": 16, "BLOCK_OUT": min(block_out, 32), "num_warps": 4, "num_stages": 1}
    block = 64 if backward else 128
    block_in, block_out = min(block_in, 64), min(block_out, 128)
    return {"BLOCK": block, "BLOCK_IN": block_in, "BLOCK_OUT": block_out, "num_warps": 8, "num_stages": 3}


def convolve(x: Tensor, weight: Tensor, norm: Norm, gradient: Gradient | None = None) -> Results:
    """Compute z and its statistics; with a `gradient`, dx and the gradients of the normalisation."""
    m, c = matrix_shape(x)
    k = weight.shape[0]
    c_in, c_out = (c, k) if gradient is None else (k, c)
    tile = options(x.dtype, c_in, c_out, gradient is not None)
    pieces = ceil_div(m, tile["BLOCK"])
    found = results(x, c_out, pieces, norm, gradient)
    # Cast here and not in the kernel, because every CTA reads the weight, which can be larger than its part of x.
    weight = weight.to(x.dtype)
    launchable(conv_1x1_kernel, opaque=True)[(pieces * ceil_div(c_out, tile["BLOCK_OUT"]),)](
        x,
        *norm,
        *(gradient or NO_GRADIENT),
        weight,
        *weight.stride()[:2],
        *found,
        m,
        FINAL_REDUCERS=final_reducers(ceil_div(c_out, BLOCK_SUMS), x),
        C=c,
        K=k,
        BLOCK_P=partials_at_once(pieces),
        BLOCK_SUMS=BLOCK_SUMS,
        **tile,
    )
    return found
