"""What every benchmark shares: quiet defaults, a record of the machine, and our own table at the end."""

from __future__ import annotations

from typing import Any

import pytest

from fastres.config import Config
from fastres.engine import resolve
from fastres.log import environment


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info["fastres"] = environment(resolve(Config()))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Images per second of each variant and the ratio to the baseline that ran in turns with it."""
    session = getattr(config, "_benchmarksession", None)
    rows = [b for b in session.benchmarks if "images_per_s" in b.extra_info] if session else []
    if not rows:
        return
    terminalreporter.section("images/s, interleaved with the baseline")
    for row in rows:
        info = row.extra_info
        quantiles = "{:,.0f} to {:,.0f}".format(*info["images_per_s_20_80"])
        terminalreporter.write_line(
            f"{row.name:<42} {info['images_per_s']:>9,.0f} images/s ({quantiles})  "
            f"{info['ratio']:.2f} x the baseline's {info['baseline_images_per_s']:,.0f}, n={info['n']}"
        )
