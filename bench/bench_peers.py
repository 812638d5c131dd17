"""The engine beside what others use for the same: ResNet-50's training step at 224 px, and airbench's run to 90 %.

    pip install -e '.[bench,peers]'
    pytest bench/bench_peers.py --benchmark-only

Each peer runs as its authors run it, in turns with the engine, on the same data and device: torchvision's ResNet-50 in
a plain loop, and again as one would tune it by hand; timm's as its own benchmark has it (channels-last, autocast,
compiled on a GPU), without that benchmark's wait after every step; on a batch that stays, and fed by DALI. Of airbench
the package from PyPI, cut to the shortest length that averages 90 %, by its own clock: not yet run, it needs a GPU.
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

from bench.bench_loaders import fed_by_dali, folders  # noqa: F401, a fixture
from bench.bench_time_to_90 import GOAL, flags_of, of_runs
from bench.lib.runs import warm_runs
from bench.lib.workloads import (
    DEVICE,
    Net,
    PlainLoop,
    compare,
    engine_for,
    engine_training,
    held,
    loop_training,
)
from fastres import build_model
from fastres.config.cli import parse
from fastres.config.schema import model_options
from fastres.data.loaders.build import sample_images
from fastres.data.sources.load import load_source
from fastres.data.sources.source import Source
from fastres.utils.timing import time_region

GPU = torch.cuda.is_available()
RESNET50 = Net(name="resnet50", batch=256 if GPU else 8, side=224, classes=1_000)


def torchvision() -> torch.nn.Module:
    from torchvision.models import resnet50

    return resnet50()


def timm() -> torch.nn.Module:
    return pytest.importorskip(
        "timm", reason="timm is not installed: pip install -e '.[peers]'"
    ).create_model("resnet50")


# Their network, and whether as one would tune it by hand: bf16 autocast, channels-last, fused SGD, compiled on a GPU.
PEERS: dict[str, tuple[Callable[[], torch.nn.Module], bool]] = {
    "torchvision, plain loop": (torchvision, False),
    "torchvision, tuned by hand": (torchvision, True),
    "timm": (timm, True),
}
# What feeds both: a batch that stays, or DALI.
CASES = [
    pytest.param(peer, feed, id=peer if feed == "synthetic" else f"{peer}, fed by {feed}")
    for feed in ("synthetic", "dali")
    for peer, (_, tuned) in PEERS.items()
    if tuned or feed == "synthetic"
]


@pytest.mark.parametrize(("peer", "feed"), CASES)
def bench_resnet50(benchmark: Any, request: pytest.FixtureRequest, peer: str, feed: str) -> None:
    if feed == "dali" and not (GPU or request.config.option.full):
        pytest.skip("on a CPU bench_loaders.py says what feeding costs: --full")
    build, tuned = PEERS[peer]
    _, engine = engine_for()
    loop = PlainLoop(build(), tuned=tuned, compiled=tuned and engine.compile)
    # One loader for both, so that neither finds its batches made in the other's time.
    shared = None if feed == "synthetic" else fed_by_dali(RESNET50.batch, request.getfixturevalue("folders"))
    theirs = loop_training(loop, shared or held(RESNET50, loop.engine, torch.float32))
    compare(
        benchmark,
        RESNET50,
        lambda: theirs,
        engine_training(RESNET50, batches=shared),
        training=True,
        precision=engine.precision,
        peer=peer,
        feed=feed,
        compiled=engine.compile,
    )


# ---- airbench ---------------------------------------------------------------------------------------------------

# 9.9 is its own, for 94 %; on a copy whose images have lost something it takes longer.
EPOCHS = (2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 6.0, 7.0, 8.0, 9.9, 12.0, 14.0, 16.0, 18.0, 20.0, 23.0, 26.0)
TRIALS, CONFIRMED = 3, 10  # of a length: to look, and to be sure that it averages 90 %


@pytest.mark.parametrize("data", ["cifar10", "jpeg_copy"])
def bench_airbench(
    benchmark: Any, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: str
) -> None:
    if not GPU:
        pytest.skip("airbench needs a GPU")
    airbench = pytest.importorskip("airbench", reason="airbench is not installed: pip install -e '.[peers]'")
    flags, seeds = flags_of(data, request.config), request.config.option.seeds
    source = load_source(parse(flags).data)
    monkeypatch.chdir(tmp_path)  # it looks for its data in cifar10/ here, at every run
    write_for_airbench(source, tmp_path / "cifar10")
    loader = airbench.CifarLoader(
        "cifar10", train=True, batch_size=1_024, aug={"flip": True, "translate": 2}, altflip=True
    )

    def their_run(epochs: float) -> tuple[float, float]:
        """Seconds and accuracy as it measures them: whitening, training, an evaluation by six views of a test image."""
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            airbench.train94(loader, epochs=epochs, verbose=True)
        return last_row(said.getvalue())

    def averages_90(epochs: float, trials: int) -> bool:
        return statistics.mean(their_run(epochs)[1] for _ in range(trials)) >= GOAL

    their_run(EPOCHS[0])  # warm
    epochs, averages = shortest(EPOCHS, averages_90)
    our_run = warm_runs(flags, tmp_path)
    # Their clock runs while they whiten, and the engine's does not.
    whitening_s = statistics.median(seconds_to_whiten(flags, source) for _ in range(5))
    ours: list[tuple[float, float]] = []
    theirs: list[tuple[float, float]] = []

    def one_of_ours() -> None:
        seconds, summary = our_run(len(ours))
        ours.append((seconds + whitening_s, summary["test_accuracy"]))
        # After every round, for what interrupts the others.
        benchmark.extra_info.update(
            peer="airbench",
            data=source.name,
            epochs=epochs,
            peer_averages_90=averages,
            n=len(ours),
            whitening_s=whitening_s,
            fastres=of_runs(ours),
            airbench=of_runs(theirs),
        )

    benchmark.pedantic(one_of_ours, setup=lambda: theirs.append(their_run(epochs)), rounds=seeds)


def shortest(lengths: Sequence[float], averages_90: Callable[[float, int], bool]) -> tuple[float, bool]:
    """The shortest of them, ascending, of which enough runs average 90 %, and whether there is one; else the longest.
    Found by halves, and from there upwards until it is sure."""
    first, last = 0, len(lengths) - 1
    while first < last:
        middle = (first + last) // 2
        first, last = (first, middle) if averages_90(lengths[middle], TRIALS) else (middle + 1, last)
    found = next((length for length in lengths[first:] if averages_90(length, CONFIRMED)), None)
    return (lengths[-1], False) if found is None else (found, True)


def write_for_airbench(source: Source, folder: Path) -> None:
    """The same pixels in the form that it keeps them in, so that it need not download any. In any order but that of a
    folder, class by class: it whitens by the first 5,000."""
    folder.mkdir()
    for name, split in (("train", source.train), ("test", source.test)):
        order = np.random.default_rng(0).permutation(len(split))
        torch.save(
            {
                "images": torch.from_numpy(split.array(workers=os.cpu_count() or 1)[order]),
                "labels": torch.from_numpy(split.labels[order]),
                "classes": list(source.classes),
            },
            folder / f"{name}.pt",
        )


def last_row(said: str) -> tuple[float, float]:
    """Seconds and accuracy of a run that it printed: its row of epoch "eval" ends with them, the accuracy first."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines()]
    *_, accuracy, seconds = next(row for row in rows if row[1:2] == ["eval"])
    return float(seconds), float(accuracy)


