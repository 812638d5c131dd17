"""Time BatchNorm + ReLU (+ add) and residual blocks, forward and backward: the fused kernels against torch's.

    pytest bench/bench_kernels.py --benchmark-only

Every variant runs interleaved with the baseline on the same tensors. On a GPU the baseline is torch under inductor, and
its row against itself shows how steady the machine is. CUDA events time many calls, replayed from a CUDA graph
("graph") or launched from Python ("plain"); pytest-benchmark's own table has the host's times. The tensors are random,
and too large for the L2 to keep them from one round to the next. Results are first compared with the baseline's, so
that only correct kernels are timed.

With --write-table the engine's table, kernels/batchnorm/fastest.json, gets the winners. On a CPU the reference runs, to
show that the benchmark works.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple

import pytest
import torch
import torch._functorch.config
from torch import Tensor, nn

from bench.lib.paired import benchmark_interleaved
from bench.lib.stats import Info
from fastres.config.schema import Config
from fastres.models.blocks import NORMS, BasicBlock, Bottleneck, Norm, Stage, norm_act, norm_act_fork
from fastres.runs.environment import cpu_name
from fastres.training.cuda_graph import capturing
from fastres.training.engine import find_apex, resolve_engine
from fastres.utils.hardware import measured_copy
from fastres.utils.precision import DTYPES
from fastres.utils.timing import Region, Timing, time_region
from fastres_kernels import BatchNormAct2d, Skip
from fastres_kernels.batchnorm import dispatch_table
from fastres_kernels.batchnorm.dispatch_table import Table
from fastres_kernels.tiling import BACKWARD_TILE, FORWARD_TILE, one_pass_tiles
from fastres_kernels.triton_launch import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET is set: an interpreter's time says nothing")

DIRECTIONS = ("forward", "backward", "full")

# ---- the layers --------------------------------------------------------------------------------------------


class Consumed(torch.autograd.Function):
    """Stand in for a second consumer of an activation, which reads nothing and has the given gradient.

    A second output would not do. If a tensor is returned twice, torch.compile leaves the sum of its gradients to
    autograd, although in a network the sum is part of the compiled backward.
    """

    @staticmethod
    def forward(ctx: Any, activation: Tensor, gradient: Tensor) -> Tensor:
        """Return a token, (0,), to differentiate for the backward. Both arguments are (N, C, H, W)."""
        ctx.save_for_backward(gradient)
        return activation.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0], None


class NormAct(nn.Module):
    """relu(norm(x)), or relu(norm(x) + residual) whose gradient arrives in two parts, as before a skip connection."""

    def __init__(self, norm: Norm, channels: int) -> None:
        super().__init__()
        self.norm = norm(channels)

    def forward(self, x: Tensor, residual: Tensor | None, dskip: Tensor | None) -> tuple[Tensor, ...]:
        """Return y and, with a residual, a token of the gradient's second part. All arguments are (N, C, H, W)."""
        if residual is None:
            return (norm_act(self.norm, x),)
        y, skip = norm_act_fork(self.norm, x, residual)
        return y, Consumed.apply(skip.gradient if isinstance(skip, Skip) else skip, dskip)


class TwoBlocks(nn.Module):
    """Two residual blocks in a row, so that there is a skip connection between them."""

    def __init__(self, block: type[BasicBlock | Bottleneck], norm: Norm, channels: int) -> None:
        super().__init__()
        inner = channels // block.expansion
        self.stage = Stage(*(block(channels, inner, norm=norm) for _ in range(2)))

    def forward(self, x: Tensor, residual: None, dskip: None) -> tuple[Tensor]:
        """Return the blocks' output: (N, C, H, W) -> the same."""
        return (self.stage(x),)


NETS: dict[str, Callable[[Norm, int], nn.Module]] = {
    "bn_relu": NormAct,
    "bn_add_relu": NormAct,
    "basic_blocks": partial(TwoBlocks, BasicBlock),
    "bottlenecks": partial(TwoBlocks, Bottleneck),
}

