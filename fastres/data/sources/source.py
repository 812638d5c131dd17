"""Data sets in memory or as files: labelled images, class names, and normalisation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fastres.data.sources.cache import decode_all
from fastres.data.sources.formats import check_size, decode
from fastres.utils.errors import UsageError

# Mean and standard deviation of each channel over the published training set, in [0, 1] units. Folders of
# images take ImageNet's, because pretrained weights expect them.
NORMALIZATION: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "mnist": ((0.1307,), (0.3081,)),
    "fashion_mnist": ((0.2860,), (0.3530,)),
    "imagefolder": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}

HOLD_OUT_SEED = 5_000  # the same for every run.seed, so that validation figures compare across seeds
HISTOGRAM_BLOCK = 1_024  # images per bincount, which copies them to int64


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """Labelled images: `images` in memory, or files that are decoded on demand (as RGB).

    Attributes:
        labels: (N,) int64.
        images: (N, H, W, C) uint8, or None for files.
        paths: N files, those to decode or those that the images came from; empty for arrays.
        asked_size: data.image_size, for the error about images of unequal size.
        exif: data.exif; if it is true, files are decoded upright.
    """

    labels: np.ndarray
    images: np.ndarray | None = None
    paths: tuple[Path, ...] = ()
    asked_size: int | None = None
    exif: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def channels(self) -> int:
        """Return the channels of an image."""
        return 3 if self.images is None else self.images.shape[3]

    def image(self, index: int) -> np.ndarray:
        """Return sample `index` as (H, W, C) uint8. Raise UsageError if its file cannot be decoded."""
        return decode(self.paths[index], exif=self.exif) if self.images is None else self.images[index]

    def sized_image(self, index: int, height: int, width: int) -> np.ndarray:
        """Return sample `index` as (height, width, C) uint8. Raise UsageError if it has another size."""
        image = self.image(index)
        self.check_size(index, image.shape[0], image.shape[1], height, width)
        return image

    def check_size(self, index: int, height: int, width: int, wanted_height: int, wanted_width: int) -> None:
        """Raise UsageError if sample `index`, of height x width, does not have the wanted size."""
        what = self.paths[index] if self.paths else f"image {index}"
        check_size(what, (height, width), (wanted_height, wanted_width), self.asked_size)

    def array(self, workers: int) -> np.ndarray:
        """Return all samples as (N, H, W, C) uint8, decoded by `workers` threads.

        Raises:
            UsageError: if a file cannot be decoded or has another size than the first.
        """
        if self.images is not None:
            return self.images
        return decode_all(self.paths, workers, self.asked_size, exif=self.exif)

    def subset(self, indices: np.ndarray) -> Split:
        """Return the samples at `indices`, (M,) integers, in that order."""
        return replace(
            self,
            labels=self.labels[indices],
            images=None if self.images is None else self.images[indices],
            paths=tuple(self.paths[index] for index in indices) if self.paths else (),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """A data set: its splits, the classes of its labels, and the normalisation of its pixels.

    Attributes:
        name: name of the data set, as data.source.
        train: the training images.
        test: the images of the result.
        classes: names of the classes, in the order of the labels.
        mean: mean of each channel, of pixels in [0, 1].
        std: standard deviation of each channel, of pixels in [0, 1].
        validation: the images of the curve, if the data set has such a part.
        notes: lines for the user.
        root: the folder that the names of files are relative to.
    """

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    validation: Split | None = None
    notes: tuple[str, ...] = ()
    root: Path | None = None

    @property
    def channels(self) -> int:
        """Return the channels of an image."""
        return self.train.channels


def hold_out(split: Split, n: int) -> tuple[Split, Split]:
    """Divide `split` into a training part and `n` held-out samples, the same ones in every run.

    Raises:
        UsageError: if no sample would be left for training.
    """
    if n >= len(split):
        raise UsageError(f"data.validation: {n} must be below the {len(split):,} images of the training set")
    order = np.random.default_rng(HOLD_OUT_SEED).permutation(len(split))
    return split.subset(np.sort(order[n:])), split.subset(np.sort(order[:n]))


def normalization(split: Split) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel of a split in memory, in [0, 1] units, exact to float64."""
    if split.images is None:
        raise ValueError("normalization() needs a split with its images in memory")
    values = np.arange(256) / 255
    means, stds = [], []
    for channel in range(split.channels):
        counts = np.zeros(256, np.int64)
        for start in range(0, len(split), HISTOGRAM_BLOCK):
            block = split.images[start : start + HISTOGRAM_BLOCK, ..., channel]
            counts += np.bincount(block.ravel(), minlength=256)
        mean = float(np.average(values, weights=counts))
        variance = float(np.average((values - mean) ** 2, weights=counts))
        means.append(mean)
        stds.append(variance**0.5 or 1.0)  # so that a constant channel becomes zero, and not NaN
    return tuple(means), tuple(stds)


def measured_source(name: str, train: Split, test: Split, classes: tuple[str, ...]) -> Source:
    """Return a Source whose normalisation is measured on its training images."""
    mean, std = normalization(train)
    return Source(name=name, train=train, test=test, classes=classes, mean=mean, std=std)
