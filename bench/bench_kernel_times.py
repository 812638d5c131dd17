"""Where the time of a training step goes on a GPU: its kernels by time, and the gaps between them.

    pytest bench/bench_kernel_times.py --benchmark-only

Steps of the engine under torch's profiler, many in a row, as in training, those of ResNet-20 with the making of their
batches. The profiler slows the host down and not the kernels, so the time of a step without it is measured too: kernels
plus gaps can only be more. Not yet run on a GPU.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.lib.workloads import DEVICE, Net, engine_for, engine_training
from fastres.profiling import trace
from fastres.utils.timing import interleaved, wait_for

GPU = torch.cuda.is_available()
NETS = {
    "resnet20": Net(name="resnet20", batch=128, side=32),
    "resnet20, convolutions": Net(
        name="resnet20", batch=128, side=32, options=(("fused_convolutions", True),)
    ),
    "resnet50": Net(name="resnet50", batch=256, side=224, classes=1_000),
}
# And the norm: the engine's choice, and of ResNet-20 what there is to choose from, in the network and its graph.
CASES = [
    ("resnet20", "auto"),
    ("resnet20", "torch"),
    ("resnet20", "fused"),
    ("resnet20, convolutions", "fused"),
    ("resnet50", "auto"),
]
WARM_UP, TRACED, ROUNDS = 20, 20, 10
# Steps of a round, by the side of the images: many, for the draws of the first block are made before any step runs.
TIMED = {32: 1_000, 224: 100}
SHOWN = 25  # kernels in the table; the JSON has all


@pytest.mark.skipif(not GPU, reason="a CPU has no kernels: python -m fastres.profile shows its operators")
@pytest.mark.parametrize(("name", "norm"), CASES)
def bench_kernel_times(benchmark: Any, tmp_path: Path, name: str, norm: str) -> None:
    net, (_, engine) = NETS[name], engine_for(norm=norm)
    take = engine_training(net, norm=norm, with_data=net.side == 32)
    take(WARM_UP)
    timed = TIMED[net.side]
    timing = interleaved({name: lambda: take(timed)}, ROUNDS, DEVICE)[name]
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
    """Of a trace of `steps` steps, each figure that of one step, in us.

    A gap is time in which nothing runs on the GPU, from the start of the first kernel to the end of the last.
    """
    kernels = sorted(
        (event for event in events if event.get("cat") in trace.KERNELS), key=lambda event: event["ts"]
    )
    by_name: dict[str, list[float]] = defaultdict(list)
    # A tracer that saw none must not cost the time that was measured.
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


def summary(infos: list[dict[str, Any]]) -> list[str]:
    lines = []
    for info in infos:
        low, high = info["step_us_20_80"]
        lines += [
            f"{info['model']} at batch {info['batch']} in {info['precision']}, norm {info['norm']}: "
            f"{info['step_us']:,.1f} us a step ({low:,.1f} to {high:,.1f}), n={info['n']}",
            f"  traced: {info['kernels']:,.1f} kernels, busy {info['busy_us']:,.1f} us, {info['gaps']:,.1f} gaps of "
            f"{info['gaps_us']:,.1f} us together; a mean of {info['traced_steps']} steps",
        ]
        for row in info["by_kernel"][:SHOWN]:
            share = row["us"] / info["busy_us"]
            lines.append(f"  {row['us']:>8,.1f} us {share:>4.0%} {row['calls']:>6,.1f} x  {row['name'][:70]}")
        if rest := info["by_kernel"][SHOWN:]:
            lines.append(f"  {sum(row['us'] for row in rest):>8,.1f} us       in {len(rest)} more kernels")
    return lines
