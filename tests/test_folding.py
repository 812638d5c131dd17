"""fastres.models.fusion.folding: the same function in a copy, and what is not folded because it would differ."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import fastres
from fastres import evaluate, train
from fastres.config.schema import Config, EngineConfig
from fastres.models.fusion import folding
from fastres.models.fusion.folding import FoldedConv2d, folded
from fastres.training.engine import resolve_engine
from fastres.training.evaluator import for_inference
from fastres_kernels import BatchNormAct2d, Conv2d
from fastres_kernels.cpu import convolution
from tests.test_kernels_cpu_conv import Calls


def images_of(side: int, channels: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, channels, side, side, dtype=torch.float64, generator=generator)
    return x.to(dtype, memory_format=torch.channels_last)


def with_statistics(model: nn.Module) -> nn.Module:
    """Return the network in float64 and eval mode, with BatchNorms that are not near the identity."""
    generator = torch.Generator().manual_seed(1)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            affine = (norm.running_mean, -0.5), (norm.running_var, 0.5), (norm.weight, 0.5), (norm.bias, -0.5)
            for tensor, low in affine:
                if tensor is not None:
                    tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + low)
    return model.double().eval()


def convolutions(model: nn.Module) -> list[FoldedConv2d]:
    return [module for module in model.modules() if isinstance(module, FoldedConv2d)]


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def overwriting(model: Any) -> int:
    return sum("overwrite" in node.kwargs for node in model.graph.nodes)


@torch.no_grad()
def assert_same_function(model: nn.Module, images: Tensor) -> Any:
    """Check the folded copy in float64 and, by oneDNN's operators, in float32. Return the copy."""
    copied = folded(model)
    expected = model(images)
    largest = expected.abs().max()
    assert (copied(images) - expected).abs().max() <= 1e-10 * largest
    single = copy.deepcopy(model).float().to(memory_format=torch.channels_last)
    assert (folded(single)(images.float()) - expected).abs().max() <= 2e-5 * largest
    return copied


# ---- networks ----------------------------------------------------------------------------------------------

OWN: dict[str, tuple[int, int]] = {  # name: side of the images, norms that stay, which follow a max-pool
    "resnet20": (16, 0),
    "plain20": (16, 0),
    "resnet18": (32, 0),
    "mini_resnet": (12, 0),
    "speed_resnet": (16, 3),
    "resnet50": (32, 0),
}
SLOW = [pytest.mark.slow]
FOREIGN: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "torchvision/resnet18": (partial(torchvision.models.resnet18, num_classes=10), 0),
    "timm/resnet26d": (partial(timm.create_model, "resnet26d", num_classes=10), 0),
    "timm/regnety_002": (partial(timm.create_model, "regnety_002", num_classes=10), 0),
    "torchvision/mobilenet_v2": (partial(torchvision.models.mobilenet_v2, num_classes=10), 0),
    "torchvision/densenet121": (partial(torchvision.models.densenet121, num_classes=10), 62),
    "torchvision/shufflenet_v2_x0_5": (partial(torchvision.models.shufflenet_v2_x0_5, num_classes=10), 0),
}


@pytest.mark.parametrize("norm", ["torch", "fused", pytest.param("measured", marks=SLOW)])
@pytest.mark.parametrize("name", [pytest.param(n, marks=SLOW if n == "resnet50" else []) for n in OWN])
def test_own_networks_compute_the_same_with_every_norm(name: str, norm: str) -> None:
    side, left = OWN[name]
    model = with_statistics(fastres.build_model(name, norm=norm, in_channels=3))
    copied = assert_same_function(model, images_of(side))
    assert norms(copied) == left
    assert len(convolutions(copied)) == norms(model) - left


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n == "torchvision/resnet18" else SLOW) for n in FOREIGN])
def test_foreign_networks_compute_the_same(name: str, fused: bool) -> None:
    build, left = FOREIGN[name]
    model = with_statistics(build())
    model = fastres.fuse(model) if fused else model
    copied = assert_same_function(model, images_of(64))
    assert norms(copied) == left
    assert len(convolutions(copied)) == norms(model) - left


