"""Reject values that have the right type but are out of range or incompatible. Nothing is loaded or written."""

from __future__ import annotations

import importlib.util
import math
import re
from importlib import metadata

from fastres.config.length import needs_data
from fastres.config.schema import SECTIONS, Config, DataConfig, ModelConfig, model_options, trackers_of
from fastres.models.registry import build_model, check_foreign, find, is_foreign
from fastres.utils import ranks
from fastres.utils.errors import UsageError, first_line
from fastres.utils.suggest import unknown

TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")  # each is also the name of its package and of the extra
TRACKER_GROUP = "fastres.trackers"  # of the entry points by which installed packages add trackers


def check(config: Config, scaled: bool = False, *, builds_network: bool = True) -> None:
    """Raise UsageError for the first value that is out of range or incompatible with another.

    Args:
        config: the configuration.
        scaled: True if the milestones have been scaled to the run's steps, so that they may be 0 or equal.
        builds_network: False if the caller has the network, so that model.name need not be one that can be built.
    """
    check_length(config, scaled)
    _check_training(config)
    _check_batch(config.train.batch_size, config.train.accumulate)
    check_device(config.engine.device)
    _check_data(config.data)
    _check_trackers(config)
    if builds_network:
        _check_model(config.model)


def _check_trackers(config: Config) -> None:
    """Raise UsageError for a tracker that is unknown or whose package is not installed."""
    for name in trackers_of(config.run):
        if name in TRACKERS:
            _reject_if(
                importlib.util.find_spec(name) is None,
                f"run.trackers: {name} is not installed; pip install 'fastres[{name}]'",
            )
        elif name not in (added := [entry.name for entry in metadata.entry_points(group=TRACKER_GROUP)]):
            raise UsageError(f"run.trackers: {unknown('tracker', name, [*TRACKERS, *added])}")


def check_length(config: Config, scaled: bool) -> None:
    """Raise UsageError for a number out of range, or a schedule that does not fit the run's steps, if they are known.

    Args:
        config: the configuration.
        scaled: as for check.
    """
    _check_numbers(config)
    schedule, steps = config.schedule, config.train.steps
    least = 0 if scaled else 1
    _reject_if(
        list(schedule.milestones) != sorted(schedule.milestones if scaled else set(schedule.milestones))
        or min(schedule.milestones, default=1) < least,
        f"schedule.milestones: {list(schedule.milestones)} must be ascending steps above 0",
    )
    _reject_if(
        schedule.warmup_steps > steps and not needs_data(config),
        f"schedule.warmup_steps: {schedule.warmup_steps} is more than train.steps ({steps})",
    )
    for name in ("warmup_scale", "final_scale"):
        share = getattr(schedule, name)
        _reject_if(share > 1, f"schedule.{name}: {share} is more than 1; give a fraction of optim.lr")


def check_device(name: str) -> None:
    """Raise UsageError if engine.device cannot have this value."""
    _reject_if(
        not re.fullmatch(r"auto|cpu|cuda(:\d{1,2})?", name),
        f"engine.device: {name!r} is not auto, cpu, cuda or cuda:N",
    )


def _reject_if(wrong: bool, line: str) -> None:
    if wrong:
        raise UsageError(line)


def _check_numbers(config: Config) -> None:
    for section in SECTIONS:
        for name, value in vars(getattr(config, section)).items():
            _reject_if(
                isinstance(value, float) and not math.isfinite(value), f"{section}.{name}: {value} is not finite"
            )
            for number in value if isinstance(value, tuple) else (value,):
                _reject_if(
                    isinstance(number, int) and number >= 2**63 and name != "seed",
                    f"{section}.{name}: a number of {len(str(number))} digits does not fit into 64 bits",
                )
    _reject_if(config.run.seed >= 2**64, f"run.seed: {config.run.seed} does not fit into 64 bits")


def _check_training(config: Config) -> None:
    train, optim = config.train, config.optim
    _reject_if(train.label_smoothing >= 1, f"train.label_smoothing: {train.label_smoothing} is not below 1")
    for name in ("momentum", "muon_momentum"):
        share = getattr(optim, name)
        _reject_if(share >= 1, f"optim.{name}: {share} is not below 1")
    _reject_if(optim.nesterov and optim.momentum == 0, "optim.nesterov: needs optim.momentum above 0")
    _reject_if(
        optim.name == "muon" and config.engine.precision == "fp16",
        "optim.name muon: does not support fp16's loss scale; use engine.precision bf16 or fp32",
    )


def _check_batch(batch_size: int, accumulate: int) -> None:
    """Reject a global batch that cannot be split evenly over the ranks and their micro-batches."""
    parts = ranks.world_size() * accumulate
    sharers = f"{ranks.world_size()} processes" + (f" with --train.accumulate {accumulate}" if accumulate > 1 else "")
    _reject_if(
        batch_size % parts != 0,
        f"train.batch_size: {batch_size} cannot be split equally over {sharers}; "
        f"use --train.batch_size {max(parts, batch_size // parts * parts)} or another number of processes",
    )


def _check_data(data: DataConfig) -> None:
    resizes = data.augment == "resized_crop"
    _reject_if(
        resizes and data.image_size is None,
        "data.augment resized_crop: needs data.image_size; for example --data.image_size 224",
    )
    _reject_if(
        resizes and data.loader == "resident",
        "data.augment resized_crop: the resident loader has only images of one size; use --data.loader dataloader or "
        "dali",
    )
    for name in ("cutout", "mixup", "cutmix"):
        _reject_if(
            data.augment == "none" and getattr(data, name) > 0,
            f"data.{name}: cannot be combined with data.augment none; leave one of them out",
        )
    for name, does in (("skip_bad", "skips"), ("exif", "turns")):
        _reject_if(
            getattr(data, name) and data.source != "imagefolder",
            f"data.{name}: {does} image files only; use --data.source imagefolder, or leave it out",
        )
    _reject_if(
        data.image_size is not None and (resizes or data.source == "synthetic") and data.image_size < 8,
        f"data.image_size: {data.image_size} is below 8",
    )


def _check_model(model: ModelConfig) -> None:
    """Reject a wrong name, then build the network on the meta device, so that it rejects wrong options itself."""
    _reject_if(
        model.sync_norm and bool(model.options.get("fused_convolutions")),
        "model.sync_norm: fused_convolutions do not share their statistics; leave one of them out",
    )
    _reject_if("trust_code" in model.options, "model.options: trust_code is a flag of its own, --model.trust_code true")
    for name in ("num_classes", "in_channels"):
        _reject_if(
            name in model.options,
            f"model.options: {name} comes from the data; --model.num_classes sets the size of the head",
        )
    network = None
    try:
        if is_foreign(model.name):  # it is built once the data is known, because its code may need a real device
            check_foreign(model.name, model.trust_code)
        else:
            find(model.name)  # needs no torch, whose import takes a second or two
            import torch

            with torch.device("meta"):
                norm = "fused" if model.norm == "fused" else "torch"
                classes = model.num_classes or 10
                network = build_model(model.name, norm=norm, num_classes=classes, **model_options(model))
    except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        raise UsageError(f"model: {first_line(error)}") from None
    if model.freeze and network is not None:
        from fastres.models.freeze import freeze

        try:
            freeze(network, model.freeze)
        except ValueError as error:
            raise UsageError(f"model.freeze: {error}") from None
