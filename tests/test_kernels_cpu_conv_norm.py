"""Test the convolution with BatchNorm + ReLU (+ add) in C++ against the two kernels apart, and when it is used."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastres.config.schema import Config, EngineConfig, OptimConfig
from fastres.models.blocks import NORMS, BasicBlock
from fastres.models.registry import build_model
from fastres.training.engine import resolve_engine
from fastres.training.step import TrainStep
from fastres_kernels import BatchNormAct2d, Conv2d
from fastres_kernels.cpu import batchnorm, conv_norm, convolution, dispatch_table
from tests.test_kernels_cpu_conv import BF16, FP32, HERE, Calls, choose, isa, random  # noqa: F401 (isa is a fixture)

TOGETHER = {"cpp_convolution_norm_act", "cpp_convolution_norm_act_backward"}
SHAPES = [(5, 16, 32, 32), (3, 32, 16, 16), (9, 64, 8, 8), (2, 16, 12, 24), (1, 16, 1, 16)]
needs_float32 = pytest.mark.skipif(not HERE[FP32][0], reason=HERE[FP32][1])


@pytest.fixture(autouse=True)
def small_tensors_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every shape run in C++, although the tensors of these tests are too small to be faster there."""
    monkeypatch.setattr(dispatch_table, "is_faster", lambda x, training, has_residual: True)


def apart(x: Tensor, weight: Tensor, residual: Tensor | None, skip: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    """Compute conv_norm_act's result by the two kernels that it replaces."""
    return batchnorm.batch_norm_act(convolution.conv2d(x, weight, None, 1), residual, skip, *rest)


def results(compute: Any, shape: tuple[int, ...], dtype: torch.dtype, adds: bool, relu: bool) -> list[Tensor]:
    """Return y, the gradients of all inputs for gradients of both y, and the running statistics."""
    n, c, h, w = shape
    norm = nn.BatchNorm2d(c)
    nn.init.uniform_(norm.weight, 0.5, 2, generator=torch.Generator().manual_seed(5))
    x, residual, g, g2 = (random(n, c, h, w, seed=seed, dtype=dtype) for seed in range(4))
    weight = random(c, c, 3, 3, seed=4)
    inputs = [leaf.requires_grad_() for leaf in (x, weight, *([residual] if adds else []))]
    y, again = compute(x, weight, residual if adds else None, None, norm, relu)
    gradients = torch.autograd.grad([y, again], [*inputs, norm.weight, norm.bias], [g, g2])
    assert torch.equal(y, again) and norm.num_batches_tracked == 1
    return [y.detach(), *gradients, norm.running_mean, norm.running_var]  # type: ignore[list-item]


@pytest.mark.parametrize(("adds", "relu"), [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_those_of_the_two_kernels(
    isa: str,  # noqa: F811
    shape: tuple[int, ...],
    dtype: torch.dtype,
    adds: bool,
    relu: bool,
    threads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    choose(monkeypatch, isa, dtype, winograd=False)
    together, oracle = (results(compute, shape, dtype, adds, relu) for compute in (conv_norm.conv_norm_act, apart))
    for ours, theirs in zip(together, oracle, strict=True):
        assert ours.dtype == theirs.dtype and ours.stride() == theirs.stride()
        if 16384 % prod(shape[1:]) == 0:  # chunks are those of batchnorm.cpp, so that sums have one order
            assert torch.equal(ours, theirs)
        error = (ours.double() - theirs.double()).norm() / theirs.double().norm()
        assert error < (1e-3 if dtype == BF16 else 1e-5), f"{error:.1e}"


def block(channels: int = 16, out_channels: int = 16, **options: Any) -> BasicBlock:
    made = BasicBlock(channels, out_channels, norm=NORMS["measured"], shortcut="pad", **options)
    for module in made.modules():
        if isinstance(module, Conv2d):
            module.algorithm = "cpp"  # type: ignore[assignment]
    return made.to(memory_format=torch.channels_last)


def used(net: nn.Module, x: Tensor) -> set[str]:
    """Return the names of this package's operators that a forward and a backward call."""
    with Calls() as calls:
        net(x.requires_grad_()).sum().backward()
    return calls.names


@needs_float32
def test_convolutions_that_keep_the_number_of_channels_are_computed_with_their_norm() -> None:
    x = random(4, 16, 16, 16, seed=0)
    assert used(block(), x) == TOGETHER
    for net, images in (
        (block(16, 32, stride=2), x.detach()),
        (block(), random(1, 16, 80, 80, seed=0)),  # too large
        (block(), random(1, 16, 7, 7, seed=0)),  # without a direct kernel
        (block().eval(), x.detach()),
    ):
        assert not TOGETHER & used(net, images)


@needs_float32
@pytest.mark.parametrize("name", ["conv1", "bn1"])
def test_a_hook_sees_its_modules_result(name: str) -> None:
    net, x, seen = block(), random(4, 16, 16, 16, seed=0), []
    getattr(net, name).register_forward_hook(lambda module, inputs, y: seen.append(y))
    expected = block()
    expected.load_state_dict(net.state_dict())
    names = used(net, x)
    assert len(seen) == 1 and names > TOGETHER, "the block's other convolution has no hooks"
    with torch.no_grad():
        y = expected(x)
    assert torch.allclose(net(x), y, rtol=1e-5, atol=1e-5)


@needs_float32
def test_a_resnet20_learns_the_same_weights_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    def weights() -> list[Tensor]:
        torch.manual_seed(0)
        engine = resolve_engine(Config(engine=EngineConfig(device="cpu", precision="fp32", conv="cpp")))
        step = TrainStep(engine.place(build_model("resnet20", norm="measured")), engine, OptimConfig())
        images, labels = random(4, 3, 32, 32, seed=0), torch.arange(4)
        for i in range(2):
            step(images, labels, 0.1, i)
        return list(step.model.state_dict().values())

    with Calls() as calls:
        together = weights()
    assert calls.names >= TOGETHER
    monkeypatch.setattr(BatchNormAct2d, "convolve", lambda *_: None)
    assert all(torch.equal(a, b) for a, b in zip(together, weights(), strict=True))


@needs_float32
def test_gradients_of_gradients_are_refused_by_name() -> None:
    net, x = block(), random(4, 16, 16, 16, seed=0).requires_grad_()
    with pytest.raises(NotImplementedError, match="convolution with BatchNorm has no double backward; use model"):
        torch.autograd.grad(net(x).sum(), x, create_graph=True)
