"""The 64k-step schedule of ResNet-20: how fast its steps are, data included, in turns with what one would write first.

    pytest bench/bench_schedule.py --benchmark-only

A turn is a number of steps of the schedule: of the plain loop (eager, fp32, NCHW), of the same under torch.compile
alone, of that in bf16 and channels-last, and of fastres.train, whose own clock leaves out compiling and evaluation. All
take the same augmented batches from the resident loader. The wall time of all 64,000 steps is in bench_accuracy.py.

Second: that steps replayed from a CUDA graph compute the bits of those that are not. Not yet run on a GPU.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.lib.runs import PlainRun, needs_patience, run, same
from fastres.config.cli import parse
from fastres.data.sources.load import load_source
from fastres.training.engine import resolve_engine
from fastres.utils.errors import UsageError
from fastres.utils.timing import Timing, time_region

GPU = torch.cuda.is_available()
SAMPLES, STEPS, ROUNDS = (50_000, 2_000, 5) if GPU else (2_048, 4, 3)  # of a turn
FLAGS = [
    *("--data.source", "synthetic", "--data.image_size", "32", "--data.synthetic_samples", str(SAMPLES)),
    *("--train.eval_every", "100_000", "--run.checkpoint_every", "100_000"),
]
# What fastres is compared to: arguments of PlainLoop.
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
    compiles = GPU or request.config.option.full  # on a CPU it takes minutes
    baselines = {
        name: PlainRun(config, source, **how)
        for name, how in BASELINES.items()
        if compiles or not how.get("compiled")
    }
    for plain in baselines.values():
        plain.steps(0, 2)
    seconds: dict[str, list[float]] = {name: [] for name in (*baselines, OURS)}

    def theirs() -> None:
        for name, plain in baselines.items():
            seconds[name].append(time_region(lambda plain=plain: plain.steps(0, STEPS), engine.device))

    def ours() -> None:
        # The batches of seed 0 are those of the others; a folder holds one run.
        summary = run(flags, 0, tmp_path / f"{len(seconds[OURS])}", source)
        seconds[OURS].append(summary["train_time_s"])

    benchmark.pedantic(ours, setup=theirs, rounds=ROUNDS)
    timings = {name: Timing(tuple(values)) for name, values in seconds.items()}
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
        images_per_s={
            name: timing.rates(STEPS * config.train.batch_size) for name, timing in timings.items()
        },
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
def bench_graphed_is_ungraphed(
    benchmark: Any, request: pytest.FixtureRequest, tmp_path: Path, precision: str
) -> None:
    flags = [*DETERMINISTIC, "--train.steps", str(GRAPHED_STEPS), "--engine.precision", precision]
    try:
        resolve_engine(parse([*flags, "--engine.cuda_graph", "true"]))
    except UsageError as refusal:
        pytest.skip(str(refusal))
    needs_patience(request.config)
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
        **same_run(runs["true"], runs["false"]),
    )


def same_run(one: Path, other: Path) -> dict[str, Any]:
    """Of two runs' folders: the number of losses logged, the first step where they differ, and whether all weights are
    the same bits."""
    losses = [
        {row["step"]: row["loss"] for row in map(json.loads, lines) if row["split"] == "train"}
        for lines in ((folder / "metrics.jsonl").read_text("utf-8").splitlines() for folder in (one, other))
    ]
    weights = [
        hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() for folder in (one, other)
    ]
    steps = sorted(losses[0].keys() | losses[1].keys())
    differ = (step for step in steps if losses[0].get(step) != losses[1].get(step))
    return {
        "losses": len(losses[0]),
        "first_different_step": next(differ, None),
        "state_equal": weights[0] == weights[1],
        "weights_sha256": weights,
    }


def summary(infos: list[dict[str, Any]]) -> list[str]:
    lines = []
    for info in infos:
        if info["what"] == "graphed":
            graphed, ungraphed = (info["train_time_s"][name] for name in ("true", "false"))
            found = (
                "equal, every bit" if same(info) else f"differ from step {info['first_different_step']} on"
            )
            lines.append(
                f"graphed and ungraphed in {info['precision']}, deterministic: {info['losses']} losses and the weights "
                f"after {info['steps']:,} steps {found}; {graphed:.2f} s and {ungraphed:.2f} s"
            )
            continue
        for name, (images_per_s, low, high) in info["images_per_s"].items():
            ratio = info["times_as_fast"].get(name)
            lines.append(
                f"{name:<36} {images_per_s:>9,.0f} images/s ({low:,.0f} to {high:,.0f})"
                + (f"; fastres {ratio:.2f} x" if ratio else f", {info['model']} in {info['precision']}")
                + f", n={info['n']} turns of {info['steps']:,} steps"
            )
    return lines
