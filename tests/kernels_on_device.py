"""The kernels on a device: what they give is the float64 oracle's, and the same bits at every repetition, called and
replayed from a CUDA graph.

    python -m tests.kernels_on_device cuda 200

Prints a line for each kind of work, and raises AssertionError at the first that is wrong. Started by
test_kernels_gpu.py, because in the tests' own process Triton interprets. Not yet run on a GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastres_kernels import BatchNormAct2d, grid_sync
from fastres_kernels.experimental import NormConv2d, PrecomputedStatsNormAct2d

Work = Callable[[], list[Tensor]]
Shape = tuple[int, int, int, int]
CL = torch.channels_last

# ResNet-20's stages at batch 128, and an odd one.
SHAPES: list[Shape] = [(128, 16, 32, 32), (128, 32, 16, 16), (128, 64, 8, 8), (3, 5, 7, 7)]
SMALL: list[Shape] = [(3, 5, 7, 7)]  # where programs run one after another
BLOCK: Shape = (2, 16, 6, 5)
# Of the largest value; of whole numbers, whose sums are exact in either dtype.
TOLERANCE, EXACT = {torch.float32: 1e-4, torch.bfloat16: 4e-2}, 1e-6
# Elements of a norm's results. In bf16 rounding decides otherwise about a ReLU in a thousand, and so about as many
# elements of a gradient, and in float32 about one of those here; all are fewer than a program writes.
MAY_DIFFER = {torch.float32: lambda elements: 2, torch.bfloat16: lambda elements: elements / 400}


def norms(shape: Shape, device: torch.device, dtype: torch.dtype, algorithm: str) -> Work:
    """BatchNorm + ReLU whose output forks, BatchNorm + add + ReLU of the skip, and all gradients. `algorithm`: one of
    BatchNormAct2d's, or "given", for statistics that are."""
    given = algorithm == "given"
    first, second = (
        BatchNormAct2d(shape[1], algorithm="two_pass" if given else algorithm)
        .to(device, _parameters_of(dtype))
        .train(not given)
        for _ in range(2)
    )
    x, z, dy = (_random(shape, seed, device, dtype) for seed in range(3))
    leaves = [x.requires_grad_(), z.requires_grad_(), *first.parameters(), *second.parameters()]

    def work() -> list[Tensor]:
        y, skip = first(x, fork=True)
        out = second(z, skip)
        return [y, out, *torch.autograd.grad([y, out], leaves, [dy, dy.flip(0).contiguous(memory_format=CL)])]

    return work


def blocks(shape: Shape, device: torch.device, dtype: torch.dtype, _: str) -> Work:
    """A residual block without its last ReLU, its convolutions fused, the middle never in memory; and its gradients."""
    channels = shape[1]
    torch.manual_seed(0)
    convs = [NormConv2d(channels, channels, 3, padding="same", bias=False) for _ in range(2)]
    norms = [PrecomputedStatsNormAct2d(channels), PrecomputedStatsNormAct2d(channels, act="none")]
    model = nn.ModuleList([*convs, *norms]).to(device, _parameters_of(dtype))
    x, dy = (_random(shape, seed, device, dtype) for seed in range(2))
    leaves = [x.requires_grad_(), *model.parameters()]

    def work() -> list[Tensor]:
        y = norms[1](convs[1](norms[0].deferred(convs[0](x))), x)
        return [y, *torch.autograd.grad(y, leaves, dy)]

    return work


def convolutions(shape: Shape, device: torch.device, dtype: torch.dtype, _: str) -> Work:
    """A convolution that normalises its input and measures its output, and the gradients of all that it takes. No
    activation is so near to ReLU's corner that rounding would decide about it: in bf16 that moved gradients by 12 %."""
    channels, pixels = shape[1], shape[0] * shape[2] * shape[3]
    generator = torch.Generator().manual_seed(0)
    beta, mean, scale = (torch.randn(channels, generator=generator, dtype=torch.float64) for _ in range(3))
    gamma, var = 0.5 + scale.abs(), 0.5 + scale.square()
    activation = torch.randn(shape, generator=generator, dtype=torch.float64)
    activation += 0.1 * activation.sign()
    centred = (activation - beta[:, None, None]) / (gamma * torch.rsqrt(var))[:, None, None]
    x = (centred + mean[:, None, None]).to(torch.bfloat16).to(device, dtype).contiguous(memory_format=CL)
    weight = torch.randn(channels, channels, 3, 3, generator=generator) / (9 * channels) ** 0.5
    vectors = [weight.to(torch.bfloat16), mean, var, gamma, beta]
    leaves = [x, *(v.to(device, _parameters_of(dtype)) for v in vectors)]
    for leaf in leaves:
        leaf.requires_grad_()
    dz = _random(shape, 1, device, dtype)
    dmean, dvar = (pixels * dz[0, :, 0, i].to(_parameters_of(dtype)) for i in range(2))

    def work() -> list[Tensor]:
        results = torch.ops.fastres_kernels.conv_norm(*leaves, 0.0)
        return [*results, *torch.autograd.grad(results, leaves, [dz, dmean, dvar])]

    return work


