"""Table of the shapes for which the C++ BatchNorm was measured to be faster than torch's operations.

The table is stored in fastest.json, which bench/cpu_norm.py measures and writes. A row has the instruction set, the
activations' dtype, the mode, True with a residual, the number of channels, the bytes of an activation, and torch's time
divided by the kernels'. The mode is "training" (forward and backward), "inference", or "inference in NCHW"; the first
two are channels-last.

The rows are of one thread, and a shape counts by its bytes per thread, because what a call costs does not depend on the
number of threads. A shape that was not measured belongs to the bucket of its channels (16 to 31, 32 to 63, …) and of
these bytes (32 KiB to 128 KiB, 128 KiB to 512 KiB, …). The kernels run if they were faster in the mean of the bucket's
rows, and slower in none. A larger tensor belongs to the last bucket of bytes. A bucket without measurements is torch's,
and so is a number of channels that is not a multiple of 8, because none was measured.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache, lru_cache
from pathlib import Path
from statistics import geometric_mean
from typing import NamedTuple

import torch
from torch import Tensor

from .library import instruction_set

FILE = Path(__file__).with_name("fastest.json")
MARGIN = 1.05  # a mean ratio below it may be noise, so torch's operations run; a single one may be lower by as much
LAST_BUCKET = 12  # 8 MiB to 32 MiB


MODES = ("training", "inference", "inference in NCHW")


class Row(NamedTuple):
    """A measurement: torch's time divided by the kernels'."""

    isa: str  # a name in library.INSTRUCTION_SETS
    dtype: str  # "bfloat16" or "float32"
    mode: str  # one of MODES
    has_residual: bool
    channels: int
    bytes: int
    ratio: float


Key = tuple[str, str, str, bool, int, int]  # isa, dtype, mode, has a residual, buckets of channels and bytes


def bucket(channels: int, size: int) -> tuple[int, int]:
    """Return the buckets of a number of channels and of an activation's bytes: powers of 2 and of 4."""
    return channels.bit_length(), min(size.bit_length() // 2, LAST_BUCKET)


def read() -> list[Row]:
    """Return the rows of fastest.json."""
    return [Row(*row) for row in json.loads(FILE.read_text(encoding="utf-8"))]


def write(measured: Iterable[Row]) -> None:
    """Write the measured rows to fastest.json, and leave the rows of other shapes and instruction sets unchanged."""
    rows = {row[:-1]: row for row in (*read(), *measured)}
    lines = [json.dumps(row, allow_nan=False) for row in sorted(rows.values())]
    FILE.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
    forget()


def forget() -> None:
    """Forget the table, so that the next question reads the file."""
    faster_buckets.cache_clear()
    _is_faster.cache_clear()


@cache
def faster_buckets() -> set[Key]:
    """Return the buckets in which the kernels were faster in the mean, and slower for no measured shape."""
    ratios: dict[Key, list[float]] = {}
    for row in read():
        key = (row.isa, row.dtype, row.mode, row.has_residual, *bucket(row.channels, row.bytes))
        ratios.setdefault(key, []).append(row.ratio)
    return {key for key, of in ratios.items() if geometric_mean(of) >= MARGIN and min(of) >= 1 / MARGIN}


@cache
def _isa() -> str:
    """Return this machine's instruction set, or an empty text."""
    return instruction_set()[0]


def is_measured(isa: str) -> bool:
    """Return True if any shape was measured to be faster with the instruction set."""
    return any(key[0] == isa for key in faster_buckets())


def is_faster(x: Tensor, training: bool, has_residual: bool) -> bool:
    """Return True if the kernels were measured to be faster than torch for x, (N, C, H, W), on this machine."""
    return _is_faster(x.shape, x.stride(), x.dtype, training, has_residual, torch.get_num_threads())


@lru_cache  # because this is asked in every forward
def _is_faster(
    shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype, training: bool, has_residual: bool, threads: int
) -> bool:
    if len(shape) != 4 or shape[1] % 8:
        return False
    mode = MODES[0 if training else 1 if strides[1] == 1 else 2]
    buckets = bucket(shape[1], shape.numel() * dtype.itemsize // threads)
    return (_isa(), str(dtype).removeprefix("torch."), mode, has_residual, *buckets) in faster_buckets()
