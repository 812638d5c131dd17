"""Which kernel measured fastest, by the device's compute capability and the tensor's shape.

fastest.json holds it, and bench/bench_kernels.py writes it. A device without a table has not been measured: there the
engine's `auto` stays with torch, and claims nothing.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from ..tiling import matrix_shape

FILE = Path(__file__).with_name("fastest.json")

# (N·H·W, C, whether there is a residual) -> "two_pass" or "cooperative", where it beat torch under inductor, forward
# and backward together; "torch" where it did not. What is not named is torch's too.
Table = dict[tuple[int, int, bool], str]


def read() -> dict[tuple[int, int], Table]:
    """By compute capability. In the file a shape is a row: N·H·W, C, residual, algorithm."""
    tables = {}
    for capability, rows in json.loads(FILE.read_text(encoding="utf-8")).items():
        major, minor = map(int, capability.split("."))
        tables[major, minor] = {(m, c, adds): algorithm for m, c, adds, algorithm in rows}
    return tables


def write(capability: tuple[int, int], measured: Table) -> None:
    """Puts what was measured into the file; other shapes stay as they are."""
    tables = FASTEST | {capability: FASTEST.get(capability, {}) | measured}
    rows = {
        "{}.{}".format(*device): [[*shape, algorithm] for shape, algorithm in sorted(table.items())]
        for device, table in sorted(tables.items())
    }
    FILE.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


FASTEST = read()


def table_of(device: torch.device) -> Table | None:
    """What was measured on devices like this one; None if nothing."""
    return FASTEST.get(torch.cuda.get_device_capability(device)) if device.type == "cuda" else None


def fastest(x: Tensor, has_residual: bool) -> str:
    """ "two_pass", "cooperative" or "torch" for x, (N, C, H, W), on its device."""
    return (table_of(x.device) or {}).get((*matrix_shape(x), has_residual), "torch")
