"""Compare inductor's settings: the engine's training step under each, interleaved with the step under none.

    pytest bench/bench_compile.py --benchmark-only             the settings one by one
    pytest bench/bench_compile.py --benchmark-only --full      on a CPU too, where compiling takes minutes

A setting that gains more than its spread on all networks belongs in the engine; any other goes to docs/EXPERIMENTS.md.
The first call compiles and tunes, which is the setting's cost. It has not yet run on a GPU.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from bench.lib.paired import paired_benchmark
from bench.lib.workloads import DEVICE, GPU, Net, Steps, engine_for, engine_training
from fastres.utils.timing import time_region

NETS = {
    "resnet20": Net(name="resnet20", batch=128, side=32),
    "resnet50": Net(name="resnet50", batch=256 if GPU else 8, side=224, classes=1_000),
}
ROUND_S, ROUNDS = 0.4, 15
# By name: options of torch.compile. "nothing" compared with itself shows how steady the machine is.
SETTINGS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "layout optimisation off": {"layout_optimization": False},
    "layout optimisation forced": {"force_layout_optimization": True},
    "max-autotune": {"max_autotune": True},
    "max-autotune, pointwise only": {"max_autotune_pointwise": True},
    "coordinate descent": {"coordinate_descent_tuning": True},
    "max-autotune and coordinate descent": {"max_autotune": True, "coordinate_descent_tuning": True},
    "fusion up to 16 nodes": {"max_fusion_size": 16},
    "fusion up to 256 nodes": {"max_fusion_size": 256},
    "fusion benchmarked": {"benchmark_fusion": True},
    "fusion aggressive": {"aggressive_fusion": True},
    "kernels combined": {"combo_kernels": True},
    "reads realised at 8": {"realize_reads_threshold": 8},
    "reductions cooperative": {"triton.cooperative_reductions": True},
    "reductions not persistent": {"triton.persistent_reductions": False},
    "kernels in variants": {"triton.multi_kernel": 1},
}


# A string, because pytest evaluates it once it knows its options.
@pytest.mark.skipif(
    "not GPU and not config.option.full", reason="the engine does not compile on a CPU: --full measures it"
)
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", NETS)
def bench_setting(benchmark: Any, name: str, settings: str) -> None:
    net, options, engine = NETS[name], SETTINGS[settings], engine_for(compile=True)
    steps: list[Steps] = []

    def first(chosen: dict[str, Any]) -> None:
        """Build and run one step. A graph's work is compiled when the step is built, before its first call."""
        steps.append(engine_training(net, compile=True, inductor=chosen))
        steps[-1](1)

    first_s = [time_region(partial(first, chosen), DEVICE) for chosen in ({}, options)]
    default, other = steps
    for take in steps:
        take(3)
    n = max(1, round(ROUND_S / time_region(partial(default, 1), DEVICE)))
    paired_benchmark(benchmark, partial(default, n), partial(other, n), n * net.batch, ROUNDS)
    benchmark.extra_info.update(
        model=name,
        settings=settings,
        options=options,
        batch=net.batch,
        precision=engine.precision,
        norm=engine.norm,
        steps_per_round=n,
        default_first_s=first_s[0],
        first_s=first_s[1],
    )
