"""Report the benchmarks' results as bench/RESULTS.md and plots, separately for each device.

    python -m bench.report                  bench/results/ -> bench/RESULTS.md, bench/results/plots/
    python -m bench.report A.json B.json    only these, to the terminal; they must come from one device
    python -m bench.report --targets        the GPU targets next to the measurements, to the terminal

The tables show the newest run of each benchmark. Ratios are listed for all runs, because they show how far one run can
be trusted. Nothing is compared or summed across devices.
"""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from bench.lib import targets
from bench.lib.tables import TABLES, Row, consumer_rate, tables
from fastres.runs.pictures import style
from fastres.utils.atomic_io import parse_json
from fastres.utils.errors import Parser, UsageError, run_command, user_path

HERE = Path(__file__).parent


@dataclass(frozen=True)
class SuiteRun:
    """A run of the suite, or of a part of the suite."""

    path: Path
    content: dict[str, Any]

    @property
    def environment(self) -> dict[str, Any]:
        of: dict[str, Any] = self.content["machine_info"]["fastres"]
        return of

    @property
    def device(self) -> str:
        device: str = self.environment["device"]
        return device

    @property
    def on_gpu(self) -> bool:
        return self.environment["cudnn"] is not None

    @property
    def rows(self) -> list[Row]:
        return [Row(one["fullname"], one["extra_info"]) for one in self.content["benchmarks"] if one["extra_info"]]

    @property
    def disturbances(self) -> list[str]:
        """Return the conditions that may have disturbed the run. Older results call them doubts."""
        state = self.content["state"]
        lines: list[str] = state["doubts"] if "doubts" in state else state["disturbances"]
        return lines

    @property
    def line(self) -> str:
        of = self.environment
        versions = f"torch {of['torch']}, triton {of['triton']}, CUDA {of['cuda']}, Python {of['python']}"
        run = f"{self.content['datetime'][:16]}, commit {of['commit']}, {versions}"
        return "; ".join([run, *self.disturbances])


def read(paths: Sequence[Path]) -> list[SuiteRun]:
    """Return the runs in the order of their times. Raise UsageError if a file is not a result."""
    runs = []
    for path in paths:
        try:
            run = SuiteRun(path, parse_json(path.read_text(encoding="utf-8")))
            if not (run.device and run.line and isinstance(run.rows, list)):
                raise ValueError("an entry is empty")
        except (OSError, ValueError, KeyError, TypeError):
            raise UsageError(f"{path}: is not a result of pytest bench/; remove it from the folder") from None
        runs.append(run)
    return sorted(runs, key=lambda run: run.content["datetime"])


def newest(runs: Sequence[SuiteRun]) -> list[Row]:
    """Return the newest row of each benchmark."""
    return list({row.fullname: row for run in runs for row in run.rows}.values())


def ratios(runs: Sequence[SuiteRun]) -> dict[str, list[float]]:
    """Return each benchmark's ratios in all runs, without those of kernels, which a CPU does not measure."""
    found = defaultdict(list)
    for run in runs:
        for row in run.rows:
            if isinstance(row.info.get("ratio"), float) and row.file != "bench_kernels.py":
                found[row.fullname].append(row.info["ratio"])
    return found


# ---- the text ---------------------------------------------------------------------------------------------------


def section(device: str, runs: Sequence[SuiteRun], plots: Sequence[Path]) -> list[str]:
    """Return one device's part of RESULTS.md, or of the terminal if there are no plots."""
    lines = [f"## {device}", "", *(f"- {run.line}" for run in runs), ""]
    if any(run.on_gpu for run in runs):
        lines += ["### targets", "", "```", *targets.lines(newest(runs)), "```", ""]
    for title, explanation, rows in tables(newest(runs)):
        lines += [f"### {title}", "", explanation, "", "```", *rows, "```", ""]
    several = {name: values for name, values in ratios(runs).items() if len(values) > 1}
    if several:
        lines += ["### ratios in each run", "", "How far one run can be trusted: 1.00 is no change.", "", "```"]
        lines += [
            f"{name.removeprefix('bench/'):<70} {', '.join(f'{value:.2f}' for value in values)}"
            f"  (largest over smallest {max(values) / min(values):.2f})"
            for name, values in several.items()
        ]
        lines += ["```", ""]
    return lines + [f"![{plot.stem}]({plot.relative_to(HERE)})\n" for plot in plots]


# ---- the plots --------------------------------------------------------------------------------------------------


