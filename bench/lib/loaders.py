"""The loaders of photographs that several benchmarks use."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bench.lib.workloads import Batches, training_loader
from fastres.config.schema import Config
from fastres.data.loaders.build import Loader
from fastres.training.engine import resolve_engine

IMAGENET: dict[str, Any] = {"source": "imagefolder", "augment": "resized_crop", "image_size": 224}
# By name: width and height in pixels, and the number of training images of each class.
PHOTOGRAPHS = {"jpeg_32px": (32, 32, 1_280), "jpeg_224px": (400, 300, 256)}


def write_photographs(folder: Path) -> dict[str, Path]:
    """Write crops of scikit-learn's two photographs as JPEGs, and return the folders by name, and one for the cache."""
    from sklearn.datasets import load_sample_images

    rng, roots = np.random.default_rng(0), {"cache": folder / "cache"}
    roots["cache"].mkdir()
    for name, (width, height, count) in PHOTOGRAPHS.items():
        root = roots[name] = folder / name
        for kind, photograph in zip(("china", "flower"), load_sample_images().images, strict=True):
            for part, number in (("train", count), ("test", 2)):
                (root / part / kind).mkdir(parents=True)
                for i in range(number):
                    top, left = int(rng.integers(427 - height + 1)), int(rng.integers(640 - width + 1))
                    crop = Image.fromarray(photograph[top : top + height, left : left + width])
                    crop.save(root / part / kind / f"{i:04}.jpg", quality=90)
    return roots


def folder_fields(name: str, folders: dict[str, Path]) -> dict[str, str]:
    """Return the fields of DataConfig for the folders of a name in PHOTOGRAPHS, or no fields for another name."""
    return {"root": str(folders[name]), "cache": str(folders["cache"])} if name in PHOTOGRAPHS else {}


def loader_of(loader: str, fields: dict[str, Any], batch: int) -> Loader:
    """Return the training loader, for the engine's device and precision, with as many workers as there are cores."""
    engine = resolve_engine(Config())
    engine.apply_torch_settings()
    return training_loader(engine, batch, loader=loader, workers=os.cpu_count() or 1, **fields)


def fed_by_dali(batch: int, folders: dict[str, Path]) -> Batches:
    """Yield batches of photographs at 224 px for ever, in the engine's precision."""
    fields = IMAGENET | folder_fields("jpeg_224px", folders)
    return iter(loader_of("dali", fields, batch).train(0, 10**9))
