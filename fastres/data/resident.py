"""The device-resident loader: the split lives on the device as uint8 and is augmented there, a block of steps
at a time, so that a step costs the host nothing but a slice."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fastres.data.augment import Finish, crop_and_flip, crop_windows
from fastres.data.sources import Split
from fastres.data.spec import IGNORED, BatchSpec

BLOCK_BYTES = 512 * 2**20  # of augmented batches kept ready: an epoch of CIFAR in bf16 is 307 MB
CHUNK = 8192  # images augmented at once, an even number: bounds the temporaries (8 bytes a pixel)


class ResidentLoader:
    """See Loader. A split that comes as files is decoded once, at construction."""

    def __init__(self, split: Split, spec: BatchSpec) -> None:
        self.spec = spec
        images = torch.from_numpy(split.array(spec.workers)).to(spec.device)  # (N, H, W, C) uint8
        self.labels = torch.from_numpy(split.labels).to(spec.device)
        self.order = spec.order(len(split))
        self.channels = images.shape[3]
        self.windows = crop_windows(images, spec.image_size, self.order.pad, spec.pad_mode)
        self.finish = Finish(spec)

    def train(self, first_step: int, last_step: int) -> Iterator[tuple[Tensor, Tensor]]:
        b = self.order.local_batch
        item = torch.empty((), dtype=self.spec.dtype).element_size()
        step_bytes = b * self.channels * self.spec.image_size**2 * item
        epoch_steps = -(-self.order.n // self.order.batch)
        block = max(1, min(epoch_steps, BLOCK_BYTES // step_bytes))
        for start in range(first_step, last_step, block):
            stop = min(start + block, last_step)
            samples = self.order.samples(start, stop)
            images = self._empty(len(samples.index))
            labels = []
            for first in range(0, len(images), CHUNK):
                part = samples.part(first, first + CHUNK)
                index = self._on_device(part.index)
                crops = self._crops(index, part.dy, part.dx, part.flip)
                images[first : first + CHUNK], shares = self.finish(crops, self.labels[index], part)
                labels.append(shares)
            yield from zip(images.split(b), torch.cat(labels).split(b), strict=True)

    def evaluate(self) -> Iterator[tuple[Tensor, Tensor]]:
        for share, count in self.spec.eval_batches(self.order.n):
            index, still = self._on_device(share), np.full_like(share, self.order.pad)
            crops = self._crops(index, still, still, np.zeros(len(share), dtype=bool))
            images, labels = self.finish(crops, self.labels[index])
            labels[count:] = IGNORED
            yield images, labels

    def _crops(self, index: Tensor, dy: np.ndarray, dx: np.ndarray, flip: np.ndarray) -> Tensor:
        return crop_and_flip(self.windows, index, *map(self._on_device, (dy, dx, flip)))

    def _empty(self, n: int) -> Tensor:
        size, spec = self.spec.image_size, self.spec
        images = torch.empty((n, self.channels, size, size), dtype=spec.dtype, device=spec.device)
        return images.contiguous(memory_format=torch.channels_last)

    def _on_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.spec.device)
