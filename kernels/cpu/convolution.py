"""3×3 convolutions for training in bf16, in C++, for CPUs with AVX-512 BF16.

convolution.cpp has two operators of torch, which profilers and FLOP counters see:

    torch.ops.fastres_kernels.cpp_convolution        (x, w, transposed) -> y
    torch.ops.fastres_kernels.cpp_weight_gradient    (x, dy, stride) -> dw

`can_convolve` returns False for what they do not support, which torch's own operations compute. The measured gains are
in docs/EXPERIMENTS.md.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from .library import (
    BOOL,
    INTEGER,
    POINTER,
    Source,
    accepts,
    cpu_flags,
    dense,
    find,
    instruction_set,
    load,
    pointers,
    refuse_double_backward,
    register,
)

SOURCE = Source(
    "convolution.cpp",
    {
        "weight_gradient": (None, [POINTER] * 3 + [INTEGER] * 6),
        "convolve": (None, [POINTER] * 3 + [INTEGER] * 5 + [BOOL]),
    },
    flags=("-mavx512vbmi2", "-fopenmp"),
)


def available() -> tuple[bool, str]:
    """Return whether this machine can run the convolutions, and why or why not. The first call builds them."""
    library, why = _find()
    return library is not None, why


def _find() -> tuple[ctypes.CDLL | None, str]:
    """Return the library, or None, and why."""
    isa, missing = instruction_set()
    if missing:
        return None, missing
    if isa != "avx512_bf16":
        return None, f"the C++ convolutions need avx512_bf16, and the widest instruction set here is {isa}"
    if "avx512_vbmi2" not in cpu_flags():
        return None, "the CPU has no avx512_vbmi2"
    return find(SOURCE)


def _accepts(x: Tensor) -> bool:
    """Return True if x is a bf16 tensor that satisfies `accepts`, and this machine can run the convolutions."""
    return x.dtype == torch.bfloat16 and accepts(x) and available()[0]


def can_convolve(conv: nn.Conv2d, x: Tensor) -> bool:
    """Return True if conv2d supports conv and x, (N, C, H, W), and the weight's gradient will be computed.

    x has to satisfy `library.accepts`, be bf16 and have conv's number of input channels. Under autocast, autocast's
    dtype has to be bf16; without it, the weight's. The convolution has to be 3×3 with zero padding of 1, stride 1 or 2,
    one group and no dilation. Input channels have to be a multiple of 16, output channels a multiple of 8, and both at
    most 64.
    """
    if not (torch.is_grad_enabled() and conv.weight.requires_grad and has_kernel(conv)):
        return False
    if torch.is_autocast_enabled("cpu"):
        fits = torch.get_autocast_dtype("cpu") == torch.bfloat16
    else:
        fits = conv.weight.dtype == torch.bfloat16
    # A wrong number of channels is left to torch's convolution, which raises.
    return fits and _accepts(x) and x.shape[1] == conv.in_channels


def has_kernel(conv: nn.Conv2d) -> bool:
    """Return True if conv2d supports the geometry and the numbers of channels of the convolution."""
    return (
        conv.kernel_size == (3, 3)
        and conv.stride in ((1, 1), (2, 2))
        and conv.padding in ((1, 1), "same")
        and conv.padding_mode == "zeros"
        and conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.in_channels % 16 == 0
        and conv.out_channels % 8 == 0
        and max(conv.in_channels, conv.out_channels) <= 64  # with more channels oneDNN is as fast
    )


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """Compute the 3×3 convolution with padding 1 and stride S in bf16.

    convolution.cpp computes the weight's gradient. It also computes y and the input's gradient, each if `_has_kernel`
    says that it has a kernel for it; otherwise oneDNN does, and always computes y if there is a bias. Products of bf16
    are summed in float32. The weight's gradient is computed in float32, and is bitwise reproducible for a given number
    of threads. The convolution and x have to satisfy `can_convolve`.

    Args:
        x: (N, C, H, W), cast to bf16.
        weight: (K, C, 3, 3), cast to bf16.
        bias: (K,), cast to bf16.
        stride: S, 1 or 2.

    Returns:
        (N, K, ⌈H/S⌉, ⌈W/S⌉) bf16, channels-last.

    Raises:
        NotImplementedError: if gradients of gradients are computed.
    """
    y: Tensor = _Conv2d.apply(x, weight, bias, stride)
    return y


class _Conv2d(torch.autograd.Function):
    """Autograd of conv2d."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
        x, w = dense(x, torch.bfloat16), dense(weight, torch.bfloat16)
        ctx.save_for_backward(x, w)
        ctx.stride, ctx.has_bias = stride, bias is not None
        if bias is None and _has_kernel(x, w.shape[0], stride):
            y: Tensor = OPS.cpp_convolution(x, w, False)
            return y
        return F.conv2d(x, w, None if bias is None else bias.to(torch.bfloat16), stride, 1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        refuse_double_backward("convolution")
        x, w = ctx.saved_tensors
        g, s, dx = dense(g, torch.bfloat16), ctx.stride, None
        if ctx.needs_input_grad[0] and _has_kernel(g, w.shape[1], s):
            dx = OPS.cpp_convolution(g, w, True)
        elif ctx.needs_input_grad[0]:
            masks = [True, False, False]
            dx, _, _ = torch.ops.aten.convolution_backward(
                g, x, w, None, [s, s], [1, 1], [1, 1], False, [0, 0], 1, masks
            )
        return dx, OPS.cpp_weight_gradient(x, g, s), g.sum((0, 2, 3)) if ctx.has_bias else None, None


def _has_kernel(x: Tensor, out_channels: int, stride: int) -> bool:
    """Return True if convolution.cpp has a convolution for x, (N, C, H, W), to `out_channels`; otherwise use oneDNN.

    The kernels are compiled for 16, 32 and 64 input channels and blocks of 16 output channels, and tile an image in
    rows of 16 pixels or in 2 rows × 8 pixels.
    """
    _, c, h, w = x.shape
    return stride == 1 and c in (16, 32, 64) and out_channels % 16 == 0 and (w % 16 == 0 or (w % 8 == 0 and h % 2 == 0))


def _convolution(x: Tensor, w: Tensor, transposed: bool) -> Tensor:
    """Convolve x, (N, C, H, W), with w, (K, C, 3, 3), at stride 1 with padding 1.

    With `transposed`, x is the gradient of such a convolution's output, (N, K, H, W), and the result is the gradient of
    its input, (N, C, H, W). That is a convolution of x with w rotated by 180°, its input and output channels swapped.
    All tensors are bf16 and channels-last.
    """
    (n, _, height, width), (k, c) = x.shape, w.shape[:2]
    shape = (n, c if transposed else k, height, width)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    load(SOURCE).convolve(*pointers(x, w, y), n, c, k, height, width, transposed)
    return y


def _weight_gradient(x: Tensor, dy: Tensor, stride: int) -> Tensor:
    """Return the weight's gradient, (K, C, 3, 3) float32, channels-last.

    x is (N, C, H, W) and dy (N, K, ⌈H/S⌉, ⌈W/S⌉), both bf16 and channels-last; C is a multiple of 16, K of 8.
    """
    (n, c, h, w), k = x.shape, dy.shape[1]
    dw = torch.empty((k, c, 3, 3), dtype=torch.float32, device=x.device, memory_format=torch.channels_last)
    load(SOURCE).weight_gradient(*pointers(x, dy, dw), n, c, k, h, w, stride)
    return dw


# ---- as operators of torch ---------------------------------------------------------------------------------

OPS = register(
    {
        "cpp_convolution(Tensor x, Tensor w, bool transposed) -> Tensor": _convolution,
        "cpp_weight_gradient(Tensor x, Tensor dy, int stride) -> Tensor": _weight_gradient,
    }
)


@register_flop_formula(OPS.cpp_convolution)
def _flops_of_convolution(
    x: tuple[int, ...], w: tuple[int, ...], transposed: bool, *, out_shape: Any = None, **__: Any
) -> int:
    """Return the number of floating-point operations from the shapes; a multiply-add counts as two."""
    (n, _, height, width), (k, c) = x, w[:2]
    return 2 * n * height * width * k * c * 9


@register_flop_formula(OPS.cpp_weight_gradient)
def _flops_of_weight_gradient(
    x: tuple[int, ...], dy: tuple[int, ...], stride: int, *, out_shape: Any = None, **_: Any
) -> int:
    """Return the number of floating-point operations from the shapes; a multiply-add counts as two."""
    n, k, height, width = dy
    return 2 * n * height * width * k * x[1] * 9
