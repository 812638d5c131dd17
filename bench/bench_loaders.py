"""images/s of the loaders, against torch's DataLoader with as many workers as there are cores, and against what the
networks take.

    pytest bench/bench_loaders.py --benchmark-only

Arrays and JPEGs of 32 px with CIFAR's augmentation, and photographs with ImageNet's at 224 px: crops of
scikit-learn's two photographs. Each round starts its loader and takes all its batches, so that none works ahead in
another's time; the start, of a tenth of a second or, on a GPU, of some, is in it. JPEGs reach the resident loader
decoded, as they do from the second start on. What a network takes is its training step alone, measured in the same
process.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bench.lib.paired import interleaved
from bench.lib.workloads import DEVICE, Batches, Net, engine_training
from fastres.config.schema import Config, DataConfig, RunConfig, TrainConfig
from fastres.data.loaders.build import Loader, build_loader
from fastres.data.sources.load import load_source
from fastres.training.engine import resolve_engine
from fastres.utils.timing import interleaved as timed

BATCH, ROUNDS = 64, 7
CIFAR: dict[str, Any] = {"augment": "crop"}
IMAGENET: dict[str, Any] = {"augment": "resized_crop", "image_size": 224}
GPU = DEVICE.type == "cuda"
LONGER = 10 if GPU else 1  # beside the start of a loader, batches of a CPU's round are nothing to a GPU
# What: (fields of DataConfig, loaders, batches of a round, the network that would take them).
CASES: dict[str, tuple[dict[str, Any], tuple[str, ...], int, str]] = {
    "arrays_32px": (
        {"source": "synthetic", "synthetic_samples": 5_120, **CIFAR},
        ("resident", "dali", "dataloader"),
        40 * LONGER,
        "resnet20",
    ),
    "jpeg_32px": (
        {"source": "imagefolder", **CIFAR},
        ("resident", "dali", "dataloader"),
        200 * LONGER,
        "resnet20",
    ),
    "jpeg_224px": ({"source": "imagefolder", **IMAGENET}, ("dali", "dataloader"), 8 * LONGER, "resnet50"),
}
# The network: (batch, side in pixels, steps of a region, regions measured).
APPETITES = {
    "resnet20": (128, 32, 500 if GPU else 8, 5),
    "resnet50": (256, 224, 20, 5) if GPU else (16, 224, 1, 5),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of photographs: 2,560 of 32 px, and 512 of 400 x 300; and one for the decoded."""
    from sklearn.datasets import load_sample_images

    rng, roots = np.random.default_rng(0), {"cache": tmp_path_factory.mktemp("cache")}
    for name, (width, height), count in (("jpeg_32px", (32, 32), 1_280), ("jpeg_224px", (400, 300), 256)):
        root = roots[name] = tmp_path_factory.mktemp(name)
        for kind, photograph in zip(("china", "flower"), load_sample_images().images, strict=True):
            for part, number in (("train", count), ("test", 2)):
                (root / part / kind).mkdir(parents=True)
                for i in range(number):
                    top, left = int(rng.integers(427 - height + 1)), int(rng.integers(640 - width + 1))
                    crop = Image.fromarray(photograph[top : top + height, left : left + width])
                    crop.save(root / part / kind / f"{i:04}.jpg", quality=90)
    return roots


def region_of(loader: str, fields: dict[str, Any], batches: int) -> Callable[[], None]:
    """Starts the loader and takes that many batches."""
    made = built(loader, fields, BATCH)

    def region() -> None:
        for _ in made.train(0, batches):
            pass

    return region


def built(loader: str, fields: dict[str, Any], batch: int) -> Loader:
    workers = os.cpu_count() or 1
    config = Config(
        data=DataConfig(loader=loader, workers=workers, **fields),
        train=TrainConfig(batch_size=batch),
        run=RunConfig(),
    )
    engine = resolve_engine(config)
    source = load_source(config.data)
    return build_loader(config, source, source.train, device=engine.device, dtype=engine.dtype)


def fed_by_dali(batch: int, folders: dict[str, Path]) -> Batches:
    """Photographs at 224 px for ever, in the engine's precision."""
    fields = {**CASES["jpeg_224px"][0], "root": str(folders["jpeg_224px"]), "cache": str(folders["cache"])}
    return iter(built("dali", fields, batch).train(0, 10**9))


@cache
def appetite(model: str) -> float:
    """Images/s of the network's training step, fed from memory: the median of a few regions."""
    batch, side, steps, regions = APPETITES[model]
    take = engine_training(Net(name=model, batch=batch, side=side))
    timing = timed({model: lambda: take(steps)}, regions, DEVICE, warm_up=2)[model]
    return batch * steps / timing.median_s


@pytest.mark.parametrize(
    ("case", "loader"), [(case, loader) for case, (_, loaders, *_) in CASES.items() for loader in loaders]
)
def bench_loader(benchmark: Any, folders: dict[str, Path], case: str, loader: str) -> None:
    fields, _, batches, model = CASES[case]
    if case in folders:
        fields = {**fields, "root": str(folders[case]), "cache": str(folders["cache"])}
    baseline, region = (region_of(name, fields, batches) for name in ("dataloader", loader))
    baseline()
    region()
    interleaved(benchmark, baseline, region, batches * BATCH, ROUNDS)
    benchmark.extra_info.update(
        model=model, appetite_images_per_s=appetite(model),
        times_appetite=benchmark.extra_info["images_per_s"] / appetite(model),
    )  # fmt: skip