# By variant: the norm, and True if torch.compile compiles the network around it.
VARIANTS: dict[str, tuple[Norm, bool]] = {
    "two_pass": (NORMS["fused"], True),
    "cooperative": (partial(BatchNormAct2d, algorithm="cooperative"), True),
    "eager": (NORMS["torch"], False),
    "inductor": (NORMS["torch"], True),
    "apex": (NORMS["apex"], False),
    "reference": (NORMS["fused"], False),  # on a CPU
}

# Bytes per element of the activation, forward and backward, that a variant reads and writes by its construction, for
# elements of 2 bytes. The fused kernels' bytes are derived in kernels/batchnorm/{forward,backward,cooperative}.py.
# Eager's are those of torch's channels-last kernels. Inductor's were counted in the code that it generates for these
# layers (torch 2.14, for an H100). Outside of a network inductor stores ReLU's mask in bytes, so it moves less.
BYTES: dict[str, dict[str, dict[str, float]]] = {
    "two_pass": {
        "bn_relu": {"forward": 2 + 4, "backward": 4 + 6},
        "bn_add_relu": {"forward": 2 + 6 + 1 / 8, "backward": 8 + 1 / 8 + 6},
    },
    "cooperative": {
        "bn_relu": {"forward": 4, "backward": 6},
        "bn_add_relu": {"forward": 6 + 1 / 8, "backward": 10 + 1 / 8},
    },
    "eager": {
        "bn_relu": {"forward": 2 + 4 + 4, "backward": 6 + 4 + 6},
        "bn_add_relu": {"forward": 2 + 4 + 6 + 4, "backward": 6 + 6 + 4 + 6},
    },
    "inductor": {
        "bn_relu": {"forward": 2 + 5, "backward": 5 + 7},
        "bn_add_relu": {"forward": 2 + 7, "backward": 7 + 4 + 6},
    },
}


@dataclass(frozen=True)
class Case:
    what: str  # a name in NETS
    shape: tuple[int, int, int, int]  # (N, C, H, W) of input and output
    precision: str  # "bf16", "fp16", "fp32"

    @property
    def is_block(self) -> bool:
        return self.what not in BYTES["two_pass"]

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    def __str__(self) -> str:
        return "{}-{}x{}x{}x{}-{}".format(self.what, *self.shape, self.precision)


# ---- the machine: one interface to a GPU and to a CPU -------------------------------------------------------


class Cpu:
    device = torch.device("cpu")
    capability: list[int] | None = None
    multiprocessors = 0  # so no tensor fits on the device at once
    cache_bytes = 0  # so two sets of tensors are enough; a CPU's times claim nothing
    baseline = "eager"
    modes: tuple[tuple[str, str], ...] = tuple((direction, "plain") for direction in DIRECTIONS)
    rounds, region_s = 5, 0.0

    def __init__(self) -> None:
        self.name = cpu_name()

    def cases(self) -> Iterator[Case]:
        for c, side in ((16, 32), (32, 16), (64, 8)):
            for what in ("bn_relu", "bn_add_relu"):
                yield Case(what, (8, c, side, side), "fp32")
        for what in ("basic_blocks", "bottlenecks"):
            yield Case(what, (8, 64, 8, 8), "fp32")

    def variants(self, case: Case) -> tuple[list[str], dict[str, str]]:
        """Return the variants that run, and the reason by name for each other one."""
        return ["reference", "eager"], {}

    def stream(self) -> AbstractContextManager[Any]:
        """Return the context in which everything runs."""
        return nullcontext()

    def seconds(self, region: Region) -> float:
        return time_region(region, self.device)

    def in_mode(self, mode: str, region: Region) -> Region:
        """Return the same work, launched as `mode` says, after running it at least twice."""
        region()
        region()
        return region


