"""What every loader is told about the batches it has to make."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from fastres.data.sampling import SampleOrder

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
    flip: bool | Literal["alternating"]
    workers: int
    device: torch.device
    dtype: torch.dtype
    memory_format: torch.memory_format = torch.channels_last
    pad_mode: str = "zero"  # zero, reflect
    cutout: int = 0  # pixels
    mixup: float = 0.0
    cutmix: float = 0.0
    classes: int = 0  # columns of mixed labels
    rank: int = 0
    world_size: int = 1

    def order(self, n: int) -> SampleOrder:
        """The order of training for a split of n samples."""
        return SampleOrder(
            n=n,
            batch=self.batch_size,
            seed=self.seed,
            rank=self.rank,
            world_size=self.world_size,
            size=self.image_size,
            pad=self.margin,
            flip=self.flip if self.augment != "none" else False,
            cutout=self.cutout > 0,
            mixup=self.mixup,
            cutmix=self.cutmix,
        )

    @property
    def margin(self) -> int:
        """Pixels around an image, of which a crop may have some."""
        return self.pad if self.augment == "crop" else 0

    @property
    def mixes(self) -> bool:
        return bool(self.mixup or self.cutmix)

    def eval_batches(self, n: int) -> list[tuple[np.ndarray, int]]:
        """This process's samples of each evaluation batch, (eval_share,) int64, and how many of them count: some of the
        last batches are filled up."""
        share, whole = self.eval_share, self.eval_share * self.world_size
        starts = range(self.rank * share, -(-n // whole) * whole, whole)
        return [(np.arange(start, start + share) % n, min(max(n - start, 0), share)) for start in starts]

    @property
    def eval_share(self) -> int:
        """Rows of an evaluation batch on each process."""
        return -(-self.eval_batch_size // self.world_size)