def test_additions_and_relus_are_in_the_convolutions() -> None:
    copied: Any = folded(fastres.build_model("resnet20", norm="measured"))
    targets = [node.target for node in copied.graph.nodes if node.op == "call_function"]
    assert F.relu not in targets
    assert all(module.relu for module in convolutions(copied)) and overwriting(copied) == 7
    shortcuts: Any = folded(fastres.build_model("resnet18"))
    assert [module.relu for module in convolutions(shortcuts)].count(False) == 3  # the 1×1 convolutions


@pytest.mark.skipif(not convolution.available(torch.float32)[0], reason=convolution.available(torch.float32)[1])
@torch.no_grad()
def test_many_tiles_of_many_channels_are_computed_by_winograds_algorithm() -> None:
    model = with_statistics(fastres.build_model("resnet20"))
    images = images_of(128)
    expected = model(images)
    single = copy.deepcopy(model).float().to(memory_format=torch.channels_last)
    for algorithm, used in (("cpp", True), ("torch", False)):
        for module in single.modules():
            if isinstance(module, Conv2d):
                module.algorithm = algorithm
        copied = folded(single)
        with Calls() as calls:
            y = copied(images.float())
        assert (y - expected).abs().max() <= 2e-5 * expected.abs().max()
        assert ("cpp_winograd_act" in calls.names) is used
        wide = next(conv for conv in convolutions(copied) if conv.weight.shape[1] == 32)
        with pytest.raises(RuntimeError, match="convolution"):
            wide(torch.zeros(8, 16, 64, 64).contiguous(memory_format=torch.channels_last))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_exact_as_the_network(dtype: torch.dtype) -> None:
    model = with_statistics(fastres.build_model("resnet20", norm="measured"))
    single = copy.deepcopy(model).float().to(memory_format=torch.channels_last)
    copied = folded(single, dtype)
    assert {module.weight.dtype for module in convolutions(copied)} == {dtype}
    x = images_of(16)
    with torch.no_grad():
        expected = model(x)
        with torch.autocast("cpu", dtype):
            errors = [(net(x.to(dtype)).double() - expected).abs().max() for net in (copied, single)]
    assert errors[0] <= 2 * errors[1] + 1e-3 * expected.abs().max()


def test_onednns_operators_are_used_where_torch_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    folding._has_onednn.cache_clear()
    assert folding._has_onednn(torch.float32) == (folding.platform.machine() in ("x86_64", "AMD64"))
    assert not folding._has_onednn(torch.float64)
    folding._has_onednn.cache_clear()
    monkeypatch.setattr(folding, "OPS", object())  # a torch without them
    assert not folding._has_onednn(torch.float32) and not folding._has_onednn(torch.bfloat16)
    folding._has_onednn.cache_clear()


def test_without_onednns_operators_torchs_own_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folding, "_has_onednn", lambda dtype: False)
    assert_same_function(with_statistics(fastres.build_model("resnet20")), images_of(16))


# ---- the copy ----------------------------------------------------------------------------------------------


def test_the_network_stays_as_it_is_and_shares_nothing() -> None:
    model = with_statistics(fastres.build_model("resnet20", norm="measured")).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    copied, x = folded(model), images_of(16)
    assert model.training and not copied.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(norm.forks for norm in model.modules() if isinstance(norm, BatchNormAct2d))
    with torch.no_grad():
        expected = copied(x)
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
        assert torch.equal(copied(x), expected)


def test_the_copy_can_be_copied_and_cast() -> None:
    model = with_statistics(fastres.build_model("resnet20")).float()
    copied, x = folded(model), images_of(16, dtype=torch.float32)
    with torch.no_grad():
        expected = copied(x)
        assert torch.equal(copy.deepcopy(copied)(x), expected)
        torch.testing.assert_close(copied.double()(x.double()).float(), expected, rtol=1e-4, atol=1e-4)


def test_batches_of_any_size_compute_the_same() -> None:
    model = with_statistics(fastres.build_model("resnet18")).float().to(memory_format=torch.channels_last)
    copied, x = folded(model), images_of(32, dtype=torch.float32)
    with torch.no_grad():
        for batch in (x, x[:1], x[:2].contiguous(), x[:0], x):  # the weights are packed again for each shape
            torch.testing.assert_close(copied(batch), model(batch), rtol=1e-4, atol=1e-4)


