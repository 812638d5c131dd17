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


def load_run(folder: Path, file: Path | None = None, flags: Sequence[str] = ()) -> tuple[Config, dict[str, Tensor]]:
    """Return a run's configuration and weights.

    Args:
        folder: the run's folder.
        file: a checkpoint, to load its weights; None loads the final weights.
        flags: flags of fastres.train, applied over the run's configuration.

    Raises:
        UsageError: if the folder holds no run, the file is no checkpoint, or the run is not finished.
    """
    written = folder / "config.yaml"
    if not written.is_file():
        raise UsageError(
            f"{folder}: is not the folder of a run (it holds no config.yaml); give one that fastres.train has written"
        )
    # Trackers are off, because reading a run does not need their packages.
    config = parse([f"--config={written}", "--run.tensorboard=false", "--run.wandb=false", *flags])
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
    """Return the weights if they have conv1.weight and fc.weight, whose shapes give channels and classes.

    Raises:
        KeyError: if one of the two is missing.
        TypeError: if the weights are not tensors or one of the two has another number of dimensions.
    """
    if not isinstance(weights, dict) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise TypeError("its weights are not all tensors")
    if weights["conv1.weight"].ndim != 4 or weights["fc.weight"].ndim != 2:
        raise TypeError("a tensor has another shape")
    return weights


def rebuild(config: Config, weights: dict[str, Tensor], norm: str = "torch") -> nn.Module:
    """Return the run's network with these weights, whose shapes give its channels and classes.

    Args:
        config: the run's configuration.
        weights: a state_dict.
        norm: one of models.blocks.NORMS.

    Raises:
        UsageError: if the weights belong to another network.
    """
    options = model_options(config.model)
    if norm != "fused":
        options.pop("fused_convolutions", None)  # the same network, computed in another way
    try:
        model = build_model(
            config.model.name,
            num_classes=weights["fc.weight"].shape[0],
            in_channels=weights["conv1.weight"].shape[1],
            norm=norm,
            **options,
        )
        model.load_state_dict(weights)
    except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UsageError(
            f"the weights do not fit the run's {config.model.name} ({reason}); give files of one run"
        ) from None
    return model
