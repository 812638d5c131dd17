"""Measure variants of one workload: prepare them, time them interleaved, then trace them one by one.

Each variant is the engine's own TrainStep. The measurements are:

- step: TrainStep.__call__, many in a row. forward, backward, optimizer: the same calls in a region of their own, with
  marks between them that do not synchronise with the device.
- difference: logits and gradients against eager fp32 NCHW from the same weights and batch, before any update.
- FLOPs and bytes: see fastres/profiling/trace.py. The device's own limits are measured in the same run.

A variant of mode graph is compiled and replayed as a whole, so only whole steps are timed.

The lines that name CUDA (NVTX ranges, memory history, peak memory, TF32's switches) and graphs have not yet run on a
GPU.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastres.config.schema import Config
from fastres.profiling import trace
from fastres.profiling.report import Profile, Result
from fastres.profiling.trace import Key, Operator, WorkCount
from fastres.profiling.variants import REFERENCE, Variant
from fastres.profiling.workloads import Workload
from fastres.training.cuda_graph import CudaRecorder, FixedBatch, GraphedStep, Recorder
from fastres.training.engine import Engine, resolve_engine
from fastres.training.step import TrainStep, raise_recompile_limit
from fastres.utils import hardware
from fastres.utils.errors import RunError, first_line
from fastres.utils.timing import Stopwatch, Timing, gc_paused, interleaved, wait_for

LR = 0.0  # keeps the weights, so that every step computes the same numbers and random labels cannot make it diverge
STEPS = "steps"  # the name of a trace's range around whole steps
WARM_UP, TRACED_STEPS = 1, 3  # rounds before the measured ones; steps of a trace
REGION_S = 0.5  # a round of the baseline takes this long if --steps is not given
MOST_STEPS = 200  # of a round whose length is chosen by REGION_S

Part = Callable[[str], AbstractContextManager[Any]]
Say = Callable[[str], None]

# ------------------------------------------------------------------------------------------- one variant


def step_in_parts(step: TrainStep, images: Tensor, labels: Tensor, part: Part) -> None:
    """Do the work of TrainStep.__call__, each part inside `part`; the last part includes the metrics."""
    with part("forward"):
        loss, correct = step.forward_loss(images, labels)
    with part("backward"):
        step.backward(loss)
    with part("optimizer"):
        step.update()
        step.add_to_metrics(loss.detach(), correct, len(labels))


@dataclass
class Outcome:
    """The result of one forward and backward pass before any update, on the CPU in float32."""

    logits: Tensor
    gradients: dict[str, Tensor]


class StepRun:
    """A step and the batch that it is measured with, both on the device.

    Args:
        step: the step, whose engine's torch settings must be applied already.
        images: (N, C, S, S) in the step's dtype and memory format.
        labels: (N,) int64, or (N, classes) float32 shares.
    """

    def __init__(self, step: TrainStep, images: Tensor, labels: Tensor) -> None:
        self.engine, self.model = step.engine, step.model
        self.step, self.images, self.labels = step, images, labels
        self.graph: GraphedStep | None = None

    def capture(self, recorder: Recorder | None = None) -> None:
        """Capture the step if the engine has CUDA graphs. It has not yet run on a GPU.

        Args:
            recorder: captures the step; None for a CUDA graph.
        """
        if self.engine.cuda_graph:
            batch = FixedBatch(self.images, self.labels)
            self.graph = GraphedStep(self.step, batch, lambda i: LR, recorder or CudaRecorder(self.engine.device))

    def whole_steps(self, steps: int) -> None:
        """Run steps as in training, or replay them if they are captured."""
        if self.graph:
            for i, batch in enumerate(self.graph.train(0, steps)):
                self.graph(*batch, LR, i)
            return
        for i in range(steps):
            self.images.grad = None
            self.step(self.images, self.labels, LR, i)

    def traced_steps(self, steps: int, part: Part) -> None:
        """Run the steps that a trace records, as one part named STEPS."""
        with part(STEPS):
            self.whole_steps(steps)

    def drop_results(self) -> None:
        """Drop the tensors that a step has left, because the profiler warns about frees it never saw allocated."""
        self.images.grad = None


class VariantRun(StepRun):
    """A variant's model, step and batch, all drawn from the same seed.

    Args:
        workload: builds the model and gives the batch its shape.
        engine: the variant's engine, whose torch settings must be applied already.
    """

    def __init__(self, workload: Workload, engine: Engine) -> None:
        torch.manual_seed(0)
        self.workload = workload
        model = engine.place(workload.build(engine.norm))
        model.train()
        torch.manual_seed(0)  # again, so that the batch does not depend on the numbers that building has drawn
        images, labels = torch.randn(workload.shape), torch.randint(workload.classes, workload.shape[:1])
        images = images.to(engine.device, engine.dtype, memory_format=engine.memory_format)
        images.requires_grad_(workload.is_block)
        super().__init__(TrainStep(model, engine, Config().optim), images, labels.to(engine.device))
        self.logits: Tensor | None = None
        # The hook is never removed and never reads what it writes, because compiled code would notice and recompile.
        self.model.register_forward_hook(self._keep_logits)

    def _keep_logits(self, module: nn.Module, inputs: Any, out: Tensor) -> None:
        self.logits = out.detach()

    def drop_results(self) -> None:
        """Drop the tensors that a step has left, the logits too."""
        super().drop_results()
        self.logits = None

    def traced_steps(self, steps: int, part: Part) -> None:
        """Run the steps that a trace records, in parts unless they are captured."""
        if self.graph:
            self.whole_steps(steps)
        else:
            self.steps_in_parts(steps, part)

    def steps_in_parts(self, steps: int, part: Part) -> None:
        """Run steps with forward, backward and optimizer inside `part`."""
        for _ in range(steps):
            self.images.grad = None
            step_in_parts(self.step, self.images, self.labels, part)

    def outcome(self) -> Outcome:
        """Return logits and gradients of one pass, compiled if the engine compiles. The weights stay as they are."""
        for _ in range(32):  # fp16's loss scale starts too large on purpose, and halves until it fits
            self.images.grad = None
            loss, _ = self.step.forward_loss(self.images, self.labels)
            self.step.scaler.scale(loss).backward()
            scale = self.step.scaler.get_scale()
            named = [*self.model.named_parameters(), ("input", self.images)]
            gradients = {n: p.grad.float().cpu() / scale for n, p in named if p.grad is not None}
            self.step.optimizer.zero_grad()
            if self.engine.precision != "fp16" or all(g.isfinite().all() for g in gradients.values()):
                break
            self.step.scaler.update(scale / 2)
        assert self.logits is not None
        return Outcome(self.logits.float().cpu(), gradients)

    def work(self) -> WorkCount:
        """Return FLOPs and bytes of an eager step of the same model."""
        eager = TrainStep(self.model, replace(self.engine, compile=False), Config().optim)
        self.images.grad = None
        count = WorkCount()
        with count:
            step_in_parts(eager, self.images, self.labels, lambda name: nullcontext())
        return count

    @property
    def resident_bytes(self) -> int:
        """Return the bytes in use between steps: weights, running statistics, momentum and the batch."""
        state = [v for s in self.step.optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
        resident = [*self.model.parameters(), *self.model.buffers(), *state, self.images, self.labels]
        return sum(tensor.nbytes for tensor in resident)


def difference(mine: Outcome, reference: Outcome) -> dict[str, float]:
    """Return the largest difference of any logit and any gradient, and the reference's largest values."""
    return {
        "logits": _largest([mine.logits - reference.logits]),
        "logits_reference": _largest([reference.logits]),
        "gradients": _largest([mine.gradients[n] - g for n, g in reference.gradients.items()]),
        "gradients_reference": _largest(list(reference.gradients.values())),
    }


