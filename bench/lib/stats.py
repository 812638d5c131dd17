"""The statistics that benchmarks, tables and targets share."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import ttest_1samp

Info = dict[str, Any]  # a benchmark's extra_info

# ---- accuracies over seeds --------------------------------------------------------------------------------------

SAME_RUN = ("what", "case", "model", "data", "steps", "precision")  # rows equal in these differ only in the seed


def merge_seeds(infos: Sequence[Info]) -> list[Info]:
    """Merge the rows of one run with several seeds into one row. If a seed was measured twice, the last one counts."""
    found: dict[tuple[Any, ...], dict[int, Info]] = {}
    for info in infos:
        by_seed = found.setdefault(tuple(info.get(name) for name in SAME_RUN), {})
        for i, seed in enumerate(info.get("seeds", range(info["n"]))):
            accuracies = {name: values[i] for name, values in info["accuracies"].items()}
            by_seed[seed] = info | {"accuracies": accuracies, "train_time_s": info["train_time_s"][i]}
    return [_merged(list(by_seed.values())) for by_seed in found.values()]


def _merged(runs: list[Info]) -> Info:
    """Merge the rows of several seeds, each with its accuracies and its time."""
    times = [run["train_time_s"] for run in runs]
    accuracies = {
        name: [run["accuracies"][name] for run in runs if name in run["accuracies"]] for name in ("fastres", "plain")
    }
    ours, plain = accuracies.values()
    proofs = [run["twin"] for run in runs if run.get("twin")]
    return runs[-1] | {
        "n": len(runs),
        "n_plain": len(plain),
        "mean_train_time_s": statistics.mean(times),
        "sd_train_time_s": deviation(times),
        "accuracies": accuracies,
        "mean_accuracy": {name: statistics.mean(values) for name, values in accuracies.items() if values},
        "sd_accuracy": deviation(ours),
        "twin": next((proof for proof in proofs if not is_identical(proof)), proofs[0] if proofs else None),
        **(compared(ours, plain) if plain else {"difference": None, "standard_error": None}),
    }


def deviation(values: Sequence[float]) -> float | None:
    """Return the standard deviation, or None for a single value."""
    return statistics.stdev(values) if len(values) > 1 else None


def compared(ours: list[float], theirs: list[float]) -> dict[str, float | None]:
    """Return the difference of the means and its standard error, which is None if there is a single value."""
    several = min(len(ours), len(theirs)) > 1
    error = math.sqrt(sum(statistics.variance(of) / len(of) for of in (ours, theirs))) if several else None
    return {"difference": statistics.mean(ours) - statistics.mean(theirs), "standard_error": error}


def not_lower(info: Info) -> bool | None:
    """Return True unless ours is lower by more than two standard errors, or None without a standard error."""
    return None if info["standard_error"] is None else info["difference"] >= -2 * info["standard_error"]


def is_identical(found: Info) -> bool:
    """Return True if plain_loop.difference or bench_schedule.compare_folders found no difference in any bit."""
    return found["first_different_step"] is None and found["state_equal"]


# ---- time to 90 % -----------------------------------------------------------------------------------------------

GOAL, LEVEL = 0.9, 0.01


def run_statistics(runs: Sequence[tuple[float, float]]) -> Info:
    """Return the statistics to store of runs, each given by its seconds and its test accuracy."""
    times, accuracies = ([run[i] for run in runs] for i in range(2))
    return {
        "n": len(runs),
        "mean_s": statistics.mean(times),
        "sd_s": deviation(times),
        "times_s": times,
        "mean_accuracy": statistics.mean(accuracies),
        "sd_accuracy": deviation(accuracies),
        "accuracies": accuracies,
        "misses": sum(accuracy < GOAL for accuracy in accuracies),
        "p_value": p_value(accuracies),
    }


def p_value(accuracies: list[float]) -> float | None:
    """Return the p-value of a one-sided t-test that the mean exceeds GOAL, or None for a single run."""
    if len(accuracies) < 2:
        return None
    if np.ptp(accuracies) == 0:  # without a spread the t-statistic is infinite or undefined
        return 0.0 if accuracies[0] > GOAL else 1.0
    return float(ttest_1samp(accuracies, GOAL, alternative="greater").pvalue)


def reaches_goal(p: float | None) -> bool:
    """Return True if the p-value shows that the mean accuracy exceeds GOAL."""
    return p is not None and p < LEVEL
