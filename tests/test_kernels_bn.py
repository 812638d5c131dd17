"""Test fused BatchNorm + ReLU (+ add): the reference against torch, the Triton kernels against it in float64.

The kernels run in Triton's interpreter, which conftest.py enables. Only a GPU can test the barrier of the cooperative
kernels, and speed.
"""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastres_kernels import BatchNormAct2d, defer_running_stats, tiling, triton_launch
from fastres_kernels.batchnorm import cooperative, dispatch_table, ops
from tests.commands import run_module, run_worker

CHECKOUT = Path(__file__).parent.parent
ALGORITHMS = ("two_pass", "cooperative")
# Sums run over thousands of values of magnitude 1 in float32, and results are rounded once to their dtype.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int, scale: float = 1, shift: float = 0) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return channels_last((values * scale + shift).to(dtype))


def assert_close(ours: Tensor, oracle: Tensor, dtype: torch.dtype, what: str = "") -> None:
    error = (ours.double() - oracle.double()).abs().max().item()
    assert error <= TOLERANCE[dtype] * (1 + oracle.abs().max().item()), f"{what}: {error:.2e}"


def module(channels: int, dtype: torch.dtype = torch.float32, **options: Any) -> BatchNormAct2d:
    """Return a norm with different weights and biases per channel, in float32, or in float64 for the oracle."""
    norm = BatchNormAct2d(channels, **options)
    if norm.affine:
        generator = torch.Generator().manual_seed(1)
        nn.init.uniform_(norm.weight, 0.5, 2, generator=generator)
        nn.init.uniform_(norm.bias, -1, 1, generator=generator)
    return norm.double() if dtype == torch.float64 else norm


# ---- the reference is torch's BatchNorm --------------------------------------------------------------------


@pytest.mark.parametrize("act", ["relu", "none"])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}, {"eps": 0.1}])
def test_in_float64_it_is_torch_batch_norm_forward_and_backward(
    options: dict[str, Any], training: bool, with_residual: bool, act: str
) -> None:
    ours = module(5, torch.float64, act=act, **options).train(training)
    theirs = nn.BatchNorm2d(5, **options).double().train(training)
    theirs.load_state_dict(ours.state_dict())
    inputs = [random((3, 5, 7, 2), torch.float64, seed).requires_grad_() for seed in (0, 1)]
    residual = inputs[1] if with_residual else None
    weights = random((3, 5, 7, 2), torch.float64, 2)
    results = []
    for norm in (ours, theirs):
        if norm is ours:
            y = norm(inputs[0], residual)
        else:
            y = norm(inputs[0]) if residual is None else norm(inputs[0]) + residual
            y = F.relu(y) if act == "relu" else y
        leaves = [inputs[0], *([residual] if with_residual else []), *norm.parameters()]
        results.append([y, *torch.autograd.grad((y * weights).sum(), leaves), *norm.buffers()])
    for a, b in zip(*results, strict=True):
        assert_close(a, b, torch.float64)


