"""Test conv_norm, the convolution that normalises its input and measures its output, against the float64 oracle.

The kernels run in Triton's interpreter, which conftest.py enables. Its dots are wrong in bfloat16 (triton#11584), so
these tests use float16 and float32. Only a GPU can test bfloat16, and speed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastres_kernels import grid_sync, reference, triton_launch
from fastres_kernels.experimental import conv_1x1, conv_3x3, conv_common, ops
from tests.commands import run_module

CHECKOUT = Path(__file__).parent.parent
conv_norm = torch.ops.fastres_kernels.conv_norm
conv_norm_backward = torch.ops.fastres_kernels.conv_norm_backward
EPS = 1e-5
# Activations and results are rounded to the dtype once each; between them are float32 sums of hundreds of products.
TOLERANCE = {torch.float16: 4 * torch.finfo(torch.float16).eps, torch.float32: 128 * torch.finfo(torch.float32).eps}
NORMS = ("none", "statistics", "gamma", "beta", "affine")
# N, H, W. A CTA's piece is 64 columns × two or more rows, or 128 pixels: one piece or several, the last one smaller.
SHAPES = [(1, 1, 1), (3, 5, 7), (2, 3, 45), (1, 9, 16)]


def inputs(
    n: int, c: int, k: int, h: int, w: int, r: int, dtype: torch.dtype, norm: str = "affine", seed: int = 0
) -> list[Tensor | None]:
    """Return x, weight, mean, var, gamma and beta, all requiring gradients.

    No activation is within 0.1 of ReLU's corner, where float32 and float64 may differ. z, and the part of x's gradient
    that comes from z, have a magnitude of at most 1.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    mean, beta = normal(c), normal(c)
    var, gamma = 0.5 + normal(c).abs(), 0.5 + normal(c).abs()
    if norm not in ("gamma", "affine"):
        gamma = torch.ones_like(gamma)
    if norm not in ("beta", "affine"):
        beta = torch.zeros_like(beta)
    before_relu = normal(n, c, h, w)
    before_relu += 0.1 * before_relu.sign()
    centred = (before_relu - beta[:, None, None]) / (gamma * torch.rsqrt(var + EPS))[:, None, None]
    x = (mean[:, None, None] + centred).to(dtype, memory_format=torch.channels_last)
    weight = normal(k, c, r, r) / (max(c, k) * r * r) ** 0.5
    vectors = [
        mean if norm != "none" else None,
        var if norm != "none" else None,
        gamma if norm in ("gamma", "affine") else None,
        beta if norm in ("beta", "affine") else None,
    ]
    wide = torch.promote_types(dtype, torch.float32)
    rest = [None if value is None else value.to(wide) for value in (weight, *vectors)]
    return [None if value is None else value.requires_grad_() for value in (x, *rest)]


