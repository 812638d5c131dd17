"""Measure loss and accuracy over a whole split."""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fastres.data.spec import IGNORED
from fastres.distributed import process_group
from fastres.training.engine import Engine
from fastres.training.metrics import DeviceMetrics, Metrics
from fastres.training.step import Batch, ForwardLoss


class Evaluator:
    """Measure loss and accuracy over all samples of a loader, on all ranks.

    Args:
        model: the network.
        engine: the resolved engine.
        mirrored: average the logits of each image and of its mirror image.
    """

    def __init__(self, model: nn.Module, engine: Engine, mirrored: bool = False) -> None:
        self.model = model
        self.metrics = DeviceMetrics(engine.device)
        self.time_s = 0.0  # of the last evaluation
        self.forward_loss = ForwardLoss(model, engine, "sum", mirrored=mirrored)
        if engine.compile:
            self.forward_loss.compile(fullgraph=True, dynamic=False)

    @torch.no_grad()
    def __call__(self, batches: Iterable[Batch | tuple[()]]) -> Metrics:
        """Return the sums over all batches of all ranks. Collective."""
        start = time.perf_counter()
        self.model.eval()
        process_group.broadcast_buffers(self.model)  # because each rank has its own running statistics
        self.metrics.reset()
        for batch in batches:
            if batch:  # an empty batch stands for a replay, which has added its own samples
                self.add(*batch)
        metrics, _ = self.metrics.read()  # synchronises with the device
        self.time_s = time.perf_counter() - start
        return metrics

    def add(self, images: Tensor, labels: Tensor) -> None:
        """Add a batch: images (b, C, S, S), labels (b,) int64; samples labelled IGNORED do not count."""
        loss, correct = self.forward_loss(images, labels)
        self.metrics.add(loss, correct, (labels != IGNORED).sum())
