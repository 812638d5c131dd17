"""Benchmarks as lines of text: what the terminal shows after a run, and what RESULTS.md keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import (
    bench_accuracy,
    bench_compile,
    bench_kernel_times,
    bench_kernels,
    bench_peers,
    bench_scaling,
    bench_schedule,
    bench_time_to_90,
)


@dataclass(frozen=True)
class Row:
    """A benchmark that has run."""

    fullname: str  # bench/FILE::FUNCTION[CASE]
    info: dict[str, Any]  # its extra_info; empty where it failed

    @property
    def file(self) -> str:
        return Path(self.fullname.partition("::")[0]).name

    @property
    def case(self) -> str:
        return self.fullname.partition("[")[2].rstrip("]")


def throughput_lines(rows: Sequence[Row]) -> list[str]:
    """Images per second of each variant, the ratio to the baseline that ran in turns with it, and what it cost."""
    return [f"{_ratio_line(row)}{_cost(row.info)}" for row in rows]


def loader_lines(rows: Sequence[Row]) -> list[str]:
    """The same, and how often over the loader feeds the network that would take its images."""
    return [
        f"{_ratio_line(row)}; {row.info['times_appetite']:.1f} x what {row.info['model']} takes "
        f"({row.info['appetite_images_per_s']:,.0f})"
        for row in rows
    ]


def _ratio_line(row: Row) -> str:
    quantiles = "{:,.0f} to {:,.0f}".format(*row.info["images_per_s_20_80"])
    return (
        f"{row.case:<34} {row.info['images_per_s']:>9,.0f} images/s ({quantiles})  "
        f"{row.info['ratio']:.2f} x the baseline's {row.info['baseline_images_per_s']:,.0f}, n={row.info['n']}"
    )


def _cost(info: dict[str, Any]) -> str:
    share = "N/A" if info["share_of_peak"] is None else f"{info['share_of_peak']:.0%}"
    memory = "N/A" if info["peak_memory_bytes"] is None else f"{info['peak_memory_bytes'] / 1e9:.2f} GB"
    return f"; {info['gflop_per_s']:,.0f} GFLOP/s, {share} of the peak, memory {memory}"


def _of_infos(lines: Callable[[list[dict[str, Any]]], list[str]]) -> Callable[[Sequence[Row]], list[str]]:
    return lambda rows: lines([row.info for row in rows])


# By file: the title of its table, and its benchmarks as lines.
TABLES: dict[str, tuple[str, Callable[[Sequence[Row]], list[str]]]] = {
    "bench_throughput.py": ("images/s, interleaved with the plain loop", throughput_lines),
    "bench_schedule.py": (
        "images/s of the schedule, data included, interleaved",
        _of_infos(bench_schedule.summary),
    ),
    "bench_accuracy.py": ("accuracy at the last step", _of_infos(bench_accuracy.summary)),
    "bench_time_to_90.py": ("time to 90 %", _of_infos(bench_time_to_90.summary)),
    "bench_peers.py": ("images/s against peers, interleaved", _of_infos(bench_peers.summary)),
    "bench_scaling.py": ("cost of a step", _of_infos(bench_scaling.summary)),
    "bench_loaders.py": ("images/s of the loaders, interleaved with the DataLoader", loader_lines),
    "bench_kernel_times.py": ("a step's kernels and gaps", _of_infos(bench_kernel_times.summary)),
    "bench_compile.py": (
        "images/s under inductor's settings, interleaved with the default",
        _of_infos(bench_compile.summary),
    ),
    "bench_kernels.py": (
        "us per call (20 to 80 %), interleaved with the baseline",
        _of_infos(bench_kernels.summary),
    ),
}


def tables(rows: Sequence[Row]) -> Iterator[tuple[str, list[str]]]:
    """The title and the lines of each table that has any."""
    for file, (title, lines) in TABLES.items():
        if of_file := [row for row in rows if row.file == file and row.info]:
            yield title, lines(of_file)
