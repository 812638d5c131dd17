"""What is measured: whole runs. The engine's, through fastres.train, and the plain loop's on the same batches.

The plain loop takes the 64k-step schedule too long to wait for with several seeds, so its accuracy comes from a twin
whose steps are replayed from CUDA graphs; `difference` shows that loop and twin compute the same bits. The capture is
not yet run on a GPU.
"""

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
import torch
from torch import Tensor

from bench.lib.workloads import PlainLoop
from fastres import build_model
from fastres.config.cli import parse
from fastres.config.schema import Config, model_options
from fastres.data.loaders.build import build_loader, classes_of
from fastres.data.sources.load import load_source
from fastres.data.sources.source import Source
from fastres.train import train
from fastres.training.cuda_graph import capturing
from fastres.training.engine import resolve_engine
from fastres.training.evaluator import Evaluator
from fastres.training.schedule import lr_scale

# ---- the data ---------------------------------------------------------------------------------------------------

# By name: the flags that choose it, its place apart. "digits" is as its recipe has it.
DATA: dict[str, list[str]] = {
    "digits": [],
    "cifar10": ["--data.source", "cifar10"],
    "jpeg_copy": ["--data.source", "imagefolder"],
}


def data_flags(data: str, config: pytest.Config) -> list[str]:
    """The flags of a name in DATA. Skips what cannot be run here, or only with patience."""
    place: list[str] = []
    if data == "cifar10":
        root = Path(config.option.data_root).resolve()  # a benchmark may change the folder
        if not (root / "cifar-10-batches-py").is_dir():
            pytest.skip(f"no cifar-10-batches-py in {root}: --data-root says where it is")
        place = ["--data.root", str(root)]
    if data == "jpeg_copy":
        if config.option.jpeg_copy is None:
            pytest.skip("--jpeg-copy says where CIFAR-10 is as a folder of JPEGs")
        place = ["--data.root", str(Path(config.option.jpeg_copy).resolve())]
    if data != "digits":
        needs_patience(config)
    return DATA[data] + place


def needs_patience(config: pytest.Config) -> None:
    if not torch.cuda.is_available() and not config.option.full:
        pytest.skip("on a CPU a run takes 16 minutes and more: --full")


# ---- the engine's -----------------------------------------------------------------------------------------------


def run(flags: Sequence[str], seed: int, folder: Path, source: Source | None = None) -> dict[str, Any]:
    """One run of fastres.train in this process, and its summary. `source` stands in for the configured one."""
    config = parse([*flags, "--run.seed", str(seed), "--run.dir", str(folder)])
    engine, said = resolve_engine(config), io.StringIO()
    with contextlib.redirect_stdout(said):
        status = train(config, engine, [0], source)
    assert status == 0
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    ran = {name: summary[name] for name in ("compile", "cuda_graph")}
    chosen = {name: getattr(engine, name) for name in ran}
    assert ran == chosen, f"it fell back, and would be measured as something else:\n{said.getvalue()}"
    return summary


def with_random_labels(source: Source) -> Source:
    labels = np.random.default_rng(0).permutation(source.train.labels)
    return dataclasses.replace(source, train=dataclasses.replace(source.train, labels=labels))


def warm_runs(flags: list[str], folder: Path) -> Callable[[int], tuple[float, dict[str, Any]]]:
    """A function from a seed to the seconds of its run, and its summary."""
    source = load_source(parse(flags).data)
    run(flags, 10_000, folder / "10000", with_random_labels(source))

    def measured(seed: int) -> tuple[float, dict[str, Any]]:
        summary = run(flags, seed, folder / f"{seed}", source)
        return summary["train_time_s"] + summary["final_evaluation_s"], summary

    return measured


# ---- the plain loop's -------------------------------------------------------------------------------------------


