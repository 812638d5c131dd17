"""Loss, accuracy and confusion matrix: sums that grow on the device, and the same sums on the host."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fastres.distributed import process_group
from fastres.utils import ranks


@dataclass
class Metrics:
    """Sums over an interval of steps, on the host.

    Attributes:
        loss: loss, summed over samples.
        correct: number of correct predictions.
        samples: number of samples.
    """

    loss: float = 0.0
    correct: int = 0
    samples: int = 0

    def __add__(self, other: Metrics) -> Metrics:
        return Metrics(self.loss + other.loss, self.correct + other.correct, self.samples + other.samples)

    @property
    def mean_loss(self) -> float:
        """Return the loss per sample."""
        return self.loss / max(1, self.samples)

    @property
    def accuracy(self) -> float:
        """Return the fraction of correct predictions."""
        return self.correct / max(1, self.samples)


TOP = 5  # classes of the top-k accuracy
TOP_FROM = 10  # classes that a network must have for it to say something


@dataclass(eq=False)
class Evaluation(Metrics):
    """Sums over a split, on the host.

    Attributes:
        confusion: number of samples by class and predicted class, (classes, classes) int64.
        in_top: samples whose class is among the five most probable ones; None for networks of fewer than ten classes.
    """

    confusion: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.int64))
    in_top: int | None = None

    @property
    def top_accuracy(self) -> float | None:
        """Return the fraction of samples whose class is among the five most probable ones, or None as `in_top`."""
        return None if self.in_top is None else self.in_top / max(1, self.samples)

    @property
    def class_accuracy(self) -> np.ndarray:
        """Return the accuracy over the samples of each class, (classes,) float64; NaN for a class without samples."""
        samples = self.confusion.sum(1)
        return np.where(samples > 0, self.confusion.diagonal() / np.maximum(samples, 1), np.nan)


class DeviceMetrics:
    """Metrics that grow on the device. Only reading them synchronises the host with the device."""

    def __init__(self, device: torch.device) -> None:
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        # Two tensors, because two elements of one tensor would take four times as many operators a step.
        self.correct, self.samples = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
        # The current step, and the first step with a non-finite loss; on the device, so that a replay can set them.
        self.step, self.bad_step = (torch.full((), -1, dtype=torch.int64, device=device) for _ in range(2))

    def add(self, loss: Tensor, correct: Tensor, samples: int | Tensor) -> None:
        """Add the loss, () summed over the samples, and the counts."""
        self.loss += loss
        self.correct += correct
        self.samples += samples
        fine = torch.isfinite(loss) | (self.bad_step >= 0)
        self.bad_step.copy_(torch.where(fine, self.bad_step, self.step))

    def read(self) -> tuple[Metrics, int]:
        """Return the sums over all ranks since the last reset, and the first step with a non-finite loss (-1: none)."""
        sums, bad = self.state_dict(), self.bad_step.clone()
        process_group.all_max(bad)
        return Metrics(sums["loss"].item(), *sums["counts"].tolist()), int(bad.item())

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Return all tensors that change."""
        return self.loss, self.correct, self.samples, self.step, self.bad_step

    def reset(self) -> None:
        """Set the sums to zero."""
        for tensor in (self.loss, self.correct, self.samples):
            tensor.zero_()
        self.bad_step.fill_(-1)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the sums over all ranks. Collective."""
        loss, counts = self.loss.clone(), torch.stack([self.correct, self.samples])
        process_group.all_sum(loss, counts)
        return {"loss": loss, "counts": counts}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Give the sums to rank 0 and zeros to the other ranks, so that all ranks together have the saved sums."""
        self.reset()
        if ranks.rank() == 0:
            self.loss.copy_(state["loss"])
            self.correct.copy_(state["counts"][0])
            self.samples.copy_(state["counts"][1])


class DeviceEvaluation:
    """An Evaluation that grows on the device. Only reading it synchronises the host with the device.

    Args:
        classes: outputs of the network.
        device: the device of the sums.
    """

    def __init__(self, classes: int, device: torch.device) -> None:
        self.classes = classes
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.in_top = torch.zeros((), dtype=torch.int64, device=device)
        # The confusion matrix, row by row, and one cell for the samples that do not count.
        self.cells = torch.zeros(classes**2 + 1, dtype=torch.int64, device=device)

    def add(self, loss: Tensor, cells: Tensor, in_top: Tensor | None) -> None:
        """Add a batch of b samples.

        Args:
            loss: () summed over the samples.
            cells: (b,) int64, class * classes + predicted class, or classes**2 for a sample that does not count.
            in_top: () int64, samples whose class is among the TOP most probable; None below TOP_FROM classes.
        """
        self.loss += loss
        self.cells.scatter_add_(0, cells, torch.ones_like(cells))
        if in_top is not None:
            self.in_top += in_top

    def read(self) -> Evaluation:
        """Return the sums over all ranks since the last reset. Collective."""
        loss, counts = self.loss.clone(), torch.cat([self.cells[:-1], self.in_top[None]])
        process_group.all_sum(loss, counts)
        on_host = counts.cpu().numpy()
        confusion = on_host[:-1].reshape(self.classes, self.classes)
        return Evaluation(
            loss=loss.item(),
            correct=int(confusion.trace()),
            samples=int(confusion.sum()),
            confusion=confusion,
            in_top=int(on_host[-1]) if self.classes >= TOP_FROM else None,
        )

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Return all tensors that change."""
        return self.loss, self.in_top, self.cells

    def reset(self) -> None:
        """Set the sums to zero."""
        for tensor in self.tensors:
            tensor.zero_()
