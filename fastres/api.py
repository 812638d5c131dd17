"""Train a network from Python: the same run as on the command line, with data from arrays and any network."""

from __future__ import annotations

import dataclasses
import json
import logging
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from torch import nn

from fastres.config.cli import parse
from fastres.config.schema import Config, ModelConfig, TrainConfig
from fastres.data.sources.arrays import arrays
from fastres.data.sources.source import Source
from fastres.distributed.process_group import join_process_group
from fastres.models.fuse import unfuse
from fastres.models.fusion.modules import FusedNorm
from fastres.models.registry import GIVEN
from fastres.models.weights import load_weights
from fastres.runs.run_dir import RunDir
from fastres.train import train as train_run
from fastres.training.build import outputs_of
from fastres.training.engine import preserved_torch_settings, resolve_engine
from fastres.utils import ranks
from fastres.utils.atomic_io import parse_json
from fastres.utils.errors import UsageError
from fastres.utils.process import StopSignal, console_log
from fastres.utils.suggest import did_you_mean

LOG = logging.getLogger(__name__)
Settings = Mapping[str, Any]
PLAIN = {field.name: section for section, fields in (("train", TrainConfig), ("model", ModelConfig))
         for field in dataclasses.fields(fields) if field.name != "name"}  # fmt: skip


