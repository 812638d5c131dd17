"""The description of the batches that every loader makes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from fastres.data.sampling import SampleOrder

IGNORED = -100  # the label of padding; cross_entropy's ignore_index


@dataclass(frozen=True, kw_only=True)
class BatchSpec:
    """Sizes, normalisation, augmentation, device and dtype of the batches of a split."""

    batch_size: int  # the global batch size of a training step
    eval_batch_size: int  # the global batch size of an evaluation; rounded up to a multiple of world_size
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
        """Return the order of training for a split of n samples."""
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
        """Return the pixels of padding around an image."""
        return self.pad if self.augment == "crop" else 0

    @property
    def mixes(self) -> bool:
        """Return True if images are mixed with their neighbours."""
        return bool(self.mixup or self.cutmix)

    def eval_batches(self, n: int) -> list[tuple[np.ndarray, int]]:
        """Return this process's samples of each evaluation batch, and the number of samples that count.

        Args:
            n: samples in the split.

        Returns:
            For each batch, the samples (eval_rank_batch,) int64, and the number of samples that count. The last
            batches are padded with samples that do not count.
        """
        per_rank, in_all = self.eval_rank_batch, self.eval_rank_batch * self.world_size
        starts = range(self.rank * per_rank, -(-n // in_all) * in_all, in_all)
        return [(np.arange(start, start + per_rank) % n, min(max(n - start, 0), per_rank)) for start in starts]

    @property
    def eval_rank_batch(self) -> int:
        """Return the per-rank batch size of an evaluation."""
        return -(-self.eval_batch_size // self.world_size)
