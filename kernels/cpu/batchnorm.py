"""BatchNorm + ReLU (+ residual add) in bf16 and float32, in C++, for CPUs with AVX-512, AVX2 or NEON.

batchnorm.cpp has three operators of torch, which profilers see:

    torch.ops.fastres_kernels.cpp_batch_norm_act              (x, residual, …) -> (y, mask, stats)
    torch.ops.fastres_kernels.cpp_batch_norm_act_backward     (g, g2, x, …) -> (dx, dz, dweight, dbias)
    torch.ops.fastres_kernels.cpp_batch_norm_act_inference    (x, residual, …) -> y

`can_normalise` returns False for what they do not support, which torch's own operations compute. dispatch_table.py says
for which shapes they were measured to be faster.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from .library import (
    BOOL,
    INTEGER,
    POINTER,
    REAL,
    Source,
    accepts,
    dense,
    find,
    is_channels_last,
    load,
    pointers,
    refuse_double_backward,
    register,
)

SOURCE = Source(
    "batchnorm.cpp",
    {
        "bn_forward": (None, [BOOL] + [POINTER] * 9 + [INTEGER] * 2 + [REAL] * 2),
        "bn_backward": (None, [BOOL] + [POINTER] * 9 + [INTEGER] * 2),
        "bn_inference": (None, [BOOL] + [POINTER] * 7 + [INTEGER] * 3 + [REAL, BOOL]),
        "bn_mask_bytes": (INTEGER, [INTEGER] * 2),
    },
    libraries=("-lgomp",),
)
DTYPES = (torch.bfloat16, torch.float32)  # of activations; parameters and statistics are float32
LEAST_PLANE = 16  # pixels: the longest vector's lanes


@cache
def available() -> tuple[bool, str]:
    """Return whether this machine can run the kernels, and why or why not. The first call builds them."""
    library, why = find(SOURCE)
    return library is not None, why


def can_normalise(norm: nn.BatchNorm2d, x: Tensor, residual: Tensor | None = None) -> bool:
    """Return True if batch_norm_act, or inference in eval mode, supports norm(x) + residual for x (N, C, H, W).

    Whether this machine can run them is the answer of `available`.
    x has to satisfy `library.accepts`, be bf16 or float32, and have norm's number of channels. In training it is
    channels-last, with at least two values in each channel. In eval mode it is channels-last, or NCHW with at least
    LEAST_PLANE pixels; there are running statistics, and no gradient is needed. norm has to have a weight and a bias.
    These, and the running statistics if there are any, have to be float32.
    """
    if x.dtype not in DTYPES or not accepts(x) or x.shape[1] != norm.num_features:
        return False
    weight, bias, mean, var = _given(norm)
    if weight is None or bias is None or not weight.dtype == bias.dtype == torch.float32:
        return False
    if mean is not None and var is not None and not mean.dtype == var.dtype == torch.float32:
        return False
    if norm.training:
        return is_channels_last(x) and x.numel() > x.shape[1]
    if mean is None or var is None:
        return False
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, residual, weight, bias)):
        return False
    return is_channels_last(x) or (x.is_contiguous() and x.numel() >= LEAST_PLANE * x.shape[0] * x.shape[1])


def _given(norm: nn.BatchNorm2d) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return norm's weight, bias, running mean and running variance, each None if it is not there as such.

    Attributes of a module take ten times as long as its dicts, and this is called in every forward.
    """
    parameters, buffers = norm._parameters, norm._buffers
    return (
        parameters.get("weight"),
        parameters.get("bias"),
        buffers.get("running_mean"),
        buffers.get("running_var"),
    )


def inference(x: Tensor, residual: Tensor | None, norm: nn.BatchNorm2d, relu: bool) -> Tensor:
    """Compute y = act(BatchNorm(x) + residual) with the running statistics, in one pass.

    Args:
        x: (N, C, H, W), channels-last or NCHW; x and norm, in eval mode, have to satisfy `can_normalise`.
        residual: of x's shape, and cast to its dtype and memory format.
        norm: the parameters and statistics.
        relu: apply ReLU.

    Returns:
        y: like x.
    """
    added = None if residual is None else dense(residual, x.dtype, _memory_format(x))
    y: Tensor = OPS.cpp_batch_norm_act_inference(x, added, *_given(norm), norm.eps, relu)
    return y


