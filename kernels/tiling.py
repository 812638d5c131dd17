"""How a channels-last tensor, seen as a matrix [M = N·H·W, C], is cut into tiles and given to programs.

None of it has been measured on a GPU yet. The sizes come from arithmetic. Of a tile of 2,048 elements each thread of 4
warps has 16, 32 bytes of bf16, and the loops have STAGES of them in flight: two such programs on each of 132
multiprocessors keep 4 MB in flight, where 3 TB/s at 700 ns of latency take 2. Every second-pass program reads all
partials of its channels from the L2, and waits for them. All programs together read 8·P²·C bytes so, P being the
programs along M: so few along M, and where a tensor is small, many along C.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

TILE = 2048  # elements of a tile
WARPS = 4
STAGES = 4  # tiles of a loop that are fetched ahead
# Channels of a tile. 16 of 2 bytes are a sector of 32 bytes, which is what the L2 gives. Memory gives more: of a tensor
# that may not be in the L2, whole cache lines of 128 bytes are read.
SMALL, SMALL_BLOCK_C, MAX_BLOCK_C = 2**23, 16, 64  # elements of a tensor, 16 MB in bf16; channels
LEAST_PROGRAMS = 256  # two on each of an H100's multiprocessors
MAX_PARTIALS = 256  # programs along M
H100 = 132  # its multiprocessors


@dataclass(frozen=True, kw_only=True)
class Held:
    """What the programs of a cooperative kernel keep in registers, with 8 warps each. Sizes found by compiling for
    sm_80 and sm_90: with twice the tile, or one more program on a multiprocessor, registers spill.
    """

    tile: int  # elements
    programs: int  # on one multiprocessor at once
    registers: int  # of a thread at most, so that they fit there


HELD_FORWARD = Held(tile=8192, programs=2, registers=128)
HELD_BACKWARD = Held(tile=4096, programs=2, registers=128)  # of two tensors
HELD_WARPS = 8


def next_power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def matrix_shape(x: Tensor) -> tuple[int, int]:
    """(N, C, H, W) -> M = N·H·W and C."""
    n, c, h, w = x.shape
    return n * h * w, c


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """A grid of `partials` × `c_blocks` programs; each walks `rows` rows of `block_c` channels in tiles of
    `block_m`."""

    block_m: int
    block_c: int
    rows: int  # of one program; a multiple of block_m, which is a multiple of 8
    partials: int
    c_blocks: int
    block_p: int  # partials that a second-pass program reads at a time

    @property
    def grid(self) -> tuple[int, int]:
        return self.partials, self.c_blocks


def two_pass_tiles(m: int, c: int) -> Tiles:
    """For the kernels that walk. m rows, c channels, both ≥ 1."""
    block_c = _channels(m, c)
    c_blocks = ceil_div(c, block_c)
    # A tile no taller than the tensor, and in whole bytes of mask bits.
    block_m = max(8, min(TILE // block_c, next_power_of_two(m)))
    # More than the least of programs only where reading the partials stays under half of the tensor's own bytes.
    wanted = max(LEAST_PROGRAMS // c_blocks, math.isqrt(m // 8), 1)
    wanted = min(wanted, MAX_PARTIALS, ceil_div(m, block_m))
    rows = ceil_div(ceil_div(m, wanted), block_m) * block_m
    return _tiles(m, block_m, block_c, rows, c_blocks)


def one_pass_tiles(m: int, c: int, held: Held, multiprocessors: int) -> Tiles | None:
    """For the cooperative kernels, whose programs hold a tile each and are on the GPU all at once. None where the
    tensor does not fit there.
    """
    block_c = _channels(m, c)
    c_blocks = ceil_div(c, block_c)
    block_m = max(8, min(held.tile // block_c, next_power_of_two(m)))
    if ceil_div(m, block_m) * c_blocks > held.programs * multiprocessors:
        return None
    return _tiles(m, block_m, block_c, block_m, c_blocks)


def _channels(m: int, c: int) -> int:
    """Of a tile of a tensor of m rows and c channels."""
    return min(next_power_of_two(c), SMALL_BLOCK_C if m * c <= SMALL else MAX_BLOCK_C)


def _tiles(m: int, block_m: int, block_c: int, rows: int, c_blocks: int) -> Tiles:
    partials = ceil_div(m, rows)
    block_p = min(next_power_of_two(partials), max(1, TILE // block_c))
    return Tiles(
        block_m=block_m, block_c=block_c, rows=rows, partials=partials, c_blocks=c_blocks, block_p=block_p
    )
