"""What every benchmark shares: where results are kept, a record of the machine, and our own tables at the end."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.tables import Row, tables
from fastres.config import Config
from fastres.engine import resolve
from fastres.hardware import doubts, snapshot
from fastres.log import environment

RESULTS = Path(__file__).parent / "results"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastres")
    group.addoption(
        "--full", action="store_true", help="every net and variant, not what the machine has time for"
    )
    group.addoption("--seeds", type=int, default=5, metavar="N", help="runs of bench_time_to_90 (default 5)")
    group.addoption(
        "--data-root",
        default="data",
        metavar="DIR",
        help="where bench_time_to_90 and bench_peers look for CIFAR-10",
    )
    group.addoption(
        "--jpeg-copy", metavar="DIR", help="folder of CIFAR-10 as JPEGs: bench_time_to_90 runs on it too"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: only with --full")
    option = config.option
    if "benchmark_storage" not in option:
        raise pytest.UsageError("the benchmarks need pytest-benchmark: pip install -e '.[bench]'")
    if option.benchmark_storage == "file://./.benchmarks":  # its default: every run is kept with the others'
        option.benchmark_storage = RESULTS.as_uri()
        option.benchmark_autosave = not option.benchmark_save


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.option.full:
        left_out = [item for item in items if item.get_closest_marker("full")]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


@pytest.fixture(autouse=True)
def _leave_nothing() -> Iterator[None]:
    """What a benchmark compiled and allocated is gone before the next."""
    yield
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()


# ---- the record -------------------------------------------------------------------------------------------------


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    engine = resolve(Config())
    machine_info["fastres"] = environment(engine)
    machine_info["before"] = snapshot(engine.device)


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]
) -> None:
    machine = output_json["machine_info"]
    machine["after"] = snapshot(resolve(Config()).device)
    machine["doubts"] = doubts(machine["before"], machine["after"])


# ---- the tables -------------------------------------------------------------------------------------------------


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    rows = [Row(one.fullname, one.extra_info) for one in session.benchmarks] if session else []
    for title, lines in tables(rows):
        terminalreporter.section(title)
        for line in lines:
            terminalreporter.write_line(line)