def _memory_format(x: Tensor) -> torch.memory_format:
    """Return the memory format of x, which is one that `can_normalise` takes."""
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format


def batch_norm_act(
    x: Tensor,  # (N, C, H, W) bf16 or float32, channels-last
    residual: Tensor | None,  # (N, C, H, W), cast to x's dtype
    skip: Tensor | None,  # (N, C, H, W), from the layer that made `residual`: receives residual's gradient in its place
    norm: nn.BatchNorm2d,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    """Compute y = act(BatchNorm(x) + residual) with x's statistics.

    The running statistics, if norm tracks any, are updated as in torch. x and norm have to satisfy `can_normalise`. The
    forward makes two passes over x, and the backward two over x and the gradient. ReLU's mask is saved as bits. Memory
    traffic per element of s bytes with a residual, the mask not counted: 4 s bytes in the forward; 6 s in the backward,
    or 7 s if both outputs have a gradient. Sums are float32 within chunks of 32 to 256 rows of lcm(C, 64) values and
    float64 across chunks, in an order that does not depend on the number of threads, so results are bitwise
    reproducible.

    Returns:
        y for the next layer, and y for a skip connection, to be passed on as `skip`: a second tensor over the same
        memory. Both are like x. The backward adds their gradients in its first pass.

    Raises:
        NotImplementedError: if gradients of gradients are computed.
        RuntimeError: if this machine cannot run the kernels.
    """
    state = running_state(norm)
    y: tuple[Tensor, Tensor] = _BatchNormAct.apply(x, residual, skip, norm.weight, norm.bias, *state, norm.eps, relu)
    return y


def running_state(norm: nn.BatchNorm2d) -> tuple[Tensor | None, Tensor | None, float]:
    """Count a batch, and return the running mean and variance, (C,), and the batch's weight in them."""
    if not norm.track_running_stats:
        return None, None, 0.0
    batches = norm.num_batches_tracked
    assert batches is not None
    batches.add_(1)
    return norm.running_mean, norm.running_var, 1 / int(batches) if norm.momentum is None else norm.momentum


class _BatchNormAct(torch.autograd.Function):
    """Autograd of batch_norm_act: returns y twice, and adds both gradients in the backward's first pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, skip: Tensor | None, *rest: Any) -> Any:
        residual = None if residual is None else dense(residual, x.dtype)
        y, mask, stats = OPS.cpp_batch_norm_act(x, residual, *rest)
        ctx.save_for_backward(x, mask, stats)
        ctx.has_residual, ctx.has_skip = residual is not None, skip is not None
        ctx.set_materialize_grads(False)
        return y, y.detach()  # a second tensor over the same memory, so that autograd keeps the gradients apart

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, g2: Tensor | None) -> Any:
        refuse_double_backward("BatchNorm")
        x, mask, stats = ctx.saved_tensors
        g, g2 = output_gradients(g, g2, x.dtype)
        if g is None:
            return (None,) * 10
        dx, dz, dweight, dbias = OPS.cpp_batch_norm_act_backward(g, g2, x, mask, stats, ctx.has_residual)
        return dx, *residual_gradients(ctx, dz), dweight, dbias, *(None,) * 5


def output_gradients(g: Tensor | None, g2: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of both y, dense and of the dtype. If there is one, whichever it is, it is the first."""
    if g is None:
        g, g2 = g2, None
    return None if g is None else dense(g, dtype), None if g2 is None else dense(g2, dtype)


def residual_gradients(ctx: Any, dz: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of the residual and of the skip, one of which takes dz if anything was added."""
    return (None, dz) if ctx.has_skip else (dz if ctx.has_residual else None, None)


def _forward(
    x: Tensor,  # (N, C, H, W) bf16 or float32, channels-last
    residual: Tensor | None,  # like x
    weight: Tensor,  # (C,) float32
    bias: Tensor,  # (C,) float32
    running_mean: Tensor | None,  # (C,) float32
    running_var: Tensor | None,  # (C,) float32
    momentum: float,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the forward of batch_norm_act.

    Returns:
        y: like x.
        mask: ReLU's mask in uint8, one bit per element, or two with NEON; empty without ReLU.
        stats: (3, C) float32: mean, 1/√(var + eps) and weight/√(var + eps).
    """
    y, (mask, stats) = torch.empty_like(x), mask_and_stats(x, relu)
    tensors = (x, residual, weight, bias, running_mean, running_var, y, mask if relu else None, stats)
    load(SOURCE).bn_forward(x.dtype == torch.bfloat16, *pointers(*tensors), x.numel(), x.shape[1], momentum, eps)
    return y, mask, stats


def mask_and_stats(x: Tensor, relu: bool) -> tuple[Tensor, Tensor]:
    """Return memory for the mask and the statistics of the forward for x, (N, C, H, W)."""
    mask = x.new_empty(load(SOURCE).bn_mask_bytes(x.numel(), x.shape[1]) if relu else 0, dtype=torch.uint8)
    return mask, x.new_empty((3, x.shape[1]), dtype=torch.float32)  # float32, whatever torch's default is


def _backward(
    g: Tensor,  # (N, C, H, W) bf16 or float32, channels-last: the gradient of y
    g2: Tensor | None,  # like g, a second gradient of y, added to g
    x: Tensor,  # like g
    mask: Tensor,  # from _forward
    stats: Tensor,  # from _forward
    has_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the backward of batch_norm_act.

    Returns:
        dx: like x.
        dz: like x, g + g2 masked by ReLU, which is the residual's gradient. It is stored for the second pass if there
            is g2, and empty if there is neither a residual nor g2.
        dweight, dbias: (C,) float32.
    """
    store_dz, relu, c = has_residual or g2 is not None, len(mask) > 0, x.shape[1]
    dx, dz = torch.empty_like(x), torch.empty_like(x) if store_dz else x.new_empty(0)
    dweight, dbias = (x.new_empty(c, dtype=torch.float32) for _ in range(2))
    tensors = (g, g2, x, mask if relu else None, stats, dz if store_dz else None, dx, dweight, dbias)
    load(SOURCE).bn_backward(x.dtype == torch.bfloat16, *pointers(*tensors), x.numel(), c)
    return dx, dz, dweight, dbias


def _inference(
    x: Tensor,  # (N, C, H, W) bf16 or float32, channels-last or NCHW
    residual: Tensor | None,  # like x
    weight: Tensor,  # (C,) float32
    bias: Tensor,  # (C,) float32
    mean: Tensor,  # (C,) float32
    var: Tensor,  # (C,) float32
    eps: float,
    relu: bool,
) -> Tensor:
    """Return act(BatchNorm(x) + residual) with the given statistics, like x."""
    y = torch.empty_like(x)
    tensors = (x, residual, weight, bias, mean, var, y)
    size = (x.numel(), x.shape[1], 1 if is_channels_last(x) else x.shape[2] * x.shape[3])
    load(SOURCE).bn_inference(x.dtype == torch.bfloat16, *pointers(*tensors), *size, eps, relu)
    return y


OPS = register(
    {
        "cpp_batch_norm_act(Tensor x, Tensor? residual, Tensor weight, Tensor bias, Tensor(a!)? running_mean, "
        "Tensor(b!)? running_var, float momentum, float eps, bool relu) -> (Tensor, Tensor, Tensor)": _forward,
        "cpp_batch_norm_act_backward(Tensor g, Tensor? g2, Tensor x, Tensor mask, Tensor stats, bool has_residual) "
        "-> (Tensor, Tensor, Tensor, Tensor)": _backward,
        "cpp_batch_norm_act_inference(Tensor x, Tensor? residual, Tensor weight, Tensor bias, Tensor mean, Tensor var, "
        "float eps, bool relu) -> Tensor": _inference,
    }
)
