"""Load and save weights: safetensors, and torchvision's .pth files to start from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from fastres.models.registry import METADATA
from fastres.utils.atomic_io import atomic_write
from fastres.utils.errors import UsageError

HEAD = ("fc.weight", "fc.bias")
PICKLED = (".pth", ".pt")
SHOWN = 3  # keys named in a message


def load_weights(model: nn.Module, path: str | Path) -> list[str]:
    """Copy the file's tensors into the model, but not a head for another number of classes.

    Args:
        model: changed in place.
        path: a .safetensors file, or a .pth or .pt state_dict, bare or under "model" or "state_dict".

    Returns:
        The keys of the head if it was not copied.

    Raises:
        UsageError: before the model is changed, if anything else is missing, unexpected or of another shape. Only
            num_batches_tracked, which files older than PyTorch 0.4.1 lack, may be missing.
    """
    path = Path(path)
    state, wanted = _read(path), model.state_dict()
    common = state.keys() & wanted.keys()
    reshaped = [key for key in common if state[key].shape != wanted[key].shape]
    replaced = [key for key in HEAD if key in reshaped and state[key].shape[1:] == wanted[key].shape[1:]]
    faults = {
        "lacks": [key for key in wanted.keys() - common if not key.endswith(".num_batches_tracked")],
        "has unknown": state.keys() - common,
        "has of another shape": [
            f"{key} {_shape(state[key])} for {_shape(wanted[key])}" for key in reshaped if key not in replaced
        ],
    }
    if found := [f"{fault} {_few(keys)}" for fault, keys in faults.items() if keys]:
        raise UsageError(f"{path} does not fit the model: it {'; it '.join(found)}; name the model it was saved from")
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


def _read(path: Path) -> dict[str, Tensor]:
    """Return the state_dict of a file. Raise UsageError if it has none."""
    suffix = path.suffix.lower()
    if suffix != ".safetensors" and suffix not in PICKLED:
        raise UsageError(f"weights file {path}: unknown kind {path.suffix!r}; give .safetensors, .pth or .pt")
    if not path.is_file():
        raise UsageError(f"weights file {path}: does not exist; give the path of a .safetensors, .pth or .pt file")
    state: Any
    try:
        if suffix == ".safetensors":
            state = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or foreign file may raise anything, and torch's own message misleads
        raise UsageError(
            f"weights file {path}: cannot be read ({type(error).__name__}; it is damaged, or holds something "
            "other than tensors); download it again, or save model.state_dict() into it"
        ) from error
    for wrapper in ("model", "state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not all(_is_dense(*item) for item in state.items()):
        raise UsageError(f"weights file {path}: holds no state_dict; save model.state_dict() into it")
    return dict(state)


def _is_dense(key: Any, tensor: Any) -> bool:
    """Return True for an entry of a state_dict whose tensor is dense, in memory and not quantized."""
    return (
        isinstance(key, str)
        and isinstance(tensor, Tensor)
        and tensor.layout is torch.strided
        and not (tensor.is_meta or tensor.is_quantized)
    )


def _shape(tensor: Tensor) -> str:
    """Return the shape in words."""
    return "×".join(map(str, tensor.shape)) or "scalar"


def _few(keys: Iterable[str]) -> str:
    """Return the first SHOWN keys and the number of the others."""
    names = sorted(keys)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