def draw(device: str, rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draw the plots of one device that have data, and return their files."""
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    drawn = []
    for name, plot in PLOTS.items():
        of_file = [row for row in rows if row.file == f"bench_{name}.py"]
        if of_file and (figure := plot(of_file)) is not None:
            title, _, _ = TABLES[f"bench_{name}.py"]
            figure.suptitle(f"{title}, {device}", fontsize=11, color=style.INK)
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{slug}-{name}.png"
            style.save(figure, path)
            drawn.append(path)
    return drawn


def plot_throughput(rows: Sequence[Row]) -> Figure:
    """Plot each ratio to the baseline's images/s, with the spread of the rounds' own ratios."""
    figure = style.new_figure(8, 1.3 + 0.3 * len(rows), layout="constrained")
    axes = figure.subplots()
    kinds = {True: ("training", style.BLUE), False: ("inference", style.ORANGE)}
    for i, row in enumerate(reversed(rows)):
        low, high = statistics.quantiles(row.info["ratios"], n=5)[::3]
        ratio, (kind, color) = row.info["ratio"], kinds[bool(row.info["training"])]
        axes.barh(i, ratio, color=color, height=0.6, label=kind)
        axes.plot([low, high], [i, i], color=style.INK, linewidth=1.2, label="20 to 80 % of the rounds")
        text = f"{ratio:.2f} ×, {row.info['images_per_s']:,.0f} images/s"
        axes.text(max(high, ratio) + 0.03, i, text, va="center", fontsize=8, color=style.INK)
    axes.axvline(1, color=style.INK, linestyle=":", linewidth=1.2, label="baseline")
    axes.set_yticks(range(len(rows)), [row.case for row in reversed(rows)])
    axes.set_xlim(0, 1.45 * max(row.info["ratio"] for row in rows))
    axes.set_xlabel("ratio to the baseline; more is better")
    style.tidy(axes, grid="x")
    handles, labels = axes.get_legend_handles_labels()
    first = dict(zip(reversed(labels), reversed(handles), strict=True))  # one entry of each label
    names = [*(kind for kind, _ in kinds.values() if kind in first), "20 to 80 % of the rounds", "baseline"]
    figure.legend([first[name] for name in names], names, loc="outside lower center", ncols=len(names), frameon=False,
                  fontsize=9)  # fmt: skip
    return figure


def plot_time_to_90(rows: Sequence[Row]) -> Figure:
    """Plot every seed's time and accuracy."""
    figure = style.new_figure(7, 4.2, layout="constrained")
    axes = figure.subplots()
    for i, row in enumerate(rows):
        means = f"{row.info['mean_s']:.1f} s, {row.info['mean_accuracy']:.2%}"
        label = f"{row.info['contest']}, {row.info['kind']}, mean of {len(row.info['times_s'])} seeds: {means}"
        how = style.line_style(i) | {"linestyle": "none"}
        axes.plot(row.info["times_s"], row.info["accuracies"], label=label, alpha=0.8, **how)
    axes.axhline(0.9, color=style.INK, linestyle=":", linewidth=1.2, label="90 %")
    axes.set(xlabel="seconds", ylabel="test accuracy at the last step")
    axes.set_xlim(left=0)
    style.tidy(axes)
    figure.legend(loc="outside lower center", frameon=False, fontsize=9)
    return figure


def plot_scaling(rows: Sequence[Row]) -> Figure | None:
    """Plot a panel for each sweep: the cost of a step, and images/s by processes. Return None without a sweep."""
    rows = [row for row in rows if "sizes" in row.info]
    if not rows:
        return None
    figure = style.new_figure(4 * len(rows), 3.6, layout="constrained")
    panels = figure.subplots(1, len(rows), squeeze=False)
    for row, axes in zip(rows, panels[0], strict=True):
        info = row.info
        if info["sweep"] == "processes":
            axes.bar([str(size) for size in info["sizes"]], info["images_per_s"], width=0.5, color=style.BLUE)
            axes.set(xlabel="processes", ylabel="images/s")
            axes.yaxis.set_major_formatter("{x:,.0f}")
            style.tidy(axes, grid="y")
            continue
        ms = [1e3 * s for s in info["step_s"]]
        axes.plot(info["sizes"], ms, "o", color=style.BLUE, label="measured")
        ends = [0, max(info["sizes"])]
        fit = [1e3 * (info["fixed_s"] + info["slope_s"] * x) for x in ends]
        axes.plot(ends, fit, ":", color=style.INK, linewidth=1.2, label=f"line through {fit[0]:.1f} ms at 0")
        axes.set(
            xlabel={"batch": "images of a batch, ResNet-20", "depth": "depth, batch 128"}[info["sweep"]],
            ylabel="ms a step",
        )
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=9, loc="upper left")
        style.tidy(axes)
    return figure


