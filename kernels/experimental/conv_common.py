"""Parts shared by the 1×1 and 3×3 convolutions: prologues, epilogues, final reductions and the weight gradient.

A channels-last tensor is a matrix [M = N·H·W, C]. A convolution computes its input in the prologue, so that this input
is never in memory: the activation a in the forward, and the gradient dz in the backward, to which mean_z and var_z
contribute because they are functions of z:

    a  = relu((x - mean)·scale + beta)                     scale = gamma / √(var + eps)
    dz = dz + dmean_z/M + (z - mean_z)·2·dvar_z/M

The epilogue sums the output over the pixels: in the forward to the mean and variance of z, in the backward to the
gradients of mean, var, gamma and beta. Every CTA writes its partial sums in float32. The last CTAs wait for the others
(grid_sync.py) and reduce all partial sums in one fixed order, which saves a launch. Atomics only count CTAs, so equal
inputs give bitwise identical results.
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

# Block sizes of the final reduction: BLOCK_SUMS channels × MOST_PARTIALS partial sums, or FINAL_ELEMENTS elements of
# the weight gradient, per iteration. They are large because the other CTAs have exited by then, and an iteration costs
# one memory latency whatever its size.
BLOCK_SUMS, MOST_PARTIALS, FINAL_ELEMENTS = 8, 256, 4096


class Norm(NamedTuple):
    """The normalisation of x, (C,) float32 each. If mean and var are None, x is not normalised and has no ReLU."""

    mean: Tensor | None
    var: Tensor | None
    gamma: Tensor | None
    beta: Tensor | None
    eps: float


class Gradient(NamedTuple):
    """The terms of the gradient of z; None means zero."""

    dz: Tensor | None  # (N, K, H, W) channels-last
    dmean_z: Tensor | None  # (K,) float32
    dvar_z: Tensor | None  # (K,) float32
    z: Tensor  # (N, K, H, W) channels-last
    mean_z: Tensor  # (K,) float32


NO_GRADIENT = (None,) * 5  # replaces a Gradient in the forward


# ---- prologues ---------------------------------------------------------------------------------------------


@triton.jit
def channel(pointer, c, C, default: tl.constexpr):
    """Load a (C,) vector at the channels c; return `default` beyond the last channel, or if the vector is None."""
    return tl.full(c.shape, default, tl.float32) if pointer is None else tl.load(pointer + c, c < C, other=default)


@triton.jit
def inverse_std(var, eps, c, C):
    """Return 1/√(var + eps) at the channels c."""
    return tl.rsqrt(channel(var, c, C, 1.0) + eps)


@triton.jit
def activation_terms(mean, var, gamma, beta, eps, c, C):
    """Return mean, scale and beta at the channels c."""
    scale = inverse_std(var, eps, c, C) * channel(gamma, c, C, 1.0)
    return channel(mean, c, C, 0.0), scale, channel(beta, c, C, 0.0)


@triton.jit
def load_activation(x, base, offsets, inside, terms, NORM: tl.constexpr):
    """Load a tile of the activation a, in x's dtype; zero outside of `inside`, because padding applies to a, not x.

    `base` is the tile's first element in 64 bits; offsets from it need 32 bits at most.
    """
    value = tl.load(x + base + offsets, inside, other=0.0)
    if NORM:
        mean, scale, beta = terms
        a = affine(value.to(tl.float32), mean, scale, beta)
        # NaN passes, as in torch, so that a bad value is seen and not hidden.
        a = tl.maximum(a, 0.0, propagate_nan=tl.PropagateNan.ALL)
        value = tl.where(inside, a, 0.0).to(value.dtype)
    return value


@triton.jit
def gradient_terms(dmean_z, dvar_z, mean_z, M, c, C):
    """Return mean_z, 2·dvar_z/M and dmean_z/M at the channels c."""
    slope = channel(dvar_z, c, C, 0.0) * (2.0 / M)
    return channel(mean_z, c, C, 0.0), slope, channel(dmean_z, c, C, 0.0) / M


@triton.jit
def load_gradient(dz, z, base, offsets, inside, terms, STATISTICS: tl.constexpr):
    """Load a tile of the total gradient of z, in z's dtype; zero outside of `inside`."""
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
    """Return the terms that load_input needs for the input channels i."""
    if BACKWARD:
        terms = gradient_terms(dmean_z, dvar_z, mean_z, M, i, IN)
    else:
        terms = activation_terms(mean, var, gamma, beta, eps, i, IN)
    return terms


@triton.jit
def load_input(x, dz, z, base, offsets, inside, terms, AFFINE: tl.constexpr, BACKWARD: tl.constexpr):
    """Load a tile of the convolution's input: a in the forward, the gradient of z in the backward."""
    if BACKWARD:
        tile = load_gradient(dz, z, base, offsets, inside, terms, AFFINE)
    else:
        tile = load_activation(x, base, offsets, inside, terms, AFFINE)
    return tile


# ---- epilogues ---------------------------------------------------------------------------------------------


@triton.jit
def store_output(z, sums, base, offsets, inside):
    """Store a tile of z, and return it rounded to z's dtype."""
    rounded = sums.to(z.dtype.element_ty)
    tl.store(z + base + offsets, rounded, inside)
    return rounded


@triton.jit
def store_input_gradient(dx, da, x, base, offsets, inside, mean, var, gamma, beta, eps, c, C):
    """Store a tile of x's gradient; return g, which is da masked by ReLU, and g·(x - mean).

    The mask is recomputed from x, because x is needed anyway and a stored mask would have to be read too.
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
    """Store origin, mean about origin and M2 of a tile's channels o; a row of the tile covers `counts` pixels.

    With an origin near the values, float32 keeps digits of the mean that it would lose about zero.
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
    """Store the sums of g and projected over a tile's rows, for the channels o."""
    to = partials + program * (2 * OUT) + o
    tl.store(to, tl.sum(g, 0), o < OUT)
    tl.store(to + OUT, tl.sum(projected, 0), o < OUT)


