"""Load weights into a network, with a new head if need be, and save them as safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from fastres.models.freeze import head_of
from fastres.models.registry import METADATA
from fastres.models.weight_files import read_weights
from fastres.utils.atomic_io import atomic_write
from fastres.utils.errors import UsageError
from fastres.utils.suggest import few


def load_weights(model: nn.Module, weights: str | Path, network: str = "") -> list[str]:
    """Copy the weights into the model, but not a head for another number of classes.

    Args:
        model: changed in place.
        weights: a file, a run's folder, or a name of torchvision's, as read_weights takes them.
        network: the model's name, for torchvision.

    Returns:
        The keys of the head if it was not copied.

    Raises:
        UsageError: before the model is changed, if the weights cannot be read, or if anything but the head is missing,
            unexpected or of another shape. Only num_batches_tracked, which files older than PyTorch 0.4.1 lack, may be
            missing.
    """
    state, wanted = read_weights(weights, network), model.state_dict()
    common = state.keys() & wanted.keys()
    reshaped = [key for key in common if state[key].shape != wanted[key].shape]
    head = [f"{head_of(model)}.{kind}" for kind in ("weight", "bias")] if reshaped else []
    replaced = [key for key in head if key in reshaped and state[key].shape[1:] == wanted[key].shape[1:]]
    faults = {
        "lacks": [key for key in wanted.keys() - common if not key.endswith(".num_batches_tracked")],
        "has unknown": state.keys() - common,
        "has of another shape": [
            f"{key} {_shape(state[key])} for {_shape(wanted[key])}" for key in reshaped if key not in replaced
        ],
    }
    if found := [f"{fault} {few(sorted(keys))}" for fault, keys in faults.items() if keys]:
        raise UsageError(
            f"{weights} does not fit the model: it {'; it '.join(found)}; name the model it was saved from"
        )
    model.load_state_dict({key: state[key] for key in common if key not in replaced}, strict=False)
    return replaced


def save_weights(model: nn.Module, path: str | Path, metadata: dict[str, Any] | None = None) -> None:
    """Write the state_dict as safetensors, atomically. Equal weights and metadata give equal bytes.

    Args:
        model: the network.
        path: the file.
        metadata: values of JSON, stored as sorted text under the key METADATA.
    """
    path = Path(path)
    # contiguous(), because the bytes must not depend on whether the model was channels-last.
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in sorted(model.state_dict().items())}
    with atomic_write(path) as file:
        file.write(safetensors.torch.save(state, metadata and {METADATA: json.dumps(metadata, sort_keys=True)}))


def _shape(tensor: Tensor) -> str:
    """Return the shape in words."""
    return "×".join(map(str, tensor.shape)) or "scalar"