@pytest.mark.parametrize("momentum", [0.1, 0.9, 0.0, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # the kernels, and the reference
def test_running_statistics_are_torchs_over_ten_steps(momentum: float | None, dtype: torch.dtype) -> None:
    ours = module(6, dtype, momentum=momentum)
    theirs = nn.BatchNorm2d(6, momentum=momentum).double()
    for step in range(10):
        x = random((4, 6, 5, 3), dtype, step, scale=step + 1, shift=step)
        ours(x)
        theirs(x.double())
    assert_close(ours.running_mean, theirs.running_mean, dtype)
    assert_close(ours.running_var, theirs.running_var, dtype)
    assert ours.num_batches_tracked == theirs.num_batches_tracked == 10
    x = random((4, 6, 5, 3), dtype, 11)
    assert_close(
        ours.eval()(x), F.relu(theirs.eval()(x.double()) * ours.weight[:, None, None] + ours.bias[:, None, None]), dtype
    )


class Norms(nn.Module):
    """Three norms with different momenta. The one with momentum None never defers, so it is called twice."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.one, self.other = module(6, momentum=0.3, **options), module(6, momentum=None, **options)
        self.third = module(6, momentum=0.1, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.third(self.other(self.one(x)), residual=x))


# "measured": torch's own operations, on a CPU in float32.
@pytest.mark.parametrize("algorithm", ["two_pass", "measured"])
def test_running_statistics_that_move_together_are_those_that_move_apart(algorithm: str) -> None:
    together, apart = Norms(algorithm=algorithm), Norms(algorithm=algorithm)
    deferral = defer_running_stats(together)
    for step in range(3):
        x = random((4, 6, 5, 3), torch.float32, step, scale=step + 1, shift=step)
        with deferral:
            y = together(x)
            assert together.one.num_batches_tracked == step
        assert torch.equal(y, apart(x))
        for (name, mine), theirs in zip(together.named_buffers(), apart.buffers(), strict=True):
            assert torch.allclose(mine, theirs, rtol=1e-6), name
    assert [norm.num_batches_tracked.item() for norm in together.children()] == [3, 6, 3]
    before = {name: values.clone() for name, values in together.named_buffers()}
    with deferral:
        together.eval()(x)
    with pytest.raises((ValueError, RuntimeError), match="5"), deferral:
        together.train()(x[:, :5])
    together.eval()
    assert all(torch.equal(before[name], values) for name, values in together.named_buffers())
    together.train()(x)  # outside of a block
    assert together.one.num_batches_tracked == 4


def test_a_models_modules_share_one_reusable_deferral() -> None:
    model = Norms()
    deferral = defer_running_stats(model)
    assert defer_running_stats(model) is defer_running_stats(model.one) is deferral
    extended = nn.Sequential(model, module(6))
    wider = defer_running_stats(extended)
    assert wider is not deferral and model.one.deferral is extended[1].deferral is wider
    x = random((4, 6, 5, 3), torch.float32, 0)
    with deferral:  # has no effect, because no module refers to this object any more
        extended(x)
        assert model.one.num_batches_tracked == 1
    plain = defer_running_stats(nn.BatchNorm2d(6))
    with plain:
        assert plain.active
    assert not plain.active


def test_nested_deferrals_update_at_the_end_of_the_outermost_and_an_exception_discards_all() -> None:
    model, x = Norms(), random((4, 6, 5, 3), torch.float32, 0)
    deferral = defer_running_stats(model)
    with deferral:
        with deferral:
            model.one(x)
        assert model.one.num_batches_tracked == 0
        model.third(x)
    assert model.one.num_batches_tracked == model.third.num_batches_tracked == 1

    def fail_inside() -> None:
        with deferral, deferral:
            model.one(x)
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert not deferral.active and not deferral.statistics and not deferral.counters
    assert model.one.num_batches_tracked == 1


def test_a_copied_model_defers_on_its_own_even_if_copied_inside_of_a_block() -> None:
    model, x = Norms(), random((4, 6, 5, 3), torch.float32, 0)
    deferral = defer_running_stats(model)
    for copied in (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))):
        with deferral:
            model.one(x)
            twin = copied(model)
        theirs = defer_running_stats(twin)
        assert theirs is not deferral and twin.third.deferral is theirs and not theirs.active
        assert list(twin.state_dict()) == list(model.state_dict())
        before = twin.one.num_batches_tracked.clone()
        with theirs:
            twin.one(x)
            assert twin.one.num_batches_tracked == before
        assert twin.one.num_batches_tracked == before + 1


def test_deferred_statistics_compile_in_one_graph_without_recompilations() -> None:
    class Step(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model, self.deferral = model, defer_running_stats(model)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.deferral.around(self.model, x)
            return y

    oldest = torch.__version__.startswith("2.11.")  # which rounds running statistics otherwise
    close = partial(torch.testing.assert_close, **({"rtol": 1e-6, "atol": 1e-7} if oldest else {"rtol": 0, "atol": 0}))
    torch._dynamo.reset()
    eager, compiled = Step(Norms()), Step(Norms())
    call = torch.compile(compiled, fullgraph=True, dynamic=False, backend="aot_eager")
    counters = torch._dynamo.utils.counters
    counters.clear()
    for step in range(4):
        x = random((4, 6, 5, 3), torch.float32, step)
        assert torch.equal(call(x), eager(x))
        if step == 1:  # evaluation between training steps
            close(call.eval()(x), eager.eval()(x))
            call.train()
            eager.train()
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
    assert not compiled.deferral.active
    for mine, theirs in zip(compiled.buffers(), eager.buffers(), strict=True):
        close(mine, theirs)


def test_the_state_dict_is_that_of_batch_norm() -> None:
    ours, theirs = BatchNormAct2d(4), nn.BatchNorm2d(4)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())


# ---- the kernels are the reference -------------------------------------------------------------------------


def strided(grad: Tensor, kind: str) -> Tensor:
    """Return the gradient with strides that layers produce: "expanded" as by pooling, "sliced", or "NCHW"."""
    if kind == "expanded":
        return grad[..., :1, :1].expand(grad.shape)
    if kind == "sliced":
        wide = torch.zeros(*grad.shape[:-1], 2 * grad.shape[-1], dtype=grad.dtype)
        wide[..., ::2] = grad
        return wide[..., ::2]
    return grad.contiguous() if kind == "NCHW" else grad


def run(
    dtype: torch.dtype, algorithm: str, shape: tuple[int, ...], inputs: list[Tensor], grads: list[Tensor | None], *,
    with_residual: bool, affine: bool, relu: bool, given: bool, fork: bool,
) -> dict[str, Tensor]:  # fmt: skip
    """Run the op in `dtype`; return y, the statistics, and the gradients of all tensors that have one."""
    c = shape[1]
    x, residual = (channels_last(t.to(dtype)).detach().requires_grad_() for t in inputs)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias = (torch.linspace(a, b, c, dtype=wide).requires_grad_() for a, b in ((0.5, 2), (-1, 1)))
    mean, var = (torch.linspace(a, b, c, dtype=wide) for a, b in ((-0.5, 0.5), (0.5, 1.5)))
    y, mean, var, _, _, skip = ops.batch_norm_act(
        x, residual if with_residual else None, None, weight if affine else None, bias if affine else None,
        mean if given else None, var if given else None, 1e-5, relu, fork, "", algorithm,
    )  # fmt: skip
    outputs = [(y, grads[0])] + ([(skip, grads[1])] if fork else [])
    outputs = [(out, grad.to(dtype)) for out, grad in outputs if grad is not None]
    torch.autograd.backward(*zip(*outputs, strict=True))
    leaves = {"x": x, "residual": residual, "weight": weight, "bias": bias}
    results = {f"gradient of {name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {"y": y.detach(), "mean": mean, "var": var, **results}


SHAPES = st.tuples(
    st.integers(1, 6), st.sampled_from([1, 2, 3, 8, 16, 17, 64, 70, 129]), st.integers(1, 9), st.integers(1, 9)
).filter(lambda s: s[0] * s[2] * s[3] > 1)


@pytest.mark.parametrize("examples", [8, pytest.param(60, marks=pytest.mark.slow)])
def test_values_and_gradients_are_the_float64_oracles(examples: int) -> None:
    cases = given(
        shape=SHAPES,
        dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
        algorithm=st.sampled_from(ALGORITHMS),
        with_residual=st.booleans(),
        affine=st.booleans(),
        relu=st.booleans(),
        given_statistics=st.booleans(),
        gradients=st.sampled_from(["y", "skip", "both"]),
        strides=st.sampled_from(["channels-last", "expanded", "sliced", "NCHW"]),
        tile=st.sampled_from([64, 2048]),
    )
    how = settings(
        max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
    )
    how(cases(check_values_and_gradients))()


def check_values_and_gradients(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    algorithm: str,
    with_residual: bool,
    affine: bool,
    relu: bool,
    given_statistics: bool,
    gradients: str,
    strides: str,
    tile: int,
) -> None:
    inputs = [random(shape, dtype, 3, scale=2, shift=1), random(shape, dtype, 4)]
    grads = [strided(random(shape, dtype, seed), strides) for seed in (5, 6)]
    wanted = [grads[0] if gradients != "skip" else None, grads[1] if gradients != "y" else None]
    options: Any = {
        "with_residual": with_residual, "affine": affine, "relu": relu,
        "given": given_statistics, "fork": gradients != "y",
    }  # fmt: skip
    with small_tiles(tile), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings about gradients that are not channels-last
        ours = run(dtype, algorithm, shape, inputs, wanted, **options)
        oracle = run(torch.float64, algorithm, shape, inputs, wanted, **options)
    assert ours.keys() == oracle.keys()
    for name, value in oracle.items():
        assert_close(ours[name], value, dtype, name)


class small_tiles:
    """Use tiles of `tile` elements, so that small tensors have many CTAs and many tiles per CTA."""

    def __init__(self, tile: int) -> None:
        self.tile = tile

    def __enter__(self) -> None:
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(tiling, "TILE", self.tile)
        self.patch.setattr(tiling, "MAX_PARTIALS", 5)
        for name in ("FORWARD_TILE", "BACKWARD_TILE"):
            on_chip = tiling.OnChipTile(elements=self.tile, ctas_per_sm=100, max_registers=128)
            self.patch.setattr(cooperative, name, on_chip)
            self.patch.setattr(ops, name, on_chip)

    def __exit__(self, *exception: object) -> None:
        self.patch.undo()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    "channels", [1, 2, 5, 16, 33, 64, 100, 128, *(pytest.param(c, marks=pytest.mark.slow) for c in (1000, 2048))]
)
def test_any_number_of_channels(channels: int, algorithm: str) -> None:
    shape = (2, channels, 3, 3)
    inputs = [random(shape, torch.float32, 3, scale=2, shift=1), random(shape, torch.float32, 4)]
    grads: list[Tensor | None] = [random(shape, torch.float32, 5), None]
    options: Any = {"with_residual": True, "affine": True, "relu": True, "given": False, "fork": False}
    ours = run(torch.float32, algorithm, shape, inputs, grads, **options)
    for name, value in run(torch.float64, algorithm, shape, inputs, grads, **options).items():
        assert_close(ours[name], value, torch.float32, name)


def test_the_interpreter_runs_the_kernels_but_not_in_float64() -> None:
    x = random((2, 4, 3, 3), torch.float16, 0)
    assert triton_launch.INTERPRETED and triton_launch.runs_kernels(x)
    assert not triton_launch.runs_kernels(x.double())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_algorithm_asked_for_is_the_one_that_runs(algorithm: str) -> None:
    with triton_launch.recording() as launches:
        x = random((2, 4, 3, 3), torch.float32, 0).requires_grad_()
        module(4, algorithm=algorithm)(x).sum().backward()
    names = [each.kernel.__name__ for each in launches]
    names = [name for name in names if name != "update_kernel"]
    assert (
        list(dict.fromkeys(names))
        == {
            "two_pass": ["statistics_kernel", "normalise_kernel", "channel_sums_kernel", "input_gradient_kernel"],
            "cooperative": ["forward_kernel", "backward_kernel"],
        }[algorithm]
    )


def test_what_does_not_fit_on_the_gpu_is_not_given_to_a_cooperative_kernel() -> None:
    fits = {
        c: tiling.one_pass_tiles(128 * h * h, c, tiling.FORWARD_TILE, 132) for c, h in ((16, 32), (32, 16), (64, 8))
    }
    assert all(fits.values())  # ResNet-20 at batch 128 on an H100
    assert tiling.one_pass_tiles(256 * 56 * 56, 256, tiling.FORWARD_TILE, 132) is None


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_equal_inputs_give_equal_bits(algorithm: str) -> None:
    shape = (3, 20, 5, 7)
    inputs = [random(shape, torch.float16, seed) for seed in (0, 1)]
    grads: list[Tensor | None] = [random(shape, torch.float16, seed) for seed in (2, 3)]
    options: Any = {"with_residual": True, "affine": True, "relu": True, "given": False, "fork": True}
    with small_tiles(256):
        runs = [run(torch.float16, algorithm, shape, inputs, grads, **options) for _ in range(3)]
    for name, first in runs[0].items():
        assert all(torch.equal(first, other[name]) for other in runs[1:]), name


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("shape", [(3, 5, 7, 3), (2, 64, 4, 4), (1, 70, 3, 3)])
def test_every_element_of_every_result_is_written(
    shape: tuple[int, ...], algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fill the results with NaN beforehand, so that elements that the kernels do not write are found."""

    def poisoned(empty: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def make(*args: Any, **kwargs: Any) -> Tensor:
            out = empty(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out.fill_(0x5A)

        return make

    inputs = [random(shape, torch.float32, seed) for seed in (0, 1)]
    grads: list[Tensor | None] = [random(shape, torch.float32, seed) for seed in (2, 3)]
    options: Any = {"with_residual": True, "affine": True, "relu": True, "fork": True}
    with small_tiles(128):
        for given_statistics in (False, True):
            expected = run(torch.float32, algorithm, shape, inputs, grads, given=given_statistics, **options)
            with monkeypatch.context() as patch:
                patch.setattr(torch, "empty", poisoned(torch.empty))
                patch.setattr(torch, "empty_like", poisoned(torch.empty_like))
                ours = run(torch.float32, algorithm, shape, inputs, grads, given=given_statistics, **options)
            for name, value in expected.items():
                assert torch.equal(ours[name], value), name


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_variance_keeps_six_digits_where_the_mean_is_a_thousand_times_the_deviation(algorithm: str) -> None:
    x = random((16, 8, 16, 16), torch.float32, 0, shift=1000)
    with small_tiles(512):
        _, mean, var, *_ = ops.batch_norm_act(x, None, None, None, None, None, None, 1e-5, True, False, "", algorithm)
    exact = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    assert ((var - exact[0]).abs() / exact[0]).max() < 1e-6
    assert ((mean - exact[1]).abs() / exact[1]).max() < 1e-7


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_nan_is_seen_and_not_hidden_by_relu(algorithm: str) -> None:
    x = random((2, 3, 4, 4), torch.float32, 0)
    x[0, 1, 2, 2] = float("nan")
    for residual in (None, torch.zeros_like(x)):
        y = ops.batch_norm_act(x, residual, None, None, None, None, None, 1e-5, True, False, "", algorithm)[0]
        assert y[:, 1].isnan().all() and not y[:, [0, 2]].isnan().any()


def test_the_mask_is_one_bit_an_element() -> None:
    x, residual = (random((3, 5, 3, 3), torch.float32, seed) for seed in (0, 1))
    y, _, _, _, mask, _ = ops.batch_norm_act(x, residual, None, None, None, None, None, 1e-5, True, False, "")
    assert mask.dtype == torch.uint8 and mask.shape == (4, 5)  # ⌈27/8⌉
    assert torch.equal(mask, ops.pack_bits(y > 0)) and torch.equal(ops.unpack_bits(mask, y), y > 0)


# ---- the module ---------------------------------------------------------------------------------------------


def test_a_skip_connections_gradient_is_added_inside_the_op() -> None:
    """Check that the backward of a chain of blocks adds no gradients outside of the op."""

    class Additions(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            size = max((a.numel() for a in args if isinstance(a, Tensor)), default=0)
            self.count += func._schema.name in ("aten::add", "aten::add_") and size >= 2 * 4 * 9
            return func(*args, **(kwargs or {}))

    first, second = module(4), module(4)
    x = random((2, 4, 3, 3), torch.float32, 0).requires_grad_()
    y, skip = first(x, fork=True)
    z = second(2 * y, skip)
    plain = second(2 * y, y)
    weights = random((2, 4, 3, 3), torch.float32, 1)
    with Additions() as additions:
        (apart,) = torch.autograd.grad((z * weights).sum(), x, retain_graph=True)
    assert additions.count == 0
    with Additions() as additions:
        (together,) = torch.autograd.grad((plain * weights).sum(), x)
    assert additions.count == 1
    assert torch.equal(z, plain)
    assert_close(apart, together, torch.float32)


def test_the_reference_adds_a_skip_connections_gradient_too() -> None:
    first, second = module(4).double(), module(4).double()
    x = random((2, 4, 3, 3), torch.float64, 0).requires_grad_()
    y, skip = first(x, fork=True)
    weights = random((2, 4, 3, 3), torch.float64, 1)
    (apart,) = torch.autograd.grad((second(2 * y, skip) * weights).sum(), x, retain_graph=True)
    (together,) = torch.autograd.grad((second(2 * y, y) * weights).sum(), x)
    assert_close(apart, together, torch.float64)


def test_gradients_of_gradients_are_refused_by_name() -> None:
    x = random((2, 4, 3, 3), torch.float32, 0).requires_grad_()
    (gradient,) = torch.autograd.grad(module(4)(x).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="batch_norm_act has no double backward"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("shape", "residual", "message"),
    [
        ((1, 4, 1, 1), None, "Expected more than 1 value per channel"),
        ((2, 3, 4, 4), None, r"BatchNormAct2d\(4\): the input has 3 channels"),
        ((2, 4, 4, 4), (2, 4, 4, 1), r"the residual has shape \(2, 4, 4, 1\), the input \(2, 4, 4, 4\)"),
        ((2, 4, 4), None, "expected 4D input"),
    ],
)
def test_bad_input_is_refused(shape: tuple[int, ...], residual: tuple[int, ...] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(4)(torch.ones(shape), None if residual is None else torch.ones(residual))


def test_an_empty_batch_gives_an_empty_batch() -> None:
    assert module(4).eval()(torch.empty(0, 4, 3, 3)).shape == (0, 4, 3, 3)


def test_bad_options_are_refused() -> None:
    for options, message in (({"act": "gelu"}, "'relu' or 'none'"), ({"algorithm": "fast"}, "'measured', not 'fast'")):
        with pytest.raises(ValueError, match=message):
            BatchNormAct2d(4, **options)


def test_other_memory_formats_are_converted_with_one_warning() -> None:
    triton_launch.warn_of_copy.cache_clear()
    norm, x = module(4), torch.randn(2, 4, 3, 3)
    with pytest.warns(UserWarning, match="the input of batch_norm_act is not channels-last"):
        y = norm(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, module(4)(channels_last(x)))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the input of batch_norm_act")
        norm(x)


def test_measured_uses_torchs_operations_for_shapes_that_the_table_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    x = random((2, 4, 3, 3), torch.float32, 0)
    used: list[str] = []

    class Named(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            used.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    expected = module(4)(x, x)
    with Named():
        y, skip = module(4, algorithm="measured")(x, x, fork=True)
    assert "fastres_kernels::batch_norm_act" not in used and "aten::relu_" in used
    assert_close(y, expected, torch.float32)
    assert_close(module(4)(x, skip), module(4)(x, y), torch.float32)
    monkeypatch.setattr(dispatch_table, "table_of", lambda device: {(18, 4, True): "cooperative"})
    launched: list[tuple[int, ...]] = []
    forward = cooperative.forward
    monkeypatch.setattr(cooperative, "forward", lambda x, *args: launched.append(x.shape) or forward(x, *args))
    assert_close(module(4, algorithm="measured")(x, x), expected, torch.float32)
    assert launched == [x.shape]
    module(4, algorithm="measured")(x)  # without a residual: not in the table
    assert len(launched) == 1


# ---- torch's machinery ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # the kernels, and the reference
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("given_statistics", [False, True])
def test_opcheck(dtype: torch.dtype, with_residual: bool, given_statistics: bool) -> None:
    x, residual = (random((2, 4, 3, 3), dtype, seed).requires_grad_() for seed in (0, 1))
    norm = module(4, dtype)
    statistics = (norm.running_mean, norm.running_var) if given_statistics else (None, None)
    args = (x, residual if with_residual else None, None, norm.weight, norm.bias, *statistics, 1e-5, True, True, "")
    for algorithm in ALGORITHMS:
        torch.library.opcheck(ops.batch_norm_act, (*args, algorithm))
        plain = [a.detach() if isinstance(a, Tensor) else a for a in args]
        _, mean, var, _, mask, _ = ops.batch_norm_act(*plain, algorithm)
        backward = (
            random((2, 4, 3, 3), dtype, 2), random((2, 4, 3, 3), dtype, 3), plain[0], mask if with_residual else None,
            plain[3], plain[4], mean, var, 1e-5, True, not given_statistics, with_residual, "", algorithm,
        )  # fmt: skip
        torch.library.opcheck(ops.batch_norm_act_backward, backward)


def test_autocast_leaves_the_statistics_in_float32() -> None:
    norm = module(4)
    x = random((2, 4, 3, 3), torch.bfloat16, 0, shift=100)
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(x).dtype == torch.bfloat16
    assert norm.running_mean.dtype == torch.float32
    assert_close(norm.running_mean, 0.1 * x.double().mean((0, 2, 3)), torch.float32)


def worker(name: str, **env: str | None) -> str:
    """Run tests.workers.NAME in a separate process with a user's environment; return its standard output."""
    done = run_module(f"tests.workers.{name}", cwd=CHECKOUT, env=env, fresh=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("interpret", ["1", None])
@pytest.mark.slow
def test_resnet20_compiles_in_one_graph_with_the_kernels_inside_and_trains_the_same(interpret: str | None) -> None:
    """Compile with fullgraph=True, the backward included, and count the ops in the graphs that inductor receives.

    Under the interpreter both graphs contain the op itself. Without it, on a CPU, inductor receives the reference's
    operations instead.
    """
    expected = ["19", "19"] if interpret else ["0", "0"]
    assert worker("kernels_compile", TRITON_INTERPRET=interpret).split() == expected


@pytest.mark.slow
def test_without_triton_the_modules_run_and_agree() -> None:
    assert worker("kernels_without_triton", TRITON_INTERPRET=None) == "equal\n"


def test_importing_the_package_does_not_import_torch() -> None:
    find = "import sys, fastres_kernels; print('torch' in sys.modules, *dir(fastres_kernels))"
    done = subprocess.run([sys.executable, "-c", find], capture_output=True, text=True, check=True)
    imported, *names = done.stdout.split()
    assert imported == "False" and {"BatchNormAct2d", "Conv2d", "defer_running_stats"} <= set(names)


def test_importing_the_package_under_another_name_raises() -> None:
    done = subprocess.run([sys.executable, "-c", "import kernels"], cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "is imported as fastres_kernels, not kernels" in done.stderr


# ---- several processes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["kernels", "reference"])
@pytest.mark.slow
def test_synchronised_statistics_are_those_of_one_process_with_the_whole_batch(path: str) -> None:
    if path == "reference":
        done = run_worker("kernels_sync_stats", path, processes=2)
    else:  # Triton decides when it is imported whether it interprets
        launcher = ("--standalone", "--nproc_per_node", 2, "-m", "tests.workers.kernels_sync_stats")
        env = {"TRITON_INTERPRET": "1"}
        done = run_module("torch.distributed.run", *launcher, path, env=env, cwd=CHECKOUT, fresh=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("equal") == 2


@pytest.mark.parametrize("residual", [False, True])
def test_given_statistics_have_gradients_too(residual: bool) -> None:
    """Compare with float64, for seven CTAs along the rows and a final reduction of two blocks of channels."""
    shape = (2, 20, 20, 20)
    generator = torch.Generator().manual_seed(0)
    weight, bias, mean = (torch.randn(20, generator=generator, dtype=torch.float64) for _ in range(3))
    var = 0.5 + torch.rand(20, generator=generator, dtype=torch.float64)
    x, added, dy = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    leaves = [x, *([added] if residual else []), weight, bias, mean, var]

    def laid_out(t: Tensor, dtype: torch.dtype) -> Tensor:
        return t.to(dtype).contiguous(memory_format=torch.channels_last if t.ndim == 4 else torch.contiguous_format)

    def gradients(dtype: torch.dtype) -> tuple[Tensor, ...]:
        inputs = [laid_out(t, dtype).requires_grad_() for t in leaves]
        x, *between, weight, bias, mean, var = inputs
        if dtype == torch.float64:  # the oracle, from the definition
            centred = (x - mean[:, None, None]) * torch.rsqrt(var + 1e-5)[:, None, None]
            y = torch.relu(centred * weight[:, None, None] + bias[:, None, None] + sum(between))
        else:
            op = torch.ops.fastres_kernels.batch_norm_act
            y = op(x, *(between or [None]), None, weight, bias, mean, var, 1e-5, True, False, "")[0]
        return torch.autograd.grad(y, inputs, laid_out(dy, dtype))

    for ours, right in zip(gradients(torch.float32), gradients(torch.float64), strict=True):
        torch.testing.assert_close(ours.double(), right, rtol=1e-4, atol=1e-3)
