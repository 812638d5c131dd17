"""Compare BatchNormAct2d with shared statistics on two ranks with a single process that has the whole batch.

torch.distributed.run starts this program. The argument is "kernels", in Triton's interpreter, or "reference".
"""

from __future__ import annotations

import gc
import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastres_kernels import BatchNormAct2d, convert_sync_batchnorm, triton_launch

Results = tuple[list[Tensor], list[Tensor], list[Tensor]]


def make(dtype: torch.dtype) -> BatchNormAct2d:
    norm = BatchNormAct2d(4).to(dtype)
    nn.init.uniform_(norm.weight, 0.5, 2, generator=torch.Generator().manual_seed(1))
    return norm


def run(norm: BatchNormAct2d, tensors: list[Tensor], compiled: bool = False) -> Results:
    """Return y and the gradients of x and residual; the parameters' gradients; the running statistics."""
    *inputs, weights = (t.to(norm.weight.dtype).contiguous(memory_format=torch.channels_last) for t in tensors)
    leaves = [t.requires_grad_() for t in inputs]
    call = torch.compile(norm, fullgraph=True, backend="aot_eager") if compiled else norm
    y = call(*leaves)
    (y * weights).sum().backward()
    gradients = [norm.weight.grad, norm.bias.grad]
    norm.zero_grad(set_to_none=True)
    running = [norm.running_mean.clone(), norm.running_var.clone()]
    return [y, *(leaf.grad for leaf in leaves)], gradients, running


def compare(dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    # x, residual, and the weights in the weighted sum of y that is differentiated
    whole_batch = [torch.randn(5, 4, 3, 3, generator=generator, dtype=torch.float64) + 2 for _ in range(3)]
    part = slice(0, 3) if dist.get_rank() == 0 else slice(3, 5)  # per-rank batches of different sizes
    whole = run(make(dtype), [t.clone() for t in whole_batch])
    for compiled in (False, True):
        norm = convert_sync_batchnorm(make(dtype))
        mine = run(norm, [t[part].clone() for t in whole_batch], compiled)
        for a, b in zip(mine[0], whole[0], strict=True):
            assert (a - b[part]).abs().max() < tolerance
        for a, b in zip(mine[1], whole[1], strict=True):  # each rank has its part of the gradient, as DDP expects
            dist.all_reduce(a)
            assert (a - b).abs().max() < tolerance * 10
        for a, b in zip(mine[2], whole[2], strict=True):
            assert (a - b).abs().max() < tolerance


def assert_collectives_have_short_names(dtype: torch.dtype) -> None:
    """Check that no functional all-gather runs, because its name can corrupt the heap: see sync_stats.gather()."""
    norm = convert_sync_batchnorm(make(dtype))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run(norm, [torch.randn(2, 4, 3, 3) for _ in range(3)])
    collectives = {event.name for event in profile.events() if event.name.startswith("_c10d_functional::")}
    assert "_c10d_functional::all_to_all_single" in collectives, collectives
    assert "_c10d_functional::all_gather_into_tensor" not in collectives, collectives


def main(path: str) -> None:
    dist.init_process_group("gloo")
    assert (path == "kernels") == triton_launch.INTERPRETED
    assert_collectives_have_short_names(torch.float32)
    if path == "kernels":
        compare(torch.float32, 1e-4)
    else:
        compare(torch.float64, 1e-12)
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()
    print("equal", flush=True)
    os._exit(0)  # an unjoined gloo thread sometimes aborts the interpreter's exit (torch 2.14)


if __name__ == "__main__":
    main(sys.argv[1])
