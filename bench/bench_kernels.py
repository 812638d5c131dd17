"""Time of BatchNorm + ReLU (+ add) and of residual blocks, forward and backward: the fused kernels against torch's.

    pytest bench/bench_kernels.py --benchmark-only

Every variant runs in turns with the baseline, A B A B, on the same tensors. On a GPU the baseline is torch under
inductor, whose own row, against itself, tells how steady the machine is; the time is that of CUDA events around many
calls, replayed from a CUDA graph ("graph") or launched from Python ("plain"), and pytest-benchmark's own table is the
host's. The tensors are random, and more than the L2 holds from one turn to the next. What is fast but wrong is not
timed: results are first compared to the baseline's.

With --write-table the winners are written to kernels/batchnorm/fastest.json, where the engine looks them up. On a CPU
the reference runs, to show that all of this works.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch._functorch.config
from torch import Tensor, nn

from fastres.config.schema import Config
from fastres.models.blocks import NORMS, BasicBlock, Bottleneck, Norm, Stage, norm_act, norm_act_fork
from fastres.runs.environment import cpu_name
from fastres.training.cuda_graph import capturing
from fastres.training.engine import find_apex, resolve_engine
from fastres.utils.precision import DTYPES
from fastres_kernels import BatchNormAct2d, Skip
from fastres_kernels.batchnorm import dispatch_table
from fastres_kernels.batchnorm.dispatch_table import Table
from fastres_kernels.tiling import BACKWARD_TILE, FORWARD_TILE, one_pass_tiles
from fastres_kernels.triton_launch import INTERPRETED

pytestmark = pytest.mark.skipif(
    INTERPRETED, reason="TRITON_INTERPRET is set: an interpreter's time says nothing"
)

DIRECTIONS = ("forward", "backward", "full")

# ---- what is timed -----------------------------------------------------------------------------------------


class Consumed(torch.autograd.Function):
    """Stands for a second layer that takes an activation: reads nothing, and in the backward hands it its gradient.

    A second output would not do: torch.compile leaves the sum of the gradients of one tensor given twice to autograd,
    where in a network it is part of the compiled backward.
    """

    @staticmethod
    def forward(ctx: Any, activation: Tensor, gradient: Tensor) -> Tensor:
        """Both (N, C, H, W) -> a token, (0,): differentiating it starts the backward."""
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
        """All (N, C, H, W) -> y, which waits for its gradient, and with a residual a token of the second part."""
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
        """(N, C, H, W) -> the same."""
        return (self.stage(x),)


NETS: dict[str, Callable[[Norm, int], nn.Module]] = {
    "bn_relu": NormAct,
    "bn_add_relu": NormAct,
    "basic_blocks": partial(TwoBlocks, BasicBlock),
    "bottlenecks": partial(TwoBlocks, Bottleneck),
}

# The norm, and whether torch.compile compiles what it is part of.
VARIANTS: dict[str, tuple[Norm, bool]] = {
    "two_pass": (NORMS["fused"], True),
    "cooperative": (partial(BatchNormAct2d, algorithm="cooperative"), True),
    "eager": (NORMS["torch"], False),
    "inductor": (NORMS["torch"], True),
    "apex": (NORMS["apex"], False),
    "reference": (NORMS["fused"], False),  # on a CPU
}

# Bytes per element of the activation, forward and backward, that a variant by its construction reads and writes,
# each element being of 2 bytes. For the fused kernels see the modules of kernels/batchnorm/; eager's are those of
# torch's kernels for channels-last; inductor's were counted in the code that it generates for these very
# layers (torch 2.14, for an H100). Alone, it keeps ReLU's mask in bytes, and so moves less than in a network.
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


# ---- where: one interface to a GPU and to a CPU -------------------------------------------------------------

Region = Callable[[], Any]


class Cpu:
    device = torch.device("cpu")
    capability: list[int] | None = None
    multiprocessors = 0  # nothing fits on it at once
    cache_bytes = 0  # two sets of tensors will do for what claims nothing
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
        """Those that run, and why others do not."""
        return ["reference", "eager"], {}

    def stream(self) -> AbstractContextManager[Any]:
        """Everything runs in it."""
        return nullcontext()

    def seconds(self, region: Region) -> float:
        start = time.perf_counter()
        region()
        return time.perf_counter() - start

    def in_mode(self, mode: str, region: Region) -> Region:
        """The same work, launched as `mode` says. Runs it at least twice."""
        region()
        region()
        return region


class Gpu:
    baseline = "inductor"
    modes = (*((direction, "graph") for direction in DIRECTIONS), ("full", "plain"))
    rounds, region_s = 20, 0.002

    def __init__(self) -> None:
        engine = resolve_engine(Config())  # which switches torch as for training
        self.device, self.precision = engine.device, engine.precision
        properties = torch.cuda.get_device_properties(self.device)
        self.name = properties.name
        self.capability = [properties.major, properties.minor]
        self.multiprocessors = properties.multi_processor_count
        self.cache_bytes = properties.L2_cache_size
        # Autograd runs a backward on its forward's stream, and a graph is captured on a stream that is not the
        # default one: so all is on this one, from the first call on.
        self.own_stream = torch.cuda.Stream(self.device)
        self.apex, self.why_no_apex = find_apex("contrib.groupbn.batch_norm")

    def cases(self) -> Iterator[Case]:
        """ResNet-20 at batch 128 and 1024; the speed-run's network and ResNet-50 at 256. All again in fp16 where
        there is apex to compare to."""
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
        absent = {}
        if not cooperates(case, "full", self.multiprocessors):
            absent["cooperative"] = "where the tensor does not fit on the GPU at once"
        if self.apex is None:
            absent["apex"] = self.why_no_apex
        elif case.precision != "fp16":
            absent["apex"] = "where the precision is not fp16"
        names = ("two_pass", "cooperative", "eager", "inductor", "apex")
        return [name for name in names if name not in absent], absent

    def stream(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self.own_stream)

    def seconds(self, region: Region) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        region()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    def in_mode(self, mode: str, region: Region) -> Region:
        region()
        region()
        if mode == "plain":
            return region
        graph = torch.cuda.CUDAGraph()
        with capturing(graph, stream=self.own_stream):
            region()

        def replay(_read_by_the_graph: Region = region) -> None:  # and so kept: a backward's saved tensors
            graph.replay()

        replay()
        return replay


@cache
def machine() -> Cpu | Gpu:
    return Gpu() if torch.cuda.is_available() else Cpu()


def cooperates(case: Case, direction: str, multiprocessors: int) -> bool:
    """Whether a cooperative kernel takes the case, or of a block its narrowest BatchNorm; "full": forward at least."""
    n, c, h, w = case.shape
    c = c // Bottleneck.expansion if case.what == "bottlenecks" else c
    on_chip = BACKWARD_TILE if direction == "backward" else FORWARD_TILE
    return one_pass_tiles(n * h * w, c, on_chip, multiprocessors) is not None


# ---- timing ------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """All (N, C, H, W) channels-last."""

    x: Tensor
    residual: Tensor | None
    dskip: Tensor | None  # the second part of y's gradient
    dy: Tensor


class Contest:
    """A case, with the tensors and the nets of all variants."""

    def __init__(self, case: Case) -> None:
        # What dynamo compiles it keeps by a forward's code: modules of former cases would add up to its limit.
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
        """Compiled, warm, and found to compute what the baseline computes."""
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
                # Not nan either. In bf16, rounding decides otherwise about a ReLU in a thousand, which was 3 % of a
                # gradient, and 12 % through two blocks.
                allowed = 0.3 if self.case.is_block else 0.1
                assert error < allowed, f"{variant} differs from {machine().baseline} by {error:.1%}"
        self._nets[variant] = net
        return net

    def region(self, variant: str, direction: str) -> Region:
        """All batches once. Results are kept until the end, so that no two of them share memory."""
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
        """Measures the seconds of one call, by a region of many."""
        work = machine().in_mode(mode, self.region(variant, direction))
        turns = max(1, math.ceil(machine().region_s / machine().seconds(work)))

        def region() -> None:
            for _ in range(turns):
                work()

        return lambda: machine().seconds(region) / (turns * len(self.batches))


def forward_and_backward(net: Any, batch: Batch) -> tuple[Tensor, ...]:
    """y and the gradients of x, the residual and the parameters."""
    outputs = net(*batch[:3])
    return outputs[0], *gradients(net, batch, outputs)


def gradients(
    net: Any, batch: Batch, outputs: tuple[Tensor, ...], retain_graph: bool = False
) -> tuple[Tensor, ...]:
    inputs = [tensor for tensor in (batch.x, batch.residual) if tensor is not None]
    given = [batch.dy, *(token.detach() for token in outputs[1:])]
    return torch.autograd.grad(outputs, [*inputs, *net.parameters()], given, retain_graph=retain_graph)


@lru_cache(maxsize=1)  # of the case at hand
def contest(case: Case) -> Contest:
    return Contest(case)


@cache
def copy_gb_per_s() -> float:
    """Bytes read and written by a copy of a tensor beyond the L2, the median over the rounds."""
    source = torch.randn(max(2**22, 2 * machine().cache_bytes), device=machine().device)  # 4 bytes each
    target = torch.empty_like(source)
    work = machine().in_mode("plain", lambda: target.copy_(source))
    seconds = [machine().seconds(work) for _ in range(machine().rounds)]
    return 2 * source.nbytes / statistics.median(seconds) / 1e9


def bytes_per_element(case: Case, variant: str, direction: str, multiprocessors: int) -> float | None:
    """What the variant reads and writes by its construction; None where that is not known."""
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
    """In place of conftest.py's: the benchmarks of a case share its nets, and the next case's Contest clears up."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    rows = []
    for case in machine().cases():
        for direction, mode in machine().modes:
            for variant in machine().variants(case)[0]:
                if case.is_block and direction != "full":
                    continue
                if variant == "cooperative" and not cooperates(case, direction, machine().multiprocessors):
                    continue
                rows.append(
                    pytest.param(case, direction, mode, variant, id=f"{case}-{direction}-{mode}-{variant}")
                )
    metafunc.parametrize("case, direction, mode, variant", rows)


