"""Test the C++ kernels for CPUs against torch's operations in float64, and the cases that they leave to torch.

Inputs are rounded to bf16 first, so the oracle has the same inputs as the kernels. test_kernels_cpu_norm.py tests the
norm in float32, with other numbers of channels and for other instruction sets.
"""

from __future__ import annotations

import functools
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastres.config.schema import Config, EngineConfig, ModelConfig
from fastres.models.registry import build_model
from fastres.profiling.trace import WorkCount
from fastres.training.engine import _faster_norm, resolve_engine
from fastres.utils.errors import UsageError
from fastres_kernels import BatchNormAct2d, Conv2d, Skip
from fastres_kernels.cpu import convolution, dispatch_table, library
from tests.commands import ROOT, run_fastres, run_module, run_python

CHECKOUT = Path(__file__).parent.parent
HERE, WHY = convolution.available(torch.bfloat16)
needs_kernels = pytest.mark.skipif(not HERE, reason=WHY)
# A bf16 result is rounded once, to 8 bits. A float32 result is a sum of products of bf16 values, in another order.
TOLERANCE = {torch.bfloat16: 2**-8, torch.float32: 1e-5}
SHAPES = [(8, 16, 32, 32), (3, 64, 8, 8), (2, 8, 5, 4), (64, 4, 1, 1), (1, 32, 2, 1), (128, 1, 3, 1)]