class Gpu:
    baseline = "inductor"
    modes = (*((direction, "graph") for direction in DIRECTIONS), ("full", "plain"))
    rounds, region_s = 20, 0.002

    def __init__(self) -> None:
        engine = resolve_engine(Config())
        engine.apply_torch_settings()
        self.device, self.precision = engine.device, engine.precision
        properties = torch.cuda.get_device_properties(self.device)
        self.name = properties.name
        self.capability = [properties.major, properties.minor]
        self.multiprocessors = properties.multi_processor_count
        self.cache_bytes = properties.L2_cache_size
        # Autograd runs a backward on the stream of its forward, and the default stream cannot be captured, so
        # everything runs on this stream from the first call on.
        self.own_stream = torch.cuda.Stream(self.device)
        self.apex, self.why_no_apex = find_apex("contrib.groupbn.batch_norm")

    def cases(self) -> Iterator[Case]:
        """Yield ResNet-20's layers at batch 128 and 1024, the speed-run network's and ResNet-50's at 256.

        If apex is installed, all cases are repeated in fp16, to compare with apex.
        """
        for precision in (self.precision, "fp16") if self.apex else (self.precision,):
            for n in (128, 1024):
                for c, side in ((16, 32), (32, 16), (64, 8)):
                    for what in ("bn_relu", "bn_add_relu", "basic_blocks"):
                        yield Case(what, (n, c, side, side), precision)
            for c, side in ((64, 15), (256, 7), (256, 4)):
                for what in ("bn_relu", "bn_add_relu"):
                    yield Case(what, (256, c, side, side), precision)
            for c, side in ((64, 112), (64, 56), (128, 28), (256, 14), (512, 7)):
                yield Case("bn_relu", (256, c, side, side), precision)
            for c, side in ((256, 56), (512, 28), (1024, 14), (2048, 7)):
                for what in ("bn_relu", "bn_add_relu", "bottlenecks"):
                    yield Case(what, (256, c, side, side), precision)

    def variants(self, case: Case) -> tuple[list[str], dict[str, str]]:
        unavailable = {}
        if not cooperates(case, "full", self.multiprocessors):
            unavailable["cooperative"] = "if the tensor does not fit on the GPU at once"
        if self.apex is None:
            unavailable["apex"] = self.why_no_apex
        elif case.precision != "fp16":
            unavailable["apex"] = "if the precision is not fp16"
        names = ("two_pass", "cooperative", "eager", "inductor", "apex")
        return [name for name in names if name not in unavailable], unavailable

    def stream(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self.own_stream)

    def seconds(self, region: Region) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        region()
        end.record()
        end.synchronize()
        ms: float = start.elapsed_time(end)
        return ms / 1000

    def in_mode(self, mode: str, region: Region) -> Region:
        region()
        region()
        if mode == "plain":
            return region
        graph = torch.cuda.CUDAGraph()
        with capturing(graph, stream=self.own_stream):
            region()

        def replay(_read_by_the_graph: Region = region) -> None:  # keeps a backward's saved tensors alive
            graph.replay()

        replay()
        return replay


@cache
def machine() -> Cpu | Gpu:
    return Gpu() if torch.cuda.is_available() else Cpu()


def cooperates(case: Case, direction: str, multiprocessors: int) -> bool:
    """Return True if a cooperative kernel takes the case, or a block's narrowest BatchNorm; "full" asks for forward."""
    n, c, h, w = case.shape
    c = c // Bottleneck.expansion if case.what == "bottlenecks" else c
    tile = BACKWARD_TILE if direction == "backward" else FORWARD_TILE
    return one_pass_tiles(n * h * w, c, tile, multiprocessors) is not None


# ---- timing ------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """The inputs and the output's gradients of a case, all (N, C, H, W) channels-last."""

    x: Tensor
    residual: Tensor | None
    dskip: Tensor | None  # the second part of y's gradient
    dy: Tensor