def bench_kernels(benchmark: Any, case: Case, direction: str, mode: str, variant: str) -> None:
    here = machine()
    # The backward alone is timed by running it again and again, which donated buffers do not allow.
    with here.stream(), torch._functorch.config.patch(donated_buffer=case.is_block):
        copy = copy_gb_per_s()
        time_baseline, time_variant = (
            contest(case).timer(name, direction, mode) for name in (here.baseline, variant)
        )
        baseline_s: list[float] = []
        variant_s: list[float] = []
        benchmark.pedantic(
            lambda: variant_s.append(time_variant()),
            setup=lambda: baseline_s.append(time_baseline()),  # before each round
            rounds=here.rounds,
        )
    median_s, baseline_median_s = statistics.median(variant_s), statistics.median(baseline_s)
    moved = bytes_per_element(case, variant, direction, here.multiprocessors)
    gb_per_s = None if moved is None else moved * math.prod(case.shape) / median_s / 1e9
    benchmark.extra_info.update(
        device=here.name,
        capability=here.capability,
        what=case.what,
        shape=list(case.shape),
        dtype=case.precision,
        direction=direction,
        mode=mode,
        variant=variant,
        median_us=1e6 * median_s,
        us_20_80=quantiles_us(variant_s),
        us=[1e6 * s for s in variant_s],
        baseline=here.baseline,
        baseline_median_us=1e6 * baseline_median_s,
        baseline_us_20_80=quantiles_us(baseline_s),
        baseline_us=[1e6 * s for s in baseline_s],
        ratio=baseline_median_s / median_s,
        gb_per_s=gb_per_s,
        copy_gb_per_s=copy,
        share_of_copy=None if gb_per_s is None else gb_per_s / copy,
        n=len(variant_s),
        absent=here.variants(case)[1],
    )


