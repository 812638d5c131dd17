"""Atomic writes: a file is complete or unchanged, whenever the process or the power fails. JSON is strict.

Strict JSON (RFC 8259) has no NaN and no infinity, which most other readers reject.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Yield a binary file to write to; it is renamed to `path` once it is on the disk.

    If that fails (OSError, or whatever the block raises), `path` is unchanged and no temporary file is left.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8 atomically."""
    with atomic_write(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write a value as strict JSON atomically."""
    write_text(path, json_of(value, indent=2) + "\n")


def json_of(value: Any, indent: int | None = None) -> str:
    """Return a value as strict JSON, in which a number that is not finite is null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def parse_json(text: str | bytes) -> Any:
    """Return the value of strict JSON. Raise ValueError for any other text."""
    return json.loads(text, parse_constant=_reject)


def _finite(value: Any) -> Any:
    """Return the value with None in place of each number that is not finite."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _reject(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _sync_folder(folder: Path) -> None:
    """Make a rename in the folder survive a power cut, if the system supports it."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
