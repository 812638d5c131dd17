"""Measure the 64k-step schedule: test accuracy at the last step and training time, against the plain loop.

    pytest bench/bench_accuracy.py --benchmark-only --seeds 5 --data-root DIR

bench_parity compares fastres with the plain fp32 loop on the same seeds, weights, order and crops. On a GPU the plain
loop's accuracy comes from its graphed twin (lib/plain_loop.py), after a check that both are bitwise identical.
bench_model runs the other networks of He et al., section 4.2, and of the first tutorial. Accuracies are those of the
test images after the last step; earlier evaluations choose nothing. Whole CIFAR schedules have not yet run on a GPU. On
a CPU they take hours (--full).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.lib.plain_loop import GraphedTwin, PlainRun, difference
from bench.lib.runs import DATA, data_flags, run
from bench.lib.stats import is_identical
from bench.lib.workloads import GPU
from fastres.config.cli import parse
from fastres.config.schema import Config
from fastres.data.sources.load import load_source
from fastres.data.sources.source import Source
from fastres.utils.timing import time_region

# Save no checkpoints. Evaluations stay, because the first one at 90 % is reported.
KEEP_THE_END = ["--run.checkpoint_every", "100_000"]
# By a name in runs.DATA: the flags of the run on this data.
CONTESTS: dict[str, list[str]] = {
    "digits": ["--recipe", "digits", "--train.steps", "60", "--schedule.warmup_steps", "15", *KEEP_THE_END],
    "cifar10": KEEP_THE_END,
    "jpeg_copy": KEEP_THE_END,
}
# The learning rate changes during the proof, as in the 64k-step schedule.
PROOF_STEPS, PROOF = 300, ["--schedule.milestones", "[100,200]"]
STEPS_AT_ONCE = 1_000


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make a row for every seed, so that an interrupted session keeps the finished seeds."""
    seeds = metafunc.config.option.seeds
    if metafunc.function is bench_model:
        cases = [(model, seed) for model, (_, most, _) in MODELS.items() for seed in range(min(most, seeds))]
        metafunc.parametrize(("model", "seed"), cases, ids=[f"{model}-seed{seed}" for model, seed in cases])
    else:
        metafunc.parametrize("seed", range(seeds), ids="seed{}".format)


def twin_of(config: Config, source: Source) -> PlainRun:
    """Return the run that stands for the plain loop; on a CPU it is the loop itself."""
    return GraphedTwin(config, source) if GPU else PlainRun(config, source, deterministic=True)


@pytest.mark.parametrize("data", CONTESTS)
def bench_parity(benchmark: Any, request: pytest.FixtureRequest, tmp_path: Path, data: str, seed: int) -> None:
    flags = [*CONTESTS[data], *data_flags(data, request.config)]
    config, info = parse([*flags, "--run.seed", str(seed)]), benchmark.extra_info
    source, steps = load_source(config.data), config.train.steps
    ours: dict[str, Any] = {}
    benchmark.pedantic(lambda: ours.update(run(flags, seed, tmp_path / "ours", source)), rounds=1)
    info.update(row_of("parity", ours, source), twin=None)
    info["plain_is"] = "graphed twin" if GPU else "the loop"
    if GPU:
        short = parse([*flags, *PROOF])
        loop = PlainRun(short, source, deterministic=True)
        info["twin"] = difference(loop, GraphedTwin(short, source), min(PROOF_STEPS, steps))
        if not is_identical(info["twin"]):
            return  # because training would take minutes and show nothing
    twin = twin_of(config, source)

    def train() -> None:
        for first in range(0, steps, STEPS_AT_ONCE):
            twin.steps(first, min(first + STEPS_AT_ONCE, steps))

    info["plain_train_time_s"] = [time_region(train, twin.loop.engine.device)]
    info["accuracies"]["plain"] = [twin.test_accuracy()]


def row_of(what: str, summary: dict[str, Any], source: Source) -> dict[str, Any]:
    """Return the row of an engine's run, with a list for each value that stats.merge_seeds merges."""
    return {
        "what": what,
        "data": source.name,
        **{name: summary[name] for name in ("model", "steps", "precision")},
        "n": 1,
        "seeds": [summary["seed"]],
        "accuracies": {"fastres": [summary["test_accuracy"]]},
        **{name: [summary[name]] for name in ("train_time_s", "first_step_at_90", "first_train_time_s_at_90")},
    }


# ---- the other networks -----------------------------------------------------------------------------------------

# By network: (its flags, the most seeds, He et al.'s accuracy).
MODELS: dict[str, tuple[list[str], int, float | None]] = {
    "resnet20, maxpool_pad": (["--model.shortcut", "maxpool_pad"], 5, None),
    "resnet20, conv1x1": (["--model.shortcut", "conv1x1"], 5, None),
    "plain20": (["--model.name", "plain20"], 5, None),
    "resnet32": (["--recipe", "cifar10-resnet32"], 1, 0.9249),
    "resnet44": (["--recipe", "cifar10-resnet44"], 1, 0.9283),
    "resnet56": (["--recipe", "cifar10-resnet56"], 1, 0.9303),
    "plain56": (["--model.name", "plain56"], 1, None),
    "resnet110": (["--recipe", "cifar10-resnet110"], 1, 0.9339),  # the mean of five; 0.9357 is their best
}


@pytest.mark.parametrize("data", [name for name in DATA if name != "digits"])
def bench_model(
    benchmark: Any, request: pytest.FixtureRequest, tmp_path: Path, model: str, data: str, seed: int
) -> None:
    own, _, published = MODELS[model]
    flags = [*own, *KEEP_THE_END, *data_flags(data, request.config)]
    source, ours = load_source(parse(flags).data), dict[str, Any]()
    benchmark.pedantic(lambda: ours.update(run(flags, seed, tmp_path / "run", source)), rounds=1)
    benchmark.extra_info.update(row_of("model", ours, source), case=model, he_et_al=published)
