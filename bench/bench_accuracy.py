"""What the 64k-step schedule ends with: test accuracy at the last step and time of training, and the plain loop's.

    pytest bench/bench_accuracy.py --benchmark-only --seeds 5 --data-root DIR

bench_parity: fastres against the plain fp32 loop, the same seeds, weights, order and crops. On a GPU the plain loop's
accuracy comes from its graphed twin (see runs.py), and both are first run side by side until every bit was compared.
bench_model: the other networks of He et al., section 4.2, and of the first tutorial. The test set is seen once, at the
last step. Whole CIFAR schedules are not yet run on a GPU; on a CPU they take hours (--full).
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.runs import DATA, GraphedTwin, PlainRun, data_flags, difference, run, same
from fastres.config import Config, parse
from fastres.data.sources import Source, load_source
from fastres.timing import seconds_of

GPU = torch.cuda.is_available()
KEEP_THE_END = ["--run.checkpoint_every", "100_000"]  # evaluations stay: the first one at 90 % is reported
# By a name in runs.DATA: what is run on it.
CONTESTS: dict[str, list[str]] = {
    "digits": ["--recipe", "digits", "--train.steps", "60", "--schedule.warmup_steps", "15", *KEEP_THE_END],
    "cifar10": KEEP_THE_END,
    "jpeg_copy": KEEP_THE_END,
}
# For the proof the learning rate changes on the way, as it does in 64k steps.
PROOF_STEPS, PROOF = 300, ["--schedule.milestones", "[100,200]"]
STEPS_AT_ONCE = 1_000


def twin_of(config: Config, source: Source) -> PlainRun:
    """What stands for the plain loop: on a CPU the loop itself."""
    return GraphedTwin(config, source) if GPU else PlainRun(config, source, deterministic=True)


@pytest.mark.parametrize("data", CONTESTS)
def bench_parity(benchmark: Any, request: pytest.FixtureRequest, tmp_path: Path, data: str) -> None:
    flags, seeds = CONTESTS[data] + data_flags(data, request.config), request.config.option.seeds
    config = parse(flags)
    source, steps = load_source(config.data), config.train.steps
    proof = None
    if GPU:
        short = parse([*flags, *PROOF])
        loop = PlainRun(short, source, deterministic=True)
        proof = difference(loop, GraphedTwin(short, source), min(PROOF_STEPS, steps))
    ours: list[dict[str, Any]] = []
    theirs: list[float] = []
    twin_s: list[float] = []

    def plain() -> None:
        twin = twin_of(parse([*flags, "--run.seed", str(len(theirs))]), source)

        def train() -> None:
            for first in range(0, steps, STEPS_AT_ONCE):
                twin.steps(first, min(first + STEPS_AT_ONCE, steps))

        twin_s.append(seconds_of(train, twin.loop.engine.device))
        theirs.append(twin.test_accuracy())

    def fastres() -> None:
        seed = len(ours)
        ours.append(run(flags, seed, tmp_path / f"{seed}", source))

    benchmark.pedantic(fastres, setup=plain, rounds=seeds)
    accuracies = {"fastres": [summary["test_accuracy"] for summary in ours], "plain": theirs}
    benchmark.extra_info.update(
        what="parity",
        **facts(ours, source),
        accuracies=accuracies,
        mean_accuracy={name: statistics.mean(values) for name, values in accuracies.items()},
        plain_train_time_s=twin_s,
        plain_is="graphed twin" if GPU else "the loop",
        twin=proof,
        **compared(accuracies["fastres"], accuracies["plain"]),
    )


def facts(runs: list[dict[str, Any]], source: Source) -> dict[str, Any]:
    times = [summary["train_time_s"] for summary in runs]
    return {
        "data": source.name,
        "model": runs[0]["model"],
        "steps": runs[0]["steps"],
        "precision": runs[0]["precision"],
        "n": len(runs),
        "train_time_s": times,
        "mean_train_time_s": statistics.mean(times),
        "sd_train_time_s": statistics.stdev(times) if len(times) > 1 else None,
        "wall_time_s": [summary["wall_time_s"] for summary in runs],
        "first_step_at_90": [summary["first_step_at_90"] for summary in runs],
        "first_train_time_s_at_90": [summary["first_train_time_s_at_90"] for summary in runs],
    }


def compared(ours: list[float], theirs: list[float]) -> dict[str, float | None]:
    """The difference of the means, and its standard error; None from a single run."""
    several = min(len(ours), len(theirs)) > 1
    error = math.sqrt(sum(statistics.variance(of) / len(of) for of in (ours, theirs))) if several else None
    return {"difference": statistics.mean(ours) - statistics.mean(theirs), "standard_error": error}


def not_lower(info: dict[str, Any]) -> bool | None:
    """By more than two standard errors; None where that cannot be said."""
    return None if info["standard_error"] is None else info["difference"] >= -2 * info["standard_error"]


# ---- the other networks -----------------------------------------------------------------------------------------

# The network: (its flags, seeds where --seeds allows them, He et al.'s figure).
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
@pytest.mark.parametrize("model", MODELS)
def bench_model(
    benchmark: Any, request: pytest.FixtureRequest, tmp_path: Path, model: str, data: str
) -> None:
    own, seeds, published = MODELS[model]
    flags = [*own, *KEEP_THE_END, *data_flags(data, request.config)]
    source = load_source(parse(flags).data)
    runs: list[dict[str, Any]] = []
    benchmark.pedantic(
        lambda: runs.append(run(flags, len(runs), tmp_path / f"{len(runs)}", source)),
        rounds=min(seeds, request.config.option.seeds),
    )
    accuracies = [summary["test_accuracy"] for summary in runs]
    benchmark.extra_info.update(
        what="model",
        case=model,
        **facts(runs, source),
        accuracies=accuracies,
        mean_accuracy=statistics.mean(accuracies),
        sd_accuracy=statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        he_et_al=published,
    )


def summary(infos: list[dict[str, Any]]) -> list[str]:
    lines = []
    for info in infos:
        sd = info["sd_train_time_s"]
        time = f"{info['mean_train_time_s']:,.1f}" + (f" ± {sd:,.1f}" if sd is not None else "") + " s"
        run = f"{info['steps']:,} steps in {info['precision']} on {info['data']}, n={info['n']}"
        if info["what"] == "model":
            spread = "" if info["sd_accuracy"] is None else f" ± {info['sd_accuracy']:.4f}"
            he = "" if info["he_et_al"] is None else f" (He et al. {info['he_et_al']:.4f})"
            lines.append(f"{info['case']:<22} {info['mean_accuracy']:.4f}{spread}{he}, {time} for {run}")
            continue
        ours, plain = (info["mean_accuracy"][name] for name in ("fastres", "plain"))
        error = "" if info["standard_error"] is None else f" ± {info['standard_error']:.4f}"
        lines.append(f"{info['model']:<22} {ours:.4f}, {time} for {run}")
        against = f"difference {info['difference']:+.4f}{error} (standard error)"
        lines.append(f"  plain fp32, {info['plain_is']}: {plain:.4f}; {against}")
        if proof := info["twin"]:
            equal = "are the loop's, every bit" if same(proof) else "are NOT the loop's"
            lines.append(f"  the twin's {proof['steps']} losses and its weights after them {equal}")
    return lines
