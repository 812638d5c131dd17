"""What every loader is told about the batches it has to make."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from fastres.data.permutation import Order

IGNORED = -100  # the label that no sample has; cross_entropy's ignore_index


@dataclass(frozen=True, kw_only=True)
class BatchSpec:
    """Sizes, normalisation, augmentation and place of the batches of a split."""

    batch_size: int  # of a training step, over all processes
    eval_batch_size: int  # likewise, rounded up to a multiple of the processes
    seed: int
    mean: tuple[float, ...]  # per channel, of pixels in [0, 1]
    std: tuple[float, ...]
    image_size: int
    augment: str  # crop, resized_crop, none
    pad: int
    flip: bool
    workers: int
    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world: int = 1

    def order(self, n: int) -> Order:
        """The order of training for a split of n samples."""
        return Order(
            n=n,
            batch=self.batch_size,
            seed=self.seed,
            rank=self.rank,
            world=self.world,
            pad=self.pad if self.augment == "crop" else 0,
            flip=self.flip and self.augment != "none",
        )

    def eval_indices(self, n: int) -> list[np.ndarray]:
        """This process's samples of each evaluation batch; some of the last may be short or empty."""
        share, whole = self.eval_share, self.eval_share * self.world
        starts = range(self.rank * share, -(-n // whole) * whole, whole)
        return [np.arange(min(start, n), min(start + share, n)) for start in starts]

    @property
    def eval_share(self) -> int:
        """Rows of an evaluation batch on each process."""
        return -(-self.eval_batch_size // self.world)
