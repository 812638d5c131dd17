"""BatchNorm + ReLU (+ add) and 3×3 convolutions in bf16, for training on a CPU with AVX-512 and its bf16.

kernels.cpp knows no torch: the machine's own g++ builds it, once, in two seconds; ctypes calls it; it runs in the threads
of torch's OpenMP. Each of its functions is an operator of torch, so that profilers and counters see it:

    torch.ops.fastres_kernels.cpp_batch_norm_act             (x, residual, …) -> (y, passed, stats)
    torch.ops.fastres_kernels.cpp_batch_norm_act_backward    (g, g2, x, …) -> (dx, dz, dweight, dbias)
    torch.ops.fastres_kernels.cpp_convolution                (x, w, turned) -> y
    torch.ops.fastres_kernels.cpp_weight_gradient            (x, dy, stride) -> dw

The autograd functions around them are not for torch.compile; under it torch's own operations run. What they gain is
measured in docs/EXPERIMENTS.md.
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
ISA = ("avx512f", "avx512bw", "avx512vl", "avx512_bf16", "avx512_vbmi2")  # as /proc/cpuinfo names them
FLAGS = (
    *("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp"),
    *(f"-m{name.replace('_', '')}" for name in ISA),
)
POINTER, INTEGER, REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {  # of kernels.cpp: what they return, what they take
    "bn_forward": (None, [POINTER] * 9 + [INTEGER] * 2 + [REAL] * 2),
    "bn_backward": (None, [POINTER] * 9 + [INTEGER] * 2),
    "weight_gradient": (None, [POINTER] * 3 + [INTEGER] * 6),
    "convolve": (None, [POINTER] * 3 + [INTEGER] * 5 + [ctypes.c_bool]),
}


# ---- whether they are there --------------------------------------------------------------------------------


@cache
def available() -> tuple[bool, str]:
    """Whether this machine has the kernels, and the reason with the remedy in words. Builds them at the first call."""
    missing = missing_instructions()
    if missing:
        return False, missing
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        return False, f"no C++ compiler {compiler} on the PATH: apt-get install g++"
    try:
        _library.append(build(compiler))
    except (OSError, subprocess.CalledProcessError) as error:
        said = str(getattr(error, "stderr", "") or error).strip().splitlines()
        return False, f"{compiler} did not build kernels/cpu/kernels.cpp: {said[0] if said else error}"
    return True, f"the CPU has avx512_bf16, and {compiler} built the kernels for it"


def missing_instructions() -> str:
    """What this machine's processor lacks for the kernels, in words; empty where it lacks nothing."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "the C++ kernels are for Linux on x86-64"
    words = Path("/proc/cpuinfo").read_text().split()
    missing = [name for name in ISA if name not in words]
    return f"the CPU has no {', '.join(missing)}" if missing else ""