def test_images_have_gradients() -> None:
    model = with_statistics(fastres.build_model("resnet20")).float()
    gradients = []
    for net in (model, folded(model)):
        x = images_of(16, dtype=torch.float32).requires_grad_()
        net(x).square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-4)


# ---- blocks ------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A convolution, its norm and what a function makes of them."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **conv: Any) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.conv = nn.Conv2d(4, 4, **{"kernel_size": 3, "padding": 1} | conv)
        self.bn, self.relu, self.drop = nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout()
        self.function = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, self.first(x))


def reads_the_residual_later(m: Any, x: Tensor) -> Tensor:
    return F.relu(m.bn(m.conv(x)) + x) * x


def writes_to_the_input(m: Any, x: Tensor) -> Tensor:
    y = m.bn(m.conv(x))
    x.mul_(2)
    return F.relu(y + x)


def writes_to_the_residual_after_the_addition(m: Any, x: Tensor) -> Tensor:
    skip = x * 2
    y = m.bn(m.conv(x)) + skip
    skip.mul_(3)
    return F.relu(y) + skip


def adds_to_the_residual(m: Any, x: Tensor) -> Tensor:
    skip = x * 2
    skip += m.bn(m.conv(x))
    return F.relu(skip)


def calls_twice(m: Any, x: Tensor) -> Tensor:
    return m.relu(m.bn(m.conv(m.relu(m.bn(m.conv(x))))) + 1)


FOLDS: dict[str, tuple[Callable[[Any, Tensor], Tensor], int]] = {  # the function, the folded norms
    "relu": (lambda m, x: m.relu(m.bn(m.conv(x))), 2),
    "a residual that is the input": (lambda m, x: F.relu(m.bn(m.conv(x)) + x), 2),
    "an addition of a fraction of each channel": (lambda m, x: F.relu(m.bn(m.conv(x)) + x.mean((2, 3), True)), 2),
    "an addition of itself": (lambda m, x: (lambda y: y + y)(m.bn(m.conv(x))), 2),
    "an addition in another order": (lambda m, x: (x + m.bn(m.conv(x))).relu_(), 2),
    "a subtraction": (lambda m, x: F.relu(x - m.bn(m.conv(x))), 2),
    "an addition with a factor": (lambda m, x: torch.add(m.bn(m.conv(x)), x, alpha=2), 2),
    "relu of a norm that is used twice": (lambda m, x: (lambda y: F.relu(y) + y)(m.bn(m.conv(x))), 2),
    "dropout": (lambda m, x: F.relu(m.drop(m.bn(m.conv(x)))), 2),
    "a later read": (reads_the_residual_later, 2),
    "a write to the input": (writes_to_the_input, 2),
    "a write to the residual": (writes_to_the_residual_after_the_addition, 2),
    "a sum in place of the residual": (adds_to_the_residual, 2),
    "two calls": (calls_twice, 3),
    "an output that is used twice": (lambda m, x: (lambda y: m.bn(y) + y)(m.conv(x)), 1),
    "an activation between": (lambda m, x: m.bn(F.relu(m.conv(x))), 1),
}


@pytest.mark.parametrize("case", FOLDS)
def test_blocks_compute_the_same(case: str) -> None:
    function, count = FOLDS[case]
    assert len(convolutions(assert_same_function(with_statistics(Block(function)), images_of(8)))) == count


@pytest.mark.parametrize(
    "conv",
    [
        {"groups": 2}, {"groups": 4}, {"stride": 2}, {"dilation": 2, "padding": 2}, {"bias": False},
        {"padding": "same"}, {"padding": "valid"}, {"padding": "same", "kernel_size": 2},
        {"kernel_size": (1, 3), "padding": (0, 1)},
    ],
    ids=str,
)  # fmt: skip
def test_convolutions_of_any_geometry_are_folded(conv: dict[str, Any]) -> None:
    model = with_statistics(Block(lambda m, x: m.relu(m.bn(m.conv(x))), **conv))
    assert len(convolutions(assert_same_function(model, images_of(8)))) == 2


