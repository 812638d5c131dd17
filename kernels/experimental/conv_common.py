"""What the 1×1 and the 3×3 convolution share: prologues, epilogues, how sums are finished, the weight's gradient.

A channels-last tensor is a matrix [M = N·H·W, C]. What a convolution reads is made on the way in, so that it is never
in memory: forward the activation, backward the gradient of z, to which mean_z and var_z, functions of z, contribute,

    a  = relu((x - mean)·scale + beta)                     scale = gamma / √(var + eps)
    dz = dz + dmean_z/M + (z - mean_z)·2·dvar_z/M

What it writes is summed over the pixels on the way out: forward to the mean and variance of z, backward to the
gradients of mean, var, gamma and beta. Every CTA writes its sums in float32; the last ones wait for the others
(grid_sync.py) and put all together in one fixed order, which would else be a launch more. Atomics count CTAs and
nothing else: equal inputs give equal bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple  # noqa: F401, type comments need Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..batchnorm.backward import store_norm_gradients, sum_partials
from ..batchnorm.forward import affine, merge, merge_rows, relu_mask
from ..grid_sync import counter, final_reducer, final_reducers
from ..tiling import MIN_CTAS, ceil_div, next_power_of_two
from ..triton_launch import launchable

# What a CTA takes at a time as it finishes: of sums 8 channels and as many partials, and of the weight's gradient
# so many numbers. Large, because the others have gone: a round waits for memory as long with few as with many.
BLOCK_SUMS, MOST_PARTIALS, FINAL_ELEMENTS = 8, 256, 4096


class Norm(NamedTuple):
    """The normalisation of x, (C,) float32 each. Without mean and var there is none, and no ReLU."""

    mean: Tensor | None
    var: Tensor | None
    gamma: Tensor | None
    beta: Tensor | None
    eps: float


class Gradient(NamedTuple):
    """What the gradient of z is made from; None is zero."""

    dz: Tensor | None  # (N, K, H, W) channels-last
    dmean_z: Tensor | None  # (K,) float32
    dvar_z: Tensor | None  # (K,) float32
    z: Tensor  # (N, K, H, W) channels-last
    mean_z: Tensor  # (K,) float32


NO_GRADIENT = (None,) * 5  # in its place forward


# ---- prologues ---------------------------------------------------------------------------------------------


@triton.jit
def channel(pointer, c, C, default: tl.constexpr):
    """A (C,) vector at the channels c; `default` beyond the last, and where there is no vector."""
    return tl.full(c.shape, default, tl.float32) if pointer is None else tl.load(pointer + c, c < C, other=default)


@triton.jit
def inverse_std(var, eps, c, C):
    return tl.rsqrt(channel(var, c, C, 1.0) + eps)


@triton.jit
def activation_terms(mean, var, gamma, beta, eps, c, C):
    """mean, scale, beta at the channels c."""
    scale = inverse_std(var, eps, c, C) * channel(gamma, c, C, 1.0)
    return channel(mean, c, C, 0.0), scale, channel(beta, c, C, 0.0)


@triton.jit
def load_activation(x, base, offsets, inside, terms, NORM: tl.constexpr):
    """A tile of a, in x's dtype; zero where not inside, since padding is of a, not of x.

    `base` is the tile's, in 64 bits; the offsets from it need 32 at most.
    """
    value = tl.load(x + base + offsets, inside, other=0.0)
    if NORM:
        mean, scale, beta = terms
        a = affine(value.to(tl.float32), mean, scale, beta)
        # NaN passes, as in torch: a bad value should be seen, not hidden.
        a = tl.maximum(a, 0.0, propagate_nan=tl.PropagateNan.ALL)
        value = tl.where(inside, a, 0.0).to(value.dtype)
    return value


@triton.jit
def gradient_terms(dmean_z, dvar_z, mean_z, M, c, C):
    """mean_z, 2·dvar_z/M, dmean_z/M at the channels c."""
    slope = channel(dvar_z, c, C, 0.0) * (2.0 / M)
    return channel(mean_z, c, C, 0.0), slope, channel(dmean_z, c, C, 0.0) / M


@triton.jit
def load_gradient(dz, z, base, offsets, inside, terms, STATISTICS: tl.constexpr):
    """A tile of the whole gradient of z, in z's dtype; zero where not inside."""
    value = tl.zeros(offsets.shape, tl.float32)
    if STATISTICS:
        mean_z, slope, shift = terms
        centred = tl.load(z + base + offsets, inside, other=0.0).to(tl.float32) - mean_z[None, :]
        value = tl.where(inside, centred * slope[None, :] + shift[None, :], 0.0)
    if dz is not None:
        value += tl.load(dz + base + offsets, inside, other=0.0).to(tl.float32)
    return value.to(z.dtype.element_ty)


