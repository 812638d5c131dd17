"""The one timer: interleaved regions of many steps, with a host-device synchronisation at both ends and none inside.

Synchronising inside a region would hide what a graph or an early launch gains. If one region were measured after the
other, a drift of the clocks would look like a difference. Interleaved in a fixed order, A B A B, both regions get the
drift, so only their ratio is a claim.
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
    """The speed relative to a baseline: above 1 is faster."""

    of_medians: float
    of_pairs: tuple[float, ...]  # the ratio in each round; the spread shows how steady of_medians is


@dataclass(frozen=True)
class Timing:
    """The seconds of each round, in their order."""

    seconds: tuple[float, ...]

    @property
    def n(self) -> int:
        """Return the number of rounds."""
        return len(self.seconds)

    @property
    def median_s(self) -> float:
        """Return the median."""
        return statistics.median(self.seconds)

    @property
    def quantiles_s(self) -> tuple[float, float]:
        """Return the 20 and 80 % quantiles."""
        low, high = np.quantile(self.seconds, (0.2, 0.8))
        return float(low), float(high)

    def rates(self, units: float) -> tuple[float, float, float]:
        """Return the median, 20 and 80 % quantiles of units per second, if each round took `units` units."""
        low_s, high_s = self.quantiles_s
        return units / self.median_s, units / high_s, units / low_s

    def ratio_to(self, baseline: Timing) -> Ratio:
        """Return the speed relative to a baseline whose rounds were interleaved with these.

        Raises:
            ValueError: if the numbers of rounds differ.
        """
        pairs = zip(baseline.seconds, self.seconds, strict=True)
        return Ratio(baseline.median_s / self.median_s, tuple(theirs / ours for theirs, ours in pairs))

    def to_dict(self) -> dict[str, Any]:
        """Return the figures, for JSON."""
        low_s, high_s = self.quantiles_s
        return {"median_s": self.median_s, "s_20_80": [low_s, high_s], "n": self.n, "seconds": list(self.seconds)}


def wait_for(device: torch.device) -> None:
    """Synchronise with the device. A CPU needs no synchronisation."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_region(region: Region, device: torch.device) -> float:
    """Return the seconds of one run of the region, from an idle device to an idle device."""
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
    """Run the regions interleaved in their order, and time them.

    Args:
        regions: the regions by name.
        rounds: measured runs of each region.
        device: is synchronised at both ends of each run.
        warm_up: runs of each region before the measured ones.
        before: is called with a region's name before each of its runs and outside of its time, for switches that
            belong to the whole process.
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
    """Time named parts inside a region without a host-device synchronisation: by CUDA events, or a CPU's clock."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: dict[str, list[tuple[Any, Any]]] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time the block as one run of this part."""
        start = self._now()
        yield
        self._marks.setdefault(name, []).append((start, self._now()))

    def read(self) -> dict[str, tuple[float, ...]]:
        """Return the seconds of each run of each part since the last reading. It synchronises with the device."""
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
        seconds: float = end - start if self.device.type != "cuda" else start.elapsed_time(end) / 1000
        return seconds


@contextmanager
def gc_paused() -> Iterator[None]:
    """Collect garbage before the block and pause the collector inside, so that no collection is timed."""
    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