class Contest:
    """The tensors of a case, and the networks of all variants."""

    def __init__(self, case: Case) -> None:
        # Dynamo counts compilations per forward, so the modules of former cases would reach its limit.
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
        torch.manual_seed(0)
        self.case = case
        tensor_bytes = math.prod(case.shape) * case.dtype.itemsize
        batches = max(2, math.ceil(2.5 * machine().cache_bytes / tensor_bytes))
        self.batches = [self._batch() for _ in range(batches)]
        self._nets: dict[str, Any] = {}

    def _batch(self) -> Batch:
        def normal() -> Tensor:
            tensor = torch.randn(self.case.shape, device=machine().device, dtype=self.case.dtype)
            return tensor.to(memory_format=torch.channels_last)

        adds = self.case.what == "bn_add_relu"
        return Batch(
            x=normal().requires_grad_(),
            residual=normal().requires_grad_() if adds else None,
            dskip=normal() if adds else None,
            dy=normal(),
        )

    def net(self, variant: str) -> Any:
        """Return the variant's network, compiled if it should be, after comparing its results with the baseline's."""
        if variant in self._nets:
            return self._nets[variant]
        norm, compiles = VARIANTS[variant]
        torch.manual_seed(0)
        net: Any = NETS[self.case.what](norm, self.case.shape[1])
        net.to(machine().device).to(memory_format=torch.channels_last)
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                module.to(self.case.dtype)  # BatchNorm's parameters stay float32, as under autocast
        if compiles:
            net = torch.compile(net, fullgraph=True, dynamic=False)
        results = forward_and_backward(net, self.batches[0])
        if variant != machine().baseline:
            expected = forward_and_backward(self.net(machine().baseline), self.batches[0])
            for result, wanted in zip(results, expected, strict=True):
                error = ((result - wanted).float().norm() / wanted.float().norm()).item()
                # A NaN fails too. In bf16, rounding flips one ReLU in a thousand, which changed a gradient by 3 %, or
                # by 12 % through two blocks.
                allowed = 0.3 if self.case.is_block else 0.1
                assert error < allowed, f"{variant} differs from {machine().baseline} by {error:.1%}"
        self._nets[variant] = net
        return net

    def region(self, variant: str, direction: str) -> Region:
        """Return a region that runs all batches once and keeps the results, so that no two results share memory."""
        net = self.net(variant)
        if direction == "forward":
            return lambda: [net(*batch[:3]) for batch in self.batches]
        if direction == "full":
            return lambda: [forward_and_backward(net, batch) for batch in self.batches]
        outputs = [net(*batch[:3]) for batch in self.batches]
        return lambda: [
            gradients(net, batch, retained, retain_graph=True)
            for batch, retained in zip(self.batches, outputs, strict=True)
        ]

    def timer(self, variant: str, direction: str, mode: str) -> Callable[[], float]:
        """Return a function that measures the seconds of one call, from a region of many calls."""
        work = machine().in_mode(mode, self.region(variant, direction))
        turns = max(1, math.ceil(machine().region_s / machine().seconds(work)))

        def region() -> None:
            for _ in range(turns):
                work()

        return lambda: machine().seconds(region) / (turns * len(self.batches))


def forward_and_backward(net: Any, batch: Batch) -> tuple[Tensor, ...]:
    """Return y and the gradients of x, the residual and the parameters."""
    outputs = net(*batch[:3])
    return outputs[0], *gradients(net, batch, outputs)


def gradients(net: Any, batch: Batch, outputs: tuple[Tensor, ...], retain_graph: bool = False) -> tuple[Tensor, ...]:
    inputs = [tensor for tensor in (batch.x, batch.residual) if tensor is not None]
    given = [batch.dy, *(token.detach() for token in outputs[1:])]
    return torch.autograd.grad(outputs, [*inputs, *net.parameters()], given, retain_graph=retain_graph)


@lru_cache(maxsize=1)  # keeps only the current case
def contest(case: Case) -> Contest:
    return Contest(case)


@cache
def copy_gb_per_s() -> float:
    """Measure the bytes per second that a copy reads and writes, once in a process."""
    return measured_copy(machine().device) / 1e9


def bytes_per_element(case: Case, variant: str, direction: str, multiprocessors: int) -> float | None:
    """Return the bytes that the variant reads and writes by its construction, or None if they are unknown."""
    if case.is_block or case.dtype.itemsize != 2 or variant not in BYTES:
        return None
    total = 0.0
    for part in ("forward", "backward") if direction == "full" else (direction,):
        falls_back = variant == "cooperative" and not cooperates(case, part, multiprocessors)
        total += BYTES["two_pass" if falls_back else variant][case.what][part]
    return total


