"""`python -m fastres.profile`: variants of one block or of a whole network, side by side.

Each variant is the engine's own TrainStep as the engine resolves it here. All run in turns in one process; then each
takes a few steps under torch's profiler. What is measured:

- step: TrainStep.__call__, many in a row. forward, backward, optimizer: the same calls in a region of their own, with
  a mark between them that waits for nothing.
- difference: logits and gradients against eager fp32 NCHW from the same weights and batch, before any update.
- FLOPs and bytes: see fastres/profiling/trace.py. What the device can do is measured in the same run.

profiling/ has what can be compared (variants), what a trace says (trace), and what is left behind (report).

A variant of mode graph is compiled and replayed as a whole, and so it is timed: a replay has no parts.

Not yet run on a GPU: the lines that name CUDA (NVTX ranges, memory history, peak memory, tf32's switches), and graphs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from torch import Tensor, nn

from fastres.config.schema import Config
from fastres.profiling import trace
from fastres.profiling.report import Profile, Result, plot, raw, rows_of, show, write_csv
from fastres.profiling.trace import WorkCount
from fastres.profiling.variants import (
    AXES,
    BLOCKS,
    DEFAULTS,
    REFERENCE,
    Variant,
    Workload,
    block_workload,
    model_workload,
    resolved,
    variants_named,
)
from fastres.training.cuda_graph import CudaRecorder, FixedBatch, GraphedStep
from fastres.training.engine import Engine, resolve_engine
from fastres.training.step import TrainStep, raise_recompile_limit
from fastres.utils import hardware
from fastres.utils.atomic_io import write_text
from fastres.utils.errors import Parser, RunError, UsageError, first_line, run_command
from fastres.utils.timing import Stopwatch, Timing, gc_paused, interleaved, wait_for

LR = 0.0  # the weights stay: every step computes the same numbers, and random labels cannot make it diverge
WARM_UP, TRACED_STEPS = 1, 3
REGION_S = 0.5  # of the baseline, where --steps does not say how many

# ------------------------------------------------------------------------------------------- one variant

Part = Callable[[str], AbstractContextManager[Any]]


def step_in_parts(step: TrainStep, images: Tensor, labels: Tensor, part: Part) -> None:
    """What TrainStep.__call__ does, each part inside of `part`; the last includes what the step keeps count of."""
    with part("forward"):
        loss, correct = step.forward_loss(images, labels)
    with part("backward"):
        step.backward(loss)
    with part("optimizer"):
        step.update()
        step.count(loss.detach(), correct, len(labels))


@dataclass
class Outcome:
    """Of one forward and backward, before any update; on the CPU in fp32."""

    logits: Tensor
    gradients: dict[str, Tensor]


class VariantRun:
    """A variant with its model, its step and its batch, all from the same seed."""

    def __init__(self, subject: Workload, engine: Engine) -> None:
        torch.manual_seed(0)
        self.subject, self.engine = subject, engine
        self.model = engine.place(subject.build(engine.norm))
        self.model.train()
        torch.manual_seed(0)  # again: the same batch, whatever building has drawn
        images, self.labels = torch.randn(subject.shape), torch.randint(subject.classes, subject.shape[:1])
        images = images.to(engine.device, engine.dtype, memory_format=engine.memory_format)
        self.images = images.requires_grad_(subject.is_block)
        self.labels = self.labels.to(engine.device)
        self.step = TrainStep(self.model, engine, Config().optim)
        self.graph: GraphedStep | None = None
        self.logits: Tensor | None = None
        # Never removed, and never reading what it writes: compiled code would notice, and be compiled again.
        self.model.register_forward_hook(self._keep_logits)

    def _keep_logits(self, module: nn.Module, inputs: Any, out: Tensor) -> None:
        self.logits = out.detach()

    def capture(self) -> None:
        """Records the step, where that is the variant. Not yet run on a GPU."""
        if self.engine.cuda_graph:
            batch, recorder = FixedBatch(self.images, self.labels), CudaRecorder(self.engine.device)
            self.graph = GraphedStep(self.step, batch, lambda i: LR, recorder)

    def whole_steps(self, steps: int) -> None:
        if self.graph:
            for i, batch in enumerate(self.graph.train(0, steps)):
                self.graph(*batch, LR, i)
            return
        for i in range(steps):
            self.images.grad = None
            self.step(self.images, self.labels, LR, i)

    def steps_in_parts(self, steps: int, part: Part) -> None:
        for _ in range(steps):
            self.images.grad = None
            step_in_parts(self.step, self.images, self.labels, part)

    def outcome(self) -> Outcome:
        """Compiles what is to be compiled. The weights stay as they are."""
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
        """Of an eager step of the same model."""
        eager = TrainStep(self.model, replace(self.engine, compile=False), Config().optim)
        self.images.grad = None
        with WorkCount() as count:
            step_in_parts(eager, self.images, self.labels, lambda name: nullcontext())
        return count

    @property
    def held_bytes(self) -> int:
        """What is there between steps: weights, statistics, momentum and the batch."""
        state = [v for s in self.step.optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
        held = [*self.model.parameters(), *self.model.buffers(), *state, self.images, self.labels]
        return sum(tensor.nbytes for tensor in held)


def difference(mine: Outcome, reference: Outcome) -> dict[str, float]:
    """The largest of any logit and of any gradient, and the largest values that they differ from."""
    return {
        "logits": _largest([mine.logits - reference.logits]),
        "logits_reference": _largest([reference.logits]),
        "gradients": _largest([mine.gradients[n] - g for n, g in reference.gradients.items()]),
        "gradients_reference": _largest(list(reference.gradients.values())),
    }


def _largest(tensors: list[Tensor]) -> float:
    """nan where there is one."""
    return torch.stack([tensor.abs().max() for tensor in tensors]).max().item()


# ------------------------------------------------------------------------------------------- all variants

Switch = Callable[[], Engine]  # sets torch's switches, which belong to the whole process, to a variant's


@dataclass
class Prepared:
    """A variant that is ready to be timed."""

    variant: Variant
    switch: Switch
    contestant: VariantRun
    prepare_s: float
    difference: dict[str, float]
    work: WorkCount


def prepare(
    subject: Workload,
    switches: Mapping[Variant, Switch],
    absent: dict[str, str],
    device: torch.device,
    say: Callable[[str], None],
) -> dict[str, Prepared]:
    """Builds and compiles all of them; those that fail join the absent."""
    raise_recompile_limit(4 * len(switches))
    reference = VariantRun(subject, resolve_engine(REFERENCE.config(subject.model, str(device)))).outcome()
    ready: dict[str, Prepared] = {}
    for variant, switch in switches.items():
        start = time.perf_counter()
        try:
            contestant = VariantRun(subject, switch())
            with _named_kernels(contestant.engine):
                outcome = contestant.outcome()
                contestant.capture()
            prepare_s = time.perf_counter() - start
            work = contestant.work()
        except Exception as error:  # of the compiler, of the memory: the others still count
            absent[variant.name] = f"failed: {type(error).__name__}: {first_line(error)}"
            continue
        say(f"{variant.name}: ready after {prepare_s:.1f} s")
        ready[variant.name] = Prepared(
            variant, switch, contestant, prepare_s, difference(outcome, reference), work
        )
    if not ready:
        raise RunError("; ".join(f"{name}: {reason}" for name, reason in absent.items()))
    return ready


def measure(
    subject: Workload,
    switches: Mapping[Variant, Switch],
    absent: dict[str, str],
    *,
    rounds: int,
    steps: int | None,
    folder: Path,
    keep_traces: bool,
    say: Callable[[str], None],
) -> Profile:
    """Prepares all variants, times them in turns, and traces them one by one."""
    device = next(iter(switches.values()))().device
    before = hardware.snapshot(device)
    ready = prepare(subject, switches, absent, device, say)

    # ------------------------------------------------------------------------------------- time
    baseline = next(iter(ready.values()))
    baseline.switch()
    warm = interleaved({"step": partial(baseline.contestant.whole_steps, 1)}, 3, device)["step"]
    steps = steps or max(1, min(200, math.ceil(REGION_S / warm.median_s)))
    say(f"{rounds} rounds of {steps} step(s) of each, in turns, and as many in parts")
    watches = {name: Stopwatch(device) for name in ready}
    regions: dict[str, Callable[[], None]] = {}
    by_region: dict[str, Switch] = {}
    for name, prepared in ready.items():
        in_parts = f"{name} in parts"
        regions[name] = partial(prepared.contestant.whole_steps, steps)
        by_region[name] = by_region[in_parts] = prepared.switch
        if not prepared.contestant.graph:
            regions[in_parts] = partial(prepared.contestant.steps_in_parts, steps, watches[name].part)
    timings = interleaved(regions, rounds, device, warm_up=WARM_UP, before=lambda region: by_region[region]())
    matmul_flops: dict[str, float] = {}
    for prepared in ready.values():
        precision = prepared.variant.precision
        if precision not in matmul_flops:
            prepared.switch()
            matmul_flops[precision] = hardware.measured_matmul(device, precision)
    copy_bytes_per_s = hardware.measured_copy(device)
    after = hardware.snapshot(device)

    # ------------------------------------------------------------------------------------- trace
    work = {key: each for prepared in ready.values() for key, each in prepared.work.work.items()}
    results = []
    for name, prepared in ready.items():
        prepared.switch()
        with tempfile.TemporaryDirectory() as elsewhere:
            path = (folder if keep_traces else Path(elsewhere)) / f"trace-{name}.json.gz"
            record(prepared.contestant, path)
            events = trace.load(path)
        files, peak_bytes = [path.name], trace.peak_bytes(events)
        if prepared.contestant.graph:
            peak_bytes = None  # its memory was set aside when it was recorded
        elif device.type == "cuda":
            history = folder / f"memory-{name}.pickle"
            peak_bytes = peak_on_gpu(prepared.contestant, history if keep_traces else None)
            files.append(history.name)
        if device.type == "cuda" and trace.kernel_seconds(events, TRACED_STEPS) is None:
            say(
                f"{name}: the tracer saw no kernels, so there are no operators: is another profiler attached?"
            )
            operators = []  # their times would be the host's
        else:
            operators = trace.operators(events, work, TRACED_STEPS)
        results.append(
            Result(
                variant=prepared.variant,
                prepare_s=prepared.prepare_s,
                step=timings[name],
                parts={
                    part: Timing(seconds[WARM_UP * steps :]) for part, seconds in watches[name].read().items()
                },
                flops=prepared.work.flops,
                bytes=prepared.work.bytes if prepared.variant.mode == "eager" else None,
                operators=operators,
                launches=trace.launches(events, operators, TRACED_STEPS),
                kernel_s=trace.kernel_seconds(events, TRACED_STEPS),
                held_bytes=prepared.contestant.held_bytes,
                peak_bytes=peak_bytes,
                difference=prepared.difference,
                files=files if keep_traces else [],
            )
        )
    return Profile(
        subject=subject,
        engine=baseline.contestant.engine,
        rounds=rounds,
        steps=steps,
        traced_steps=TRACED_STEPS,
        results=results,
        absent=absent,
        copy_bytes_per_s=copy_bytes_per_s,
        matmul_flops=matmul_flops,
        before=before,
        after=after,
    )


def _named_kernels(engine: Engine) -> AbstractContextManager[Any]:
    """Inductor's C++ kernels are in a trace only if they are compiled to be."""
    if not engine.compile or engine.device.type != "cpu":
        return nullcontext()
    import torch._inductor.config

    return torch._inductor.config.patch({"cpp.enable_kernel_profile": True})


