"""Test the convolutions in C++ against float64, Winograd's and direct ones, and which of them is used.

Inputs are rounded first, so the oracle has the same inputs as the kernels. The weight is float32, as under autocast.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastres_kernels import Conv2d
from fastres_kernels.cpu import convolution, library
from tests.test_kernels_cpu_norm import FAST, ORDER, RUNNABLE, skip_unless_runnable

BF16, FP32 = torch.bfloat16, torch.float32
HERE = {dtype: convolution.available(dtype) for dtype in (BF16, FP32)}
SOURCES = {source.name: source for source in (convolution.WINOGRAD, convolution.DIRECT)}
BUILDS = [(compiler, isa) for compiler in ("g++", "clang++") for isa in ORDER]
# Of the norm of the result. oneDNN's convolution has 2.4e-3 in bf16, and Winograd's 1.3e-6 in float32 of 128 channels.
TOLERANCE = {BF16: 6e-3, FP32: 1e-6}
WINOGRADS_TOLERANCE = {BF16: 6e-3, FP32: 2e-6}
WINOGRADS = [  # N, C, K, H, W: odd and even sizes, whole and partial blocks of channels
    (8, 32, 64, 9, 11),
    (200, 64, 32, 1, 2),
    (2, 80, 112, 20, 20),
    (1, 128, 208, 27, 28),
]
DIRECT = [
    (4, 16, 16, 32, 32),
    (2, 32, 32, 16, 16),
    (3, 64, 64, 8, 8),
    (5, 16, 48, 12, 24),
    (2, 64, 32, 9, 9),
    (3, 16, 8, 7, 5),
    (1, 32, 16, 1, 1),
    (2, 16, 16, 2, 1),
    (130, 16, 16, 1, 16),
]


@cache
def built(name: str, compiler: str, isa: str) -> Any:
    """Return the library of the source of that name, or skip the test and say why."""
    skip_unless_runnable(compiler, isa)
    return library.build(SOURCES[name], compiler, isa)


@pytest.fixture(
    params=[pytest.param(one, id=" ".join(one), marks=() if one in FAST else pytest.mark.slow) for one in BUILDS]
)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the kernels of one compiler and instruction set."""
    for name in SOURCES:
        monkeypatch.setitem(library._found, name, (built(name, *request.param), ""))
    return str(request.param[1])


def random(*shape: int, seed: int, dtype: torch.dtype = FP32) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values


def assert_close(ours: Tensor, oracle: Tensor, tolerance: float) -> None:
    assert ours.shape == oracle.shape
    error = (ours.double() - oracle).norm() / oracle.norm()
    assert error <= tolerance, f"{error:.1e}"


def results(
    shape: tuple[int, ...], dtype: torch.dtype, stride: int = 1, bias: bool = True, weights: torch.dtype = FP32
) -> tuple[list[Tensor], list[Tensor]]:
    """Return y and the gradients of x, the weight and the bias; ours, and float64's for the same inputs."""
    n, c, k, h, w = shape
    leaves = [random(n, c, h, w, seed=0, dtype=dtype), random(k, c, 3, 3, seed=1, dtype=weights).float()]
    leaves = [
        leaf.requires_grad_() for leaf in (*leaves, *([random(k, seed=2, dtype=weights).float()] if bias else []))
    ]
    y = convolution.conv2d(*leaves[:2], leaves[2] if bias else None, stride)
    g = random(*y.shape, seed=3, dtype=dtype)
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    oracle = F.conv2d(*doubles, stride=stride, padding=1)
    ours = [y, *torch.autograd.grad(y, leaves, g)]
    return [t.detach() for t in ours], [oracle.detach(), *torch.autograd.grad(oracle, doubles, g.double())]


