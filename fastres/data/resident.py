"""The device-resident loader: the split lives on the device as uint8 and is augmented there, a block of steps
at a time, so that a step costs the host nothing but a slice."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fastres.data.augment import crop_and_flip, crop_windows, normalize
from fastres.data.sources import Split
from fastres.data.spec import IGNORED, BatchSpec

BLOCK_BYTES = 512 * 2**20  # of augmented batches kept ready: an epoch of CIFAR in bf16 is 307 MB
CHUNK = 8192  # images augmented at once: bounds the temporaries (8 bytes a pixel)


class ResidentLoader:
    """See Loader. A split of files is decoded once, at construction."""

    def __init__(self, split: Split, spec: BatchSpec) -> None:
        self.spec = spec
        images = torch.from_numpy(split.array(spec.workers)).to(spec.device)  # (N, H, W, C) uint8
        self.labels = torch.from_numpy(split.labels).to(spec.device)
        self.order = spec.order(len(split))
        self.channels = images.shape[3]
        self.windows = crop_windows(images, spec.image_size, self.order.pad)
        self.mean = torch.tensor(spec.mean, device=spec.device)
        self.std = torch.tensor(spec.std, device=spec.device)

    def train(self, first_step: int, last_step: int) -> Iterator[tuple[Tensor, Tensor]]:
        b = self.order.local_batch
        item = torch.empty((), dtype=self.spec.dtype).element_size()
        step_bytes = b * self.channels * self.spec.image_size**2 * item
        epoch_steps = -(-self.order.n // self.order.batch)
        block = max(1, min(epoch_steps, BLOCK_BYTES // step_bytes))
        for start in range(first_step, last_step, block):
            stop = min(start + block, last_step)
            samples = self.order.samples(start, stop)
            images = self._augmented(samples.index, samples.dy, samples.dx, samples.flip)
            labels = self.labels[self._on_device(samples.index)]
            yield from zip(images.split(b), labels.split(b), strict=True)

    def evaluate(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index in self.spec.eval_indices(self.order.n):
            filled = (
                np.resize(index, self.spec.eval_share) if len(index) else np.zeros(self.spec.eval_share, int)
            )
            still = np.full_like(filled, self.order.pad)
            images = self._augmented(filled, still, still, np.zeros(len(filled), dtype=bool))
            labels = self.labels[self._on_device(filled)]
            labels[len(index) :] = IGNORED
            yield images, labels

    def _augmented(self, index: np.ndarray, dy: np.ndarray, dx: np.ndarray, flip: np.ndarray) -> Tensor:
        size = self.spec.image_size
        out = torch.empty(
            (len(index), self.channels, size, size),
            dtype=self.spec.dtype,
            device=self.spec.device,
            memory_format=torch.channels_last,
        )
        chosen = [self._on_device(a).split(CHUNK) for a in (index, dy, dx, flip)]
        for images, *chunk in zip(out.split(CHUNK), *chosen, strict=True):
            images.copy_(normalize(crop_and_flip(self.windows, *chunk), self.mean, self.std, self.spec.dtype))
        return out

    def _on_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.spec.device)
