"""What every benchmark shares: quiet defaults, a record of the machine, and our own tables at the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_kernels
import pytest

from fastres.config import Config
from fastres.engine import resolve
from fastres.log import environment


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info["fastres"] = environment(resolve(Config()))


def throughput_lines(rows: list[Any]) -> list[str]:
    """Images per second of each variant and the ratio to the baseline that ran in turns with it."""
    lines = []
    for row in rows:
        info = row.extra_info
        quantiles = "{:,.0f} to {:,.0f}".format(*info["images_per_s_20_80"])
        lines.append(
            f"{row.name:<42} {info['images_per_s']:>9,.0f} images/s ({quantiles})  "
            f"{info['ratio']:.2f} x the baseline's {info['baseline_images_per_s']:,.0f}, n={info['n']}"
        )
    return lines


def loader_lines(rows: list[Any]) -> list[str]:
    """The same, and how often over the loader feeds the network that would take its images."""
    return [
        f"{line}; {row.extra_info['times_appetite']:.1f} x what {row.extra_info['model']} takes "
        f"({row.extra_info['appetite_images_per_s']:,.0f})"
        for line, row in zip(throughput_lines(rows), rows, strict=True)
    ]


def kernel_lines(rows: list[Any]) -> list[str]:
    return bench_kernels.summary([row.extra_info for row in rows])


# By file: the title of its table, and its benchmarks as lines.
TABLES: dict[str, tuple[str, Callable[[list[Any]], list[str]]]] = {
    "bench_throughput.py": ("images/s, interleaved with the baseline", throughput_lines),
    "bench_loaders.py": ("images/s of the loaders, interleaved with the DataLoader", loader_lines),
    "bench_kernels.py": ("us per call (20 to 80 %), interleaved with the baseline", kernel_lines),
}


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    # A benchmark that failed has no extra_info.
    done = [benchmark for benchmark in session.benchmarks if benchmark.extra_info] if session else []
    for file, (title, lines) in TABLES.items():
        rows = [benchmark for benchmark in done if Path(benchmark.fullname.split("::")[0]).name == file]
        if rows:
            terminalreporter.section(title)
            for line in lines(rows):
                terminalreporter.write_line(line)
