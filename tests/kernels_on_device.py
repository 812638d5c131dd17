"""The kernels on a device: what they give is the float64 oracle's, and the same bits at every repetition, called and
replayed from a CUDA graph.

    python -m tests.kernels_on_device cuda 2000

Prints a line for each kind of work, and raises AssertionError at the first that is wrong. Started by
test_kernels_gpu.py, because in the tests' own process Triton interprets. Not yet run on a GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastres_kernels import BatchNormAct2d
from fastres_kernels.modules import NormConv2d

Work = Callable[[], list[Tensor]]
Shape = tuple[int, int, int, int]
CL = torch.channels_last

# ResNet-20's stages at batch 128, and an odd one.
SHAPES: list[Shape] = [(128, 16, 32, 32), (128, 32, 16, 16), (128, 64, 8, 8), (3, 5, 7, 7)]
SMALL: list[Shape] = [(3, 5, 7, 7)]  # where programs run one after another
# Of values of magnitude 1. A sum over M pixels has √M as its own.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2}


def norms(shape: Shape, device: torch.device, dtype: torch.dtype, algorithm: str) -> Work:
    """BatchNorm + ReLU whose output forks, BatchNorm + add + ReLU of the skip, and all gradients."""
    first, second = (
        BatchNormAct2d(shape[1], algorithm=algorithm).to(device, _parameters_of(dtype)) for _ in range(2)
    )
    x, z, dy = (_random(shape, seed, device, dtype) for seed in range(3))
    leaves = [x.requires_grad_(), z.requires_grad_(), *first.parameters(), *second.parameters()]

    def work() -> list[Tensor]:
        y, skip = first(x, fork=True)
        out = second(z, skip)
        return [y, out, *torch.autograd.grad([y, out], leaves, [dy, dy.flip(0).contiguous(memory_format=CL)])]

    return work


def convolutions(shape: Shape, device: torch.device, dtype: torch.dtype, algorithm: str) -> Work:
    """conv 3×3 – BatchNorm – ReLU – conv 3×3, the middle never in memory, and its gradients."""
    channels = shape[1]
    torch.manual_seed(0)
    convs = [NormConv2d(channels, channels, 3, padding="same", bias=False) for _ in range(2)]
    model = nn.ModuleList([*convs, BatchNormAct2d(channels)]).to(device, _parameters_of(dtype))
    x, dy = (_random(shape, seed, device, dtype) for seed in range(2))
    leaves = [x.requires_grad_(), *model.parameters()]

    def work() -> list[Tensor]:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            z = convs[1](model[2].pending(convs[0](x))).z
        return [z, *torch.autograd.grad(z, leaves, dy)]

    return work


WORK = {"norms": norms, "convolutions": convolutions}


def _parameters_of(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _random(shape: Shape, seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 1
    return values.to(torch.bfloat16).to(device, dtype).contiguous(memory_format=CL)  # the same in all types


def check(kind: str, shape: Shape, device: torch.device, dtype: torch.dtype, how: str, repeats: int) -> None:
    work = WORK[kind](shape, device, dtype, how)
    found = [result.clone() for result in work()]
    oracle = WORK[kind](shape, torch.device("cpu"), torch.float64, how)()
    rows = shape[0] * shape[2] * shape[3]
    for number, (ours, right) in enumerate(zip(found, oracle, strict=True)):
        magnitude = 1 + right.abs().max().item() + (rows**0.5 if ours.shape != shape else 0)
        error = (ours.double().cpu() - right).abs().max().item()
        assert error <= TOLERANCE[dtype] * magnitude, f"result {number} is {error:.1e} away from float64"

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
            for result in results:
                result.fill_(float("nan"))
            graph.replay()
            expect_the_same(results, f"at replay {i + 1}")


def main(device: torch.device, repeats: int) -> None:
    on_gpu = device.type == "cuda"
    for shape in SHAPES if on_gpu else SMALL:
        for dtype in TOLERANCE:
            for algorithm in ("two_pass", "cooperative"):
                print(f"norms {shape} {dtype} {algorithm}", flush=True)
                check("norms", shape, device, dtype, algorithm, repeats)
    types = TOLERANCE if on_gpu else [torch.float32]  # the interpreter has no dot in bf16: triton#11584
    for shape in SHAPES[:3] if on_gpu else [(2, 16, 6, 5)]:
        for dtype in types:
            print(f"convolutions {shape} {dtype}", flush=True)
            check("convolutions", shape, device, dtype, "", repeats)


if __name__ == "__main__":
    main(torch.device(sys.argv[1]), int(sys.argv[2]))
