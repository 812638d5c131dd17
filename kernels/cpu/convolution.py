"""3×3 convolutions in C++, forward and backward, for CPUs.

winograd.cpp needs 16 instead of 36 multiplications for four outputs. It computes convolutions of stride 1 with many
channels. convolution.cpp multiplies directly, in training with few channels. Both compute in bf16 and float32, and are
operators of torch, which profilers and FLOP counters see:

    torch.ops.fastres_kernels.cpp_winograd                    (x, w, bias, transposed) -> y
    torch.ops.fastres_kernels.cpp_winograd_act                (x, w, bias, residual, relu, y)
    torch.ops.fastres_kernels.cpp_winograd_weight_gradient    (x, dy) -> dw
    torch.ops.fastres_kernels.cpp_convolution                 (x, w, transposed) -> y
    torch.ops.fastres_kernels.cpp_weight_gradient             (x, dy, stride) -> dw

`can_convolve` returns False for what they do not support, or were not measured to compute faster, which torch's own
operations compute. The measured gains are in docs/EXPERIMENTS.md.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from .library import (
    BOOL,
    INTEGER,
    POINTER,
    REAL,
    Source,
    accepts,
    dense,
    find,
    instruction_set,
    is_channels_last,
    load,
    pointers,
    refuse_double_backward,
    register,
)

WINOGRAD = Source(
    "winograd.cpp",
    {
        "winograd": (None, [BOOL] + [POINTER] * 5 + [INTEGER] * 5 + [BOOL] * 2),
        "winograd_weight_gradient": (None, [BOOL] + [POINTER] * 3 + [INTEGER] * 5),
    },
    libraries=("-lgomp",),
)
DIRECT = Source(
    "convolution.cpp",
    {
        "weight_gradient": (None, [BOOL] + [POINTER] * 3 + [INTEGER] * 6),
        "convolve": (None, [BOOL] + [POINTER] * 3 + [INTEGER] * 5 + [BOOL]),
        "convolve_normalise": (None, [BOOL] + [POINTER] * 11 + [INTEGER] * 5 + [REAL] * 2),
        "convolve_normalise_backward": (None, [BOOL] + [POINTER] * 12 + [INTEGER] * 5),
    },
    libraries=("-lgomp",),
)

# The least number of channels with which Winograd's convolutions were measured to be faster than oneDNN's, and than
# direct ones: for the output and the input's gradient, and for the weight's gradient.
LEAST_CHANNELS = {
    ("avx512_bf16", torch.bfloat16): (32, 32),
    ("avx512_bf16", torch.float32): (32, 32),
    ("avx512", torch.float32): (32, 32),
    ("avx2", torch.float32): (16, 32),
}
# The most channels with which direct multiplication was.
MOST_CHANNELS = {torch.bfloat16: 64, torch.float32: 16}
TILE = {torch.bfloat16: 2, torch.float32: 4}  # rows and columns of outputs of a tile: M in winograd.cpp
LEAST_TILES = {torch.bfloat16: 192, torch.float32: 64}  # with which it was measured to be faster
TILES_OF_A_TASK = 24  # at most, in winograd.cpp


def available(dtype: torch.dtype) -> tuple[bool, str]:
    """Return whether this machine can run the convolutions in the dtype, and why or why not.

    The first call builds them. With AMX, oneDNN's bf16 is several times as fast as with AVX-512, and was not compared.
    """
    isa, missing = instruction_set()
    if missing:
        return False, missing
    if dtype == torch.bfloat16 and isa != "avx512_bf16":
        return False, f"the C++ convolutions need avx512_bf16 for bf16, and the widest instruction set here is {isa}"
    if (isa, dtype) not in LEAST_CHANNELS:
        return False, f"the C++ convolutions were not measured to be faster with {isa}"
    if dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported():
        return False, "the C++ convolutions were not measured against oneDNN's on a CPU with AMX"
    for source in (WINOGRAD, DIRECT):
        library, why = find(source)
        if library is None:
            return False, why
    return True, why


def can_convolve(conv: nn.Conv2d, x: Tensor) -> bool:
    """Return True if conv2d supports conv and x, (N, C, H, W), and was measured to be faster than torch's operations.

    x has to satisfy `library.accepts`, be channels-last, have conv's number of input channels, and be of the dtype in
    which conv computes: autocast's, or without autocast the weight's. conv has to satisfy `has_kernel`.
    """
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else conv.weight.dtype
    # A wrong number of channels is left to torch's convolution, which raises.
    if x.dtype != dtype or not has_kernel(conv) or not accepts(x) or x.shape[1] != conv.in_channels:
        return False
    if not is_channels_last(x) or not available(dtype)[0]:
        return False
    k, stride = conv.out_channels, conv.stride[0]
    if by_winograd(x, k, stride)[0]:
        return True
    if max(conv.in_channels, k) > MOST_CHANNELS[dtype] or not (torch.is_grad_enabled() and conv.weight.requires_grad):
        return False
    return dtype == torch.bfloat16 or has_direct_kernel(x, k, stride)


def has_kernel(conv: nn.Conv2d) -> bool:
    """Return True if conv2d supports the geometry and the numbers of channels of the convolution.

    It has to be 3×3 with zero padding of 1, one group and no dilation. With at most 64 channels, the stride is 1 or 2,
    input channels are a multiple of 16, and output channels a multiple of 8. With more, the stride is 1, and both are
    multiples of 16.
    """
    few = max(conv.in_channels, conv.out_channels) <= 64
    return (
        conv.kernel_size == (3, 3)
        and conv.stride in (((1, 1), (2, 2)) if few else ((1, 1),))
        and conv.padding in ((1, 1), "same")
        and conv.padding_mode == "zeros"
        and conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.in_channels % 16 == 0
        and conv.out_channels % (8 if few else 16) == 0
    )


def can_convolve_folded(x: Tensor, weight: Tensor) -> bool:
    """Return True if Winograd's algorithm computes act(conv(x) + bias + residual) faster than oneDNN for inference.

    The convolution has the stride 1 and has to satisfy `has_kernel`. x is (N, C, H, W), the weight (K, C, 3, 3).
    """
    if x.shape[1] != weight.shape[1]:  # left to torch's convolution, which raises
        return False
    return _has_winograd(x, len(weight), 1) and accepts(x) and is_channels_last(x) and available(x.dtype)[0]


def by_winograd(x: Tensor, out_channels: int, stride: int) -> tuple[bool, bool]:
    """Return whether winograd.cpp convolves x, (N, C, H, W), and computes the input's gradient; and the weight's."""
    least = LEAST_CHANNELS.get((instruction_set()[0], x.dtype))
    if least is None or not _has_winograd(x, out_channels, stride):
        return False, False
    channels = min(x.shape[1], out_channels)
    return channels >= least[0], channels >= least[1]


def _has_winograd(x: Tensor, out_channels: int, stride: int) -> bool:
    """Return True if winograd.cpp supports the convolution of x, (N, C, H, W), and x has enough tiles for it.

    Every filter is transformed once in a call, and with many channels that takes as long as the products of some tiles.
    """
    (n, c, h, w), side = x.shape, TILE[x.dtype]
    if stride != 1 or c % 16 or out_channels % 16:
        return False
    tiles = n * -(-h // side) * -(-w // side)
    return tiles >= max(LEAST_TILES[x.dtype], min(c, out_channels) // side, TILES_OF_A_TASK * torch.get_num_threads())


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """Compute the 3×3 convolution with padding 1 and stride S in x's dtype.

    The convolution and x have to satisfy `can_convolve`. Sums are float32. The weight's gradient is float32, and
    bitwise reproducible for a given number of threads.

    With many channels, Winograd's minimal filtering (Lavin and Gray 2016) computes y and the input's gradient, and with
    more channels the weight's gradient too: F(4×4, 3×3) in float32, and F(2×2, 3×3) in bf16. It transforms the weight
    from float32, and rounds the transformed operands to x's dtype. Its results differ from float64's by 1e-6 of their
    norm in float32 and 4.4e-3 in bf16, and oneDNN's by 5e-7 and 2.4e-3. Otherwise, convolution.cpp computes the
    weight's gradient, and if `has_direct_kernel` also y and the input's gradient. oneDNN computes what is left, and y
    if there is a bias.

    Args:
        x: (N, C, H, W), bf16 or float32.
        weight: (K, C, 3, 3).
        bias: (K,), cast to x's dtype.
        stride: S, 1 or 2.

    Returns:
        (N, K, ⌈H/S⌉, ⌈W/S⌉) of x's dtype, channels-last.

    Raises:
        NotImplementedError: if gradients of gradients are computed.
    """
    y: Tensor = _Conv2d.apply(x, weight, bias, stride)
    return y


class _Conv2d(torch.autograd.Function):
    """Autograd of conv2d."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
        ctx.stride, ctx.by_winograd = stride, by_winograd(x, weight.shape[0], stride)
        w = dense(weight, torch.float32 if ctx.by_winograd[0] else x.dtype)
        ctx.save_for_backward(x, w)
        y: Tensor
        if ctx.by_winograd[0]:
            y = OPS.cpp_winograd(x, w, None if bias is None else bias.float(), False)
            return y
        if bias is None and has_direct_kernel(x, w.shape[0], stride):
            y = OPS.cpp_convolution(x, w, False)
            return y
        return F.conv2d(x, w, None if bias is None else bias.to(x.dtype), stride, 1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        refuse_double_backward("convolution")
        x, w = ctx.saved_tensors
        g, s = dense(g, x.dtype), ctx.stride
        for_x, for_weight, for_bias, _ = ctx.needs_input_grad
        dx = dw = None
        if for_x and ctx.by_winograd[0]:
            dx = OPS.cpp_winograd(g, w, None, True)
        elif for_x and has_direct_kernel(g, w.shape[1], s):
            dx = OPS.cpp_convolution(g, w, True)
        elif for_x:
            masks = [True, False, False]
            dx, _, _ = torch.ops.aten.convolution_backward(
                g, x, w, None, [s, s], [1, 1], [1, 1], False, [0, 0], 1, masks
            )
        if for_weight and ctx.by_winograd[1]:
            dw = OPS.cpp_winograd_weight_gradient(x, g)
        elif for_weight:
            dw = OPS.cpp_weight_gradient(x, g, s)
        return dx, dw, g.sum((0, 2, 3)) if for_bias else None, None


def has_direct_kernel(x: Tensor, out_channels: int, stride: int) -> bool:
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
    All tensors are of one dtype, bf16 or float32, and channels-last.
    """
    (n, _, height, width), (k, c) = x.shape, w.shape[:2]
    shape = (n, c if transposed else k, height, width)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    half = x.dtype == torch.bfloat16
    load(DIRECT).convolve(half, *pointers(x, w, y), n, c, k, height, width, transposed)
    return y


def _weight_gradient(x: Tensor, dy: Tensor, stride: int) -> Tensor:
    """Return the weight's gradient, (K, C, 3, 3) float32, channels-last.

    x is (N, C, H, W) and dy (N, K, ⌈H/S⌉, ⌈W/S⌉), both bf16 or both float32, and channels-last; C is a multiple of 16,
    K of 8.
    """
    (n, c, h, w), k = x.shape, dy.shape[1]
    dw = torch.empty((k, c, 3, 3), dtype=torch.float32, device=x.device, memory_format=torch.channels_last)
    half = x.dtype == torch.bfloat16
    load(DIRECT).weight_gradient(half, *pointers(x, dy, dw), n, c, k, h, w, stride)
    return dw


def _winograd(x: Tensor, w: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """Compute _convolution's result plus the bias for x in bf16 or float32, by Winograd's algorithm.

    w and the bias, (K,), are float32.
    """
    (n, _, height, width), (k, c) = x.shape, w.shape[:2]
    shape = (n, c if transposed else k, height, width)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    _winograd_into(x, w, bias, None, False, y, transposed)
    return y


def _winograd_act(x: Tensor, w: Tensor, bias: Tensor, residual: Tensor | None, relu: bool, y: Tensor) -> None:
    """Write act(conv(x) + bias + residual), (N, K, H, W), to y, which may be the residual, by Winograd's algorithm.

    x, the residual and y are bf16 or float32, channels-last; w and the bias are float32.
    """
    _winograd_into(x, w, bias, residual, relu, y, False)


def _winograd_into(
    x: Tensor, w: Tensor, bias: Tensor | None, residual: Tensor | None, relu: bool, y: Tensor, transposed: bool
) -> None:
    (n, _, height, width), (k, c), half = x.shape, w.shape[:2], x.dtype == torch.bfloat16
    load(WINOGRAD).winograd(half, *pointers(x, w, bias, residual, y), n, c, k, height, width, relu, transposed)


def _winograd_weight_gradient(x: Tensor, dy: Tensor) -> Tensor:
    """Return the weight's gradient, (K, C, 3, 3) float32, channels-last, for x (N, C, H, W) and dy (N, K, H, W)."""
    (n, c, h, w), k = x.shape, dy.shape[1]
    dw = torch.empty((k, c, 3, 3), dtype=torch.float32, device=x.device, memory_format=torch.channels_last)
    half = x.dtype == torch.bfloat16
    load(WINOGRAD).winograd_weight_gradient(half, *pointers(x, dy, dw), n, c, k, h, w)
    return dw


# ---- as operators of torch ---------------------------------------------------------------------------------

OPS = register(
    {
        "cpp_winograd(Tensor x, Tensor w, Tensor? bias, bool transposed) -> Tensor": _winograd,
        "cpp_winograd_act(Tensor x, Tensor w, Tensor bias, Tensor? residual, bool relu, Tensor(a!) y) -> ()": (
            _winograd_act
        ),
        "cpp_winograd_weight_gradient(Tensor x, Tensor dy) -> Tensor": _winograd_weight_gradient,
        "cpp_convolution(Tensor x, Tensor w, bool transposed) -> Tensor": _convolution,
        "cpp_weight_gradient(Tensor x, Tensor dy, int stride) -> Tensor": _weight_gradient,
    }
)


@register_flop_formula([OPS.cpp_convolution, OPS.cpp_winograd, OPS.cpp_winograd_act])
def flops_of_convolution(x: tuple[int, ...], w: tuple[int, ...], *rest: Any, out_shape: Any = None, **also: Any) -> int:
    """Return the number of floating-point operations of the direct algorithm; a multiply-add counts as two."""
    (n, _, height, width), (k, c) = x, w[:2]
    return 2 * n * height * width * k * c * 9


@register_flop_formula([OPS.cpp_weight_gradient, OPS.cpp_winograd_weight_gradient])
def _flops_of_weight_gradient(
    x: tuple[int, ...], dy: tuple[int, ...], stride: int = 1, *, out_shape: Any = None, **_: Any
) -> int:
    """Return the number of floating-point operations of the direct algorithm; a multiply-add counts as two."""
    n, k, height, width = dy
    return 2 * n * height * width * k * x[1] * 9