def _largest(tensors: list[Tensor]) -> float:
    """Return the largest absolute value, or nan if any value is nan."""
    return torch.stack([tensor.abs().max() for tensor in tensors]).max().item()


# ------------------------------------------------------------------------------------------- all variants


@dataclass
class Prepared:
    """A variant that is ready to be timed."""

    variant: Variant
    run: VariantRun
    prepare_s: float
    difference: dict[str, float]
    work: WorkCount

    @property
    def engine(self) -> Engine:
        """Return the variant's engine."""
        return self.run.engine


def measure(
    workload: Workload,
    engines: Mapping[Variant, Engine],
    unavailable: dict[str, str],
    *,
    rounds: int,
    steps: int | None,
    folder: Path,
    keep_traces: bool,
    say: Say,
    recorder: Recorder | None = None,
) -> Profile:
    """Prepare all variants, time them interleaved, and trace them one by one.

    Args:
        workload: the network or block that every variant runs.
        engines: the engine of each variant; the first variant is the baseline.
        unavailable: the reason by name for each requested variant that cannot run; variants that fail are added.
        rounds: measured rounds of each variant.
        steps: steps of a round; None for as many as take the baseline REGION_S seconds.
        folder: the folder for traces and memory histories.
        keep_traces: write traces and memory histories to `folder`.
        say: is called with a line for each stage.
        recorder: captures steps of mode graph; None for CUDA graphs.
    """
    device = next(iter(engines.values())).device
    before = hardware.snapshot(device)
    ready = prepare(workload, engines, unavailable, say, recorder)
    baseline = next(iter(ready.values()))
    steps = steps or _steps_of_a_round(baseline, device)
    say(f"{rounds} rounds of {steps} step(s) of each, interleaved, and as many in parts")
    timings, parts = _time(ready, rounds, steps, device)
    matmul_flops = _matmul_flops(ready, device)
    copy_bytes_per_s = hardware.measured_copy(device)
    after = hardware.snapshot(device)

    work = {key: each for prepared in ready.values() for key, each in prepared.work.work.items()}
    results = []
    for name, prepared in ready.items():
        traced = _trace(name, prepared, work, folder if keep_traces else None, say)
        results.append(_result(prepared, timings[name], parts[name], traced))
    return Profile(
        workload=workload,
        engine=baseline.engine,
        rounds=rounds,
        steps=steps,
        traced_steps=TRACED_STEPS,
        results=results,
        unavailable=unavailable,
        copy_bytes_per_s=copy_bytes_per_s,
        matmul_flops=matmul_flops,
        before=before,
        after=after,
    )


