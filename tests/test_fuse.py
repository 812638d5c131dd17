"""fastres.fuse: the same function, on networks of torchvision and timm and on blocks written for these tests."""

from __future__ import annotations

import copy
import io
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.resnet import BasicBlock, Bottleneck

import fastres
import fastres_kernels
from fastres.models.fusion.modules import FusedNorm
from fastres_kernels import BatchNormAct2d, defer_running_stats
from fastres_kernels.cpu import batchnorm as cpp_norm
from fastres_kernels.cpu import convolution as cpp_conv
from fastres_kernels.cpu import dispatch_table
from tests.commands import run_worker

IMAGES = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """A residual block; `add_and_relu` is what the tests vary."""

    def __init__(self, add_and_relu: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 1)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(4, 3)
        self.add_and_relu = add_and_relu

    def forward(self, x: Tensor) -> Tensor:
        skip = self.conv1(x)
        y = self.bn(self.conv2(skip))
        return self.fc(self.add_and_relu(self, y, skip).mean((2, 3)))


class Owner(nn.Module):
    """Two norms, a ReLU and a dropout; subclasses write the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.relu, self.drop = nn.ReLU(inplace=True), nn.Dropout(0.5)


def values_of(model: nn.Module, training: bool, images: Tensor = IMAGES) -> list[Tensor]:
    """Run forward and backward, and return outputs, gradients and statistics."""
    model.train(training).zero_grad()
    torch.manual_seed(1)
    outputs = [leaf for leaf in tree_leaves(model(images)) if isinstance(leaf, Tensor)]
    torch.autograd.backward([(y * torch.arange(y.numel()).reshape(y.shape).cos()).sum() for y in outputs])
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [*(y.detach() for y in outputs), *gradients, *(buffer.clone() for buffer in model.buffers())]


def assert_same_function(model: nn.Module, fused: nn.Module, images: Tensor = IMAGES) -> None:
    for training in (True, False):
        for a, b in zip(values_of(model, training, images), values_of(fused, training, images), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)


def fused_calls(model: nn.Module, images: Tensor = IMAGES, training: bool = True) -> list[str]:
    """Return the norms that apply ReLU in a forward of a copy, by name; with a + if they add a residual."""
    model = copy.deepcopy(model)
    names = {module: name for name, module in model.named_modules()}
    called: list[str] = []
    forward = FusedNorm.forward

    def spy(self: Any, x: Tensor, fused_add: Any = None, fused_relu: bool = False, fused_fork: bool = False) -> Any:
        if fused_relu:
            called.append(names[self] + ("+" if fused_add is not None else ""))
        return forward(self, x, fused_add, fused_relu, fused_fork)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FusedNorm, "forward", spy)
        model.train(training)(images)
    return called


def fuse_copy(model: nn.Module) -> nn.Module:
    fused = fastres.fuse(copy.deepcopy(model))
    assert type(fused) is type(model)
    return fused


def resnet() -> nn.Module:
    return torchvision.models.resnet18(num_classes=10).double()


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {  # by name: constructor, number of fused norms
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=10), 17),
    "bottlenecks": (lambda: torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 2]), 16),
    "densenet": (lambda: torchvision.models.DenseNet(8, (2, 1, 1, 1), 16), 15),
    "vgg11_bn": (lambda: torchvision.models.VGG(torchvision.models.vgg11_bn().features[:8]), 2),
    "mobilenet_v2": (
        lambda: torchvision.models.MobileNetV2(inverted_residual_setting=[[1, 16, 1, 1], [6, 16, 1, 1]]),
        0,
    ),
    "shufflenet": (lambda: torchvision.models.ShuffleNetV2([1, 1, 1], [8, 16, 32, 64, 64]), 11),
    "fastres resnet8": (lambda: fastres.build_model("resnet8"), 7),
    "fastres resnet18": (lambda: fastres.build_model("resnet18", stem="small"), 17),
}


SLOW = ("resnet18", "vgg11_bn", "fastres resnet18")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in NETWORKS]
)
def test_a_network_computes_the_same_after_fuse(name: str) -> None:
    build, count = NETWORKS[name]
    model = build().double()
    if name == "vgg11_bn":
        model = nn.Sequential(model.features, nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    fused = fuse_copy(model)
    report = fastres.fusion_report(fused)
    assert_same_function(model, fused)
    assert len(report.fused) == count
    called = [name.rstrip("+") for name in fused_calls(fused)]
    assert sorted(called) == sorted(report.fused), "the report names other norms than those that ran fused"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["regnet_y_400mf", "googlenet", "mobilenet_v3_small"],
)
def test_a_whole_network_of_torchvision_computes_the_same_after_fuse(name: str) -> None:
    model = torchvision.models.get_model(name, weights=None).double()
    assert_same_function(model, fuse_copy(model), torch.randn(2, 3, 64, 64, dtype=torch.float64))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet26d", "regnety_004", "dla34"])
def test_a_network_of_timm_computes_the_same_after_fuse(name: str) -> None:
    model = timm.create_model(name, num_classes=10).double()
    fused = fuse_copy(model)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    assert_same_function(model, fused, images)
    assert torch.equal(fused.eval().forward_features(images), model.eval().forward_features(images))
    for network in (model, fused):
        network.reset_classifier(4)
    assert fused(images).shape == (2, 4)


# ---- patterns ----------------------------------------------------------------------------------------------


def in_place(block: Any, y: Tensor, skip: Tensor) -> Tensor:
    y += skip
    return F.relu_(y)


def skip_in_place(block: Any, y: Tensor, skip: Tensor) -> Tensor:
    skip = block.conv2(skip)
    skip += y
    return F.relu(skip, inplace=True)


ADDITIONS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "module": lambda block, y, skip: block.relu(y + skip),
    "the other order": lambda block, y, skip: block.relu(skip + y),
    "functional": lambda block, y, skip: F.relu(y + skip),
    "in place": in_place,
    "skip in place": skip_in_place,
    "torch.add": lambda block, y, skip: torch.relu(torch.add(skip, y)),
    "methods": lambda block, y, skip: y.add_(skip).relu_(),
    "method add": lambda block, y, skip: skip.add(y).relu(),
}


@pytest.mark.parametrize("name", ADDITIONS)
def test_every_form_of_addition_and_relu_is_fused(name: str) -> None:
    model = Block(ADDITIONS[name]).double()
    fused = fuse_copy(model)
    assert_same_function(model, fused)
    assert fused_calls(fused) == ["bn+"]


def overwritten_skip(block: Any, y: Tensor, skip: Tensor) -> Tensor:
    skip = skip * 1
    other = skip.flatten(1)  # the same memory
    skip += y
    return F.relu(skip) + other.reshape(skip.shape)


NOT_FUSED: dict[str, tuple[Callable[[Any, Tensor, Tensor], Tensor], str]] = {
    "another activation": (lambda block, y, skip: F.silu(y + skip), "silu follows the addition"),
    "a result with two uses": (lambda block, y, skip: F.relu(y) + y, "its result has 2 uses"),
    "a subtraction": (lambda block, y, skip: F.relu(y - skip), "sub follows"),
    "a factor": (lambda block, y, skip: F.relu(torch.add(y, skip, alpha=2)), "add follows"),
    "a number": (lambda block, y, skip: F.relu(y + 1), "the addition's other operand is a number"),
    "a skip changed in place": (
        overwritten_skip,
        "the addition changes its other operand in place, which may be used elsewhere",
    ),
    "random control flow": (
        lambda block, y, skip: F.relu(y) if random.random() < 2 else y,
        "the network is not understood: its forward draws random numbers outside of torch's operations",
    ),
    "a random tensor": (
        lambda block, y, skip: F.relu(y) if torch.rand(1) < 2 else y,
        "the network is not understood: its forward computes tensors that do not depend on its input",
    ),
    "control flow by value": (
        lambda block, y, skip: F.relu(y) if y.sum() > 0 else y,
        "the network is not understood: its forward cannot be traced: "
        "symbolically traced variables cannot be used as inputs to control flow",
    ),
}


@pytest.mark.parametrize("name", NOT_FUSED)
def test_what_is_no_pattern_is_left_alone_and_reported(name: str) -> None:
    add_and_relu, why = NOT_FUSED[name]
    model = Block(add_and_relu).double()
    fused = fuse_copy(model)
    assert_same_function(model, fused)
    assert fastres.fusion_report(fused).left == {"bn": why}
    assert type(fused.bn) is nn.BatchNorm2d


def test_a_residual_that_is_broadcast_or_of_another_dtype_gives_the_same() -> None:
    model = Block(lambda block, y, skip: F.relu(y + skip[:, :, :1].to(torch.float32))).double()
    assert_same_function(model, fuse_copy(model))


def test_the_second_of_two_norms_that_are_added_takes_the_sum() -> None:
    class Two(Owner):
        def forward(self, x: Tensor) -> Tensor:
            x = self.conv1(x)
            return self.relu(self.bn1(x) + self.bn2(x))

    model = Two().double()
    fused = fuse_copy(model)
    assert_same_function(model, fused)
    assert len(fused_calls(fused)) == 1
    left = fastres.fusion_report(fused).left
    assert list(left.values()) == ["the addition after it is fused with another norm"]


def test_a_norm_at_the_end_of_a_submodule_takes_the_sum() -> None:
    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.last = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Identity())

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.conv(x))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Body()

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x + self.body(x))

    model = Net().double()
    fused = fuse_copy(model)
    assert_same_function(model, fused)
    assert fused_calls(fused) == ["body.last.1+"]
    assert_same_function(model.body, fused.body)  # called on its own, it neither adds nor rectifies


def test_a_submodule_that_changes_its_input_is_not_called_later_than_before() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 1)
            self.body = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
            self.skip = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            y = self.body(x)
            return F.relu(y + self.skip(x))

    model = Net().double()
    fused = fuse_copy(model)
    assert_same_function(model, fused)
    assert fastres.fusion_report(fused).left == {"body.2": "its input may be changed in place before the addition"}


def test_a_norm_or_block_that_is_called_twice_is_left_alone() -> None:
    class Twice(Owner):
        def forward(self, x: Tensor) -> Tensor:
            x = self.relu(self.bn1(self.conv1(x)))
            x = self.relu(self.bn1(self.conv2(x)))
            return self.relu(self.bn2(x))

    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) + self.body(x.flip(0))

    for model, fused_names in ((Twice().double(), ("bn2",)), (Tower().double(), ())):
        fused = fuse_copy(model)
        assert_same_function(model, fused)
        report = fastres.fusion_report(fused)
        assert report.fused == fused_names
        assert list(report.left.values()) == ["a forward calls it more than once"]


def test_shared_norms_under_two_names_are_left_alone() -> None:
    norm = nn.BatchNorm2d(3)
    model = nn.Sequential(norm, nn.ReLU(), nn.Conv2d(3, 3, 1), norm, nn.ReLU()).double()
    fused = fuse_copy(model)
    assert_same_function(model, fused)
    assert fastres.fusion_report(fused).fused == ()


def test_a_forward_that_depends_on_the_mode_is_fused_in_both() -> None:
    class Modes(Owner):
        def forward(self, x: Tensor) -> Any:
            x = F.relu(self.bn1(self.conv1(x)))
            x = F.dropout(x, 0.3, training=self.training)
            y = F.relu(self.bn2(self.conv2(x)))
            return (y, x) if self.training else y

    model = Modes().double()
    fused = fuse_copy(model)
    assert_same_function(model, fused)
    for training in (True, False):
        assert fused_calls(fused, training=training) == ["bn1", "bn2"]


def test_a_forward_that_takes_a_tensor_or_a_list_is_fused_for_both() -> None:
    class Join(Owner):
        def forward(self, x: Any) -> Tensor:
            x = [x] if isinstance(x, Tensor) else x
            return self.relu(self.bn1(self.conv1(torch.cat(x))))

    model = Join().double()
    fused = fuse_copy(model)
    assert_same_function(model, fused)
    expected, got = model.eval()([IMAGES, IMAGES]), fused.eval()([IMAGES, IMAGES])
    assert torch.equal(expected, got)
    assert fused_calls(fused, [IMAGES, IMAGES]) == ["bn1"]  # type: ignore[arg-type]


def test_optional_arguments_are_fused_as_they_are_given() -> None:
    class Inner(Owner):
        def forward(self, x: Tensor, skip: Tensor | None = None, relu: bool = False) -> Tensor:
            y = self.bn1(self.conv1(x))
            if skip is not None:
                y = y + skip
            return F.relu(y) if relu else F.silu(y)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()
            self.skip = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x, self.skip(x), relu=True)

    model = Outer().double()
    fused = fuse_copy(model)
    assert_same_function(model, fused)
    assert fused_calls(fused) == ["inner.bn1+"]
    assert torch.equal(fused.eval().inner(IMAGES), model.eval().inner(IMAGES))  # a call that was not traced


# ---- what may change afterwards ----------------------------------------------------------------------------


def test_changed_attributes_and_replaced_modules_take_effect() -> None:
    class Flexible(Owner):
        def __init__(self) -> None:
            super().__init__()
            self.factor, self.sizes = 2.0, [1, 2]

        def forward(self, x: Tensor) -> Tensor:
            x = self.relu(self.bn1(self.conv1(x)))
            return self.bn2(self.conv2(x)) * self.factor * self.sizes[0]

    model = Flexible().double()
    fused = fuse_copy(model)
    assert fused_calls(fused) == ["bn1"]
    for network in (model, fused):
        network.factor = 3.0
    assert_same_function(model, fused)
    for network in (model, fused):
        network.factor = nn.Parameter(torch.tensor([[[2.0]], [[3.0]], [[4.0]], [[5.0]]], dtype=torch.float64))
    assert_same_function(model, fused)
    for network in (model, fused):
        del network.factor
        network.factor, network.relu = 2.0, nn.SiLU()
    assert_same_function(model, fused)
    for network in (model, fused):
        network.relu, network.bn1 = nn.ReLU(), nn.GroupNorm(2, 4).double()
    assert_same_function(model, fused)


def test_a_sequential_can_be_extended_and_sliced() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1)).double()
    fused = fuse_copy(model)
    for part in (slice(0, 2), slice(0, 3), slice(1, None)):
        images = IMAGES if part.start == 0 else torch.cat([IMAGES, IMAGES[:, :1]], 1)
        assert_same_function(model[part], fused[part], images)
    for network in (model, fused):
        torch.manual_seed(0)
        network.append(nn.BatchNorm2d(4).double())
        network[2] = nn.Tanh()
    assert_same_function(model, fused)


def test_other_methods_compute_what_they_did() -> None:
    class WithFeatures(Owner):
        def features(self, x: Tensor) -> list[Tensor]:
            normed = self.bn1(self.conv1(x))
            return [normed.clone(), self.relu(normed)]

        def forward(self, x: Tensor) -> Tensor:
            return self.features(x)[1]

    model = WithFeatures().double()
    fused = fuse_copy(model)
    for a, b in zip(model.eval().features(IMAGES), fused.eval().features(IMAGES), strict=True):
        assert torch.equal(a, b)


def test_fuse_twice_is_fuse_once_and_unfuse_restores_everything() -> None:
    model = resnet()
    fused = fuse_copy(model)
    classes = [type(module) for module in fused.modules()]
    assert [type(module) for module in fastres.fuse(fused).modules()] == classes
    values_of(model, True), values_of(fused, True)
    assert fastres.unfuse(fused) is fused
    assert [type(module) for module in fused.modules()] == [type(module) for module in model.modules()]
    assert all(a.__dict__.keys() == b.__dict__.keys() for a, b in zip(model.modules(), fused.modules(), strict=True))
    assert_same_function(model, fused)
    assert fastres.fusion_report(fused).fused == ()
    fastres.unfuse(fused)


def test_names_parameters_and_states_stay() -> None:
    model = resnet()
    expected = copy.deepcopy(model)
    names, parameters = [name for name, _ in model.named_modules()], list(model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert fastres.fuse(model) is model
    assert [name for name, _ in model.named_modules()] == names
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert isinstance(model.layer1[0], torchvision.models.resnet.BasicBlock)
    model.load_state_dict(expected.state_dict())
    expected.load_state_dict(model.state_dict())
    values_of(model, True)
    before = model.conv1.weight.clone()
    optimizer.step()
    assert not torch.equal(model.conv1.weight, before)


def test_hooks_run_as_before() -> None:
    def watched(model: nn.Module) -> list[Any]:
        seen: list[Any] = []
        model.layer1.register_forward_hook(lambda module, inputs, output: seen.append(output))
        model.layer2[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        model.layer1[0].relu.register_forward_hook(lambda module, inputs, output: seen.append((len(inputs), output)))
        model.layer3.register_full_backward_hook(lambda module, grads, outputs: seen.append((grads[0], outputs[0])))
        model.layer2[0].downsample.register_forward_hook(lambda module, inputs, output: seen.append(output))
        return seen

    model = resnet()
    before, after = copy.deepcopy(model), copy.deepcopy(model)
    seen = [watched(model), watched(before), watched(fastres.fuse(after))]
    fastres.fuse(before)
    for network in (model, before, after):
        values_of(network, True)
    assert len(seen[0]) == 6
    for other in seen[1:]:
        torch.testing.assert_close(tree_leaves(other), tree_leaves(seen[0]), rtol=0, atol=0)


def test_a_norm_with_a_hook_is_left_alone() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3)).double()
    seen: list[Tensor] = []
    model[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    model[3].register_full_backward_hook(lambda module, grads, outputs: None)
    assert dict(fastres.fusion_report(fastres.fuse(model)).left) == {
        "0": "it has hooks, which would see another value",
        "2": "the ReLU after it has hooks",
        "4": "no ReLU follows",
    }
    model(IMAGES)
    assert seen[0].min() < 0


@pytest.mark.parametrize("options", [{"momentum": None}, {"affine": False}, {"track_running_stats": False}])
def test_unusual_norms_compute_the_same(options: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, **options), nn.ReLU()).double()
    fused = fuse_copy(model)
    assert_same_function(model, fused)
    assert_same_function(model, fused)
    assert fused_calls(fused) == ["1"]


def test_classes_derived_from_batchnorm_are_reported() -> None:
    class MyNorm(nn.BatchNorm2d):
        pass

    model = nn.Sequential(MyNorm(3), nn.ReLU(), nn.SyncBatchNorm(3), nn.ReLU6())
    report = fastres.fusion_report(fastres.fuse(model))
    assert report.left == {"0": "it is a MyNorm", "2": "it is a SyncBatchNorm"}
    assert str(report).splitlines()[0] == "0 of 2 BatchNorm2d fused"


def test_the_report_of_a_network_that_is_not_fused_says_so() -> None:
    report = fastres.fusion_report(resnet())
    assert report.fused == () and report.left["bn1"] == "fastres.fuse was not called"


def test_tracing_leaves_no_trace() -> None:
    class Fails(Owner):
        def forward(self, x: Tensor) -> Tensor:
            self.calls = 1
            return self.relu(self.bn1(self.conv1(x)))

    model = Fails().double()
    keys = model.__dict__.keys() | {"calls"}
    model.eval().bn1.train()
    fastres.fuse(model)
    assert model.__dict__.keys() | {"calls"} == keys and not model.training and model.bn1.training
    assert "writes the attribute calls" in str(fastres.fusion_report(model))
    assert "__getattribute__" not in nn.Module.__dict__
    model.other = nn.ReLU()
    assert model(IMAGES).min() >= 0 and model.calls == 1


def with_no_grad(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        x = self.conv1(x)
    return self.relu(self.bn1(x))


def by_gradient_mode(self: Any, x: Tensor) -> Tensor:
    x = self.bn1(self.conv1(x))
    return self.relu(x) if torch.is_grad_enabled() else F.relu(x) + 0


def with_log(self: Any, x: Tensor) -> Tensor:
    self.log.append(x)
    return self.relu(self.bn1(self.conv1(x)))


def with_any_number(self: Any, *xs: Tensor) -> Tensor:
    return self.relu(self.bn1(self.conv1(xs[0])))


def with_constant(self: Any, x: Tensor) -> Tensor:
    return self.relu(self.bn1(self.conv1(x))) + self.constant


@pytest.mark.parametrize(
    ("forward", "why"),
    [
        (with_no_grad, "changes the gradient mode"),
        (by_gradient_mode, "depends on the gradient mode"),
        (with_log, "changes an attribute that is a list"),
        (with_any_number, "takes *args"),
        (with_constant, "neither a parameter nor a buffer"),
    ],
)
def test_a_forward_that_a_graph_cannot_stand_for_is_left_alone(forward: Any, why: str) -> None:
    model = type("Net", (Owner,), {"forward": forward})().double()
    model.log, model.constant = [], torch.ones(1, dtype=torch.float64)
    fused = fuse_copy(model)
    assert why in fastres.fusion_report(fused).left["bn1"]
    assert model.log == fused.log == []
    assert_same_function(model, fused)


@pytest.mark.slow
def test_a_network_can_be_fused_in_parts_and_then_as_a_whole() -> None:
    model = resnet()
    fused = copy.deepcopy(model)
    fastres.fuse(fused.layer1)
    fastres.fuse(fused.layer2[0])
    assert len(fastres.fusion_report(fused).fused) == 6
    assert_same_function(model, fused)
    fastres.fuse(fused)
    fastres.fuse(fused.layer1[0])
    assert_same_function(model, fused)
    assert len(fused_calls(fused)) == 17


def test_feature_extraction_gives_the_same_nodes() -> None:
    names = {"layer1.0.relu_1": "a", "layer2": "b", "layer3.0.add": "c"}
    model = resnet().eval()
    networks = (model, fuse_copy(model).eval())
    features = [create_feature_extractor(net, names)(IMAGES) for net in networks]
    torch.testing.assert_close(features[1], features[0], rtol=0, atol=0)


# ---- timm's norm -------------------------------------------------------------------------------------------


def test_timms_norm_with_an_activation_is_fused_in_place() -> None:
    norm = timm.layers.BatchNormAct2d
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), norm(4), nn.Conv2d(4, 4, 1), norm(4, act_layer=nn.SiLU), norm(4, apply_act=False), nn.ReLU()
    ).double()
    fused = fuse_copy(model)
    assert_same_function(model, fused)
    report = fastres.fusion_report(fused)
    assert report.fused == ("1", "4") and report.left == {"3": "SiLU follows"}
    assert isinstance(fused[1], norm) and isinstance(fused[1].act, nn.ReLU)
    assert fused_calls(pickle.loads(pickle.dumps(fused))) == ["1", "4"]
    for network in (model, fused):
        network[1].act = nn.SiLU()
    assert_same_function(model, fused)


# ---- copies, compilers, exports ----------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["deepcopy", "pickle", pytest.param("torch.save", marks=pytest.mark.slow)])
def test_copies_are_fused_networks_of_their_own(way: str) -> None:
    fused = fastres.fuse(resnet())
    if way == "deepcopy":
        twin = copy.deepcopy(fused)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(fused))
    else:
        buffer = io.BytesIO()
        torch.save(fused, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert_same_function(fused, twin)
    assert fused_calls(twin) == fused_calls(fused)
    with torch.no_grad():
        twin.fc.bias.add_(1)
        twin.bn1.weight.zero_()
    assert not torch.equal(twin.eval()(IMAGES), fused.eval()(IMAGES))
    assert type(fastres.unfuse(twin).layer1[0]) is torchvision.models.resnet.BasicBlock


@pytest.mark.parametrize("training", [True, False])
def test_it_compiles_without_graph_breaks(training: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
            self.block = torchvision.models.resnet.BasicBlock(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.stem(x)).mean((2, 3))

    model = Net().double()
    fused = fuse_copy(model)
    expected = values_of(model, training)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    for a, b in zip(expected, values_of(compiled, training), strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(b, a)


def test_it_exports_with_a_dynamic_batch() -> None:
    fused = fastres.fuse(resnet()).eval()
    exported = torch.export.export(fused, (IMAGES,), dynamic_shapes={"x": {0: torch.export.Dim("n", min=2, max=64)}})
    images = torch.cat([IMAGES, IMAGES])
    torch.testing.assert_close(exported.module()(images), fused(images))


def test_torch_fx_traces_it_again() -> None:
    model = resnet().eval()
    fused = fuse_copy(model).eval()
    graphs = [torch.fx.symbolic_trace(network) for network in (model, fused)]
    assert [str(n.target) for n in graphs[0].graph.nodes] == [str(n.target) for n in graphs[1].graph.nodes]
    assert torch.equal(graphs[1](IMAGES), model(IMAGES))


@pytest.mark.slow
def test_inductor_compiles_it() -> None:
    fused = fastres.fuse(resnet()).float().eval()
    images = IMAGES.float()
    torch.testing.assert_close(torch.compile(fused, fullgraph=True)(images), fused(images))


@pytest.mark.slow
def test_it_exports_to_onnx(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    fused = fastres.fuse(resnet()).float().eval()
    path, images = tmp_path / "fused.onnx", IMAGES.float()
    torch.onnx.export(fused, (images,), path, dynamo=True, verbose=False)
    (got,) = onnxruntime.InferenceSession(path).run(None, {"x": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), fused(images).detach(), rtol=1e-4, atol=1e-4)


# ---- the engine's parts ------------------------------------------------------------------------------------


def test_statistics_can_be_deferred() -> None:
    model = resnet()
    fused = fuse_copy(model)
    expected = values_of(model, True)
    with defer_running_stats(fused):
        got = values_of(fused, True)[: len(expected) - len(list(model.buffers()))]
    torch.testing.assert_close([*got, *fused.buffers()], expected)
    assert "deferral" not in fastres.unfuse(fused).bn1.__dict__


class CountSecondGradients(TorchDispatchMode):
    """Counts the backward passes of the fused operation that add the gradient of a skip connection."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "batch_norm_act_backward" in str(func):
            self.count += args[1] is not None
        return func(*args, **(kwargs or {}))


