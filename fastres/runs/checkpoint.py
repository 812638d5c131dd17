"""Checkpoints: written atomically, verified when read, never executed.

A file is a torch.save of plain tensors, numbers, strings and containers, with a SHA-256 over all of them. It is read
with weights_only, so nothing in it runs.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastres.utils.atomic_io import atomic_write
from fastres.utils.errors import RunError, UsageError

LOG = logging.getLogger(__name__)

LAST, BEST = "last", "best"  # links beside the checkpoints: the newest, and the one with the best evaluation

State = dict[str, Any]


def save(folder: Path, step: int, state: State, keep: int, best: int | None = None) -> Path:
    """Write the state after `step` steps, with the links LAST and BEST, and return the new path.

    Args:
        folder: the folder of a run's checkpoints.
        step: the steps that are done.
        state: the state after them.
        keep: the number of newest checkpoints that stay; others are removed, except for the best.
        best: the step of the best checkpoint, or None if no evaluation has chosen one.

    Raises:
        RunError: if the checkpoint cannot be written; earlier checkpoints are intact.
    """
    path = _path(folder, step)
    # Serialise to memory first, because torch's writer answers a full disk with an assertion about positions.
    content = io.BytesIO()
    torch.save({"state": state, "sha256": digest(state)}, content)
    try:
        folder.mkdir(exist_ok=True)
        with atomic_write(path) as file:
            file.write(content.getbuffer())
    except OSError as error:
        raise RunError(f"cannot write checkpoint {path}: {error.strerror}; earlier checkpoints are intact") from None
    chosen = None if best is None else _path(folder, best)
    for old in found(folder)[keep:]:
        if old != chosen:
            old.unlink()
    _link(folder / LAST, path)
    _link(folder / BEST, chosen)
    return path


def _path(folder: Path, step: int) -> Path:
    """Return the path of the checkpoint of a step."""
    return folder / f"step-{step:08d}.pt"


def _link(link: Path, target: Path | None) -> None:
    """Make a link to a checkpoint in its own folder, or remove the link if there is no such checkpoint."""
    with contextlib.suppress(OSError):  # some file systems have no links, and nothing depends on them
        if target is None or not target.exists():
            link.unlink(missing_ok=True)
            return
        new = link.with_name(f".{link.name}.new")
        new.unlink(missing_ok=True)
        new.symlink_to(target.name)
        new.replace(link)


def load(path: Path) -> State:
    """Return the state in a file, on the CPU.

    Raises:
        UsageError: if the file is missing, truncated, altered or not a checkpoint.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or set(content) != {"state", "sha256"}:
            raise UsageError(f"{path} is not a checkpoint of fastres")
        state, found = content["state"], digest(content["state"])
    except UsageError:
        raise
    except FileNotFoundError:
        raise UsageError(f"checkpoint {path} does not exist") from None
    except Exception as error:  # foreign bytes can make the unpickler raise anything
        # Report only the type of the error, because torch's own message advises to execute the file's content.
        kind = type(error).__name__
        raise UsageError(f"checkpoint {path} cannot be read ({kind}): it is truncated or not a checkpoint") from None
    if found != content["sha256"]:
        raise UsageError(f"checkpoint {path} is corrupt: its content does not match its checksum")
    if not isinstance(state, dict) or type(step := state.get("step", 0)) is not int or step < 0:
        raise UsageError(f"{path} is not a checkpoint of fastres")
    return state


def found(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder, newest first: by step, which has more than eight digits in a long run."""
    steps = {path: match for path in folder.glob("step-*.pt") if (match := re.fullmatch(r"step-(\d{8,})", path.stem))}
    return sorted(steps, key=lambda path: int(steps[path][1]), reverse=True)


def latest(folder: Path) -> State | None:
    """Return the newest checkpoint that can be read, or None if there are none.

    Raises:
        UsageError: if the folder has checkpoints and none can be read.
    """
    broken = []
    for path in found(folder):
        try:
            return load(path)
        except UsageError as error:
            broken.append(str(error))
            LOG.warning("%s; trying the previous checkpoint", error)
    if broken:
        raise UsageError(f"no checkpoint in {folder} can be read; remove the folder to start again")
    return None


def digest(state: State) -> str:
    """Return the SHA-256 of structure, names, numbers and tensors, which does not depend on device or strides."""
    sha = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            sha.update(f"{value.dtype} {tuple(value.shape)}\n".encode())
            sha.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict | list | tuple):
            sha.update(f"{type(value).__name__} {len(value)}\n".encode())
            for item in value.items() if isinstance(value, dict) else value:
                add(item)
        else:
            sha.update(f"{value!r}\n".encode())

    add(state)
    return sha.hexdigest()
