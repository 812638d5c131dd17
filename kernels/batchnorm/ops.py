"""batch_norm_act as a pair of functional ops of torch, in torch.ops.fastres_kernels, with fakes and autograd.

    batch_norm_act            (x, residual, …) -> (y, mean, var, count, mask, skip)
    batch_norm_act_backward   (dy, dskip, x, …) -> (dx, dresidual, dbias, dweight, dmean, dvar)

Neither mutates anything: register_autograd refuses ops that do; running statistics have an op of their own. Each
picks, by the tensor's device and dtype, the Triton kernels or the reference.

`skip` is how the gradient of a skip connection arrives apart from that of the next layer, so that the backward adds
them in a pass that it makes anyway. It stands for y and has y's shape, but one element of memory that nobody reads: a
consumer of y takes y, detached, and skip, and returns y's gradient to skip.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..tiling import HELD_BACKWARD, HELD_FORWARD, Held, ceil_div, matrix_shape, two_pass_tiles
from ..triton_launch import HAS_TRITON, channels_last, register, runs_kernels
from . import sync_stats

if HAS_TRITON:
    from . import backward, cooperative, forward, running_stats


@register("batch_norm_act")
def batch_norm_act(
    x: Tensor,  # (N, C, H, W)
    residual: Tensor | None,  # (N, C, H, W), of x's dtype
    skip: Tensor | None,  # with it, the residual's gradient goes here
    weight: Tensor | None,  # (C,)
    bias: Tensor | None,  # (C,)
    mean: Tensor | None,  # (C,), with var: the statistics to normalise with; None: those of x
    var: Tensor | None,  # (C,), biased
    eps: float,
    relu: bool,
    fork: bool,  # whether skip is wanted of this call
    group: str,  # the process group that shares the statistics; "": none
    algorithm: str = "two_pass",  # or "cooperative", where the tensor fits
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, channels-last, of x's dtype; the mean and biased variance it was normalised with, each (C,), float32 or wider;
    how many values of a channel they are of, (), where processes share them, else empty, as it is NHW; the mask,
    (⌈NHW/8⌉, C) uint8, empty where the backward recomputes it; skip, empty where not wanted."""
    x = channels_last(x, warn="the input of batch_norm_act")
    if residual is not None:
        residual = channels_last(residual, warn="the residual of batch_norm_act")
    save_mask = relu and residual is not None
    m, c = matrix_shape(x)
    given = None if mean is None or var is None else (mean, var)
    count = x.new_empty(0, dtype=reference.wide_dtype(x))
    if runs_kernels(x) and not given and not group and _cooperates(algorithm, x, HELD_FORWARD):
        y, mean, var, mask, token = cooperative_forward(x, residual, weight, bias, eps, relu, save_mask, fork)
    elif runs_kernels(x):
        tiles = two_pass_tiles(m, c)
        statistics: Any = given or forward.statistics(x, tiles)
        if group and not given:
            starts = tiles.rows * torch.arange(tiles.partials, device=x.device)
            counts = (m - starts).clamp(max=tiles.rows)
            local_count, local_mean, local_m2 = sync_stats.merge(counts, statistics[:, 0], statistics[:, 1])
            local_mean += x[:1, :, :1, :1].flatten()  # partial means are about x's first row
            count, mean, var = sync_stats.mean_and_var(local_count, local_mean, local_m2, group)
            statistics = mean, var
        y, mean, var, mask, token = forward.normalise(
            x, residual, weight, bias, statistics, eps, relu, save_mask, fork, tiles
        )
    else:
        if group and not given:
            wide = x.to(reference.wide_dtype(x))
            local_var, local_mean = torch.var_mean(wide, (0, 2, 3), correction=0)
            count, mean, var = sync_stats.mean_and_var(wide.new_full((), m), local_mean, local_var * m, group)
        y, mean, var = reference.batch_norm_act(x, residual, weight, bias, mean, var, eps, relu)
        if given:  # an op returns nothing that it was given
            mean, var = (s.to(reference.wide_dtype(x), copy=True) for s in given)
        mask = pack_bits(~(y <= 0)) if save_mask else x.new_empty(0, dtype=torch.uint8)
        token = x.new_zeros(1 if fork else 0)
    return y, mean, var, count, mask, token.expand(x.shape) if fork else token


