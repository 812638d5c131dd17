"""Register batch_norm_act and its backward as functional ops in torch.ops.fastres_kernels, with fakes and autograd.

    batch_norm_act            (x, residual, …) -> (y, mean, var, count, mask, skip)
    batch_norm_act_backward   (dy, dskip, x, …) -> (dx, dresidual, dbias, dweight, dmean, dvar)

register_autograd rejects ops that mutate their arguments, so these two do not, and update_running_statistics is an op
of its own. Each op chooses the Triton kernels or the reference by the device and dtype of x.

A layer called with `fork` returns `skip`, a placeholder for y at the start of a skip connection. It has y's shape,
occupies one element of memory, and its value is never read. Pass it, together with residual=y.detach(), to the layer
that adds y back. The backward of that layer returns the residual's gradient as the gradient of `skip`, so the first
layer receives it as `dskip`, apart from dy, and adds the two in a pass that it makes anyway.

dz, in the backward, is dy + dskip, masked by ReLU. It has x's shape and is the gradient of the residual.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..tiling import BACKWARD_TILE, FORWARD_TILE, OnChipTile, Tiles, ceil_div, matrix_shape, two_pass_tiles
from ..triton_launch import HAS_TRITON, channels_last, register, runs_kernels
from . import sync_stats

if HAS_TRITON:
    from . import backward, cooperative, forward, running_stats


# ---- forward -----------------------------------------------------------------------------------------------


@register("batch_norm_act")
def batch_norm_act(
    x: Tensor,  # (N, C, H, W)
    residual: Tensor | None,  # (N, C, H, W), of x's dtype
    skip: Tensor | None,  # (N, C, H, W), from the layer that made `residual`: receives residual's gradient in its place
    weight: Tensor | None,  # (C,)
    bias: Tensor | None,  # (C,)
    mean: Tensor | None,  # (C,), given together with var; None: use the statistics of x
    var: Tensor | None,  # (C,), biased; None if mean is None
    eps: float,
    relu: bool,
    fork: bool,  # y starts a skip connection too: return the placeholder `skip`
    group: str,  # name of the process group that shares batch statistics; "": none
    algorithm: str = "two_pass",  # or "cooperative", which falls back to two_pass if x does not fit in registers
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute y = act(weight·(x - mean)/√(var + eps) + bias + residual) (Ioffe & Szegedy 2015, algorithm 1).

    act is ReLU if `relu`, otherwise the identity. The reference runs if there is no kernel for x (see runs_kernels).
    The cooperative kernel runs if it is asked for, the statistics are this rank's batch statistics, and x fits in the
    GPU's registers. Otherwise the kernels of forward.py run. ReLU's mask is saved only with a residual, because
    without one the backward can recompute it from x.

    Returns:
        y: (N, C, H, W) channels-last, of x's dtype.
        mean, var: the mean and biased variance used, (C,), float32 or wider.
        count: (), the number of values per channel over all ranks; empty if the ranks do not share statistics.
        mask: (⌈NHW/8⌉, C) uint8, ReLU's mask (see pack_bits); empty without `relu` or without a
            residual, because the backward then recomputes it.
        skip: of y's shape, one stored element; empty without `fork`.
    """
    x = channels_last(x, warn="the input of batch_norm_act")
    if residual is not None:
        residual = channels_last(residual, warn="the residual of batch_norm_act")
    save_mask = relu and residual is not None
    given = None if mean is None or var is None else (mean, var)
    options = (eps, relu, save_mask, fork)
    count = x.new_empty(0, dtype=reference.wide_dtype(x))
    if not runs_kernels(x):
        if group and not given:
            count, mean, var = _shared_statistics(x, group)
        y, mean, var, mask, element = _reference_forward(x, residual, weight, bias, mean, var, *options)
        if given:  # copied, because an op must not return its arguments
            mean, var = (s.to(reference.wide_dtype(x), copy=True) for s in given)
    elif not given and not group and _cooperates(algorithm, x, FORWARD_TILE):
        y, mean, var, mask, element = cooperative_forward(x, residual, weight, bias, *options)
    else:
        tiles = two_pass_tiles(*matrix_shape(x))
        statistics: Any = given or forward.statistics(x, tiles)  # (mean, var), or partials for `normalise` to merge
        if group and not given:
            count, mean, var = _shared_partials(x, statistics, tiles, group)
            statistics = mean, var
        y, mean, var, mask, element = forward.normalise(x, residual, weight, bias, statistics, *options, tiles)
    return y, mean, var, count, mask, element.expand(x.shape) if fork else element


