"""Table of the fastest measured kernel per compute capability and tensor shape.

The table is stored in fastest.json, which bench/bench_kernels.py writes. A device without a table has not been
measured, so the engine's `auto` uses torch's operations on it.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from ..tiling import matrix_shape

FILE = Path(__file__).with_name("fastest.json")

# (N·H·W, C, has a residual) -> "two_pass" or "cooperative" if that algorithm was faster than torch under inductor,
# forward and backward together; otherwise "torch". A shape that is not in the table uses torch too.
Table = dict[tuple[int, int, bool], str]


def read() -> dict[tuple[int, int], Table]:
    """Read fastest.json and return its tables by compute capability.

    A row of the file is N·H·W, C, has a residual, algorithm.
    """
    tables = {}
    for capability, rows in json.loads(FILE.read_text(encoding="utf-8")).items():
        major, minor = map(int, capability.split("."))
        tables[major, minor] = {(m, c, adds): algorithm for m, c, adds, algorithm in rows}
    return tables


def write(capability: tuple[int, int], measured: Table) -> None:
    """Write the measured shapes to fastest.json, and leave its other shapes unchanged."""
    tables = FASTEST | {capability: FASTEST.get(capability, {}) | measured}
    rows = {
        "{}.{}".format(*device): [[*shape, algorithm] for shape, algorithm in sorted(table.items())]
        for device, table in sorted(tables.items())
    }
    FILE.write_text(json.dumps(rows, indent=1, allow_nan=False) + "\n", encoding="utf-8")


FASTEST = read()


def table_of(device: torch.device) -> Table | None:
    """Return the table for the device's compute capability, or None if nothing was measured."""
    return FASTEST.get(torch.cuda.get_device_capability(device)) if device.type == "cuda" else None


def fastest(x: Tensor, has_residual: bool) -> str:
    """Return "two_pass", "cooperative" or "torch" for x, (N, C, H, W), on its device."""
    table = table_of(x.device)
    # Without a table the shape is not read, so that torch.export can keep it dynamic.
    return "torch" if table is None else table.get((*matrix_shape(x), has_residual), "torch")
