"""Test Winograd's convolutions in C++ against float64, and what they leave to others.

Inputs are rounded first, so the oracle has the same inputs as the kernels. The weight is float32, as under autocast.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastres_kernels import Conv2d
from fastres_kernels.cpu import convolution, library
from tests.test_kernels_cpu_norm import FAST, ORDER, RUNNABLE, skip_unless_runnable

BF16, FP32 = torch.bfloat16, torch.float32
HERE = {dtype: convolution.available(dtype) for dtype in (BF16, FP32)}
BUILDS = [(compiler, isa) for compiler in ("g++", "clang++") for isa in ORDER]
TOLERANCE = {BF16: 6e-3, FP32: 1e-6}  # of the norm of the result; oneDNN's convolution in bf16 has 2.4e-3
SHAPES = [  # N, C, K, H, W: at least 192 tiles, odd and even sizes, whole and partial blocks of channels
    (8, 32, 64, 9, 11),
    (200, 64, 32, 1, 2),
    (2, 80, 112, 20, 20),
    (1, 128, 208, 27, 28),
]


@cache
def built(compiler: str, isa: str) -> Any:
    """Return the library, or skip the test and say why."""
    skip_unless_runnable(compiler, isa)
    return library.build(convolution.WINOGRAD, compiler, isa)


@pytest.fixture(
    params=[pytest.param(one, id=" ".join(one), marks=() if one in FAST else pytest.mark.slow) for one in BUILDS]
)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the kernels of one compiler and instruction set."""
    monkeypatch.setitem(library._found, convolution.WINOGRAD.name, (built(*request.param), ""))
    name: str = request.param[1]
    return name


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def random(*shape: int, seed: int, dtype: torch.dtype = FP32) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values


def assert_close(ours: Tensor, oracle: Tensor, dtype: torch.dtype) -> None:
    assert ours.shape == oracle.shape
    error = (ours.double() - oracle).norm() / oracle.norm()
    assert error <= TOLERANCE[dtype], f"{error:.1e}"


def results(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Return y and the gradients of x, the weight and the bias; ours, and float64's for the same inputs."""
    n, c, k, h, w = shape
    leaves = [random(n, c, h, w, seed=0, dtype=dtype), random(k, c, 3, 3, seed=1), random(k, seed=2)]
    g = random(n, k, h, w, seed=3, dtype=dtype)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    y = convolution._Winograd.apply(*leaves)
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    oracle = F.conv2d(*doubles, padding=1)
    ours = [y, *torch.autograd.grad(y, leaves, g)]
    return [t.detach() for t in ours], [oracle.detach(), *torch.autograd.grad(oracle, doubles, g.double())]


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_float64s(isa: str, shape: tuple[int, ...], dtype: torch.dtype, threads: int) -> None:
    if dtype == BF16 and isa != "avx512_bf16":
        pytest.skip("only avx512_bf16 has products of bf16")
    for ours, oracle in zip(*results(shape, dtype), strict=True):
        assert ours.ndim != 4 or ours.is_contiguous(memory_format=torch.channels_last)
        assert_close(ours, oracle, dtype)


@pytest.mark.skipif(len(RUNNABLE) < 2, reason="the CPU has neither AVX-512 nor AVX2, or one of them alone")
def test_float32_results_are_equal_for_all_instruction_sets_and_numbers_of_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    every, before = [], torch.get_num_threads()
    try:
        for isa in (RUNNABLE[0], RUNNABLE[-1]):
            monkeypatch.setitem(library._found, convolution.WINOGRAD.name, (built("g++", isa), ""))
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                every.append(results((3, 48, 80, 19, 22), FP32)[0][:3])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in every[1:] for a, b in zip(every[0], other, strict=True))


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_many_channels_and_tiles_are_winograds_and_the_rest_is_not(dtype: torch.dtype) -> None:
    here, why = HERE[dtype]
    if not here:
        pytest.skip(why)
    least = convolution.LEAST_CHANNELS[library.instruction_set()[0], dtype]

    def used(x: Tensor, *arguments: Any, **options: Any) -> str:
        conv = Conv2d(*arguments, **{"padding": 1, **options})
        conv.algorithm = "cpp"  # type: ignore[assignment]
        with torch.autocast("cpu", BF16, enabled=dtype == BF16):
            return conv(x).grad_fn.name()

    def images(n: int, c: int, side: int = 28) -> Tensor:
        return random(n, c, side, side, seed=0, dtype=dtype)

    assert used(images(1, least), least, least, 3) == "_WinogradBackward"
    assert used(images(1, 128), 128, 256, 3, bias=False) == "_WinogradBackward"
    for x, arguments, options in (
        (images(1, least, 26), (least, least, 3), {}),  # 169 tiles
        (images(1, least), (least, 16, 3), {}),
        (images(1, least), (least, 2 * least + 8, 3), {}),
        (images(1, 128), (128, 128, 3, 2), {}),
        (images(1, 128), (128, 128, 3), {"groups": 2}),
        (images(1, 128), (128, 128, 1), {"padding": 0}),
        (images(1, 128).contiguous(), (128, 128, 3), {}),
    ):
        assert used(x, *arguments, **options) != "_WinogradBackward", arguments


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
    assert_close(dx, oracle.double(), FP32)


@pytest.mark.skipif(not HERE[FP32][0], reason=HERE[FP32][1])
def test_gradients_of_gradients_are_refused_by_name() -> None:
    conv, x = nn.Sequential(Conv2d(64, 64, 3, padding=1)), random(4, 64, 14, 14, seed=0).requires_grad_()
    conv[0].algorithm = "cpp"  # type: ignore[assignment]
    with pytest.raises(NotImplementedError, match="convolution has no double backward; use model"):
        torch.autograd.grad(conv(x).sum(), x, create_graph=True)
