"""GPU performance targets next to the measurements so far, as printed by `python -m bench.report --targets`.

A target without a measurement is reported as not measured, and a target with too little evidence with the missing
evidence. All figures come from one device, and each ratio from variants that ran interleaved. Accuracies are merged
over the runs of all seeds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bench.lib.stats import Info, is_identical, merge_seeds, not_lower, reaches_goal
from bench.lib.tables import Row, rate

SCHEDULE_STEPS, SCHEDULE_S = 64_000, (30.0, 20.0)  # s of training: the target, the stretch
TIMES_PLAIN, TIMES_COMPILED, TIMES_PEER, TIMES_INDUCTOR = 15.0, 3.0, 1.10, 1.2
LEAST_SEEDS, LEAST_RUNS_TO_90 = 5, 25

YES, NO = "reached", "not reached"
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Finding:
    """A measurement and its verdict, which is YES, NO, or the reason why the measurement shows neither."""

    text: str
    verdict: str


Measured = Callable[[Sequence[Row]], Finding | None]


def at_least(needed: float) -> Callable[[float], str]:
    return lambda value: YES if value >= needed else NO


def infos(rows: Sequence[Row], file: str, **wanted: Any) -> list[Info]:
    """Return the file's rows that have these values, with rows of CIFAR-10 itself before rows of a copy."""
    found = [
        row.info
        for row in rows
        if row.file == file and all(row.info.get(name) == value for name, value in wanted.items())
    ]
    return sorted(found, key=lambda info: info.get("data") != "cifar10")


def parity(rows: Sequence[Row]) -> Info | None:
    """Return the whole schedule's comparison with the plain loop, with merged seeds."""
    whole = {"what": "parity", "model": "resnet20", "steps": SCHEDULE_STEPS}
    return next(iter(merge_seeds(infos(rows, "bench_accuracy.py", **whole))), None)


def whole_schedule(rows: Sequence[Row]) -> Finding | None:
    """Compare the schedule's training time with the target and the stretch."""
    if (info := parity(rows)) is None:
        return None
    mean, sd, (target, stretch) = info["mean_train_time_s"], info["sd_train_time_s"], SCHEDULE_S
    spread = "" if sd is None else f" ± {sd:.2f}"
    text = f"{mean:.2f}{spread} s, n={info['n']}"
    return Finding(text, f"{YES}, stretch too" if mean <= stretch else YES if mean <= target else NO)


def against_plain(rows: Sequence[Row]) -> Finding | None:
    """Compare with the plain loop."""
    for info in infos(rows, "bench_schedule.py", what="schedule"):
        ratio = info["times_as_fast"]["plain"]
        return Finding(f"{ratio:.2f} x, n={info['n']}", at_least(TIMES_PLAIN)(ratio))
    return None


def against_compiled(rows: Sequence[Row]) -> Finding | None:
    """Compare with the faster one of the compiled loops."""
    for info in infos(rows, "bench_schedule.py", what="schedule"):
        compiled = {name: ratio for name, ratio in info["times_as_fast"].items() if name != "plain"}
        if not compiled:
            return None
        each = ", ".join(f"{ratio:.2f} x {name}" for name, ratio in compiled.items())
        return Finding(f"{each}, n={info['n']}", at_least(TIMES_COMPILED)(min(compiled.values())))
    return None


def accuracy(rows: Sequence[Row]) -> Finding | None:
    """Compare the accuracy with the plain loop's."""
    if (info := parity(rows)) is None:
        return None
    text = f"{info['mean_accuracy']['fastres']:.4f} on {info['data']}, n={info['n']}"
    if info["twin"] is None or not is_identical(info["twin"]):
        return Finding(text, "not shown: the twin is not the loop, bit for bit")
    if min(info["n"], info["n_plain"]) < LEAST_SEEDS:
        return Finding(f"{text} and {info['n_plain']}", f"not shown: n below {LEAST_SEEDS}")
    plain, error = info["mean_accuracy"]["plain"], info["standard_error"]
    text += f"; plain {plain:.4f}, n={info['n_plain']}: {info['difference']:+.4f} ± {error:.4f}"
    return Finding(text, YES if not_lower(info) else NO)


