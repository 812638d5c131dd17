"""Test the C++ norm for every instruction set and compiler here: any number of channels, bf16 and float32, inference.

The oracle is torch in float64, on inputs that are rounded to the kernels' dtype first.
"""

from __future__ import annotations

import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from fastres_kernels import BatchNormAct2d
from fastres_kernels.cpu import batchnorm, dispatch_table, library
from fastres_kernels.cpu.dispatch_table import Row
from tests.test_kernels_cpu import in_float64

HERE, WHY = batchnorm.available()
needs_kernels = pytest.mark.skipif(not HERE, reason=WHY)
# An instruction set includes those to its right.
ORDER = ["avx512_bf16", "avx512", "avx2"]
RUNNABLE = ORDER[ORDER.index(library.instruction_set()[0]) :] if library.instruction_set()[0] in ORDER else []
BUILDS = [
    (compiler, isa) for compiler in ("g++", "clang++") for isa in ORDER if (compiler, isa) != ("clang++", "avx512")
]
CHANNELS = [1, 3, 17, 64, 65, 130, 1000, 2048]
# A result is rounded once, to 8 or 24 bits; float32 results are also sums of rounded products.
TOLERANCE = {torch.bfloat16: 2**-8, torch.float32: 1e-5}


def skip_unless_runnable(compiler: str, isa: str) -> None:
    """Skip the test, and say why, if the compiler is missing or the CPU lacks the instruction set."""
    if isa not in RUNNABLE:
        pytest.skip(f"the CPU has no {isa}")
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler} on the PATH")


@cache
def built(compiler: str, isa: str) -> Any:
    """Return the library, or skip the test and say why."""
    skip_unless_runnable(compiler, isa)
    return library.build(batchnorm.SOURCE, compiler, isa)


# Each takes 3 s to compile and 2 s to test; the engine's own two are in the fast tier.
FAST = (("g++", "avx512_bf16"), ("g++", "avx2"))


