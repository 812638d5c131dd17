"""Compare the engine with its peers: ResNet-50's training step at 224 px, and airbench's run to 90 %.

    pip install -e '.[bench,peers]'
    pytest bench/bench_peers.py --benchmark-only

Each peer runs as its authors run it, interleaved with the engine, on the same data and device. torchvision's ResNet-50
runs in a plain loop, and again tuned by hand. The one of timm runs as in timm's own benchmark (channels-last, autocast,
compiled on a GPU), without that benchmark's synchronisation after every step. Engine and peer take one repeated batch,
or batches from DALI. airbench is the package from PyPI, cut to the shortest length that averages 90 %, by its own
clock. It needs a GPU and has not yet run.
"""

from __future__ import annotations

import contextlib
import io
import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.lib.loaders import fed_by_dali
from bench.lib.paired import compare
from bench.lib.plain_loop import PlainLoop, loop_training, plain_engine
from bench.lib.runs import SPEEDRUN, data_flags, warm_runs
from bench.lib.stats import GOAL, run_statistics
from bench.lib.workloads import DEVICE, GPU, Net, engine_for, engine_training
from fastres import build_model
from fastres.config.cli import parse
from fastres.config.schema import model_options
from fastres.data.loaders.build import sample_images
from fastres.data.sources.load import load_source
from fastres.data.sources.source import Source
from fastres.utils.timing import time_region

RESNET50 = Net(name="resnet50", batch=256 if GPU else 8, side=224, classes=1_000)


def torchvision() -> torch.nn.Module:
    from torchvision.models import resnet50

    model: torch.nn.Module = resnet50()
    return model


def timm() -> torch.nn.Module:
    reason = "timm is not installed; pip install -e '.[peers]'"
    model: torch.nn.Module = pytest.importorskip("timm", reason=reason).create_model("resnet50")
    return model


# By peer: its network, and True to tune it by hand with bf16 autocast, channels-last, fused SGD, compiled on a GPU.
PEERS: dict[str, tuple[Callable[[], torch.nn.Module], bool]] = {
    "torchvision, plain loop": (torchvision, False),
    "torchvision, tuned by hand": (torchvision, True),
    "timm": (timm, True),
}
# Engine and peer take one repeated batch, or batches from DALI.
CASES = [
    pytest.param(peer, feed, id=peer if feed == "synthetic" else f"{peer}, fed by {feed}")
    for feed in ("synthetic", "dali")
    for peer, (_, tuned) in PEERS.items()
    if tuned or feed == "synthetic"
]


@pytest.mark.parametrize(("peer", "feed"), CASES)
def bench_resnet50(benchmark: Any, request: pytest.FixtureRequest, peer: str, feed: str) -> None:
    if feed == "dali" and not (GPU or request.config.option.full):
        pytest.skip("on a CPU bench_loaders.py measures the cost of feeding; --full runs this too")
    build, tuned = PEERS[peer]
    engine = engine_for()
    loop = PlainLoop(build(), plain_engine(tuned=tuned), compiled=tuned and engine.compile)
    shared = None
    if feed == "dali":  # one loader for both, so that no side's batches are made in the other side's time
        shared = fed_by_dali(RESNET50.batch, request.getfixturevalue("photographs"))
    theirs = loop_training(loop, shared, RESNET50)
    ours = engine_training(RESNET50, batches=shared)
    facts: dict[str, Any] = {"peer": peer, "feed": feed, "compiled": engine.compile, "precision": engine.precision}
    compare(benchmark, RESNET50, lambda: theirs, ours, training=True, **facts)


# ---- airbench ---------------------------------------------------------------------------------------------------

# 9.9 is airbench's own length, for 94 %; a copy with lossy images needs more epochs.
EPOCHS = (2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 6.0, 7.0, 8.0, 9.9, 12.0, 14.0, 16.0, 18.0, 20.0, 23.0, 26.0)
TRIALS, CONFIRMED = 3, 10  # runs of a length: to search, and to confirm that it averages 90 %