def in_float64(tensors: list[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in tensors]


def gradients_of(tensors: list[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.grad for t in tensors]


def weighted_sum(results: tuple[Tensor, Tensor, Tensor], seed: int = 1) -> Tensor:
    """Return a loss with a different gradient for every number in z, mean_z and var_z."""
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in results]
    # Scale the weights so that a pixel's gradient through the statistics is as large as its direct gradient.
    pixels = results[0].numel() / len(results[1])
    return sum(
        (result * (weight * scale).to(result.dtype)).sum()
        for result, weight, scale in zip(results, weights, (1, pixels, pixels), strict=True)
    )


def assert_close(ours: Any, oracle: Any, dtype: torch.dtype) -> None:
    """Compare z, mean_z and var_z, or the gradients of the six inputs, with the oracle's."""
    names = ("z", "mean_z", "var_z") if len(ours) == 3 else ("x", "weight", "mean", "var", "gamma", "beta")
    for name, a, b in zip(names, ours, oracle, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            # The others are sums over up to 270 pixels, whose values may cancel although their errors do not.
            magnitude = 1 if name in ("z", "mean_z", "var_z", "x") else 270**0.5
            error = (a.double() - b).abs().max().item()
            assert error <= TOLERANCE[dtype] * (magnitude + b.abs().max().item()), f"{name}: {error:.1e}"


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fill uninitialised memory with NaN."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


# ---- the oracle is what separate layers compute ------------------------------------------------------------


def test_a_chain_of_oracles_is_conv_batch_norm_relu_conv_of_torch() -> None:
    x, first, *_ = inputs(3, 4, 6, 5, 7, 3, torch.float64)
    _, second, _, _, gamma, beta = inputs(3, 6, 5, 5, 7, 3, torch.float64, seed=1)
    leaves = [x, first, second, gamma, beta]

    def torchs(x: Tensor, first: Tensor, second: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        z = F.conv2d(x, first, padding=1)
        return F.conv2d(F.relu(F.batch_norm(z, None, None, gamma, beta, True, 0, EPS)), second, padding=1)

    def ours(x: Tensor, first: Tensor, second: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        z, mean, var = conv_norm(x, first, None, None, None, None, EPS)
        return conv_norm(z, second, mean, var, gamma, beta, EPS)[0]

    results = []
    for network in (torchs, ours):
        y = network(*leaves)
        results.append([y, *torch.autograd.grad((y * y.detach().cos()).sum(), leaves)])
    for theirs, mine in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


# ---- the kernels are the oracle ----------------------------------------------------------------------------


def cases(channels: dict[torch.dtype, list[int]]) -> Any:
    """Generate cases of (N, H, W), (C, K), dtype and norm."""

    def of(dtype: torch.dtype) -> Any:
        c_and_k = st.tuples(*[st.sampled_from(channels[dtype])] * 2)
        return st.tuples(st.sampled_from(SHAPES), c_and_k, st.just(dtype), st.sampled_from(NORMS))

    return st.one_of(*(of(dtype) for dtype in channels))


# float32 has small tiles, so many channels would take the interpreter long.
@pytest.mark.parametrize("examples", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_3x3(examples: int) -> None:
    @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @given(cases({torch.float16: [16, 32, 64], torch.float32: [16]}))
    @example(((2, 3, 45), (32, 64), torch.float16, "affine"))
    @example(((3, 5, 7), (32, 16), torch.float32, "affine"))
    def check(case: tuple[Any, ...]) -> None:
        in_a_thread(check_against_the_oracle, 3, *case)

    check()


@pytest.mark.parametrize("examples", [10, pytest.param(40, marks=pytest.mark.slow)])
def test_1x1(examples: int) -> None:
    @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @given(cases({torch.float16: [1, 3, 16, 24, 40, 130], torch.float32: [1, 3, 16, 24]}))
    @example(((2, 3, 45), (130, 130), torch.float16, "affine"))
    def check(case: tuple[Any, ...]) -> None:
        in_a_thread(check_against_the_oracle, 1, *case)

    check()


def in_a_thread(check: Callable[..., None], *args: Any) -> None:
    """Run the check in a thread, which is three times as fast as on hypothesis's deep stack.

    On that stack, CPython 3.11 allocates and frees memory at every few calls.
    """
    with ThreadPoolExecutor(1) as thread:
        thread.submit(check, *args).result()


def check_against_the_oracle(
    r: int, shape: tuple[int, int, int], channels: tuple[int, int], dtype: torch.dtype, norm: str
) -> None:
    """Compare values, layout, and all gradients, from gradients of all results."""
    n, h, w = shape
    tensors = inputs(n, *channels, h, w, r, dtype, norm)
    wide = in_float64(tensors)
    assert ops.kernels_for(tensors[0], tensors[1])
    results, oracle = conv_norm(*tensors, EPS), reference.conv_norm(*wide, EPS)
    assert results[0].dtype == dtype and results[0].is_contiguous(memory_format=torch.channels_last)
    assert results[1].dtype == results[2].dtype == torch.float32
    assert_close(results, oracle, dtype)
    weighted_sum(results).backward()
    weighted_sum(oracle).backward()
    assert_close(gradients_of(tensors), gradients_of(wide), dtype)


@pytest.mark.parametrize("r", [1, 3])
@pytest.mark.parametrize(
    "loss",
    [
        lambda z, mean, var: z.sum(),  # stride 0
        lambda z, mean, var: z.contiguous().cos().sum(),  # not channels-last
        lambda z, mean, var: mean.sum(),  # no gradient of z itself
        lambda z, mean, var: (var * torch.arange(len(var))).sum(),
        lambda z, mean, var: z.square().sum() - var.sum(),
    ],
    ids=["z, stride 0", "z, NCHW", "mean", "var", "z and var"],
)
def test_gradients_of_any_strides_and_of_any_of_the_results(loss: Any, r: int) -> None:
    tensors = inputs(3, 16, 32, 5, 7, r, torch.float32)
    wide = in_float64(tensors)
    loss(*conv_norm(*tensors, EPS)).backward()
    loss(*reference.conv_norm(*wide, EPS)).backward()
    assert_close(gradients_of(tensors), gradients_of(wide), torch.float32)


@pytest.mark.parametrize("r", [1, 3])
def test_inputs_of_any_strides_and_weights_of_any_dtype(r: int) -> None:
    tensors = inputs(2, 16, 16, 4, 6, r, torch.float16)
    x, weight, mean, var, gamma, _ = (t.detach() for t in tensors)
    weight, one = weight.half(), gamma[:1].expand(16)
    plain = conv_norm(x, weight, mean, var, gamma, one.contiguous(), EPS)
    for other in (weight, weight.double(), weight.to(memory_format=torch.channels_last)):
        triton_launch.warn_of_copy.cache_clear()
        with pytest.warns(UserWarning, match="the input of conv_norm is not channels-last"):
            odd = conv_norm(x.contiguous(), other, mean, var, gamma, one, EPS)
        assert all(map(torch.equal, odd, plain))


@pytest.mark.parametrize("r", [1, 3])
def test_what_needs_no_gradient_is_not_computed(r: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("computed")

    kernels = {1: conv_1x1, 3: conv_3x3}[r]
    for needed, spared in (([0], (conv_common, "weight_gradient")), ([1], (kernels, "convolve"))):
        tensors = inputs(1, 16, 16, 3, 4, r, torch.float32)
        for i, tensor in enumerate(tensors):
            tensor.requires_grad_(i in needed)
        wide = in_float64(tensors)
        loss = weighted_sum(conv_norm(*tensors, EPS))
        with monkeypatch.context() as patch:
            patch.setattr(*spared, refuse)
            loss.backward()
        weighted_sum(reference.conv_norm(*wide, EPS)).backward()
        assert_close(gradients_of(tensors), gradients_of(wide), torch.float32)


@pytest.mark.parametrize(("c", "k", "r"), [(16, 32, 3), (24, 40, 1)])
def test_every_element_is_written_and_repetitions_are_bitwise_identical(c: int, k: int, r: int, poisoned: None) -> None:
    """Use shapes for which every sum has several pieces: rows, columns and the weight gradient."""
    runs = []
    for _ in range(2):
        tensors = inputs(2, c, k, 3, 45, r, torch.float16)
        results = conv_norm(*tensors, EPS)
        weighted_sum(results).backward()
        runs.append([*results, *gradients_of(tensors)])
        # Autograd does not allow in-place writes to a view that an op returned, so no result may be a view.
        assert not any(result._is_view() for result in results)
    for first, second in zip(*runs, strict=True):
        assert first.isfinite().all() and torch.equal(first, second)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 45)], ids=["one program", "several"])
def test_every_kernel_leaves_the_counter_of_its_programs_ready_for_the_next(shape: tuple[int, int, int]) -> None:
    """Check that the increments of all CTAs add up to 2³¹, whatever their number."""
    n, h, w = shape
    x, weight, *norm = (t.detach() for t in inputs(n, 16, 16, h, w, 3, torch.float16))
    normalised = conv_common.Norm(*norm, EPS)
    z, mean = torch.ones_like(x), torch.ones(16)
    gradient = conv_common.Gradient(z, mean, mean, z, mean)
    value = grid_sync.counter(x).item()
    for launch_one in (
        lambda: conv_3x3.convolve(x, weight, normalised),
        lambda: conv_3x3.convolve(x, weight, normalised, gradient),
        lambda: conv_common.weight_gradient(x, weight, normalised, gradient),
    ):
        launch_one()
        value = -(2**31) - value
        assert value in (0, -(2**31)) and grid_sync.counter(x).item() == value


@triton.jit
def finish(
    statistics, sums, products, vector, mean, var, dmean, dvar, dgamma, dbeta, dweight, P,
    K: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Do the final reductions of the convolutions with as many CTAs as the grid has."""
    index, reducers = tl.program_id(0), tl.num_programs(0)
    conv_common.reduce_statistics(statistics, mean, var, 8 * P - 3, 1, 8, 1, P, index, reducers, K, BLOCK_P, BLOCK)
    conv_common.reduce_norm_gradients(
        sums, vector, vector, 0.0, dmean, dvar, dgamma, dbeta, P, index, reducers, K, BLOCK_P, BLOCK
    )
    conv_common.reduce_weight_gradient(products, dweight, P, index, reducers, N, BLOCK_P, BLOCK)


def test_the_number_of_final_reducers_does_not_change_the_results(poisoned: None) -> None:
    """Reduce 40 channels in blocks of eight with one, three, five and seven CTAs; two of the seven have no block."""
    generator = torch.Generator().manual_seed(0)
    p, k, n = 19, 40, 40
    partials = [torch.randn(shape, generator=generator).abs() for shape in ((p, 3, k), (p, 2, k), (p, n), (k,))]
    runs = []
    for programs in (1, 3, 5, 7):
        results = [torch.empty(k) for _ in range(6)] + [torch.empty(n)]
        finish[(programs,)](*partials, *results, p, K=k, N=n, BLOCK_P=8, BLOCK=8)
        runs.append(results)
    origins, means, m2s = partials[0].double().unbind(1)
    counts = torch.tensor([8.0] * (p - 1) + [5.0], dtype=torch.float64)[:, None]
    means = origins + means
    mean = (counts * means).sum(0) / counts.sum()
    var = (m2s + counts * (means - mean) ** 2).sum(0) / counts.sum()
    invstd = partials[3].double().rsqrt()
    g, projected = partials[1].double().sum(0)
    dmean, dvar = -g * partials[3] * invstd, -0.5 * projected * partials[3] * invstd**3
    oracle = [mean, var, dmean, dvar, projected * invstd, g, partials[2].double().sum(0)]
    for results in runs:
        for ours, right, first in zip(results, oracle, runs[0], strict=True):
            assert torch.equal(ours, first)
            torch.testing.assert_close(ours.double(), right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("r", [1, 3])
def test_the_variance_is_that_of_z_where_the_mean_is_a_thousand_times_the_deviation(r: int) -> None:
    x = 1 + 4e-3 * torch.randn(4, 16, 32, 33)
    weight = torch.zeros(16, 16, r, r)
    weight[:, :, r // 2, r // 2] = 1 / 16 + 1e-4 * torch.randn(16, 16)
    z, mean, var = conv_norm(x.to(memory_format=torch.channels_last), weight, None, None, None, None, EPS)
    exact_var, exact_mean = torch.var_mean(z.double(), (0, 2, 3), correction=0)
    assert (exact_mean > 900 * exact_var.sqrt()).all()
    assert ((var - exact_var).abs() < 1e-6 * exact_var).all()
    assert ((mean - exact_mean).abs() < 1e-7 * exact_mean).all()


@pytest.mark.parametrize("r", [1, 3])
def test_a_nan_is_seen_and_not_hidden_by_relu(r: int) -> None:
    tensors = [t.detach() for t in inputs(1, 16, 16, 5, 5, r, torch.float32)]
    tensors[0][0, 3, 2, 2] = torch.nan
    z, oracle = conv_norm(*tensors, EPS)[0], reference.conv_norm(*tensors, EPS)[0]
    assert torch.equal(z.isnan(), oracle.isnan()) and z.isnan().sum() == 16 * r * r


@pytest.mark.parametrize("odd", [1, 2, 5])
def test_mismatched_shapes_are_rejected(odd: int) -> None:
    tensors = [t.detach() for t in inputs(1, 16, 16, 2, 2, 1, torch.float32)]
    tensors[odd] = torch.ones(16, 24, 1, 1) if odd == 1 else torch.ones(15)
    with pytest.raises(ValueError, match=r"conv_norm: weight and vectors \(16, .* do not fit x \(1, 16, 2, 2\)"):
        conv_norm(*tensors, EPS)


# ---- where there are no kernels ----------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("r", [1, 3])
def test_the_reference_differentiates_as_autograd_does(r: int, norm: str) -> None:
    tensors = inputs(2, 3, 2, 4, 5, r, torch.float64, norm)
    given = [t for t in tensors if t is not None]

    def of_given(*values: Tensor) -> Any:
        left = iter(values)
        return conv_norm(*(None if t is None else next(left) for t in tensors), EPS)

    assert torch.autograd.gradcheck(of_given, given)


def test_which_kernels_compute_what() -> None:
    def chosen(c: int, k: int, r: int, dtype: torch.dtype = torch.float16, n: int = 1) -> Any:
        return ops.kernels_for(torch.empty(n, c, 4, 4, dtype=dtype), torch.empty(k, c, r, r))

    assert chosen(16, 64, 3) is conv_3x3 and chosen(24, 5, 1) is conv_1x1
    assert chosen(16, 24, 3) is chosen(128, 128, 3) is chosen(16, 16, 5) is None
    assert chosen(16, 16, 3, torch.float64) is chosen(16, 16, 3, n=0) is None


def test_the_reference_takes_what_the_kernels_do_not() -> None:
    tensors = inputs(2, 5, 7, 4, 6, 3, torch.float16)
    wide = in_float64(tensors)
    results, oracle = conv_norm(*tensors, EPS), reference.conv_norm(*wide, EPS)
    assert results[0].is_contiguous(memory_format=torch.channels_last)
    weighted_sum(results).backward()
    weighted_sum(oracle).backward()
    assert_close(results, oracle, torch.float16)
    assert_close(gradients_of(tensors), gradients_of(wide), torch.float16)


# ---- the ops are good citizens of torch --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("c", "r", "dtype", "norm"),
    [
        (16, 3, torch.float16, "affine"),
        (16, 1, torch.float32, "statistics"),
        (3, 1, torch.float32, "none"),
        (3, 3, torch.float64, "affine"),  # the reference
    ],
)
def test_opcheck(c: int, r: int, dtype: torch.dtype, norm: str) -> None:
    tensors = inputs(2, c, 16, 3, 4, r, dtype, norm)
    torch.library.opcheck(conv_norm, (*tensors, EPS))
    tensors = [None if t is None else t.detach() for t in tensors]
    z, mean_z, var_z = conv_norm(*tensors, EPS)
    for dz, wanted in ((z, (True, True)), (None, (True, False)), (z, (False, True))):
        torch.library.opcheck(conv_norm_backward, (dz, mean_z, var_z, *tensors, EPS, z, mean_z, *wanted))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_it_compiles_in_one_graph(backend: str) -> None:
    def loss(x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        z, mean, var = conv_norm(x, weight, None, None, None, None, EPS)
        z, mean, var = conv_norm(z, weight, mean, var, gamma, beta, EPS)
        return z.cos().sum() + (mean * var).sum()

    runs = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend=backend)):
        x, weight, _, _, gamma, beta = inputs(2, 16, 16, 3, 4, 3, torch.float32)
        value = function(x, weight, gamma, beta)
        runs.append([value, *torch.autograd.grad(value, [x, weight, gamma, beta])])
    for plain, compiled in zip(*runs, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_opcheck_where_nothing_interprets() -> None:
    """Check the ops on a user's CPU, where they run the reference."""
    done = run_module("tests.workers.kernels_opcheck", cwd=CHECKOUT, fresh=True)
    assert done.stdout == "checked\n", done.stderr


def test_double_backward_is_refused_by_name() -> None:
    tensors = inputs(1, 16, 16, 2, 2, 1, torch.float32)
    x = tensors[0]
    z, *_ = conv_norm(*tensors, EPS)
    (gradient,) = torch.autograd.grad(z.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="fastres_kernels: conv_norm has no double backward"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("r", [1, 3])
def test_its_operations_are_counted_as_a_convolutions(r: int) -> None:
    x, weight, *norm = inputs(2, 16, 32, 4, 5, r, torch.float32)
    with FlopCounterMode(display=False) as counter:
        conv_norm(x, weight, *norm, EPS)[0].sum().backward()
    assert x is not None and weight is not None
    with FlopCounterMode(display=False) as oracle:
        F.conv2d(x, weight, padding=r // 2).sum().backward()
    assert counter.get_total_flops() == oracle.get_total_flops() > 0
