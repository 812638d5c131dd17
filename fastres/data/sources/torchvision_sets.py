"""The published data sets in torchvision's formats: CIFAR-10, CIFAR-100, MNIST, Fashion-MNIST."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastres.config.schema import DataConfig
from fastres.data.sources.download import extract, obtain
from fastres.data.sources.formats import damaged, read_idx, read_pickle
from fastres.data.sources.source import NORMALIZATION, Source, Split

# CIFAR-10 and CIFAR-100 ---------------------------------------------------------------------------


def cifar10(config: DataConfig) -> Source:
    """Return CIFAR-10."""
    from torchvision.datasets import CIFAR10

    return read_cifar("cifar10", CIFAR10, "labels", config)


def cifar100(config: DataConfig) -> Source:
    """Return CIFAR-100 with its 100 fine classes."""
    from torchvision.datasets import CIFAR100

    return read_cifar("cifar100", CIFAR100, "fine_labels", config)


def read_cifar(name: str, published: Any, label_key: str, config: DataConfig) -> Source:
    """Read CIFAR in torchvision's layout, which the tables of its class `published` describe."""
    root = Path(config.root)
    folder = root / published.base_folder
    meta = folder / published.meta["filename"]
    train = [folder / file for file, _ in published.train_list]
    test = [folder / file for file, _ in published.test_list]
    missing = [path for path in (*train, *test, meta) if not path.exists()]
    if missing:
        archive = root / published.filename
        if not archive.exists():
            what = f"{name} is missing: no {missing[0]}"
            obtain(what, archive, [published.url], published.tgz_md5, config)
        extract(archive, published.tgz_md5, folder, [path.name for path in missing])

    classes = read_pickle(meta).get(published.meta["key"])
    if not isinstance(classes, list) or not classes or not all(isinstance(c, str) for c in classes):
        damaged(meta, f"it has no list {published.meta['key']!r}")

    def split(paths: Sequence[Path]) -> Split:
        batches = [_cifar_batch(path, label_key, len(classes)) for path in paths]
        planes = np.concatenate([images for images, _ in batches]).reshape(-1, 3, 32, 32)
        labels = np.concatenate([labels for _, labels in batches])
        return Split(images=np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), labels=labels)

    return _published(name, root, split(train), split(test), tuple(classes), (50_000, 10_000))


def _cifar_batch(path: Path, label_key: str, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a batch file's images, (N, 3072) uint8 in channel planes, and labels, (N,) int64."""
    batch = read_pickle(path)
    images = batch.get("data")
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape[1:] != (3_072,):
        damaged(path, "its 'data' is not an array of rows of 3,072 bytes")
    return images, _labels(path, batch.get(label_key), len(images), classes)


# MNIST and Fashion-MNIST --------------------------------------------------------------------------


def mnist(config: DataConfig) -> Source:
    """Return MNIST."""
    from torchvision.datasets import MNIST

    return read_mnist("mnist", MNIST, tuple("0123456789"), config)


def fashion_mnist(config: DataConfig) -> Source:
    """Return Fashion-MNIST."""
    from torchvision.datasets import FashionMNIST

    return read_mnist("fashion_mnist", FashionMNIST, tuple(FashionMNIST.classes), config)


def read_mnist(name: str, published: Any, classes: tuple[str, ...], config: DataConfig) -> Source:
    """Read IDX files, .gz or not, in torchvision's layout, which the tables of its class `published` describe."""
    root = Path(config.root)
    arrays, paths = [], []
    for file, md5 in published.resources:
        packed = root / published.__name__ / "raw" / file
        plain = packed.with_suffix("")
        path = plain if plain.exists() else packed
        if not path.exists():
            what = f"{name} is missing: neither {plain} nor {packed.name}"
            obtain(what, packed, [base + file for base in published.mirrors], md5, config)
        arrays.append(read_idx(path, shape=(28, 28) if "idx3" in file else ()))
        paths.append(path)

    def split(images: np.ndarray, labels: np.ndarray, path: Path) -> Split:
        return Split(images=images[..., None], labels=_labels(path, labels, len(images), len(classes)))

    train, test = split(arrays[0], arrays[1], paths[1]), split(arrays[2], arrays[3], paths[3])
    return _published(name, root, train, test, classes, (60_000, 10_000))


# Shared by the published sets ---------------------------------------------------------------------


def _labels(path: Path, raw: Any, images: int, classes: int) -> np.ndarray:
    """Return the labels as (N,) int64 after checking them against the numbers of images and classes."""
    if not isinstance(raw, list | np.ndarray) or images == 0 or len(raw) != images:
        found = len(raw) if isinstance(raw, list | np.ndarray) else "no"
        damaged(path, f"it has {found} labels for {images} images")
    if not all(isinstance(label, int | np.integer) and 0 <= label < classes for label in raw):
        damaged(path, f"its labels are not all whole numbers from 0 to {classes - 1}")
    return np.asarray(raw, np.int64)


def _published(
    name: str, root: Path, train: Split, test: Split, classes: tuple[str, ...], published: tuple[int, int]
) -> Source:
    """Return a Source with the tabulated normalisation, and a note if a split does not have the published size."""
    mean, std = NORMALIZATION[name]
    notes = tuple(
        f"{name} under {root} has {len(split):,} {kind} images; the published set has {count:,}"
        for kind, split, count in zip(("training", "test"), (train, test), published, strict=True)
        if len(split) != count
    )
    return Source(name=name, train=train, test=test, classes=classes, mean=mean, std=std, notes=notes)
