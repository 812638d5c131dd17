"""Workloads: a network or one residual block, with its batch, and the engines of the variants that can run it here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastres.config.schema import Config, ModelConfig
from fastres.config.validation import check
from fastres.models.blocks import NORMS, global_pool, init_weights
from fastres.models.cifar import CifarResNet
from fastres.models.imagenet import BLOCKS, ResNet
from fastres.models.mini import MiniResNet
from fastres.models.registry import build_model, check_input_shape, is_foreign
from fastres.models.speedrun import SpeedResNet
from fastres.profiling.variants import REFERENCE, Variant
from fastres.training.build import outputs_of
from fastres.training.engine import Engine, resolve_engine
from fastres.utils.errors import UsageError, first_line


class BlockNet(nn.Module):
    """A block followed by a head without parameters, the mean of each channel: (N, C, S, S) -> (N, C')."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return the channels' means."""
        return global_pool(self.block(x))


@dataclass(frozen=True)
class Workload:
    """The network or block that every variant runs, and the shape of its batch."""

    name: str
    build: Callable[[str], nn.Module]  # takes the name of a norm
    shape: tuple[int, int, int, int]  # (N, C, S, S) of the batch
    classes: int
    is_block: bool  # the input of a block has a gradient, as inside a network
    model: ModelConfig


INPUTS: dict[type[nn.Module], tuple[int, int, int]] = {  # channels, side and classes of each family's data
    CifarResNet: (3, 32, 10),
    ResNet: (3, 224, 1000),
    MiniResNet: (1, 28, 10),
    SpeedResNet: (3, 32, 10),
}


OF_OTHERS = (3, 224, 1000)  # the same for networks of other packages


def model_workload(
    name: str, options: dict[str, Any], batch_size: int, size: int | None, trust_code: bool = False
) -> Workload:
    """Return a network's workload.

    Args:
        name: the network's name, as in model.name.
        options: as in model.options, and num_classes and in_channels.
        batch_size: images of a step.
        size: height and width of an image; None for those of the data of the network's family.
        trust_code: allow a network package.module:function to be imported.

    Raises:
        UsageError: if the network does not take the options, the size or the batch size.
    """
    fuses = options.get("fused_convolutions", False)  # only variants of norm fused have fused convolutions
    of_data = ("num_classes", "in_channels")  # training takes these options from the data
    model = ModelConfig(
        name=name,
        options={key: value for key, value in options.items() if key not in of_data},
        norm="fused" if fuses else "torch",
        trust_code=trust_code,
    )
    check(Config(model=model))
    channels, side, classes = OF_OTHERS if is_foreign(name) else INPUTS[_family(model, options)]
    if options.get("stem") == "small":
        side, classes = INPUTS[CifarResNet][1:]
    channels = options.get("in_channels", channels)
    classes = options.get("num_classes", classes)

    def build(norm: str) -> nn.Module:
        changed = {"num_classes": classes, "in_channels": channels, "trust_code": trust_code}
        if fuses:
            changed["fused_convolutions"] = norm == "fused"
        return build_model(name, norm=norm, **options | changed)

    shape = (batch_size, channels, size or side, size or side)
    if not is_foreign(name):
        check_input_shape(name, shape, training=True, **options | {"num_classes": classes})
    elif (outputs := outputs_of(_built(build), (1, *shape[1:]))) != classes:
        raise UsageError(f"model: {name} has {outputs} outputs for {classes} classes; let it take num_classes")
    return Workload(name, build, shape, classes, False, model)


def _built(build: Callable[[str], nn.Module]) -> nn.Module:
    """Return a network of another package with norm torch. Raise UsageError if it cannot be built."""
    try:
        return build("torch")
    except ValueError as error:
        raise UsageError(f"model: {error}") from None


def _family(model: ModelConfig, options: dict[str, Any]) -> type[nn.Module]:
    """Return the class of one of fastres's networks. Raise UsageError if it does not take the options."""
    try:
        with torch.device("meta"):
            return type(build_model(model.name, norm=model.norm, **options))
    except (ValueError, TypeError, RuntimeError) as error:
        raise UsageError(f"model: {first_line(error)}") from None


def block_workload(kind: str, channels: int, batch_size: int, size: int) -> Workload:
    """Return the workload of one residual block of stride 1.

    Args:
        kind: one of BLOCKS.
        channels: channels of the block's input and output.
        batch_size: images of a step.
        size: height and width of the block's input.

    Raises:
        UsageError: if the block cannot have that many channels.
    """
    block = BLOCKS[kind]
    inner, rest = divmod(channels, block.expansion)
    if rest:
        raise UsageError(f"--channels {channels}: must be a multiple of {block.expansion} for a {kind} block")

    def build(norm: str) -> nn.Module:
        return BlockNet(block(channels, inner, norm=NORMS[norm]))

    shape = (batch_size, channels, size, size)
    return Workload(f"{kind}-{channels}x{size}", build, shape, channels, True, ModelConfig())


def resolved(
    workload: Workload, variants: Sequence[Variant], device: str
) -> tuple[dict[Variant, Engine], dict[str, str]]:
    """Resolve each variant's engine.

    Args:
        workload: the network or block that the variants run.
        variants: the requested variants.
        device: as in engine.device.

    Returns:
        The engines of the variants that are available here, and the reason by name for each other variant.

    Raises:
        UsageError: if the device or all variants are unavailable.
    """
    # Resolve the reference first, so that an unavailable device is rejected once and not for each variant.
    resolve_engine(REFERENCE.config(workload.model, device))
    engines: dict[Variant, Engine] = {}
    unavailable: dict[str, str] = {}
    for variant in variants:
        try:
            engines[variant] = resolve_engine(variant.config(workload.model, device))
        except UsageError as error:
            unavailable[variant.name] = str(error)
    if not engines:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in unavailable.items())
        raise UsageError(f"--variants: all are unavailable here ({reasons}); choose others")
    return engines, unavailable
