"""model.freeze: frozen parameters and statistics stay bitwise, and the rest trains as plain PyTorch trains it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastres.config.schema import OptimConfig
from fastres.models.freeze import freeze, training_mode
from fastres.models.registry import build_model
from fastres.training.channels_last import check_channels_last
from fastres.training.evaluator import Evaluator
from fastres.training.optim import build_optimizer
from fastres.training.step import TrainStep
from fastres_kernels import convert_sync_batchnorm
from tests.fixtures import engine, rejected

Batch = tuple[Tensor, Tensor]


def a_batch(seed: int, n: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 3, 8, 8, generator=generator).to(memory_format=torch.channels_last)
    return images, torch.randint(10, (n,), generator=generator)


def a_net(norm: str = "torch", name: str = "resnet8") -> nn.Module:
    """Return a network whose running statistics are not a new network's."""
    torch.manual_seed(0)
    model = build_model(name, norm=norm).to(memory_format=torch.channels_last)
    with torch.no_grad():
        model(a_batch(99)[0])
    return model


def is_frozen(key: str, parts: str | list[str]) -> bool:
    return not key.startswith("fc.") if parts == "backbone" else key.startswith(tuple(f"{part}." for part in parts))


def oracle_step(model: nn.Module, sgd: torch.optim.SGD, parts: str | list[str], batches: list[Batch]) -> None:
    """Run a step of plain PyTorch, in which the frozen norms are in eval mode."""
    model.train()
    for name, module in model.named_modules():
        module.train(not (isinstance(module, nn.BatchNorm2d) and is_frozen(f"{name}.", parts)))
    for images, labels in batches:
        (F.cross_entropy(model(images), labels) / len(batches)).backward()
    sgd.step()
    sgd.zero_grad()


PARTS: list[str | list[str]] = ["backbone", ["conv1", "bn1", "layer1"], ["layer2", "fc"], ["layer1.0.bn1"]]