def choose(monkeypatch: pytest.MonkeyPatch, isa: str, dtype: torch.dtype, *, winograd: bool) -> None:
    """Let Winograd's algorithm compute every convolution, or none. Skip the test if the build cannot."""
    if dtype == BF16 and isa != "avx512_bf16":
        pytest.skip("only avx512_bf16 has products of bf16")
    monkeypatch.setattr(convolution, "by_winograd", lambda x, out_channels, stride: (winograd, winograd))


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("shape", WINOGRADS, ids=str)
def test_winograds_values_and_gradients_are_float64s(
    isa: str, shape: tuple[int, ...], dtype: torch.dtype, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(monkeypatch, isa, dtype, winograd=True)
    for ours, oracle in zip(*results(shape, dtype), strict=True):
        assert ours.ndim != 4 or ours.is_contiguous(memory_format=torch.channels_last)
        assert_close(ours, oracle, WINOGRADS_TOLERANCE[dtype])


@pytest.mark.parametrize(("adds", "relu"), [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_winograds_algorithm_adds_and_rectifies_for_inference(
    isa: str, dtype: torch.dtype, adds: bool, relu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(monkeypatch, isa, dtype, winograd=True)
    x, w = random(2, 80, 19, 20, seed=0, dtype=dtype), random(112, 80, 3, 3, seed=1)
    bias, residual = random(112, seed=2), random(2, 112, 19, 20, seed=3, dtype=dtype)
    oracle = F.conv2d(x.double(), w.double(), bias.double(), padding=1) + (residual.double() if adds else 0)
    y = residual if adds else torch.empty_like(residual)  # the residual is overwritten
    torch.ops.fastres_kernels.cpp_winograd_act(x, w, bias, residual if adds else None, relu, y)
    assert_close(y, oracle.relu() if relu else oracle, WINOGRADS_TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", DIRECT, ids=str)
def test_direct_values_and_gradients_are_float64s(
    isa: str, shape: tuple[int, ...], stride: int, dtype: torch.dtype, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(monkeypatch, isa, dtype, winograd=False)
    for ours, oracle in zip(*results(shape, dtype, stride, bias=shape[2] == 32, weights=dtype), strict=True):
        assert ours.ndim != 4 or ours.is_contiguous(memory_format=torch.channels_last)
        assert_close(ours, oracle, TOLERANCE[dtype])


@pytest.mark.skipif(len(RUNNABLE) < 2, reason="the CPU has neither AVX-512 nor AVX2, or one of them alone")
@pytest.mark.parametrize("shape", [(3, 48, 64, 19, 22), (3, 48, 96, 19, 22)], ids=["few filters", "more filters"])
def test_winograds_float32_results_are_equal_for_all_instruction_sets_and_numbers_of_threads(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    every: list[list[Tensor]] = []
    before, counts = torch.get_num_threads(), (1, 2, 3)
    try:
        for isa in (RUNNABLE[0], RUNNABLE[-1]):
            choose(monkeypatch, isa, FP32, winograd=True)
            monkeypatch.setitem(library._found, "winograd.cpp", (built("winograd.cpp", "g++", isa), ""))
            for count in counts:
                torch.set_num_threads(count)
                every.append(results(shape, FP32)[0][:3])
    finally:
        torch.set_num_threads(before)
    for one, other in zip(every, every[len(counts) :], strict=False):
        assert all(map(torch.equal, one, other))
    # With few filters, each thread sums weight gradients of its own.
    alike = 2 if shape[1] * shape[2] <= 64 * 64 else 3
    assert all(torch.equal(a, b) for other in every for a, b in zip(every[0][:alike], other, strict=False))


class Calls(TorchDispatchMode):
    """Collects the names of this package's operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "fastres_kernels":
            self.names.add(op._opname)
        return op(*args, **kwargs or {})


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_many_channels_and_tiles_are_winograds_and_few_are_direct(dtype: torch.dtype) -> None:
    here, why = HERE[dtype]
    if not here:
        pytest.skip(why)
    least, for_weight = convolution.LEAST_CHANNELS[library.instruction_set()[0], dtype]

    def used(x: Tensor, *arguments: Any, **options: Any) -> set[str]:
        conv = Conv2d(*arguments, **{"padding": 1, **options})
        conv.algorithm = "cpp"  # type: ignore[assignment]
        with Calls() as calls, torch.autocast("cpu", BF16, enabled=dtype == BF16):
            conv(x.requires_grad_()).float().sum().backward()
        return calls.names

    def images(n: int, c: int, side: int = 28) -> Tensor:
        return random(n, c, side, side, seed=0, dtype=dtype)

    winograd = {"cpp_winograd", "cpp_winograd_weight_gradient"}
    assert used(images(2, for_weight), for_weight, for_weight, 3) == winograd
    assert used(images(2, 128), 128, 256, 3, bias=False) == winograd
    if least < for_weight:
        assert used(images(2, least), least, least, 3) == {"cpp_winograd", "cpp_weight_gradient"}
    assert used(images(1, 16, 8), 16, 16, 3, bias=False) == {"cpp_convolution", "cpp_weight_gradient"}
    for x, arguments, options in (
        (images(1, 128, 26), (128, 128, 3), {}),  # 169 tiles in bf16, 49 in float32
        (images(2, 96), (96, 104, 3), {}),
        (images(2, 128), (128, 128, 3, 2), {}),
        (images(2, 128), (128, 128, 3), {"groups": 2}),
        (images(2, 128), (128, 128, 1), {"padding": 0}),
        (images(2, 128).contiguous(), (128, 128, 3), {}),
        (images(10, 512, 7), (512, 512, 3), {}),  # 160 and 40 tiles
    ):
        assert not used(x, *arguments, **options), arguments


@pytest.mark.skipif(not HERE[FP32][0], reason=HERE[FP32][1])
def test_inference_and_a_frozen_weight_have_the_same_values() -> None:
    conv, x = Conv2d(64, 64, 3, padding=1), random(4, 64, 14, 14, seed=0)
    conv.algorithm = "cpp"  # type: ignore[assignment]
    y = conv(x)
    conv.requires_grad_(False)
    with torch.no_grad():
        assert torch.equal(conv(x), y)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(conv(x).sum(), x)
    oracle = F.conv_transpose2d(torch.ones_like(y), conv.weight, padding=1)
    assert_close(dx, oracle.double(), WINOGRADS_TOLERANCE[FP32])


@pytest.mark.skipif(not HERE[FP32][0], reason=HERE[FP32][1])
def test_gradients_of_gradients_are_refused_by_name() -> None:
    conv, x = nn.Sequential(Conv2d(64, 64, 3, padding=1)), random(4, 64, 14, 14, seed=0).requires_grad_()
    conv[0].algorithm = "cpp"  # type: ignore[assignment]
    with pytest.raises(NotImplementedError, match="convolution has no double backward; use model"):
        torch.autograd.grad(conv(x).sum(), x, create_graph=True)
