"""Data sets that need no download: scikit-learn's digits, and synthetic patterns."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastres.config.schema import DataConfig
from fastres.data.sources.source import Source, Split, measured_source

# scikit-learn's digits: the test set of "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak 1998, UCI,
# CC BY 4.0). The file has images, (1797, 8, 8) uint8 from 0 to 16, labels, and the indices of the test images. It is a
# copy, which tests compare with the original, because importing scikit-learn takes a second.
DIGITS = Path(__file__).with_name("digits.npz")
SYNTHETIC_SEED = 0
SYNTHETIC_CLASSES = 10


def digits(config: DataConfig) -> Source:
    """Return scikit-learn's 1,797 handwritten digits, 8x8 grey, stratified into 1,437 and 360."""
    with np.load(DIGITS, allow_pickle=False) as data:
        images = np.rint(data["images"] * (255 / 16)).astype(np.uint8)[..., None]  # (1797, 8, 8, 1)
        both = Split(images=images, labels=data["labels"].astype(np.int64))
        in_test = np.isin(np.arange(len(both)), data["test"])
    train, test = (both.subset(np.flatnonzero(part)) for part in (~in_test, in_test))
    return measured_source("digits", train, test, tuple("0123456789"))


def synthetic(config: DataConfig) -> Source:
    """Return ten balanced classes of coarse random patterns under noise, learnable and the same every time."""
    size, train = config.image_size or 32, config.synthetic_samples
    total = train + max(train // 4, 1)
    rng = np.random.default_rng(SYNTHETIC_SEED)
    # Patches of a 4x4 grid survive a crop and a flip. Two summands below 128 fit into a byte.
    patches = rng.integers(0, 128, (SYNTHETIC_CLASSES, 4, 4, 3), np.uint8)
    place = np.arange(size) * 4 // size
    labels = np.arange(total) % SYNTHETIC_CLASSES
    images = rng.integers(0, 128, (total, size, size, 3), np.uint8)
    images += patches[:, place][:, :, place][labels]
    classes = tuple(f"pattern{index}" for index in range(SYNTHETIC_CLASSES))
    head, tail = slice(None, train), slice(train, None)
    return measured_source(
        "synthetic",
        Split(images=images[head], labels=labels[head]),
        Split(images=images[tail], labels=labels[tail]),
        classes,
    )