def residual_blocks(build: Callable[[], nn.Module] = lambda: BasicBlock(4, 4)) -> nn.Module:
    """Return a stem and three residual blocks in a row."""
    blocks = nn.Sequential(*(build() for _ in range(3)))
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), blocks).double()
    return model.to(memory_format=torch.channels_last)


def with_kernels(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """Return a fused copy that runs the kernels' operation, whose reference takes float64."""
    monkeypatch.setattr(fastres_kernels.modules, "runs_kernels", lambda x: True)
    fused = fuse_copy(model)
    for module in fused.modules():
        if isinstance(module, BatchNormAct2d):
            module.algorithm = "two_pass"
    return fused


class Sum(nn.Module):
    """A residual block whose branch is a Sequential, as in a RegNet."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)))
        self.f.append(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)))
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.f(x))


BLOCKS: dict[str, tuple[Callable[[], nn.Module], int]] = {  # by name: constructor, forks in a row of three
    "basic block": (lambda: BasicBlock(4, 4), 2),
    "bottleneck": (lambda: Bottleneck(4, 1), 2),
    "branch in a sequential": (Sum, 0),  # the norm is inside the branch, which computes the sum
    "timm": (lambda: timm.models.resnet.BasicBlock(4, 4), 2),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_the_gradient_of_a_skip_connection_arrives_separately(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, forks = BLOCKS[name]
    model = residual_blocks(build)
    fused = with_kernels(model, monkeypatch)
    with CountSecondGradients() as second:
        assert_same_function(model, fused)
    assert second.count == 2 * forks  # in training and in eval mode


def test_a_fork_is_left_out_where_the_partial_gradient_could_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def hook(model: nn.Module, where: str) -> list[Tensor]:
        seen: list[Tensor] = []

        def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
            output.register_hook(seen.append)

        if where:
            model.get_submodule(where).register_forward_hook(keep)
        return seen

    model = residual_blocks()
    for where, forks in (("3.0", 1), ("3.0.relu", 1), ("3.1.relu", 1), ("3.2", 1), ("", 2)):
        plain, fused = copy.deepcopy(model), with_kernels(model, monkeypatch)
        expected, got = hook(plain, where), hook(fused, where)
        with CountSecondGradients() as second:
            values_of(fused, True)
        values_of(plain, True)
        assert second.count == forks, where
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)
    handle = register_module_forward_hook(lambda module, inputs, output: None)
    with CountSecondGradients() as second:
        values_of(with_kernels(model, monkeypatch), True)
    handle.remove()
    assert second.count == 0, "a hook of every module may see any tensor"


def test_the_kernels_of_a_cpu_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    if not cpp_norm.available()[0]:
        pytest.skip(cpp_norm.available()[1])
    monkeypatch.setattr(dispatch_table, "is_faster", lambda x, training, has_residual: True)
    model = residual_blocks().float()
    fused = fuse_copy(model)
    images = IMAGES.float().to(memory_format=torch.channels_last)
    with torch.profiler.profile() as profiler:
        for training in (True, False):
            expected, got = values_of(model, training, images), values_of(fused, training, images)
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
        with torch.no_grad():
            torch.testing.assert_close(fused(images), model(images))
    calls = {event.key.rpartition("::")[2]: event.count for event in profiler.key_averages()}
    assert calls["cpp_batch_norm_act"] == calls["cpp_batch_norm_act_backward"] == 7
    assert calls["cpp_batch_norm_act_inference"] == 7, "gradients in eval mode are torch's"


def test_convolutions_with_a_kernel_use_it() -> None:
    if not cpp_conv.available(torch.bfloat16)[0]:
        pytest.skip(cpp_conv.available(torch.bfloat16)[1])
    model = torchvision.models.ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10).to(memory_format=torch.channels_last)
    fused = fuse_copy(model)
    expected = ("layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv2", "layer3.0.conv2", "layer4.0.conv2")
    assert fastres.fusion_report(fused).convolutions == expected
    assert "5 Conv2d with a C++ kernel" in str(fastres.fusion_report(fused))
    images = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)

    def convolutions(network: nn.Module) -> int:
        with torch.autocast("cpu", torch.bfloat16), torch.profiler.profile() as profiler:
            network(images).sum().backward()
        return sum(event.count for event in profiler.key_averages() if event.key.endswith("cpp_weight_gradient"))

    assert convolutions(model) == 0 and convolutions(fused) == 2
    assert convolutions(fastres.unfuse(fused)) == 0
    assert type(fused.layer1[0].conv1) is nn.Conv2d and "algorithm" not in fused.layer1[0].conv1.__dict__


def test_dtype_and_memory_format_can_change() -> None:
    fused = fastres.fuse(resnet())
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        fused.to(dtype).to(memory_format=torch.channels_last)
        y = fused(IMAGES.to(dtype).to(memory_format=torch.channels_last))
        assert y.dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fused.float()(IMAGES.float()).dtype == torch.bfloat16


@pytest.mark.slow
def test_two_processes_train_it_under_ddp_and_share_statistics() -> None:
    done = run_worker("fuse_ddp", processes=2)
    assert done.returncode == 0, done.stdout


def test_unfuse_keeps_norms_that_share_statistics() -> None:
    fused = fastres.fuse(resnet())
    for module in fused.modules():
        if isinstance(module, BatchNormAct2d):
            module.group_name = "some"
    fastres.unfuse(fused)
    assert type(fused.bn1) is BatchNormAct2d and fused.bn1.act == "none" and fused.bn1.group_name == "some"
