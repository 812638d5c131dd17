"""Partition a channels-last tensor, seen as a matrix [M = N·H·W, C], into tiles and assign them to CTAs.

The sizes come from arithmetic; none has been measured on a GPU yet. With a tile of 2,048 elements, each thread of
4 warps has 16 elements, 32 bytes of bf16, and the loops have STAGES tiles in flight. Two such CTAs on each of 132
multiprocessors keep 4 MB in flight, and 3 TB/s at a latency of 700 ns need 2 MB. Every second-pass CTA must load every
partial sum of its channels from the L2 before it can start. With P CTAs along M that is 8·P²·C bytes in total, so P is
kept small and small tensors are split along C instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

TILE = 2048  # elements per tile
WARPS = 4
STAGES = 4  # tiles that a loop prefetches
# Channels per tile. Tensors of at most SMALL elements (16 MB in bf16) are expected in the L2: their tiles have 16
# channels, in bf16 a sector of 32 bytes, the unit of the L2. Larger tensors are read in whole cache lines of 128 bytes.
SMALL, SMALL_BLOCK_C, MAX_BLOCK_C = 2**23, 16, 64
MIN_CTAS = 256  # about two per multiprocessor of an H100
MAX_PARTIALS = 256  # CTAs along M
H100 = 132  # multiprocessors of an H100


@dataclass(frozen=True, kw_only=True)
class OnChipTile:
    """The tile that each CTA of a cooperative kernel, 8 warps, keeps in registers.

    The sizes were found by compiling for sm_80 and sm_90: with twice the tile, or one more CTA per multiprocessor,
    registers spill.
    """

    elements: int  # per tile
    ctas_per_sm: int  # resident at once
    max_registers: int  # per thread, so that these CTAs fit


FORWARD_TILE = OnChipTile(elements=8192, ctas_per_sm=2, max_registers=128)
BACKWARD_TILE = OnChipTile(elements=4096, ctas_per_sm=2, max_registers=128)  # each CTA keeps tiles of two tensors
ON_CHIP_WARPS = 8


def next_power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least n ≥ 1."""
    return 1 << (n - 1).bit_length()


def ceil_div(a: int, b: int) -> int:
    """Return a / b rounded up, for b > 0."""
    return -(-a // b)


def matrix_shape(x: Tensor) -> tuple[int, int]:
    """Return M = N·H·W and C of a tensor (N, C, H, W)."""
    n, c, h, w = x.shape
    return n * h * w, c


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """A grid of `partials` × `c_blocks` CTAs; each walks `rows` rows of `block_c` channels, `block_m` at a time."""

    block_m: int
    block_c: int
    rows: int  # per CTA; a multiple of block_m, which is a multiple of 8
    partials: int
    c_blocks: int
    block_p: int  # partials that a second-pass CTA reads at a time

    @property
    def grid(self) -> tuple[int, int]:
        """The launch grid."""
        return self.partials, self.c_blocks


def two_pass_tiles(m: int, c: int) -> Tiles:
    """Return the tiles of the two-pass kernels for m ≥ 1 rows and c ≥ 1 channels."""
    block_c = _channels(m, c)
    c_blocks = ceil_div(c, block_c)
    # A tile is not taller than the tensor, and its rows fill whole bytes of the mask.
    block_m = max(8, min(TILE // block_c, next_power_of_two(m)))
    # Use more than MIN_CTAS only if reading the partials takes less than half of the tensor's own bytes.
    wanted = max(MIN_CTAS // c_blocks, math.isqrt(m // 8), 1)
    wanted = min(wanted, MAX_PARTIALS, ceil_div(m, block_m))
    rows = ceil_div(ceil_div(m, wanted), block_m) * block_m
    return _tiles(m, block_m, block_c, rows, c_blocks)


def one_pass_tiles(m: int, c: int, on_chip: OnChipTile, multiprocessors: int) -> Tiles | None:
    """Return the tiles of the cooperative kernels for m rows and c channels, or None if the tensor does not fit.

    Each CTA keeps one tile on chip, and all CTAs are on the GPU at once.
    """
    block_c = _channels(m, c)
    c_blocks = ceil_div(c, block_c)
    block_m = max(8, min(on_chip.elements // block_c, next_power_of_two(m)))
    if ceil_div(m, block_m) * c_blocks > on_chip.ctas_per_sm * multiprocessors:
        return None
    return _tiles(m, block_m, block_c, block_m, c_blocks)


def _channels(m: int, c: int) -> int:
    """Return the number of channels in a tile of a tensor of m rows and c channels."""
    return min(next_power_of_two(c), SMALL_BLOCK_C if m * c <= SMALL else MAX_BLOCK_C)


def _tiles(m: int, block_m: int, block_c: int, rows: int, c_blocks: int) -> Tiles:
    partials = ceil_div(m, rows)
    block_p = min(next_power_of_two(partials), max(1, TILE // block_c))
    return Tiles(block_m=block_m, block_c=block_c, rows=rows, partials=partials, c_blocks=c_blocks, block_p=block_p)
