"""Describe the data of a run: data.json, the metadata of exports, and what a resumed run compares.

A network's outputs mean nothing without the names of its classes, and its input needs the training's normalisation.
"""

from __future__ import annotations

import dataclasses
import hashlib
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastres.config.schema import Config
from fastres.data.loaders.build import image_size
from fastres.data.sources.source import Source, Split
from fastres.utils.errors import UsageError
from fastres.utils.suggest import few

SHOWN = 5  # classes named in a message
PROBED = 256  # images of an array that the fingerprint reads


@dataclass(frozen=True, kw_only=True)
class DataDescription:
    """The content of data.json."""

    source: str  # as data.source
    classes: tuple[str, ...]  # names, in the order of the network's outputs
    mean: tuple[float, ...]  # of each channel, of pixels in [0, 1]
    std: tuple[float, ...]
    image_size: int  # side in pixels of the network's input
    channels: int
    resize: bool  # an evaluation resizes images and takes the centre (data.augment resized_crop)
    samples: dict[str, int]  # images for train, validation and test
    fingerprint: str  # of the files' names and sizes, or of arrays; a data set's path is not part of it
    exif: bool = False  # image files are turned upright; earlier versions do not write it

    def outputs(self, num_classes: int | None) -> int:
        """Return the number of a network's outputs, given model.num_classes: at least that of the classes."""
        return num_classes or len(self.classes)

    def to_dict(self) -> dict[str, Any]:
        """Return the description as values of JSON."""
        return dataclasses.asdict(self) | {name: list(getattr(self, name)) for name in ("classes", "mean", "std")}


def describe(config: Config, source: Source) -> DataDescription:
    """Return the description of a source under a run's configuration."""
    held_out: int = config.data.validation  # from the training samples
    validation = held_out or len(source.validation or ())
    return DataDescription(
        source=source.name,
        classes=source.classes,
        mean=source.mean,
        std=source.std,
        image_size=image_size(config, source),
        channels=source.channels,
        resize=config.data.augment == "resized_crop",
        samples={"train": len(source.train) - held_out, "validation": validation, "test": len(source.test)},
        fingerprint=fingerprint(source),
        exif=config.data.exif,
    )


def from_dict(content: Any, what: object) -> DataDescription:
    """Return the description that `to_dict` wrote. Raise UsageError, naming `what`, if the content is another."""
    try:
        content = {"exif": False} | content
        fields = {field.name: content[field.name] for field in dataclasses.fields(DataDescription)}
        fields |= {name: tuple(fields[name]) for name in ("classes", "mean", "std")}
        found = DataDescription(**fields)
        numbers = [*found.mean, *found.std, found.image_size, found.channels, *found.samples.values()]
        if (
            not all(isinstance(name, str) for name in found.classes)
            or not all(isinstance(number, int | float) for number in numbers)
            or not all(isinstance(flag, bool) for flag in (found.resize, found.exif))
        ):
            raise TypeError("a value has another type")
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{what}: does not describe the data of a run ({error}); remove it") from None
    return found


def changes(old: DataDescription, new: DataDescription) -> list[str]:
    """Return what changed from one description to the other, in the words of an error message."""
    found = []
    if old.classes != new.classes:
        found.append(f"the classes are {few(new.classes, SHOWN)}, and were {few(old.classes, SHOWN)}")
    for part, count in new.samples.items():
        if count != old.samples.get(part):
            found.append(f"{part} has {count:,} images, and had {old.samples.get(part, 0):,}")
    for name in ("source", "image_size", "channels", "mean", "std", "resize", "exif"):
        before, now = getattr(old, name), getattr(new, name)
        if before != now:
            found.append(f"{name} is {now}, and was {before}")
    if not found and old.fingerprint != new.fingerprint:
        found.append("files have other names or sizes")
    return found


def with_classes_of(source: Source, run: DataDescription) -> Source:
    """Return a source for an evaluation of a run, with the run's normalisation and labels mapped by class name.

    Raises:
        UsageError: if the source has a class or a number of channels that the run's network has not.
    """
    unknown = [name for name in source.classes if name not in run.classes]
    if unknown or source.channels != run.channels:
        raise UsageError(
            f"data.source: {source.name} has {source.channels} channels and the classes {few(source.classes, SHOWN)}; "
            f"the run's network has {run.channels} channels and the classes {few(run.classes, SHOWN)}"
            + (f", without {few(unknown, SHOWN)}" if unknown else "")
            + "; point --data.root and --data.source at data with the run's classes"
        )
    outputs = np.array([run.classes.index(name) for name in source.classes], np.int64)
    test = dataclasses.replace(source.test, labels=outputs[source.test.labels])
    return dataclasses.replace(source, test=test, classes=run.classes, mean=run.mean, std=run.std)


def fingerprint(source: Source) -> str:
    """Return a hash of both splits: of the names and sizes of files, or of shape, labels and some images of arrays."""
    sha = hashlib.sha256()
    for split in filter(None, (source.train, source.validation, source.test)):
        sha.update(f"{len(split)} images\n".encode())
        sha.update(split.labels.astype("<i8").tobytes())
        if split.paths:
            for path in split.paths:
                name = path.relative_to(source.root) if source.root else path.name
                sha.update(f"{name} {path.stat().st_size}\n".encode("utf-8", "surrogateescape"))
        else:
            sha.update(_of_array(split).encode())
    return sha.hexdigest()


def _of_array(split: Split) -> str:
    assert split.images is not None
    probed = split.images[:: max(1, len(split) // PROBED)]
    return f"{split.images.shape[1:]} {split.images.dtype} {zlib.crc32(probed.tobytes()):08x}\n"