def record(contestant: VariantRun, path: Path) -> None:
    """A few steps under torch's profiler, in Chrome's format; for nsys the same ranges as NVTX."""
    cuda = contestant.engine.device.type == "cuda"

    @contextmanager
    def named(name: str) -> Iterator[None]:
        with torch.profiler.record_function(name), torch.cuda.nvtx.range(name) if cuda else nullcontext():
            yield

    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
    profiler = torch.profiler.profile(activities=activities, record_shapes=True, profile_memory=True)
    with gc_paused():
        # A step before the trace: it starts the tracer, and CUPTI up to 13.1 loses the first kernels of every session
        # but a process's first (pytorch#192021).
        profiler.prepare_trace()
        contestant.whole_steps(1)
        wait_for(contestant.engine.device)
        # Of before, as garbage is: the profiler would wonder on stderr at what it has not seen allocated.
        contestant.images.grad = None
        contestant.logits = None
        profiler.start_trace()
        try:
            if contestant.graph:
                contestant.whole_steps(TRACED_STEPS)
            else:
                contestant.steps_in_parts(TRACED_STEPS, named)
            wait_for(contestant.engine.device)
        finally:
            profiler.stop_trace()
    profiler.export_chrome_trace(str(path))


def peak_on_gpu(contestant: VariantRun, history: Path | None) -> int:
    """The most that a step allocates beyond what is held; its allocations to a file for pytorch.org/memory_viz."""
    device = contestant.engine.device
    contestant.images.grad = None
    held = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    if history:
        torch.cuda.memory._record_memory_history()
    contestant.whole_steps(1)
    wait_for(device)
    if history:
        torch.cuda.memory._dump_snapshot(str(history))
        torch.cuda.memory._record_memory_history(enabled=None)
    return torch.cuda.max_memory_allocated(device) - held


