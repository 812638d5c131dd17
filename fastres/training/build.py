"""The parts of a run, built from its configuration: data, network, step, schedule."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from fastres.config.length import in_steps, needs_data
from fastres.config.schema import Config, model_options
from fastres.config.validation import check_length
from fastres.data.loaders.build import Loader, build_loader, classes_of, image_size, sample_images
from fastres.data.sources.load import load_source
from fastres.data.sources.source import Source, Split, hold_out
from fastres.distributed import process_group
from fastres.distributed.process_group import ProcessGroup
from fastres.models.freeze import freeze
from fastres.models.registry import TORCHVISION, build_model, check_input_shape, fuse_unless_torch, is_foreign
from fastres.models.weights import load_weights
from fastres.training.channels_last import check_channels_last
from fastres.training.engine import Engine
from fastres.training.evaluator import Evaluator
from fastres.training.schedule import lr_scale
from fastres.training.step import Batch, TrainStep
from fastres.utils import ranks
from fastres.utils.errors import UsageError, first_line, out_of_memory


@dataclass(frozen=True, kw_only=True)
class Data:
    """The splits of a run and their loaders."""

    source: Source
    training: Split
    curve_split: str  # "test" or "validation": the samples of the evaluation curve
    train_loader: Loader
    curve_loader: Loader
    test_loader: Loader


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The parts of a training loop."""

    data: Data
    model: nn.Module
    step: TrainStep
    evaluator: Evaluator
    lr_at: Callable[[int], float]  # the learning rate of a step, before it is scaled for a parameter group
    dummy_batch: Batch
    notes: tuple[str, ...]  # lines for the log

    @property
    def parameters(self) -> int:
        """Return the number of trained and untrained parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters())


def fix_length(
    config: Config, group: ProcessGroup, source: Source | None = None, say: Callable[[str], None] = print
) -> tuple[Config, Source | None]:
    """Return the configuration with its length in steps, and the source, which is loaded if needed for it. Collective.

    Args:
        config: the run's configuration.
        group: the run's processes.
        source: replaces the configured source.
        say: is called with lines about the length and the schedule.

    Raises:
        UsageError: if the data is bad, or the schedule does not fit the steps.
    """
    if not needs_data(config):
        return config, source
    source = source or group.rank0_first(lambda: load_source(config.data))
    # build_data rejects a validation set that leaves no sample.
    config, lines = in_steps(config, max(1, len(source.train) - config.data.validation))
    check_length(config, scaled=True)  # milestones that were not scaled have been checked with the command line
    for line in lines:
        say(line)
    return config, source


def build_parts(
    config: Config,
    engine: Engine,
    group: ProcessGroup,
    source: Source | None = None,
    network: nn.Module | None = None,
) -> Parts:
    """Build all parts of a run. Collective.

    Args:
        config: the run's configuration, with its length in steps (fix_length).
        engine: the resolved engine, whose torch settings are applied.
        group: the run's processes.
        source: replaces the configured source.
        network: replaces the configured network; model.num_classes is the number of its outputs.

    Raises:
        UsageError: if the data is bad, or the data or the weights do not fit the network.
        ValueError: if the configuration's length is in epochs.
    """
    if needs_data(config):
        raise ValueError("train.epochs: fix_length() must translate it to steps first")
    data = build_data(config, engine, group, source)
    model, replaced = _build_and_load(config, engine, group, data.source, network)
    notes = [*engine.reasons, *data.source.notes]
    if config.model.freeze:
        _freeze(model, config.model.freeze)
        notes.append(_frozen_note(model))
    dummy = dummy_batch(config, data.source, engine)
    if network is None and not is_foreign(config.model.name):
        _check_batch_shape(config, dummy)
    if engine.channels_last:
        try:
            check_channels_last(model, engine, dummy)
        except AssertionError as error:  # reported and not fatal, because the run is slower but not wrong
            notes.append(f"channels_last is lost: {error}")
    if replaced:
        notes.append(f"weights: head replaced ({', '.join(replaced)})")
    classes = classes_of(config, data.source)
    weights = loss_weights(config, engine, data.training.labels, classes)
    train = config.train
    return Parts(
        data=data,
        model=model,
        step=TrainStep(model, engine, config.optim, train.label_smoothing, train.accumulate, weights),
        evaluator=Evaluator(model, engine, classes, train.eval_mirrored),
        lr_at=partial(learning_rate, config),
        dummy_batch=dummy,
        notes=tuple(notes),
    )


def _build_and_load(
    config: Config, engine: Engine, group: ProcessGroup, source: Source, network: nn.Module | None
) -> tuple[nn.Module, list[str]]:
    """Return the network, equal on all ranks, and the keys of its head if model.weights has another. Collective."""
    model = build_network(config, engine, source) if network is None else _placed(network, engine)
    replaced: list[str] = []
    if config.model.weights:  # the parameters reach the other ranks when DDP wraps the model
        weights = config.model.weights
        name = config.model.name.removeprefix(TORCHVISION)
        replaced = group.broadcast_from_rank0(lambda: load_weights(model, weights, name))
    process_group.broadcast_buffers(model)
    if config.model.sync_norm:
        process_group.enable_sync_batchnorm(model)
    return model, replaced


def _placed(network: nn.Module, engine: Engine) -> nn.Module:
    """Return a given network on the engine's device, fused unless the engine's norm is torch's."""
    try:
        return engine.place(fuse_unless_torch(network, engine.norm))
    except ValueError as error:
        raise UsageError(f"model.norm: {error}") from None


