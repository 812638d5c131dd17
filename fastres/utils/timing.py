"""The one timer: regions of many steps in turns, the device waited for at both ends of a region and never inside.

Waiting inside hides what a graph or an early launch gains. Measuring one region after the other takes a drift of the
clocks for a difference; A B A B in a fixed order gives it to both, and only their ratio is a claim.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

Region = Callable[[], object]


@dataclass(frozen=True)
class Ratio:
    """How many times as fast as a baseline: above 1 is faster."""

    of_medians: float
    of_pairs: tuple[float, ...]  # of neighbours in time: how steady the first figure is


@dataclass(frozen=True)
class Timing:
    """What was measured, in the order of the rounds."""

    seconds: tuple[float, ...]

    @property
    def n(self) -> int:
        return len(self.seconds)

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quantiles_s(self) -> tuple[float, float]:
        """20 and 80 %."""
        low, high = np.quantile(self.seconds, (0.2, 0.8))
        return float(low), float(high)

    def rates(self, units: float) -> tuple[float, float, float]:
        """Units per second, where each round took that many: median, 20 and 80 %."""
        low_s, high_s = self.quantiles_s
        return units / self.median_s, units / high_s, units / low_s

    def ratio_to(self, baseline: Timing) -> Ratio:
        """Of rounds that were taken in turns with these."""
        pairs = zip(baseline.seconds, self.seconds, strict=True)
        return Ratio(baseline.median_s / self.median_s, tuple(theirs / ours for theirs, ours in pairs))

    def to_dict(self) -> dict[str, Any]:
        low_s, high_s = self.quantiles_s
        return {
            "median_s": self.median_s,
            "s_20_80": [low_s, high_s],
            "n": self.n,
            "seconds": list(self.seconds),
        }


def wait_for(device: torch.device) -> None:
    """Until the device has done all that it was given. A CPU has, always."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_region(region: Region, device: torch.device) -> float:
    """One run of the region, from an idle device to an idle device."""
    wait_for(device)
    start = time.perf_counter()
    region()
    wait_for(device)
    return time.perf_counter() - start


def interleaved(
    regions: Mapping[str, Region],
    rounds: int,
    device: torch.device,
    *,
    warm_up: int = 1,
    before: Callable[[str], object] = lambda name: None,
) -> dict[str, Timing]:
    """Runs the regions in turns, in their order, `rounds` times each, after `warm_up` times unmeasured.

    `before` is called with a region's name ahead of each of its turns, outside of its time: for switches that belong
    to the whole process.
    """
    seconds: dict[str, list[float]] = {name: [] for name in regions}
    for turn in range(-warm_up, rounds):
        for name, region in regions.items():
            before(name)
            taken_s = time_region(region, device)
            if turn >= 0:
                seconds[name].append(taken_s)
    return {name: Timing(tuple(taken_s)) for name, taken_s in seconds.items()}


class Stopwatch:
    """Times named parts inside a region without waiting for the device: by CUDA events, on a CPU by its clock."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: dict[str, list[tuple[Any, Any]]] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = self._now()
        yield
        self._marks.setdefault(name, []).append((start, self._now()))

    def read(self) -> dict[str, tuple[float, ...]]:
        """Seconds of each part, every time that it ran since the last reading. Waits for the device."""
        wait_for(self.device)
        marks, self._marks = self._marks, {}
        return {name: tuple(self._seconds(*pair) for pair in pairs) for name, pairs in marks.items()}

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, start: Any, end: Any) -> float:
        return end - start if self.device.type != "cuda" else start.elapsed_time(end) / 1000


@contextmanager
def gc_paused() -> Iterator[None]:
    """Garbage is collected before and not inside, where what it frees would be taken for a part of the work."""
    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