@pytest.fixture(autouse=True)
def small_tensors_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every shape run in C++, although the tensors of these tests are too small to be faster there."""
    monkeypatch.setattr(dispatch_table, "is_faster", lambda x, training, has_residual: True)


def random(*shape: int, seed: int = 0, scale: float = 1, shift: float = 0) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale + shift
    return values.to(torch.bfloat16).contiguous(memory_format=torch.channels_last)


def norm_of(channels: int, act: str = "relu", **options: Any) -> BatchNormAct2d:
    """Return a norm with random parameters that uses the C++ kernels although Triton interprets in this process."""
    norm = BatchNormAct2d(channels, act=act, algorithm="measured", **options)
    nn.init.uniform_(norm.weight, 0.5, 2)
    nn.init.uniform_(norm.bias, -1, 1)
    return norm


def assert_close(ours: Tensor, oracle: Tensor, roundings: int = 1) -> None:
    """Assert that errors are at most `roundings` roundings of the largest element.

    The bound is not relative to each element, because a small element may be the difference of large terms.
    """
    assert ours.shape == oracle.shape
    error = (ours.double() - oracle).abs().max().item()
    assert error <= roundings * TOLERANCE[ours.dtype] * oracle.abs().max().item() + 1e-12, f"{error:.2e}"


def in_float64(norm: BatchNormAct2d, x: Tensor, residual: Tensor | None, grad: Tensor) -> dict[str, Tensor]:
    """Compute y and the gradients of x, residual, weight and bias for the gradient of y, with torch in float64."""
    leaves = {"x": x, "weight": norm.weight, "bias": norm.bias}
    if residual is not None:
        leaves["residual"] = residual
    leaves = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    y = F.batch_norm(leaves["x"], None, None, leaves["weight"], leaves["bias"], True, eps=norm.eps)
    y = y if residual is None else y + leaves["residual"]
    y = F.relu(y) if norm.act == "relu" else y
    gradients = torch.autograd.grad(y, list(leaves.values()), grad.double())
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


# ---- BatchNorm + ReLU (+ add) ------------------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize("act", ["relu", "none"])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_norms_values_and_gradients_are_float64s(
    shape: tuple[int, ...], with_residual: bool, act: str, threads: int
) -> None:
    norm = norm_of(shape[1], act)
    x = random(*shape, seed=1, scale=2, shift=3).requires_grad_()
    residual = random(*shape, seed=2).requires_grad_() if with_residual else None
    grad = random(*shape, seed=3)
    y = norm(x, residual)
    assert "BatchNormAct" in y.grad_fn.name() and y.is_contiguous(memory_format=torch.channels_last)
    leaves = {"x": x, "weight": norm.weight, "bias": norm.bias} | (
        {"residual": residual} if residual is not None else {}
    )
    gradients = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), grad), strict=True))
    oracle = in_float64(norm, x, residual, grad)
    if act == "relu" and with_residual:
        # If a sum is within a rounding of zero, ReLU's mask may differ from the oracle's. No sum here is.
        doubtful = (oracle["y"] < 0.05) & ((oracle["y"] > 0) != (y > 0))
        assert not doubtful.any()
    for name, ours in {"y": y, **gradients}.items():
        assert_close(ours, oracle[name])


@needs_kernels
@pytest.mark.parametrize("act", ["relu", "none"])
def test_a_skip_connections_gradient_is_added_to_the_other(act: str) -> None:
    norm, follower = norm_of(16, act), norm_of(16)
    x = random(4, 16, 8, 8, scale=2).requires_grad_()
    z = random(4, 16, 8, 8, seed=1).requires_grad_()
    y, skip = norm(x, fork=True)
    assert isinstance(skip, Skip)
    out = follower(z, skip)
    grads = random(4, 16, 8, 8, seed=2), random(4, 16, 8, 8, seed=3)
    dx, dz = torch.autograd.grad([y, out], [x, z], grads)
    dskip = in_float64(follower, z, y.detach(), grads[1])
    assert_close(dz, dskip["x"])
    added = in_float64(norm, x, None, grads[0].double() + dskip["residual"])
    assert_close(dx, added["x"], roundings=3)  # the skip connection's gradient, the sum, dx
    # The skip connection's gradient alone.
    y, skip = norm(x, fork=True)
    (dx,) = torch.autograd.grad(follower(z, skip), x, grads[1])
    assert_close(dx, in_float64(norm, x, None, dskip["residual"])["x"], roundings=2)


@needs_kernels
def test_a_skip_that_the_reference_made_has_its_gradient_too() -> None:
    reference = BatchNormAct2d(16)
    x, z, grad = (random(4, 16, 8, 8, seed=seed) for seed in range(3))
    x.requires_grad_()
    _, skip = reference.eval()(x, fork=True)
    assert skip.gradient is not skip.y
    norm = norm_of(16)
    (dx,) = torch.autograd.grad(norm(z, skip), x, grad)
    dresidual = in_float64(norm, z, skip.y.detach(), grad)["residual"]
    assert_close(dx, dresidual * (skip.y > 0) / (1 + reference.eps) ** 0.5, roundings=2)


@needs_kernels
@pytest.mark.parametrize("momentum", [0.1, 0.9, 0.0, None])
def test_running_statistics_are_torchs(momentum: float | None) -> None:
    ours, theirs = norm_of(16, momentum=momentum), nn.BatchNorm2d(16, momentum=momentum).double()
    for step in range(5):
        x = random(4, 16, 5, 4, seed=step, scale=step + 1, shift=step)
        assert "BatchNormAct" in ours(x).grad_fn.name()
        theirs(x.double())
    for name, statistic in theirs.named_buffers():
        torch.testing.assert_close(ours.get_buffer(name).double(), statistic.double(), rtol=1e-6, atol=1e-6)


@needs_kernels
def test_without_running_statistics_none_are_kept() -> None:
    norm = norm_of(16, track_running_stats=False)
    assert "BatchNormAct" in norm(random(4, 16, 8, 8)).grad_fn.name() and norm.running_mean is None


@needs_kernels
def test_the_variance_holds_where_the_mean_is_a_thousand_deviations() -> None:
    # Inputs are bf16, with steps of 16 at 4,000. Sums of squares about zero would lose the variance in float32.
    x = random(64, 16, 16, 16, scale=8, shift=4000)
    norm = norm_of(16, momentum=1.0)
    norm(x)
    torch.testing.assert_close(norm.running_var.double(), x.double().var((0, 2, 3)), rtol=1e-5, atol=0)


@needs_kernels
def test_a_norms_bits_do_not_depend_on_the_number_of_threads() -> None:
    x, grad = random(16, 16, 32, 32).requires_grad_(), random(16, 16, 32, 32, seed=1)

    def bits(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        norm = norm_of(16)
        y = norm(x)
        return [y, *torch.autograd.grad(y, [x, norm.weight, norm.bias], grad), *norm.buffers()]

    before = torch.get_num_threads()
    try:
        for first, second in pairwise([bits(1), bits(2), bits(3), bits(3)]):
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    finally:
        torch.set_num_threads(before)


@needs_kernels
def test_a_nan_is_seen_and_not_hidden_by_relu() -> None:
    x = random(4, 16, 8, 8)
    x[0, 3, 0, 0] = float("nan")
    norm = norm_of(16)
    y = norm(x.requires_grad_())
    (dx,) = torch.autograd.grad(y.sum(), x)
    for tensor in (y, dx):
        assert tensor[:, 3].isnan().all() and not tensor[:, :3].isnan().any()
    assert norm.running_mean.isnan().tolist() == [c == 3 for c in range(16)]


@needs_kernels
@pytest.mark.parametrize("kind", ["expanded", "NCHW", "float32"])
def test_gradients_and_residuals_of_any_strides_and_type(kind: str) -> None:
    norm, x, residual = norm_of(16), random(4, 16, 8, 8).requires_grad_(), random(4, 16, 8, 8, seed=1)
    grad = random(4, 16, 1, 1, seed=2).expand(4, 16, 8, 8)
    other = {"expanded": grad, "NCHW": grad.contiguous(), "float32": grad.float()}[kind]
    given = {"expanded": residual, "NCHW": residual.contiguous(), "float32": residual.float()}[kind]
    y = norm(x, given.requires_grad_())
    dx, dresidual = torch.autograd.grad(y.to(other.dtype), [x, given], other)
    oracle = in_float64(norm, x, residual, grad)
    assert_close(y, oracle["y"])
    assert_close(dx, oracle["x"])
    assert_close(dresidual.bfloat16(), oracle["residual"])


@needs_kernels
def test_what_the_norm_does_not_take_is_torchs_to_the_bit() -> None:
    x = random(4, 16, 8, 8)
    for kind, given in {
        "NCHW": x.contiguous(),
        "a slice": random(8, 16, 8, 8)[::2],
        "float16": x.half(),
        "eval mode with gradients": x,
    }.items():
        training = kind != "eval mode with gradients"
        ours, plain = norm_of(16).train(training), nn.BatchNorm2d(16).train(training)
        plain.load_state_dict(ours.state_dict())
        y, theirs = ours(given), F.relu(plain(given))
        assert torch.equal(y, theirs) and y.stride() == theirs.stride(), kind
        assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), plain.buffers(), strict=True)), kind


def test_on_a_cpu_the_module_never_runs_the_reference() -> None:
    """The reference is an oracle, and slow. Here Triton's interpreter would run instead, so ask another process."""
    code = """
import torch, torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from fastres_kernels import BatchNormAct2d

class Ops(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        assert not str(op).startswith("fastres_kernels.batch_norm_act"), op
        return op(*args, **kwargs or {})

for algorithm in ("two_pass", "cooperative", "measured"):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for training in (True, False):
            ours, plain = BatchNormAct2d(24, algorithm=algorithm).train(training), nn.BatchNorm2d(24).train(training)
            if dtype == torch.float64:
                ours, plain = ours.double(), plain.double()
            x, r = (torch.randn(4, 24, 6, 6, dtype=dtype, requires_grad=True) for _ in range(2))
            with Ops():
                first, skip = ours(x, fork=True)
                y = ours(first, residual=skip) + ours(x, residual=r)
                grads = torch.autograd.grad(y.sum(), (x, r))
            one = F.relu(plain(x))
            expected = F.relu(plain(one) + one) + F.relu(plain(x) + r)
            torch.testing.assert_close(y, expected)
            for a, b in zip(grads, torch.autograd.grad(expected.sum(), (x, r))):
                torch.testing.assert_close(a, b)
print("done")
"""
    done = run_python("-c", code, cwd=ROOT)
    assert done.stdout == "done\n", done.stderr