def _result(prepared: Prepared, step: Timing, parts: dict[str, Timing], traced: Traced) -> Result:
    """Return the measurements of a variant."""
    return Result(
        variant=prepared.variant,
        prepare_s=prepared.prepare_s,
        step=step,
        parts=parts,
        flops=prepared.work.flops,
        bytes=prepared.work.bytes if prepared.variant.mode == "eager" else None,
        operators=traced.operators,
        launches=traced.launches,
        kernel_s=traced.kernel_s,
        resident_bytes=prepared.run.resident_bytes,
        peak_bytes=traced.peak_bytes,
        difference=prepared.difference,
        files=traced.files,
    )


def prepare(
    workload: Workload,
    engines: Mapping[Variant, Engine],
    unavailable: dict[str, str],
    say: Say,
    recorder: Recorder | None = None,
) -> dict[str, Prepared]:
    """Build and compile all variants. The reason is added to `unavailable` for each variant that fails.

    Raises:
        RunError: if all variants fail.
    """
    raise_recompile_limit(4 * len(engines))
    device = str(next(iter(engines.values())).device)
    engine = resolve_engine(REFERENCE.config(workload.model, device))
    engine.apply_torch_settings()
    reference = VariantRun(workload, engine).outcome()
    ready: dict[str, Prepared] = {}
    for variant, engine in engines.items():
        start = time.perf_counter()
        try:
            engine.apply_torch_settings()
            run = VariantRun(workload, engine)
            with named_kernels(engine):
                outcome = run.outcome()
                run.capture(recorder)
            prepare_s = time.perf_counter() - start
            work = run.work()
        except Exception as error:  # such as the compiler's or exhausted memory; other variants can still be measured
            unavailable[variant.name] = f"failed: {type(error).__name__}: {first_line(error)}"
            continue
        say(f"{variant.name}: ready after {prepare_s:.1f} s")
        ready[variant.name] = Prepared(variant, run, prepare_s, difference(outcome, reference), work)
    if not ready:
        raise RunError("; ".join(f"{name}: {reason}" for name, reason in unavailable.items()))
    return ready


def named_kernels(engine: Engine) -> AbstractContextManager[Any]:
    """Return a context in which inductor compiles its C++ kernels so that a trace shows them."""
    if not engine.compile or engine.device.type != "cpu":
        return nullcontext()
    import torch._inductor.config

    context: AbstractContextManager[Any] = torch._inductor.config.patch({"cpp.enable_kernel_profile": True})
    return context


# ------------------------------------------------------------------------------------------- time


def _steps_of_a_round(baseline: Prepared, device: torch.device) -> int:
    """Return the number of the baseline's steps that take REGION_S seconds, from 1 to MOST_STEPS."""
    baseline.engine.apply_torch_settings()
    warm = interleaved({"step": partial(baseline.run.whole_steps, 1)}, 3, device)["step"]
    return max(1, min(MOST_STEPS, math.ceil(REGION_S / warm.median_s)))


