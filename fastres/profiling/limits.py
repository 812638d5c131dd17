"""Measure what limits a run: its loader, launches, memory bandwidth or compute.

Three regions of equal length are timed interleaved: the step with the run's own loader, the step with a synthetic batch
that stays on the device (the control), and the loader alone. Then one trace of the control divides the step's time. The
rule and its thresholds are in fastres/profiling/verdict.py. Nothing is written to the run's folder.

The lines for CUDA (kernels, idle time, a captured step) have not yet run on a GPU.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fastres.config.schema import Config, EngineConfig
from fastres.distributed.process_group import ProcessGroup
from fastres.profiling import trace
from fastres.profiling.measure import LR, MOST_STEPS, REGION_S, STEPS, TRACED_STEPS, StepRun, named_kernels, record
from fastres.profiling.trace import Operator, WorkCount
from fastres.profiling.verdict import FAR, Evidence, Times, Verdict, sentence, verdict_of
from fastres.runs.environment import device_name
from fastres.training.build import build_parts, fit_whitening, fix_length, warm_up
from fastres.training.cuda_graph import CudaRecorder, Recorder, capture_if_enabled
from fastres.training.engine import Engine, resolve_engine
from fastres.training.step import Batch
from fastres.utils import hardware
from fastres.utils.errors import RunError
from fastres.utils.timing import Timing, interleaved, time_region

ROUNDS = 5
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The measurements of one run of the command."""

    config: Config
    engine: Engine
    shape: tuple[int, ...]  # (N, C, S, S) of a batch
    steps: int  # of a round
    timings: dict[str, Timing]  # rounds of "run", "step" and "loader"
    work: StepWork
    captured: bool
    before: dict[str, Any]
    after: dict[str, Any]

    @property
    def overlaps(self) -> bool:
        """Return True if the loader works beside the step. The resident loader works on the step's device."""
        data = self.config.data
        return data.loader != "resident" and (data.loader == "dali" or data.workers > 0)

    def times(self, seconds: dict[str, float]) -> Times:
        """Return the times of a step, with the traced step's shares.

        Args:
            seconds: of a round of "run", "step" and "loader".
        """
        of_a_step = {name: taken_s / self.steps for name, taken_s in seconds.items()}
        step_s = of_a_step["step"]
        parts = {name: share * step_s for name, share in self.work.shares(step_s).items()}
        cores = self.config.data.workers if self.overlaps else 1
        return Times(**of_a_step, **parts, overlaps=self.overlaps, loader_cores=cores)

    @property
    def median(self) -> Times:
        """Return the times of a step by the medians."""
        return self.times({name: timing.median_s for name, timing in self.timings.items()})

    @property
    def verdict(self) -> Verdict:
        """Return what limits the run."""
        rounds = zip(*(timing.seconds for timing in self.timings.values()), strict=True)
        return verdict_of(self.median, [self.times(dict(zip(self.timings, each, strict=True))) for each in rounds])

    @property
    def evidence(self) -> Evidence:
        """Return the figures and settings that the sentence names."""
        return Evidence(
            times=self.median,
            batch=self.shape[0],
            launches=self.work.launches,
            reached=self.work.reached,
            slowest=self.work.slowest,
            config=self.config,
            on_gpu=self.engine.device.type == "cuda",
            captured=self.captured,
            cpus=self.before["host"]["cpus"] or 1,
            better=better_choices(self.config, self.engine),
        )


def better_choices(config: Config, engine: Engine) -> dict[str, str]:
    """Return, by setting with an explicit value, the flag for auto's choice on this machine, if that differs."""
    default = EngineConfig(device=str(engine.device))
    names = ("precision", "channels_last", "compile", "cuda_graph", "conv")
    explicit = [name for name in names if getattr(config.engine, name) != getattr(default, name)]
    if not explicit and config.model.norm == "auto":
        return {}  # without asking, because auto may build kernels
    auto = resolve_engine(replace(config, engine=default, model=replace(config.model, norm="auto")))
    found = {}
    for name in explicit:
        choice = getattr(auto, name)
        if choice != getattr(engine, name):
            value = f"auto ({str(choice).lower()} here)" if getattr(default, name) == "auto" else str(choice).lower()
            found[f"engine.{name}"] = f"--engine.{name} {value}"
    if config.model.norm != "auto" and auto.norm != engine.norm:
        found["model.norm"] = "--model.norm auto" + (f" ({auto.norm} here)" if auto.norm != "measured" else "")
    return found


