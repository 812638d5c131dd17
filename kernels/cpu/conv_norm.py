"""3×3 convolution + BatchNorm + ReLU (+ residual add) in one pass over the images, in C++, for training on CPUs.

convolution.cpp sums the statistics of an image while it is in the cache. In the backward, the gradient of the
convolution's output is computed image by image, and both gradients of the convolution are computed from it while it is
in the cache. The results are those of convolution.py followed by batchnorm.py. It has two operators of torch:

    torch.ops.fastres_kernels.cpp_convolution_norm_act            (x, w, residual, …) -> (y, z, mask, stats)
    torch.ops.fastres_kernels.cpp_convolution_norm_act_backward   (g, g2, x, w, z, …) -> (dx, dw, dz, dweight, dbias)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from . import batchnorm, convolution
from .library import dense, load, pointers, refuse_double_backward, register

MOST_VALUES = 1 << 16  # of an image: five float32 images of an operand each are then within an L2 of 2 MiB


def can_convolve_normalise(conv: nn.Conv2d, x: Tensor) -> bool:
    """Return True if conv_norm_act supports conv and x, (N, C, H, W).

    The norm after it has to satisfy `batchnorm.can_normalise` for x, whose shape is that of the convolution's output.
    """
    if conv.out_channels != conv.in_channels or conv.stride != (1, 1) or conv.bias is not None or x.ndim != 4:
        return False
    _, c, h, w = x.shape
    few = h * w * c <= MOST_VALUES and convolution.has_direct_kernel(x, c, 1)
    return few and not convolution.by_winograd(x, c, 1)[0] and convolution.can_convolve(conv, x)


def conv_norm_act(
    x: Tensor,  # (N, C, H, W) bf16 or float32, channels-last
    weight: Tensor,  # (C, C, 3, 3), cast to x's dtype
    residual: Tensor | None,  # (N, C, H, W), cast to x's dtype
    skip: Tensor | None,  # as in batch_norm_act
    norm: nn.BatchNorm2d,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    """Compute batch_norm_act's result for conv2d(x, weight, None, 1), where norm normalises, and return it twice too.

    conv and x have to satisfy `can_convolve_normalise`.

    Returns:
        y for the next layer, and y for a skip connection, as batch_norm_act.

    Raises:
        NotImplementedError: if gradients of gradients are computed.
        RuntimeError: if this machine cannot run the kernels.
    """
    state = batchnorm.running_state(norm)
    parameters = (weight, norm.weight, norm.bias)
    y: tuple[Tensor, Tensor] = _ConvNormAct.apply(x, residual, skip, *parameters, *state, norm.eps, relu)
    return y


class _ConvNormAct(torch.autograd.Function):
    """Autograd of conv_norm_act; see batchnorm._BatchNormAct for the second output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, skip: Tensor | None, weight: Tensor, *rest: Any) -> Any:
        w, residual = dense(weight, x.dtype), None if residual is None else dense(residual, x.dtype)
        y, z, mask, stats = OPS.cpp_convolution_norm_act(x, w, residual, *rest)
        ctx.save_for_backward(x, w, z, mask, stats)
        ctx.has_residual, ctx.has_skip = residual is not None, skip is not None
        ctx.set_materialize_grads(False)
        return y, y.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, g2: Tensor | None) -> Any:
        refuse_double_backward("convolution with BatchNorm")
        x, w, z, mask, stats = ctx.saved_tensors
        g, g2 = batchnorm.output_gradients(g, g2, x.dtype)
        if g is None:
            return (None,) * 11
        flags = (ctx.has_residual, for_x := ctx.needs_input_grad[0])
        dx, dw, dz, *for_norm = OPS.cpp_convolution_norm_act_backward(g, g2, x, w, z, mask, stats, *flags)
        return dx if for_x else None, *batchnorm.residual_gradients(ctx, dz), dw, *for_norm, *(None,) * 5


def _forward(
    x: Tensor,  # (N, C, H, W) bf16 or float32, channels-last
    w: Tensor,  # (C, C, 3, 3), of x's dtype, channels-last
    residual: Tensor | None,  # like x
    weight: Tensor,  # (C,) float32
    bias: Tensor,  # (C,) float32
    running_mean: Tensor | None,  # (C,) float32
    running_var: Tensor | None,  # (C,) float32
    momentum: float,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y and the convolution's output z, both like x, and mask and stats of batchnorm.cpp_batch_norm_act."""
    (n, c, height, width), k = x.shape, len(w)
    z, y = torch.empty_like(x), torch.empty_like(x)
    mask, stats = batchnorm.mask_and_stats(z, relu)
    tensors = (x, w, z, residual, weight, bias, running_mean, running_var, y, mask if relu else None, stats)
    half = x.dtype == torch.bfloat16
    load(convolution.DIRECT).convolve_normalise(half, *pointers(*tensors), n, c, k, height, width, momentum, eps)
    return y, z, mask, stats


def _backward(
    g: Tensor,  # (N, C, H, W) bf16 or float32, channels-last: the gradient of y
    g2: Tensor | None,  # like g, a second gradient of y, added to g
    x: Tensor,  # like g
    w: Tensor,  # from the forward
    z: Tensor,  # from the forward
    mask: Tensor,  # from the forward
    stats: Tensor,  # from the forward
    has_residual: bool,
    for_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the backward of conv_norm_act.

    Returns:
        dx: like x; empty unless `for_x`.
        dw: like w, in float32.
        dz, dweight, dbias: as the backward of batch_norm_act.
    """
    store_dz, relu, (n, c, height, width), k = has_residual or g2 is not None, len(mask) > 0, x.shape, len(w)
    dx, dz = (torch.empty_like(x) if needed else x.new_empty(0) for needed in (for_x, store_dz))
    dw = torch.empty_like(w, dtype=torch.float32)
    dweight, dbias = (x.new_empty(k, dtype=torch.float32) for _ in range(2))
    outputs = (dz if store_dz else None, dx if for_x else None, dw, dweight, dbias)
    tensors = (g, g2, x, w, z, mask if relu else None, stats, *outputs)
    half = x.dtype == torch.bfloat16
    load(convolution.DIRECT).convolve_normalise_backward(half, *pointers(*tensors), n, c, k, height, width)
    return dx, dw, dz, dweight, dbias


OPS = register(
    {
        "cpp_convolution_norm_act(Tensor x, Tensor w, Tensor? residual, Tensor weight, Tensor bias, "
        "Tensor(a!)? running_mean, Tensor(b!)? running_var, float momentum, float eps, bool relu) "
        "-> (Tensor, Tensor, Tensor, Tensor)": _forward,
        "cpp_convolution_norm_act_backward(Tensor g, Tensor? g2, Tensor x, Tensor w, Tensor z, Tensor mask, "
        "Tensor stats, bool has_residual, bool for_x) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)": _backward,
    }
)


@register_flop_formula(OPS.cpp_convolution_norm_act)
def _flops_of_forward(x: tuple[int, ...], w: tuple[int, ...], *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Return the number of floating-point operations of the convolution; a multiply-add counts as two."""
    flops: int = convolution.flops_of_convolution(x, w)
    return flops


@register_flop_formula(OPS.cpp_convolution_norm_act_backward)
def _flops_of_backward(
    g: Any, g2: Any, x: tuple[int, ...], w: tuple[int, ...], *rest: Any, out_shape: Any = None, **_: Any
) -> int:
    """Return the number of floating-point operations of the convolution's gradients that are computed."""
    for_x: bool = rest[-1]
    return (1 + for_x) * _flops_of_forward(x, w)
