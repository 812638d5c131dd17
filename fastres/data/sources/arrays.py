"""Make a data set from arrays in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fastres.data.sources.source import Source, Split, measured_source
from fastres.utils.errors import UsageError

CHANNELS = (1, 3)


def arrays(
    train: tuple[Any, Any],
    test: tuple[Any, Any],
    validation: tuple[Any, Any] | None = None,
    classes: Sequence[str] | None = None,
) -> Source:
    """Return a data set of images and labels, which are not copied if they are (N, H, W, C).

    Args:
        train: images, uint8 (N, H, W, C), (N, C, H, W) or (N, H, W) with 1 or 3 channels, and labels, (N,) integers
            from 0; arrays of numpy or tensors on the CPU.
        test: the same for the result.
        validation: the same for the curve; None takes test.
        classes: names of the classes, in the order of the labels; None for the numbers.

    Raises:
        UsageError: if an array has another type or shape, or a label has no class.
    """
    given = {"train": train, "test": test} | ({} if validation is None else {"validation": validation})
    splits = {part: _split(part, *_pair(part, pair)) for part, pair in given.items()}
    shapes = {part: split.images.shape[1:] for part, split in splits.items() if split.images is not None}
    for part, shape in shapes.items():
        if shape != shapes["train"]:
            raise UsageError(f"{part}: has images of shape {shape}, and train of {shapes['train']}; make them equal")
    largest = max(int(split.labels.max()) for split in splits.values())
    names = tuple(map(str, range(largest + 1))) if classes is None else tuple(map(str, classes))
    if largest >= len(names):
        raise UsageError(f"classes: {len(names)} names, but there is a label {largest}; name every class")
    source = measured_source("arrays", splits["train"], splits["test"], names)
    return replace(source, validation=splits.get("validation"))


def _pair(part: str, pair: Any) -> tuple[Any, Any]:
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise UsageError(f"{part}: must be a pair, (images, labels), not {type(pair).__name__}")
    return pair[0], pair[1]


def _split(part: str, images: Any, labels: Any) -> Split:
    """Return the split of a part's arrays. Raise UsageError if they have another type or shape."""
    images, labels = np.asarray(images), np.asarray(labels)
    if images.dtype != np.uint8:
        raise UsageError(f"{part}: the images are {images.dtype}; give uint8, from 0 to 255, which is normalised here")
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim == 4 and images.shape[3] not in CHANNELS and images.shape[1] in CHANNELS:
        images = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
    if images.ndim != 4 or images.shape[3] not in CHANNELS:
        raise UsageError(
            f"{part}: the images have shape {images.shape}; give (N, H, W, C) or (N, C, H, W) with 1 or 3 channels"
        )
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) != len(images) or not len(labels):
        raise UsageError(
            f"{part}: {len(images):,} images have labels of shape {labels.shape} and type {labels.dtype}; give one "
            "integer for each image"
        )
    if labels.min() < 0:
        raise UsageError(f"{part}: there is a label {labels.min()}; number the classes from 0")
    return Split(labels=labels.astype(np.int64), images=images)
