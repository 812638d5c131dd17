"""Measure the steps of ResNet-20's 64k-step schedule, data included, interleaved with plain loops.

    pytest bench/bench_schedule.py --benchmark-only

A round runs the same number of steps of four programs: the plain loop (eager, fp32, NCHW), the plain loop under
torch.compile alone, the compiled loop in bf16 and channels-last, and fastres.train, whose own clock excludes compiling
and evaluation. All take the same augmented batches from the resident loader. bench_accuracy.py measures the wall time
of all 64,000 steps.

A second benchmark checks that steps replayed from a CUDA graph are bitwise identical to ungraphed steps. It has not yet
run on a GPU.
"""

from __future__ import annotations

import hashlib
import json
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from bench.lib.paired import benchmark_interleaved
from bench.lib.plain_loop import PlainRun
from bench.lib.runs import run, skip_if_slow
from bench.lib.workloads import GPU
from fastres.config.cli import parse
from fastres.data.sources.load import load_source
from fastres.training.engine import resolve_engine
from fastres.utils.errors import UsageError
from fastres.utils.timing import time_region

SAMPLES, STEPS, ROUNDS = (50_000, 2_000, 5) if GPU else (2_048, 4, 3)  # of a round
FLAGS = [
    *("--data.source", "synthetic", "--data.image_size", "32", "--data.synthetic_samples", str(SAMPLES)),
    *("--train.eval_every", "100_000", "--run.checkpoint_every", "100_000"),
]
# By name: arguments of PlainRun.
BASELINES: dict[str, dict[str, bool]] = {
    "plain": {},
    "torch.compile": {"compiled": True},
    "torch.compile, bf16, channels-last": {"compiled": True, "tuned": True},
}
OURS = "fastres"


def bench_schedule(benchmark: Any, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    flags = [*FLAGS, "--train.steps", str(STEPS)]
    config = parse(flags)
    source, engine = load_source(config.data), resolve_engine(config)
    compiles = GPU or request.config.option.full  # on a CPU, compiling takes minutes
    baselines = {
        name: PlainRun(config, source, **how) for name, how in BASELINES.items() if compiles or not how.get("compiled")
    }
    for plain in baselines.values():
        plain.steps(0, 2)
    folders = (tmp_path / f"{number}" for number in count())  # a folder holds one run

    def ours() -> float:
        """Return the seconds of a run of seed 0, which takes the same batches as the plain loops."""
        seconds: float = run(flags, 0, next(folders), source)["train_time_s"]
        return seconds

    timers = {
        name: partial(time_region, partial(plain.steps, 0, STEPS), engine.device) for name, plain in baselines.items()
    }
    timings = benchmark_interleaved(benchmark, {**timers, OURS: ours}, ROUNDS)
    ratios = {name: timings[OURS].ratio_to(timings[name]) for name in baselines}
    benchmark.extra_info.update(
        what="schedule",
        model=config.model.name,
        batch=config.train.batch_size,
        steps=STEPS,
        n=ROUNDS,
        precision=engine.precision,
        compile=engine.compile,
        turns={name: timing.to_dict() for name, timing in timings.items()},
        images_per_s={name: timing.rates(STEPS * config.train.batch_size) for name, timing in timings.items()},
        times_as_fast={name: ratio.of_medians for name, ratio in ratios.items()},
        times_as_fast_of_pairs={name: list(ratio.of_pairs) for name, ratio in ratios.items()},
    )


# ---- graphed and ungraphed --------------------------------------------------------------------------------------

GRAPHED_STEPS = 1_000
DETERMINISTIC = [
    *(*FLAGS, "--engine.deterministic", "true", "--train.log_every", "10"),
    *("--schedule.milestones", "[400,700]"),  # the learning rate changes on the way
]


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def bench_graphed_is_ungraphed(benchmark: Any, request: pytest.FixtureRequest, tmp_path: Path, precision: str) -> None:
    flags = [*DETERMINISTIC, "--train.steps", str(GRAPHED_STEPS), "--engine.precision", precision]
    try:
        resolve_engine(parse([*flags, "--engine.cuda_graph", "true"]))
    except UsageError as error:
        pytest.skip(str(error))
    skip_if_slow(request.config)
    runs = {name: tmp_path / name for name in ("true", "false")}
    summaries = {}

    def both() -> None:
        for name, folder in runs.items():
            summaries[name] = run([*flags, "--engine.cuda_graph", name], 0, folder)

    benchmark.pedantic(both, rounds=1)
    benchmark.extra_info.update(
        what="graphed",
        precision=precision,
        steps=GRAPHED_STEPS,
        train_time_s={name: summary["train_time_s"] for name, summary in summaries.items()},
        **compare_folders(runs["true"], runs["false"]),
    )


def compare_folders(one: Path, other: Path) -> dict[str, Any]:
    """Return the number of losses that two runs logged, the first different step, and True if all weights are equal."""
    losses = [
        {row["step"]: row["loss"] for row in map(json.loads, lines) if row["split"] == "train"}
        for lines in ((folder / "metrics.jsonl").read_text("utf-8").splitlines() for folder in (one, other))
    ]
    weights = [hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() for folder in (one, other)]
    steps = sorted(losses[0].keys() | losses[1].keys())
    differ = (step for step in steps if losses[0].get(step) != losses[1].get(step))
    return {
        "losses": len(losses[0]),
        "first_different_step": next(differ, None),
        "state_equal": weights[0] == weights[1],
        "weights_sha256": weights,
    }