@pytest.fixture(
    params=[pytest.param(one, id=" ".join(one), marks=() if one in FAST else pytest.mark.slow) for one in BUILDS]
)
def build(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the kernels of one compiler and instruction set, for shapes of every size."""
    monkeypatch.setitem(library._found, batchnorm.SOURCE.name, (built(*request.param), ""))
    monkeypatch.setattr(dispatch_table, "is_faster", lambda x, training, has_residual: True)
    return " ".join(request.param)


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int, shift: float = 0) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + shift
    return values.to(dtype).contiguous(memory_format=torch.channels_last)


def shape_of(channels: int) -> tuple[int, int, int, int]:
    """Return a shape with several chunks of rows, and values after the last whole row unless C is 64 or 2048."""
    return (2, channels, 37, 41) if channels <= 130 else (2, channels, 5, 7)


def norm_of(channels: int, act: str = "relu", **options: Any) -> BatchNormAct2d:
    torch.manual_seed(channels)
    norm = BatchNormAct2d(channels, act=act, algorithm="measured", **options)
    nn.init.uniform_(norm.weight, 0.5, 2)
    nn.init.uniform_(norm.bias, -1, 1)
    return norm


def assert_close(ours: Tensor, oracle: Tensor, roundings: int = 1) -> None:
    """Assert that errors are at most `roundings` roundings of the largest element."""
    assert ours.shape == oracle.shape
    error = (ours.double() - oracle).abs().max().item()
    assert error <= roundings * TOLERANCE[ours.dtype] * oracle.abs().max().item() + 1e-12, f"{error:.2e}"


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("channels", CHANNELS)
def test_any_number_of_channels_has_float64s_values_and_gradients(
    build: str, channels: int, dtype: torch.dtype
) -> None:
    shape = shape_of(channels)
    x, residual, g, g2 = (random(shape, dtype, seed, shift=seed == 0) for seed in range(4))
    for act, adds, forks in (
        ("relu", True, True),
        ("relu", False, False),
        ("none", True, False),
        ("none", False, True),
    ):
        norm, added = norm_of(channels, act), residual.requires_grad_() if adds else None
        leaves = {"x": x.requires_grad_(), "weight": norm.weight, "bias": norm.bias}
        leaves |= {"residual": residual} if adds else {}
        y, skip = norm(x, added, fork=True)
        assert "BatchNormAct" in y.grad_fn.name() and y.is_contiguous(memory_format=torch.channels_last)
        outputs, grads = ([y, skip.gradient], [g, g2]) if forks else ([y], [g])
        gradients = torch.autograd.grad(outputs, list(leaves.values()), grads)
        oracle = in_float64(norm, x, added, sum(grad.double() for grad in grads))
        for name, ours in {"y": y, **dict(zip(leaves, gradients, strict=True))}.items():
            assert_close(ours, oracle[name], roundings=2 if forks else 1)  # dz is rounded before dx is


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["channels-last", "NCHW"])
def test_inference_takes_the_running_statistics(build: str, layout: torch.memory_format, dtype: torch.dtype) -> None:
    for channels in CHANNELS:
        x, residual = (random(shape_of(channels), dtype, seed).contiguous(memory_format=layout) for seed in range(2))
        for act, added in (("relu", residual), ("relu", None), ("none", residual), ("none", None)):
            norm = norm_of(channels, act).eval()
            norm.running_mean.uniform_(-1, 1)
            norm.running_var.uniform_(0.5, 2)
            with torch.no_grad():
                assert norm._backend(x, added) == "cpp"
                y, skip = norm(x, added, fork=True)
                double = [t.double() for t in (x, norm.running_mean, norm.running_var, norm.weight, norm.bias)]
                expected = F.batch_norm(*double, False, 0, norm.eps) + (0 if added is None else added.double())
                expected = F.relu(expected) if act == "relu" else expected
            assert_close(y, expected)
            assert skip.y is y and y.is_contiguous(memory_format=layout)


@needs_kernels
def test_inference_of_planes_takes_a_residual_of_any_strides_and_leaves_small_planes_to_torch(build: str) -> None:
    norm = norm_of(24).eval()
    with torch.no_grad():
        for h, w, backend in ((4, 4, "cpp"), (1, 17, "cpp"), (3, 5, "torch")):
            x, residual = (random((2, 24, h, w), torch.float32, seed).contiguous() for seed in range(2))
            assert norm._backend(x, residual) == backend
            expected = F.relu(F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias) + residual)
            for added in (residual, residual.contiguous(memory_format=torch.channels_last), residual.double()):
                y = norm(x, added)
                assert y.is_contiguous()
                assert_close(y, expected.double())


@needs_kernels
def test_a_tensor_that_is_written_past_the_caches_is_complete(build: str) -> None:
    shape = (4, 130, 51, 53)  # 1.4 million values, and some after the last whole row
    x, residual, g = (random(shape, torch.float32, seed).requires_grad_(seed < 2) for seed in range(3))
    norm = norm_of(130)
    y = norm(x, residual)
    gradients = torch.autograd.grad(y, [x, residual, *norm.parameters()], g)
    oracle = in_float64(norm, x, residual, g.double())
    for name, ours in zip(("y", "x", "residual", "weight", "bias"), (y, *gradients), strict=True):
        assert_close(ours, oracle[name])


@needs_kernels
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("channels", [3, 130])
def test_running_statistics_of_any_number_of_channels_are_torchs(channels: int, momentum: float | None) -> None:
    ours, theirs = norm_of(channels, momentum=momentum), nn.BatchNorm2d(channels, momentum=momentum).double()
    for step in range(3):
        x = random((3, channels, 5, 7), torch.float32, step, shift=step)
        batchnorm.batch_norm_act(x, None, None, ours, True)
        theirs(x.double())
    for name, statistic in theirs.named_buffers():
        torch.testing.assert_close(ours.get_buffer(name).double(), statistic.double(), rtol=1e-6, atol=1e-6)


def bits(channels: int, dtype: torch.dtype, threads: int = 1) -> list[Tensor]:
    """Return the results of a forward, a backward and an inference with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        norm = norm_of(channels)
        x, residual, g, g2 = (random(shape_of(channels), dtype, seed).requires_grad_(seed < 2) for seed in range(4))
        y, skip = norm(x, residual, fork=True)
        gradients = torch.autograd.grad([y, skip.gradient], [x, residual, *norm.parameters()], [g, g2])
        with torch.no_grad():
            return [y, *gradients, *norm.buffers(), norm.eval()(x, residual)]
    finally:
        torch.set_num_threads(before)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_bits_depend_neither_on_threads_nor_on_the_instruction_set(build: str, dtype: torch.dtype) -> None:
    for channels in (17, 64, 208):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(library._found, batchnorm.SOURCE.name, (built("g++", RUNNABLE[0]), ""))
            expected = bits(channels, dtype)
        for threads in (1, 2, 3):
            for ours, wanted in zip(bits(channels, dtype, threads), expected, strict=True):
                assert torch.equal(ours, wanted), (channels, threads)


@needs_kernels
def test_bf16_is_rounded_as_by_torch_and_nan_passes_relu(build: str) -> None:
    values = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    tiny = (values.float().abs() < 2**-100) & (values != 0)  # sums near it are denormal, which the instruction flushes
    x = torch.where(tiny, 1, values).reshape(1, 64, 32, 32).contiguous(memory_format=torch.channels_last)
    added = (x.flip(0, 1, 2, 3).float() * 2**-8).bfloat16().contiguous(memory_format=torch.channels_last)
    for act in ("none", "relu"):
        norm = BatchNormAct2d(64, eps=0, act=act, algorithm="measured").eval()
        with torch.no_grad():
            y = norm(x, added)
        expected = (x.float() + added.float()).bfloat16()
        expected = F.relu(expected) if act == "relu" else expected
        torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)


