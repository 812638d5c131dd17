"""pytest's configuration for the benchmarks: the results' folder, a record of the machine, the tables at the end."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.lib.tables import Row, tables
from fastres.config.schema import Config
from fastres.runs.environment import environment
from fastres.training.engine import resolve_engine
from fastres.utils.hardware import disturbances, snapshot

BEFORE = pytest.StashKey[dict[str, Any]]()  # the machine's state when the session began
RESULTS = Path(__file__).parent / "results"


def pytest_addoption(parser: pytest.Parser) -> None:
    option = parser.getgroup("fastres").addoption
    option("--full", action="store_true", help="run every network and variant, not only those that take minutes")
    option("--seeds", type=int, default=5, metavar="N", help="seeds of benchmarks that train to the end (default: 5)")
    help_ = "folder of CIFAR-10 for benchmarks that train on it (default: %(default)s)"
    option("--data-root", default="data", metavar="DIR", help=help_)
    help_ = "write the kernels that bench_kernels found faster to kernels/batchnorm/fastest.json"
    option("--write-table", action="store_true", help=help_)
    help_ = "folder of CIFAR-10 as JPEGs, on which benchmarks that train on CIFAR-10 train too"
    option("--jpeg-copy", metavar="DIR", help=help_)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: only with --full")
    # Deterministic runs need this setting, and torch (up to 2.11 at least) reads it once per process, at the first
    # matrix product, which may belong to an earlier run that is not deterministic.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    _keep_freed_memory()
    option = config.option
    if "benchmark_storage" not in option:
        raise pytest.UsageError("the benchmarks need pytest-benchmark; pip install -e '.[bench]'")
    from pytest_benchmark.utils import get_tag

    if (
        option.benchmark_storage == "file://./.benchmarks"
    ):  # unless another storage is given, store every run in RESULTS
        option.benchmark_storage = RESULTS.as_uri()
        option.benchmark_autosave = None if option.benchmark_save else get_tag()
        option.benchmark_save_data = True


def _keep_freed_memory() -> None:
    """Make glibc keep freed memory in the process, and serve every request from it.

    Otherwise it returns large tensors to the system, depending on what the process allocated before. In one process,
    inference of ResNet-20 took 4,600 to 32,000 page faults a batch, and of two equal networks, one was up to 20 %
    faster than the other.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
        libc.mallopt(m_trim_threshold, 2**31 - 1)
        libc.mallopt(m_mmap_max, 0)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.option.full:
        left_out = [item for item in items if item.get_closest_marker("full")]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


@pytest.fixture(autouse=True)
def _leave_nothing() -> Iterator[None]:
    """Free the compiled code and the memory of a benchmark before the next one."""
    yield
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return folders by name: 2,560 photographs of 32 px, 512 of 400 x 300, and the cache of decoded images."""
    from bench.lib.loaders import write_photographs

    return write_photographs(tmp_path_factory.mktemp("photographs"))


@pytest.hookimpl(wrapper=True, tryfirst=True)  # around pytest-benchmark's, which is a wrapper too
def pytest_sessionfinish(session: pytest.Session) -> Generator[None, None, None]:
    """Drop benchmarks interrupted before their first round, because with them pytest-benchmark would store nothing."""
    if (made := getattr(session.config, "_benchmarksession", None)) is not None:
        made.benchmarks[:] = [one for one in made.benchmarks if one.stats.data]
    return (yield)


# ---- the record -------------------------------------------------------------------------------------------------


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Add the environment, which must be equal if two runs are compared."""
    machine_info["fastres"] = environment(resolve_engine(Config()))
    del machine_info["fastres"]["command"]


def pytest_sessionstart(session: pytest.Session) -> None:
    engine = resolve_engine(Config())
    engine.apply_torch_settings()  # for peers that set nothing themselves
    session.config.stash[BEFORE] = snapshot(engine.device)


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    before, after = config.stash[BEFORE], snapshot(resolve_engine(Config()).device)
    output_json["state"] = {
        "command": ["python", *sys.orig_argv[1:]],
        "before": before,
        "after": after,
        "disturbances": disturbances(before, after),
    }


# ---- the tables -------------------------------------------------------------------------------------------------


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    rows = [Row(one.fullname, one.extra_info) for one in session.benchmarks] if session else []
    for title, explanation, lines in tables(rows):
        terminalreporter.section(title)
        for line in (explanation, *lines):
            terminalreporter.write_line(line)
    timed = [row.info for row in rows if row.file == "bench_kernels.py" and row.info]
    if config.option.write_table and timed:
        from bench.bench_kernels import write_table

        terminalreporter.write_line(write_table(timed))
