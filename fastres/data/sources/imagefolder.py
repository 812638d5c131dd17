"""Read folders of images: train/CLASS/* and test/CLASS/*."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from fastres.config.schema import DataConfig
from fastres.data.sources.cache import Size, kept_images, sizes_and_reasons, write_bad_list
from fastres.data.sources.source import NORMALIZATION, Source, Split
from fastres.utils.errors import UsageError

NAMED = 3  # files that a note names; the .bad file of the cache lists all
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")

ClassFiles = dict[str, list[Path]]  # the files of train/ or test/, by class


def imagefolder(config: DataConfig) -> Source:
    """Return the data set of root/train/CLASS/* and root/test/CLASS/* (or val), JPEG and PNG.

    The files are decoded here only for the resident loader.

    Raises:
        UsageError: if a folder is missing or empty, a class has no training images, or a file is bad.
    """
    root = Path(config.root)
    if not root.is_dir():
        raise UsageError(f"data.root: no folder {root}; it must hold images in train/CLASS/* and test/CLASS/*")
    tests = [name for name in ("test", "val") if (root / name).is_dir()]
    if not (root / "train").is_dir() or not tests:
        missing = "test (or val)" if (root / "train").is_dir() else "train"
        raise UsageError(f"data.root: no folder {missing} in {root}; it must hold train/CLASS/* and test/CLASS/*")

    outside: list[Path] = []
    parts = {part: _class_files(root, part, config.skip_bad, outside) for part in ("train", tests[0])}
    classes = tuple(parts["train"])
    unknown = [name for name in parts[tests[0]] if name not in classes]
    if unknown:
        raise UsageError(f"{root / tests[0] / unknown[0]} is a class that {root / 'train'} lacks; add or remove it")
    notes = [f"{root} has both test and val: test is used"] if len(tests) == 2 else []
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

    train, test = split("train"), split(tests[0])
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
    """Return the files of all classes, class after class."""
    return tuple(path for paths in files.values() for path in paths)


def _without_bad(
    root: Path, parts: dict[str, ClassFiles], config: DataConfig
) -> tuple[dict[str, ClassFiles], list[str]]:
    """Return the usable files, and notes that name the others.

    A file is usable if it can be decoded and, unless images are resized, has the most common size of the training
    images.

    Raises:
        UsageError: if a class has no usable image.
    """
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
                    f"no usable image in {root / part / name} (for example {files[name][0].name}: "
                    f"{bad[files[name][0]]}); replace the images or remove that class"
                )
        if bad:
            notes.append(_bad_note(root / part, bad, len(paths), config))
    return good, notes


def _bad_note(folder: Path, bad: dict[Path, str], total: int, config: DataConfig) -> str:
    """Return a line with the number of files left out of a folder, the first ones, and the file that lists all."""
    lines = [f"{path.relative_to(folder)} ({reason})" for path, reason in bad.items()]
    listed = write_bad_list(folder, lines, config)
    more = f" and {len(lines) - NAMED:,} more" if len(lines) > NAMED else ""
    note = f"{len(lines):,} of the {total:,} images of {folder} are left out: {', '.join(lines[:NAMED])}{more}" + (
        f"; all are listed in {listed}" if listed else ""
    )
    return _one_line(note)


def _one_line(note: str) -> str:
    """Return the note in one line that can be encoded, although a file may have any name."""
    return " ".join(note.encode("utf-8", "backslashreplace").decode().split())


def _class_files(root: Path, part: str, broken: bool, outside: list[Path]) -> ClassFiles:
    """Return the image files of each class folder of root/part, both in the order of their names.

    Links that lead out of root are followed and reported, because shared data sets are often linked together.

    Args:
        root: the data set's folder.
        part: train, test or val.
        broken: include image files that are links to nothing, instead of raising.
        outside: receives the links that lead out of root.

    Raises:
        UsageError: if there is no class, a class has no image, or there is a link to nothing.
    """
    folder = root / part
    inside = Path(os.path.realpath(root))

    def checked(path: Path, broken: bool = False) -> Path:
        return _checked_link(path, inside, outside, broken) if path.is_symlink() else path

    checked(folder)
    classes = {entry.name: path for entry in _visible(folder) if (path := checked(Path(entry.path))).is_dir()}
    files = {name: list(_images(of_class, partial(checked, broken=broken))) for name, of_class in classes.items()}
    if not files:
        raise UsageError(f"no class folders in {folder}; images belong into {folder}/CLASS/")
    for name, paths in files.items():
        if not paths:
            raise UsageError(f"no {', '.join(IMAGE_SUFFIXES)} files in {folder / name}; fill or remove that class")
    return files


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    """Return the entries of a folder whose names do not begin with a dot, in the order of their names."""
    with os.scandir(folder) as entries:
        return sorted((e for e in entries if not e.name.startswith(".")), key=lambda entry: entry.name)


def _checked_link(link: Path, inside: Path, outside: list[Path], broken: bool) -> Path:
    """Return the link, and add it to `outside` if it leads out of `inside`. Raise UsageError for a link to nothing."""
    if not link.exists() and not broken:
        raise UsageError(f"{link} is a link to nothing, or to itself; restore its target, or remove it")
    if not Path(os.path.realpath(link)).is_relative_to(inside):
        outside.append(link)
    return link


def _images(of_class: Path, checked: Callable[[Path], Path]) -> Iterator[Path]:
    """Yield the image files of a class folder. Links go through `checked`, which may reject links to nothing."""
    for entry in _visible(of_class):
        if not entry.name.lower().endswith(IMAGE_SUFFIXES):
            continue
        if not entry.is_symlink():  # the listing has its type, which saves a call for each file
            if entry.is_file():
                yield Path(entry.path)
        elif (path := checked(Path(entry.path))).is_file() or not path.exists():
            yield path