# ------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class StepWork:
    """The division of a step's time, from its trace.

    Attributes:
        seconds: time of a step's operators, by compute, memory and slow.
        span_s: time of the step that `seconds` are of, on a CPU; None on a GPU, where any time of a step may be
            compared with the time of its kernels.
        launches: kernels of a step on a GPU, operators on a CPU.
        reached: by compute and memory, the share of the rate that was measured on this device.
        slowest: the slow operator that takes the most time.
    """

    seconds: dict[str, float]
    span_s: float | None
    launches: float
    reached: dict[str, float | None]
    slowest: str

    def shares(self, step_s: float) -> dict[str, float]:
        """Return the shares of a step that takes `step_s` seconds: those of `seconds`, and launches for the rest."""
        busy_s = sum(self.seconds.values())
        total_s = max(self.span_s or step_s, busy_s)
        return {**{name: s / total_s for name, s in self.seconds.items()}, "launches": 1 - busy_s / total_s}


class Feed:
    """A loader that is started anew for each region, so that it never works ahead in another region's time.

    A region begins after as many batches as the loader works on at once. Every start continues after the samples of the
    last one, because samples that have been read come faster, from the system's cache.

    Args:
        ahead: batches that the loader works on at once; 0 for a loader that makes its batches when they are asked for.
    """

    def __init__(self, ahead: int) -> None:
        self.ahead, self.next_step = ahead, 0
        self.batches: Iterator[tuple[int, Batch]] = iter(())
        self._opened: Any = None

    def start(self, loader: Any, steps: int) -> None:
        """Let `batches` yield `steps` batches of the loader, each with its step's number."""
        self.close()
        first, self.next_step = self.next_step, self.next_step + self.ahead + steps
        self._opened = loader.train(first, self.next_step)
        # It stops before the end, because a loader may take a while to end its workers.
        self.batches = itertools.islice(enumerate(self._opened, first), self.ahead + steps)
        for _ in range(self.ahead):
            next(self.batches)

    def close(self) -> None:
        """End the loader's workers."""
        if self._opened is not None:
            self._opened.close()
        self._opened, self.batches = None, iter(())


