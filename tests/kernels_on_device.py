"""Compare the kernels on a device with the float64 oracle, and check that repetitions are bitwise identical.

    python -m tests.kernels_on_device cuda 200

Each kind of work is called and, on a GPU, replayed from a CUDA graph. The program prints a line for each kind of work,
and raises AssertionError at the first wrong result. test_kernels_gpu.py starts it in a process of its own, because
Triton interprets in the tests' process. Not yet run on a GPU.
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

# ResNet-20's stages at batch 128, and an odd shape.
SHAPES: list[Shape] = [(128, 16, 32, 32), (128, 32, 16, 16), (128, 64, 8, 8), (3, 5, 7, 7)]
SMALL: list[Shape] = [(3, 5, 7, 7)]  # for the interpreter, which runs CTAs one after another
BLOCK: Shape = (2, 16, 6, 5)
# Errors relative to the largest value. EXACT is for whole numbers, whose sums are exact in both dtypes.
TOLERANCE, EXACT = {torch.float32: 1e-4, torch.bfloat16: 4e-2}, 1e-6
# Number of elements of a norm's results that may exceed the tolerance. In bf16, rounding flips one ReLU in a thousand,
# and so as many elements of a gradient; in float32 it flips about one of all elements here. A CTA writes more elements
# than that, so a CTA's missing result is still found.
MAY_DIFFER = {torch.float32: lambda elements: 2, torch.bfloat16: lambda elements: elements / 400}


def norms(shape: Shape, device: torch.device, dtype: torch.dtype, algorithm: str) -> Work:
    """Return work on BatchNorm + ReLU with a forked output, and BatchNorm + add + ReLU of the skip, with all gradients.

    `algorithm` is one of BatchNormAct2d's, or "given" for given statistics.
    """
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
    """Return work on a residual block with fused convolutions and without its last ReLU, with all gradients."""
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
    """Return work on conv_norm, with the gradients of all inputs.

    No activation is so near to ReLU's corner that rounding could flip it; in bf16 that changed gradients by 12 %.
    """
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
    """Return work on both convolutions and a normalisation on small whole numbers, with the gradients of all inputs.

    The statistics are given, mean 0 and variance 1, so all results are exact and rounding cannot hide a missing term.
    """
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
    residual = placed(
        2 * whole(-1, 1, *shape), dtype
    )  # even, so that no sum cancels to 0, where a rounded 1/√1 could flip ReLU
    dz = placed(whole(-1, 2, *shape), dtype).detach()
    mean, var, gamma, beta = (
        placed(torch.full((channels,), value), _parameters_of(dtype)) for value in (0.0, 1.0, 1.0, 0.0)
    )
    weights = [  # so few non-zeros that z and the input gradient stay below 2⁸ and are exact in bf16
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
    return (
        values.to(torch.bfloat16).to(device, dtype).contiguous(memory_format=CL)
    )  # rounded to bf16, so equal in all dtypes


def check(kind: str, shape: Shape, device: torch.device, dtype: torch.dtype, how: str, repeats: int) -> None:
    """Compare one kind of work with the oracle, and its repetitions and graph replays with the first call."""
    work = WORK[kind](shape, device, dtype, how)
    # Detach the results, because a live autograd graph keeps each leaf's accumulator. The accumulator belongs to the
    # stream on which it was created, and would pull that stream into the capture below (pytorch#180090).
    found = [result.detach().clone() for result in work()]
    oracle = WORK[kind](shape, torch.device("cpu"), torch.float64, how)()
    for number, (ours, right) in enumerate(zip(found, oracle, strict=True)):
        error = (ours.double().cpu() - right).abs() / (1 + right.abs().max())
        assert error.isfinite().all(), f"result {number} is not finite"
        wrong = (error > (EXACT if kind == "integers" else TOLERANCE[dtype])).sum().item()
        assert wrong <= (MAY_DIFFER[dtype](error.numel()) if kind == "norms" else 0), (
            f"result {number}: {wrong:,} of {error.numel():,} elements are wrong, by up to "
            f"{error.max().item():.1e} of the largest value"
        )

    def expect_the_same(results: list[Tensor], where: str) -> None:
        for number, (one, other) in enumerate(zip(results, found, strict=True)):
            assert torch.equal(one, other), f"result {number} is not bitwise identical {where}"

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
    # The increments of a kernel's CTAs add up to 2³¹; a lost or repeated increment would leave another value.
    counters = grid_sync.counter_pool(found[0].device).by_stream.values()
    assert all(count.item() in (0, -(2**31)) for count in counters), "a counter is off"


def main(device: torch.device, repeats: int) -> None:
    # Fill uninitialised memory with NaN at every call and replay. Otherwise partial sums that are read too early would
    # be the previous call's, which are bitwise identical, and the error would not be found.
    torch.use_deterministic_algorithms(True)
    on_gpu = device.type == "cuda"
    for shape in SHAPES if on_gpu else SMALL:
        for dtype in TOLERANCE:
            for algorithm in ("two_pass", "cooperative", "given"):
                print(f"norms {shape} {dtype} {algorithm}", flush=True)
                check("norms", shape, device, dtype, algorithm, repeats)
    # Blocks are small and float32, because a ReLU flipped by rounding changes all gradients of the weights before it.
    print(f"blocks {BLOCK} {torch.float32}", flush=True)
    check("blocks", BLOCK, device, torch.float32, "", repeats)
    for shape in SHAPES[:3] if on_gpu else [BLOCK]:
        # The interpreter's dot is wrong in bf16 (triton#11584).
        for dtype in TOLERANCE if on_gpu else [torch.float32]:
            for kind in ("convolutions", "integers"):
                print(f"{kind} {shape} {dtype}", flush=True)
                check(kind, shape, device, dtype, "", repeats)


if __name__ == "__main__":
    main(torch.device(sys.argv[1]), int(sys.argv[2]))