@needs_kernels
def test_a_nan_stays_in_its_channel(build: str) -> None:
    for channels in (17, 65):
        x = random((2, channels, 5, 7), torch.float32, 0)
        x[1, 3, 4, 6] = float("nan")  # the last pixel, after the last whole row
        y = norm_of(channels)(x.requires_grad_())
        (dx,) = torch.autograd.grad(y.sum(), x)
        for tensor in (y, dx):
            assert tensor.isnan().any((0, 2, 3)).tolist() == [c == 3 for c in range(channels)]
            assert tensor[:, 3].isnan().all()


@needs_kernels
def test_transforms_and_exports_of_a_norm_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch_table, "is_faster", lambda x, training, has_residual: True)
    norm, x = norm_of(24).eval(), random((4, 24, 5, 7), torch.float32, 0)
    with torch.no_grad():
        assert norm._backend(x, None) == "cpp"
        expected = F.relu(nn.BatchNorm2d.forward(norm, x))
        torch.testing.assert_close(torch.func.vmap(lambda image: norm(image[None])[0])(x), expected)
        assert "fastres_kernels" not in str(torch.export.export(norm, (x,)).graph)
        assert "fastres_kernels" not in str(
            make_fx(norm, tracing_mode="symbolic", _allow_non_fake_inputs=True)(x).graph
        )
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, torch.ones_like(x))
            assert forward_ad.unpack_dual(norm(dual)).tangent is not None
    with torch.inference_mode():
        torch.testing.assert_close(norm(x), expected)
        layout = x.contiguous().to_mkldnn()  # its memory is not what its shape says
        torch.testing.assert_close(norm(layout).to_dense(), expected)


# ---- the table ---------------------------------------------------------------------------------------------


