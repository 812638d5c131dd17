"""What inductor's settings change: the engine's training step under each, in turns with the step under none.

    pytest bench/bench_compile.py --benchmark-only             the settings one by one
    pytest bench/bench_compile.py --benchmark-only --full      on a CPU too, where compiling takes minutes

A setting that gains beyond its spread on all networks belongs into the engine; one that does not goes to
docs/EXPERIMENTS.md. The first call, which compiles and tunes, is its cost. Not yet run on a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.lib.paired import interleaved
from bench.lib.workloads import DEVICE, Net, Steps, engine_for, engine_training
from fastres.utils.timing import time_region

GPU = torch.cuda.is_available()
NETS = {
    "resnet20": Net(name="resnet20", batch=128, side=32),
    "resnet50": Net(name="resnet50", batch=256 if GPU else 8, side=224, classes=1_000),
}
ROUND_S, ROUNDS = 0.4, 15
# By name, options of torch.compile. "nothing" against nothing tells how steady the machine is.
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


# As text, which pytest evaluates where it knows its options.
@pytest.mark.skipif(
    "not GPU and not config.option.full", reason="the engine does not compile on a CPU: --full measures it"
)
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", NETS)
def bench_setting(benchmark: Any, name: str, settings: str) -> None:
    measure(benchmark, NETS[name], SETTINGS[settings], ROUNDS)
    benchmark.extra_info.update(model=name, settings=settings)


def measure(benchmark: Any, net: Net, options: dict[str, Any], rounds: int) -> None:
    _, engine = engine_for(compile=True)
    steps: list[Steps] = []

    def first(chosen: dict[str, Any]) -> None:
        """What a graph records is compiled before its first step, as it is built."""
        steps.append(engine_training(net, compile=True, inductor=chosen))
        steps[-1](1)

    first_s = [time_region(lambda chosen=chosen: first(chosen), DEVICE) for chosen in ({}, options)]
    default, other = steps
    for take in steps:
        take(3)
    n = max(1, round(ROUND_S / time_region(lambda: default(1), DEVICE)))
    interleaved(benchmark, lambda: default(n), lambda: other(n), n * net.batch, rounds)
    benchmark.extra_info.update(
        options=options,
        batch=net.batch,
        precision=engine.precision,
        norm=engine.norm,
        steps_per_round=n,
        default_first_s=first_s[0],
        first_s=first_s[1],
    )


def summary(infos: list[dict[str, Any]]) -> list[str]:
    lines = []
    for info in infos:
        low, high = info["images_per_s_20_80"]
        rate = f"{info['images_per_s']:>9,.0f} images/s ({low:,.0f} to {high:,.0f})"
        lines.append(
            f"{info['model']} {info['settings']:<36} {rate}  "
            f"{info['ratio']:.3f} x the default's {info['baseline_images_per_s']:,.0f}, n={info['n']}; "
            f"first step {info['first_s']:.0f} s"
        )
    return lines
