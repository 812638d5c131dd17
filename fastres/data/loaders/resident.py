"""The device-resident loader: the split lives on the device as uint8 and is augmented there, a block of steps
at a time, so that a step costs the host nothing but a slice. Or a step's images are made inside of a recorded step
(fastres/training/cuda_graph.py), by the same functions from the same draws.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fastres.data.augment import BatchTransform, Draws, crop_and_flip, crop_windows, on_device, sent
from fastres.data.sources.source import Split
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
        self.finish = BatchTransform(spec)
        self.fields = ("index", "dy", "dx", "flip", *self.finish.fields)
        self.compiles = not spec.mixes  # mix() blends in one rounding or in two, as who compiles it likes

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
                part = on_device(samples.part(first, first + CHUNK), self.fields, self.spec.device)
                images[first : first + CHUNK], shares = self.batch(part)
                labels.append(shares)
            yield from zip(images.split(b), torch.cat(labels).split(b), strict=True)

    def evaluate(self) -> Iterator[tuple[Tensor, Tensor]]:
        for share, count in self.spec.eval_batches(self.order.n):
            yield self.eval_batch(sent(share, self.spec.device), count)

    # ---- in parts, for who records a step ------------------------------------------------------------------

    def draws(self, first_step: int, last_step: int) -> Draws:
        """What the batches of the steps [first_step, last_step) are made from: (steps, b, ...) each, on the host."""
        samples, steps = self.order.samples(first_step, last_step), last_step - first_step
        drawn = on_device(samples, self.fields, torch.device("cpu"))
        return {
            name: values.reshape(steps, self.order.local_batch, *values.shape[1:])
            for name, values in drawn.items()
        }

    def batch(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """n augmented images and their labels. draws: (n, ...) each, on the device, which nothing waits for."""
        index = draws["index"]
        crops = crop_and_flip(self.windows, index, draws["dy"], draws["dx"], draws["flip"])
        return self.finish(crops, self.labels[index], draws)

    def eval_draws(self) -> Draws:
        """What the batches of an evaluation are made from: index (batches, b) int64, count (batches,) int64."""
        shares, counts = zip(*self.spec.eval_batches(self.order.n), strict=True)
        return {"index": torch.from_numpy(np.stack(shares)), "count": torch.tensor(counts)}

    def eval_batch(self, index: Tensor, count: int | Tensor) -> tuple[Tensor, Tensor]:
        """index: (b,) int64. count: how many of them count; the others' label is IGNORED."""
        still = torch.full_like(index, self.order.pad)
        crops = crop_and_flip(self.windows, index, still, still, torch.zeros_like(index, dtype=torch.bool))
        images, labels = self.finish(crops, self.labels[index])
        filled_up = torch.arange(len(index), device=index.device) >= count
        return images, labels.masked_fill(filled_up, IGNORED)

    def _empty(self, n: int) -> Tensor:
        """As the batches' own strides are, one channel's too, which contiguous() would leave as it finds it."""
        shape = (n, self.channels, self.spec.image_size, self.spec.image_size)
        spec = self.spec
        return torch.empty(shape, dtype=spec.dtype, device=spec.device, memory_format=spec.memory_format)
