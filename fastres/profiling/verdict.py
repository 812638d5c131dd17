"""Decide from a run's measured times what limits it, and say it in one sentence with the remedy.

The rule, over the times of one step (Times):

1. A loader that works beside the step limits the run if it is slower than the step by EDGE, and the run is slower than
   the step by EDGE too. If the loader is neither faster nor slower than the step by EDGE, both limit the run.
2. Otherwise the run's time is divided into the time that it loses to its loader, and the step's own parts. The largest
   part limits the run, and so does every part that is smaller by less than EDGE.

The same rule is applied to each round, so that the sentence can tell how many rounds agree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastres.config.schema import Config

EDGE = 1.25  # times that differ by a smaller factor are about equal
FAR = 0.2  # an operator that reaches a smaller share of its side of the roofline is limited by something else
PARTS_OF_STEP = ("compute", "memory", "launches", "slow")
NAMES = {
    "loader": "the loader",
    "launches": "launches",
    "memory": "memory bandwidth",
    "compute": "compute",
    "slow": "slow operators",
}
# By limit, the settings of which auto's choice may be better than an explicit value.
SETTINGS_OF = {
    "loader": (),
    "launches": ("engine.compile", "engine.cuda_graph"),
    "memory": ("engine.precision", "engine.channels_last", "model.norm", "engine.compile"),
    "compute": ("engine.precision", "engine.channels_last", "engine.conv", "engine.compile"),
    "slow": ("engine.precision", "engine.channels_last", "model.norm", "engine.conv", "engine.compile"),
}


# ------------------------------------------------------------------------------------------- the rule


@dataclass(frozen=True, kw_only=True)
class Times:
    """The seconds of one step of a run."""

    run: float  # with the run's own loader
    step: float  # with batches that are on the device already
    loader: float  # of the loader alone, for one batch
    overlaps: bool  # the loader works beside the step: in other processes or threads
    loader_cores: int  # processes or threads of the loader
    # The parts of `step`, whose sum it is.
    compute: float  # operators that compute, and reach a good part of the rate of a matrix product
    memory: float  # operators that move data, and reach a good part of the rate of a copy
    launches: float  # no operator runs
    slow: float  # operators that reach little of either rate

    @property
    def lost(self) -> float:
        """Return the seconds that the run takes longer than the step, up to the time of the loader's work on one core.

        A larger difference is `disturbed`.
        """
        return min(max(0.0, self.run - self.step), self.loader * self.loader_cores)

    @property
    def disturbed(self) -> float:
        """Return the seconds that neither the step nor the loader explains: those of other load on the machine."""
        return max(0.0, self.run - self.step - self.lost)

    def share(self, limit: str) -> float:
        """Return the share of the run's time that a limit, or "disturbed", takes."""
        seconds: float = self.lost if limit == "loader" else getattr(self, limit)
        return seconds / (self.step + self.lost + self.disturbed)


def limits_of(times: Times) -> tuple[str, ...]:
    """Return the names of what limits a run by the rule above, the largest first; several if they are about equal."""
    of_step = {name: times.share(name) for name in PARTS_OF_STEP}
    if times.overlaps:
        if min(times.loader, times.run) >= EDGE * times.step:
            return ("loader",)
        if EDGE * times.loader >= times.step:
            return ("loader", *_largest(of_step))
    return _largest({"loader": times.share("loader"), **of_step})


def _largest(shares: Mapping[str, float]) -> tuple[str, ...]:
    """Return the names of the largest share and of those about equal to it, in descending order."""
    least = max(shares.values()) / EDGE
    return tuple(sorted((name for name, share in shares.items() if share > least), key=lambda name: -shares[name]))


@dataclass(frozen=True)
class Verdict:
    """Limits of a run, and the number of its rounds that agree."""

    limits: tuple[str, ...]
    agreeing: int
    rounds: int


def verdict_of(median: Times, rounds: Sequence[Times]) -> Verdict:
    """Return the verdict by the medians, and the number of rounds whose own times give the same limits."""
    limits = limits_of(median)
    return Verdict(limits, sum(set(limits_of(times)) == set(limits) for times in rounds), len(rounds))


