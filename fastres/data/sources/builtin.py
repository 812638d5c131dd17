"""Data sets that need no download: scikit-learn's digits, and synthetic patterns."""

from __future__ import annotations

import numpy as np

from fastres.config.schema import DataConfig
from fastres.data.sources.source import Source, Split, measured_source

DIGITS_SEED = 0
SYNTHETIC_SEED = 0
SYNTHETIC_CLASSES = 10


def digits(config: DataConfig) -> Source:
    """Return scikit-learn's 1,797 handwritten digits, 8x8 grey, stratified into 1,437 and 360."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images = np.rint(data.images * (255 / 16)).astype(np.uint8)[..., None]  # (1797, 8, 8, 1)
    both = Split(images=images, labels=data.target.astype(np.int64))
    train, test = train_test_split(np.arange(len(both)), test_size=360, stratify=both.labels, random_state=DIGITS_SEED)
    return measured_source("digits", both.subset(np.sort(train)), both.subset(np.sort(test)), tuple("0123456789"))


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