@triton.jit
def input_terms(mean, var, gamma, beta, eps, dmean_z, dvar_z, mean_z, M, i, IN: tl.constexpr, BACKWARD: tl.constexpr):
    """What load_input needs of the input's channels i."""
    if BACKWARD:
        terms = gradient_terms(dmean_z, dvar_z, mean_z, M, i, IN)
    else:
        terms = activation_terms(mean, var, gamma, beta, eps, i, IN)
    return terms


@triton.jit
def load_input(x, dz, z, base, offsets, inside, terms, AFFINE: tl.constexpr, BACKWARD: tl.constexpr):
    """A tile of what is convolved: a, or backward the gradient of z."""
    if BACKWARD:
        tile = load_gradient(dz, z, base, offsets, inside, terms, AFFINE)
    else:
        tile = load_activation(x, base, offsets, inside, terms, AFFINE)
    return tile


# ---- epilogues ---------------------------------------------------------------------------------------------


@triton.jit
def store_output(z, sums, base, offsets, inside):
    """Writes a tile of z; returns it as it was rounded."""
    rounded = sums.to(z.dtype.element_ty)
    tl.store(z + base + offsets, rounded, inside)
    return rounded


@triton.jit
def store_input_gradient(dx, da, x, base, offsets, inside, mean, var, gamma, beta, eps, c, C):
    """Writes a tile of x's gradient; returns g = da where ReLU let through, and g·(x - mean).

    The gate is recomputed from x: x is needed anyway, and a mask in memory would have to be read too.
    """
    if mean is None:
        gated = da
        projected = da
    else:
        centre, scale, shift = activation_terms(mean, var, gamma, beta, eps, c, C)
        value = tl.load(x + base + offsets, inside, other=0.0).to(tl.float32)
        gated = tl.where(relu_mask(affine(value, centre, scale, shift)), da, 0.0)
        projected = gated * (value - centre[None, :])
        da = gated * scale[None, :]
    tl.store(dx + base + offsets, da.to(dx.dtype.element_ty), inside)
    return gated, projected


@triton.jit
def store_statistics(partials, program, counts, origin, mean, m2, o, OUT: tl.constexpr):
    """Of the channels o, origin, mean about it and M2 of a tile, each row of which has those of `counts` pixels.

    An origin near the values leaves a float32 digits for the mean that one about zero would not have.
    """
    origin = origin.to(tl.float32)
    first = tl.arange(0, origin.shape[0])[:, None] == 0
    common = tl.sum(tl.where(first, origin, 0.0), 0)
    mean += origin - common[None, :]
    _, mean, m2 = merge_rows(counts.to(tl.float32)[:, None], mean, m2)
    to = partials + program * (3 * OUT) + o
    tl.store(to, common, o < OUT)
    tl.store(to + OUT, mean, o < OUT)
    tl.store(to + 2 * OUT, m2, o < OUT)


@triton.jit
def store_sums(partials, program, g, projected, o, OUT: tl.constexpr):
    """Of the channels o, the sums over a tile's rows."""
    to = partials + program * (2 * OUT) + o
    tl.store(to, tl.sum(g, 0), o < OUT)
    tl.store(to + OUT, tl.sum(projected, 0), o < OUT)


# ---- what finishes a kernel --------------------------------------------------------------------------------


