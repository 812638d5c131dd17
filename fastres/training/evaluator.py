"""Measure loss, accuracy and confusion matrix over a whole split."""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastres.data.spec import IGNORED
from fastres.distributed import process_group
from fastres.training.engine import Engine
from fastres.training.metrics import TOP, TOP_FROM, DeviceEvaluation, Evaluation
from fastres.training.step import Batch, Forward


def for_inference(model: nn.Module, engine: Engine) -> nn.Module:
    """Return the network that computes the logits of many images fastest, in roundings of its own.

    On a CPU without torch.compile it is a copy whose BatchNorms are folded into the convolutions, in the engine's
    dtype. Elsewhere, and if nothing can be folded, it is the network itself. The evaluations of a run do not use it, so
    that their figures are those of the network that is trained.

    Args:
        model: the network, already placed by the engine.
        engine: the resolved engine.
    """
    if engine.device.type != "cpu" or engine.compile:  # folding was not measured on a GPU, and inductor fuses by itself
        return model
    from fastres.models.fusion.folding import folded  # here, because runs and predictions of a few files do without it

    return folded(model, engine.dtype)


class ForwardOutcomes(Forward):
    """Forward, loss and outcomes of an evaluation: (images, labels) -> arguments of DeviceEvaluation.add().

    Args:
        model: the network.
        engine: the resolved engine.
        classes: outputs of the network.
        mirrored: average the logits of each image and of its mirror image.
    """

    def __init__(self, model: nn.Module, engine: Engine, classes: int, mirrored: bool = False) -> None:
        super().__init__(model, engine, mirrored)
        self.classes = classes

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return loss, cells and samples in the top. Samples with the label IGNORED count in none of them."""
        logits = self.logits(images)
        loss = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
        cells = torch.where(labels == IGNORED, self.classes**2, labels * self.classes + logits.argmax(1))
        if self.classes < TOP_FROM:
            return loss, cells, None
        return loss, cells, (logits.topk(TOP).indices == labels[:, None]).sum()


class Evaluator:
    """Measure loss, accuracy and confusion matrix over all samples of a loader, on all ranks.

        evaluate = Evaluator(model, engine, classes=10)
        print(evaluate(loader.evaluate()).accuracy)

    Args:
        model: the network.
        engine: the resolved engine.
        classes: outputs of the network.
        mirrored: average the logits of each image and of its mirror image.
    """

    def __init__(self, model: nn.Module, engine: Engine, classes: int, mirrored: bool = False) -> None:
        self.model = model
        self.sums = DeviceEvaluation(classes, engine.device)
        self.time_s = 0.0  # of the last evaluation
        self.forward = ForwardOutcomes(model, engine, classes, mirrored)
        if engine.compile:
            self.forward.compile(fullgraph=True, dynamic=False)

    @torch.no_grad()
    def __call__(self, batches: Iterable[Batch | tuple[()]]) -> Evaluation:
        """Return the sums over all batches of all ranks. Collective.

        Args:
            batches: images (b, C, S, S) and labels (b,) int64, as Loader.evaluate() yields them. Samples labelled
                IGNORED do not count. An empty batch stands for a replay of GraphedEvaluation.

        Returns:
            Loss, accuracy and confusion matrix. The model is left in eval mode.
        """
        start = time.perf_counter()
        self.model.eval()
        process_group.broadcast_buffers(self.model)  # because each rank has its own running statistics
        self.sums.reset()
        for batch in batches:
            if batch:  # an empty batch stands for a replay, which has added its own samples
                self.add(*batch)
        found = self.sums.read()  # synchronises with the device
        self.time_s = time.perf_counter() - start
        return found

    def add(self, images: Tensor, labels: Tensor) -> None:
        """Add a batch: images (b, C, S, S), labels (b,) int64; samples labelled IGNORED do not count."""
        self.sums.add(*self.forward(images, labels))