# ------------------------------------------------------------------------------------------- the sentence


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The figures and settings that the sentence names."""

    times: Times
    batch: int  # images of a step
    launches: float  # kernels of a step on a GPU, operators on a CPU
    reached: Mapping[str, float | None]  # by compute and memory: the share of the rate measured on this device
    slowest: str  # the operator that takes most of Times.slow
    config: Config
    on_gpu: bool
    captured: bool  # a step is one CUDA graph
    cpus: int
    better: Mapping[str, str]  # by setting with an explicit value, the flag for auto's choice, if that differs


def sentence(verdict: Verdict, evidence: Evidence) -> str:
    """Return the limits, how many rounds agree, the figures, and the remedies in one sentence."""
    named = [NAMES[limit] for limit in verdict.limits]
    several = len(named) > 1
    subject = " and ".join(filter(None, (", ".join(named[:-1]), named[-1])))
    plural = several or verdict.limits[0] in ("launches", "slow")
    verb = f"limit{'' if plural else 's'} this run{' about equally' if several else ''}"
    facts = "; ".join(FACTS[limit](evidence) for limit in verdict.limits)
    remedies = "; ".join(dict.fromkeys(remedy(limit, evidence) for limit in verdict.limits))
    sure = f"{verdict.agreeing} of {verdict.rounds} rounds agree"
    return f"{subject[0].upper()}{subject[1:]} {verb} ({sure}): {facts}. Remedy: {remedies}."


def _loader_fact(evidence: Evidence) -> str:
    times, batch = evidence.times, evidence.batch
    if times.overlaps and EDGE * times.loader >= times.step:
        alone, possible = batch / times.loader, batch / times.step
        return f"the loader makes {alone:,.0f} images/s alone, the step could take {possible:,.0f}"
    device = "GPU" if evidence.on_gpu and not times.overlaps else "CPU"
    return (
        f"the step takes {batch / times.step:,.0f} images/s without the loader and {batch / times.run:,.0f} with it, "
        f"because both need the {device}"
    )


def _launches_fact(evidence: Evidence) -> str:
    share = f"{evidence.times.share('launches'):.0%}"
    if evidence.on_gpu:
        return f"the GPU is idle for {share} of the time while the CPU launches {evidence.launches:,.0f} kernels a step"
    return f"{share} of the time passes between the {evidence.launches:,.0f} operators of a step"


def _work_fact(limit: str, doing: str, rate: str, evidence: Evidence) -> str:
    reached = evidence.reached[limit]
    at = "" if reached is None else f", at {reached:.0%} of the rate of a large {rate}"
    return f"operators that mostly {doing} take {evidence.times.share(limit):.0%} of the time{at}"


FACTS: dict[str, Callable[[Evidence], str]] = {
    "loader": _loader_fact,
    "launches": _launches_fact,
    "memory": lambda evidence: _work_fact("memory", "move data", "copy", evidence),
    "compute": lambda evidence: _work_fact("compute", "compute", "matrix product", evidence),
    "slow": lambda evidence: (
        f"{evidence.times.share('slow'):.0%} of the time is in operators that reach less than {FAR:.0%} of the rate of "
        f"a copy or a matrix product, most in {evidence.slowest}"
    ),
}


def remedy(limit: str, evidence: Evidence) -> str:
    """Return the settings to change against a limit."""
    found = [evidence.better[name] for name in SETTINGS_OF[limit] if name in evidence.better]
    if limit == "loader":
        found = _loader_remedies(evidence)
    elif limit == "launches":
        if evidence.on_gpu and not evidence.captured and evidence.config.data.loader != "resident":
            found.append("--data.loader resident, with which a step becomes one CUDA graph")
        found.append("a larger --train.batch_size")
    elif limit == "slow":
        found.append("a larger --train.batch_size")
    elif not found:
        found = ["a smaller network, smaller images, or a faster device"]
    return ", or ".join(found)


def _loader_remedies(evidence: Evidence) -> list[str]:
    data = evidence.config.data
    if data.loader == "resident":
        return ["less augmentation (--data.augment, --data.cutout, --data.mixup, --data.cutmix)"]
    found = []
    if data.workers < evidence.cpus:
        found.append(f"more --data.workers ({data.workers} now, of {evidence.cpus} CPU cores)")
    if data.augment != "resized_crop":
        found.append("--data.loader resident if the images fit in memory")
    elif data.loader != "dali":
        found.append("--data.loader dali")
    if data.source == "imagefolder" and data.augment == "resized_crop":
        found.append("image files that are stored smaller")
    return found or ["a machine with more CPU cores"]
