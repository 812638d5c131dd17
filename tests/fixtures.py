"""Helpers for several tests: small learnable data sets in the published formats, rejections, and hashes."""

from __future__ import annotations

import gzip
import hashlib
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from fastres.data.sources.builtin import DIGITS
from fastres.training.engine import Engine
from fastres.utils.errors import UsageError

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def coloured_noise(labels: np.ndarray, size: int, classes: int, seed: int) -> np.ndarray:
    """Return images (N, size, size, 3) uint8 of noise around a colour per class."""
    colours = np.random.default_rng(classes).integers(0, 192, (classes, 1, 1, 3))
    noise = np.random.default_rng(seed).integers(0, 64, (len(labels), size, size, 3))
    return (colours[labels] + noise).astype(np.uint8)


def write_pickle(path: Path, content: Any, protocol: int = 2) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol))


def write_cifar10(root: Path, *, train: int = 500, test: int = 100, protocol: int = 2) -> Path:
    """Write cifar-10-batches-py under `root` and return its folder.

    It has five batches of train/5 images and one of `test` images.
    """
    folder = root / "cifar-10-batches-py"
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    for seed, (name, count) in enumerate(zip(names, [train // 5] * 5 + [test], strict=True)):
        write_pickle(folder / name, cifar_batch(count, 10, "labels", seed), protocol)
    write_pickle(folder / "batches.meta", {"label_names": list(CIFAR10_CLASSES)}, protocol)
    return folder


def write_cifar100(root: Path, *, train: int = 500, test: int = 100, protocol: int = 2) -> Path:
    """Write cifar-100-python (train, test and meta) under `root` and return its folder."""
    folder = root / "cifar-100-python"
    write_pickle(folder / "train", cifar_batch(train, 100, "fine_labels", 0), protocol)
    write_pickle(folder / "test", cifar_batch(test, 100, "fine_labels", 1), protocol)
    write_pickle(folder / "meta", {"fine_label_names": [f"class{i:02}" for i in range(100)]}, protocol)
    return folder


def cifar_batch(count: int, classes: int, label_key: str, seed: int) -> dict[str, Any]:
    """Return one CIFAR batch: "data", (count, 3072) uint8 in channel planes, and a list of labels."""
    labels = np.arange(count) % classes
    images = coloured_noise(labels, 32, classes, seed)
    return {"data": images.transpose(0, 3, 1, 2).reshape(count, -1), label_key: labels.tolist()}


def write_idx(path: Path, values: np.ndarray) -> None:
    """Write an IDX file of bytes, gzipped if `path` ends in .gz."""
    header = np.array([0x0800 + values.ndim, *values.shape], ">u4").tobytes()
    content = header + values.astype(np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


def write_mnist_idx(
    root: Path, *, name: str = "MNIST", train: int = 512, test: int = 128, packed: bool = False
) -> Path:
    """Write NAME/raw under `root` and return its folder.

    The images are scikit-learn's digits, enlarged three times to 24x24 and framed to 28x28. `train` + `test` is at most
    1,797, and no digit is in both.
    """
    digits = np.load(DIGITS)
    order = np.random.default_rng(0).permutation(len(digits["labels"]))[: train + test]
    bright = np.rint(digits["images"][order] * (255 / 16))
    images = np.pad(bright.repeat(3, axis=1).repeat(3, axis=2), ((0, 0), (2, 2), (2, 2)))
    labels = digits["labels"][order].astype(np.int64)
    folder, suffix = root / name / "raw", ".gz" if packed else ""
    for part, rows in (("train", slice(train)), ("t10k", slice(train, None))):
        write_idx(folder / f"{part}-images-idx3-ubyte{suffix}", images[rows])
        write_idx(folder / f"{part}-labels-idx1-ubyte{suffix}", labels[rows])
    return folder


def write_image_folder(
    root: Path,
    *,
    classes: Sequence[str] = ("cat", "dog"),
    train: int = 4,
    test: int = 2,
    size: int = 32,
    held: str = "test",
    suffix: str = ".jpg",
) -> Path:
    """Write root/train/CLASS/* and root/`held`/CLASS/*, and return `root`.

    Each class has `train` training images and `test` others.
    """
    for seed, (part, count) in enumerate((("train", train), (held, test))):
        labels = np.repeat(np.arange(len(classes)), count)
        for index, image in enumerate(coloured_noise(labels, size, len(classes), seed)):
            path = root / part / classes[labels[index]] / f"{index:05}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    return root


def write_turned(path: Path, upright: Image.Image, orientation: int, **options: Any) -> Path:
    """Write a file whose pixels are turned, and whose EXIF orientation makes them `upright` again; return the path."""
    # Each turn is its own inverse, except for the quarter turns, 6 and 8.
    turns = (None, "FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_90", "TRANSVERSE",
             "ROTATE_270")  # fmt: skip
    name, exif = turns[orientation - 1], Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored = upright if name is None else upright.transpose(Image.Transpose[name])
    path.parent.mkdir(parents=True, exist_ok=True)
    stored.save(path, exif=exif, **options)
    return path


def engine(**overrides: Any) -> Engine:
    """Return an engine on the CPU; by default it is eager, fp32 and channels-last."""
    fields: dict[str, Any] = {
        "device": torch.device("cpu"),
        "precision": "fp32",
        "channels_last": True,
        "compile": False,
        "compile_may_fall_back": False,
        "norm": "torch",
        "conv": "torch",
        "compress_gradients": False,
        "reasons": (),
    }
    return Engine(**{**fields, **overrides})


@contextmanager
def rejected(*names: object) -> Iterator[None]:
    """Expect the block to raise a UsageError of one readable line that has each of `names`."""
    with pytest.raises(UsageError) as caught:
        yield
    line = str(caught.value)
    assert "\n" not in line and "Traceback" not in line, line
    assert not [name for name in names if str(name) not in line], line


def sha256(path: Path) -> str:
    """Return the hash of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Creates:
    """An object that creates a file when Python itself unpickles it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")
