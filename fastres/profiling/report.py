"""Write and print a profile: raw numbers, a row for each variant, a picture, and the tables in the terminal."""

from __future__ import annotations

import csv
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

from fastres.profiling import trace
from fastres.profiling.trace import PARTS, Operator
from fastres.profiling.variants import Variant
from fastres.profiling.workloads import Workload
from fastres.runs.environment import device_name, environment
from fastres.runs.pictures import style
from fastres.training.engine import Engine
from fastres.utils import hardware
from fastres.utils.timing import Timing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]

MOST_EXPENSIVE = 3  # operators in the terminal; profile.json has all
MEMORY = {  # by device: the source of the peak, and the file with the memory's course over time
    "cpu": "peak: bytes in use, and allocations seen by torch's profiler on the CPU; the traces show them as [memory]",
    "cuda": "peak: bytes in use, and torch.cuda.max_memory_allocated; open memory-*.pickle at pytorch.org/memory_viz",
}
COLORS = {"forward": style.BLUE, "backward": style.ORANGE, "optimizer": style.GREEN, "replay": style.PURPLE}


@dataclass(frozen=True, kw_only=True)
class Result:
    """The measurements of one variant."""

    variant: Variant
    prepare_s: float  # to build, to compile, and for the first forward and backward
    step: Timing  # rounds of Profile.steps steps
    parts: dict[str, Timing]  # single steps, by the names in PARTS; empty for a replayed graph
    flops: int  # of a step
    bytes: int | None  # of a step, each operator's inputs and outputs once; None if operators are generated
    operators: list[Operator]  # of a step, the most expensive first
    launches: float  # kernels of a step on a GPU, operators on a CPU
    kernel_s: float | None  # of a step, on a GPU
    resident_bytes: int  # in use between steps
    peak_bytes: int | None  # the most that a step allocates beyond resident_bytes; None if not known
    difference: dict[str, float]
    files: list[str]


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One run of the command; the first result is the baseline."""

    workload: Workload
    engine: Engine  # of the baseline
    rounds: int
    steps: int  # of a round
    traced_steps: int
    results: list[Result]
    unavailable: dict[str, str]  # the reason by name for each requested variant that was not measured
    copy_bytes_per_s: float
    matmul_flops: dict[str, float]  # per second, by precision
    before: dict[str, Any]
    after: dict[str, Any]


# ------------------------------------------------------------------------------------------- figures


def rows_of(profile: Profile) -> list[Row]:
    """Return a flat row for each variant, the columns of profile.csv."""
    images = profile.steps * profile.workload.shape[0]
    peaks = hardware.peaks_of(profile.engine.device)
    baseline = profile.results[0].step
    rows = []
    for result in profile.results:
        step_s = result.step.median_s / profile.steps
        images_per_s, low, high = result.step.rates(images)
        row: Row = {
            "variant": result.variant.name,
            **asdict(result.variant),
            "images_per_s": images_per_s,
            "images_per_s_20": low,
            "images_per_s_80": high,
            "rounds": result.step.n,
            "ratio": result.step.ratio_to(baseline).of_medians,
            "step_ms": 1e3 * step_s,
        }
        for part in PARTS:
            timing = result.parts.get(part)
            row[f"{part}_ms"] = timing and 1e3 * timing.median_s
            low_ms, high_ms = (1e3 * s for s in timing.quantiles_s) if timing else (None, None)
            row[f"{part}_ms_20"], row[f"{part}_ms_80"] = low_ms, high_ms
        peak = peaks.flops.get(result.variant.precision) if peaks else None
        flops_per_s = result.flops / step_s
        bytes_per_s = None if result.bytes is None else result.bytes / step_s
        row |= {
            "steps_in_parts": result.parts["forward"].n if result.parts else 0,
            "launches": result.launches,
            "kernels_busy": None if result.kernel_s is None else result.kernel_s / step_s,
            "peak_mb": None if result.peak_bytes is None else (result.resident_bytes + result.peak_bytes) / 1e6,
            "held_mb": result.resident_bytes / 1e6,
            "difference_logits": result.difference["logits"],
            "difference_gradients": result.difference["gradients"],
            "gflop_per_s": flops_per_s / 1e9,
            "share_of_matmul": flops_per_s / profile.matmul_flops[result.variant.precision],
            "share_of_peak": None if peak is None else flops_per_s / peak,
            "gb_per_s": None if bytes_per_s is None else bytes_per_s / 1e9,
            "share_of_copy": None if bytes_per_s is None else bytes_per_s / profile.copy_bytes_per_s,
            "prepare_s": result.prepare_s,
        }
        rows.append(row)
    return rows


def raw(profile: Profile) -> dict[str, Any]:
    """Return the content of profile.json."""
    device = profile.engine.device
    peaks = hardware.peaks_of(device)
    variants = []
    for row, result in zip(rows_of(profile), profile.results, strict=True):
        ratio = result.step.ratio_to(profile.results[0].step)
        operators = [
            {**operator.to_dict(), "bound": side, "share_of_roof": share}
            for operator, (side, share) in zip(result.operators, bounds_of(profile, result), strict=True)
        ]
        variants.append(
            row
            | {
                "step": result.step.to_dict(),
                "parts": {part: timing.to_dict() for part, timing in result.parts.items()},
                "ratios": list(ratio.of_pairs),
                "flops_per_step": result.flops,
                "bytes_per_step": result.bytes,
                "step_peak_bytes": result.peak_bytes,
                "held_bytes": result.resident_bytes,
                "kernel_s_per_step": result.kernel_s,
                "difference": result.difference,
                "operators": operators,
                "files": result.files,
            }
        )
    return {
        "what": profile.workload.name,
        "options": profile.workload.model.options,
        "batch": list(profile.workload.shape),
        "rounds": profile.rounds,
        "steps_per_round": profile.steps,
        "traced_steps": profile.traced_steps,
        "baseline": profile.results[0].variant.name,
        "variants": variants,
        "absent": profile.unavailable,
        "environment": environment(profile.engine),
        "hardware": {
            "before": profile.before,
            "after": profile.after,
            "doubts": hardware.disturbances(profile.before, profile.after),
            "data_sheet": None if peaks is None else asdict(peaks),
            "measured": {"copy_bytes_per_s": profile.copy_bytes_per_s, "matmul_flops": profile.matmul_flops},
        },
        "memory": MEMORY[device.type],
    }


def bounds_of(profile: Profile, result: Result) -> list[tuple[str, float | None]]:
    """Return trace.bound() of each operator, compared with the rates measured in this run."""
    flops_per_s = profile.matmul_flops[result.variant.precision]
    return [trace.bound(operator, flops_per_s, profile.copy_bytes_per_s) for operator in result.operators]


# ------------------------------------------------------------------------------------------- output


def write_csv(rows: list[Row], path: Path) -> None:
    """Write the rows under a header."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def title_of(profile: Profile) -> str:
    """Return the workload, batch, device and version of torch in one line."""
    n, channels, side, _ = profile.workload.shape
    return (
        f"{profile.workload.name}, batch {n} of {channels} × {side} × {side}, {device_name(profile.engine.device)}, "
        f"torch {torch.__version__}"
    )