class LimitedRun:
    """A run's parts, ready to be measured: its step, with its own batches and with a synthetic one.

    Args:
        config: the run's configuration.
        engine: the resolved engine, whose torch settings are applied.
        say: is called with the run's notes.
        recorder: captures the step if the engine has CUDA graphs; None for a CUDA graph.

    Raises:
        UsageError: if the data is bad or does not fit the network.
    """

    def __init__(self, config: Config, engine: Engine, say: Say, recorder: Recorder | None = None) -> None:
        group = ProcessGroup()
        # Speed does not depend on the weights' values, so none is downloaded.
        config = replace(config, model=replace(config.model, weights=None))
        config, source = fix_length(config, group, say=lambda line: None)
        self.config, self.engine = config, engine
        with named_kernels(engine):
            parts = build_parts(config, engine, group, source)
            fit_whitening(config, engine, parts)
            for note in parts.notes:
                say(note)
            warm_up(parts, say)
        if engine.cuda_graph and recorder is None:
            recorder = CudaRecorder(engine.device)
        self.step, self.loader = parts.step, parts.data.train_loader
        self.run_step, self.batches, _ = capture_if_enabled(
            parts.step, parts.evaluator, self.loader, parts.data.curve_loader, lambda i: LR, say, recorder
        )
        self.captured = self.run_step is not parts.step
        self.images, self.labels = synthetic_batch(parts.dummy_batch)
        self.control = StepRun(parts.step, self.images, self.labels)
        if self.captured:
            self.control.capture(recorder)
        ahead = {"resident": 0, "dali": 2, "dataloader": config.data.workers}
        self.feed = Feed(ahead[config.data.loader])

    def steps_of_a_round(self, region_s: float) -> int:
        """Return the number of steps that take the slower of step and loader `region_s` seconds, up to MOST_STEPS."""
        device, ahead = self.engine.device, max(1, self.feed.ahead)
        step_s = interleaved({"step": partial(self.control.whole_steps, 1)}, 3, device)["step"].median_s
        self.feed.start(self.loader, ahead)
        loader_s = time_region(self._consume, device) / ahead
        # Workers finish their batches together. A round of any length will do if they do so long before the step.
        unit = ahead if 2 * loader_s > step_s else 1
        return unit * math.ceil(min(MOST_STEPS, region_s / max(step_s, loader_s)) / unit)

    def time(self, steps: int) -> dict[str, Timing]:
        """Time rounds of `steps` steps with the run's loader ("run") and without it ("step"), and of "loader" alone."""
        sources = {"run": self.batches, "loader": self.loader}

        def start(region: str) -> None:
            self.feed.close()
            if region in sources:
                self.feed.start(sources[region], steps)

        regions: dict[str, Callable[[], object]] = {
            "run": self._train,
            "step": partial(self.control.whole_steps, steps),
            "loader": self._consume,
        }
        try:
            return interleaved(regions, ROUNDS, self.engine.device, before=start)
        finally:
            self.feed.close()

    def rates(self) -> tuple[float, float]:
        """Return the FLOP/s of a matrix product and the bytes/s of a copy on this device at this moment."""
        device = self.engine.device
        return hardware.measured_matmul(device, self.engine.precision), hardware.measured_copy(device)

    def trace(self, step_s: float, rates: tuple[float, float]) -> StepWork:
        """Trace a step that is not captured, whose kernels are those of a captured one. Its step is eager afterwards.

        Args:
            step_s: the seconds of the fastest round's step. On a CPU, the operators' times are scaled to it, because
                the tracer slows them, and because the rates that they are compared with are the best ones too.
            rates: those of before the rounds. Each is replaced by the present one if that is higher.

        Raises:
            RunError: if the device is a GPU and the tracer sees no kernels.
        """
        run, device = StepRun(self.step, self.images, self.labels), self.engine.device
        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary) / "trace.json.gz"
            record(run, path)
            events = trace.load(path)
        if device.type == "cuda" and trace.kernel_seconds(events, TRACED_STEPS) is None:
            raise RunError("the tracer saw no kernels; detach any other profiler")
        self.step.run_eagerly()
        with WorkCount() as count:
            run.whole_steps(1)
        operators = trace.operators(events, count.work, TRACED_STEPS)
        on_cpu = device.type == "cpu"
        if on_cpu:
            ranges = [event for event in events if event.get("cat") == "user_annotation" and event["name"] == STEPS]
            scale = step_s * TRACED_STEPS / sum(event["dur"] / 1e6 for event in ranges)
            operators = [replace(operator, seconds=scale * operator.seconds) for operator in operators]
        flops_per_s, bytes_per_s = map(max, rates, self.rates())
        return work_of(
            operators,
            span_s=step_s if on_cpu else None,
            launches=trace.launches(events, operators, TRACED_STEPS),
            flops_per_s=flops_per_s,
            bytes_per_s=bytes_per_s,
        )

    def _train(self) -> None:
        """Run the steps of the open loader."""
        for i, batch in self.feed.batches:
            self.run_step(*batch, LR, i)

    def _consume(self) -> None:
        """Take the batches of the open loader."""
        for _ in self.feed.batches:
            pass


def synthetic_batch(dummy: Batch) -> Batch:
    """Return random images and labels with the shapes, dtypes and strides of `dummy`, on its device."""
    images, labels = dummy
    if labels.ndim == 2:  # shares, for mixed images
        return torch.randn_like(images), torch.randn_like(labels).softmax(dim=1)
    return torch.randn_like(images), labels  # class 0 exists for any head


def work_of(
    operators: Sequence[Operator], *, span_s: float | None, launches: float, flops_per_s: float, bytes_per_s: float
) -> StepWork:
    """Return the division of a step's time by its operators' sides of the roofline, and the slow ones.

    Args:
        operators: the step's operators.
        span_s: the time of the step that the operators are of, on a CPU; None on a GPU.
        launches: kernels of a step on a GPU, operators on a CPU.
        flops_per_s: the rate of a matrix product on this device.
        bytes_per_s: the rate of a copy on this device.
    """
    sides: dict[str, list[Operator]] = {"compute": [], "memory": [], "slow": []}
    for operator in operators:
        side, share = trace.bound(operator, flops_per_s, bytes_per_s)
        # inductor's kernels compute no convolutions or matrix products. On a CPU their bytes are not known.
        if share is None and trace.GENERATED.match(operator.name):
            side = "memory"
        elif share is None or share < FAR:
            side = "slow"
        sides[side].append(operator)

    def reached(side: str, work: str, rate: float) -> float | None:
        known = [operator for operator in sides[side] if getattr(operator, work) is not None]
        seconds = sum(operator.seconds for operator in known)
        return sum(getattr(operator, work) for operator in known) / seconds / rate if seconds else None

    return StepWork(
        seconds={side: sum(operator.seconds for operator in of_side) for side, of_side in sides.items()},
        span_s=span_s,
        launches=launches,
        reached={
            "compute": reached("compute", "flops", flops_per_s),
            "memory": reached("memory", "bytes", bytes_per_s),
        },
        slowest=max(sides["slow"], key=lambda operator: operator.seconds).name if sides["slow"] else "",
    )


