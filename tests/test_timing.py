"""fastres/utils/timing.py interleaves regions, waits only at their ends, and gives ratios that no drift changes.

The same holds for its use as a benchmark.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from fastres.utils import timing
from fastres.utils.timing import Stopwatch, Timing, gc_paused, interleaved, time_region
from tests.commands import users_environment

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CHECKOUT = Path(__file__).parent.parent


class Clock:
    """A substitute for time.perf_counter that advances only when work is done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def region(self, seconds: float, drift: float = 0.0) -> timing.Region:
        """Return a region that takes that long, and longer at a later time."""

        def run() -> None:
            self.now += seconds * (1 + drift * self.now)

        return run


def test_regions_are_interleaved_after_a_warm_up_each_with_its_switches_set() -> None:
    done: list[str] = []
    regions = {name: (lambda name=name: done.append(name)) for name in ("a", "b")}
    timings = interleaved(regions, 2, CPU, warm_up=1, before=lambda name: done.append(f"before {name}"))
    assert done == ["before a", "a", "before b", "b"] * 3
    assert [timings[name].n for name in ("a", "b")] == [2, 2]


def test_the_device_is_waited_for_at_both_ends_and_never_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: done.append(f"wait for {device}"))
    time_region(lambda: done.extend(["step", "step"]), CUDA)
    assert done == ["wait for cuda", "step", "step", "wait for cuda"]
    time_region(lambda: done.clear(), CPU)
    assert done == []


def test_work_between_regions_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    regions = {"a": clock.region(1.0), "b": clock.region(2.0)}
    timings = interleaved(regions, 3, CPU, warm_up=2, before=lambda name: clock.region(100.0)())
    assert timings == {"a": Timing((1.0,) * 3), "b": Timing((2.0,) * 3)}


def test_a_drift_of_the_clocks_does_not_change_the_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    regions = {"a": clock.region(2.0, drift=1e-3), "b": clock.region(1.0, drift=1e-3)}
    timings = interleaved(regions, 200, CPU)
    assert timings["a"].seconds[-1] > 1.5 * timings["a"].seconds[0]  # the drift exists
    ratio = timings["b"].ratio_to(timings["a"])
    assert ratio.of_medians == pytest.approx(2, rel=0.01)
    assert len(ratio.of_pairs) == 200 and ratio.of_pairs == pytest.approx([2] * 200, rel=0.01)


def test_medians_quantiles_rates_and_ratios_follow_from_the_seconds() -> None:
    slow, fast = Timing((4.0, 2.0, 6.0, 8.0, 10.0, 12.0)), Timing((1.0, 1.0, 2.0, 4.0, 4.0, 4.0))
    assert (slow.n, slow.median_s, slow.quantiles_s) == (6, 7.0, (4.0, 10.0))
    assert slow.rates(40) == (40 / 7, 4.0, 10.0)
    ratio = fast.ratio_to(slow)
    assert ratio.of_medians == 7 / 3 and ratio.of_pairs == (4.0, 2.0, 3.0, 2.0, 2.5, 3.0)
    assert slow.to_dict() == {
        "median_s": 7.0,
        "s_20_80": [4.0, 10.0],
        "n": 6,
        "seconds": [4.0, 2.0, 6.0, 8.0, 10.0, 12.0],
    }
    with pytest.raises(ValueError, match="shorter"):
        Timing((1.0,)).ratio_to(slow)  # not interleaved


def test_a_stopwatch_measures_each_part_and_can_be_restarted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    watch = Stopwatch(CPU)
    for seconds in (1.0, 2.0):
        with watch.part("forward"):
            clock.region(seconds)()
        clock.region(50.0)()
        with watch.part("backward"):
            clock.region(10 * seconds)()
    assert watch.read() == {"forward": (1.0, 2.0), "backward": (10.0, 20.0)}
    assert watch.read() == {}


def test_a_stopwatch_on_a_gpu_waits_only_when_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at_ms = 1000.0 * len(done)
            done.append("record")

        def elapsed_time(self, end: Event) -> float:
            return end.at_ms - self.at_ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: done.append("wait"))
    watch = Stopwatch(CUDA)
    with watch.part("forward"):
        done.append("launch")
    assert done == ["record", "launch", "record"]
    assert watch.read() == {"forward": (2.0,)}
    assert done[-1] == "wait"


@pytest.mark.slow
def test_timings_are_recorded_as_a_benchmark(tmp_path: Path) -> None:
    """Timings go through pytest-benchmark, with the names that the tables and the committed results use."""
    (tmp_path / "bench_turns.py").write_text(
        "from bench.lib.paired import paired_benchmark\n"
        "done = []\n"
        "def test_turns(benchmark):\n"
        "    paired_benchmark(benchmark, lambda: done.append('A'), lambda: done.append('B'), 64, 5)\n"
        "    assert ''.join(done) == 'ABABABABAB'\n"
    )
    ran = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "bench_turns.py", "-q", "--benchmark-only"),
            *("-p", "no:cacheprovider", f"--benchmark-json={tmp_path / 'rows.json'}"),
        ],
        cwd=tmp_path,
        env=users_environment({"PYTHONPATH": str(CHECKOUT)}),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (row,) = json.loads((tmp_path / "rows.json").read_text())["benchmarks"]
    info: dict[str, Any] = row["extra_info"]
    assert set(info) == {
        *("images_per_s", "images_per_s_20_80", "baseline_images_per_s", "baseline_s", "ratio", "ratios", "n")
    }
    low, high = info["images_per_s_20_80"]
    assert info["n"] == len(info["ratios"]) == len(info["baseline_s"]) == row["stats"]["rounds"] == 5
    assert 0 < low <= info["images_per_s"] <= high
    assert info["baseline_images_per_s"] == pytest.approx(64 / sorted(info["baseline_s"])[2])
    assert info["ratio"] == pytest.approx(info["images_per_s"] / info["baseline_images_per_s"])


class Knot:
    """A reference cycle, which only a garbage collection frees."""

    def __init__(self) -> None:
        self.itself = self


@pytest.mark.parametrize("collects", [True, False])
def test_old_garbage_is_collected_before_a_region_and_none_inside_it(collects: bool) -> None:
    before = weakref.ref(Knot())
    was = gc.isenabled()

    def fail_while_paused() -> None:
        with gc_paused():
            assert before() is None and not gc.isenabled()
            raise ZeroDivisionError

    try:
        (gc.enable if collects else gc.disable)()
        with pytest.raises(ZeroDivisionError):
            fail_while_paused()
        assert gc.isenabled() == collects
    finally:
        (gc.enable if was else gc.disable)()
