"""Set up every test: one thread, no GPU, Triton's interpreter, one seed, a separate cache.

Processes that a test starts inherit the thread count, the hidden GPU and the cache, but not the interpreter.
"""

import os
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported. Bitwise equal sums need an equal number of threads, and nets as small as these gain nothing
# from more of them.
os.environ["OMP_NUM_THREADS"] = "1"
# Expected values are a CPU's, also on a machine with a GPU. test_kernels_gpu.py restores the GPU, also under xdist.
os.environ.setdefault("FASTRES_TESTS_GPUS", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Set before Triton is imported, so that kernels run without a GPU. Commands that tests start unset it.
os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch

from tests.commands import forked_cpu_s

BEGAN = pytest.StashKey[float]()
MOST_CPU_S = 5.0  # of a test that is not marked `slow`


# ---- CPU time of the tests -----------------------------------------------------------------------------------


def cpu_s() -> float:
    """Return the CPU seconds of this process, of its processes that have ended, and of forked commands."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system + forked_cpu_s()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Store the CPU seconds of a test, its fixtures included, in its last report, which comes from any worker."""
    report = yield
    if call.when == "teardown":
        report.user_properties.append(("cpu_s", cpu_s() - item.stash[BEGAN]))
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    item.stash[BEGAN] = cpu_s()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the CPU time, and the unmarked tests that took more than MOST_CPU_S of it."""
    all_reports = [report for reports in terminalreporter.stats.values() for report in reports]
    reports = [report for report in all_reports if isinstance(report, pytest.TestReport) and report.when == "teardown"]
    times = sorted(((dict(report.user_properties)["cpu_s"], report) for report in reports), key=lambda row: -row[0])
    if not times:
        return
    terminalreporter.section("CPU time")
    terminalreporter.write_line(f"{sum(used for used, _ in times):.0f} s in {len(times)} tests")
    for used, report in times:
        if used > MOST_CPU_S and "slow" not in report.keywords:
            terminalreporter.write_line(f"{used:.1f} s, make it cheaper or mark it slow: {report.nodeid}")
    if log := os.environ.get("FASTRES_TESTS_CPU_LOG"):
        Path(log).write_text("".join(f"{used:.2f} {report.nodeid}\n" for used, report in times), encoding="utf-8")


# ---- fixtures ------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Put decoded images into a folder of the tests' own, in the processes that they start too."""
    users = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    with pytest.MonkeyPatch.context() as patch:
        # The workers of a run share the folder, so that one of them builds the C++ kernels for all.
        ours, in_a_worker = tmp_path_factory.getbasetemp(), "PYTEST_XDIST_WORKER" in os.environ
        patch.setenv("XDG_CACHE_HOME", str((ours.parent if in_a_worker else ours) / "cache"))
        # A pytest that a test starts is not an xdist worker; in a worker, pytest-benchmark measures nothing.
        patch.delenv("PYTEST_XDIST_WORKER", raising=False)
        # matplotlib's list of fonts stays in the user's cache, because building it takes seconds.
        patch.setenv("MPLCONFIGDIR", os.environ.get("MPLCONFIGDIR", str(users / "matplotlib")))
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Run the test with one thread and with two."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