# ---- final reductions --------------------------------------------------------------------------------------


@triton.jit
def reduce_statistics(
    partials,  # (P, 3, K) float32: origin, mean about origin and M2 of each CTA's pixels
    mean_z,  # (K,) float32
    var_z,
    WIDTH,  # all pixels form a rectangle of WIDTH × HEIGHT
    HEIGHT,
    COLUMNS: tl.constexpr,  # each CTA has a piece of COLUMNS × ROWS; pieces are numbered row by row
    ROWS,
    P,
    index,  # of this CTA among the CTAs doing the final reduction
    reducers,  # number of CTAs doing the final reduction
    K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Merge the partials to the mean and M2 / count of all pixels (Chan, Golub & LeVeque 1979).

    Reads 12·P bytes per channel.
    """
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
            # The last piece of a row and the pieces of the last row may be smaller.
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
    index,  # of this CTA among the CTAs doing the final reduction
    reducers,  # number of CTAs doing the final reduction
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Reduce the partials to the gradients of x's normalisation. Reads 8·P bytes per channel."""
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
    """Do the final reduction: the statistics of z, or in the backward the gradients of x's normalisation."""
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
    index,  # of this CTA among the CTAs doing the final reduction
    reducers,  # number of CTAs doing the final reduction
    N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sum the P partials element by element in BLOCK_P slots, and then sum the slots."""
    for start_n in range(index * BLOCK_N, N, reducers * BLOCK_N):
        n = start_n + tl.arange(0, BLOCK_N)
        total = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
        for start in range(0, P, BLOCK_P):
            p = start + tl.arange(0, BLOCK_P)
            mask = (p < P)[:, None] & (n < N)[None, :]
            total += tl.load(partials + p[:, None] * N + n[None, :], mask, other=0.0)
        tl.store(dweight + n, tl.sum(total, 0).to(dweight.dtype.element_ty), n < N)


# ---- weight gradient ---------------------------------------------------------------------------------------


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
    PIXELS,  # per CTA
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
    """Compute dweight[k, c, r, s] = Σ dz[n, h - r, w, k] · a[n, h, w + s, c].

    r and s are counted from the filter's centre. Shifting a by columns and dz by rows takes R loads of each; shifting
    only one of them would take R² + 1 loads. Reads x K/BLOCK_K times, and z and dz C/BLOCK_C times, together 6 bytes
    per element in bf16 for a factor of 1. The shifts hit the cache.
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
    """The results and scratch tensors of a convolution, in the order of the kernels' arguments; None if not needed."""

    out: Tensor  # (N, channels, H, W) channels-last: z, or dx in the backward
    partials: Tensor | None  # float32: (P, 3, K), or (P, 2, C) in the backward
    arrived: Tensor | None  # () int32: see grid_sync.py
    mean_z: Tensor | None  # (K,) float32; forward only, as var_z
    var_z: Tensor | None
    dmean: Tensor | None  # (C,); dmean to dbeta are for the backward only
    dvar: Tensor | None
    dgamma: Tensor | None
    dbeta: Tensor | None


def results(x: Tensor, channels: int, pieces: int, norm: Norm, gradient: Gradient | None) -> Results:
    """Allocate the Results of a convolution of x to `channels` channels by `pieces` CTAs."""
    n, _, h, w = x.shape
    out = torch.empty((n, channels, h, w), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    sums = 3 if gradient is None else 2
    # In the backward, only a normalisation needs sums.
    summed = gradient is None or norm.mean is not None
    partials = x.new_empty((pieces, sums, channels), dtype=torch.float32) if summed else None
    mean_z = var_z = None
    if gradient is None:
        mean_z, var_z = (x.new_empty(channels, dtype=torch.float32) for _ in range(2))
    of_norm = [None if gradient is None or v is None else torch.empty_like(v) for v in norm[:4]]
    return Results(out, partials, counter(x) if summed else None, mean_z, var_z, *of_norm)


def partials_at_once(pieces: int) -> int:
    """Return BLOCK_P for a final reduction of `pieces` partials."""
    return min(next_power_of_two(pieces), MOST_PARTIALS)


def weight_gradient(x: Tensor, weight: Tensor, norm: Norm, gradient: Gradient) -> Tensor:
    """Compute the gradient of weight, (K, C, R, R), channels-last, in weight's dtype."""
    k, c, r, _ = weight.shape
    n, _, h, w = x.shape
    m = n * h * w
    options = weight_gradient_options(x.dtype, c, k, r)
    across, down = ceil_div(c, options["BLOCK_C"]), ceil_div(k, options["BLOCK_K"])
    # As many CTAs as run at once, but at least 256 pixels per CTA, so that it reads more than it writes.
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
    """Return the tile's shape, warps and stages; they compile for sm_80 and sm_90 without spilling registers."""
    if dtype == torch.float32:
        return {"BLOCK": 16, "BLOCK_C": 16, "BLOCK_K": 16, "num_warps": 4, "num_stages": 1}
    if r == 3:
        return {"BLOCK": 32, "BLOCK_C": c, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2}
    block_c, block_k = (min(max(next_power_of_two(n), 16), 128) for n in (c, k))
    return {"BLOCK": 64, "BLOCK_C": block_c, "BLOCK_K": block_k, "num_warps": 8, "num_stages": 2}