@needs_kernels
def test_bad_input_is_refused_as_by_torch() -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm_of(64)(random(1, 64, 1, 1))
    with pytest.raises(ValueError, match=r"residual has shape \(4, 16, 4, 4\), the input \(4, 16, 8, 8\)"):
        norm_of(16)(random(4, 16, 8, 8), random(4, 16, 4, 4))
    assert norm_of(16)(random(0, 16, 8, 8)).shape == (0, 16, 8, 8)


# ---- 3×3 convolutions --------------------------------------------------------------------------------------


def conv_of(c: int, k: int, stride: int = 1, bias: bool = False) -> Conv2d:
    conv = Conv2d(c, k, 3, stride, padding=1, bias=bias).to(memory_format=torch.channels_last)
    conv.algorithm = "cpp"
    return conv


@needs_kernels
def test_repetitions_of_the_weight_gradient_are_bitwise_identical() -> None:
    x, dy = random(32, 16, 16, 16), random(32, 32, 8, 8, seed=1)
    first = torch.ops.fastres_kernels.cpp_weight_gradient(x, dy, 2)
    assert all(torch.equal(torch.ops.fastres_kernels.cpp_weight_gradient(x, dy, 2), first) for _ in range(5))


@needs_kernels
def test_what_the_convolution_does_not_take_is_torchs() -> None:
    def used(conv: nn.Conv2d, x: Tensor, autocast: bool = True) -> str:
        conv.algorithm = "cpp"  # type: ignore[assignment]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = conv(x)
        return y.grad_fn.name() if y.grad_fn else "none"

    x = random(2, 16, 8, 8)
    cpp = "_Conv2dBackward"
    assert used(Conv2d(16, 16, 3, padding=1), x) == cpp
    assert used(Conv2d(16, 16, 3, padding="same"), x) == cpp
    assert used(Conv2d(16, 16, 3, padding=1).bfloat16(), x, autocast=False) == cpp
    for conv in (
        Conv2d(16, 16, 3),  # no padding
        Conv2d(16, 16, 3, padding=1, padding_mode="reflect"),
        Conv2d(16, 16, 3, padding=2, dilation=2),
        Conv2d(16, 16, 3, padding=1, groups=2),
        Conv2d(16, 16, 3, 3, padding=1),  # stride 3
        Conv2d(16, 16, 1),
        Conv2d(16, 12, 3, padding=1),
        Conv2d(16, 128, 3, padding=1),  # Winograd's is for at least 32 channels
    ):
        assert used(conv, x) != cpp, conv
    assert used(Conv2d(16, 16, 3, padding=1), x.float()) != cpp
    assert used(Conv2d(16, 16, 3, padding=1).requires_grad_(False), x) == "none"
    with torch.no_grad():
        assert used(Conv2d(16, 16, 3, padding=1), x) == "none"


