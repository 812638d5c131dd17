"""Train ResNet-20 for three steps in float32, for workers that compare the losses of two norms."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from fastres.config.schema import Config, EngineConfig
from fastres.models.registry import build_model
from fastres.training.engine import resolve_engine
from fastres.training.step import ForwardLoss


def losses(norm: str, backend: Callable[..., Any] | None = None) -> Iterator[float]:
    """Yield the loss of each step; `backend` compiles the forward with fullgraph=True."""
    torch.manual_seed(0)
    model = build_model("resnet20", norm=norm).to(memory_format=torch.channels_last)
    engine = resolve_engine(Config(engine=EngineConfig(precision="fp32", device="cpu")))
    forward_loss = ForwardLoss(model, engine)
    if backend:
        forward_loss.compile(fullgraph=True, dynamic=False, backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(16, 3, 8, 8, generator=generator).to(memory_format=torch.channels_last)
    y = torch.randint(10, (16,), generator=generator)
    for _ in range(3):
        loss, _ = forward_loss(x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def assert_equal_losses(one: list[float], other: list[float]) -> None:
    assert len(one) == len(other) == 3
    assert all(abs(a - b) < 1e-4 * a for a, b in zip(one, other, strict=True)), (one, other)
