"""Build a loader, which makes batches on the device from a split. Loader is the contract of all loaders.

To add a loader, write a class with `train` and `evaluate` and add a line to LOADERS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fastres.config.schema import Config
from fastres.data.augment import normalize, tile_row
from fastres.data.loaders.dali import DaliLoader
from fastres.data.loaders.dataloader import HostLoader, evaluation_view
from fastres.data.loaders.resident import ResidentLoader
from fastres.data.sources.formats import resizing_flags
from fastres.data.sources.source import Source, Split
from fastres.data.spec import BatchSpec
from fastres.utils.errors import UsageError


class Loader(Protocol):
    """Batches of one split.

    A batch is images (b, C, S, S), normalised, in the engine's dtype and memory format on its device, and labels (b,)
    int64, or (b, classes) float32 shares if images are mixed. b is the per-rank batch size.
    """

    def train(self, first_step: int, last_step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield one augmented batch for each step of [first_step, last_step), in the order of sampling.py."""

    def evaluate(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield every sample once over all processes, not augmented.

        Batches have one size and are equal in number on every process, so a short one is padded with samples whose
        label is IGNORED.
        """


LOADERS: dict[str, Callable[[Split, BatchSpec], Loader]] = {
    "resident": ResidentLoader,
    "dali": DaliLoader,
    "dataloader": HostLoader,
}


def build_loader(
    config: Config,
    source: Source,
    split: Split,
    *,
    device: torch.device,
    dtype: torch.dtype,
    rank: int = 0,
    world_size: int = 1,
) -> Loader:
    """Return the loader that `data.loader` names, for one split of a data set.

        for images, labels in loader.train(0, 1_000):  # augmented batches of the steps 0 to 999

    Args:
        config: the run's configuration: its data, train.batch_size (the global batch), run.seed.
        source: the data set, whose mean and std normalise the images.
        split: the part of the data set to load.
        device: makes and holds the batches.
        dtype: the images' dtype.
        rank: this process's rank.
        world_size: the number of processes, which divides the batch size.

    Returns:
        A Loader, whose batches are images (b, C, S, S) of `dtype` and labels (b,) int64, or (b, classes) float32 shares
        with mixup or CutMix, on `device`.

    Raises:
        UsageError: if the images' size or a setting does not fit.
    """
    data, size = config.data, image_size(config, source)
    # Nothing else would notice a split whose images have another size than the training images.
    if data.augment != "resized_crop":
        split.sized_image(0, size, size)
    _check_augmentation(config, size, world_size)
    spec = BatchSpec(
        batch_size=config.train.batch_size,
        eval_batch_size=min(config.train.eval_batch_size, len(split)),
        seed=config.run.seed,
        mean=source.mean,
        std=source.std,
        image_size=size,
        augment=data.augment,
        pad=data.pad,
        flip=data.flip,
        pad_mode=data.pad_mode,
        cutout=data.cutout,
        mixup=data.mixup,
        cutmix=data.cutmix,
        classes=classes_of(config, source),
        workers=data.workers,
        device=device,
        dtype=dtype,
        memory_format=torch.channels_last if config.engine.channels_last else torch.contiguous_format,
        rank=rank,
        world_size=world_size,
    )
    return LOADERS[data.loader](split, spec)


def _check_augmentation(config: Config, size: int, world_size: int) -> None:
    """Raise UsageError if images of this side or batches of this size cannot be augmented as configured."""
    data, rank_batch = config.data, config.train.batch_size // world_size
    if (data.mixup or data.cutmix) and rank_batch % 2:
        raise UsageError(
            f"train.batch_size: {rank_batch} samples on each process are an odd number (data.mixup and data.cutmix mix "
            "pairs); change it"
        )
    # With more padding, too few pixels are left to reflect, and a crop could be all zeros.
    if data.augment == "crop" and data.pad >= size:
        raise UsageError(f"data.pad: {data.pad} is too large for images of {size}x{size} pixels; make it smaller")


def sample_images(config: Config, source: Source, split: Split, n: int = 5_000) -> Tensor:
    """Return n images of the split, evenly spaced, as an evaluation sees them: (n, C, S, S) float32 on the host.

    They are the same on every process and for every loader. If the images are larger than CIFAR's, fewer are returned,
    so that the number of pixels stays the same.
    """
    size = image_size(config, source)
    n = min(n, len(split), max(1, n * 32**2 // size**2))
    part = split.subset(np.linspace(0, len(split) - 1, n).astype(np.int64))
    pixels = [evaluation_view(part, i, config.data.augment, size) for i in range(len(part))]
    shift, scale = (tile_row(torch.tensor(of), size) for of in (source.mean, source.std))
    return normalize(torch.from_numpy(np.stack(pixels)), shift, scale, torch.float32)


def image_size(config: Config, source: Source) -> int:
    """Return the side of the network's images in pixels.

    Raises:
        UsageError: if the data's images have another side and are not resized.
    """
    if config.data.augment == "resized_crop" and config.data.image_size is not None:
        size: int = config.data.image_size
        return size
    shape: tuple[int, ...] = source.train.image(0).shape
    height, width = shape[:2]
    if height != width:
        raise UsageError(
            f"{source.name} has images of {width}x{height} pixels, which are not square; use "
            f"{resizing_flags(config.data.image_size)}"
        )
    if config.data.image_size not in (None, height):
        raise UsageError(
            f"data.image_size: {config.data.image_size} is given, but {source.name} has images of {width}x{height} "
            f"pixels; leave it out, or resize them with {resizing_flags(config.data.image_size)}"
        )
    return height


def classes_of(config: Config, source: Source) -> int:
    """Return the number of the head's outputs: the data's classes, or model.num_classes.

    Raises:
        UsageError: if model.num_classes is smaller than the number of classes.
    """
    found = len(source.classes)
    wanted: int = config.model.num_classes or found
    if wanted < found:
        raise UsageError(f"model.num_classes: {wanted} is less than the {found} classes of {config.data.source}; "
                         "leave it out")  # fmt: skip
    return wanted