# ---- both --------------------------------------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize("kind", ["norm", "conv"])
def test_gradients_of_gradients_are_refused_by_name(kind: str) -> None:
    module: nn.Module = norm_of(16) if kind == "norm" else conv_of(16, 16).bfloat16()
    x = random(4, 16, 8, 8).requires_grad_()
    with pytest.raises(NotImplementedError, match="has no double backward; use model"):
        torch.autograd.grad(module(x).sum(), x, create_graph=True)


@needs_kernels
@pytest.mark.parametrize(("name", "options"), [("resnet20", {}), ("mini_resnet", {}), ("speed_resnet", {})])
def test_networks_train_as_through_torch(name: str, options: dict[str, Any]) -> None:
    """Check that the losses of ten steps are about as near to those in float32 as torch's losses in bf16 are."""
    side = 28 if name == "mini_resnet" else 32
    images = torch.randn(32, 3, side, side).to(memory_format=torch.channels_last)
    labels = torch.randint(10, (32,))

    def losses(precision: Any, norm: Any = "auto", conv: Any = "auto") -> tuple[Tensor, set[str]]:
        fields = EngineConfig(precision=precision, conv=conv)
        engine = resolve_engine(Config(model=ModelConfig(norm=norm), engine=fields))
        torch.manual_seed(0)
        model = engine.place(build_model(name, norm=engine.norm, **options))
        optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
        seen, used = [], set()
        for _ in range(10):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                loss = F.cross_entropy(model(images).float(), labels)
            used |= backwards_of(loss)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(loss.detach())
        return torch.stack(seen), used

    exact, _ = losses("fp32", norm="torch", conv="torch")
    theirs, _ = losses("bf16", norm="torch", conv="torch")
    ours, used = losses("bf16")
    assert "_BatchNormActBackward" in used and "_Conv2dBackward" in used
    assert (ours - exact).abs().max() <= 3 * (theirs - exact).abs().max() + 0.01


@needs_kernels
def test_operator_counters_see_the_kernels() -> None:
    x, flops, calls = random(2, 16, 8, 8).requires_grad_(), {}, {}
    for algorithm in ("torch", "cpp"):
        net = nn.Sequential(conv_of(16, 16), norm_of(16), conv_of(16, 32, 2), conv_of(32, 32))
        for module in (net[0], net[2], net[3]):
            module.algorithm = algorithm
        with FlopCounterMode(display=False) as counter, WorkCount() as work:
            with torch.autocast("cpu", torch.bfloat16):
                y = net(x)
            y.backward(torch.ones_like(y))
        flops[algorithm] = counter.get_total_flops()
        assert work.flops == flops[algorithm]
        calls[algorithm] = {key[0]: n for key, n in work.calls.items() if "cpp" in key[0]}
    assert flops["cpp"] == flops["torch"] > 0
    assert {name.removeprefix("fastres_kernels::cpp_") for name in calls["cpp"]} == {
        "batch_norm_act", "batch_norm_act_backward", "convolution", "weight_gradient",
    }  # fmt: skip