# ---- the benchmark -----------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _leave_nothing() -> None:
    """Replace conftest.py's fixture, because the benchmarks of a case share its networks until the next Contest."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    rows = [
        pytest.param(case, direction, mode, variant, id=f"{case}-{direction}-{mode}-{variant}")
        for case in machine().cases()
        for direction, mode in machine().modes
        if direction == "full" or not case.is_block
        for variant in machine().variants(case)[0]
        if variant != "cooperative" or cooperates(case, direction, machine().multiprocessors)
    ]
    metafunc.parametrize("case, direction, mode, variant", rows)


def bench_kernels(benchmark: Any, case: Case, direction: str, mode: str, variant: str) -> None:
    here = machine()
    # The backward alone is timed by repeating it, so buffers must not be donated.
    with here.stream(), torch._functorch.config.patch(donated_buffer=case.is_block):
        copy = copy_gb_per_s()
        names = {"baseline": here.baseline, "variant": variant}
        timers = {role: contest(case).timer(name, direction, mode) for role, name in names.items()}
        theirs, ours = benchmark_interleaved(benchmark, timers, here.rounds).values()
    moved = bytes_per_element(case, variant, direction, here.multiprocessors)
    gb_per_s = None if moved is None else moved * math.prod(case.shape) / ours.median_s / 1e9
    benchmark.extra_info.update(
        device=here.name,
        capability=here.capability,
        what=case.what,
        shape=list(case.shape),
        dtype=case.precision,
        direction=direction,
        mode=mode,
        variant=variant,
        **in_us(ours),
        baseline=here.baseline,
        **{f"baseline_{name}": us for name, us in in_us(theirs).items()},
        ratio=ours.ratio_to(theirs).of_medians,
        gb_per_s=gb_per_s,
        copy_gb_per_s=copy,
        share_of_copy=None if gb_per_s is None else gb_per_s / copy,
        n=ours.n,
        absent=here.variants(case)[1],
    )


def in_us(timing: Timing) -> Info:
    """Return the median, the 20 and 80 % quantiles and all times, in us."""
    return {
        "median_us": 1e6 * timing.median_s,
        "us_20_80": [1e6 * s for s in timing.quantiles_s],
        "us": [1e6 * s for s in timing.seconds],
    }


# ---- the table ---------------------------------------------------------------------------------------------


def fastest(rows: list[Info]) -> tuple[tuple[int, int], Table] | None:
    """Return this device's part of kernels/batchnorm/fastest.json, or None on a CPU.

    For each shape it names the fused kernel with the largest ratio to inductor, forward and backward together in a CUDA
    graph, if the 20 to 80 % intervals of both do not overlap; otherwise "torch".
    """
    # The table has one precision, which is auto's choice.
    capability, precision = rows[0]["capability"], rows[0]["dtype"]
    if capability is None:
        return None
    best: dict[tuple[int, int, bool], Info | None] = {}
    for row in rows:
        if (
            row["variant"] not in ("two_pass", "cooperative")
            or row["what"] not in BYTES["two_pass"]
            or (row["direction"], row["mode"], row["dtype"]) != ("full", "graph", precision)
        ):
            continue
        n, c, h, w = row["shape"]
        key = n * h * w, c, row["what"] == "bn_add_relu"
        before = best.setdefault(key, None)
        if row["us_20_80"][1] < row["baseline_us_20_80"][0] and (not before or row["ratio"] > before["ratio"]):
            best[key] = row
    major, minor = capability
    return (major, minor), {key: row["variant"] if row else "torch" for key, row in best.items()}


def write_table(rows: list[Info]) -> str:
    """Write the winners to the file, and return a line about it."""
    if (found := fastest(rows)) is None:
        return "--write-table: nothing to write on a CPU"
    dispatch_table.write(*found)
    ours = sum(algorithm != "torch" for algorithm in found[1].values())
    return f"--write-table: the fused kernels are faster at {ours} of {len(found[1])} shapes: {dispatch_table.FILE}"
