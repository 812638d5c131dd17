"""Time BatchNorm + ReLU (+ add) in C++ against torch's operations on this CPU, and write the engine's table.

    python -m bench.cpu_norm                                                           print the ratios
    python -m bench.cpu_norm --write                                                   and write the table
    python -m bench.cpu_norm --write --mode "inference in NCHW"                        one mode only
    python -m bench.cpu_norm --write --without-bf16                                    AVX-512 without avx512_bf16
    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 python -m bench.cpu_norm --write  AVX2, also on a wider CPU

Training is forward and backward together, inference one pass without gradients. Both variants take the same tensors of
64 KiB to 16 MiB with the channels of ResNets and RegNets, channels-last, and for inference also NCHW. They run in n =
15 interleaved rounds of at least 1 ms. A ratio is torch's lower quartile divided by the kernels', because other work on
a machine only ever adds to a time. Results are compared first, so that only correct kernels are timed. Memory that is
freed stays with the process, because page faults would add noise to both variants.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastres.runs.environment import cpu_name
from fastres.utils.errors import Parser, run_command
from fastres_kernels import BatchNormAct2d
from fastres_kernels.cpu import batchnorm, dispatch_table, library
from fastres_kernels.cpu.dispatch_table import Row
from fastres_kernels.cpu.library import instruction_set
from fastres_kernels.triton_launch import INTERPRETED

CHANNELS = (8, 16, 24, 32, 48, 64, 104, 128, 208, 256, 512, 1024, 2048)
BYTES = tuple(1 << power for power in (16, 18, 20, 22, 24))
ROUNDS, REGION_S = 15, 0.001

Results = tuple[Tensor, ...]


class Case:
    """The tensors of a row of the table, and the two variants as functions."""

    def __init__(self, dtype: torch.dtype, mode: str, has_residual: bool, channels: int, size: int) -> None:
        torch.manual_seed(0)
        self.training = training = mode == "training"
        memory_format = torch.contiguous_format if mode.endswith("NCHW") else torch.channels_last
        pixels = size // (channels * dtype.itemsize)
        shape = (8, channels, pixels // 8, 1)
        self.x, self.residual, self.dy = (
            torch.randn(shape).to(dtype).contiguous(memory_format=memory_format) for _ in range(3)
        )
        self.x.requires_grad_(training)
        self.residual.requires_grad_(training)
        self.added = self.residual if has_residual else None
        # two_pass always runs in C++ if it can, so an earlier table does not matter.
        self.norm = BatchNormAct2d(channels, algorithm="two_pass").train(training)
        self.plain = nn.BatchNorm2d(channels).train(training)

    def in_cpp(self) -> Results:
        """Return y and, in training, the gradients."""
        return self._with_gradients(self.norm(self.x, self.added), self.norm)

    def in_torch(self) -> Results:
        """Return the same, from torch's operations."""
        y = self.plain(self.x)
        if self.added is not None:
            y += self.added
        return self._with_gradients(F.relu(y, inplace=True), self.plain)

    def _with_gradients(self, y: Tensor, norm: nn.Module) -> Results:
        if not self.training:
            return (y,)
        inputs = [tensor for tensor in (self.x, self.added, *norm.parameters()) if tensor is not None]
        return (y, *torch.autograd.grad(y, inputs, self.dy))

    def check(self) -> None:
        """Raise AssertionError if the variants' results differ by more than rounding."""
        for ours, theirs in zip(self.in_cpp(), self.in_torch(), strict=True):
            error = ((ours - theirs).float().norm() / theirs.float().norm()).item()
            # A NaN fails too. ReLU's mask may differ for sums near zero; in bf16 torch rounds before the addition too.
            assert error < (0.2 if self.x.dtype == torch.bfloat16 else 0.02), f"the variants differ by {error:.1%}"


def ratio(case: Case) -> float:
    """Return torch's time divided by the kernels', each the lower quartile of its rounds."""
    with torch.set_grad_enabled(case.training):
        case.check()
        variants: list[Callable[[], Results]] = [case.in_torch, case.in_cpp]
        turns = [max(1, math.ceil(REGION_S / seconds(variant, 1))) for variant in variants]
        times: list[list[float]] = [[], []]
        for _ in range(ROUNDS):
            for variant, n, measured in zip(variants, turns, times, strict=True):
                measured.append(seconds(variant, n))
    torch_s, cpp_s = (statistics.quantiles(measured, n=4)[0] for measured in times)
    return torch_s / cpp_s


def seconds(variant: Callable[[], Results], turns: int) -> float:
    """Return the seconds of a call."""
    start = time.perf_counter()
    for _ in range(turns):
        variant()
    return (time.perf_counter() - start) / turns


def rows(
    isa: str, modes: Sequence[str], channels: Sequence[int] = CHANNELS, sizes: Sequence[int] = BYTES
) -> Iterator[Row]:
    """Measure and yield the table's rows of some modes for this machine's instruction set."""
    for dtype, mode, has_residual, c, size in itertools.product(
        batchnorm.DTYPES, modes, (False, True), channels, sizes
    ):
        measured = ratio(Case(dtype, mode, has_residual, c, size))
        yield Row(isa, str(dtype).removeprefix("torch."), mode, has_residual, c, size, round(measured, 2))


def keep_freed_memory() -> None:
    """Tell glibc not to return memory to the system and not to map tensors of up to 32 MiB, the most that it takes."""
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    libc = ctypes.CDLL(None)
    for option in (trim_threshold, mmap_threshold):
        if libc.mallopt(option, 1 << 25) != 1:
            raise SystemExit("glibc's mallopt does not take a threshold of 32 MiB")


def main() -> None:
    """Run the command."""
    parser = Parser(
        prog="python -m bench.cpu_norm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="Write the rows to kernels/cpu/fastest.json.")
    help_ = "Measure only this mode (default: all)."
    parser.add_argument("--mode", action="append", choices=dispatch_table.MODES, help=help_)
    parser.add_argument("--without-bf16", action="store_true", help="Measure for CPUs without avx512_bf16.")
    options = parser.parse_args()
    with patch.object(library, "cpu_flags", set) if options.without_bf16 else nullcontext():
        measure(options.mode or dispatch_table.MODES, options.write)


def measure(modes: Sequence[str], writes: bool) -> None:
    """Measure the rows of some modes, print them, and write them if `writes` is true."""
    available, why = batchnorm.available()
    if not available or INTERPRETED:
        raise SystemExit(why if not available else "TRITON_INTERPRET is set, so the C++ kernels do not run")
    keep_freed_memory()
    isa, _ = instruction_set()
    print(f"{cpu_name()}, {isa}, {torch.get_num_threads()} threads, torch {torch.__version__}; torch's time / C++'s")
    print("bytes of an activation:", *(f"{size >> 10} KiB" for size in BYTES))
    measured = []
    for (dtype, mode, has_residual, c), group in itertools.groupby(rows(isa, modes), key=lambda row: row[1:5]):
        measured += (of_sizes := list(group))
        ratios = "  ".join(f"{row.ratio:5.2f}" for row in of_sizes)
        print(f"{dtype:8} {mode:17} {'+ residual' if has_residual else '':10} {c:5} channels  {ratios}", flush=True)
    if writes:
        dispatch_table.write(measured)


if __name__ == "__main__":
    run_command(main)
