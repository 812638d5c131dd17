"""Which kernel measured fastest, by the device's compute capability and the tensor's shape.

bench/bench_kernels.py prints the lines to put here. A device without a table has not been measured: there the engine's
`auto` stays with torch, and claims nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .tiles import matrix_shape

# Compute capability -> (N·H·W, C, whether there is a residual) -> "two_pass" or "cooperative", where it beat torch
# under inductor, forward and backward together. What is not named is torch's.
FASTEST: dict[tuple[int, int], dict[tuple[int, int, bool], str]] = {}


def table_of(device: torch.device) -> dict[tuple[int, int, bool], str] | None:
    """What was measured on devices like this one; None if nothing."""
    return FASTEST.get(torch.cuda.get_device_capability(device)) if device.type == "cuda" else None


def fastest(x: Tensor, has_residual: bool) -> str:
    """ "two_pass", "cooperative" or "torch" for x, (N, C, H, W), on its device."""
    return (table_of(x.device) or {}).get((*matrix_shape(x), has_residual), "torch")