def build(compiler: str) -> ctypes.CDLL:
    """The library, compiled where the user's cache does not have it of this source and these flags.

    Raises CalledProcessError where it cannot be compiled and OSError where it cannot be loaded.
    """
    key = hashlib.sha256(SOURCE.read_bytes() + " ".join((compiler, *FLAGS)).encode()).hexdigest()[:16]
    file = f"kernels-{key}.so"
    store: Path | None = None
    try:
        store = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fastres"
        with suppress(OSError):  # not there, or damaged: then it is built anew
            return load(store / file)
        store.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=store)
    except (OSError, RuntimeError):  # a home that cannot be written, or none: built anew in every process
        store, folder = None, tempfile.TemporaryDirectory()
    with folder as name:
        fresh = Path(name) / file
        command = [compiler, *FLAGS, str(SOURCE), "-o", str(fresh)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        library = load(fresh)  # before it is kept: what does not load is not
        if store:
            fresh.replace(store / file)  # whole or not at all, whichever process comes first
    return library


def load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for name, (result, arguments) in FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


_library: list[ctypes.CDLL] = []  # the one, once it is there


def _ready(x: Tensor) -> bool:
    """Whether x is of the kind that the kernels take, they are there, and torch.compile is not looking."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.bfloat16
        and x.ndim == 4
        and x.numel() > 0
        and not torch.compiler.is_compiling()
        and available()[0]
    )


# ---- BatchNorm + ReLU (+ add) ------------------------------------------------------------------------------


def normalises(norm: nn.BatchNorm2d, x: Tensor) -> bool:
    """Whether batch_norm_act takes x, (N, C, H, W), in training: bf16, a divisor of 64 channels, a multiple of 64
    values and at least two of each channel; parameters and statistics in float32."""
    c = norm.num_features
    return (
        norm.training
        and 64 % c == 0  # of 128 and more ATen's backward was faster: 0.8 x
        and _ready(x)
        and x.shape[1] == c
        and x.numel() % 64 == 0
        and x.numel() > c
        and all(t is not None and t.dtype == torch.float32 for t in (norm.weight, norm.bias))
        and (norm.running_mean is None or norm.running_mean.dtype == torch.float32)
    )


def batch_norm_act(
    x: Tensor,  # (N, C, H, W) bf16
    residual: Tensor | None,  # (N, C, H, W)
    skip: Tensor | None,  # (N, C, H, W); with it, the residual's gradient goes here
    norm: nn.BatchNorm2d,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    """y = act(BatchNorm(x) + residual), channels-last, bf16, with x's statistics, and y again, as a skip: the gradients
    of the two are added in the backward's first pass. Moves the running statistics as torch does.

    Two passes over x forward and two over x and the gradient backward, ReLU's mask as bits between them: with residual
    8 bytes an element forward and 12 backward, 14 where two gradients come. Sums are float32 over 16,384 values, then
    float64, in an order that does not depend on the number of threads. Gradients of gradients are refused by a
    NotImplementedError.
    """
    state: tuple[Any, ...] = (None, None, 0.0)
    if norm.track_running_stats:
        batches = norm.num_batches_tracked
        assert batches is not None
        batches.add_(1)
        momentum = 1 / int(batches) if norm.momentum is None else norm.momentum
        state = (norm.running_mean, norm.running_var, momentum)
    return _BatchNormAct.apply(x, residual, skip, norm.weight, norm.bias, *state, norm.eps, relu)


class _BatchNormAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, skip: Tensor | None, *rest: Any) -> Any:
        x = _dense(x)
        residual = None if residual is None else _dense(residual)
        y, passed, stats = OPS.cpp_batch_norm_act(x, residual, *rest)
        ctx.save_for_backward(x, passed, stats)
        ctx.has_residual, ctx.has_skip = residual is not None, skip is not None
        ctx.set_materialize_grads(False)
        return y, y.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, g2: Tensor | None) -> Any:
        _refuse_double("BatchNorm")
        if g is None:
            g, g2 = g2, None
        if g is None:
            return (None,) * 10
        g2 = None if g2 is None else _dense(g2)
        dx, dz, dweight, dbias = OPS.cpp_batch_norm_act_backward(
            _dense(g), g2, *ctx.saved_tensors, ctx.has_residual
        )
        dresidual, dskip = (None, dz) if ctx.has_skip else (dz if ctx.has_residual else None, None)
        return dx, dresidual, dskip, dweight, dbias, *(None,) * 5


def _forward(
    x: Tensor,  # (N, C, H, W)
    residual: Tensor | None,  # (N, C, H, W)
    weight: Tensor,  # (C,) float32
    bias: Tensor,  # (C,) float32
    running_mean: Tensor | None,  # (C,) float32
    running_var: Tensor | None,  # (C,) float32
    momentum: float,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y; of each element a bit, whether ReLU let it through, (NCHW/16,) int16, empty without ReLU; mean, 1/deviation
    and weight/deviation, (3, 64) float32, over and over where C is less."""
    y = torch.empty_like(x)
    passed = torch.empty(x.numel() // 16 if relu else 0, dtype=torch.int16)
    stats = torch.empty(3, 64)
    _library[0].bn_forward(
        *_pointers(x, residual, weight, bias, running_mean, running_var, y, passed if relu else None, stats),
        x.numel(), x.shape[1], momentum, eps,
    )  # fmt: skip
    return y, passed, stats


def _backward(
    g: Tensor,  # (N, C, H, W)
    g2: Tensor | None,  # (N, C, H, W), to be added
    x: Tensor,  # (N, C, H, W)
    passed: Tensor,
    stats: Tensor,
    has_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx; the residual's gradient, empty without residual and g2; dweight and dbias, (C,) float32."""
    keeps, relu, c = has_residual or g2 is not None, len(passed) > 0, x.shape[1]
    dx, dz = torch.empty_like(x), torch.empty_like(x) if keeps else x.new_empty(0)
    dweight, dbias = torch.empty(c), torch.empty(c)
    _library[0].bn_backward(
        *_pointers(g, g2, x, passed if relu else None, stats, dz if keeps else None, dx, dweight, dbias),
        x.numel(),
        c,
    )
    return dx, dz, dweight, dbias


# ---- 3×3 convolutions --------------------------------------------------------------------------------------


def convolves(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether conv2d takes x, (N, C, H, W), in training: bf16; 3×3, padding 1,
    stride 1 or 2, no groups or dilation, a multiple of 16 channels in and of 8 out, 64 at most."""
    if not (torch.is_grad_enabled() and conv.weight.requires_grad and _three_by_three(conv)):
        return False
    if torch.is_autocast_enabled("cpu"):
        fits = torch.get_autocast_dtype("cpu") == torch.bfloat16
    else:
        fits = conv.weight.dtype == torch.bfloat16
    return fits and _ready(x) and x.shape[1] == conv.in_channels  # else torch says what is wrong


def _three_by_three(conv: nn.Conv2d) -> bool:
    return (
        conv.kernel_size == (3, 3)
        and conv.stride in ((1, 1), (2, 2))
        and conv.padding in ((1, 1), "same")
        and conv.padding_mode == "zeros"
        and conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.in_channels % 16 == 0
        and conv.out_channels % 8 == 0
        and max(conv.in_channels, conv.out_channels) <= 64  # of more oneDNN is as good
    )


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """The convolution, 3×3 with padding 1: x (N, C, H, W), weight (K, C, 3, 3), bias (K,) -> (N, K, ⌈H/S⌉, ⌈W/S⌉)
    bf16, channels-last. Products of bf16 are summed in float32; the weights' gradient is never rounded to bf16, and
    the same for the same number of threads. Gradients of gradients are refused by a NotImplementedError."""
    return _Conv2d.apply(x, weight, bias, stride)


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
        x, w = _dense(x), _dense(weight)
        ctx.save_for_backward(x, w)
        ctx.stride, ctx.has_bias = stride, bias is not None
        if bias is None and _has_kernel(x, w.shape[0], stride):
            return OPS.cpp_convolution(x, w, False)
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
    """Whether kernels.cpp convolves x, (N, C, H, W); without one for the shape oneDNN does."""
    _, c, h, w = x.shape
    return (
        stride == 1
        and c in (16, 32, 64)
        and out_channels % 16 == 0
        and (w % 16 == 0 or (w % 8 == h % 2 == 0))
    )


def _convolution(x: Tensor, w: Tensor, turned: bool) -> Tensor:
    """Stride 1: the convolution of x, (N, C, H, W), with w, (K, C, 3, 3), or, turned, of the gradient of one,
    (N, K, H, W), the gradient of its input."""
    (n, _, height, width), (k, c) = x.shape, w.shape[:2]
    y = torch.empty((n, c if turned else k, height, width), dtype=x.dtype, memory_format=torch.channels_last)
    _library[0].convolve(*_pointers(x, w, y), n, c, k, height, width, turned)
    return y


def _weight_gradient(x: Tensor, dy: Tensor, stride: int) -> Tensor:
    """x (N, C, H, W) and dy (N, K, ⌈H/S⌉, ⌈W/S⌉), bf16, channels-last -> (K, C, 3, 3) float32, channels-last. C a
    multiple of 16, K of 8."""
    (n, c, h, w), k = x.shape, dy.shape[1]
    dw = torch.empty((k, c, 3, 3), memory_format=torch.channels_last)
    _library[0].weight_gradient(*_pointers(x, dy, dw), n, c, k, h, w, stride)
    return dw


# ---- details -----------------------------------------------------------------------------------------------


def _dense(t: Tensor) -> Tensor:
    """t in bf16, channels-last; itself where it is."""
    return t.to(torch.bfloat16).contiguous(memory_format=torch.channels_last)


def _pointers(*tensors: Tensor | None) -> list[int | None]:
    return [None if t is None else t.data_ptr() for t in tensors]


def _refuse_double(what: str) -> None:
    if torch.is_grad_enabled():  # of a backward under create_graph=True alone
        raise NotImplementedError(
            f"fastres_kernels: the C++ {what} has no double backward; use model.norm torch and engine.conv torch where "
            "gradients of gradients are needed"
        )


# ---- as operators of torch ---------------------------------------------------------------------------------

_operators = torch.library.Library("fastres_kernels", "FRAGMENT")
for _schema, _function in {
    "cpp_batch_norm_act(Tensor x, Tensor? residual, Tensor weight, Tensor bias, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, float momentum, float eps, bool relu) -> (Tensor, Tensor, Tensor)": _forward,
    "cpp_batch_norm_act_backward(Tensor g, Tensor? g2, Tensor x, Tensor passed, Tensor stats, bool has_residual) "
    "-> (Tensor, Tensor, Tensor, Tensor)": _backward,
    "cpp_convolution(Tensor x, Tensor w, bool turned) -> Tensor": _convolution,
    "cpp_weight_gradient(Tensor x, Tensor dy, int stride) -> Tensor": _weight_gradient,
}.items():
    _operators.define(_schema)
    _operators.impl(_schema.partition("(")[0], _function, "CPU")
OPS = torch.ops.fastres_kernels


@register_flop_formula(OPS.cpp_convolution)
def _flops_of_convolution(x: Any, w: Any, turned: bool, *, out_shape: Any = None, **_: Any) -> int:
    """A multiply-add as two."""
    (n, _, height, width), (k, c) = x, w[:2]
    return 2 * n * height * width * k * c * 9


@register_flop_formula(OPS.cpp_weight_gradient)
def _flops_of_weight_gradient(x: Any, dy: Any, stride: int, *, out_shape: Any = None, **_: Any) -> int:
    n, k, height, width = dy
    return 2 * n * height * width * k * x[1] * 9
