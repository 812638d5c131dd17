"""Measure a training step's kernels on a GPU, and the gaps between them.

    pytest bench/bench_kernel_times.py --benchmark-only

The profiler of torch traces many steps of the engine in a row, as in training, and ResNet-20's steps make their batches
too. The profiler slows down the host but not the kernels, so kernels plus gaps take longer than a step without the
profiler, which is measured as well. It has not yet run on a GPU.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.lib.workloads import DEVICE, GPU, Net, engine_for, engine_training
from fastres.profiling import trace
from fastres.utils.timing import interleaved, wait_for

NETS = {
    "resnet20": Net(name="resnet20", batch=128, side=32),
    "resnet20, convolutions": Net(name="resnet20", batch=128, side=32, options=(("fused_convolutions", True),)),
    "resnet50": Net(name="resnet50", batch=256, side=224, classes=1_000),
}
# The network and its norm: the engine's choice, and for ResNet-20 also its alternatives.
CASES = [
    ("resnet20", "auto"),
    ("resnet20", "torch"),
    ("resnet20", "fused"),
    ("resnet20, convolutions", "fused"),
    ("resnet50", "auto"),
]
WARM_UP, TRACED, ROUNDS = 20, 20, 10
# Steps of a round, by the side of the images: many, because the draws of the first block precede all steps.
TIMED = {32: 1_000, 224: 100}


@pytest.mark.skipif(not GPU, reason="a CPU has no kernels: fastres profile shows its operators")
@pytest.mark.parametrize(("name", "norm"), CASES)
def bench_kernel_times(benchmark: Any, tmp_path: Path, name: str, norm: str) -> None:
    net, engine = NETS[name], engine_for(norm=norm)
    take = engine_training(net, norm=norm, with_data=net.side == 32)
    take(WARM_UP)
    timed = TIMED[net.side]
    timing = interleaved({name: partial(take, timed)}, ROUNDS, DEVICE)[name]
    benchmark.extra_info.update(
        model=name,
        batch=net.batch,
        precision=engine.precision,
        norm=engine.norm,
        step_us=1e6 * timing.median_s / timed,
        step_us_20_80=[1e6 * s / timed for s in timing.quantiles_s],
        n=ROUNDS,
    )
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities):
        take(1)  # the first one starts the tracer
    path = tmp_path / "trace.json.gz"

    def traced() -> None:
        with torch.profiler.profile(activities=activities) as profiler:
            take(TRACED)
            wait_for(DEVICE)
        profiler.export_chrome_trace(str(path))

    benchmark.pedantic(traced, rounds=1)
    benchmark.extra_info.update(kernel_times(trace.load(path), TRACED))


def kernel_times(events: list[trace.Event], steps: int) -> dict[str, Any]:
    """Return the kernels and gaps of a trace, each figure for one of its `steps` steps, in us.

    A gap is time between the first kernel's start and the last kernel's end in which nothing runs on the GPU.
    """
    kernels = [event for event in events if event.get("cat") in trace.KERNELS]
    kernels.sort(key=lambda event: event["ts"])
    by_name: dict[str, list[float]] = defaultdict(list)
    # A trace without kernels raises no error, because an error would lose the step's time.
    start = kernels[0]["ts"] if kernels else 0.0
    gaps, busy_until = list[float](), start
    for kernel in kernels:
        by_name[kernel["name"]].append(kernel["dur"])
        if kernel["ts"] > busy_until:
            gaps.append(kernel["ts"] - busy_until)
        busy_until = max(busy_until, kernel["ts"] + kernel["dur"])
    span = busy_until - start
    rows = [
        {"name": name, "calls": len(us) / steps, "us": sum(us) / steps, "median_us": statistics.median(us)}
        for name, us in by_name.items()
    ]
    return {
        "traced_steps": steps,
        "kernels": len(kernels) / steps,
        "span_us": span / steps,
        "busy_us": (span - sum(gaps)) / steps,
        "gaps_us": sum(gaps) / steps,
        "gaps": len(gaps) / steps,
        "largest_gaps_us": sorted(gaps, reverse=True)[:10],
        "by_kernel": sorted(rows, key=lambda row: -row["us"]),
    }
