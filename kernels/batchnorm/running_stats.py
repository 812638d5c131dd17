"""Update the running statistics in one kernel, because for small vectors the launches cost more than the work."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..triton_launch import launchable

BLOCK = 1024


@triton.jit
def update_kernel(
    mean,  # (C,) float32, the batch's
    var,  # (C,) float32, biased
    running_mean,  # (C,)
    running_var,  # (C,)
    batches,  # () int64
    C,
    count,  # number of values per channel; 1 if var is the unbiased estimate already
    MOMENTUM: tl.constexpr,  # negative: average over all batches so far
    BLOCK: tl.constexpr,
):
    """Update all channels in one CTA, because each channel has to read the counter before it is incremented."""
    seen = tl.load(batches) + 1
    rate = 1.0 / seen.to(tl.float32) if MOMENTUM < 0 else MOMENTUM
    unbias = count / tl.maximum(count - 1, 1)
    for start in range(0, C, BLOCK):
        c = start + tl.arange(0, BLOCK)
        for_mean = tl.load(running_mean + c, c < C, other=0.0)
        for_var = tl.load(running_var + c, c < C, other=0.0)
        new_mean = for_mean + rate * (tl.load(mean + c, c < C, other=0.0) - for_mean)
        new_var = for_var + rate * (tl.load(var + c, c < C, other=0.0) * unbias - for_var)
        tl.store(running_mean + c, new_mean, c < C)
        tl.store(running_var + c, new_var, c < C)
    tl.debug_barrier()  # all threads have read the counter before one writes it
    tl.store(batches, seen)


def update(
    mean: Tensor,  # (C,) float32
    var: Tensor,  # (C,) float32, biased
    running_mean: Tensor,  # (C,) float32
    running_var: Tensor,  # (C,) float32
    batches: Tensor,  # () int64
    count: int,
    momentum: float | None,
) -> None:
    """Move the running statistics towards the batch's in place, using the unbiased variance.

    `count` is the number of values per channel; `momentum` None averages over all batches so far.
    """
    rate = -1.0 if momentum is None else momentum
    launchable(update_kernel)[(1,)](
        mean, var, running_mean, running_var, batches, mean.numel(), count, MOMENTUM=rate, BLOCK=BLOCK
    )
