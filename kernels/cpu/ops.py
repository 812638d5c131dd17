"""C++ kernels for training BatchNorm + ReLU (+ add) and 3×3 convolutions in bf16, for CPUs with AVX-512 BF16.

kernels.cpp does not depend on torch. The machine's own compiler builds it once, in two seconds, ctypes calls it, and it
runs in torch's OpenMP threads. Each of its functions is registered as an operator of torch, so that profilers and
FLOP counters see it:

    torch.ops.fastres_kernels.cpp_batch_norm_act             (x, residual, …) -> (y, mask, stats)
    torch.ops.fastres_kernels.cpp_batch_norm_act_backward    (g, g2, x, …) -> (dx, dz, dweight, dbias)
    torch.ops.fastres_kernels.cpp_convolution                (x, w, transposed) -> y
    torch.ops.fastres_kernels.cpp_weight_gradient            (x, dy, stride) -> dw

torch.compile does not support this file's autograd functions, so `can_normalise` and `can_convolve` return False under
it, and compiled models run torch's own operations. The measured gains are in docs/EXPERIMENTS.md.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

SOURCE = Path(__file__).with_name("kernels.cpp")
ISA = ("avx512f", "avx512bw", "avx512vl", "avx512_bf16", "avx512_vbmi2")  # names as in /proc/cpuinfo
FLAGS = (*("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp"), *(f"-m{name.replace('_', '')}" for name in ISA))
POINTER, INTEGER, REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {  # functions of kernels.cpp: result type, argument types
    "bn_forward": (None, [POINTER] * 9 + [INTEGER] * 2 + [REAL] * 2),
    "bn_backward": (None, [POINTER] * 9 + [INTEGER] * 2),
    "weight_gradient": (None, [POINTER] * 3 + [INTEGER] * 6),
    "convolve": (None, [POINTER] * 3 + [INTEGER] * 5 + [ctypes.c_bool]),
}


# ---- building and loading ----------------------------------------------------------------------------------


def available() -> tuple[bool, str]:
    """Return whether this machine can run the kernels, and why or why not. The first call builds them."""
    library, why = _find_library()
    return library is not None, why


@cache
def _find_library() -> tuple[ctypes.CDLL | None, str]:
    """Return the library, or None, and why. Cached for the process, because building takes two seconds."""
    missing = missing_instructions()
    if missing:
        return None, missing
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        return None, f"no C++ compiler {compiler} on the PATH: apt-get install g++"
    try:
        library = build(compiler)
    except (OSError, subprocess.CalledProcessError) as error:
        said = str(getattr(error, "stderr", "") or error).strip().splitlines()
        return None, f"{compiler} did not build kernels/cpu/kernels.cpp: {said[0] if said else error}"
    return library, f"the CPU has avx512_bf16, and {compiler} built the kernels for it"


def _library() -> ctypes.CDLL:
    """Return the library. Raise RuntimeError with the reason if this machine cannot run it."""
    library, why = _find_library()
    if library is None:
        raise RuntimeError(f"fastres_kernels: {why}")
    return library


def missing_instructions() -> str:
    """Return the reason why this CPU or platform cannot run the kernels, or "" if it can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "the C++ kernels are for Linux on x86-64"
    words = Path("/proc/cpuinfo").read_text().split()
    missing = [name for name in ISA if name not in words]
    return f"the CPU has no {', '.join(missing)}" if missing else ""