def plot_loaders(rows: Sequence[Row]) -> Figure:
    """Plot images/s of the loaders by case, and the network's rate."""
    cases: dict[str, list[tuple[str, dict[str, Any]]]] = defaultdict(list)
    for row in rows:
        case, _, loader = row.case.rpartition("-")
        cases[case].append((loader, row.info))
    figure = style.new_figure(3.4 * len(cases), 3.6, layout="constrained")
    panels = figure.subplots(1, len(cases), squeeze=False)
    for (case, of_case), axes in zip(cases.items(), panels[0], strict=True):
        model, (takes, _) = of_case[0][1]["model"], consumer_rate(of_case[0][1])
        for i, (_, info) in enumerate(of_case):
            axes.plot(i, info["images_per_s"], "o", color=style.BLUE)
            text = f"{info['images_per_s']:,.0f}"
            axes.annotate(text, (i, info["images_per_s"]), (0, 6), textcoords="offset points", ha="center", fontsize=9)
        axes.axhline(takes, color=style.VERMILION, linestyle=":", linewidth=1.2)
        axes.annotate(f"{model} takes {takes:,.0f}", (0.02, takes), (0, 3), ("axes fraction", "data"), "offset points",
                      fontsize=9, color=style.VERMILION)  # fmt: skip
        axes.set_xticks(range(len(of_case)), [loader for loader, _ in of_case])
        axes.set_xlim(-0.5, len(of_case) - 0.5)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.set_ylim(takes / 2, 3 * max(info["images_per_s"] for _, info in of_case))
        axes.set_title(case.replace("_", ", ").replace("px", " px"), fontsize=10)
        axes.set_ylabel("images/s")
        style.tidy(axes, grid="y")
    return figure


# The plots by the NAME of their benchmarks' file, bench_NAME.py.
PLOTS = {"throughput": plot_throughput, "time_to_90": plot_time_to_90, "scaling": plot_scaling, "loaders": plot_loaders}


# ---- the command ------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m bench.report",
        description="Show results as text and plots.",
        renamed={"--claims": "--targets"},
    )
    parser.add_argument("files", nargs="*", type=user_path, metavar="FILE",
                        help="Results to show. (default: all, into bench/RESULTS.md)")  # fmt: skip
    parser.add_argument("--targets", action="store_true", help="Show the GPU targets next to the measurements.")
    args = parser.parse_args(argv)
    files = args.files
    runs = read(files or sorted((HERE / "results").rglob("*.json")))
    if not runs:
        raise UsageError(f"no results in {HERE / 'results'}; run pytest bench/ --benchmark-only")
    if args.targets:
        print_targets(runs)
        return 0
    devices = list(dict.fromkeys(run.device for run in runs))
    if files:
        for other in runs[1:]:
            if other.device != runs[0].device:
                raise UsageError(
                    f"{runs[0].path} is of {runs[0].device} and {other.path} of {other.device}, and figures of "
                    "different devices do not compare; name files of one device"
                )
        print("\n".join(section(devices[0], runs, [])))
        return 0
    made_by = (
        "Made by `python -m bench.report` from [results](results). No device is compared with another. Values are "
        "medians, with the 20 and 80 % quantiles in brackets; n is the number of rounds or runs. The tables show the "
        "newest run of each benchmark."
    )
    lines = ["# Results", "", made_by, ""]
    for device in devices:
        of_device = [run for run in runs if run.device == device]
        lines += section(device, of_device, draw(device, newest(of_device), HERE / "results" / "plots"))
    (HERE / "RESULTS.md").write_text("\n".join(lines), encoding="utf-8")
    print(f"{HERE / 'RESULTS.md'}: {len(runs)} runs of {len(devices)} device(s)")
    return 0


def print_targets(runs: Sequence[SuiteRun]) -> None:
    """Print the targets next to the measurements of each GPU."""
    by_gpu: dict[str, list[SuiteRun]] = defaultdict(list)
    for run in runs:
        if run.on_gpu:
            by_gpu[run.device].append(run)
    for device, of_device in by_gpu.items() or [("no GPU yet", [])]:
        print("\n".join([device, *targets.lines(newest(of_device))]))


if __name__ == "__main__":
    run_command(main)
