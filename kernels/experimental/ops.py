"""Register conv_norm and its backward as functional ops of torch, with fakes and autograd; off by default.

    torch.ops.fastres_kernels.conv_norm            (x, weight, mean, var, gamma, beta, eps) -> (z, mean_z, var_z)
    torch.ops.fastres_kernels.conv_norm_backward   (dz, dmean_z, dvar_z, x, …) -> gradients of the six tensor inputs

The maths is reference.conv_norm: a convolution that normalises its input while reading it and computes the statistics
of its output while writing it, so a chain of these ops never writes an activation. Each op chooses, by dtype, device
and shape, the Triton kernels, one per convolution, or the reference. torch.compile does not look into the ops, because
the counter in which a kernel's CTAs count arrivals (grid_sync.py) outlives the call.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight
from torch.utils.flop_counter import register_flop_formula

from .. import reference
from ..triton_launch import HAS_TRITON, channels_last, runs_kernels

if HAS_TRITON:
    from . import conv_1x1, conv_3x3, conv_common

# Channels of x and z that the 3×3 kernels support: powers of two, small enough for the filter to fit in shared memory.
CHANNELS_3X3 = {16, 32, 64}


def kernels_for(x: Tensor, weight: Tensor) -> Any:
    """Return the module conv_1x1 or conv_3x3, or None if only the reference supports x and weight."""
    if not runs_kernels(x):
        return None
    k, c, *size = weight.shape
    if size == [1, 1]:
        return conv_1x1
    return conv_3x3 if size == [3, 3] and {c, k} <= CHANNELS_3X3 else None


@torch.library.custom_op("fastres_kernels::conv_norm", mutates_args=())
def conv_norm(
    x: Tensor,  # (N, C, H, W)
    weight: Tensor,  # (K, C, r, r), r = 1 or 3
    mean: Tensor | None,  # (C,), with var: statistics to normalise x with; None: convolve x itself, without ReLU
    var: Tensor | None,  # (C,), biased
    gamma: Tensor | None,  # (C,)
    beta: Tensor | None,  # (C,)
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute z = conv(relu(gamma·(x - mean)/√(var + eps) + beta), weight), stride 1, "same" zero padding.

    Returns:
        z: (N, K, H, W) channels-last, of x's dtype.
        mean_z, var_z: the mean and biased variance of z, (K,), float32 or wider.

    Raises:
        ValueError: if the channels of the weight or of a vector are not x's.
    """
    vectors = (mean, var, gamma, beta)
    if any(shape != x.shape[1:2] for shape in (weight.shape[1:2], *(v.shape for v in vectors if v is not None))):
        shapes = ", ".join(str(tuple(t.shape)) for t in (weight, *vectors) if t is not None)
        raise ValueError(f"conv_norm: weight and vectors {shapes} do not fit x {tuple(x.shape)}")
    kernels = kernels_for(x, weight)
    if kernels is None:
        z, mean_z, var_z = reference.conv_norm(x, weight, mean, var, gamma, beta, eps)
        return channels_last(z), mean_z, var_z
    x = channels_last(x, warn="the input of conv_norm")
    found = kernels.convolve(x, weight, _norm(mean, var, gamma, beta, eps))
    return found.out, found.mean_z, found.var_z


