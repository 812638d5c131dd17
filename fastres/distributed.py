"""Processes: who this one is, and the few things they say to each other. Without torchrun all of it is a no-op."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastres.errors import Refused

T = TypeVar("T")


def rank() -> int:
    """This process's number, 0 to world() - 1, as torchrun set it."""
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    """The number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's number on its machine: its GPU's."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextmanager
def group(device: torch.device) -> Iterator[None]:
    """The process group, where there is more than one process: gloo on a CPU, NCCL on GPUs."""
    if world() == 1:
        yield
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        # DDP is part of reference cycles. What refers to the group at the interpreter's end leaves threads that nobody
        # joins: 9 of 26 scripts that kept a network with shared statistics ended with SIGABRT after all was done (torch
        # 2.14, gloo), none of 14 that let it go.
        gc.collect()
        dist.destroy_process_group()


def check_batch(batch_size: int) -> None:
    """Refuses a global batch that the processes cannot share equally."""
    if batch_size % world():
        nearest = max(world(), batch_size // world() * world())
        raise Refused(
            f"train.batch_size {batch_size} is the batch of all processes and {world()} cannot share it equally; "
            f"use --train.batch_size {nearest} or another number of processes"
        )


def wrap(module: nn.Module, device: torch.device) -> nn.Module:
    """DDP around the module where there is more than one process; BatchNorm statistics stay each process's own."""
    if world() == 1:
        return module
    return DistributedDataParallel(
        module,
        device_ids=[device.index] if device.type == "cuda" else None,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
        static_graph=True,
    )


def from_rank0(work: Callable[[], T]) -> T:
    """What `work` returns on rank 0, on every rank; an error there is raised everywhere."""
    if world() == 1:
        return work()
    box: list[Any] = [None]
    if rank() == 0:
        try:
            box[0] = (work(), None)
        except Exception as error:
            box[0] = (None, error)
    dist.broadcast_object_list(box)
    result, failure = box[0]
    if failure is not None:
        raise failure
    return result


def rank0_first(work: Callable[[], T]) -> T:
    """Runs `work` on rank 0, which may download and write, and then on the others, which find it done."""
    done: list[T] = []
    from_rank0(lambda: done.append(work()))
    return done[0] if done else work()


def all_sum(*tensors: Tensor) -> None:
    """Sums each tensor over the processes, in place."""
    for tensor in tensors if world() > 1 else ():
        dist.all_reduce(tensor)


def all_max(tensor: Tensor) -> None:
    """The largest of the processes' values, in place."""
    if world() > 1:
        dist.all_reduce(tensor, dist.ReduceOp.MAX)


def any_rank(flag: int, device: torch.device) -> int:
    """The largest flag of all processes: so that all of them stop at the same step."""
    if world() == 1:
        return flag
    box = torch.tensor(flag, device=device)
    all_max(box)
    return int(box.item())


def broadcast_buffers(model: nn.Module) -> None:
    """Rank 0's buffers (BatchNorm's running statistics) on every rank."""
    for buffer in model.buffers() if world() > 1 else ():
        dist.broadcast(buffer, 0)