def quantiles_us(seconds: list[float]) -> list[float]:
    low, high = np.quantile(1e6 * np.array(seconds), (0.2, 0.8))
    return [float(low), float(high)]


# ---- the table ---------------------------------------------------------------------------------------------

Row = dict[str, Any]  # a benchmark's extra_info


def summary(rows: list[Row]) -> list[str]:
    """The lines of the table, in the order of the rows."""
    first = rows[0]
    lines = [f"{first['device']}: a copy moves {first['copy_gb_per_s']:,.0f} GB/s"]
    if first["capability"] is None:
        lines = [f"{first['device']}: the reference is timed and not the kernels, which claims nothing"]
    for case, of_case in groupby(rows, lambda row: (row["what"], tuple(row["shape"]), row["dtype"])):
        what, shape, dtype = case
        lines.append("{}, {} in {}".format(what, " × ".join(map(str, shape)), dtype))
        lines += ["  " + line(row) for row in of_case]
    absent = dict.fromkeys(reason for row in rows for reason in row["absent"].items())
    lines += [f"no {variant}: {reason}" for variant, reason in absent]
    return lines


def line(row: Row) -> str:
    how = f"{row['direction']}, {row['mode']}"
    spread = "({:,.1f} to {:,.1f})".format(*row["us_20_80"])
    text = (
        f"{how:<15} {row['variant']:<11} {row['median_us']:>9,.1f} us {spread:<22} "
        f"{row['ratio']:>5.2f} x {row['baseline']}'s {row['baseline_median_us']:,.1f}, n={row['n']}"
    )
    if row["gb_per_s"] is not None:
        text += f", {row['gb_per_s']:,.0f} GB/s, {row['share_of_copy']:.0%} of a copy's"
    return text


def fastest(rows: list[Row]) -> tuple[tuple[int, int], Table] | None:
    """Return the entries of kernels/batchnorm/fastest.json for this device, or None on a CPU.

    For each shape this is the fused kernel that beat inductor by most, forward and backward together in a CUDA graph,
    if the ranges from 20 to 80 % of both do not overlap; otherwise it is "torch".
    """
    capability, precision = (
        rows[0]["capability"],
        rows[0]["dtype"],
    )  # the table knows of one: what `auto` chooses
    if capability is None:
        return None
    best: dict[tuple[int, int, bool], Row | None] = {}
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
        if row["us_20_80"][1] < row["baseline_us_20_80"][0] and (
            not before or row["ratio"] > before["ratio"]
        ):
            best[key] = row
    major, minor = capability
    return (major, minor), {key: row["variant"] if row else "torch" for key, row in best.items()}


def write_table(rows: list[Row]) -> str:
    """Puts that into the file. Returns a line about it."""
    if (found := fastest(rows)) is None:
        return "--write-table: on a CPU there is nothing to write"
    dispatch_table.write(*found)
    ours = sum(algorithm != "torch" for algorithm in found[1].values())
    return f"--write-table: the fused kernels are faster at {ours} of {len(found[1])} shapes: {dispatch_table.FILE}"
