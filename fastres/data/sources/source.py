"""What there is to learn from: images, labels, class names and normalisation of every data set.

A source is read and checked here, whole; how its samples reach a device is the loaders' business. To add one:
a function from DataConfig to Source, and a line in SOURCES.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastres.config.schema import DataConfig
from fastres.data.sources.cache import Size, decode_all, keep_bad, kept_images, sizes_and_reasons
from fastres.data.sources.download import extract, obtain
from fastres.data.sources.formats import check_size, damaged, decode, read_idx, read_pickle
from fastres.utils.errors import UsageError

HOLD_OUT_SEED = 5_000  # of every run, whatever its run.seed: validation figures compare across seeds
DIGITS_SEED = 0
SYNTHETIC_SEED = 0
SYNTHETIC_CLASSES = 10
HISTOGRAM_BLOCK = 1_024  # images per bincount, which copies to int64
NAMED = 3  # files that a note names; their full list is in a file

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")

ClassFiles = dict[str, list[Path]]  # of a part of a folder: by class

# Mean and standard deviation of each channel over the published training set, in [0, 1] units. Folders of
# images take ImageNet's: pretrained weights expect them.
NORMALIZATION: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "mnist": ((0.1307,), (0.3081,)),
    "fashion_mnist": ((0.2860,), (0.3530,)),
    "imagefolder": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """Labelled images: `images` in memory, or `paths` of files that are decoded on demand (as RGB)."""

    labels: np.ndarray  # (N,) int64
    images: np.ndarray | None = None  # (N, H, W, C) uint8
    paths: tuple[Path, ...] = ()  # N files, where images is None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def channels(self) -> int:
        return 3 if self.images is None else self.images.shape[3]

    def image(self, index: int) -> np.ndarray:
        """Sample `index` as (H, W, C) uint8. UsageError where its file cannot be decoded."""
        return decode(self.paths[index]) if self.images is None else self.images[index]

    def sized_image(self, index: int, height: int, width: int) -> np.ndarray:
        """Sample `index` as (height, width, C) uint8. UsageError where it is of another size."""
        image = self.image(index)
        self.check_size(index, image.shape[0], image.shape[1], height, width)
        return image

    def check_size(self, index: int, height: int, width: int, wanted_height: int, wanted_width: int) -> None:
        """Refuses sample `index`, of height x width, where it is not of the size of others."""
        what = self.paths[index] if self.paths else f"image {index}"
        check_size(what, (height, width), (wanted_height, wanted_width))

    def array(self, workers: int) -> np.ndarray:
        """All samples as (N, H, W, C) uint8, decoded by that many threads.

        Raises UsageError where a file cannot be decoded, or is not of the first one's size.
        """
        return decode_all(self.paths, workers) if self.images is None else self.images

    def subset(self, indices: np.ndarray) -> Split:
        """The samples at `indices`, (M,) integers, in that order."""
        return Split(
            labels=self.labels[indices],
            images=None if self.images is None else self.images[indices],
            paths=tuple(self.paths[index] for index in indices) if self.images is None else (),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """A data set: its splits, what its labels mean, and how its pixels are normalised."""

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]
    mean: tuple[float, ...]  # per channel, in [0, 1] units
    std: tuple[float, ...]
    notes: tuple[str, ...] = ()  # what a user should know of it, a line each

    @property
    def channels(self) -> int:
        return self.train.channels


def load_source(config: DataConfig) -> Source:
    """The data set that `config` names, checked. Raises UsageError where it is bad, or not to be had."""
    try:
        return SOURCES[config.source](config)
    except (OSError, RuntimeError) as error:  # RuntimeError: ~ of a user who is not there
        raise UsageError(f"cannot read {config.source} under --data.root {config.root}: {error}") from error


def hold_out(split: Split, n: int) -> tuple[Split, Split]:
    """Divides `split` into what is left to train on and `n` held-out samples, the same ones in every run."""
    if n >= len(split):
        raise UsageError(
            f"--data.validation {n} has to be below the {len(split):,} images of the training set"
        )
    order = np.random.default_rng(HOLD_OUT_SEED).permutation(len(split))
    return split.subset(np.sort(order[n:])), split.subset(np.sort(order[:n]))


def normalization(split: Split) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of an array split, in [0, 1] units, exact to float64."""
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
        stds.append(variance**0.5 or 1.0)  # a constant channel is left at zero, not divided by it
    return tuple(means), tuple(stds)