def build(compiler: str) -> ctypes.CDLL:
    """Return the library from the user's cache, or build it and cache it.

    The name of the file in the cache has a hash of source, compiler and flags.

    Raises:
        CalledProcessError: if the source does not compile.
        OSError: if the compiler cannot be run or the library cannot be loaded.
    """
    key = hashlib.sha256(SOURCE.read_bytes() + " ".join((compiler, *FLAGS)).encode()).hexdigest()[:16]
    file = f"kernels-{key}.so"
    store: Path | None = None
    try:
        store = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fastres"
        with suppress(OSError):  # a missing or damaged file is built below
            return load(store / file)
        store.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=store)
    except (OSError, RuntimeError):  # without a writable home every process builds its own library
        store, folder = None, tempfile.TemporaryDirectory()
    with folder as name:
        fresh = Path(name) / file
        command = [compiler, *FLAGS, str(SOURCE), "-o", str(fresh)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        library = load(fresh)  # load first, so that a library that does not load is never cached
        if store:
            fresh.replace(store / file)  # atomic, so several processes may build at the same time
    return library


def load(path: Path) -> ctypes.CDLL:
    """Load the library and declare its functions. Raise OSError if it cannot be loaded."""
    library = ctypes.CDLL(str(path))
    for name, (result, arguments) in FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def _kernels_accept(x: Tensor) -> bool:
    """Return True if x is bf16, 4-D, not empty and on a CPU that can run the kernels, and nothing is being compiled.

    The first call may build the kernels.
    """
    return (
        x.device.type == "cpu"
        and x.dtype == torch.bfloat16
        and x.ndim == 4
        and x.numel() > 0
        and not torch.compiler.is_compiling()
        and available()[0]
    )


# ---- BatchNorm + ReLU (+ add) ------------------------------------------------------------------------------


def can_normalise(norm: nn.BatchNorm2d, x: Tensor) -> bool:
    """Return True if batch_norm_act can compute norm(x) for x (N, C, H, W).

    x has to satisfy `_kernels_accept` and have norm's number of channels, with at least two values in each. C has to be
    1, 2, 4, …, 64, and N·C·H·W a multiple of 64. norm has to be in training mode and have a weight and a bias. These,
    and the running statistics if there are any, have to be float32.
    """
    c = norm.num_features
    return (
        norm.training
        and 64 % c == 0  # for 128 and more channels ATen's backward was faster: this one ran at 0.8 times its speed
        and _kernels_accept(x)
        and x.shape[1] == c
        and x.numel() % 64 == 0
        and x.numel() > c
        and all(t is not None and t.dtype == torch.float32 for t in (norm.weight, norm.bias))
        and all(t is None or t.dtype == torch.float32 for t in (norm.running_mean, norm.running_var))
    )


def batch_norm_act(
    x: Tensor,  # (N, C, H, W) bf16
    residual: Tensor | None,  # (N, C, H, W), cast to bf16
    skip: Tensor | None,  # (N, C, H, W), from the layer that made `residual`: receives residual's gradient in its place
    norm: nn.BatchNorm2d,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    """Compute y = act(BatchNorm(x) + residual) with x's statistics.

    The running statistics, if norm tracks any, are updated as in torch. x and norm have to satisfy `can_normalise`. The
    forward makes two passes over x, and the backward two over x and the gradient. ReLU's mask is saved as bits. Memory
    traffic per element with a residual, the mask not counted: 8 bytes in the forward; 12 in the backward, or 14 if both
    outputs have a gradient. Sums are float32 within chunks of 16,384 values and float64
    across chunks, in an order that does not depend on the number of threads, so results are bitwise reproducible.

    Returns:
        y for the next layer, and y for a skip connection, to be passed on as `skip`: a second tensor over the same
        memory. Both are (N, C, H, W) bf16, channels-last. The backward adds their gradients in its first pass.

    Raises:
        NotImplementedError: if gradients of gradients are computed.
        RuntimeError: if this machine cannot run the kernels.
    """
    state: tuple[Any, ...] = (None, None, 0.0)  # running mean and variance, momentum
    if norm.track_running_stats:
        batches = norm.num_batches_tracked
        assert batches is not None
        batches.add_(1)
        momentum = 1 / int(batches) if norm.momentum is None else norm.momentum
        state = (norm.running_mean, norm.running_var, momentum)
    y: tuple[Tensor, Tensor] = _BatchNormAct.apply(x, residual, skip, norm.weight, norm.bias, *state, norm.eps, relu)
    return y


class _BatchNormAct(torch.autograd.Function):
    """Autograd of batch_norm_act: returns y twice, and adds both gradients in the backward's first pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, skip: Tensor | None, *rest: Any) -> Any:
        x = _dense(x)
        residual = None if residual is None else _dense(residual)
        y, mask, stats = OPS.cpp_batch_norm_act(x, residual, *rest)
        ctx.save_for_backward(x, mask, stats)
        ctx.has_residual, ctx.has_skip = residual is not None, skip is not None
        ctx.set_materialize_grads(False)
        return y, y.detach()  # a second tensor over the same memory, so that autograd keeps the gradients apart

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, g2: Tensor | None) -> Any:
        _refuse_double("BatchNorm")
        if g is None:
            g, g2 = g2, None  # one gradient, whichever it is, is passed as g
        if g is None:
            return (None,) * 10
        g2 = None if g2 is None else _dense(g2)
        dx, dz, dweight, dbias = OPS.cpp_batch_norm_act_backward(_dense(g), g2, *ctx.saved_tensors, ctx.has_residual)
        dresidual, dskip = (None, dz) if ctx.has_skip else (dz if ctx.has_residual else None, None)
        return dx, dresidual, dskip, dweight, dbias, *(None,) * 5


def _forward(
    x: Tensor,  # (N, C, H, W) bf16, channels-last
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
        mask: (N·C·H·W/16,) int16, ReLU's mask, one bit per element; empty without ReLU.
        stats: (3, 64) float32: mean, 1/√(var + eps) and weight/√(var + eps); the C values are repeated to fill 64.
    """
    y = torch.empty_like(x)
    mask = x.new_empty(x.numel() // 16 if relu else 0, dtype=torch.int16)
    stats = x.new_empty((3, 64), dtype=torch.float32)  # the C++ writes float32, whatever torch's default is
    _library().bn_forward(
        *_pointers(x, residual, weight, bias, running_mean, running_var, y, mask if relu else None, stats),
        x.numel(), x.shape[1], momentum, eps,
    )  # fmt: skip
    return y, mask, stats


def _backward(
    g: Tensor,  # (N, C, H, W) bf16, channels-last: the gradient of y
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
    _library().bn_backward(
        *_pointers(g, g2, x, mask if relu else None, stats, dz if store_dz else None, dx, dweight, dbias),
        x.numel(),
        c,
    )
    return dx, dz, dweight, dbias


# ---- 3×3 convolutions --------------------------------------------------------------------------------------


def can_convolve(conv: nn.Conv2d, x: Tensor) -> bool:
    """Return True if conv2d supports conv and x, (N, C, H, W), and the weight's gradient will be computed.

    x has to satisfy `_kernels_accept` and have conv's number of input channels. Under autocast, autocast's dtype has to
    be bf16; without it, the weight's. The convolution has to be 3×3 with zero padding of 1, stride 1 or 2, one group
    and no dilation. Input channels have to be a multiple of 16, output channels a multiple of 8, and both at most 64.
    """
    if not (torch.is_grad_enabled() and conv.weight.requires_grad and has_kernel(conv)):
        return False
    if torch.is_autocast_enabled("cpu"):
        fits = torch.get_autocast_dtype("cpu") == torch.bfloat16
    else:
        fits = conv.weight.dtype == torch.bfloat16
    # A wrong number of channels is left to torch's convolution, which raises.
    return fits and _kernels_accept(x) and x.shape[1] == conv.in_channels


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

    kernels.cpp computes the weight's gradient. It also computes y and the input's gradient, each if `_has_kernel` says
    that it has a kernel for it; otherwise oneDNN does, and always computes y if there is a bias. Products of bf16 are
    summed in float32. The weight's gradient is computed in float32, and is bitwise reproducible for a given number of
    threads. The convolution and x have to satisfy `can_convolve`.

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
        x, w = _dense(x), _dense(weight)
        ctx.save_for_backward(x, w)
        ctx.stride, ctx.has_bias = stride, bias is not None
        if bias is None and _has_kernel(x, w.shape[0], stride):
            y: Tensor = OPS.cpp_convolution(x, w, False)
            return y
        return F.conv2d(x, w, None if bias is None else bias.to(torch.bfloat16), stride, 1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        _refuse_double("convolution")
        x, w = ctx.saved_tensors
        g, s, dx = _dense(g), ctx.stride, None
        if ctx.needs_input_grad[0] and _has_kernel(g, w.shape[1], s):
            dx = OPS.cpp_convolution(g, w, True)
        elif ctx.needs_input_grad[0]:
            masks = [True, False, False]
            dx, _, _ = torch.ops.aten.convolution_backward(
                g, x, w, None, [s, s], [1, 1], [1, 1], False, [0, 0], 1, masks
            )
        return dx, OPS.cpp_weight_gradient(x, g, s), g.sum((0, 2, 3)) if ctx.has_bias else None, None


def _has_kernel(x: Tensor, out_channels: int, stride: int) -> bool:
    """Return True if kernels.cpp has a convolution for x, (N, C, H, W), to `out_channels`; oneDNN computes the others.

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
    _library().convolve(*_pointers(x, w, y), n, c, k, height, width, transposed)
    return y


def _weight_gradient(x: Tensor, dy: Tensor, stride: int) -> Tensor:
    """Return the weight's gradient, (K, C, 3, 3) float32, channels-last.

    x is (N, C, H, W) and dy (N, K, ⌈H/S⌉, ⌈W/S⌉), both bf16 and channels-last; C is a multiple of 16, K of 8.
    """
    (n, c, h, w), k = x.shape, dy.shape[1]
    dw = torch.empty((k, c, 3, 3), dtype=torch.float32, device=x.device, memory_format=torch.channels_last)
    _library().weight_gradient(*_pointers(x, dy, dw), n, c, k, h, w, stride)
    return dw


# ---- details -----------------------------------------------------------------------------------------------


def _dense(t: Tensor) -> Tensor:
    """Return t in bf16 and channels-last; t itself if it already is."""
    return t.to(torch.bfloat16).contiguous(memory_format=torch.channels_last)


def _pointers(*tensors: Tensor | None) -> list[int | None]:
    """Return the addresses of the tensors' data; None, which ctypes passes as a null pointer, for None."""
    return [None if t is None else t.data_ptr() for t in tensors]


def _refuse_double(what: str) -> None:
    """Raise NotImplementedError if the calling backward is itself to be differentiated."""
    if torch.is_grad_enabled():  # a backward runs with gradients enabled only under create_graph=True
        raise NotImplementedError(
            f"fastres_kernels: the C++ {what} has no double backward; use model.norm torch and engine.conv torch if "
            "you need gradients of gradients"
        )


# ---- as operators of torch ---------------------------------------------------------------------------------

_operators: Any = torch.library.Library("fastres_kernels", "FRAGMENT")
for _schema, _function in {
    "cpp_batch_norm_act(Tensor x, Tensor? residual, Tensor weight, Tensor bias, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, float momentum, float eps, bool relu) -> (Tensor, Tensor, Tensor)": _forward,
    "cpp_batch_norm_act_backward(Tensor g, Tensor? g2, Tensor x, Tensor mask, Tensor stats, bool has_residual) "
    "-> (Tensor, Tensor, Tensor, Tensor)": _backward,
    "cpp_convolution(Tensor x, Tensor w, bool transposed) -> Tensor": _convolution,
    "cpp_weight_gradient(Tensor x, Tensor dy, int stride) -> Tensor": _weight_gradient,
}.items():
    _operators.define(_schema)
    _operators.impl(_schema.partition("(")[0], _function, "CPU")
OPS = torch.ops.fastres_kernels


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