def test_the_table_names_buckets_in_which_the_kernels_were_faster_for_the_bytes_of_a_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "fastest.json"
    file.write_text("[]")
    monkeypatch.setattr(dispatch_table, "FILE", file)
    monkeypatch.setattr(dispatch_table, "_isa", lambda: "avx2")
    threads = 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    dispatch_table.forget()
    x = torch.zeros(4, 24, 32, 32)  # 384 KiB
    try:
        assert not dispatch_table.is_measured("avx2") and not dispatch_table.is_faster(x, True, False)
        rows = [Row("avx2", "float32", "training", False, c, 1 << 18, ratio) for c, ratio in ((16, 1.5), (24, 1.2))]
        dispatch_table.write(rows)
        dispatch_table.write([Row("avx2", "float32", "training", False, 32, 1 << 24, 1.5)])
        assert len(dispatch_table.read()) == 3
        assert dispatch_table.is_measured("avx2") and not dispatch_table.is_measured("avx512")
        assert dispatch_table.is_faster(x, True, False)
        assert not dispatch_table.is_faster(x, False, False) and not dispatch_table.is_faster(x, True, True)
        assert not dispatch_table.is_faster(x.bfloat16(), True, False)
        assert not dispatch_table.is_faster(x[:, :20], True, False)  # no multiple of 8
        assert not dispatch_table.is_faster(torch.zeros(16, 24, 32, 32), True, False)  # more bytes
        assert dispatch_table.is_faster(
            torch.zeros(1, 32, 1, 1).expand(1024, 32, 64, 64), True, False
        )  # the last bucket
        dispatch_table.write([Row("avx2", "float32", "inference in NCHW", False, 24, 1 << 18, 1.2)])
        last = x.contiguous(memory_format=torch.channels_last)
        assert dispatch_table.is_faster(x, False, False) and not dispatch_table.is_faster(last, False, False)
        threads = 4
        assert not dispatch_table.is_faster(x, True, False), "96 KiB of a thread were not measured"
        assert dispatch_table.is_faster(torch.zeros(16, 24, 32, 32), True, False)
        threads = 1
        for ratios, faster in (((1.2, 0.97), True), ((1.2, 0.94), False), ((1.0, 1.08), False)):
            dispatch_table.write(row._replace(ratio=ratio) for row, ratio in zip(rows, ratios, strict=True))
            assert dispatch_table.is_faster(x, True, False) == faster
    finally:
        dispatch_table.forget()


def test_the_rows_of_the_table_are_for_instruction_sets_and_dtypes_that_exist() -> None:
    dtypes = {str(dtype).removeprefix("torch.") for dtype in batchnorm.DTYPES}
    for row in dispatch_table.read():
        assert row.isa in library.INSTRUCTION_SETS and row.dtype in dtypes and row.mode in dispatch_table.MODES
        assert row.channels % 8 == 0 and row.ratio > 0


# ---- another processor -------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_aarch64_has_the_same_bits_under_emulation(tmp_path: Path, dtype: torch.dtype) -> None:
    compiler, emulator = "aarch64-linux-gnu-g++", "qemu-aarch64"
    for tool in (compiler, emulator):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} on the PATH")
    driver, program = Path(__file__).parent / "workers/batchnorm_driver.cpp", tmp_path / "driver"
    flags = [flag for flag in library.FLAGS if flag not in ("-shared", "-fPIC")]
    sources = [str(driver), str(batchnorm.SOURCE.path)]
    subprocess.run([compiler, *flags, "-static", *sources, "-o", str(program), "-lgomp"], check=True)
    half = dtype == torch.bfloat16
    for channels, relu in ((1, True), (17, False), (64, True), (130, True)):
        norm = norm_of(channels, "relu" if relu else "none")
        x, residual, g, g2 = (random((2, channels, 9, 11), dtype, seed).requires_grad_(seed < 2) for seed in range(4))
        y, skip = batchnorm.batch_norm_act(x, residual, None, norm, relu)
        dx, dz, dweight, dbias = torch.autograd.grad([y, skip], [x, residual, *norm.parameters()], [g, g2])
        with torch.no_grad():
            inferred = batchnorm.inference(x, residual, norm, relu)
            planes = [t.detach().permute(0, 2, 3, 1).reshape(x.shape) for t in (x, residual)]  # the same memory
            of_planes = batchnorm.inference(*planes, norm, relu)
        given = [norm.weight, norm.bias, *(t.permute(0, 2, 3, 1) for t in (x, residual, g, g2))]
        raw = b"".join(t.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes() for t in given)
        command = [emulator, str(program), str(int(half)), str(x.numel()), str(channels), "99", str(int(relu))]
        output = subprocess.run(command, input=raw, capture_output=True, check=True).stdout
        wanted = [y, dx, dz, dweight, dbias, norm.running_mean, norm.running_var, inferred]
        wanted = [t.detach().permute(0, 2, 3, 1) if t.ndim == 4 else t.detach() for t in wanted]
        wanted.append(of_planes)
        assert output == b"".join(t.contiguous().flatten().view(torch.uint8).numpy().tobytes() for t in wanted)