def hooked(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, inputs, output: output * 2)


class AlwaysTraining(nn.BatchNorm2d):
    def train(self, mode: bool = True) -> Any:
        return super().train(True)


LEFT: dict[str, Callable[[Any], Any]] = {
    "a hook on the convolution": lambda m: hooked(m.conv),
    "a hook on the norm": lambda m: hooked(m.bn),
    "no running statistics": lambda m: setattr(m, "bn", nn.BatchNorm2d(4, track_running_stats=False)),
    "padding that is not zero": lambda m: setattr(m, "conv", nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")),
    "a transposed convolution": lambda m: setattr(m, "conv", nn.ConvTranspose2d(4, 4, 3, padding=1)),
    "a convolution of another class": lambda m: setattr(m, "conv", nn.utils.parametrizations.weight_norm(m.conv)),
    "a norm of another class": lambda m: setattr(m, "bn", nn.InstanceNorm2d(4)),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_cannot_be_folded_stays(case: str) -> None:
    model = Block(lambda m, x: m.relu(m.bn(m.conv(x))))
    LEFT[case](model)
    assert len(convolutions(assert_same_function(with_statistics(model), images_of(8)))) == 1


def test_a_norm_that_stays_in_training_mode_is_not_folded() -> None:
    model = Block(lambda m, x: m.bn(m.conv(x)))
    model.bn = AlwaysTraining(4)
    assert len(convolutions(folded(model.eval()))) == 1


class Unclear(nn.Module):
    """A network whose forward no graph can stand for."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.calls = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), 0


class DependsOnValues(Unclear):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) if x.sum() > 0 else x


class Counts(Unclear):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.bn(self.conv(x))


class Draws(Unclear):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) * torch.rand(())


class DrawsInPython(Unclear):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) * random.random()


@pytest.mark.parametrize("kind", [DependsOnValues, Counts, Draws, DrawsInPython])
def test_networks_that_no_graph_can_stand_for_are_returned_themselves(kind: type[nn.Module]) -> None:
    model = kind()
    assert folded(model) is model and model.training


def test_networks_with_hooks_or_a_replaced_forward_are_returned_themselves() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    assert folded(model) is not model
    hook = model.register_forward_hook(lambda module, inputs, output: output * 2)
    assert folded(model) is model
    hook.remove()
    model[0].forward = model[0].forward
    assert folded(model) is model
    assert folded(head := nn.Linear(3, 4)) is head  # there is nothing to fold


def test_a_hook_on_a_block_stays_with_the_block() -> None:
    model = nn.Sequential(Block(lambda m, x: m.bn(m.conv(x))), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    hooked(model[0])
    assert len(convolutions(assert_same_function(with_statistics(model), images_of(8)))) == 1


# ---- where it is used --------------------------------------------------------------------------------------


def test_inference_folds_on_a_cpu_without_torch_compile() -> None:
    model = fastres.build_model("resnet20")
    engine = resolve_engine(Config(engine=EngineConfig(device="cpu", precision="bf16", compile=False)))
    assert {module.weight.dtype for module in convolutions(for_inference(model, engine))} == {torch.bfloat16}
    assert for_inference(model, dataclasses.replace(engine, compile=True)) is model
    assert for_inference(model, dataclasses.replace(engine, device=torch.device("cuda"))) is model


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=SLOW), "bf16"])
def test_commands_on_a_run_compute_the_same_with_a_folded_network(
    precision: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    train.main(f"--recipe digits --train.steps 4 --run.dir {folder} --engine.precision {precision}".split())
    ours, theirs = (fastres.load_run(folder, fold=fold) for fold in (True, False))
    x = images_of(8, channels=1, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(x), theirs.logits(x), rtol=0.05, atol=0.05)
    assert not convolutions(ours.model) and not convolutions(theirs.model)
    figures = []
    for flags in ([], ["--fold"]):
        capsys.readouterr()
        evaluate.main([str(folder), *flags])
        figures.append([float(word.strip(",;")) for word in capsys.readouterr().out.split()[3:6:2]])
    assert figures[1] == pytest.approx(figures[0], abs=0.02)