def integers(shape: Shape, device: torch.device, dtype: torch.dtype, _: str) -> Work:
    """The 3×3 and the 1×1 convolution and the normalisation by given statistics, of mean 0 and variance 1, on small
    whole numbers, with the gradients of all that they take. No rounding hides a sum that lacks a part."""
    channels = shape[1]
    generator = torch.Generator().manual_seed(0)

    def whole(low: int, high: int, *of: int, share: float = 1.0) -> Tensor:
        values = torch.randint(low, high + 1, of, generator=generator).float()
        values *= torch.rand(of, generator=generator) < share
        return values

    def placed(values: Tensor, wanted: torch.dtype) -> Tensor:
        layout = CL if values.ndim == 4 else torch.contiguous_format
        return values.to(device, wanted).contiguous(memory_format=layout).requires_grad_()

    x = placed(whole(-1, 1, *shape), dtype)
    residual = placed(2 * whole(-1, 1, *shape), dtype)  # no sum is 0 by cancelling: 1/√1 may be rounded
    dz = placed(whole(-1, 2, *shape), dtype).detach()
    mean, var, gamma, beta = (
        placed(torch.full((channels,), value), _parameters_of(dtype)) for value in (0.0, 1.0, 1.0, 0.0)
    )
    weights = [  # so few that z and its input's gradient stay below 2⁸, which bf16 has exactly
        placed(whole(-1, 1, channels, channels, r, r, share=min(1, 16 / (channels * r * r))), _parameters_of(dtype))
        for r in (1, 3)
    ]
    ops = torch.ops.fastres_kernels

    def work() -> list[Tensor]:
        results = []
        for weight in weights:
            leaves = [x, weight, mean, var, gamma, beta]
            z, mean_z, var_z = ops.conv_norm(*leaves, 0.0)
            results += [z, mean_z, var_z, *torch.autograd.grad(z, leaves, dz)]
        leaves = [x, residual, gamma, beta, mean, var]
        y, *_ = ops.batch_norm_act(x, residual, None, gamma, beta, mean, var, 0.0, True, False, "")
        return [*results, y, *torch.autograd.grad(y, leaves, dz)]

    return work


WORK = {"norms": norms, "blocks": blocks, "convolutions": convolutions, "integers": integers}


def _parameters_of(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _random(shape: Shape, seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 1
    return values.to(torch.bfloat16).to(device, dtype).contiguous(memory_format=CL)  # the same in all types


def check(kind: str, shape: Shape, device: torch.device, dtype: torch.dtype, how: str, repeats: int) -> None:
    work = WORK[kind](shape, device, dtype, how)
    # Without their graphs: one that is kept keeps each leaf's accumulator, which belongs to the stream that it was made
    # on and would draw that stream into the capture below (pytorch#180090).
    found = [result.detach().clone() for result in work()]
    oracle = WORK[kind](shape, torch.device("cpu"), torch.float64, how)()
    for number, (ours, right) in enumerate(zip(found, oracle, strict=True)):
        error = (ours.double().cpu() - right).abs() / (1 + right.abs().max())
        assert error.isfinite().all(), f"result {number} is not finite"
        wrong = (error > (EXACT if kind == "integers" else TOLERANCE[dtype])).sum().item()
        assert wrong <= (MAY_DIFFER[dtype](error.numel()) if kind == "norms" else 0), (
            f"of result {number} {wrong:,} of {error.numel():,} elements are wrong, by up to "
            f"{error.max().item():.1e} of the largest value"
        )

    def expect_the_same(results: list[Tensor], where: str) -> None:
        for number, (one, other) in enumerate(zip(results, found, strict=True)):
            assert torch.equal(one, other), f"result {number} has other bits {where}"

    for i in range(repeats):
        expect_the_same(work(), f"at call {i + 2}")
    if device.type == "cuda":
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work()
        with torch.cuda.graph(graph, stream=stream):
            results = work()
        for i in range(repeats):
            with torch.no_grad():
                for result in results:
                    result.fill_(float("nan"))
            graph.replay()
            expect_the_same(results, f"at replay {i + 1}")
    # The increments of a kernel's CTAs add up to 2³¹, so none was lost, and none counted twice.
    counters = grid_sync.counter_pool(found[0].device).by_stream.values()
    assert all(count.item() in (0, -(2**31)) for count in counters), "a counter is off"


def main(device: torch.device, repeats: int) -> None:
    # Memory that nobody has written is NaN, at every call and replay: partial sums that are read before they are there
    # would else be those of the time before, the same bits.
    torch.use_deterministic_algorithms(True)
    on_gpu = device.type == "cuda"
    for shape in SHAPES if on_gpu else SMALL:
        for dtype in TOLERANCE:
            for algorithm in ("two_pass", "cooperative", "given"):
                print(f"norms {shape} {dtype} {algorithm}", flush=True)
                check("norms", shape, device, dtype, algorithm, repeats)
    # Not larger, and not in bf16: what rounding decides about a ReLU reaches all gradients of the weights before it.
    print(f"blocks {BLOCK} {torch.float32}", flush=True)
    check("blocks", BLOCK, device, torch.float32, "", repeats)
    for shape in SHAPES[:3] if on_gpu else [BLOCK]:
        # The interpreter has no dot in bf16: triton#11584.
        for dtype in TOLERANCE if on_gpu else [torch.float32]:
            for kind in ("convolutions", "integers"):
                print(f"{kind} {shape} {dtype}", flush=True)
                check(kind, shape, device, dtype, "", repeats)


if __name__ == "__main__":
    main(torch.device(sys.argv[1]), int(sys.argv[2]))
