"""Training steps and evaluations equal the plain PyTorch that they replace, in every precision, and do nothing else."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn

from fastres.config.schema import Config, DataConfig, OptimConfig
from fastres.data.spec import IGNORED
from fastres.models.registry import build_model
from fastres.runs import checkpoint
from fastres.training.build import loss_weights, warm_up
from fastres.training.channels_last import check_channels_last
from fastres.training.evaluator import Evaluator
from fastres.training.metrics import DeviceMetrics
from fastres.training.optim import build_optimizer, orthogonal
from fastres.training.step import ForwardLoss, TrainStep, raise_recompile_limit
from tests.fixtures import engine, rejected

Batch = tuple[Tensor, Tensor]


def a_batch(n: int = 8, size: int = 8, channels: int = 3, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, channels, size, size, generator=generator)
    labels = torch.randint(10, (n,), generator=generator)
    return images.to(memory_format=torch.channels_last), labels


def a_net(name: str = "cifar_resnet", **options: Any) -> nn.Module:
    """Build a network; by default the CIFAR family's smallest, of depth 8."""
    options = options or ({"blocks_per_stage": 1} if name == "cifar_resnet" else {})
    return build_model(name, **options).to(memory_format=torch.channels_last)


def a_step(model: nn.Module, precision: str = "fp32", smoothing: float = 0.0, **optim: Any) -> TrainStep:
    return TrainStep(model, engine(precision=precision), OptimConfig(**optim), smoothing)


def run_steps(step: TrainStep, steps: int, first: int = 0, lr: float = 0.1) -> None:
    """Run the steps [first, first + steps), each on a batch of its own."""
    for i in range(first, first + steps):
        images, labels = a_batch(seed=i)
        step(images.to(step.engine.dtype), labels, lr, i)


def momentum(step: TrainStep) -> list[Tensor]:
    return [state["momentum_buffer"] for state in step.optimizer.state.values()]


def assert_equal_weights(one: nn.Module, other: nn.Module) -> None:
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name


