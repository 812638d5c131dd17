"""Measure the cost of a training step by batch size, depth and number of processes.

    pytest bench/bench_scaling.py --benchmark-only

The sweeps show where the engine stops being bound by launches, and separate fixed from growing cost. Sizes run
interleaved within one benchmark. Processes are real ones under torchrun, on the machine's cores or GPUs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]  # torch does not list it in __all__

from bench.lib.workloads import GPU, Net, engine_for, engine_training
from fastres.training.step import raise_recompile_limit
from fastres.utils.timing import interleaved

BATCHES = (32, 64, 128, 256, 512, 1_024, 2_048, 4_096) if GPU else (16, 32, 64, 128, 256)
DEPTHS = (20, 32, 44, 56, 110)
ROUNDS = 15 if GPU else 7
STEPS = 200 if GPU else 2  # of a round; many on a GPU, because a round's start and end take as long as a few steps


def net(depth: int, batch: int) -> Net:
    return Net(name=f"resnet{depth}", batch=batch, side=32)


SWEEPS: dict[str, dict[int, Net]] = {
    "batch": {batch: net(20, batch) for batch in BATCHES},
    "depth": {depth: net(depth, 128) for depth in DEPTHS},
}


@pytest.mark.parametrize("sweep", SWEEPS)
def bench_step(benchmark: Any, sweep: str) -> None:
    engine = engine_for()
    raise_recompile_limit(2 * len(SWEEPS[sweep]))
    regions = {str(size): partial(engine_training(one), STEPS) for size, one in SWEEPS[sweep].items()}
    timings = benchmark.pedantic(lambda: interleaved(regions, ROUNDS, engine.device), rounds=1)
    sizes = list(SWEEPS[sweep])
    step_s = [timings[str(size)].median_s / STEPS for size in sizes]
    slope_s, fixed_s = np.polyfit(sizes, step_s, 1)
    benchmark.extra_info.update(
        sweep=sweep,
        sizes=sizes,
        step_s=step_s,
        step_s_20_80=[[q / STEPS for q in timings[str(size)].quantiles_s] for size in sizes],
        images_per_s=[one.batch / s for one, s in zip(SWEEPS[sweep].values(), step_s, strict=True)],
        fixed_s=float(fixed_s),  # of the straight line through all sizes
        slope_s=float(slope_s),
        n=ROUNDS,
        precision=engine.precision,
    )


# By name: fields of both sides, and more fields of one side. DDP runs without graphs, so both sides do.
COSTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "DDP on one process": ({"cuda_graph": False}, {"ddp": True}),
    "engine.deterministic": ({}, {"deterministic": True}),
}


@pytest.mark.parametrize("what", COSTS)
def bench_cost(benchmark: Any, what: str) -> None:
    """Measure the cost of a setting: ResNet-20 without and with it, interleaved."""
    engine = engine_for()
    dist.init_process_group("nccl" if GPU else "gloo", store=HashStore())
    try:
        both, more = COSTS[what]
        sides = {"without": both, "with": both | more}
        regions = {name: partial(engine_training(net(20, 128), **how), STEPS) for name, how in sides.items()}
        timings = benchmark.pedantic(lambda: interleaved(regions, 3 * ROUNDS, engine.device), rounds=1)
    finally:
        dist.destroy_process_group()
        engine.apply_torch_settings()  # ends deterministic algorithms
    ratio = timings["without"].ratio_to(timings["with"])
    benchmark.extra_info.update(
        sweep="cost",
        what=what,
        ratio=ratio.of_medians,
        ratio_20_80=[float(q) for q in np.quantile(ratio.of_pairs, (0.2, 0.8))],
        step_s={name: timing.median_s / STEPS for name, timing in timings.items()},
        raw_s={name: list(timing.seconds) for name, timing in timings.items()},
        n=timings["with"].n,
        precision=engine.precision,
    )


def bench_processes(benchmark: Any, tmp_path: Path) -> None:
    """Run one global batch on 1, 2, 4 ... processes that divide the cores, or have a GPU each.

    One process runs without a CUDA graph too, because several processes cannot have one.
    """
    available = torch.cuda.device_count() if GPU else os.cpu_count() or 1
    counts = [count for count in (1, 2, 4, 8) if count <= available]
    if len(counts) == 1:
        pytest.skip(f"only one {'GPU' if GPU else 'CPU'}, so there is nothing to divide")
    rates: dict[str, list[float]] = {str(count): [] for count in counts}

    def run(count: int, turn: int) -> float:
        steps, folder = 6_000 if GPU else 24, tmp_path / f"{count}-{turn}"
        launch = f"-m torch.distributed.run --standalone --nproc_per_node {count} -m fastres.train"
        flags = f"--data.source synthetic --data.augment none --engine.cuda_graph false --train.steps {steps}"
        done = subprocess.run(
            [sys.executable, *launch.split(), *flags.split(), "--run.dir", str(folder)],
            env={**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count))},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        return float(summary["images_per_s"])

    def interleaved_runs() -> None:
        for turn in range(3):
            for count in counts:
                rates[str(count)].append(run(count, turn))

    benchmark.pedantic(interleaved_runs, rounds=1)
    medians = [float(np.median(rates[str(count)])) for count in counts]
    benchmark.extra_info.update(
        sweep="processes", sizes=counts, images_per_s=medians, raw_images_per_s=rates, n=3,
        ratio=[rate / medians[0] for rate in medians],
    )  # fmt: skip