@batch_norm_act.register_fake
def _(
    x: Tensor,
    residual: Tensor | None,
    skip: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    relu: bool,
    fork: bool,
    group: str,
    algorithm: str = "two_pass",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    m, c = matrix_shape(x)
    y = torch.empty_like(channels_last(x))
    count = x.new_empty(() if group and mean is None else 0, dtype=reference.wide_dtype(x))
    mean, var = (x.new_empty(c, dtype=reference.wide_dtype(x)) for _ in range(2))
    save_mask = relu and residual is not None
    mask = x.new_empty((ceil_div(m, 8), c) if save_mask else 0, dtype=torch.uint8)
    return y, mean, var, count, mask, x.new_empty(1).expand(x.shape) if fork else x.new_empty(0)


@register("batch_norm_act_backward")
def batch_norm_act_backward(
    dy: Tensor,  # (N, C, H, W), any strides
    dskip: Tensor | None,  # (N, C, H, W), the gradient that came to skip
    x: Tensor,  # (N, C, H, W)
    mask: Tensor | None,  # (⌈NHW/8⌉, C) uint8; None: recomputed from x
    weight: Tensor | None,  # (C,)
    bias: Tensor | None,  # (C,)
    mean: Tensor,  # (C,)
    var: Tensor,  # (C,)
    eps: float,
    relu: bool,
    batch_statistics: bool,  # whether mean and var are x's own, and pass gradient to it
    want_residual: bool,
    group: str,
    algorithm: str = "two_pass",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx and dresidual (empty where not wanted), channels-last, of x's dtype; dbias, dweight, and of given statistics
    (else empty) dmean and dvar, (C,), of mean's dtype.
    """
    x = channels_last(x)
    dy = channels_last(dy, warn="the gradient of batch_norm_act" if dy.is_contiguous() else "")
    dskip = None if dskip is None else channels_last(dskip)
    m, c = matrix_shape(x)
    none = x.new_empty(0), x.new_empty(0)  # of the statistics where they are x's own
    if runs_kernels(x):
        store_dz = want_residual or dskip is not None
        sources = (dy, dskip, x, mask, weight, bias, mean, var, eps, relu, store_dz)
        if not batch_statistics:
            dx, dz, dbias, dweight, dmean, dvar = backward_fixed_stats(*sources)
            return dx, dz if want_residual else x.new_empty(0), dbias, dweight, dmean, dvar
        if not group and _cooperates(algorithm, x, HELD_BACKWARD):
            dx, dz, dbias, dweight = cooperative_backward(*sources)
            return dx, dz if want_residual else x.new_empty(0), dbias, dweight, *none
        tiles = two_pass_tiles(m, c)
        partials, dz = backward.channel_sums(*sources, tiles)
        dresidual = dz if want_residual else x.new_empty(0)
        recompute_gate = relu and not store_dz
        grad = dz if store_dz else dy
        if not group:
            dx, dbias, dweight = backward.input_gradient(
                grad, x, weight, bias, mean, var, partials, eps, m, recompute_gate, tiles
            )
            return dx, dresidual, dbias, dweight, *none
        sums = partials.sum(0)
        global_means = sync_stats.mean_sums(sums, m, group)[None]
        dx, _, _ = backward.input_gradient(
            grad, x, weight, bias, mean, var, global_means, eps, 1, recompute_gate, tiles
        )
        return dx, dresidual, sums[0].clone(), sums[1].clone(), *none

    dz = dy if dskip is None else dy + dskip
    if relu:
        if mask is not None:
            passes = unpack_bits(mask, x)
        else:
            passes = ~(reference.batch_norm_act(x, None, weight, bias, mean, var, eps, False)[0] <= 0)
        dz = dz * passes
    dz = channels_last(dz)
    dbias, dweight = reference.channel_sums(dz, x, mean, var, eps)
    averages = None
    if batch_statistics:
        sums = torch.stack([dbias, dweight])
        averages = sync_stats.mean_sums(sums, m, group) if group else sums / m
        of_statistics = none
    else:
        invstd = torch.rsqrt(var + eps)
        scale = invstd if weight is None else invstd * weight
        of_statistics = -scale * dbias, -0.5 * scale * invstd * dweight
    dx = reference.input_gradient(dz, x, weight, mean, var, eps, averages)
    return dx, dz.clone() if want_residual else x.new_empty(0), dbias, dweight, *of_statistics


@batch_norm_act_backward.register_fake
def _(
    dy: Tensor,
    dskip: Tensor | None,
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    relu: bool,
    batch_statistics: bool,
    want_residual: bool,
    group: str,
    algorithm: str = "two_pass",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx = torch.empty_like(channels_last(x))
    dresidual = torch.empty_like(dx) if want_residual else x.new_empty(0)
    dbias, dweight, dmean, dvar = (torch.empty_like(mean) for _ in range(4))
    if batch_statistics:
        dmean, dvar = x.new_empty(0), x.new_empty(0)
    return dx, dresidual, dbias, dweight, dmean, dvar


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, skip, weight, bias, mean, _, ctx.eps, ctx.relu, _, ctx.group, ctx.algorithm = inputs
    _, used_mean, used_var, count, mask, _ = output
    ctx.has_residual, ctx.has_skip = residual is not None, skip is not None
    ctx.batch_statistics = mean is None
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(used_mean, used_var, count, mask)
    ctx.save_for_backward(
        x, mask if ctx.has_residual and ctx.relu else None, weight, bias, used_mean, used_var
    )


def _differentiate(ctx: Any, dy: Tensor | None, *others: Tensor | None) -> Any:
    x, mask, weight, bias, mean, var = ctx.saved_tensors
    dskip = others[-1]
    if dy is None:
        dy, dskip = dskip, None
    if dy is None:
        return (None,) * 12
    dx, dresidual, dbias, dweight, dmean, dvar = batch_norm_act_backward(
        dy,
        dskip,
        x,
        mask,
        weight,
        bias,
        mean,
        var,
        ctx.eps,
        ctx.relu,
        ctx.batch_statistics,
        ctx.has_residual,
        ctx.group,
        ctx.algorithm,
    )
    return (
        dx,
        dresidual if ctx.has_residual and not ctx.has_skip else None,
        dresidual if ctx.has_skip else None,
        None if weight is None else dweight.to(weight.dtype),
        None if bias is None else dbias.to(bias.dtype),
        *(None if ctx.batch_statistics else gradient for gradient in (dmean, dvar)),
        *(None,) * 5,
    )


def _no_double_backward(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "fastres_kernels: batch_norm_act has no double backward; use torch.nn.BatchNorm2d (norm torch) where "
        "gradients of gradients are needed"
    )


batch_norm_act.register_autograd(_differentiate, setup_context=_save)
batch_norm_act_backward.register_autograd(_no_double_backward)


@register("update_running_statistics", mutates=("running_mean", "running_var", "batches"))
def update_running_statistics(
    mean: Tensor,  # (C,)
    var: Tensor,  # (C,), biased
    running_mean: Tensor,  # (C,)
    running_var: Tensor,  # (C,)
    batches: Tensor,  # () int64
    count: int,  # how many values the statistics are of; 1: var is the unbiased estimate already
    momentum: float | None,  # None: the average over all batches so far
) -> None:
    """Moves the running statistics towards a batch's, in place; the variance as the unbiased estimate."""
    if runs_kernels(mean) and running_mean.dtype == running_var.dtype == torch.float32:
        running_stats.update(mean, var, running_mean, running_var, batches, count, momentum)
        return
    batches.add_(1)
    rate: Any = 1 / batches.to(running_mean.dtype) if momentum is None else momentum
    unbias = count / (count - 1) if count > 1 else 1
    running_mean.lerp_(mean.to(running_mean.dtype), rate)
    running_var.lerp_((var * unbias).to(running_var.dtype), rate)


# torch.compile's tracing of kernels knows no cooperative launch, nor a counter that stays: these three ops are opaque.


@torch.library.custom_op("fastres_kernels::cooperative_forward", mutates_args=())
def cooperative_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    relu: bool,
    save_mask: bool,
    fork: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """batch_norm_act's y, mean, var and mask, and skip as (1,), in one kernel; for channels-last tensors that fit."""
    tiles = cooperative.tiles_for(x, HELD_FORWARD)
    assert tiles is not None
    return cooperative.forward(x, residual, weight, bias, eps, relu, save_mask, fork, tiles)


@cooperative_forward.register_fake
def _(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    relu: bool,
    save_mask: bool,
    fork: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return forward.outputs(x, save_mask, fork)


@torch.library.custom_op("fastres_kernels::cooperative_backward", mutates_args=())
def cooperative_backward(
    dy: Tensor,
    dskip: Tensor | None,
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    relu: bool,
    store_dz: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dz (empty where not asked for), dbias and dweight in one kernel; for channels-last tensors that fit."""
    tiles = cooperative.tiles_for(x, HELD_BACKWARD)
    assert tiles is not None
    return cooperative.backward(dy, dskip, x, mask, weight, bias, mean, var, eps, relu, store_dz, tiles)


@cooperative_backward.register_fake
def _(
    dy: Tensor,
    dskip: Tensor | None,
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    relu: bool,
    store_dz: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dz = torch.empty_like(x) if store_dz else x.new_empty(0)
    return torch.empty_like(x), dz, torch.empty_like(mean), torch.empty_like(mean)


@torch.library.custom_op("fastres_kernels::backward_fixed_stats", mutates_args=())
def backward_fixed_stats(
    dy: Tensor,
    dskip: Tensor | None,
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    relu: bool,
    store_dz: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dz (empty where not asked for), dbias, dweight, dmean and dvar in one kernel, for given statistics."""
    tiles = two_pass_tiles(*matrix_shape(x))
    return backward.with_given_statistics(
        dy, dskip, x, mask, weight, bias, mean, var, eps, relu, store_dz, tiles
    )


@backward_fixed_stats.register_fake
def _(
    dy: Tensor,
    dskip: Tensor | None,
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    relu: bool,
    store_dz: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dz = torch.empty_like(x) if store_dz else x.new_empty(0)
    dbias, dweight, dmean, dvar = (torch.empty_like(mean) for _ in range(4))
    return torch.empty_like(x), dz, dbias, dweight, dmean, dvar


def _cooperates(algorithm: str, x: Tensor, held: Held) -> bool:
    return algorithm == "cooperative" and cooperative.tiles_for(x, held) is not None


def pack_bits(passes: Tensor) -> Tensor:
    """(N, C, H, W) bool -> (⌈NHW/8⌉, C) uint8: bit r of byte b is that of row 8b + r of the matrix [NHW, C]."""
    matrix = passes.permute(0, 2, 3, 1).reshape(-1, passes.shape[1]).to(torch.uint8)
    matrix = F.pad(matrix, (0, 0, 0, -len(matrix) % 8)).view(-1, 8, passes.shape[1])
    places = torch.arange(8, dtype=torch.uint8, device=passes.device)
    return (matrix << places[:, None]).sum(1, dtype=torch.uint8)


def unpack_bits(mask: Tensor, x: Tensor) -> Tensor:
    """What pack_bits packed, in the shape of x."""
    n, c, h, w = x.shape
    places = torch.arange(8, dtype=torch.uint8, device=mask.device)
    matrix = ((mask[:, None] >> places[:, None]) & 1).reshape(-1, c)[: n * h * w]
    return matrix.view(n, h, w, c).permute(0, 3, 1, 2).bool()