def plot(profile: Profile, path: Path) -> None:
    """Write the picture of the profile."""
    style.save(figure_of(profile), path)


def figure_of(profile: Profile) -> Figure:
    """Draw a bar for each variant, as long as its step, with images/s beside it, and mark a doubtful measurement.

    Bars and labels are medians of the same rounds. Forward, backward and optimizer are measured in other, single steps,
    so their medians only divide the bar: placed end to end, they could make the bar of a faster variant longer.
    """
    rows = rows_of(profile)
    doubts = [line for reason in hardware.disturbances(profile.before, profile.after)
              for line in textwrap.wrap(f"doubtful: {reason}", 110)]  # fmt: skip
    figure = style.new_figure(11, 1.75 + 0.2 * len(doubts) + 0.55 * len(rows), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(rows)
    for part, widths in bars_of(rows).items():
        axes.barh(range(len(rows)), widths, 0.62, left=left, label=part, color=COLORS[part])
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for i, (row, result) in enumerate(zip(rows, profile.results, strict=True)):
        low_ms, high_ms = (1e3 * s / profile.steps for s in result.step.quantiles_s)
        axes.plot([low_ms, high_ms], [i, i], color=style.INK, linewidth=1.2)
        text = f"{row['images_per_s']:,.0f} images/s, {row['ratio']:.2f} ×"
        axes.annotate(text, (max(row["step_ms"], high_ms), i), xytext=(6, 0), textcoords="offset points", va="center",
                      fontsize=9, color=style.INK)  # fmt: skip
        left[i] = max(left[i], high_ms)
    axes.set_yticks(range(len(rows)), [row["variant"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.28 * max(left))
    axes.set_xlabel(
        f"ms per step, median of {profile.rounds} rounds (line: 20 to 80 %); parts in the proportions of single steps"
    )
    axes.xaxis.set_major_formatter("{x:,g}")
    style.tidy(axes, grid="x")
    figure.suptitle(title_of(profile), fontsize=10, color=style.INK)
    if doubts:
        axes.set_title("\n".join(doubts), fontsize=10, fontweight="bold", color=style.VERMILION)
    figure.legend(loc="outside lower center", ncols=len(COLORS), frameon=False, labelcolor=style.INK)
    return figure


def bars_of(rows: list[Row]) -> dict[str, list[float]]:
    """Return the ms of each part for each variant, which add up to the step; a replayed step is one part."""
    bars: dict[str, list[float]] = {part: [] for part in (*PARTS, "replay")}
    for row in rows:
        of_parts = [row[f"{part}_ms"] or 0.0 for part in PARTS] if row["steps_in_parts"] else [0.0] * len(PARTS)
        whole = sum(of_parts)
        for part, ms in zip(PARTS, of_parts, strict=True):
            bars[part].append(row["step_ms"] * ms / whole if whole else 0.0)
        bars["replay"].append(0.0 if whole else row["step_ms"])
    return {part: widths for part, widths in bars.items() if any(widths)}


def show(profile: Profile, console: Console) -> None:
    """Print the tables, each with a line on how to read it, then the unavailable variants and the disturbances."""

    def say(text: str, style: str | None = None) -> None:
        console.print(text, style=style, markup=False, highlight=False)

    rows = rows_of(profile)
    say(f"\n{title_of(profile)}")
    say(f"median (20 to 80 %) of {profile.rounds} interleaved rounds of {profile.steps} step(s), or of single parts")
    console.print(_times_table(rows))

    reached = ", ".join(f"{flops / 1e9:,.0f} in {p}" for p, flops in profile.matmul_flops.items())
    say(
        f"measured in this run: a copy moves {profile.copy_bytes_per_s / 1e9:,.1f} GB/s, a matrix product computes "
        f"{reached} GFLOP/s"
    )
    console.print(_work_table(rows, on_gpu=profile.engine.device.type == "cuda"))
    largest = profile.results[0].difference
    say(
        "Δ: largest difference to eager fp32 NCHW with the same weights and batch, whose logits reach "
        f"{largest['logits_reference']:.2g} and gradients {largest['gradients_reference']:.2g}"
    )

    console.print(_operators_table(profile))
    say(
        "FLOPs are those of convolutions and matrix products; bytes count each input and output once, which is the "
        'least that moves; "unknown" means that the trace does not tell. "Bound by" compares an operator\'s FLOP/byte '
        "with the limits measured in this run. An operator far below its bound is limited by something else, such as "
        "launch latency."
    )
    for name, reason in profile.unavailable.items():
        say(f"unavailable: {name}: {reason}")
    for line in hardware.disturbances(profile.before, profile.after):
        say(f"doubtful: {line}", style="yellow")


def _times_table(rows: list[Row]) -> Table:
    """Return a table of images/s and the time of each part, by variant."""
    table = _table("images/s", "× first", *(f"{part} ms" for part in PARTS))
    for row in rows:
        table.add_row(
            row["variant"],
            _spread(row["images_per_s"], row["images_per_s_20"], row["images_per_s_80"]),
            f"{row['ratio']:.2f}",
            *(_spread(row[f"{p}_ms"], row[f"{p}_ms_20"], row[f"{p}_ms_80"]) for p in PARTS),
        )
    return table


def _work_table(rows: list[Row], *, on_gpu: bool) -> Table:
    """Return a table of launches, memory, FLOP/s, bytes/s, and differences to the reference, by variant."""
    table = _table(*(("kernels", "GPU busy") if on_gpu else ("operators",)), "peak MB", "GFLOP/s", "of matmul",
                   "of data sheet", "GB/s", "of copy", "Δ logits", "Δ gradients")  # fmt: skip
    for row in rows:
        table.add_row(
            row["variant"],
            f"{row['launches']:,.0f}",
            *((_share(row["kernels_busy"]),) if on_gpu else ()),
            _three_digits(row["peak_mb"]),
            _three_digits(row["gflop_per_s"]),
            _share(row["share_of_matmul"]),
            _share(row["share_of_peak"]),
            _three_digits(row["gb_per_s"]),
            _share(row["share_of_copy"]),
            f"{row['difference_logits']:.2g}",
            f"{row['difference_gradients']:.2g}",
        )
    return table


def _operators_table(profile: Profile) -> Table:
    """Return a table of the most expensive operators of each variant."""
    table = _table("calls", "share", "FLOP/byte", "bound by", "reaches", second="most expensive")
    for result in profile.results:
        most = list(zip(result.operators, bounds_of(profile, result), strict=True))[:MOST_EXPENSIVE]
        for i, (operator, (side, share)) in enumerate(most):
            table.add_row(
                "" if i else result.variant.name,
                " ← ".join(map(_short, filter(None, (operator.kernel, operator.name)))),
                f"{operator.calls:,.0f}",
                f"{operator.share:.0%}",
                _three_digits(operator.intensity),
                side,
                "N/A" if share is None else f"{share:.0%} of {'matmul' if side == 'compute' else 'copy'}",
                end_section=i + 1 == len(most),
            )
    return table


def _table(*columns: str, second: str | None = None) -> Table:
    """Return an empty table of variants; the column `second` is text, the others are numbers."""
    table = Table()
    table.add_column("variant", no_wrap=True)
    if second:
        table.add_column(second, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _short(name: str, most: int = 44) -> str:
    """Return both ends of a long name, because inductor's names begin alike and differ in a number at the end."""
    return name if len(name) <= most else f"{name[: most - 13]}…{name[-12:]}"


def _spread(median: float | None, low: float | None, high: float | None) -> str:
    """Return the median with its spread, or "in one replay" without a median."""
    if median is None:
        return "in one replay"
    return f"{_three_digits(median)} ({_three_digits(low)} to {_three_digits(high)})"


def _number(value: float | None, form: str) -> str:
    """Return the value in the format, or N/A."""
    return "N/A" if value is None else f"{value:{form}}"


def _three_digits(value: float | None) -> str:
    return _number(value, ",.0f" if value and value >= 100 else ".1f" if value and value >= 10 else ".2f")


def _share(value: float | None) -> str:
    return _number(value, ".0%")
