"""What the 64k-step schedule ends with: test accuracy at the last step and time of training, and the plain loop's.

    pytest bench/bench_accuracy.py --benchmark-only --seeds 5 --data-root DIR

bench_parity: fastres against the plain fp32 loop, the same seeds, weights, order and crops. On a GPU the plain loop's
accuracy comes from its graphed twin (see runs.py), and both are first run side by side until every bit was compared.
bench_model: the other networks of He et al., section 4.2, and of the first tutorial. Accuracies are those of the test
images after the last step; what is evaluated before chooses nothing. Whole CIFAR schedules are not yet run on a GPU; on
a CPU they take hours (--full).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.lib.runs import DATA, GraphedTwin, PlainRun, data_flags, difference, run, same
from fastres.config.cli import parse
from fastres.config.schema import Config
from fastres.data.sources.load import load_source
from fastres.data.sources.source import Source
from fastres.utils.timing import time_region

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


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A row for every seed, so that what is interrupted has those that are done."""
    seeds = metafunc.config.option.seeds
    if metafunc.function is bench_model:
        cases = [(model, seed) for model, (_, most, _) in MODELS.items() for seed in range(min(most, seeds))]
        metafunc.parametrize(("model", "seed"), cases, ids=[f"{model}-seed{seed}" for model, seed in cases])
    else:
        metafunc.parametrize("seed", range(seeds), ids="seed{}".format)


def twin_of(config: Config, source: Source) -> PlainRun:
    """What stands for the plain loop: on a CPU the loop itself."""
    return GraphedTwin(config, source) if GPU else PlainRun(config, source, deterministic=True)


@pytest.mark.parametrize("data", CONTESTS)
def bench_parity(
    benchmark: Any, request: pytest.FixtureRequest, tmp_path: Path, data: str, seed: int
) -> None:
    flags = [*CONTESTS[data], *data_flags(data, request.config)]
    config, info = parse([*flags, "--run.seed", str(seed)]), benchmark.extra_info
    source, steps = load_source(config.data), config.train.steps
    ours: dict[str, Any] = {}
    benchmark.pedantic(lambda: ours.update(run(flags, seed, tmp_path / "ours", source)), rounds=1)
    info.update(of_one_run("parity", ours, source), twin=None)
    info["plain_is"] = "graphed twin" if GPU else "the loop"
    if GPU:
        short = parse([*flags, *PROOF])
        loop = PlainRun(short, source, deterministic=True)
        info["twin"] = difference(loop, GraphedTwin(short, source), min(PROOF_STEPS, steps))
        if not same(info["twin"]):
            return  # minutes that would show nothing
    twin = twin_of(config, source)

    def train() -> None:
        for first in range(0, steps, STEPS_AT_ONCE):
            twin.steps(first, min(first + STEPS_AT_ONCE, steps))

    info["plain_train_time_s"] = [time_region(train, twin.loop.engine.device)]
    info["accuracies"]["plain"] = [twin.test_accuracy()]


def of_one_run(what: str, summary: dict[str, Any], source: Source) -> dict[str, Any]:
    """Of the engine's run what a row holds: lists of what `together` puts together."""
    return {
        "what": what,
        "data": source.name,
        **{name: summary[name] for name in ("model", "steps", "precision")},
        "n": 1,
        "seeds": [summary["seed"]],
        "accuracies": {"fastres": [summary["test_accuracy"]]},
        **{
            name: [summary[name]] for name in ("train_time_s", "first_step_at_90", "first_train_time_s_at_90")
        },
    }


SAME = ("what", "case", "model", "data", "steps", "precision")


def together(infos: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the same run with other seeds as one, of a seed the last one."""
    found: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
    for info in infos:
        of_seeds = found.setdefault(tuple(info.get(name) for name in SAME), {})
        for i, seed in enumerate(info.get("seeds", range(info["n"]))):
            accuracies = {name: values[i] for name, values in info["accuracies"].items()}
            of_seeds[seed] = info | {"accuracies": accuracies, "train_time_s": info["train_time_s"][i]}
    return [_merged(list(of_seeds.values())) for of_seeds in found.values()]


def _merged(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of several seeds, each with its accuracies and its time."""
    times = [of["train_time_s"] for of in runs]
    accuracies = {
        name: [of["accuracies"][name] for of in runs if name in of["accuracies"]]
        for name in ("fastres", "plain")
    }
    ours, plain = accuracies.values()
    proofs = [of["twin"] for of in runs if of.get("twin")]
    return runs[-1] | {
        "n": len(runs),
        "n_plain": len(plain),
        "mean_train_time_s": statistics.mean(times),
        "sd_train_time_s": statistics.stdev(times) if len(times) > 1 else None,
        "accuracies": accuracies,
        "mean_accuracy": {name: statistics.mean(values) for name, values in accuracies.items() if values},
        "sd_accuracy": statistics.stdev(ours) if len(ours) > 1 else None,
        "twin": next((proof for proof in proofs if not same(proof)), proofs[0] if proofs else None),
        **(compared(ours, plain) if plain else {"difference": None, "standard_error": None}),
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
def bench_model(
    benchmark: Any, request: pytest.FixtureRequest, tmp_path: Path, model: str, data: str, seed: int
) -> None:
    own, _, published = MODELS[model]
    flags = [*own, *KEEP_THE_END, *data_flags(data, request.config)]
    source, ours = load_source(parse(flags).data), dict[str, Any]()
    benchmark.pedantic(lambda: ours.update(run(flags, seed, tmp_path / "run", source)), rounds=1)
    benchmark.extra_info.update(of_one_run("model", ours, source), case=model, he_et_al=published)


def summary(infos: list[dict[str, Any]]) -> list[str]:
    lines = []
    for info in together(infos):
        sd = info["sd_train_time_s"]
        time = f"{info['mean_train_time_s']:,.1f}" + (f" ± {sd:,.1f}" if sd is not None else "") + " s"
        run = f"{info['steps']:,} steps in {info['precision']} on {info['data']}, n={info['n']}"
        ours = info["mean_accuracy"]["fastres"]
        if info["what"] == "model":
            spread = "" if info["sd_accuracy"] is None else f" ± {info['sd_accuracy']:.4f}"
            he = "" if info["he_et_al"] is None else f" (He et al. {info['he_et_al']:.4f})"
            lines.append(f"{info['case']:<22} {ours:.4f}{spread}{he}, {time} for {run}")
            continue
        lines.append(f"{info['model']:<22} {ours:.4f}, {time} for {run}")
        if info["n_plain"]:
            error = "" if info["standard_error"] is None else f" ± {info['standard_error']:.4f}"
            against = f"difference {info['difference']:+.4f}{error} (standard error)"
            plain = f"{info['mean_accuracy']['plain']:.4f}, n={info['n_plain']}"
            lines.append(f"  plain fp32, {info['plain_is']}: {plain}; {against}")
        if proof := info["twin"]:
            equal = "are the loop's, every bit" if same(proof) else "are NOT the loop's"
            lines.append(f"  the twin's {proof['steps']} losses and its weights after them {equal}")
    return lines