def measure_limits(
    config: Config, engine: Engine, say: Say, *, region_s: float = REGION_S, recorder: Recorder | None = None
) -> Limits:
    """Measure what limits a run of one process.

    Args:
        config: the run's configuration.
        engine: the resolved engine, whose torch settings are applied.
        say: is called with the run's notes, and a line before the measurement.
        region_s: the seconds of a region of the slower of step and loader.
        recorder: captures the step if the engine has CUDA graphs; None for a CUDA graph.

    Raises:
        UsageError: if the data is bad or does not fit the network.
        RunError: if the device is a GPU and the tracer sees no kernels.
    """
    run = LimitedRun(config, engine, say, recorder)
    before = hardware.snapshot(engine.device)
    steps = run.steps_of_a_round(region_s)
    say(f"measuring {ROUNDS} rounds of {steps} step(s) with the run's loader, as many without it, and the loader alone")
    rates = run.rates()
    timings = run.time(steps)
    after = hardware.snapshot(engine.device)
    return Limits(
        config=run.config,
        engine=engine,
        shape=tuple(run.images.shape),
        steps=steps,
        timings=timings,
        work=run.trace(min(timings["step"].seconds) / steps, rates),
        captured=run.captured,
        before=before,
        after=after,
    )


# ------------------------------------------------------------------------------------------- output


def show(limits: Limits, console: Console) -> None:
    """Print a title, the table, the sentence, and what may have disturbed the measurement."""

    def say(text: str, style: str | None = None) -> None:
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    n, channels, side, _ = limits.shape
    data = limits.config.data
    workers = "" if data.loader == "resident" else f" with {data.workers} worker(s)"
    say(
        f"\n{limits.config.model.name} in {limits.engine.precision}, batch {n} of {channels} × {side} × {side}, "
        f"data.loader {data.loader}{workers}, {device_name(limits.engine.device)}, torch {torch.__version__}"
    )
    say(f"median (20 to 80 %) of {ROUNDS} interleaved rounds of {limits.steps} step(s)")
    console.print(table_of(limits))
    say(sentence(limits.verdict, limits.evidence))
    for line in hardware.disturbances(limits.before, limits.after):
        say(f"doubtful: {line}", style="yellow")


def table_of(limits: Limits) -> Table:
    """Return the table of the three measurements and of the parts of the run's time."""
    times, work = limits.median, limits.work
    table = Table()
    table.add_column("of one step", no_wrap=True)
    for column in ("images/s", "ms", "of the run"):
        table.add_column(column, justify="right")
    table.add_column("", no_wrap=True)
    named = {"run": "the run, with its loader", "step": "without the loader", "loader": "the loader alone"}
    for name, timing in limits.timings.items():
        median, low, high = timing.rates(limits.steps * limits.shape[0])
        share = "" if name == "loader" else f"{getattr(times, name) / times.run:.0%}"
        images_per_s = f"{median:,.0f} ({low:,.0f} to {high:,.0f})"
        ms = f"{1e3 * getattr(times, name):,.2f}"
        table.add_row(named[name], images_per_s, ms, share, "", end_section=name == "loader")
    on_gpu = limits.engine.device.type == "cuda"
    notes = {
        "launches": f"{work.launches:,.0f} {'kernels' if on_gpu else 'operators'}",
        "slow": f"most in {work.slowest}",
    }
    for side, rate in (("compute", "matrix product"), ("memory", "copy")):
        if (reached := work.reached[side]) is not None:
            notes[side] = f"{reached:.0%} of a {rate}'s rate"
    rows = {
        "loader": "lost to the loader",
        "compute": "compute",
        "memory": "memory bandwidth",
        "slow": "slow operators",
        "launches": "launches: " + ("the GPU is idle" if on_gpu else "between operators"),
    }
    rows |= {"disturbed": "other load on the machine"} if times.disturbed else {}
    for part, text in rows.items():
        seconds = times.lost if part == "loader" else getattr(times, part)
        table.add_row(
            text, "", f"{1e3 * seconds:,.2f}", f"{times.share(part):.0%}", notes.get(part, "") * bool(seconds)
        )
    return table
