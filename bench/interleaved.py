"""Two regions in turns, A B A B: whatever the machine does meanwhile happens to both, and only the ratio is a claim."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np


def interleaved(
    benchmark: Any, baseline: Callable[[], None], region: Callable[[], None], images: int, rounds: int
) -> None:
    """Times both, each over that many images, and leaves images/s and the ratio in extra_info. Both are warm."""
    baseline_s: list[float] = []

    def time_baseline() -> None:  # pedantic calls it before each round, outside of its own timer
        start = time.perf_counter()
        baseline()
        baseline_s.append(time.perf_counter() - start)

    benchmark.pedantic(region, setup=time_baseline, rounds=rounds)
    region_s = benchmark.stats.stats.data
    low, high = np.quantile(images / np.array(region_s), (0.2, 0.8))
    benchmark.extra_info.update(
        images_per_s=images / statistics.median(region_s),
        images_per_s_20_80=[float(low), float(high)],
        baseline_images_per_s=images / statistics.median(baseline_s),
        baseline_s=baseline_s,
        # of the medians, and of each pair of neighbours: the second tells how steady the first is
        ratio=statistics.median(baseline_s) / statistics.median(region_s),
        ratios=[b / r for b, r in zip(baseline_s, region_s, strict=True)],
        n=len(region_s),
    )
