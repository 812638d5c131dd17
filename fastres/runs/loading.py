"""Load a finished run, or a checkpoint of one, as a configuration and a network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from fastres.config.cli import parse
from fastres.config.schema import Config, model_options
from fastres.data.description import DataDescription, from_dict
from fastres.models.registry import build_model
from fastres.runs import checkpoint
from fastres.utils.atomic_io import parse_json
from fastres.utils.errors import UsageError


def read_run(
    folder: Path, file: Path | None = None, flags: Sequence[str] = (), *, given: bool = False
) -> tuple[Config, dict[str, Tensor]]:
    """Return a run's configuration and weights.

    Args:
        folder: the run's folder.
        file: a checkpoint, to load its weights; None loads the final weights.
        flags: flags of fastres.train, applied over the run's configuration.
        given: the caller has the network, so the configuration need not name one that can be built.

    Raises:
        UsageError: if the folder holds no run, the file is no checkpoint, or the run is not finished.
    """
    written = folder / "config.yaml"
    if not written.is_file():
        raise UsageError(
            f"{folder}: is not the folder of a run (it holds no config.yaml); give one that fastres.train has written"
        )
    # Trackers are off, because reading a run does not need their packages.
    flags = [f"--config={written}", "--run.tensorboard=false", "--run.wandb=false", "--run.trackers=null", *flags]
    config = parse(flags, builds_network=not given)
    if file is not None:
        try:
            return config, _checked(checkpoint.load(file)["trainer"]["model"])
        except (KeyError, TypeError, IndexError) as error:
            raise UsageError(f"{file} is not a checkpoint of fastres ({error})") from None
    final = folder / "model.safetensors"
    if not final.is_file():
        newest = next(iter(checkpoint.found(folder / "checkpoints")), "FILE")
        raise UsageError(
            f"{folder}: the run is not finished (it holds no model.safetensors); finish it with fastres.train, "
            f"or give --checkpoint {newest}"
        )
    try:
        return config, _checked(safetensors.torch.load_file(final))
    except Exception as error:  # a damaged file may raise anything
        raise UsageError(f"{final}: cannot be read ({error}); give --checkpoint FILE") from None


def load_description(folder: Path) -> DataDescription | None:
    """Return the description of a run's data, or None for a run of an earlier version, which has none.

    Raises:
        UsageError: if data.json is damaged.
    """
    path = folder / "data.json"
    if not path.is_file():
        return None
    try:
        return from_dict(parse_json(path.read_text(encoding="utf-8")), path)
    except (OSError, ValueError, RecursionError):
        raise UsageError(f"{path}: cannot be read; restore it") from None


def _checked(weights: Any) -> dict[str, Tensor]:
    """Return the weights. Raise TypeError if they are not a dict of tensors."""
    if not isinstance(weights, dict) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise TypeError("its weights are not all tensors")
    return weights


def outputs_and_channels(config: Config, weights: dict[str, Tensor], data: DataDescription | None) -> tuple[int, int]:
    """Return the outputs and the input channels of a run's network.

    Args:
        config: the run's configuration.
        weights: the run's weights, whose shapes say it for a run of an earlier version.
        data: the run's data, or None for such a run.

    Raises:
        UsageError: if neither says it.
    """
    if data is not None:
        return data.outputs(config.model.num_classes), data.channels
    head, first = weights.get("fc.weight"), weights.get("conv1.weight")
    if head is None or first is None or head.ndim != 2 or first.ndim != 4:
        raise UsageError(
            "the weights do not have fc.weight and conv1.weight of a fastres network; give files of one run"
        )
    return head.shape[0], first.shape[1]


def rebuild(
    config: Config,
    weights: dict[str, Tensor],
    data: DataDescription | None = None,
    norm: str = "torch",
    model: nn.Module | None = None,
) -> nn.Module:
    """Return the run's network with these weights.

    Args:
        config: the run's configuration.
        weights: a state_dict.
        data: the run's data; None for a run of an earlier version.
        norm: one of models.blocks.NORMS.
        model: the network itself, to be given the weights; None builds it.

    Raises:
        UsageError: if the weights belong to another network.
    """
    options = model_options(config.model)
    if norm != "fused":
        options.pop("fused_convolutions", None)  # the same network, computed in another way
    outputs, channels = outputs_and_channels(config, weights, data)
    try:
        if model is None:
            model = build_model(
                config.model.name,
                num_classes=outputs,
                in_channels=channels,
                norm=norm,
                trust_code=config.model.trust_code,
                **options,
            )
        model.load_state_dict(weights)
    except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UsageError(
            f"the weights do not fit the run's {config.model.name} ({reason}); give files of one run"
        ) from None
    return model