@triton.jit
def reduce_statistics(
    partials,  # (P, 3, K) float32, of each CTA's pixels: origin, mean about it, M2
    mean_z,  # (K,) float32
    var_z,
    WIDTH,  # the pixels as a rectangle,
    HEIGHT,
    COLUMNS: tl.constexpr,  # and a CTA's piece of it; pieces are numbered row by row
    ROWS,
    P,
    index,  # of this CTA among those doing the final reduction
    reducers,  # the number of those CTAs
    K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """mean and M2 / count of all pixels (Chan, Golub & LeVeque 1979). Reads 12·P bytes a channel."""
    across = tl.cdiv(WIDTH, COLUMNS)
    for start_k in range(index * BLOCK_K, K, reducers * BLOCK_K):
        k = start_k + tl.arange(0, BLOCK_K)
        origin = tl.load(partials + k, k < K, other=0.0)
        count = tl.zeros([BLOCK_P, 1], tl.float32)
        mean = tl.zeros([BLOCK_P, BLOCK_K], tl.float32)
        m2 = tl.zeros([BLOCK_P, BLOCK_K], tl.float32)
        for start in range(0, P, BLOCK_P):
            p = start + tl.arange(0, BLOCK_P)
            mask = (p < P)[:, None] & (k < K)[None, :]
            # The last piece of a row, and those of the last row, may be smaller.
            columns = tl.minimum(WIDTH - p % across * COLUMNS, COLUMNS)
            rows = tl.minimum(HEIGHT - p // across * ROWS, ROWS)
            counts = tl.where(p < P, columns * rows, 0).to(tl.float32)[:, None]
            addresses = partials + p[:, None] * (3 * K) + k[None, :]
            means = tl.load(addresses, mask, other=0.0) - origin[None, :] + tl.load(addresses + K, mask, other=0.0)
            m2s = tl.load(addresses + 2 * K, mask, other=0.0)
            count, mean, m2 = merge(count, mean, m2, counts, means, m2s)
        total, common, m2 = merge_rows(count, mean, m2)
        tl.store(mean_z + k, origin + common, k < K)
        tl.store(var_z + k, m2 / total, k < K)


@triton.jit
def reduce_norm_gradients(
    partials,  # (P, 2, C) float32: Σ g and Σ g·(x - mean) of each CTA's pixels
    var,  # (C,) float32
    gamma,
    eps,
    dmean,  # (C,) float32
    dvar,
    dgamma,
    dbeta,
    P,
    index,  # of this CTA among those doing the final reduction
    reducers,  # the number of those CTAs
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The gradients of what normalised x. Reads 8·P bytes a channel."""
    for start_c in range(index * BLOCK_C, C, reducers * BLOCK_C):
        c = start_c + tl.arange(0, BLOCK_C)
        mask = c < C
        total, projected = sum_partials(partials, c, mask, C, P, BLOCK_C, BLOCK_P)
        invstd = inverse_std(var, eps, c, C)
        scale = channel(gamma, c, C, 1.0) * invstd
        store_norm_gradients(total, projected * invstd, scale, invstd, dmean, dvar, dgamma, dbeta, c, mask)


@triton.jit
def reduce_convolution_sums(
    arrived, partials, mean_z, var_z, var, gamma, eps, dmean, dvar, dgamma, dbeta, WIDTH, HEIGHT, COLUMNS: tl.constexpr,
    ROWS, P, C: tl.constexpr, K: tl.constexpr, BACKWARD: tl.constexpr, FINAL_REDUCERS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_SUMS: tl.constexpr,
):  # fmt: skip
    """The statistics of z, or backward the gradients of what normalised x, from what every CTA has stored."""
    if partials is not None:
        index, reducers = final_reducer(arrived, FINAL_REDUCERS)
        if index >= 0:
            if BACKWARD:
                reduce_norm_gradients(
                    partials, var, gamma, eps, dmean, dvar, dgamma, dbeta, P, index, reducers, C, BLOCK_P, BLOCK_SUMS
                )  # fmt: skip
            else:
                reduce_statistics(
                    partials, mean_z, var_z, WIDTH, HEIGHT, COLUMNS, ROWS, P, index, reducers, K, BLOCK_P, BLOCK_SUMS
                )  # fmt: skip


@triton.jit
def reduce_weight_gradient(
    partials,  # (P, N) float32
    dweight,  # (N,)
    P,
    index,  # of this CTA among those doing the final reduction
    reducers,  # the number of those CTAs
    N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Σ over P, slot by slot and over the slots at the end."""
    for start_n in range(index * BLOCK_N, N, reducers * BLOCK_N):
        n = start_n + tl.arange(0, BLOCK_N)
        total = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
        for start in range(0, P, BLOCK_P):
            p = start + tl.arange(0, BLOCK_P)
            mask = (p < P)[:, None] & (n < N)[None, :]
            total += tl.load(partials + p[:, None] * N + n[None, :], mask, other=0.0)
        tl.store(dweight + n, tl.sum(total, 0).to(dweight.dtype.element_ty), n < N)


# ---- the weight's gradient ---------------------------------------------------------------------------------


@triton.jit
def weight_gradient_kernel(
    x,  # [N, H, W, C]
    mean,  # (C,) float32, as the next three
    var,
    gamma,
    beta,
    eps,
    dz,  # [N, H, W, K]
    dmean_z,  # (K,) float32
    dvar_z,
    z,  # [N, H, W, K]
    mean_z,
    partials,  # (P, K, R, R, C) float32
    arrived,  # () int32: see grid_sync.py
    dweight,  # (K, R, R, C)
    H,
    W,
    M,
    PIXELS,  # of one CTA
    FINAL_REDUCERS: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,  # the filter is R × R; R = 1 or 3
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dweight[k, c, r, s] = Σ dz[n, h - r, w, k] · a[n, h, w + s, c], with r and s counted from the filter's centre.

    Shifting a by columns and dz by rows takes R loads of each, where shifting one of them both ways would take R² + 1.
    Reads x, z and dz, 6 bytes for every element in bf16 (the shifts come from the cache), K/BLOCK_K and C/BLOCK_C
    times.
    """
    NORM: tl.constexpr = mean is not None
    STATISTICS: tl.constexpr = (dmean_z is not None) or (dvar_z is not None)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    k = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    a_terms = activation_terms(mean, var, gamma, beta, eps, c, C)
    dz_terms = gradient_terms(dmean_z, dvar_z, mean_z, M, k, K)
    taps = ()  # type: tuple[Any, ...]
    for _ in tl.static_range(R * R):
        taps += (tl.zeros([BLOCK_K, BLOCK_C], tl.float32),)

    lane = tl.arange(0, BLOCK)
    first = tl.program_id(0) * PIXELS
    last = tl.minimum(first + PIXELS, M)
    for start in range(first, last, BLOCK):
        valid = lane < last - start
        base = tl.cast(start, tl.int64)
        column = (start + lane) % W
        row = (start + lane) // W % H
        activations = ()  # type: tuple[Any, ...]
        for s in tl.static_range(R):
            beside = column + s - R // 2
            inside = (valid & (beside >= 0) & (beside < W))[:, None] & (c < C)[None, :]
            offsets = (lane + s - R // 2)[:, None] * C + c[None, :]
            activations += (load_activation(x, base * C, offsets, inside, a_terms, NORM),)
        sums = ()  # type: tuple[Any, ...]
        for r in tl.static_range(R):
            above = row - (r - R // 2)
            inside = (valid & (above >= 0) & (above < H))[:, None] & (k < K)[None, :]
            offsets = (lane - (r - R // 2) * W)[:, None] * K + k[None, :]
            gradient = tl.trans(load_gradient(dz, z, base * K, offsets, inside, dz_terms, STATISTICS))
            for s in tl.static_range(R):
                sums += (tl.dot(gradient, activations[s], taps[r * R + s], input_precision="ieee"),)
        taps = sums

    mask = (k < K)[:, None] & (c < C)[None, :]
    addresses = partials + tl.program_id(0) * (K * R * R * C) + k[:, None] * (R * R * C) + c[None, :]
    for t in tl.static_range(R * R):
        tl.store(addresses + t * C, taps[t], mask)
    index, reducers = final_reducer(arrived, FINAL_REDUCERS)
    if index >= 0:
        P = tl.num_programs(0)
        reduce_weight_gradient(partials, dweight, P, index, reducers, K * R * R * C, BLOCK_P, BLOCK_N)


# ---- launchers ---------------------------------------------------------------------------------------------


class Results(NamedTuple):
    """What a convolution fills, in the order in which the kernels take it; None for what there is not."""

    out: Tensor  # (N, channels, H, W) channels-last: z; backward dx
    partials: Tensor | None  # (P, 3, K) float32; backward (P, 2, C)
    arrived: Tensor | None  # () int32
    mean_z: Tensor | None  # (K,) float32, as the next one
    var_z: Tensor | None
    dmean: Tensor | None  # (C,), each as what it is the gradient of; these four backward only
    dvar: Tensor | None
    dgamma: Tensor | None
    dbeta: Tensor | None


def results(x: Tensor, channels: int, pieces: int, norm: Norm, gradient: Gradient | None) -> Results:
    """For x, of which z or dx has so many channels, and so many CTAs each a piece."""
    n, _, h, w = x.shape
    out = torch.empty((n, channels, h, w), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    sums = 3 if gradient is None else 2
    # Without a normalisation there is nothing to sum backward.
    summed = gradient is None or norm.mean is not None
    partials = x.new_empty((pieces, sums, channels), dtype=torch.float32) if summed else None
    mean_z = var_z = None
    if gradient is None:
        mean_z, var_z = (x.new_empty(channels, dtype=torch.float32) for _ in range(2))
    of_norm = [None if gradient is None or v is None else torch.empty_like(v) for v in norm[:4]]
    return Results(out, partials, counter(x) if summed else None, mean_z, var_z, *of_norm)


def partials_at_once(pieces: int) -> int:
    return min(next_power_of_two(pieces), MOST_PARTIALS)


def weight_gradient(x: Tensor, weight: Tensor, norm: Norm, gradient: Gradient) -> Tensor:
    """The gradient of weight, (K, C, R, R), channels-last, of its dtype."""
    k, c, r, _ = weight.shape
    n, _, h, w = x.shape
    m = n * h * w
    options = weight_gradient_options(x.dtype, c, k, r)
    across, down = ceil_div(c, options["BLOCK_C"]), ceil_div(k, options["BLOCK_K"])
    # As many CTAs as run at once, but each with more to sum than it writes.
    pixels = max(ceil_div(m * across * down, MIN_CTAS), 256)
    splits = ceil_div(m, pixels)
    partials = x.new_empty((splits, k, r, r, c), dtype=torch.float32)
    dweight = torch.empty_like(weight, memory_format=torch.channels_last)
    block_p = partials_at_once(splits)
    block_n = FINAL_ELEMENTS // block_p
    launchable(weight_gradient_kernel, opaque=True)[(splits, across, down)](
        x,
        *norm,
        *gradient,
        partials,
        counter(x),
        dweight,
        h,
        w,
        m,
        pixels,
        FINAL_REDUCERS=final_reducers(ceil_div(dweight.numel(), block_n), x),
        C=c,
        K=k,
        R=r,
        BLOCK_P=block_p,
        BLOCK_N=block_n,
        **options,
    )
    return dweight


def weight_gradient_options(dtype: torch.dtype, c: int, k: int, r: int) -> dict[str, int]:
    """The tile's shape, warps and stages: what compiles for sm_80 and sm_90 without spilling registers."""
    if dtype == torch.float32:
        return {"BLOCK": 16, "BLOCK_C": 16, "BLOCK_K": 16, "num_warps": 4, "num_stages": 1}
    if r == 3:
        return {"BLOCK": 32, "BLOCK_C": c, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2}
    block_c, block_k = (min(max(next_power_of_two(n), 16), 128) for n in (c, k))
    return {"BLOCK": 64, "BLOCK_C": block_c, "BLOCK_K": block_k, "num_warps": 8, "num_stages": 2}