# ------------------------------------------------------------------------------------------- command


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE, such as stem=small")
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError:
        raise argparse.ArgumentTypeError(f"{text!r}: the value is not YAML") from None


def parser() -> Parser:
    on_a_gpu = [variant for variant in DEFAULTS["cuda"] if variant not in DEFAULTS["cpu"]]
    made = Parser(
        prog="fastres.profile",
        description="Variants of one block or of a whole network, side by side.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  python -m fastres.profile --model resnet50 --batch-size 256\n"
        "  python -m fastres.profile --block basic --channels 16 --size 32 --batch-size 1024\n"
        "  python -m fastres.profile --variants eager-fp32 'compile-*channels_last-bf16'\n"
        "\nExit status: 0 done, 1 failed, 2 refused input.",
    )
    what = made.add_mutually_exclusive_group()
    what.add_argument("--model", metavar="NAME", help="a network by its name (default: resnet20)")
    what.add_argument(
        "--block", choices=list(BLOCKS), help="one residual block of stride 1, as inside a network"
    )
    made.add_argument("--options", type=option, nargs="+", default=[], metavar="NAME=VALUE",
                      help="of the network, such as stem=small num_classes=100")  # fmt: skip
    made.add_argument(
        "--channels", type=positive, metavar="C", help="of the block's input and output (default: 64)"
    )
    made.add_argument("--size", type=positive, metavar="S",
                      help="height and width (default: of the network's data; of a block 32)")  # fmt: skip
    made.add_argument(
        "--batch-size", type=positive, default=128, metavar="N", help="images (default: %(default)s)"
    )
    made.add_argument(
        "--variants", nargs="+", metavar="VARIANT",
        help="MODE-NORM-LAYOUT-PRECISION of " + " × ".join(f"{{{', '.join(words)}}}" for words in AXES.values())
        + "; words left out are the first; with a * all that match; the first variant is the baseline (default: "
        + ", ".join(DEFAULTS["cpu"]) + "; on a GPU also " + ", ".join(on_a_gpu) + ")",
    )  # fmt: skip
    made.add_argument(
        "--device",
        "--engine.device",
        dest="device",
        default="auto",
        help="auto, cpu, cuda or cuda:N (default: %(default)s)",
    )
    made.add_argument(
        "--rounds", type=positive, default=10, metavar="N", help="turns of each (default: %(default)s)"
    )
    made.add_argument("--steps", type=positive, metavar="N",
                      help=f"steps of a turn (default: as many as take the baseline {REGION_S} s)")  # fmt: skip
    made.add_argument(
        "--out", type=Path, metavar="DIR", help="folder to write (default: profiles/NAME, or NAME-2 ...)"
    )
    made.add_argument("--trace", action=argparse.BooleanOptionalAction, default=True,
                      help="keep the traces, for ui.perfetto.dev (default: --trace)")  # fmt: skip
    return made