def backwards_of(loss: Tensor) -> set[str]:
    """Return the names of all autograd nodes that the loss depends on."""
    seen, new = set(), [loss.grad_fn]
    while new:
        node = new.pop()
        if node is not None and node not in seen:
            seen.add(node)
            new += [parent for parent, _ in node.next_functions]
    return {node.name() for node in seen}


# ---- the engine's choice -----------------------------------------------------------------------------------


def choice(**engine: Any) -> tuple[str, str, str]:
    """Return the engine's norm and conv, and its reason for conv."""
    resolved = resolve_engine(Config(engine=EngineConfig(device="cpu", **engine)))
    return resolved.norm, resolved.conv, next(r for r in resolved.reasons if r.startswith("conv: "))


@needs_kernels
def test_auto_chooses_the_kernels_if_they_apply_and_otherwise_gives_the_reason() -> None:
    assert choice(precision="bf16") == ("measured", "cpp", f"conv: cpp ({WHY})")
    assert choice(precision="fp32") == ("measured", "cpp", f"conv: cpp ({convolution.available(torch.float32)[1]})")
    for fields, why in (
        ({"precision": "fp64"}, "the C++ convolutions compute in bf16 and fp32, not fp64"),
        ({"precision": "bf16", "compile": True}, "torch.compile does not see into the C++ kernels"),
        ({"precision": "bf16", "channels_last": False}, "the C++ kernels take channels-last only"),
    ):
        assert choice(**fields) == ("torch", "torch", f"conv: torch ({why})")
        with pytest.raises(UsageError, match=f"engine.conv cpp: {why.replace('+', '.')}; use torch"):
            resolve_engine(Config(engine=EngineConfig(device="cpu", conv="cpp", **fields)))


@pytest.mark.parametrize(("channels_last", "norm"), [(True, "fused"), (False, "torch")])
def test_auto_shares_statistics_with_the_norm_that_takes_the_memory_format(channels_last: bool, norm: str) -> None:
    engine = EngineConfig(device="cpu", channels_last=channels_last)
    assert resolve_engine(Config(model=ModelConfig(sync_norm=True), engine=engine)).norm == norm


@pytest.mark.parametrize(("precision", "reason"), [("fp32", "measured in bf16, not in fp32"), ("fp16", "not in fp16")])
def test_auto_ignores_a_table_measured_in_another_precision(precision: str, reason: str) -> None:
    norm, why = _faster_norm(Config(), torch.device("cuda"), precision, False, "")
    assert norm == "torch" and reason in why


@needs_kernels
def test_under_compile_the_modules_are_torchs() -> None:
    torch._dynamo.reset()
    norm, conv = norm_of(16), conv_of(16, 16).bfloat16()
    y = torch.compile(lambda x: norm(conv(x)), fullgraph=True, backend="aot_eager")(random(4, 16, 8, 8))
    assert y.shape == (4, 16, 8, 8)


def test_a_processor_without_the_instructions_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    why = "the C++ kernels need AVX2, and torch's CPU capability is DEFAULT"
    assert library.instruction_set() == ("", why) and convolution.available(torch.float32) == (False, why)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert library.instruction_set() == ("avx2", "")
    why = "the C++ convolutions need avx512_bf16 for bf16, and the widest instruction set here is avx2"
    assert convolution.available(torch.bfloat16) == (False, why)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(library, "cpu_flags", lambda: {"avx512f"})
    assert library.instruction_set() == ("avx512", "")
    monkeypatch.setattr(library.platform, "machine", lambda: "riscv64")
    assert library.instruction_set() == ("", "the C++ kernels are for Linux on x86-64 and aarch64")


def ask(*, fresh: bool = True, **environment: str) -> list[str]:
    """Return what tests.workers.kernels_cpu_available prints: the availability of both, and the OpenMP libraries."""
    done = run_module("tests.workers.kernels_cpu_available", cwd=CHECKOUT, env=environment, fresh=fresh)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@needs_kernels