class PlainRun:
    """A configured run as one writes it first, see PlainLoop; `how` are its arguments.

    The same weights at the start, the same batches and the same schedule as the engine's run of `config`.
    """

    def __init__(self, config: Config, source: Source, **how: Any) -> None:
        torch.manual_seed(config.run.seed)
        model = build_model(
            config.model.name,
            num_classes=classes_of(config, source),
            in_channels=source.channels,
            norm="torch",
            **model_options(config.model),
        )
        self.config = config
        self.loop = PlainLoop(model, optim=config.optim, label_smoothing=config.train.label_smoothing, **how)

        def loader_of(split: Any) -> Any:
            place = {
                "device": self.loop.engine.device,
                "dtype": self.loop.engine.dtype,
                "rank": 0,
                "world_size": 1,
            }
            return build_loader(config, source, split, **place)

        self.loader, self.test_loader = loader_of(source.train), loader_of(source.test)

    def steps(self, first: int, last: int) -> Tensor:
        """Takes the steps [first, last), and leaves the loss of each on the device: (last - first,)."""
        self.loop.switch()
        self.loop.model.train()
        losses = []
        for i, (images, labels) in enumerate(self.loader.train(first, last), first):
            lr = self.config.optim.lr * lr_scale(self.config.schedule, i, self.config.train.steps)
            images = images.contiguous(memory_format=self.loop.engine.memory_format)
            losses.append(self.take(images, labels, lr))
        return torch.stack(losses)

    def take(self, images: Tensor, labels: Tensor, lr: float) -> Tensor:
        """One step: its loss, ()."""
        return self.loop(images, labels, lr)

    def test_accuracy(self) -> float:
        self.loop.switch()
        return Evaluator(self.loop.model, self.loop.engine)(self.test_loader.evaluate()).accuracy


class GraphedTwin(PlainRun):
    """The plain run with each step replayed from a CUDA graph of it, which spares the host's work and nothing else.

    SGD hands its kernels the learning rate as a number, so there is a graph for each that the schedule has: three in
    64k steps. The first steps are taken eagerly, so that momentum is there; they count. Not yet run on a GPU.
    """

    EAGER_STEPS = 3

    def __init__(self, config: Config, source: Source) -> None:
        super().__init__(config, source, deterministic=True)
        self.stream = torch.cuda.Stream(self.loop.engine.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.loss: Tensor | None = None
        self.captured_lr: float | None = None
        self.taken = 0

    def steps(self, first: int, last: int) -> Tensor:
        # All on one stream, the eager steps too: autograd keeps to the stream that a forward ran on.
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            losses = super().steps(first, last)
        torch.cuda.current_stream().wait_stream(self.stream)
        return losses

    def take(self, images: Tensor, labels: Tensor, lr: float) -> Tensor:
        self.taken += 1
        if self.taken <= self.EAGER_STEPS:
            return super().take(images, labels, lr)
        if self.captured_lr != lr:
            self.capture(images, labels, lr)
        self.images.copy_(images)
        self.labels.copy_(labels)
        assert self.graph is not None and self.loss is not None
        self.graph.replay()
        return self.loss.clone()

    def capture(self, images: Tensor, labels: Tensor, lr: float) -> None:
        """Capturing runs nothing: weights and momentum stay as they are."""
        # What lies in the former graph's memory goes before the capture, which must not be disturbed by freeing it.
        self.graph = self.loss = None
        self.loop.optimizer.zero_grad()
        self.images, self.labels = torch.empty_like(images), torch.empty_like(labels)
        graph = torch.cuda.CUDAGraph()
        with capturing(graph, stream=self.stream):
            self.loss = super().take(self.images, self.labels, lr)
        self.graph, self.captured_lr = graph, lr


def difference(one: PlainRun, other: PlainRun, steps: int) -> dict[str, Any]:
    """Both take the first steps of their run: whether every loss and every bit of the state after them is the same."""
    losses = [run.steps(0, steps).cpu() for run in (one, other)]
    different = (losses[0] != losses[1]).nonzero().flatten().tolist()
    states = [run.loop.model.state_dict().values() for run in (one, other)]
    return {
        "steps": steps,
        "first_different_step": different[0] if different else None,
        "state_equal": all(torch.equal(a, b) for a, b in zip(*states, strict=True)),
        "last_losses": [float(of_run[-1]) for of_run in losses],
    }


def same(found: dict[str, Any]) -> bool:
    """What `difference` found, or bench_schedule.same_run of two folders."""
    return found["first_different_step"] is None and found["state_equal"]