def workload_of(arguments: argparse.Namespace) -> Workload:
    if arguments.block is None:
        if arguments.channels is not None:
            raise UsageError("--channels belongs to --block; of a network it is --options in_channels=C")
        name = arguments.model or "resnet20"
        return model_workload(name, dict(arguments.options), arguments.batch_size, arguments.size)
    if arguments.options:
        raise UsageError("--options belongs to --model; a block has --channels and --size")
    return block_workload(
        arguments.block, arguments.channels or 64, arguments.batch_size, arguments.size or 32
    )


def folder_for(out: Path | None, name: str) -> Path:
    """The folder, made. One that holds a profile stays as it is."""
    folder = out or Path("profiles") / name
    count = 1
    while (folder / "profile.json").exists():
        if out is not None:
            raise UsageError(f"--out {out} holds a profile already: choose another or remove it")
        count += 1
        folder = Path("profiles") / f"{name}-{count}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise UsageError(f"--out {folder}: cannot write there ({error.strerror}): choose another") from None


def main(argv: list[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    subject = workload_of(arguments)
    on_gpu = arguments.device.startswith("cuda") or (arguments.device == "auto" and torch.cuda.is_available())
    asked = variants_named(arguments.variants or DEFAULTS["cuda" if on_gpu else "cpu"])
    switches, absent = resolved(subject, asked, arguments.device)
    folder = folder_for(arguments.out, subject.name)

    console = Console(width=None if sys.stdout.isatty() else 140)
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    profile = measure(
        subject,
        switches,
        absent,
        rounds=arguments.rounds,
        steps=arguments.steps,
        folder=folder,
        keep_traces=arguments.trace,
        say=say,
    )
    rows = rows_of(profile)
    write_csv(rows, folder / "profile.csv")
    plot(profile, folder / "profile.png")
    write_text(folder / "profile.json", json.dumps(raw(profile), indent=2) + "\n")
    show(profile, console)
    print(
        f"{folder}: profile.json, profile.csv, profile.png" + (", trace-*.json.gz" if arguments.trace else "")
    )


if __name__ == "__main__":
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its stages are not news
    run_command(main)
