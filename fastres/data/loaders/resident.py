"""The device-resident loader: the split stays on the device as uint8 and is augmented there.

A block of steps is augmented at a time, so a step costs the host only a slice. A captured step
(fastres/training/cuda_graph.py) makes its images inside the graph, with the same functions from the same draws.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fastres.data.augment import BatchTransform, Draws, crop_and_flip, crop_windows, on_device, to_device_async
from fastres.data.sources.source import Split
from fastres.data.spec import IGNORED, BatchSpec

BLOCK_BYTES = 512 * 2**20  # of batches augmented ahead: an epoch of CIFAR in bf16 is 307 MB
CHUNK = 8192  # images augmented at once, an even number: bounds the temporaries (8 bytes a pixel)


class ResidentLoader:
    """Make batches from a split on the device; see Loader for the contract. Image files are decoded at construction."""

    def __init__(self, split: Split, spec: BatchSpec) -> None:
        self.spec = spec
        images = torch.from_numpy(split.array(spec.workers)).to(spec.device)  # (N, H, W, C) uint8
        self.labels = torch.from_numpy(split.labels).to(spec.device)
        self.order = spec.order(len(split))
        self.channels = images.shape[3]
        self.windows = crop_windows(images, spec.image_size, self.order.pad, spec.pad_mode)
        self.transform = BatchTransform(spec)
        self.fields = ("index", "dy", "dx", "flip", *self.transform.fields)
        self.compiles = not spec.mixes  # a compiler may give mix() one rounding or two

    def train(self, first_step: int, last_step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield one augmented batch for each step of [first_step, last_step)."""
        b = self.order.rank_batch
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
                draws = on_device(samples.slice(first, first + CHUNK), self.fields, self.spec.device)
                images[first : first + CHUNK], chunk_labels = self.batch(draws)
                labels.append(chunk_labels)
            yield from zip(images.split(b), torch.cat(labels).split(b), strict=True)

    def evaluate(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield every sample once over all processes, not augmented."""
        for index, count in self.spec.eval_batches(self.order.n):
            yield self.eval_batch(to_device_async(index, self.spec.device), count)

    # ---- in parts, for a captured step ---------------------------------------------------------------------

    def draws(self, first_step: int, last_step: int) -> Draws:
        """Return the draws for batch() of the steps [first_step, last_step): (steps, b, ...) each, on the host."""
        samples, steps = self.order.samples(first_step, last_step), last_step - first_step
        drawn = on_device(samples, self.fields, torch.device("cpu"))
        return {name: values.reshape(steps, self.order.rank_batch, *values.shape[1:]) for name, values in drawn.items()}

    def batch(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """Return n augmented images and their labels, for draws on the device and without synchronising with it."""
        index = draws["index"]
        crops = crop_and_flip(self.windows, index, draws["dy"], draws["dx"], draws["flip"])
        return self.transform(crops, self.labels[index], draws)

    def eval_draws(self) -> Draws:
        """Return the draws of an evaluation's batches: index (batches, b) int64, count (batches,) int64."""
        indices, counts = zip(*self.spec.eval_batches(self.order.n), strict=True)
        return {"index": torch.from_numpy(np.stack(indices)), "count": torch.tensor(counts)}

    def eval_batch(self, index: Tensor, count: int | Tensor) -> tuple[Tensor, Tensor]:
        """Return an evaluation batch.

        Args:
            index: (b,) int64, the samples.
            count: the number of samples that count; the label of the others is IGNORED.
        """
        centre = torch.full_like(index, self.order.pad)  # the crop without padding
        crops = crop_and_flip(self.windows, index, centre, centre, torch.zeros_like(index, dtype=torch.bool))
        images, labels = self.transform(crops, self.labels[index])
        padding = torch.arange(len(index), device=index.device) >= count
        return images, labels.masked_fill(padding, IGNORED)

    def _empty(self, n: int) -> Tensor:
        """Return memory for n images with the batches' strides, even if they have a single channel."""
        shape = (n, self.channels, self.spec.image_size, self.spec.image_size)
        spec = self.spec
        return torch.empty(shape, dtype=spec.dtype, device=spec.device, memory_format=spec.memory_format)