@conv_norm.register_fake
def _(x: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    n, _, h, w = x.shape
    k = weight.shape[0]
    z = torch.empty((n, k, h, w), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    mean_z, var_z = (x.new_empty(k, dtype=reference.wide_dtype(x)) for _ in range(2))
    return z, mean_z, var_z


@torch.library.custom_op("fastres_kernels::conv_norm_backward", mutates_args=())
def conv_norm_backward(
    dz: Tensor | None,  # (N, K, H, W), any strides; None means zero, as for the next two
    dmean_z: Tensor | None,  # (K,)
    dvar_z: Tensor | None,  # (K,)
    x: Tensor,  # (N, C, H, W); x to eps are the inputs of the forward
    weight: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    z: Tensor,  # (N, K, H, W); z and mean_z are results of the forward
    mean_z: Tensor,
    want_input: bool,  # compute dx and the gradients of the normalisation
    want_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of conv_norm, each of its tensor's dtype.

    A gradient is empty if it is not wanted or if its tensor is None.

    Returns:
        dx, dweight: of x's and weight's shapes, channels-last.
        dmean, dvar, dgamma, dbeta: (C,).
    """
    kernels = kernels_for(x, weight)
    dx = dweight = None
    dnorm: list[Tensor | None] = [None] * 4
    if kernels is None:
        dx, dweight, dnorm = reference_backward(
            dz, dmean_z, dvar_z, x, weight, mean, var, gamma, beta, eps, z, mean_z, want_input, want_weight
        )
    else:
        x = channels_last(x)
        norm = _norm(mean, var, gamma, beta, eps)
        dz = None if dz is None else channels_last(dz)
        gradient = conv_common.Gradient(dz, _dense(dmean_z), _dense(dvar_z), channels_last(z), mean_z)
        if want_input:
            found = kernels.convolve(x, weight, norm, gradient)
            dx, dnorm = found.out, [found.dmean, found.dvar, found.dgamma, found.dbeta]
        if want_weight:
            dweight = conv_common.weight_gradient(x, weight, norm, gradient)
    dmean, dvar, dgamma, dbeta = (_or_empty(gradient, x) for gradient in dnorm)
    return _or_empty(dx, x), _or_empty(dweight, x), dmean, dvar, dgamma, dbeta


@conv_norm_backward.register_fake
def _(
    dz: Any, dmean_z: Any, dvar_z: Any, x: Tensor, weight: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    mean, var, gamma, beta, _, _, _, want_input, want_weight = others
    dx = torch.empty_like(x, memory_format=torch.channels_last) if want_input else None
    dweight = torch.empty_like(weight, memory_format=torch.channels_last) if want_weight else None
    normalised = want_input and mean is not None and var is not None
    dmean, dvar, dgamma, dbeta = (
        _or_empty(torch.empty_like(vector) if normalised and vector is not None else None, x)
        for vector in (mean, var, gamma, beta)
    )
    return _or_empty(dx, x), _or_empty(dweight, x), dmean, dvar, dgamma, dbeta


def reference_backward(
    dz: Tensor | None,
    dmean_z: Tensor | None,
    dvar_z: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    z: Tensor,
    mean_z: Tensor,
    want_input: bool,
    want_weight: bool,
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """Return dx, dweight and [dmean, dvar, dgamma, dbeta] of reference.conv_norm; None for an absent gradient.

    The gradients are written out by hand, because the body of an op runs below autograd.
    """
    wide = reference.wide_dtype(x)
    count = z.numel() // z.shape[1]
    total = torch.zeros_like(z, dtype=wide)
    if dz is not None:
        total += dz
    if dmean_z is not None:
        total += (dmean_z / count)[:, None, None]
    if dvar_z is not None:
        total += (z - mean_z[:, None, None]) * (2 * dvar_z / count)[:, None, None]

    a = x.to(wide)
    if mean is not None and var is not None:
        invstd = torch.rsqrt(var + eps)
        normalised = (a - mean[:, None, None]) * invstd[:, None, None]
        scale = torch.ones_like(mean) if gamma is None else gamma
        shift = torch.zeros_like(mean) if beta is None else beta
        preactivation = normalised * scale[:, None, None] + shift[:, None, None]
        a = F.relu(preactivation)
    a = a.to(x.dtype).to(wide)

    padding = weight.shape[-1] // 2
    dx = dweight = None
    dnorm: list[Tensor | None] = [None] * 4
    if want_weight:
        dweight = channels_last(conv2d_weight(a, weight.shape, total, padding=padding).to(weight.dtype))
    if want_input:
        g = conv2d_input(x.shape, weight.to(x.dtype).to(wide), total, padding=padding)
        if mean is not None and var is not None:
            g = g.masked_fill(preactivation <= 0, 0)
            dbeta, dgamma = g.sum((0, 2, 3)), (g * normalised).sum((0, 2, 3))
            g = g * (scale * invstd)[:, None, None]
            dmean, dvar = -dbeta * scale * invstd, -0.5 * dgamma * scale * invstd**2
            dnorm = [
                None if vector is None else gradient.to(vector.dtype)
                for vector, gradient in ((mean, dmean), (var, dvar), (gamma, dgamma), (beta, dbeta))
            ]
        dx = channels_last(g.to(x.dtype))
    return dx, dweight, dnorm


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Save the inputs of conv_norm, z and mean_z for the backward."""
    *tensors, ctx.eps = inputs
    z, mean_z, _ = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, z, mean_z)


def _differentiate(ctx: Any, dz: Tensor | None, dmean_z: Tensor | None, dvar_z: Tensor | None) -> Any:
    """Return the gradients of conv_norm's seven inputs."""
    *tensors, z, mean_z = ctx.saved_tensors
    needs_x, needs_weight, *needs_norm, _ = ctx.needs_input_grad
    gradients = conv_norm_backward(
        dz, dmean_z, dvar_z, *tensors, ctx.eps, z, mean_z, needs_x or any(needs_norm), needs_weight
    )
    # An empty tensor stands for an absent gradient. An input that is itself empty needs no gradient.
    return *(gradient if gradient.numel() else None for gradient in gradients), None


def _no_double_backward(ctx: Any, *gradients: Tensor) -> None:
    raise NotImplementedError(
        "fastres_kernels: conv_norm has no double backward; use torch's layers if you need gradients of gradients"
    )


conv_norm.register_autograd(_differentiate, setup_context=_save)
conv_norm_backward.register_autograd(_no_double_backward)


def _flops(x: tuple[int, ...], weight: tuple[int, ...]) -> int:
    """Return the operations of one convolution from its shapes; a multiply-add counts as two."""
    (n, _, height, width), (k, c, r, s) = x, weight
    return 2 * n * height * width * k * c * r * s


@register_flop_formula(torch.ops.fastres_kernels.conv_norm)
def _flops_of_forward(x: tuple[int, ...], weight: tuple[int, ...], *_: Any, out_shape: Any = None, **__: Any) -> int:
    return _flops(x, weight)


@register_flop_formula(torch.ops.fastres_kernels.conv_norm_backward)
def _flops_of_backward(*given: Any, out_shape: Any = None, **_: Any) -> int:
    """Return the operations of the input gradient and the weight gradient, if they are wanted."""
    x, weight, want_input, want_weight = given[3], given[4], given[-2], given[-1]
    operations: int = (want_input + want_weight) * _flops(x, weight)
    return operations


def _norm(mean: Tensor | None, var: Tensor | None, gamma: Tensor | None, beta: Tensor | None, eps: float) -> Any:
    """Return the vectors as a dense conv_common.Norm; all are None if mean or var is."""
    if mean is None or var is None:
        mean = var = gamma = beta = None
    return conv_common.Norm(_dense(mean), _dense(var), _dense(gamma), _dense(beta), eps)


def _dense(vector: Tensor | None) -> Tensor | None:
    """Return the vector with stride 1; gradients of sums have stride 0."""
    return None if vector is None else vector.contiguous()


def _or_empty(gradient: Tensor | None, x: Tensor) -> Tensor:
    """Return the gradient, or an empty tensor for None, because an op cannot return None."""
    return x.new_empty(0) if gradient is None else gradient