@pytest.mark.parametrize("data", ["cifar10", "jpeg_copy"])
def bench_airbench(
    benchmark: Any, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: str
) -> None:
    if not GPU:
        pytest.skip("airbench needs a GPU")
    airbench = pytest.importorskip("airbench", reason="airbench is not installed; pip install -e '.[peers]'")
    flags, seeds = SPEEDRUN + data_flags(data, request.config), request.config.option.seeds
    source = load_source(parse(flags).data)
    monkeypatch.chdir(tmp_path)  # because airbench looks for its data in cifar10/ of the current folder, at every run
    write_for_airbench(source, tmp_path / "cifar10")
    loader = airbench.CifarLoader(
        "cifar10", train=True, batch_size=1_024, aug={"flip": True, "translate": 2}, altflip=True
    )

    def their_run(epochs: float) -> tuple[float, float]:
        """Return airbench's seconds and accuracy, of whitening, training and evaluation by six views of an image."""
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            airbench.train94(loader, epochs=epochs, verbose=True)
        return last_row(output.getvalue())

    def averages_90(epochs: float, trials: int) -> bool:
        return statistics.mean(their_run(epochs)[1] for _ in range(trials)) >= GOAL

    their_run(EPOCHS[0])  # warm
    epochs, averages = shortest(EPOCHS, averages_90)
    our_run = warm_runs(flags, tmp_path)
    # airbench's clock includes whitening, and the engine's does not.
    whitening_s = statistics.median(seconds_to_whiten(flags, source) for _ in range(5))
    ours: list[tuple[float, float]] = []
    theirs: list[tuple[float, float]] = []

    def one_of_ours() -> None:
        seconds, summary = our_run(len(ours))
        ours.append((seconds + whitening_s, summary["test_accuracy"]))
        # Update after every round, so that an interruption keeps the finished rounds.
        benchmark.extra_info.update(
            peer="airbench",
            data=source.name,
            epochs=epochs,
            peer_averages_90=averages,
            n=len(ours),
            whitening_s=whitening_s,
            fastres=run_statistics(ours),
            airbench=run_statistics(theirs),
        )

    benchmark.pedantic(one_of_ours, setup=lambda: theirs.append(their_run(epochs)), rounds=seeds)


def shortest(lengths: Sequence[float], averages_90: Callable[[float, int], bool]) -> tuple[float, bool]:
    """Return the shortest of the ascending lengths whose runs average 90 %, and True; else the longest, and False.

    A bisection with few runs finds a candidate. From there upwards, the first length that many runs confirm is taken.
    """
    first, last = 0, len(lengths) - 1
    while first < last:
        middle = (first + last) // 2
        first, last = (first, middle) if averages_90(lengths[middle], TRIALS) else (middle + 1, last)
    found = next((length for length in lengths[first:] if averages_90(length, CONFIRMED)), None)
    return (lengths[-1], False) if found is None else (found, True)


def write_for_airbench(source: Source, folder: Path) -> None:
    """Write the source's pixels in airbench's format, so that it downloads nothing.

    The images are shuffled, because a folder's order is class by class and airbench whitens by the first 5,000 images.
    """
    folder.mkdir()
    for name, split in (("train", source.train), ("test", source.test)):
        order = np.random.default_rng(0).permutation(len(split))
        images = torch.from_numpy(split.array(workers=os.cpu_count() or 1)[order])
        torch.save(
            {"images": images, "labels": torch.from_numpy(split.labels[order]), "classes": list(source.classes)},
            folder / f"{name}.pt",
        )


def last_row(output: str) -> tuple[float, float]:
    """Return seconds and accuracy from airbench's output. The row of epoch "eval" ends in accuracy and seconds."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in output.splitlines()]
    *_, accuracy, seconds = next(row for row in rows if row[1:2] == ["eval"])
    return float(seconds), float(accuracy)


def seconds_to_whiten(flags: list[str], source: Source) -> float:
    """Time the engine's whitening, which precedes its own clock."""
    config = parse(flags)
    model: Any = build_model(config.model.name, **model_options(config.model)).to(DEVICE)
    return time_region(lambda: model.whiten(sample_images(config, source, source.train).to(DEVICE)), DEVICE)