def _freeze(model: nn.Module, parts: str | list[str]) -> None:
    """Freeze parts of the network. Raise UsageError if it has no such part."""
    try:
        freeze(model, parts)
    except ValueError as error:
        raise UsageError(f"model.freeze: {error}") from None


def _frozen_note(model: nn.Module) -> str:
    """Return the line with the share of the parameters that are trained."""
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    trained = sum(count for count, is_trained in counts if is_trained)
    return f"freeze: {trained:,} of {sum(count for count, _ in counts):,} parameters are trained"


def build_data(config: Config, engine: Engine, group: ProcessGroup, source: Source | None = None) -> Data:
    """Load the source, or take the given one, and build a loader for each split. Collective."""
    source = source or group.rank0_first(lambda: load_source(config.data))
    training, curve, curve_split = source.train, source.test, "test"
    if config.data.validation:
        if source.validation is not None:
            raise UsageError("data.validation: the data has a validation set of its own (val/); leave it out")
        training, curve = hold_out(source.train, config.data.validation)
        curve_split = "validation"
    elif source.validation is not None:
        curve, curve_split = source.validation, "validation"
    loader_of = partial(split_loader, config, engine, source)
    curve_loader = loader_of(curve)
    return Data(
        source=source,
        training=training,
        curve_split=curve_split,
        train_loader=loader_of(training),
        curve_loader=curve_loader,
        test_loader=loader_of(source.test) if curve_split == "validation" else curve_loader,
    )


def split_loader(config: Config, engine: Engine, source: Source, split: Split) -> Loader:
    """Build this rank's loader over a split, for the engine's device and dtype."""
    return build_loader(
        config,
        source,
        split,
        device=engine.device,
        dtype=engine.dtype,
        rank=ranks.rank(),
        world_size=ranks.world_size(),
    )


def build_network(config: Config, engine: Engine, source: Source) -> nn.Module:
    """Build the network for the source's channels and classes from the run's seed, on the engine's device.

    Raises:
        UsageError: if a network of another package cannot be built for them.
    """
    torch.manual_seed(config.run.seed)
    name, classes = config.model.name, classes_of(config, source)
    try:
        model = build_model(
            name,
            num_classes=classes,
            in_channels=source.channels,
            norm=engine.norm,
            trust_code=config.model.trust_code,
            **model_options(config.model),
        )
    except ValueError as error:  # fastres's own networks have been built with the command line
        raise UsageError(f"model.name {error}") from None
    if is_foreign(name):
        side = image_size(config, source)
        if (outputs := outputs_of(model, (1, source.channels, side, side))) != classes:
            raise UsageError(f"model.name {name}: has {outputs} outputs for {classes} classes; let it take num_classes")
    return engine.place(model)


