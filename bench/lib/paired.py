"""fastres.utils.timing's regions in turns, A B A B, as a benchmark of pytest-benchmark: only the ratio is a claim."""

from __future__ import annotations

from typing import Any

import torch

from fastres.utils.timing import Region, Timing, time_region


def interleaved(benchmark: Any, baseline: Region, region: Region, images: int, rounds: int) -> None:
    """Times both, each over that many images, and leaves images/s and the ratio in extra_info. Both are warm."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    baseline_s: list[float] = []
    region_s: list[float] = []
    benchmark.pedantic(
        lambda: region_s.append(time_region(region, device)),
        # ahead of each round, outside of its time
        setup=lambda: baseline_s.append(time_region(baseline, device)),
        rounds=rounds,
    )
    ours, theirs = Timing(tuple(region_s)), Timing(tuple(baseline_s))
    images_per_s, *quantiles = ours.rates(images)
    ratio = ours.ratio_to(theirs)
    benchmark.extra_info.update(
        images_per_s=images_per_s,
        images_per_s_20_80=quantiles,
        baseline_images_per_s=images / theirs.median_s,
        baseline_s=baseline_s,
        # of the medians, and of each pair of neighbours: the second tells how steady the first is
        ratio=ratio.of_medians,
        ratios=list(ratio.of_pairs),
        n=ours.n,
    )