def _reference_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    relu: bool,
    save_mask: bool,
    fork: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return y, mean, var, mask and the element of skip as forward.normalise does, computed in plain PyTorch."""
    y, mean, var = reference.batch_norm_act(x, residual, weight, bias, mean, var, eps, relu)
    # The mask is ~(y <= 0) and not y > 0, so that NaN passes.
    mask = pack_bits(~(y <= 0)) if save_mask else x.new_empty(0, dtype=torch.uint8)
    return y, mean, var, mask, x.new_zeros(1 if fork else 0)


def _shared_statistics(x: Tensor, group: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return count (), mean and biased variance (C,) of x over all ranks of the group, from PyTorch. Collective."""
    m, _ = matrix_shape(x)
    wide = x.to(reference.wide_dtype(x))
    var, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
    return sync_stats.mean_and_var(wide.new_full((), m), mean, var * m, group)


def _shared_partials(
    x: Tensor,
    partials: Tensor,  # (P, 2, C) float32, from forward.statistics: mean and squared deviations of each row block
    tiles: Tiles,
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return count (), mean and biased variance (C,) of x over all ranks of the group, from partials. Collective."""
    m, _ = matrix_shape(x)
    starts = tiles.rows * torch.arange(tiles.partials, device=x.device)  # the first row of each partial
    counts = (m - starts).clamp(max=tiles.rows)
    count, mean, m2 = sync_stats.merge(counts, partials[:, 0], partials[:, 1])
    mean += x[:1, :, :1, :1].flatten()  # forward.statistics subtracts x's first row, so that sums keep their precision
    return sync_stats.mean_and_var(count, mean, m2, group)


@batch_norm_act.register_fake
def _(
    x: Tensor, residual: Any, skip: Any, weight: Any, bias: Any, mean: Any, var: Any, eps: float, relu: bool,
    fork: bool, group: str, *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    m, c = matrix_shape(x)
    y = torch.empty_like(channels_last(x))
    count = x.new_empty(() if group and mean is None else 0, dtype=reference.wide_dtype(x))
    mean, var = (x.new_empty(c, dtype=reference.wide_dtype(x)) for _ in range(2))
    save_mask = relu and residual is not None
    mask = x.new_empty((ceil_div(m, 8), c) if save_mask else 0, dtype=torch.uint8)
    return y, mean, var, count, mask, x.new_empty(1).expand(x.shape) if fork else x.new_empty(0)


# ---- backward ----------------------------------------------------------------------------------------------


@register("batch_norm_act_backward")
def batch_norm_act_backward(
    dy: Tensor,  # (N, C, H, W), any strides
    dskip: Tensor | None,  # (N, C, H, W), the gradient of skip, added to dy
    x: Tensor,  # (N, C, H, W)
    mask: Tensor | None,  # (⌈NHW/8⌉, C) uint8, ReLU's; None: recomputed from x if `relu`
    weight: Tensor | None,  # (C,)
    bias: Tensor | None,  # (C,)
    mean: Tensor,  # (C,), used in the forward
    var: Tensor,  # (C,), used in the forward, biased
    eps: float,
    relu: bool,
    batch_statistics: bool,  # mean and var were computed from x, so gradient flows through them to x
    want_residual: bool,  # return dresidual
    group: str,
    algorithm: str = "two_pass",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of batch_norm_act (Ioffe & Szegedy 2015, section 3).

    The reference runs if there is no kernel for x. With given statistics dx needs no sum over the batch, so one kernel
    suffices. With batch statistics the cooperative kernel runs under the conditions of the forward, and two kernels
    otherwise.

    Returns:
        dx, dresidual: (N, C, H, W) channels-last, of x's dtype; dresidual is empty without `want_residual`.
        dbias, dweight: (C,), of mean's dtype.
        dmean, dvar: (C,), of mean's dtype; empty with batch statistics.
    """
    x = channels_last(x)
    # Warn only about NCHW gradients, because the user cannot avoid other strides, such as those from pooling.
    dy = channels_last(dy, warn="the gradient of batch_norm_act" if dy.is_contiguous() else "")
    dskip = None if dskip is None else channels_last(dskip)
    norm = (x, mask, weight, bias, mean, var, eps, relu)
    no_statistics_gradients = x.new_empty(0), x.new_empty(0)
    if not runs_kernels(x):
        dx, dz, *others = _reference_backward(dy, dskip, *norm, batch_statistics, group)
        dresidual = dz.clone() if want_residual else x.new_empty(0)  # cloned, because dz may be the argument dy
    else:
        # Store dz if it is a result, or if the second of two kernels cannot compute it from dy and x alone.
        store_dz = want_residual or dskip is not None or mask is not None
        if not batch_statistics:
            dx, dz, *others = backward_fixed_stats(dy, dskip, *norm, store_dz)
        elif not group and _cooperates(algorithm, x, BACKWARD_TILE):
            dx, dz, *others = cooperative_backward(dy, dskip, *norm, store_dz)
        else:
            dx, dz, *others = _two_pass_backward(dy, dskip, *norm, store_dz, group)
        dresidual = dz if want_residual else x.new_empty(0)
    dbias, dweight, dmean, dvar = others if len(others) == 4 else (*others, *no_statistics_gradients)
    return dx, dresidual, dbias, dweight, dmean, dvar


def _two_pass_backward(
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
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dx, dz (empty without store_dz), dbias and dweight from the two kernels of backward.py.

    With a `group`, dx uses the sums over all ranks, but dbias and dweight are this rank's, because DDP reduces the
    gradients of parameters over the ranks.
    """
    m, c = matrix_shape(x)
    tiles = two_pass_tiles(m, c)
    partials, dz = backward.channel_sums(dy, dskip, x, mask, weight, bias, mean, var, eps, relu, store_dz, tiles)
    sources = (dz if store_dz else dy, x, weight, bias, mean, var)
    recompute_gate = relu and not store_dz  # dy is not masked yet
    if not group:
        dx, dbias, dweight = backward.input_gradient(*sources, partials, eps, m, recompute_gate, tiles)
        return dx, dz, dbias, dweight
    sums = partials.sum(0)
    # input_gradient sums the partials and divides by the count. The means are divided already, so the count is 1.
    global_means = sync_stats.mean_sums(sums, m, group)[None]
    dx, _, _ = backward.input_gradient(*sources, global_means, eps, 1, recompute_gate, tiles)
    return dx, dz, sums[0].clone(), sums[1].clone()  # cloned, because results of an op must not share memory


def _reference_backward(
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
    group: str,
) -> tuple[Tensor, ...]:
    """Compute dx, dz, dbias and dweight in plain PyTorch; without `batch_statistics` also dmean and dvar."""
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
    dstatistics: tuple[Tensor, ...] = ()
    if batch_statistics:
        m, _ = matrix_shape(x)
        sums = torch.stack([dbias, dweight])
        averages = sync_stats.mean_sums(sums, m, group) if group else sums / m
    else:
        invstd = torch.rsqrt(var + eps)
        scale = invstd if weight is None else invstd * weight
        dstatistics = -scale * dbias, -0.5 * scale * invstd * dweight
    dx = reference.input_gradient(dz, x, weight, mean, var, eps, averages)
    return dx, dz, dbias, dweight, *dstatistics


@batch_norm_act_backward.register_fake
def _(
    dy: Tensor, dskip: Any, x: Tensor, mask: Any, weight: Any, bias: Any, mean: Tensor, var: Tensor, eps: float,
    relu: bool, batch_statistics: bool, want_residual: bool, *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dx = torch.empty_like(channels_last(x))
    dresidual = torch.empty_like(dx) if want_residual else x.new_empty(0)
    dbias, dweight, dmean, dvar = (torch.empty_like(mean) for _ in range(4))
    if batch_statistics:
        dmean, dvar = x.new_empty(0), x.new_empty(0)
    return dx, dresidual, dbias, dweight, dmean, dvar


# ---- autograd ----------------------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Save the inputs and outputs of batch_norm_act that its backward needs."""
    x, residual, skip, weight, bias, mean, _, ctx.eps, ctx.relu, _, ctx.group, ctx.algorithm = inputs
    _, used_mean, used_var, count, mask, _ = output
    ctx.has_residual, ctx.has_skip = residual is not None, skip is not None
    ctx.batch_statistics = mean is None
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(used_mean, used_var, count, mask)
    ctx.save_for_backward(x, mask if ctx.has_residual and ctx.relu else None, weight, bias, used_mean, used_var)


def _differentiate(ctx: Any, dy: Tensor | None, *others: Tensor | None) -> Any:
    """Return the gradients of batch_norm_act's twelve inputs from the gradients of y and skip; None means zero."""
    _, _, weight, bias, *_ = saved = ctx.saved_tensors
    dskip = others[-1]
    if dy is None:
        dy, dskip = dskip, None  # one gradient, whichever it is, is passed as dy
    if dy is None:
        return (None,) * 12
    flags = (ctx.eps, ctx.relu, ctx.batch_statistics, ctx.has_residual, ctx.group, ctx.algorithm)
    dx, dresidual, dbias, dweight, dmean, dvar = batch_norm_act_backward(dy, dskip, *saved, *flags)
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
        "fastres_kernels: batch_norm_act has no double backward; use torch.nn.BatchNorm2d (norm torch) if you need "
        "gradients of gradients"
    )


batch_norm_act.register_autograd(_differentiate, setup_context=_save)
batch_norm_act_backward.register_autograd(_no_double_backward)


# ---- running statistics ------------------------------------------------------------------------------------


@register("update_running_statistics", mutates=("running_mean", "running_var", "batches"))
def update_running_statistics(
    mean: Tensor,  # (C,)
    var: Tensor,  # (C,), biased, or used as it is if count is 1
    running_mean: Tensor,  # (C,)
    running_var: Tensor,  # (C,)
    batches: Tensor,  # () int64
    count: int,  # number of values per channel, for the unbiased estimate
    momentum: float | None,  # None: average all batches so far equally
) -> None:
    """Move the running statistics in place towards a batch's mean and unbiased variance, and increment `batches`.

    A Triton kernel updates float32 statistics where there is one (see runs_kernels), and PyTorch all others.
    """
    if runs_kernels(mean) and running_mean.dtype == running_var.dtype == torch.float32:
        running_stats.update(mean, var, running_mean, running_var, batches, count, momentum)
        return
    batches.add_(1)
    rate: Any = 1 / batches.to(running_mean.dtype) if momentum is None else momentum
    unbias = count / (count - 1) if count > 1 else 1
    running_mean.lerp_(mean.to(running_mean.dtype), rate)
    running_var.lerp_((var * unbias).to(running_var.dtype), rate)


# ---- ops that torch.compile does not look into -------------------------------------------------------------

# torch.compile can trace neither a cooperative launch nor the counter of thread blocks that a kernel keeps in the GPU's
# memory between calls (grid_sync.py).


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
    """Return y, mean, var, mask and the element of skip from one kernel, for batch statistics.

    The results are those of forward.normalise. x has to be channels-last and to fit in the GPU's registers: see
    cooperative.tiles_for.
    """
    tiles = cooperative.tiles_for(x, FORWARD_TILE)
    assert tiles is not None
    return cooperative.forward(x, residual, weight, bias, eps, relu, save_mask, fork, tiles)


@cooperative_forward.register_fake
def _(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *_, save_mask, fork = arguments
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
    """Return dx, dz (empty without store_dz), dbias and dweight from one kernel, for batch statistics.

    x has to be channels-last and to fit in the GPU's registers: see cooperative.tiles_for.
    """
    tiles = cooperative.tiles_for(x, BACKWARD_TILE)
    assert tiles is not None
    return cooperative.backward(dy, dskip, x, mask, weight, bias, mean, var, eps, relu, store_dz, tiles)


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
    """Return dx, dz (empty without store_dz), dbias, dweight, dmean and dvar from one kernel, for given statistics.

    torch.compile must not trace the op, because its kernel counts the thread blocks that are done, so that the last one
    makes the final reduction (grid_sync.py).
    """
    tiles = two_pass_tiles(*matrix_shape(x))
    return backward.with_fixed_stats(dy, dskip, x, mask, weight, bias, mean, var, eps, relu, store_dz, tiles)


@cooperative_backward.register_fake
def _(dy: Tensor, dskip: Tensor | None, x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return _fake_gradients(x, arguments, vectors=2)


@backward_fixed_stats.register_fake
def _(dy: Tensor, dskip: Tensor | None, x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return _fake_gradients(x, arguments, vectors=4)


def _fake_gradients(x: Tensor, arguments: tuple[Any, ...], vectors: int) -> tuple[Tensor, ...]:
    """Return dx, dz (no elements without store_dz) and `vectors` gradients (C,), all uninitialised.

    `arguments` are the op's arguments after x.
    """
    _, _, _, mean, *_, store_dz = arguments
    dz = torch.empty_like(x) if store_dz else x.new_empty(0)
    return torch.empty_like(x), dz, *(torch.empty_like(mean) for _ in range(vectors))


def _cooperates(algorithm: str, x: Tensor, on_chip: OnChipTile) -> bool:
    """Return True if the cooperative kernel is asked for and x fits in the GPU's registers."""
    return algorithm == "cooperative" and cooperative.tiles_for(x, on_chip) is not None


# ---- ReLU's mask -------------------------------------------------------------------------------------------


def pack_bits(passes: Tensor) -> Tensor:
    """Pack (N, C, H, W) bool into (⌈NHW/8⌉, C) uint8.

    Bit r, from the lowest, of a channel's byte b is row 8b + r of the matrix [NHW, C]; missing rows are 0.
    """
    matrix = passes.permute(0, 2, 3, 1).reshape(-1, passes.shape[1]).to(torch.uint8)
    matrix = F.pad(matrix, (0, 0, 0, -len(matrix) % 8)).view(-1, 8, passes.shape[1])
    places = torch.arange(8, dtype=torch.uint8, device=passes.device)
    return (matrix << places[:, None]).sum(1, dtype=torch.uint8)


def unpack_bits(mask: Tensor, x: Tensor) -> Tensor:
    """Unpack the result of pack_bits into bool of x's shape, (N, C, H, W)."""
    n, c, h, w = x.shape
    places = torch.arange(8, dtype=torch.uint8, device=mask.device)
    matrix = ((mask[:, None] >> places[:, None]) & 1).reshape(-1, c)[: n * h * w]
    return matrix.view(n, h, w, c).permute(0, 3, 1, 2).bool()