def time_to_90(rows: Sequence[Row]) -> Finding | None:
    """Compare the time to 90 % with airbench's."""
    for info in infos(rows, "bench_peers.py", peer="airbench"):
        ours, theirs = (info[name]["mean_s"] for name in ("fastres", "airbench"))
        text = f"{ours:.3f} s to airbench's {theirs:.3f} s on {info['data']}, n={info['n']}"
        if info["n"] < LEAST_RUNS_TO_90:
            return Finding(text, f"not shown: n below {LEAST_RUNS_TO_90}")
        if not reaches_goal(info["fastres"]["p_value"]):
            return Finding(text, "not shown: 90 % is not shown")
        # A peer below 90 % had too few epochs, which is in the peer's favour.
        if ours >= theirs and not info["peer_averages_90"]:
            return Finding(text, f"not shown: airbench does not average 90 % in {info['epochs']} epochs")
        return Finding(text, YES if ours < theirs else NO)
    return None


def against_peer(peer: str, feed: str) -> Measured:
    """Compare ResNet-50's step with a peer's."""

    def found(rows: Sequence[Row]) -> Finding | None:
        for info in infos(rows, "bench_peers.py", peer=peer, feed=feed, compiled=True):
            text = f"{info['ratio']:.3f} x; {rate(info).lstrip()}, n={info['n']}"
            return Finding(text, at_least(TIMES_PEER)(info["ratio"]))
        return None

    return found


def kernels(rows: Sequence[Row]) -> Finding | None:
    """Compare the faster fused kernel of each shape with inductor's, forward and backward in a graph."""
    best: dict[tuple[Any, ...], float] = {}
    for info in infos(rows, "bench_kernels.py", direction="full", mode="graph", baseline="inductor"):
        if info["what"] in ("bn_relu", "bn_add_relu") and info["variant"] in ("two_pass", "cooperative"):
            shape = info["what"], *info["shape"], info["dtype"]
            best[shape] = max(info["ratio"], best.get(shape, 0.0))
    if not best:
        return None
    median, least = statistics.median(best.values()), min(best.values())
    text = f"median {median:.2f} x, least {least:.2f} x, {len(best)} shapes"
    return Finding(text, YES if median >= TIMES_INDUCTOR and least >= 1 else NO)


def graphed(rows: Sequence[Row]) -> Finding | None:
    """Report whether graphed steps are bitwise identical to ungraphed steps."""
    found = infos(rows, "bench_schedule.py", what="graphed")
    if not found:
        return None
    each = ", ".join(f"{info['precision']} after {info['steps']:,} steps" for info in found)
    return Finding(each, YES if all(map(is_identical, found)) else NO)


# The description of the measurement, the target, and the function that finds the measurement.
TARGETS: list[tuple[str, str, Measured]] = [
    ("ResNet-20, batch 128, 64,000 steps: training", "at most 30 s; stretch 20 s", whole_schedule),
    ("  against a plain eager fp32 loop", f"{TIMES_PLAIN:g} x", against_plain),
    ("  against torch.compile alone", f"{TIMES_COMPILED:g} x", against_compiled),
    ("  accuracy against plain fp32", "not lower by two standard errors, n=5", accuracy),
    ("time to 90 %, warm, against airbench's", "faster, n=25", time_to_90),
    *(
        (f"ResNet-50, bf16, 224 px, {feed}, against {peer}", f"{TIMES_PEER:.2f} x", against_peer(peer, feed))
        for feed in ("synthetic", "dali")
        for peer in ("timm", "torchvision, tuned by hand")
    ),
    (
        "BatchNorm + ReLU (+ add), fused, against inductor's",
        f"{TIMES_INDUCTOR:g} x on most shapes, never below 1",
        kernels,
    ),
    ("graphed steps compute what ungraphed ones do", "every bit", graphed),
]


def lines(rows: Sequence[Row]) -> list[str]:
    """Return the table, one line per target."""
    table = []
    for what, needed, measured in TARGETS:
        finding = measured(rows) or Finding("", NOT_MEASURED)
        table.append(f"{what:<72}  {needed:<38}  {finding.verdict:<12}  {finding.text}".rstrip())
    return table