# CIFAR-10 and CIFAR-100 ---------------------------------------------------------------------------


def cifar10(config: DataConfig) -> Source:
    from torchvision.datasets import CIFAR10

    return read_cifar("cifar10", CIFAR10, "labels", config)


def cifar100(config: DataConfig) -> Source:
    from torchvision.datasets import CIFAR100

    return read_cifar("cifar100", CIFAR100, "fine_labels", config)


def read_cifar(name: str, published: Any, label_key: str, config: DataConfig) -> Source:
    """CIFAR in torchvision's layout; `published` is torchvision's class, whose tables say what that is."""
    root = Path(config.root).expanduser()
    folder = root / published.base_folder
    meta = folder / published.meta["filename"]
    train = [folder / file for file, _ in published.train_list]
    test = [folder / file for file, _ in published.test_list]
    missing = [path for path in (*train, *test, meta) if not path.exists()]
    if missing:
        archive = root / published.filename
        if not archive.exists():
            what = f"{name} is not there: no {missing[0]}"
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
    """A batch file's images, (N, 3072) uint8 in channel planes, and labels, (N,) int64."""
    batch = read_pickle(path)
    images = batch.get("data")
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape[1:] != (3_072,):
        damaged(path, "its 'data' is not an array of rows of 3,072 bytes")
    return images, _labels(path, batch.get(label_key), len(images), classes)


# MNIST and Fashion-MNIST --------------------------------------------------------------------------


def mnist(config: DataConfig) -> Source:
    from torchvision.datasets import MNIST

    return read_mnist("mnist", MNIST, tuple("0123456789"), config)


def fashion_mnist(config: DataConfig) -> Source:
    from torchvision.datasets import FashionMNIST

    return read_mnist("fashion_mnist", FashionMNIST, tuple(FashionMNIST.classes), config)


def read_mnist(name: str, published: Any, classes: tuple[str, ...], config: DataConfig) -> Source:
    """IDX files in torchvision's layout, .gz or not; `published` is torchvision's class with its tables."""
    root = Path(config.root).expanduser()
    arrays, paths = [], []
    for file, md5 in published.resources:
        packed = root / published.__name__ / "raw" / file
        plain = packed.with_suffix("")
        path = plain if plain.exists() else packed
        if not path.exists():
            what = f"{name} is not there: no {plain} nor {packed.name}"
            obtain(what, packed, [base + file for base in published.mirrors], md5, config)
        arrays.append(read_idx(path, shape=(28, 28) if "idx3" in file else ()))
        paths.append(path)

    def split(images: np.ndarray, labels: np.ndarray, path: Path) -> Split:
        return Split(images=images[..., None], labels=_labels(path, labels, len(images), len(classes)))

    train, test = split(arrays[0], arrays[1], paths[1]), split(arrays[2], arrays[3], paths[3])
    return _published(name, root, train, test, classes, (60_000, 10_000))


# What published sets share ------------------------------------------------------------------------


def _labels(path: Path, raw: Any, images: int, classes: int) -> np.ndarray:
    """The labels of `images` images as (N,) int64, checked against both numbers."""
    if not isinstance(raw, list | np.ndarray) or images == 0 or len(raw) != images:
        found = len(raw) if isinstance(raw, list | np.ndarray) else "no"
        damaged(path, f"it has {found} labels for {images} images")
    if not all(isinstance(label, int | np.integer) and 0 <= label < classes for label in raw):
        damaged(path, f"its labels are not all whole numbers from 0 to {classes - 1}")
    return np.asarray(raw, np.int64)


def _published(
    name: str, root: Path, train: Split, test: Split, classes: tuple[str, ...], published: tuple[int, int]
) -> Source:
    """A Source with the tabulated normalisation, and a note where it is not of the published size."""
    mean, std = NORMALIZATION[name]
    notes = tuple(
        f"{name} under {root} has {len(split):,} {kind} images; the published set has {count:,}"
        for kind, split, count in zip(("training", "test"), (train, test), published, strict=True)
        if len(split) != count
    )
    return Source(name=name, train=train, test=test, classes=classes, mean=mean, std=std, notes=notes)


