"""Measure images/s of training and inference of every model family, against plain PyTorch.

    pytest bench/bench_throughput.py --benchmark-only           the cases that take minutes
    pytest bench/bench_throughput.py --benchmark-only --full    everything

The baseline is the code one writes first: the same network, eager, fp32, NCHW, torch.optim.SGD. "against tuned" names
the same loop tuned by hand: bf16, channels-last, fused SGD, compiled on a GPU. "against norm torch" names the engine
with `model.norm torch`. The baseline runs interleaved with the engine in one process, so that any disturbance of the
machine affects both, and only the ratio is a result.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.lib.paired import compare
from bench.lib.plain_loop import plain_steps
from bench.lib.workloads import GPU, Net, engine_for, engine_inference, engine_training
from fastres.utils.errors import UsageError


def net(name: str, on_cpu: int, on_gpu: int, side: int, **fields: Any) -> Net:
    return Net(name=name, batch=on_gpu if GPU else on_cpu, side=side, **fields)


# One network of each family first; MORE_NETS run with --full.
NETS = {
    "resnet20": net("resnet20", 128, 128, 32),
    "resnet56": net("resnet56", 128, 128, 32),
    "resnet18": net("resnet18", 8, 256, 224, classes=1_000),
    "resnet50": net("resnet50", 8, 256, 224, classes=1_000),
    "mini_resnet": net("mini_resnet", 128, 1_024, 28, channels=1),
}
MORE_NETS = {
    "resnet20 at batch 1024": net("resnet20", 1_024, 1_024, 32),
    "plain20": net("plain20", 128, 128, 32),
    "speed_resnet": net("speed_resnet", 256, 512, 32),
    "resnet110": net("resnet110", 128, 128, 32),
    "resnet18 for 32 px": net("resnet18", 128, 512, 32, options=(("stem", "small"),)),
    "resnet34": net("resnet34", 8, 256, 224, classes=1_000),
    "resnet152": net("resnet152", 4, 128, 224, classes=1_000),
    "resnext50_32x4d": net("resnext50_32x4d", 8, 256, 224, classes=1_000),
    "wide_resnet50_2": net("wide_resnet50_2", 4, 128, 224, classes=1_000),
}
HOWS: dict[str, dict[str, Any]] = {
    "eager": {"compile": False, "cuda_graph": False},
    "compile": {"compile": True, "cuda_graph": False},
    "compile+graph": {"compile": True, "cuda_graph": True},
}
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
NORMS = ("torch", "fused")
# Without --full, the engine's own choices are measured for every network, and their parts for ResNet-20.
PARTS = ["fp32 eager torch", "bf16 compile torch"]
if GPU:
    PARTS += ["bf16 eager torch", "bf16 compile fused", "bf16 compile+graph torch", "bf16 compile+graph fused"]
QUICK = [
    *product(NETS, (True, False), ("default",), ("plain",)),
    *product(NETS, (True,), ("default",), ("tuned",)),
    *(("resnet20", True, variant, "plain") for variant in PARTS),
]
VARIANTS = ("default", *(" ".join(parts) for parts in product(PRECISIONS, HOWS, NORMS)))
FULL = [
    *product((*NETS, *MORE_NETS), (True, False), VARIANTS, ("plain",)),
    *product((*NETS, *MORE_NETS), (True, False), ("default",), ("tuned",)),
    *product((*NETS, *MORE_NETS), (True,), ("fp32 eager fused", "bf16 eager fused"), ("norm torch",)),
]
# For torch and the C++ kernels, for oneDNN, and for MKL, which computes the matrix product of the share.
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}


def cases() -> list[Any]:
    """Return the quick cases first, then the other cases, marked as full."""
    return [
        pytest.param(
            *case,
            id=f"{case[0]} {'train' if case[1] else 'infer'} {case[2]}{f' against {case[3]}' * (case[3] != 'plain')}",
            marks=() if case in QUICK else pytest.mark.full,
        )
        for case in dict.fromkeys(QUICK + FULL)
    ]


def fields_of(variant: str) -> dict[str, Any]:
    """Return the engine's fields of a variant's name."""
    if variant == "default":
        return {}
    precision, how, norm = variant.split()
    return {"precision": precision, "norm": norm, **HOWS[how]}


@pytest.mark.parametrize(("name", "training", "variant", "baseline"), cases())
def bench_throughput(benchmark: Any, name: str, training: bool, variant: str, baseline: str) -> None:
    measured, fields = (NETS | MORE_NETS)[name], fields_of(variant)
    try:
        engine = engine_for(**fields)
        steps = (engine_training if training else engine_inference)(measured, **fields)
    except UsageError as error:
        pytest.skip(str(error))
    facts: dict[str, Any] = {"case": name, "variant": variant, "compile": engine.compile, "norm": engine.norm}
    facts |= {"training": training, "precision": engine.precision, "baseline": baseline}
    build_baseline = partial(plain_steps, measured, training=training, tuned=baseline == "tuned")
    if baseline == "norm torch":
        build_baseline = partial(engine_training, measured, **{**fields, "norm": "torch"})
    compare(benchmark, measured, build_baseline, steps, **facts)


@pytest.mark.parametrize("case", ["resnet20 train fp32 eager torch", "resnet20 train fp32 eager fused"])
def bench_avx2(benchmark: Any, tmp_path: Path, case: str) -> None:
    """Measure a case of bench_throughput in a process that does without AVX-512, as most laptops have to."""
    if GPU or "AVX512" not in torch.backends.cpu.get_cpu_capability():
        pytest.skip("emulates AVX2 on a CPU with AVX-512")
    node, file = f"{__file__}::bench_throughput[{case}]", tmp_path / "result.json"
    command = [sys.executable, "-m", "pytest", node, "--full", "--benchmark-only", f"--benchmark-json={file}"]
    environment = {**os.environ, **AVX2, "PYTEST_ADDOPTS": ""}
    kept = f"--benchmark-storage={tmp_path.as_uri()}"
    run = partial(subprocess.run, [*command, kept], env=environment, check=True, capture_output=True)
    benchmark.pedantic(run, rounds=1)
    (result,) = json.loads(file.read_text())["benchmarks"]
    benchmark.extra_info.update(result["extra_info"])