@pytest.mark.slow
def test_a_compiler_that_is_missing_or_fails_is_a_reason(tmp_path: Path) -> None:
    assert ask(CXX="no-such-g++")[0] == "False no C++ compiler no-such-g++ on the PATH: apt-get install g++"
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho 'sorry, unimplemented' >&2\nexit 1\n")
    broken.chmod(0o755)
    said = f"False {broken} did not build kernels/cpu/"
    assert ask(CXX=str(broken))[:2] == [f"{said}{name}.cpp: sorry, unimplemented" for name in ("batchnorm", "winograd")]
    done = run_fastres("train", "--recipe", "digits", "--train.steps", "1", "--schedule.warmup_steps", "0",
                       "--run.dir", tmp_path / "run",
                       env={"CXX": str(broken)})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"conv: torch ({broken} did not build kernels/cpu/winograd.cpp: sorry, unimplemented)" in done.stdout


@pytest.mark.slow
@needs_kernels
def test_the_library_is_built_once_and_kept_in_the_users_cache(tmp_path: Path) -> None:
    assert ask(XDG_CACHE_HOME=str(tmp_path))[0].startswith("True")
    kept = sorted((tmp_path / "fastres").iterdir())
    assert [file.name.split("-")[1] for file in kept] == ["batchnorm", "convolution", "winograd"]
    norm = kept[0]
    before = [file.stat().st_mtime_ns for file in kept]
    assert ask(XDG_CACHE_HOME=str(tmp_path))[0].startswith("True")
    assert kept == sorted((tmp_path / "fastres").iterdir()) and before == [file.stat().st_mtime_ns for file in kept]
    norm.write_bytes(b"")  # a crash of the machine may leave an empty file
    assert ask(XDG_CACHE_HOME=str(tmp_path))[0].startswith("True")
    assert kept == sorted((tmp_path / "fastres").iterdir()) and norm.stat().st_size > 0


@pytest.mark.slow
@needs_kernels
def test_without_a_cache_that_can_be_written_it_is_built_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "fastres").write_text("a file where the folder would be")
    assert ask(XDG_CACHE_HOME=str(tmp_path))[0].startswith("True")
    assert ask(XDG_CACHE_HOME="", HOME="~")[0].startswith("True")  # a user without a home


@pytest.mark.parametrize("channels", [32, 64])
def test_a_wrong_number_of_channels_raises_torchs_own_error(channels: int) -> None:
    conv = conv_of(48, 16).bfloat16()
    conv.algorithm = "cpp"
    with pytest.raises(RuntimeError, match=f"48 channels, but got {channels}"):
        conv(random(2, channels, 8, 8))


@needs_kernels
def test_the_library_shares_torchs_threads() -> None:
    """Check that only one OpenMP is loaded, because a second one would have a thread pool spinning beside torch's."""
    assert len(ask(fresh=False)[-1].split()) == 1


@needs_kernels
def test_torchs_default_dtype_does_not_change_the_memory_that_the_kernels_write() -> None:
    def results() -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        draw = functools.partial(torch.randn, generator=generator, dtype=torch.float32)
        norm, conv = (
            BatchNormAct2d(16, dtype=torch.float32),
            Conv2d(16, 16, 3, padding=1, bias=False, dtype=torch.float32),
        )
        norm.algorithm, conv.algorithm = "measured", "cpp"
        with torch.no_grad():
            conv.weight.copy_(draw(16, 16, 3, 3))
        x = draw(8, 16, 16, 16).bfloat16().to(memory_format=torch.channels_last).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = norm(conv(x))
        y.float().square().mean().backward()
        return [y, *(of.grad for of in (x, conv.weight, norm.weight, norm.bias) if of.grad is not None)]

    usual = results()
    torch.set_default_dtype(torch.float64)
    try:
        unusual = results()
    finally:
        torch.set_default_dtype(torch.float32)
    assert len(usual) == 5
    for one, other in zip(usual, unusual, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


def test_an_explicit_fused_leaves_small_tensors_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastres.training.engine.INTERPRETED", False)  # the tests interpret Triton's kernels
    engine = resolve_engine(Config(model=ModelConfig(norm="fused"), engine=EngineConfig(device="cpu", compile=False)))
    assert engine.norm == "measured"
