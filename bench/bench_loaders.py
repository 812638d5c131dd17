"""Measure images/s of the loaders, against torch's DataLoader and against the networks' own rate.

    pytest bench/bench_loaders.py --benchmark-only

The DataLoader has as many workers as there are cores. The data are arrays and JPEGs of 32 px with CIFAR's augmentation,
and crops of scikit-learn's two photographs with ImageNet's augmentation at 224 px. Each round starts its loader and
takes all its batches, so that no loader works ahead in another's time. The round includes the start, which takes a
tenth of a second or, on a GPU, a few tenths. The resident loader reads JPEGs from the cache of decoded images, as a run
does from its second start on. A network's rate is that of its training step alone, measured in the same process.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest

from bench.lib.loaders import IMAGENET, folder_fields, loader_of
from bench.lib.paired import paired_benchmark
from bench.lib.workloads import DEVICE, GPU, Net, engine_training
from fastres.utils.timing import interleaved

BATCH, ROUNDS = 64, 7
LONGER = 10 if GPU else 1  # because a GPU takes a CPU's number of batches in less time than a loader's start
# By case: (fields of DataConfig, loaders, batches of a round, the network that takes them).
CASES: dict[str, tuple[dict[str, Any], tuple[str, ...], int, str]] = {
    "arrays_32px": (
        {"source": "synthetic", "synthetic_samples": 5_120, "augment": "crop"},
        ("resident", "dali", "dataloader"),
        40 * LONGER,
        "resnet20",
    ),
    "jpeg_32px": (
        {"source": "imagefolder", "augment": "crop"},
        ("resident", "dali", "dataloader"),
        200 * LONGER,
        "resnet20",
    ),
    "jpeg_224px": (IMAGENET, ("dali", "dataloader"), 8 * LONGER, "resnet50"),
}
# By network: (batch, side in pixels, steps of a region, regions measured).
CONSUMERS = {"resnet20": (128, 32, 500 if GPU else 8, 5), "resnet50": (256, 224, 20, 5) if GPU else (16, 224, 1, 5)}


def region_of(loader: str, fields: dict[str, Any], batches: int) -> Callable[[], None]:
    """Return a region that starts the loader and takes that many batches."""
    made = loader_of(loader, fields, BATCH)

    def region() -> None:
        for _ in made.train(0, batches):
            pass

    return region


@cache
def consumer_rate(model: str) -> float:
    """Measure images/s of the network's training step, fed from memory: the median of a few regions."""
    batch, side, steps, regions = CONSUMERS[model]
    take = engine_training(Net(name=model, batch=batch, side=side))
    timing = interleaved({model: partial(take, steps)}, regions, DEVICE, warm_up=2)[model]
    return batch * steps / timing.median_s


@pytest.mark.parametrize(
    ("case", "loader"), [(case, loader) for case, (_, loaders, *_) in CASES.items() for loader in loaders]
)
def bench_loader(benchmark: Any, photographs: dict[str, Path], case: str, loader: str) -> None:
    fields, _, batches, model = CASES[case]
    fields = fields | folder_fields(case, photographs)
    baseline, region = (region_of(name, fields, batches) for name in ("dataloader", loader))
    baseline()
    region()
    paired_benchmark(benchmark, baseline, region, batches * BATCH, ROUNDS)
    benchmark.extra_info.update(
        model=model,
        consumer_images_per_s=consumer_rate(model),
        times_consumer_rate=benchmark.extra_info["images_per_s"] / consumer_rate(model),
    )
