"""Measure the time to 90 % test accuracy of fixed-length runs, warm and cold.

    pytest bench/bench_time_to_90.py --benchmark-only --seeds 25

A recipe counts if the mean final accuracy over the seeds is at least 90 %, one-sided p < 0.01. A warm time covers
training and the final evaluation of a run in this process, after one run on random labels, without compilation. A cold
time covers a process from start to end. The accuracy is that of the test images after the last step.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.lib.runs import SPEEDRUN, data_flags, warm_runs
from bench.lib.stats import run_statistics

# By a name in runs.DATA: the flags of the run on this data.
CONTESTS: dict[str, list[str]] = {
    # 60 steps have 0.957 on 287 held-out digits, the mean of 5 seeds; 40 steps had 0.882.
    "digits": [
        *("--recipe", "digits", "--train.steps", "60", "--train.eval_every", "60", "--train.log_every", "60"),
        *("--schedule.warmup_steps", "15"),
    ],
    "cifar10": SPEEDRUN,
    "jpeg_copy": SPEEDRUN,
}


def cold_runs(flags: list[str], folder: Path) -> Callable[[int], tuple[float, dict[str, Any]]]:
    """Return a function from a seed to the seconds of the process that runs it and the run's summary."""

    def measured(seed: int) -> tuple[float, dict[str, Any]]:
        where = folder / f"{seed}"
        command = [sys.executable, "-m", "fastres.train", *flags]
        start = time.perf_counter()
        done = subprocess.run(
            [*command, "--run.seed", str(seed), "--run.dir", str(where)], capture_output=True, text=True, check=False
        )
        seconds = time.perf_counter() - start
        assert done.returncode == 0, done.stderr
        return seconds, json.loads((where / "summary.json").read_text(encoding="utf-8"))

    return measured


KINDS = {"warm": warm_runs, "cold": cold_runs}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("contest", CONTESTS)
def bench_time_to_90(benchmark: Any, request: pytest.FixtureRequest, tmp_path: Path, contest: str, kind: str) -> None:
    seeds = request.config.option.seeds
    run = KINDS[kind](CONTESTS[contest] + data_flags(contest, request.config), tmp_path)
    runs: list[tuple[float, float]] = []

    def one() -> None:
        seconds, summary = run(len(runs))
        runs.append((seconds, summary["test_accuracy"]))
        ran = {name: summary[name] for name in ("steps", "precision")}
        # Update after every run, so that an interruption keeps the finished runs.
        benchmark.extra_info.update(contest=contest, kind=kind, **ran, **run_statistics(runs))

    benchmark.pedantic(one, rounds=seeds)