# Triton's interpreter runs the fused norm, so its cases are few.
@pytest.mark.parametrize(
    ("parts", "norm", "accumulate"),
    [
        *((parts, "torch", n) for parts in PARTS for n in (1, 2)),
        (PARTS[0], "fused", 2),
        pytest.param(PARTS[1], "fused", 1, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_frozen_parts_stay_bitwise_and_the_rest_trains_as_in_pytorch(
    parts: str | list[str], norm: str, accumulate: int
) -> None:
    model, oracle = a_net(norm), a_net()
    before = copy.deepcopy(model.state_dict())
    freeze(model, parts)
    check_channels_last(model, engine(), a_batch(98))
    step = TrainStep(model, engine(), OptimConfig(weight_decay=0.1), accumulate=accumulate)
    step.warm_up(*a_batch(97))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    trained = [p for name, p in oracle.named_parameters() if not is_frozen(name, parts)]
    sgd = torch.optim.SGD(trained, lr=0.05, momentum=0.9, weight_decay=0.1)
    evaluator = Evaluator(model, engine(), 10)
    for i in range(2):
        images, labels = a_batch(i, 4)
        step(images, labels, 0.05, i)
        size = len(labels) // accumulate
        oracle_step(oracle, sgd, parts, list(zip(images.split(size), labels.split(size), strict=True)))
        evaluator([a_batch(50)])  # leaves the model in eval mode
    for key, tensor in model.state_dict().items():
        if is_frozen(key, parts):
            assert torch.equal(tensor, before[key]), key
        else:
            assert not torch.equal(tensor, before[key]), key
            torch.testing.assert_close(tensor, oracle.state_dict()[key], rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize("optim", ["sgd", "muon"])
@pytest.mark.parametrize("everything", [True, False])
@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_the_optimizer_has_the_trained_parameters_alone(parts: Any, everything: bool, optim: Any) -> None:
    model = a_net()
    freeze(model, parts)
    config = OptimConfig(name=optim, decay_norm_and_bias=everything, norm_bias_lr_scale=64)
    groups = build_optimizer(model, config, torch.zeros(())).param_groups
    found = sorted(id(p) for group in groups for p in group["params"])
    assert found == sorted(id(p) for name, p in model.named_parameters() if not is_frozen(name, parts))


@pytest.mark.parametrize("norm", ["torch", "fused"])
def test_a_frozen_backbone_saves_nothing_for_the_backward(norm: str) -> None:
    model = a_net(norm)
    freeze(model, "backbone")
    step = TrainStep(model, engine(), OptimConfig())
    training_mode(model)
    features: list[Tensor] = []
    model.get_submodule("fc").register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    saved: list[Tensor] = []
    images, labels = a_batch(0)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        step.inner(images, labels)
        whole = [tuple(tensor.shape) for tensor in saved]
        saved.clear()
        F.cross_entropy(model.get_submodule("fc")(features[0]), labels)
    assert whole == [tuple(tensor.shape) for tensor in saved] and not features[0].requires_grad


def test_a_frozen_norm_stays_frozen_when_it_is_made_to_share_statistics() -> None:
    model = a_net()
    freeze(model, ["bn1"])
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        convert_sync_batchnorm(model)
    finally:
        torch.distributed.destroy_process_group()
    training_mode(model)
    assert not model.get_submodule("bn1").training and model.get_submodule("layer1.0.bn1").training


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_compiled_step_keeps_frozen_parts_too(precision: str) -> None:
    model = a_net("fused")
    eager = copy.deepcopy(model)
    before = copy.deepcopy(model.state_dict())
    for net in (model, eager):
        freeze(net, ["conv1", "bn1", "layer1"])
    steps = [TrainStep(model, engine(precision=precision, compile=True), OptimConfig(weight_decay=0.1)),
             TrainStep(eager, engine(precision=precision), OptimConfig(weight_decay=0.1))]  # fmt: skip
    for i in range(3):
        images, labels = a_batch(i)
        for step in steps:
            step(images.to(step.engine.dtype), labels, 0.05, i)
            Evaluator(step.model, engine(precision=precision), 10)([a_batch(50)] if precision == "fp32" else [])
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]) == is_frozen(key, ["conv1", "bn1", "layer1"]), key
        torch.testing.assert_close(tensor, eager.state_dict()[key], rtol=0.05, atol=0.02, msg=key)


def test_the_frozen_stem_of_speed_resnet_stays_as_it_is() -> None:
    model = a_net(name="speed_resnet")
    stem = model.state_dict()["conv1.weight"].clone()
    freeze(model, ["conv1", "stages.0"])  # the stem has no parameters, which is no error
    step = TrainStep(model, engine(), OptimConfig())
    step(*a_batch(0), 0.1, 0)
    assert torch.equal(model.state_dict()["conv1.weight"], stem)
    assert model.get_submodule("stages.1.bn1").training and not model.get_submodule("stages.0.bn1").training


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        (["layr1"], "did you mean 'layer1'? choose from backbone, conv1, bn1, layer1, layer2, layer3, fc"),
        (["layer1.0.bn3"], "did you mean 'layer1.0.bn"),
        ("Backbone", "did you mean 'backbone'"),
        (["conv"], "did you mean 'conv1'"),
        (["backbone", "fc"], "leaves nothing to train"),
    ],
    ids=str,
)
def test_a_wrong_name_is_rejected_with_the_nearest(parts: Any, said: str) -> None:
    with pytest.raises(ValueError, match=r"module|nothing") as caught:
        freeze(build_model("resnet8"), parts)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_the_command_rejects_a_wrong_name() -> None:
    from fastres.config.cli import parse

    with rejected("model.freeze", "layr1", "did you mean 'layer1'"):
        parse(["--model.freeze", "[conv1, layr1]"])
    assert parse(["--model.freeze", "[conv1, layer1]"]).model.freeze == ["conv1", "layer1"]
    assert parse(["--model.freeze", "backbone"]).model.freeze == "backbone"