def _time(
    ready: Mapping[str, Prepared], rounds: int, steps: int, device: torch.device
) -> tuple[dict[str, Timing], dict[str, dict[str, Timing]]]:
    """Time whole steps and steps in parts of all variants, interleaved.

    Returns:
        By variant, the rounds of `steps` whole steps; and by variant and part, the single steps.
    """
    watches = {name: Stopwatch(device) for name in ready}
    regions: dict[str, Callable[[], None]] = {}
    engines: dict[str, Engine] = {}
    for name, prepared in ready.items():
        in_parts = f"{name} in parts"
        engines[name] = engines[in_parts] = prepared.engine
        regions[name] = partial(prepared.run.whole_steps, steps)
        if not prepared.run.graph:
            regions[in_parts] = partial(prepared.run.steps_in_parts, steps, watches[name].part)
    timings = interleaved(
        regions, rounds, device, warm_up=WARM_UP, before=lambda region: engines[region].apply_torch_settings()
    )
    parts = {
        name: {part: Timing(seconds[WARM_UP * steps :]) for part, seconds in watch.read().items()}
        for name, watch in watches.items()
    }
    return timings, parts


def _matmul_flops(ready: Mapping[str, Prepared], device: torch.device) -> dict[str, float]:
    """Return the FLOP/s of a matrix product in each precision of the variants."""
    flops: dict[str, float] = {}
    for prepared in ready.values():
        precision = prepared.variant.precision
        if precision not in flops:
            prepared.engine.apply_torch_settings()
            flops[precision] = hardware.measured_matmul(device, precision)
    return flops


# ------------------------------------------------------------------------------------------- trace


@dataclass
class Traced:
    """The fields of a Result that come from a variant's trace."""

    operators: list[Operator]
    launches: float
    kernel_s: float | None
    peak_bytes: int | None
    files: list[str]


def _trace(name: str, prepared: Prepared, work: dict[Key, tuple[int, int]], folder: Path | None, say: Say) -> Traced:
    """Record a trace of the variant and read it.

    Args:
        name: the variant's name.
        prepared: the variant.
        work: FLOPs and bytes of one call of every operator, from WorkCount.
        folder: the folder for the trace and, on a GPU, the memory history; None keeps neither.
        say: is called with a line if the trace has no kernels although the device is a GPU.
    """
    run, device = prepared.run, prepared.engine.device
    prepared.engine.apply_torch_settings()
    with tempfile.TemporaryDirectory() as temporary:
        path = (folder or Path(temporary)) / f"trace-{name}.json.gz"
        record(run, path)
        events = trace.load(path)
    files, peak_bytes = [path.name], trace.peak_bytes(events)
    if run.graph:
        peak_bytes = None  # a graph's memory was reserved at the capture
    elif device.type == "cuda":
        history = f"memory-{name}.pickle"
        peak_bytes = peak_on_gpu(run, folder / history if folder else None)
        files.append(history)
    kernel_s = trace.kernel_seconds(events, TRACED_STEPS)
    if device.type == "cuda" and kernel_s is None:
        say(f"{name}: no operators, because the tracer saw no kernels; detach any other profiler")
        operators = []  # without kernels, the operators' times would be the host's
    else:
        operators = trace.operators(events, work, TRACED_STEPS)
    launches = trace.launches(events, operators, TRACED_STEPS)
    return Traced(operators, launches, kernel_s, peak_bytes, files if folder else [])


def record(run: StepRun, path: Path) -> None:
    """Write a trace of TRACED_STEPS steps in Chrome's format. The same ranges are marked with NVTX for nsys."""
    device = run.engine.device
    cuda = device.type == "cuda"

    @contextmanager
    def named(name: str) -> Iterator[None]:
        with torch.profiler.record_function(name), torch.cuda.nvtx.range(name) if cuda else nullcontext():
            yield

    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
    # acc_events makes no difference in one cycle, but without it torch 2.11 prints a warning.
    profiler = torch.profiler.profile(activities=activities, record_shapes=True, profile_memory=True, acc_events=True)
    with gc_paused():
        # Run a step before the trace, because this starts the tracer, and CUPTI up to 13.1 loses the first kernels of
        # every session of a process but the first (pytorch#192021).
        profiler.prepare_trace()
        run.whole_steps(1)
        wait_for(device)
        run.drop_results()
        profiler.start_trace()
        try:
            run.traced_steps(TRACED_STEPS, named)
            wait_for(device)
        finally:
            profiler.stop_trace()
    profiler.export_chrome_trace(str(path))


def peak_on_gpu(run: VariantRun, history: Path | None) -> int:
    """Return the most bytes that a step allocates beyond those in use before it.

    Args:
        run: the variant.
        history: file for the step's allocations, for pytorch.org/memory_viz; None writes no file.
    """
    device = run.engine.device
    run.images.grad = None
    allocated = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    if history:
        torch.cuda.memory._record_memory_history()
    run.whole_steps(1)
    wait_for(device)
    if history:
        torch.cuda.memory._dump_snapshot(str(history))
        torch.cuda.memory._record_memory_history(enabled=None)
    return torch.cuda.max_memory_allocated(device) - allocated