# Sets without a download --------------------------------------------------------------------------


def digits(config: DataConfig) -> Source:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey, stratified into 1,437 and 360."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images = np.rint(data.images * (255 / 16)).astype(np.uint8)[..., None]  # (1797, 8, 8, 1)
    both = Split(images=images, labels=data.target.astype(np.int64))
    train, test = train_test_split(
        np.arange(len(both)), test_size=360, stratify=both.labels, random_state=DIGITS_SEED
    )
    return _measured("digits", both.subset(np.sort(train)), both.subset(np.sort(test)), tuple("0123456789"))


def synthetic(config: DataConfig) -> Source:
    """Ten classes of coarse random patterns under noise: learnable, balanced, the same every time."""
    size, train = config.image_size or 32, config.synthetic_samples
    total = train + max(train // 4, 1)
    rng = np.random.default_rng(SYNTHETIC_SEED)
    # 4x4 patches survive a crop and a flip; two summands below 128 stay within a byte.
    patches = rng.integers(0, 128, (SYNTHETIC_CLASSES, 4, 4, 3), np.uint8)
    place = np.arange(size) * 4 // size
    labels = np.arange(total) % SYNTHETIC_CLASSES
    images = rng.integers(0, 128, (total, size, size, 3), np.uint8)
    images += patches[:, place][:, :, place][labels]
    classes = tuple(f"pattern{index}" for index in range(SYNTHETIC_CLASSES))
    head, tail = slice(None, train), slice(train, None)
    return _measured(
        "synthetic",
        Split(images=images[head], labels=labels[head]),
        Split(images=images[tail], labels=labels[tail]),
        classes,
    )


def _measured(name: str, train: Split, test: Split, classes: tuple[str, ...]) -> Source:
    mean, std = normalization(train)
    return Source(name=name, train=train, test=test, classes=classes, mean=mean, std=std)


# Folders of images --------------------------------------------------------------------------------


def imagefolder(config: DataConfig) -> Source:
    """root/train/CLASS/* and root/test/CLASS/* (or val), JPEG and PNG; decoded for the resident loader alone."""
    root = Path(config.root).expanduser()
    if not root.is_dir():
        raise UsageError(
            f"no folder {root}: --data.root has to hold train/CLASS/* and test/CLASS/* of images"
        )
    held = [name for name in ("test", "val") if (root / name).is_dir()]
    if not (root / "train").is_dir() or not held:
        absent = "test (or val)" if (root / "train").is_dir() else "train"
        raise UsageError(
            f"no folder {absent} in {root}: --data.root has to hold train/CLASS/* and test/CLASS/*"
        )

    outside: list[Path] = []
    parts = {part: _class_files(root, part, config.skip_bad, outside) for part in ("train", held[0])}
    classes = tuple(parts["train"])
    unknown = [name for name in parts[held[0]] if name not in classes]
    if unknown:
        raise UsageError(
            f"{root / held[0] / unknown[0]} is a class that {root / 'train'} lacks: add or remove it"
        )
    notes = [f"{root} has both test and val: test is used"] if len(held) == 2 else []
    if outside:
        notes.append(_one_line(
            f"{len(outside):,} links lead out of {root} and are followed; the first is {outside[0]}, "
            f"to {os.path.realpath(outside[0])}"
        ))  # fmt: skip
    if config.skip_bad:
        parts, said = _without_bad(root, parts, config)
        notes += said

    def split(part: str) -> Split:
        index = np.array([classes.index(name) for name in parts[part]], np.int64)
        labels = np.repeat(index, [len(paths) for paths in parts[part].values()])
        paths = _flat(parts[part])
        if config.loader == "resident":
            images, said = kept_images(root / part, paths, config)
            notes.extend(said)
            if images is not None:
                return Split(labels=labels, images=images)
        return Split(labels=labels, paths=paths)

    train, test = split("train"), split(held[0])
    mean, std = NORMALIZATION["imagefolder"]
    return Source(
        name="imagefolder",
        train=train,
        test=test,
        classes=classes,
        mean=mean,
        std=std,
        notes=tuple(dict.fromkeys(notes)),
    )


def _flat(files: ClassFiles) -> tuple[Path, ...]:
    return tuple(path for paths in files.values() for path in paths)


def _without_bad(
    root: Path, parts: dict[str, ClassFiles], config: DataConfig
) -> tuple[dict[str, ClassFiles], list[str]]:
    """The files that can be decoded and, where nothing resizes them, are of the size of most training images; and notes
    that name the others."""
    size: Size | None = None
    good: dict[str, ClassFiles] = {}
    notes: list[str] = []
    for part, files in parts.items():
        paths = _flat(files)
        found, said = sizes_and_reasons(root / part, paths, config)
        notes += said
        sizes = Counter(one for one in found if not isinstance(one, str))
        if config.augment != "resized_crop" and sizes and size is None:
            size = sizes.most_common(1)[0][0]  # of the training images, which come first
        bad: dict[Path, str] = {}
        for path, one in zip(paths, found, strict=True):
            if isinstance(one, str):
                bad[path] = one
            elif size is not None and one != size:
                bad[path] = f"{one[1]}x{one[0]} pixels, most have {size[1]}x{size[0]}"
        good[part] = {name: [path for path in own if path not in bad] for name, own in files.items()}
        for name, left in good[part].items():
            if not left:
                raise UsageError(
                    f"no image in {root / part / name} can be used, such as {files[name][0].name} "
                    f"({bad[files[name][0]]}): replace them or remove that class"
                )
        if bad:
            notes.append(_bad_note(root / part, bad, len(paths), config))
    return good, notes


def _bad_note(folder: Path, bad: dict[Path, str], total: int, config: DataConfig) -> str:
    """One line that counts the files left out of a folder, names the first and says where all are listed."""
    lines = [f"{path.relative_to(folder)} ({reason})" for path, reason in bad.items()]
    listed = keep_bad(folder, lines, config)
    more = f" and {len(lines) - NAMED:,} more" if len(lines) > NAMED else ""
    note = (
        f"{len(lines):,} of the {total:,} images of {folder} are left out: {', '.join(lines[:NAMED])}{more}"
        + (f"; all are listed in {listed}" if listed else "")
    )
    return _one_line(note)


def _one_line(note: str) -> str:
    return " ".join(note.encode("utf-8", "backslashreplace").decode().split())  # a file may have any name


def _class_files(root: Path, part: str, broken: bool, outside: list[Path]) -> ClassFiles:
    """The image files of each class folder of root/part, both in the order of their names; with those that are links to
    nothing, where `broken`, else UsageError. Links that lead out of root are added to `outside`: shared data sets are
    often linked together, so they are read, and said."""
    folder = root / part
    inside = Path(os.path.realpath(root))

    def visible(parent: Path) -> list[os.DirEntry[str]]:
        with os.scandir(parent) as entries:
            return sorted((e for e in entries if not e.name.startswith(".")), key=lambda entry: entry.name)

    def checked(path: Path, broken: bool = False) -> Path:
        if path.is_symlink() and not path.exists() and not broken:
            raise UsageError(
                f"{path} is a link to nothing, or to itself: bring back what it points to, or remove it"
            )
        if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(inside):
            outside.append(path)
        return path

    def images(of_class: Path) -> Iterator[Path]:
        for entry in visible(of_class):
            if not entry.name.lower().endswith(IMAGE_SUFFIXES):
                continue
            if not entry.is_symlink():  # the listing tells what it is: no call for each of a million files
                if entry.is_file():
                    yield Path(entry.path)
            elif (path := checked(Path(entry.path), broken)).is_file() or not path.exists():
                yield path

    checked(folder)
    classes = {entry.name: path for entry in visible(folder) if (path := checked(Path(entry.path))).is_dir()}
    files = {name: list(images(of_class)) for name, of_class in classes.items()}
    if not files:
        raise UsageError(f"no class folders in {folder}: images belong into {folder}/CLASS/")
    for name, paths in files.items():
        if not paths:
            raise UsageError(
                f"no {', '.join(IMAGE_SUFFIXES)} files in {folder / name}: fill or remove that class"
            )
    return files


SOURCES: dict[str, Callable[[DataConfig], Source]] = {
    "cifar10": cifar10,
    "cifar100": cifar100,
    "mnist": mnist,
    "fashion_mnist": fashion_mnist,
    "digits": digits,
    "imagefolder": imagefolder,
    "synthetic": synthetic,
}
