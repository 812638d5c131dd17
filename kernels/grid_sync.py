"""Synchronise the CTAs of one kernel, so that one launch does the work of two.

The CTAs count arrivals in an int32 scalar. All increments add up to 2³¹, so the sign flips when the last CTA arrives
and the counter never has to be reset (inductor's x_grid_barrier does the same). The kernels of one stream run in order,
so they share a counter. A CUDA graph uses the counter of the stream on which it was captured. Graphs captured on one
stream must therefore not be replayed at the same time, nor next to kernels on that stream; note that two
torch.cuda.Stream objects may be one stream, because torch hands out its 32 streams per priority in rotation. Not yet
run on a GPU.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiling import H100
from .triton_launch import INTERPRETED

# ---- in kernels --------------------------------------------------------------------------------------------


@triton.jit
def cta_number():
    """Return this CTA's number, in the order in which a GPU starts them, and the number of CTAs in the grid."""
    across, down = tl.num_programs(0), tl.num_programs(1)
    number = tl.program_id(0) + across * (tl.program_id(1) + down * tl.program_id(2))
    return number, across * down * tl.num_programs(2)


@triton.jit
def arrive(arrived):
    """Count this CTA as arrived, once, and return the token for `wait`; waiting CTAs will see this CTA's stores."""
    number, ctas = cta_number()
    tl.debug_barrier()  # all threads store before one thread releases
    # CTA 0 adds 2³¹ minus the number of the other CTAs, which add 1 each. XOR flips the sign, because a subtraction
    # that overflows fails in TRITON_DEBUG.
    rest = (1 - ctas) ^ -(2**31)
    return tl.atomic_add(arrived, tl.where(number == 0, rest, 1), sem="release")


@triton.jit
def wait(arrived, before):
    """Return when every CTA of the grid has arrived. `before` is the token from `arrive`."""
    while (tl.atomic_add(arrived, 0, sem="acquire") ^ before) >= 0:
        pass
    tl.debug_barrier()


@triton.jit
def grid_barrier(arrived):
    """Return when every CTA of the grid has called this function.

    All CTAs have to be on the GPU at once. A cooperative launch guarantees that, or fails.
    """
    wait(arrived, arrive(arrived))


@triton.jit
def final_reducer(arrived, FINAL_REDUCERS: tl.constexpr):
    """Return this CTA's index among the CTAs doing the final reduction, and their number. Every CTA calls it once.

    The last FINAL_REDUCERS CTAs that a GPU starts get indices from 0 and return when all CTAs have called. The others
    return a negative index at once. No cooperative launch is needed, because the CTAs that wait leave room for the
    others: see `final_reducers`.
    """
    number, ctas = cta_number()
    reducers = tl.minimum(FINAL_REDUCERS, ctas)
    index = number - (ctas - reducers)
    before = arrive(arrived)
    if index >= 0:
        wait(arrived, before)
    return index, reducers


# ---- on the host -------------------------------------------------------------------------------------------


def final_reducers(parts: int, x: Tensor) -> int:
    """Return how many CTAs should do a final reduction of `parts` independent parts on x's device.

    This is at most half of the device's multiprocessors, so that other CTAs have room while these wait. The interpreter
    runs CTAs one after another, so only the last one can reduce without waiting for ever.
    """
    if INTERPRETED:
        return 1
    multiprocessors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else H100
    return min(parts, max(1, multiprocessors // 2))


STREAMS = 128  # counters allocated at a time; torch has 32 streams per priority


class CounterPool:
    """Arrival counters of a device, one per stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.by_stream: dict[int, Tensor] = {}  # () int32 each
        self.unused: list[Tensor] = []

    def of_stream(self, stream: int) -> Tensor:
        """Return the stream's () int32 counter, allocating STREAMS counters if none is left."""
        if stream not in self.by_stream:
            if not self.unused:
                self.unused = self._allocate()
            self.by_stream[stream] = self.unused.pop()
        return self.by_stream[stream]

    def _allocate(self) -> list[Tensor]:
        on_gpu = self.device.type == "cuda"
        # A capture would record the zeroing and repeat it at every replay, which resets another graph's counters.
        if on_gpu and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("fastres_kernels: a kernel's first call is being captured; call it once before")
        # Each counter has a cache line of its own, at an address for which Triton specialises as for any tensor's. A
        # separate thread allocates them, because torch.compile frees everything that its own thread allocates while
        # warming up for CUDA graphs (mode="reduce-overhead").
        with ThreadPoolExecutor(1) as thread:
            made = thread.submit(torch.zeros, (STREAMS, 32), dtype=torch.int32, device=self.device)
        counters = list(made.result()[:, 0].unbind())
        if on_gpu:  # otherwise another stream could use a counter before it is zeroed
            torch.cuda.default_stream(self.device).synchronize()
        return counters


@cache  # counters outlive the kernels and the graphs that use them
def counter_pool(device: torch.device) -> CounterPool:
    """Return the device's counters."""
    return CounterPool(device)


def counter(x: Tensor) -> Tensor:
    """Return the () int32 in which the kernels on x's device and the current stream count arrivals.

    The counter outlives the call, so only ops that torch.compile does not look into can use it.

    Raises:
        RuntimeError: if counters have to be allocated while a CUDA graph is being captured.
    """
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
    return counter_pool(x.device).of_stream(stream)
