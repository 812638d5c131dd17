"""images/s of a training step: forward, backward and update, against a plain PyTorch loop of the same model.

    pytest bench/bench_throughput.py --benchmark-only

The baseline is what one writes first: eager, fp32, NCHW, torch.optim.SGD. It runs in turns with the engine in
one process, A B A B, so that whatever the machine does meanwhile happens to both; only the ratio is a claim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from interleaved import interleaved

from fastres import build_model
from fastres.config import Config, EngineConfig
from fastres.engine import resolve
from fastres.optim import build_optimizer
from fastres.step import TrainStep

ROUNDS = 15
STEPS = 8  # of one round of one variant
BATCH, CLASSES, SIDE = 128, 10, 32


def plain_region(name: str) -> Callable[[], None]:
    """STEPS steps of the plain loop."""
    torch.manual_seed(0)
    device = resolve(Config()).device
    model = build_model(name).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    images = torch.randn(BATCH, 3, SIDE, SIDE, device=device)
    labels = torch.randint(CLASSES, (BATCH,), device=device)

    def region() -> None:
        model.train()
        for _ in range(STEPS):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
        synchronize(device)

    return region


def engine_region(
    name: str, *, batch: int = BATCH, side: int = SIDE, steps: int = STEPS, **engine_fields: Any
) -> Callable[[], None]:
    """Some steps of the engine's TrainStep."""
    torch.manual_seed(0)
    config = Config(engine=EngineConfig(**engine_fields))
    engine = resolve(config)
    model = build_model(name, norm=engine.norm).to(engine.device).to(memory_format=engine.memory_format)
    step = TrainStep(model, engine, lambda m, lr: build_optimizer(m, config.optim, lr))
    images = torch.randn(batch, 3, side, side, device=engine.device, dtype=engine.dtype)
    images = images.to(memory_format=engine.memory_format)
    labels = torch.randint(CLASSES, (batch,), device=engine.device)

    def region() -> None:
        for i in range(steps):
            step(images, labels, 0.1, i)
        synchronize(engine.device)

    return region


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "compiled": {"compile": True},
    "eager": {"compile": False},
    "fp32": {"compile": False, "precision": "fp32"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def bench_train_resnet20(benchmark: Any, variant: str) -> None:
    baseline, region = plain_region("resnet20"), engine_region("resnet20", **VARIANTS[variant])
    for warm_up in (baseline, region, baseline, region):
        warm_up()
    interleaved(benchmark, baseline, region, STEPS * BATCH, ROUNDS)
