"""Interleaved measurements as benchmarks of pytest-benchmark. Only the ratio of interleaved regions is a result."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.lib.workloads import DEVICE, Net, Steps
from fastres.utils.hardware import measured_matmul, peaks_of
from fastres.utils.timing import Region, Timing, time_region

ROUND_S = 0.4  # of the engine: long compared with the timer and one synchronisation, short compared with a drift
BUDGET_S = 14.0  # of a comparison, without its warm-up
ROUNDS = (9, 15)  # at least, at most


def benchmark_interleaved(benchmark: Any, timers: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, Timing]:
    """Call the timers interleaved, `rounds` times each. pytest-benchmark's own figures are the last timer's.

    Args:
        benchmark: pytest-benchmark's fixture.
        timers: the timers by name; each runs a warm region once and returns its seconds.
        rounds: the number of rounds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    *baselines, last = timers

    def take(*names: str) -> None:
        for name in names:
            seconds[name].append(timers[name]())

    # pytest-benchmark does not time the setup, which runs before each round.
    benchmark.pedantic(lambda: take(last), setup=lambda: take(*baselines), rounds=rounds)
    return {name: Timing(tuple(taken_s)) for name, taken_s in seconds.items()}


def paired_benchmark(benchmark: Any, baseline: Region, region: Region, images: int, rounds: int) -> None:
    """Time both warm regions interleaved, and write images/s and the ratio to extra_info.

    Args:
        benchmark: pytest-benchmark's fixture.
        baseline: runs first in each round.
        region: is compared with the baseline.
        images: the number of images of each region.
        rounds: the number of rounds.
    """
    timers = {"baseline": partial(time_region, baseline, DEVICE), "ours": partial(time_region, region, DEVICE)}
    theirs, ours = benchmark_interleaved(benchmark, timers, rounds).values()
    images_per_s, *quantiles = ours.rates(images)
    ratio = ours.ratio_to(theirs)
    benchmark.extra_info.update(
        images_per_s=images_per_s,
        images_per_s_20_80=quantiles,
        baseline_images_per_s=images / theirs.median_s,
        baseline_s=list(theirs.seconds),
        # The ratio of the medians, and of each pair of neighbours, which show how steady the first is.
        ratio=ratio.of_medians,
        ratios=list(ratio.of_pairs),
        n=ours.n,
    )


def compare(
    benchmark: Any,
    net: Net,
    build_baseline: Callable[[], Steps],
    ours: Steps,
    *,
    training: bool,
    precision: str,
    **facts: Any,
) -> None:
    """Time both interleaved, for as many rounds as fit in BUDGET_S, and write the tables' figures to extra_info."""
    ours(2)
    memory = peak_memory(ours)  # before the baseline occupies memory too
    baseline = build_baseline()
    for warm_up in (baseline, ours):
        warm_up(2)
    step_s, baseline_s = (time_region(partial(steps, 1), DEVICE) for steps in (ours, baseline))
    n = max(1, round(ROUND_S / step_s))
    low, high = ROUNDS
    rounds = min(high, max(low, int(BUDGET_S / (n * (step_s + baseline_s)))))
    paired_benchmark(benchmark, partial(baseline, n), partial(ours, n), n * net.batch, rounds)
    flops_per_s = benchmark.extra_info["images_per_s"] * flops_per_image(net, training)
    peaks = peaks_of(DEVICE)
    peak = peaks.flops.get(precision) if peaks else None
    product = measured_matmul(DEVICE, precision) if peaks is None else None  # FLOP/s of a device without a data sheet
    benchmark.extra_info.update(
        model=net.name,
        batch=net.batch,
        side=net.side,
        training=training,
        precision=precision,
        steps_per_round=n,
        gflop_per_s=flops_per_s / 1e9,
        share_of_peak=flops_per_s / peak if peak else None,
        share_of_product=flops_per_s / product if product else None,
        peak_memory_bytes=memory,
        **facts,
    )


def peak_memory(steps: Steps) -> int | None:
    """Return the most bytes that a step allocates on a GPU.

    The result is None on a CPU, because torch does not count its memory, and for a replay, which allocates nothing
    because its memory belongs to the graph.
    """
    if DEVICE.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(DEVICE)
    allocations = torch.cuda.memory_stats(DEVICE)["allocation.all.allocated"]
    steps(1)
    if torch.cuda.memory_stats(DEVICE)["allocation.all.allocated"] == allocations:
        return None
    return torch.cuda.max_memory_allocated(DEVICE)


@cache
def flops_per_image(net: Net, training: bool) -> int:
    """Count the FLOP of convolutions and matrix products on meta tensors. A multiply-add counts as two."""
    model = net.build().train(training).to("meta")  # built on the CPU, because some networks cannot be built on meta
    with torch.device("meta"):
        images = torch.empty(2, net.channels, net.side, net.side)
        without_grad = contextlib.nullcontext() if training else torch.no_grad()
        with FlopCounterMode(display=False) as counter, without_grad:
            logits = model(images)
            if training:
                logits.sum().backward()
    flops: int = counter.get_total_flops()
    return flops // 2
