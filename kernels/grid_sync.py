"""Where the programs of one kernel wait for each other, so that one launch does what would take two.

They count themselves in a () int32 of memory, of which the sign counts: all programs together add 2³¹, so it changes
when the last one comes, and nobody sets it back (as inductor's x_grid_barrier). Kernels of one stream run one after
another, and so share one counter. A graph has that of the stream it was captured on: graphs of one such stream are not
to be replayed at the same time, nor beside kernels on it. (torch gives its 32 streams of a priority out in turn: two
torch.cuda.Stream may be one.) Not yet run on a GPU.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiling import H100
from .triton_launch import INTERPRETED


@triton.jit
def number_of_program():
    """In the order in which a GPU starts them, from 0; and how many there are."""
    across, down = tl.num_programs(0), tl.num_programs(1)
    number = tl.program_id(0) + across * (tl.program_id(1) + down * tl.program_id(2))
    return number, across * down * tl.num_programs(2)


@triton.jit
def arrive(arrived):
    """Called once by every program: what it has stored will be seen by those that `wait`, with what is returned."""
    number, programs = number_of_program()
    tl.debug_barrier()  # all threads' stores before the one thread's release
    # 2³¹ less what the others add; the sign is flipped, because a subtraction that overflows fails in TRITON_DEBUG.
    rest = (1 - programs) ^ -(2**31)
    return tl.atomic_add(arrived, tl.where(number == 0, rest, 1), sem="release")


@triton.jit
def wait(arrived, before):
    """Returns when every program of the grid has arrived."""
    while (tl.atomic_add(arrived, 0, sem="acquire") ^ before) >= 0:
        pass
    tl.debug_barrier()


@triton.jit
def grid_barrier(arrived):
    """Returns when every program of the grid has called it. All of them have to be on the GPU at once, which a
    cooperative launch guarantees or refuses."""
    wait(arrived, arrive(arrived))


def finishers(parts: int, x: Tensor) -> int:
    """How many programs are to finish a kernel in so many parts on x's device: at most half as many as it has
    multiprocessors, so that others have a place while they wait. The interpreter runs programs one after another: there
    the last one finishes all, for it alone never waits."""
    if INTERPRETED:
        return 1
    there = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else H100
    return min(parts, max(1, there // 2))


@triton.jit
def finisher(arrived, FINISHERS: tl.constexpr):
    """Called once by every program: the last FINISHERS that a GPU starts are numbered from 0, and go on when all have
    called; the others get less than 0, at once. Also how many finish. Needs no cooperative launch, for those that wait
    leave places to the others: see `finishers`."""
    number, programs = number_of_program()
    finishing = tl.minimum(FINISHERS, programs)
    which = number - (programs - finishing)
    before = arrive(arrived)
    if which >= 0:
        wait(arrived, before)
    return which, finishing


STREAMS = 128  # torch has 32 of each priority
_unused: dict[torch.device, list[Tensor]] = {}
_counters: dict[tuple[torch.device, int], Tensor] = {}  # by device and stream


def counter(x: Tensor) -> Tensor:
    """The () int32 that the kernels of x's device and of the current stream count in. It outlives them: only ops that
    torch.compile does not look into can take it. RuntimeError where a device's first call is being captured."""
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
    if (x.device, stream) not in _counters:
        if not _unused.get(x.device):
            # A capture would note the zeros down, and set them when it is replayed: too late for another graph.
            if x.is_cuda and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "fastres_kernels: a kernel's first call is being captured; call it once before"
                )
            # Each in a cache line of its own, at an address that Triton compiles for as for any tensor's. From a thread
            # of its own: of what a thread allocates while torch.compile warms up for its own CUDA graphs
            # (mode="reduce-overhead") it wants everything back.
            with ThreadPoolExecutor(1) as thread:
                made = thread.submit(torch.zeros, (STREAMS, 32), dtype=torch.int32, device=x.device)
            _unused[x.device] = list(made.result()[:, 0].unbind())
            if x.is_cuda:  # other streams do not wait for that thread's
                torch.cuda.default_stream(x.device).synchronize()
        _counters[x.device, stream] = _unused[x.device].pop()
    return _counters[x.device, stream]
