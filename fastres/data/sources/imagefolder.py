"""Read folders of images: train/CLASS/* with val/ or test/ beside it, or class folders alone."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from fastres.config.schema import DataConfig
from fastres.data.sources.cache import Size, kept_images, sizes_and_reasons, write_bad_list
from fastres.data.sources.formats import image_suffixes
from fastres.data.sources.source import HOLD_OUT_SEED, NORMALIZATION, Source, Split
from fastres.utils.errors import UsageError
from fastres.utils.suggest import one_line

NAMED = 3  # files that a note names; the .bad file of the cache lists all
TEST_SHARE = 0.1  # of each class, if there are class folders alone

ClassFiles = dict[str, list[Path]]  # the files of a part, by class


@dataclass
class Seen:
    """Count what a search for images came across besides images."""

    outside: list[Path] = field(default_factory=list)  # links that lead out of the root
    left_out: Counter[str] = field(default_factory=Counter)  # other files, by suffix


def imagefolder(config: DataConfig) -> Source:
    """Return the data set of root/train/CLASS/** with test/ or val/ beside it, or of root/CLASS/** alone.

    Every file that Pillow decodes is an image, at any depth. If there are both test/ and val/, val/ is for the curve.
    Class folders alone are divided. The files are decoded here only for the resident loader.

    Raises:
        UsageError: if a folder is missing or empty, a class has no training images, or a file is bad.
    """
    root = Path(config.root)
    parts, notes = _parts(root, config)
    classes = tuple(parts["train"])
    for part, files in parts.items():
        if unknown := [name for name in files if name not in classes]:
            raise UsageError(
                f"{_folder(root, part) / unknown[0]} is a class that {root / 'train'} lacks; add or remove it"
            )
    if config.skip_bad:
        parts, said = _without_bad(root, parts, config)
        notes += said

    def split(part: str) -> Split:
        index = np.array([classes.index(name) for name in parts[part]], np.int64)
        labels = np.repeat(index, [len(paths) for paths in parts[part].values()])
        paths = _flat(parts[part])
        images = None
        if config.loader == "resident":
            images, said = kept_images(_folder(root, part), part, paths, config)
            notes.extend(said)
        return Split(labels=labels, images=images, paths=paths, asked_size=config.image_size, exif=config.exif)

    splits = {part: split(part) for part in parts}
    mean, std = NORMALIZATION["imagefolder"]
    return Source(
        name="imagefolder",
        train=splits["train"],
        test=splits.get("test") or splits["val"],
        validation=splits["val"] if "test" in splits and "val" in splits else None,
        classes=classes,
        mean=mean,
        std=std,
        notes=tuple(dict.fromkeys(notes)),
        root=root,
    )


def _parts(root: Path, config: DataConfig) -> tuple[dict[str, ClassFiles], list[str]]:
    """Return the files of train and of test, val or both, by class, and notes for the user."""
    if not root.is_dir():
        raise UsageError(f"data.root: no folder {root}; it must hold images in train/CLASS/ and test/CLASS/, or CLASS/")
    seen, notes = Seen(), []
    tests = [name for name in ("test", "val") if (root / name).is_dir()]
    if (root / "train").is_dir() and tests:
        parts = {part: _class_files(root, root / part, config.skip_bad, seen) for part in ("train", *tests)}
        if len(tests) == 2:
            notes.append(f"{root}: val/ is for the curve, test/ for the result")
    elif (root / "train").is_dir() or tests:
        missing = "test (or val)" if not tests else "train"
        raise UsageError(f"data.root: no folder {missing} in {root}; it must hold train/CLASS/ and test/CLASS/")
    else:
        parts = _divided(_class_files(root, root, config.skip_bad, seen))
        train, test = (sum(map(len, files.values())) for files in parts.values())
        notes.append(
            f"{root} has neither train/ nor test/: {test:,} of {train + test:,} images are the test set, "
            f"{TEST_SHARE:.0%} of each class by seed {HOLD_OUT_SEED}"
        )
    if seen.outside:
        first = seen.outside[0]
        notes.append(
            f"{len(seen.outside):,} links lead out of {root} and are followed; the first is {first}, "
            f"to {os.path.realpath(first)}"
        )
    if seen.left_out:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in seen.left_out.most_common(NAMED))
        more = ", …" if len(seen.left_out) > NAMED else ""
        notes.append(
            f"{seen.left_out.total():,} files under {root} are left out, because their names are not those of images: "
            f"{kinds}{more}"
        )
    return parts, [one_line(note) for note in notes]


def _divided(files: ClassFiles) -> dict[str, ClassFiles]:
    """Return train and test: TEST_SHARE of each class, at least one file, for test. One file alone is for training."""
    rng = np.random.default_rng(HOLD_OUT_SEED)
    parts: dict[str, ClassFiles] = {"train": {}, "test": {}}
    for name, paths in files.items():
        count = max(1, round(TEST_SHARE * len(paths))) if len(paths) > 1 else 0
        chosen = set(rng.permutation(len(paths))[:count].tolist())
        parts["train"][name] = [path for i, path in enumerate(paths) if i not in chosen]
        if chosen:
            parts["test"][name] = [path for i, path in enumerate(paths) if i in chosen]
    return parts


def _folder(root: Path, part: str) -> Path:
    """Return the folder of a part's classes: the root itself if there are class folders alone."""
    return root / part if (root / part).is_dir() else root


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
        found, said = sizes_and_reasons(_folder(root, part), part, paths, config)
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
                    f"no usable image in {_folder(root, part) / name} (for example {files[name][0].name}: "
                    f"{bad[files[name][0]]}); replace the images or remove that class"
                )
        if bad:
            notes.append(_bad_note(_folder(root, part), part, bad, len(paths), config))
    return good, notes


def _bad_note(folder: Path, part: str, bad: dict[Path, str], total: int, config: DataConfig) -> str:
    """Return a line with the number of files left out of a folder, the first ones, and the file that lists all."""
    lines = [f"{path.relative_to(folder)} ({reason})" for path, reason in bad.items()]
    listed = write_bad_list(folder, part, lines, config)
    more = f" and {len(lines) - NAMED:,} more" if len(lines) > NAMED else ""
    note = f"{len(lines):,} of the {total:,} images of {folder} are left out: {', '.join(lines[:NAMED])}{more}" + (
        f"; all are listed in {listed}" if listed else ""
    )
    return one_line(note)


def _class_files(root: Path, folder: Path, broken: bool, seen: Seen) -> ClassFiles:
    """Return the image files below each class folder of `folder`, both in the order of their names.

    Links that lead out of root are followed and reported, because shared data sets are often linked together.

    Args:
        root: the data set's folder.
        folder: the folder of the class folders.
        broken: include image files that are links to nothing, instead of raising.
        seen: receives links that lead out of root, and the kinds of other files.

    Raises:
        UsageError: if there is no class, a class has no image, or there is a link to nothing.
    """
    inside = Path(os.path.realpath(root))
    checked = partial(_checked_link, inside=inside, seen=seen)
    checked(folder, False)
    classes = [Path(entry.path) for entry in _visible(folder, seen) if checked(Path(entry.path), False).is_dir()]
    if upwards := [path for path in classes if path.is_symlink() and _leads_up(path)]:
        raise UsageError(f"{upwards[0]} is a link to a folder above it, and no class; remove it")
    files = {path.name: list(_images(path, inside, broken, seen)) for path in classes}
    if not files:
        parts = f"{folder}/CLASS/" + (f", or {root}/train/CLASS/ and {root}/test/CLASS/" if folder == root else "")
        raise UsageError(f"no class folders in {folder}; images belong into {parts}")
    for name, paths in files.items():
        if not paths:
            raise UsageError(f"no images in {folder / name}; fill or remove that class")
    return files


def _visible(folder: Path, seen: Seen) -> list[os.DirEntry[str]]:
    """Return the entries of a folder in the order of their names; count those whose names begin with a dot."""
    with os.scandir(folder) as scanned:
        entries = sorted(scanned, key=lambda entry: entry.name)
    seen.left_out["hidden"] += sum(entry.name.startswith(".") for entry in entries)
    seen.left_out += Counter()  # drops kinds of which there are none
    return [entry for entry in entries if not entry.name.startswith(".")]


def _checked_link(path: Path, broken: bool, *, inside: Path, seen: Seen) -> Path:
    """Return the path; note it if it is a link out of `inside`. Raise UsageError for a link to nothing."""
    if path.is_symlink():
        if not path.exists() and not broken:
            raise UsageError(f"{path} is a link to nothing, or to itself; restore its target, or remove it")
        if not Path(os.path.realpath(path)).is_relative_to(inside):
            seen.outside.append(path)
    return path


def _leads_up(link: Path) -> bool:
    """Return True if the link leads to the folder that it is in, or to one above."""
    return Path(os.path.realpath(link.parent)).is_relative_to(os.path.realpath(link)) and link.is_dir()


def _images(folder: Path, inside: Path, broken: bool, seen: Seen) -> Iterator[Path]:
    """Yield the image files of a folder and of the folders below it, in the order of their names."""
    for entry in _visible(folder, seen):
        path = Path(entry.path)
        is_image = path.suffix.lower() in image_suffixes()
        if linked := entry.is_symlink():  # the listing has the type of other entries, which saves a call for each file
            _checked_link(path, broken and is_image, inside=inside, seen=seen)
        if linked and _leads_up(path):
            seen.left_out["links to a folder above"] += 1
        elif path.is_dir() if linked else entry.is_dir():
            yield from _images(path, inside, broken, seen)
        elif is_image and (entry.is_file() if not linked else path.is_file() or not path.exists()):
            yield path
        else:
            seen.left_out[path.suffix.lower() or "without a suffix"] += 1