@torch.no_grad()
def outputs_of(network: nn.Module, shape: tuple[int, ...]) -> int:
    """Return the number of a network's outputs for images of this shape, (1, C, S, S), without changing the network.

    Raises:
        UsageError: if the network does not take the images, does not return (N, classes), or has nothing to train.
    """
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise UsageError(f"model: {type(network).__name__} has no parameters to train; give another network")
    modes = {module: module.training for module in network.modules()}
    example = next(network.parameters())
    try:
        found = network.eval()(torch.zeros(shape, dtype=example.dtype, device=example.device))
    except Exception as error:  # a network may raise anything
        raise UsageError(f"model: {type(network).__name__} cannot take images {shape}: {first_line(error)}") from None
    finally:
        for module, mode in modes.items():
            module.training = mode
    if not isinstance(found, Tensor) or found.ndim != 2:
        kind = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise UsageError(
            f"model: {type(network).__name__} returns {kind} for images {shape}; it must return (N, classes)"
        )
    return found.shape[1]


def loss_weights(config: Config, engine: Engine, labels: np.ndarray, classes: int) -> Tensor | None:
    """Return the factors of data.class_weights, (classes,) on the engine's device, or None without that option.

    Their mean over the training samples is 1, so that the loss keeps its scale.

    Args:
        config: the run's configuration.
        engine: the resolved engine.
        labels: (N,) int64, of the training samples.
        classes: outputs of the network.

    Raises:
        UsageError: if there is not one number for each class.
    """
    given = config.data.class_weights
    if given is None:
        return None
    counts = np.bincount(labels, minlength=classes)
    if given == "balanced":  # inversely proportional to a class's samples; 1 for a class without any
        weights = np.where(counts > 0, len(labels) / np.maximum(counts, 1) / np.count_nonzero(counts), 1.0)
    elif len(given) != classes:
        raise UsageError(f"data.class_weights: {len(given)} numbers for {classes} classes; give one for each, in order")
    else:
        weights = np.array(given) * len(labels) / (counts @ np.array(given))
    return torch.tensor(weights, dtype=torch.promote_types(engine.dtype, torch.float32), device=engine.device)


def learning_rate(config: Config, step: int) -> float:
    """Return the learning rate of step number `step`, from 0, for the global batch."""
    peak: float = config.optim.lr * (ranks.world_size() if config.optim.scale_lr else 1)
    return peak * lr_scale(config.schedule, step, config.train.steps)


def dummy_batch(config: Config, source: Source, engine: Engine) -> Batch:
    """Return zeros with the shapes, dtypes and strides of this rank's batch."""
    n, side = config.train.batch_size // ranks.world_size(), image_size(config, source)
    shape = (n, source.channels, side, side)
    images = torch.empty(shape, dtype=engine.dtype, device=engine.device, memory_format=engine.memory_format)
    labels = torch.zeros(n, dtype=torch.int64, device=engine.device)
    if config.data.mixup or config.data.cutmix:
        labels = torch.zeros(n, classes_of(config, source), device=engine.device)
    return images.zero_(), labels


def _check_batch_shape(config: Config, batch: Batch) -> None:
    """Raise UsageError if the network cannot take one micro-batch, or BatchNorm gets too few values from it."""
    n, *image = batch[0].shape
    at_once = n // config.train.accumulate * (ranks.world_size() if config.model.sync_norm else 1)
    options = model_options(config.model)
    check_input_shape(config.model.name, (at_once, *image), training=True, **options)


def fit_whitening(config: Config, engine: Engine, parts: Parts) -> None:
    """Fit the network's whitening to training images, if it has a whitening layer. Collective."""
    if whiten := getattr(parts.model, "whiten", None):
        whiten(sample_images(config, parts.data.source, parts.data.training).to(engine.device))
        process_group.broadcast_buffers(parts.model)


def warm_up(parts: Parts, say: Callable[[str], None]) -> None:
    """Compile training and evaluation before the timer starts. The model's state stays as it is.

    If compiling was auto's choice and the compiler is broken, everything runs eagerly, and `say` is called with the
    reason.
    """
    step, evaluator = parts.step, parts.evaluator
    try:
        step.warm_up(*parts.dummy_batch)
        evaluator(itertools.islice(parts.data.curve_loader.evaluate(), 1))
    except UsageError:  # raised for bad data, not by the compiler
        raise
    except Exception as error:
        if out_of_memory(error) or not (step.engine.compile and step.engine.compile_may_fall_back):
            raise
        say(f"compile: false (the compiler failed: {first_line(error)})")
        step.run_eagerly()
        evaluator.forward.run_eagerly()
        step.warm_up(*parts.dummy_batch)