# ---- training -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_loss_falls_and_the_weights_stay_in_fp32(precision: str) -> None:
    step = a_step(a_net(), precision)
    images, labels = a_batch(16)
    losses = []
    for i in range(12):
        step(images.to(step.engine.dtype), labels, 0.05, i)
        metrics, bad_step = step.metrics.read()
        losses.append(metrics.loss)
        step.metrics.reset()
        assert bad_step == -1 and metrics.samples == 16
    assert losses[-1] < losses[0] / 2
    assert {p.dtype for p in step.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_step_is_forward_loss_backward_and_sgd_and_nothing_else(nesterov: bool) -> None:
    model = a_net()
    oracle = copy.deepcopy(model)
    step = a_step(model, smoothing=0.1, nesterov=nesterov, weight_decay=1e-2)
    # torch's own first step sets the momentum to the gradient; fastres's momentum starts from zero
    sgd = torch.optim.SGD(oracle.parameters(), lr=0.1, momentum=0.9, nesterov=nesterov, weight_decay=1e-2, fused=True)
    loss_sum, correct = 0.0, 0
    for i, lr in enumerate([0.1, 0.05, 0.2]):
        images, labels = a_batch(seed=i)
        step(images, labels, lr, i)

        sgd.param_groups[0]["lr"] = lr
        oracle.train()
        logits = oracle(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=0.1)
        loss.backward()
        sgd.step()
        sgd.zero_grad()
        loss_sum += loss.item() * len(labels)
        correct += int((logits.argmax(1) == labels).sum())
    assert_equal_weights(model, oracle)
    metrics, _ = step.metrics.read()
    assert metrics.mean_loss == pytest.approx(loss_sum / 24) and metrics.accuracy == correct / 24


def test_an_overflow_in_the_very_first_fp16_step_leaves_no_trace() -> None:
    # torch's fused SGD then skips the update, but keeps its uninitialised momentum buffer
    # (weights reached 3.9e28).
    model = a_net()
    before, untouched = copy.deepcopy(model), a_step(copy.deepcopy(model), "fp16")
    step = a_step(model, "fp16")
    scale = 2.0**40
    step.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    run_steps(step, 1)
    assert step.scaler.get_scale() == scale / 2  # it did overflow
    assert_equal_weights(model, before)
    assert len(momentum(step)) == len(list(model.parameters()))
    assert all(not buffer.any() for buffer in momentum(step))

    step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    untouched.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    run_steps(step, 2)
    run_steps(untouched, 2)
    assert not torch.equal(model.conv1.weight, before.conv1.weight)
    assert_equal_weights(model, untouched.model)


@pytest.mark.parametrize("name", ["cifar_resnet", "mini_resnet", "resnet18"])
@pytest.mark.parametrize("everything", [True, False])
def test_norms_and_biases_are_decayed_only_on_request(name: str, everything: bool) -> None:
    model = a_net(name)
    lr = torch.tensor(0.5)
    config = OptimConfig(weight_decay=0.1, momentum=0.0, decay_norm_and_bias=everything)
    optimizer = build_optimizer(model, config, lr)
    norms = (nn.BatchNorm2d,)
    exempt = {
        f"{prefix}.{key}"
        for prefix, module in model.named_modules()
        for key, _ in module.named_parameters(recurse=False)
        if isinstance(module, norms) or key == "bias"
    }
    assert exempt and len(exempt) < len(list(model.parameters()))
    for parameter in model.parameters():
        parameter.data.fill_(1)
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for key, parameter in model.named_parameters():
        kept = 1.0 if key in exempt and not everything else 0.95
        assert torch.allclose(parameter, torch.tensor(kept)), key


def norm_biases_of(model: nn.Module) -> set[str]:
    norms = {name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    return {key for key, _ in model.named_parameters() if key.endswith("bias") and key.rpartition(".")[0] in norms}


@pytest.mark.parametrize("everything", [True, False])
def test_norm_biases_learn_at_their_own_rate_and_decay_at_the_others(everything: bool) -> None:
    model = a_net()
    before = copy.deepcopy(dict(model.named_parameters()))
    biases = norm_biases_of(model)
    assert biases and "fc.bias" not in biases
    optim = {"momentum": 0.0, "weight_decay": 0.1, "decay_norm_and_bias": everything}
    step = a_step(model, norm_bias_lr_scale=64.0, **optim)
    oracle = a_step(copy.deepcopy(model), **optim)
    for bias in biases:  # zeros would not show their decay
        for net in (model, oracle.model):
            net.get_parameter(bias).data.fill_(0.5)
    images, labels = a_batch()
    gradients = {}
    for name, p in oracle.model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, name=name: gradients.update({name: p.grad.clone()}))
    step(images, labels, 0.01, 0)
    oracle(images, labels, 0.01, 0)
    for name, p in model.named_parameters():
        if name in biases:
            decayed = 0.5 * (1 - 0.01 * 0.1) if everything else 0.5
            assert torch.allclose(p, decayed - 0.64 * gradients[name]), name
        else:
            assert torch.equal(p, oracle.model.get_parameter(name)) and not torch.equal(p, before[name]), name


def test_momentum_can_be_left_out() -> None:
    model = a_net()
    oracle = copy.deepcopy(model)
    run_steps(a_step(model, momentum=0.0, weight_decay=0.0), 1)
    images, labels = a_batch(seed=0)
    F.cross_entropy(oracle(images), labels).backward()
    for p, q in zip(model.parameters(), oracle.parameters(), strict=True):
        assert torch.allclose(p, q - 0.1 * q.grad)


def test_micro_batches_have_the_mean_of_their_gradients() -> None:
    model = a_net()
    oracle = copy.deepcopy(model)
    step = TrainStep(model, engine(), OptimConfig(momentum=0.0, weight_decay=0.0), accumulate=2)
    images, labels = a_batch()
    step(images, labels, 0.1, 0)
    for half in (slice(4), slice(4, 8)):  # each with the statistics of its own BatchNorm
        (F.cross_entropy(oracle(images[half]), labels[half]) / 2).backward()
    for p, q in zip(model.parameters(), oracle.parameters(), strict=True):
        assert torch.allclose(p, q - 0.1 * q.grad)
    assert step.metrics.read()[0].samples == 8


def newton_schulz(matrix: Tensor) -> Tensor:
    """Return the matrix made nearly orthogonal, as published (Jordan et al. 2024), in its own precision."""
    x = matrix / matrix.norm()
    if wide := matrix.shape[0] > matrix.shape[1]:
        x = x.T
    for _ in range(3):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if wide else x


def test_muon_trains_the_filters_and_sgd_all_other_weights() -> None:
    model = a_net().double()
    oracle = copy.deepcopy(model)
    how = {"momentum": 0.85, "nesterov": True, "weight_decay": 1e-2}
    step = a_step(model, "fp64", name="muon", lr=0.125, muon_lr=0.25, muon_momentum=0.6, **how)
    filters = {name: p for name, p in oracle.named_parameters() if p.ndim == 4}
    momenta = {name: torch.zeros_like(p) for name, p in filters.items()}
    sgd = torch.optim.SGD([p for p in oracle.parameters() if p.ndim != 4], lr=0.125, **how)
    assert len(filters) > 5
    for i, lr in enumerate([0.125, 0.0625, 0.25]):  # exact in float32; the filters' rate stays twice the others'
        images, labels = a_batch(seed=i)
        step(images.double(), labels, lr, i)

        oracle.train()
        F.cross_entropy(oracle(images.double()), labels).backward()
        sgd.param_groups[0]["lr"] = lr
        sgd.step()
        with torch.no_grad():
            for name, weight in filters.items():
                momenta[name] = 0.6 * momenta[name] + weight.grad
                matrix = (weight.grad + 0.6 * momenta[name]).flatten(1)
                weight *= math.sqrt(len(weight)) / weight.norm()
                weight -= 2 * lr * newton_schulz(matrix).view(weight.shape)
        oracle.zero_grad()
    for (name, a), b in zip(model.named_parameters(), oracle.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-9), name


@pytest.mark.parametrize("shape", [(16, 3, 3, 3), (64, 16, 3, 3), (64, 8, 1, 1), (10, 20, 1, 1), (1, 4, 3, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_orthogonal_filters_have_singular_values_near_one(
    shape: tuple[int, ...], dtype: torch.dtype, scale: float
) -> None:
    torch.manual_seed(0)
    filters = scale * torch.randn(shape, dtype=dtype).to(memory_format=torch.channels_last)
    before = torch.linalg.svd(filters.flatten(1).double(), full_matrices=False)
    assert before.S.min() > 0.02 * before.S.norm()
    out = orthogonal(filters)
    assert out.shape == filters.shape
    # the input's own singular vectors are kept; bf16 has three digits
    after = (before.U.T @ out.flatten(1).double() @ before.Vh.T).diagonal()
    slack = 0.02 if dtype == torch.float32 else 1e-6
    assert 0.68 - slack < after.min() and after.max() < 1.21 + slack


def test_orthogonal_leaves_zeros_as_they_are() -> None:
    assert not orthogonal(torch.zeros(4, 2, 3, 3)).any()


# ---- what is compiled ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled() -> Iterator[tuple[TrainStep, Evaluator]]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    model, how = a_net(), engine(compile=True)
    yield TrainStep(model, how, OptimConfig()), Evaluator(model, how, 10)
    torch._dynamo.reset()


@pytest.mark.slow
def test_nothing_recompiles_and_evaluation_uses_the_present_weights(compiled: Any) -> None:
    step, evaluate = compiled
    counters = torch._dynamo.utils.counters
    test_set = [a_batch(seed=100), a_batch(seed=101)]
    eager = Evaluator(step.model, engine(), 10)

    def assert_up_to_date() -> float:
        seen, truth = evaluate(test_set), eager(test_set)
        assert seen.mean_loss == pytest.approx(truth.mean_loss, rel=1e-4) and seen.correct == truth.correct
        return seen.mean_loss

    run_steps(step, 1)
    losses = [assert_up_to_date()]
    # Forward and loss for training and for evaluation, and the metrics of a step.
    assert counters["stats"]["unique_graphs"] == 3
    assert not counters["graph_break"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for i, lr in enumerate([0.1, 0.01, 0.0, 0.3], start=1):
            run_steps(step, 1, first=i, lr=lr)
            losses.append(assert_up_to_date())  # pytorch#108863: stale weights
    assert counters["stats"]["unique_graphs"] == 3 and not counters["graph_break"]
    assert len(set(losses)) == len(losses)


@pytest.mark.slow
def test_compiled_and_eager_steps_agree(compiled: Any) -> None:
    step, _ = compiled
    eager = a_step(copy.deepcopy(step.model))
    eager.load_state_dict(copy.deepcopy(step.state_dict()))
    run_steps(step, 2)
    run_steps(eager, 2)
    for a, b in zip(step.model.parameters(), eager.model.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["cifar_resnet", "mini_resnet", "speed_resnet"])
def test_weights_that_are_cast_in_one_batch_are_cast_as_autocast_does(name: str, precision: str) -> None:
    """mini_resnet has biases, which are cast too; speed_resnet's stem is frozen, so it is not cast."""
    model = a_net(name)
    images, labels = a_batch(size=16)
    images = images.to(engine(precision=precision).dtype)

    def run(batched: bool) -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        forward_loss = ForwardLoss(model, engine(precision=precision))
        forward_loss.cast_together = batched
        loss, _ = forward_loss(images, labels)
        loss.backward()
        return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    (loss, grads), (expected, by_autocast) = run(True), run(False)
    assert torch.equal(loss, expected) and grads.keys() == by_autocast.keys()
    for parameter, grad in by_autocast.items():
        assert torch.equal(grads[parameter], grad) and grads[parameter].stride() == grad.stride(), parameter
    aligned = [cast for cast in ForwardLoss(model, engine(precision=precision))._cast_weights().values()
               if cast.numel() % 8 == 0]  # fmt: skip
    assert aligned and all(cast.storage_offset() % 8 == 0 for cast in aligned)


def warm_up_with(step: TrainStep, evaluator: Evaluator, batch: Batch, say: Callable[[str], None]) -> None:
    """Call warm_up() with the parts that it reads: `batch` as the dummy, and a curve loader of one batch."""
    curve_loader = SimpleNamespace(evaluate=lambda: iter([a_batch()]))
    data = SimpleNamespace(curve_loader=curve_loader)
    parts: Any = SimpleNamespace(step=step, evaluator=evaluator, dummy_batch=batch, data=data)
    warm_up(parts, say)


@pytest.fixture
def broken_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._inductor.config.patch({"cpp.cxx": ("/nowhere/g++",), "force_disable_caches": True}):
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize("asked_for", [True, False])
def test_a_broken_compiler_means_eager_unless_compiling_was_requested(asked_for: bool, broken_compiler: None) -> None:
    model, how = a_net(), engine(compile=True, compile_may_fall_back=not asked_for)
    oracle = copy.deepcopy(model)
    step = TrainStep(model, how, OptimConfig())
    evaluate, said = Evaluator(model, how, 10), list[str]()
    if asked_for:
        with pytest.raises(Exception, match="nowhere"):
            warm_up_with(step, evaluate, a_batch(), said.append)
        assert said == []
        return
    warm_up_with(step, evaluate, a_batch(), said.append)
    assert len(said) == 1 and said[0].startswith("compile: false") and "\n" not in said[0]
    assert not step.inner.compiled  # the summary reports it
    run_steps(step, 2)
    run_steps(eager := a_step(oracle), 2)
    assert_equal_weights(model, oracle)
    found, expected = evaluate([a_batch()]), Evaluator(eager.model, engine(), 10)([a_batch()])
    assert found.loss == expected.loss and found.confusion.tolist() == expected.confusion.tolist()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_warming_up_leaves_no_trace(precision: str) -> None:
    step = a_step(a_net(), precision)
    run_steps(step, 2)
    before = checkpoint.digest(step.state_dict())
    images, labels = a_batch(seed=9)
    warm_up_with(step, Evaluator(step.model, step.engine, 10), (images.to(step.engine.dtype), labels), print)
    assert checkpoint.digest(step.state_dict()) == before
    assert all(p.grad is None for p in step.model.parameters())


# ---- channels-last ------------------------------------------------------------------------------------------


class ToNCHW(nn.Module):
    """A module that undoes channels-last in the forward or, with the same values, in the backward pass."""

    def __init__(self, backward: bool) -> None:
        super().__init__()
        self.backward = backward

    def forward(self, x: Tensor) -> Tensor:
        if not self.backward:
            return x.contiguous()
        x = x.clone(memory_format=torch.preserve_format)
        x.register_hook(lambda gradient: gradient.contiguous())
        return x


def a_net_with_a_copy(place: str, backward: bool) -> nn.Module:
    def copy_at(here: str) -> list[nn.Module]:
        return [ToNCHW(backward)] if here == place else []

    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), *copy_at("before the norm"), nn.BatchNorm2d(8), nn.ReLU(),
        *copy_at("before a convolution"), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Flatten(2), nn.AvgPool1d(16),
        nn.Flatten(), nn.Linear(8, 10),
    )  # fmt: skip
    return net.to(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("name", "size", "channels"),
    [
        ("resnet20", 16, 3),
        ("cifar_resnet", 8, 1),
        ("resnet18", 33, 3),
        ("resnet50", 33, 3),
        ("mini_resnet", 28, 1),
        ("speed_resnet", 8, 1),
        ("speed_resnet", 32, 3),
    ],
)
def test_every_family_is_channels_last_throughout(name: str, size: int, channels: int) -> None:
    options = {"blocks_per_stage": 1} if name == "cifar_resnet" else {}
    model = a_net(name, in_channels=channels, **options)
    before = checkpoint.digest(model.state_dict())
    check_channels_last(model, engine(), a_batch(2, size, channels))
    assert checkpoint.digest(model.state_dict()) == before
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("place", ["before the norm", "before a convolution"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_a_copy_to_another_order_is_found(place: str, backward: bool) -> None:
    batch = a_batch(2, 8)
    check_channels_last(a_net_with_a_copy("nowhere", backward), engine(), batch)
    with pytest.raises(AssertionError, match="strides"):
        check_channels_last(a_net_with_a_copy(place, backward), engine(), batch)


# ---- evaluation ---------------------------------------------------------------------------------------------


def test_evaluation_is_exact_and_ignores_padding_of_a_batch() -> None:
    model = a_net()
    run_steps(a_step(model), 3)
    images, labels = a_batch(21, seed=7)
    model.eval()
    losses, right, in_top, confusion = [], 0, 0, torch.zeros(10, 10, dtype=torch.int64)
    with torch.no_grad():
        for image, label in zip(images, labels, strict=True):
            logits = model(image[None])
            losses.append(F.cross_entropy(logits, label[None]).item())
            right += int(logits.argmax() == label)
            in_top += int((logits > logits[0, label]).sum() < 5)
            confusion[label, logits.argmax()] += 1
    model.train()
    before = checkpoint.digest(model.state_dict())

    filled_images = torch.cat([images, torch.full_like(images[:3], 9)])
    filled_labels = torch.cat([labels, torch.full_like(labels[:3], IGNORED)])
    nothing = (filled_images[:8], torch.full_like(labels[:8], IGNORED))
    evaluate = Evaluator(model, engine(), 10)
    for batches in (
        [(images, labels)],
        list(zip(filled_images.split(8), filled_labels.split(8), strict=True)),
        [nothing, (images, labels)],  # another process has the rest of that batch
    ):
        metrics = evaluate(batches)
        assert (metrics.correct, metrics.samples) == (right, 21)
        assert metrics.accuracy == right / 21
        assert metrics.confusion.tolist() == confusion.tolist() and metrics.top_accuracy == in_top / 21
        assert metrics.mean_loss == pytest.approx(math.fsum(losses) / 21, rel=1e-5)
    assert checkpoint.digest(model.state_dict()) == before


def test_the_accuracy_of_a_class_is_over_its_samples_and_few_classes_have_no_top_5() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(3, 3, bias=False))  # predicts the largest of three pixels
    net[1].weight.data = torch.eye(3)
    images = torch.eye(3)[[0, 0, 1, 0, 1]].reshape(5, 3, 1, 1)
    found = Evaluator(net, engine(), 3)([(images, torch.tensor([0, 0, 0, 1, 1]))])
    assert found.confusion.tolist() == [[2, 1, 0], [1, 1, 0], [0, 0, 0]]
    np.testing.assert_array_equal(found.class_accuracy, [2 / 3, 1 / 2, np.nan])
    assert (found.correct, found.samples, found.top_accuracy) == (3, 5, None)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("mixed", [False, True], ids=["labels", "shares"])
def test_class_weights_are_factors_of_each_samples_loss(accumulate: int, mixed: bool) -> None:
    model, (images, labels) = a_net(), a_batch(8)
    weights = torch.linspace(0.5, 3, 10)
    shares = torch.rand(8, 10).softmax(1) if mixed else F.one_hot(labels, 10).float()
    smooth = 0.9 * shares + 0.1 / 10
    oracle = copy.deepcopy(model)
    losses = [-(weights * smooth[rows] * oracle(images[rows]).log_softmax(1)).sum() / 8
              for rows in torch.arange(8).chunk(accumulate)]  # fmt: skip
    sum(losses).backward()
    sgd = torch.optim.SGD(oracle.parameters(), lr=0.1)
    sgd.step()
    optim = OptimConfig(momentum=0.0, weight_decay=0.0)
    step = TrainStep(model, engine(), optim, 0.1, accumulate, class_weights=weights)
    step(images, shares if mixed else labels, 0.1, 0)
    for (name, parameter), expected in zip(model.named_parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, msg=name)
    assert step.metrics.read()[0].mean_loss == pytest.approx(sum(losses).item(), rel=1e-5)


def test_class_weights_have_a_mean_of_1_over_the_samples() -> None:
    def weights_of(given: Any) -> Any:
        found = loss_weights(Config(data=DataConfig(class_weights=given)), engine(), np.array([0] * 6 + [1] * 2), 3)
        return None if found is None else found.tolist()

    assert weights_of(None) is None
    assert weights_of("balanced") == pytest.approx([8 / 12, 8 / 4, 1])  # the third class has no samples
    assert weights_of([1.0, 3.0, 5.0]) == pytest.approx([2 / 3, 2, 10 / 3])
    with rejected("data.class_weights: 2 numbers for 3 classes; give one for each, in order"):
        weights_of([1.0, 3.0])


def test_mirrored_evaluation_is_the_mean_of_the_logits_of_both_views() -> None:
    model = a_net().eval()
    images, labels = a_batch()
    metrics = Evaluator(model, engine(), 10, mirrored=True)([(images, labels)])
    with torch.no_grad():
        logits = (model(images) + model(images.flip(3))) / 2
        assert not torch.allclose(logits, model(images), atol=1e-4)
    assert metrics.correct == (logits.argmax(1) == labels).sum()
    assert metrics.mean_loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)


def test_metrics_add_up_and_remember_the_first_step_of_non_finite_loss() -> None:
    metrics = DeviceMetrics(torch.device("cpu"))
    for step, loss in enumerate([1.0, 2.0]):
        metrics.step.fill_(step)
        metrics.add(torch.tensor(loss), torch.tensor(3), 4)
    sums, bad_step = metrics.read()
    assert (sums.loss, sums.correct, sums.samples, bad_step) == (3.0, 6, 8, -1)
    assert (sums + sums).samples == 16 and sums.mean_loss == 3 / 8 and sums.accuracy == 6 / 8
    for step, loss in ((7, math.nan), (8, 1.0), (9, math.inf)):
        metrics.step.fill_(step)
        metrics.add(torch.tensor(loss), torch.tensor(0), 4)
    assert metrics.read()[1] == 7
    metrics.reset()
    assert metrics.read()[1] == -1 and metrics.read()[0].samples == 0
    metrics.step.fill_(0)
    metrics.add(torch.tensor(math.inf), torch.tensor(0), 4)
    assert metrics.read()[1] == 0


# ---- state --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "bias_scale"), [("fp32", 1.0), ("bf16", 1.0), ("fp16", 1.0), ("fp32", 64.0)])
def test_a_restored_step_continues_like_the_original(precision: str, bias_scale: float, tmp_path: Path) -> None:
    options: dict[str, Any] = {"nesterov": True, "norm_bias_lr_scale": bias_scale}
    uninterrupted = a_step(a_net(), precision, **options)
    run_steps(uninterrupted, 3)
    path = checkpoint.save(tmp_path, 3, uninterrupted.state_dict(), keep=1)
    run_steps(uninterrupted, 3, first=3, lr=0.05)

    torch.manual_seed(1)
    restored = a_step(a_net(), precision, **options)
    restored.load_state_dict(checkpoint.load(path))
    run_steps(restored, 3, first=3, lr=0.05)
    assert checkpoint.digest(restored.state_dict()) == checkpoint.digest(uninterrupted.state_dict())
    assert restored.metrics.read() == uninterrupted.metrics.read()

    before = copy.deepcopy(restored.model)
    run_steps(restored, 1, first=6, lr=0.0)  # the learning rate is still the argument of the step
    assert_equal_weights(restored.model, before)
    run_steps(restored, 1, first=7, lr=0.1)
    assert not torch.equal(restored.model.conv1.weight, before.conv1.weight)


def test_the_state_of_another_model_is_not_loaded() -> None:
    state = a_step(a_net()).state_dict()
    with pytest.raises((RuntimeError, ValueError, KeyError)):
        a_step(a_net("cifar_resnet", blocks_per_stage=2)).load_state_dict(state)


def test_one_process_may_compile_steps_for_more_than_eight_networks() -> None:
    config = torch._dynamo.config
    with config.patch(recompile_limit=8):
        raise_recompile_limit(20)
        raise_recompile_limit(4)  # never fewer than another caller has set
        assert config.recompile_limit == 20