def fit(
    model: nn.Module | str,
    train: Source | tuple[Any, Any],
    test: tuple[Any, Any] | None = None,
    *,
    validation: tuple[Any, Any] | None = None,
    classes: Sequence[str] | None = None,
    run_dir: str | Path | None = None,
    recipe: str | None = None,
    data: Settings | None = None,
    optim: Settings | None = None,
    schedule: Settings | None = None,
    engine: Settings | None = None,
    run: Settings | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Train a network, and return the content of summary.json (test_accuracy, test_loss, …) with the folder, `run_dir`.

    The settings are the fields of the configuration, which `fastres train --help` lists, with the same defaults: those
    of He et al.'s schedule. If `steps` alone is given, the schedule is scaled to it.

        summary = fastres.fit("resnet20", train=(images, labels), test=(test_images, test_labels), steps=2_000)

    Messages go to the logger "fastres" of Python's logging. They and the progress are printed if the program has no
    handler for them; logging.getLogger("fastres").setLevel(logging.WARNING) leaves the warnings only.

    Ctrl-C saves the state after the step and raises KeyboardInterrupt; the same call with the same `run_dir` continues.
    Under torchrun every process makes the same call.

    Args:
        model: a network, (N, C, S, S) -> (N, classes), which is moved to the device and trained in place, fused
            meanwhile unless `norm` is torch; or a name, as model.name.
        train: images, uint8 (N, H, W, C), (N, C, H, W) or (N, H, W), and labels, (N,) integers from 0; or a Source.
        test: the same for the result; None with a Source.
        validation: the same for the curve; None takes test.
        classes: names of the classes, in the order of the labels; None for the numbers.
        run_dir: the run's folder; None for a new one, runs/fit-1, runs/fit-2, ….
        recipe: the recipe whose settings the others override.
        data: fields of DataConfig.
        optim: fields of OptimConfig.
        schedule: fields of ScheduleConfig.
        engine: fields of EngineConfig.
        run: fields of RunConfig.
        **settings: fields of TrainConfig and ModelConfig, such as steps, batch_size, weights, freeze.

    Raises:
        UsageError: if a setting or an array is invalid, or the network does not fit the data.
        RunError: if the run cannot continue.
        KeyboardInterrupt: after Ctrl-C.
    """
    with console_log(unless_handled=True):
        source = _source(train, test, validation, classes)
        sections = {"data": data, "optim": optim, "schedule": schedule, "engine": engine, "run": run}
        flags = [*_flags(settings, sections, recipe, run_dir), "--data.source=arrays"]
        return _fit(model, source, flags)


def _fit(model: nn.Module | str, source: Source, flags: list[str]) -> dict[str, Any]:
    """Train the run of these flags of fastres.train, and return what fit() returns."""
    if isinstance(model, str):
        return _run(parse([*flags, f"--model.name={model}"], "fastres.fit"), source)
    config = parse(flags, "fastres.fit", builds_network=False)
    fused_before = any(isinstance(module, FusedNorm) for module in model.modules())
    try:
        return _run(_with_network(config, model, source), source, model)
    finally:
        if not fused_before:
            unfuse(model)


def _run(config: Config, source: Source, network: nn.Module | None = None) -> dict[str, Any]:
    """Train the run in this process, and return what fit() returns."""
    resolved = resolve_engine(config, ranks.local_rank())
    stop = StopSignal()
    with (
        preserved_torch_settings(),
        _interrupt_saves(stop),
        join_process_group(resolved.device, config.run.timeout_s) as group,
    ):
        resolved.apply_torch_settings()
        if config.run.dir is None:
            folder = group.broadcast_from_rank0(_new_folder)
            config = replace(config, run=replace(config.run, dir=str(folder)))
        done_before = group.broadcast_from_rank0(RunDir(config).check_resumable) is not None
        if train_run(config, resolved, group, stop, source, network):
            raise KeyboardInterrupt
        folder = Path(config.run.dir or "")
        if done_before and network is not None:
            load_weights(network, folder / "model.safetensors")
        summary = group.broadcast_from_rank0(lambda: parse_json((folder / "summary.json").read_text("utf-8")))
    return {**summary, "run_dir": str(folder)}


def _source(train: Any, test: Any, validation: Any, classes: Sequence[str] | None) -> Source:
    if not isinstance(train, Source):
        if test is None:
            raise UsageError("test: is missing; give the images and labels of a test set")
        return arrays(train, test, validation, classes)
    if test is not None or validation is not None or classes is not None:
        raise UsageError("train: is a Source, which has test, validation and classes; leave them out")
    return train


def _flags(
    settings: Settings, sections: Mapping[str, Settings | None], recipe: str | None, run_dir: str | Path | None
) -> list[str]:
    """Return the settings as flags of fastres.train. Raise UsageError for an unknown plain setting."""
    if unknown := [name for name in settings if name not in PLAIN]:
        raise UsageError(
            f"fit: unknown setting {unknown[0]}{did_you_mean(unknown[0], PLAIN)}; fields of data, optim, schedule, "
            "engine and run are given as dictionaries"
        )
    fields = {f"{PLAIN[name]}.{name}": value for name, value in settings.items()}
    fields |= {
        f"{section}.{name}": value for section, given in sections.items() for name, value in (given or {}).items()
    }
    if run_dir is not None:
        fields["run.dir"] = str(run_dir)
    flags = [] if recipe is None else [f"--recipe={recipe}"]
    return flags + [f"--{name}={_text(name, value)}" for name, value in fields.items()]


def _text(name: str, value: Any) -> str:
    """Return a value as the text of a flag."""
    if isinstance(value, str | Path):
        return str(value)
    try:
        return json.dumps(value, allow_nan=False, default=_plain)
    except (TypeError, ValueError, AttributeError):
        raise UsageError(f"{name}: {value!r} is no setting; give a number, a text, a list or a dictionary") from None


def _plain(value: Any) -> Any:
    """Return a scalar or an array of numpy, or a tensor, as a number or a list."""
    return value.tolist()


def _with_network(config: Config, network: nn.Module, source: Source) -> Config:
    """Return the configuration for a network that is given, with its outputs as model.num_classes.

    Raises:
        UsageError: if the network does not map images of the source to at least as many outputs as there are classes.
    """
    side = config.data.image_size or source.train.image(0).shape[0]
    outputs = outputs_of(network, (1, source.channels, side, side))
    wanted = config.model.num_classes or outputs
    if wanted != outputs or outputs < len(source.classes):
        raise UsageError(
            f"model: {type(network).__name__} has {outputs} outputs, the data {len(source.classes)} classes"
            + ("" if wanted == outputs else f", and num_classes is {wanted}")
            + "; give a network with an output for each class"
        )
    name = f"{GIVEN}{type(network).__name__}"
    return replace(config, model=replace(config.model, name=name, num_classes=outputs))


def _new_folder() -> Path:
    """Make and return runs/fit-N for the first N that is free."""
    number = 1
    while True:
        folder = Path(f"runs/fit-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1
        except OSError as error:
            raise UsageError(f"cannot write to {folder}: {error.strerror}; give run_dir") from None


@contextmanager
def _interrupt_saves(stop: StopSignal) -> Iterator[None]:
    """Let Ctrl-C finish the step and save, while the block runs and there is something to save.

    A second one interrupts at once. Outside the main thread, where Python cannot catch signals, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: Callable[[int, FrameType | None], Any] | int | None = signal.getsignal(signal.SIGINT)

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.number or not stop.saves:
            raise KeyboardInterrupt
        stop.number = number
        LOG.warning("the run finishes its step, saves and stops")

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