def seconds_to_whiten(flags: list[str], source: Source) -> float:
    """What the engine does of the kind before its clock starts."""
    config = parse(flags)
    model: Any = build_model(config.model.name, **model_options(config.model)).to(DEVICE)
    return time_region(lambda: model.whiten(sample_images(config, source, source.train).to(DEVICE)), DEVICE)


def summary(infos: list[dict[str, Any]]) -> list[str]:
    lines = []
    for info in infos:
        if info["peer"] == "airbench":
            runs = (
                f"{name} {info[name]['mean_s']:.3f} s"
                + ("" if info[name]["sd_s"] is None else f" ± {info[name]['sd_s']:.3f}")
                + f" to {info[name]['mean_accuracy']:.4f}"
                for name in ("fastres", "airbench")
            )
            cut = f"cut to {info['epochs']} epochs" + (
                "" if info["peer_averages_90"] else ", which is too short"
            )
            lines.append(f"{'airbench':<28} {', '.join(runs)}, {cut}, on {info['data']}, n={info['n']}")
            continue
        low, high = info["images_per_s_20_80"]
        peer = info["peer"] + (", fed by DALI" if info.get("feed") == "dali" else "")
        lines.append(
            f"{peer:<28} fastres {info['images_per_s']:,.1f} images/s ({low:,.1f} to {high:,.1f})  "
            f"{info['ratio']:.2f} x the peer's {info['baseline_images_per_s']:,.1f}, n={info['n']}"
        )
    return lines
