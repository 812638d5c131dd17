"""Processes: who this one is, and the few things they say to each other. Without torchrun all of it is a no-op."""

from __future__ import annotations

import os
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch._dynamo.config
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from fastres.distributed.watchdog import no_step, watching
from fastres.utils.errors import Failed, Refused
from fastres_kernels import synchronise

T = TypeVar("T")

# What the hosts tell each other goes through gloo: it costs a GPU no wait, and rank 0 may take its time over a data set
# that it decodes while the others wait for its word.
_hosts: dist.ProcessGroup | None = None


def rank() -> int:
    """This process's number, 0 to world() - 1, as torchrun set it."""
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    """The number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's number on its machine: its GPU's."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world() -> int:
    """The number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def restarted() -> bool:
    """Whether torchrun has started these processes anew after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


@contextmanager
def group(device: torch.device, timeout_s: float = 600.0) -> Iterator[None]:
    """The processes as one, where there are several: gloo on a CPU, NCCL on GPUs. Each is watched: one that hangs ends
    the run after timeout_s, and without a launcher none stays.

    Raises Failed where another process is gone.
    """
    global _hosts
    if world() == 1:
        with watching(alone=True):
            yield
        return
    try:
        with watching(alone=False) as looks:
            later = timedelta(seconds=timeout_s + 60)  # the watch comes first, because it can say who hangs
            store, _, _ = next(dist.rendezvous("env://", timeout=later))
            session = _session(store, later.total_seconds())
            store = dist.PrefixStore(session, store)
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=rank(), world_size=world(), timeout=later)
            _hosts = dist.new_group(backend="gloo", timeout=timedelta(days=1))  # type: ignore[assignment]
            looks.append(no_step(rank(), world(), timeout_s, session))
            yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        why = str(error).rpartition("] ")[2].partition(". ")[0]  # gloo's begin with a place in its source
        raise Failed(
            f"lost the connection to another process ({why}); its own line, if any, says what happened to it"
        ) from None
    dist.destroy_process_group()


def _session(store: dist.Store, wait_s: float) -> str:
    """A name that all processes of this start have in common, and no start before it had.

    torchrun's store outlives the processes that it starts again: without a name of their own they read where those
    before them could be reached, and wait for the dead (pytorch#135712; seen with torch 2.14).
    """
    me, deadline = uuid.uuid4().hex, time.monotonic() + wait_s
    if rank() > 0:
        store.set(f"fastres/hello/{rank()}", me)
        session = store.get(f"fastres/welcome/{me}").decode()  # waits for it
        store.set(f"fastres/{session}/{rank()}", "here")
        return session
    others = {number: f"fastres/hello/{number}" for number in range(1, world())}
    while missing := [number for number in others if not store.check([f"fastres/{me}/{number}"])]:
        if time.monotonic() > deadline:
            raise Failed(f"rank {missing[0]} of {world()} processes has not come within {wait_s:g} s")
        for number in missing:
            if store.check([others[number]]):  # perhaps from its life before: nobody waits for that answer
                store.set(f"fastres/welcome/{store.get(others[number]).decode()}", me)
        time.sleep(0.01)
    return me


def check_batch(batch_size: int, accumulate: int) -> None:
    """Refuses a global batch that the processes, and the parts of each one's share, cannot share equally."""
    parts = world() * accumulate
    if batch_size % parts:
        sharers = f"{world()} cannot share it equally"
        if accumulate > 1:
            sharers = f"{world()} with --train.accumulate {accumulate} cannot share it equally"
        raise Refused(
            f"train.batch_size {batch_size} is the batch of all processes and {sharers}; "
            f"use --train.batch_size {max(parts, batch_size // parts * parts)} or another number of processes"
        )


def wrap(module: nn.Module, device: torch.device, compress_gradients: bool = False) -> nn.Module:
    """The module, its gradients averaged over the processes where there are several."""
    return module if world() == 1 else data_parallel(module, device, compress_gradients)


def data_parallel(module: nn.Module, device: torch.device, compress_gradients: bool = False) -> nn.Module:
    """DDP around the module; BatchNorm's running statistics stay each process's own. Collective."""
    # Dynamo would cut the module's graph at DDP's buckets, and several processes would run another program than one.
    # Little is lost: in bf16 all gradients but BatchNorm's come out of one cast at the end (step.CastTogether).
    torch._dynamo.config.optimize_ddp = False
    with warnings.catch_warnings():
        # torch 2.14 prefers forward_sync_buffers, which torch 2.11 has not.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        wrapped = DistributedDataParallel(
            module,
            device_ids=[device.index] if device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
            static_graph=True,
        )
    if compress_gradients:
        try:
            dist.all_reduce(torch.ones(1, dtype=torch.bfloat16, device=device))
        except (RuntimeError, ValueError):
            raise Refused(
                f"engine.compress_gradients: {dist.get_backend()} of torch {torch.__version__} cannot add bf16; "
                "leave it out"
            ) from None
        wrapped.register_comm_hook(None, bf16_compress_hook)
    return wrapped


def gradients_later(module: nn.Module) -> AbstractContextManager[None]:
    """Inside, backward adds to this process's own gradients; the processes exchange them at the next one outside."""
    return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()


def share_statistics(model: nn.Module) -> None:
    """Makes every BatchNorm of the model take the statistics of the whole batch, where there are several processes."""
    if world() > 1:
        synchronise(model)


def from_rank0(work: Callable[[], T]) -> T:
    """What `work` returns on rank 0, on every rank; an error there is raised everywhere, and said once."""
    if world() == 1:
        return work()
    box: list[Any] = [None]
    if rank() == 0:
        try:
            box[0] = (work(), None)
        except Exception as error:
            box[0] = (None, error)
    dist.broadcast_object_list(box, group=_hosts)
    result, failure = box[0]
    if failure is not None:
        failure.said = rank() != 0
        raise failure
    return result


def rank0_first(work: Callable[[], T]) -> T:
    """Runs `work` on rank 0, which may download and write, then on one process of each other host, which may have a
    disk of its own, and then on the rest, which find it done."""
    done: list[T] = []
    from_rank0(lambda: done.append(work()))
    if not done and local_rank() == 0:
        done.append(work())
    if world() > 1:
        dist.barrier(_hosts)
    return done[0] if done else work()


def all_sum(*tensors: Tensor) -> None:
    """Sums each tensor over the processes, in place."""
    for tensor in tensors if world() > 1 else ():
        dist.all_reduce(tensor)


def all_max(tensor: Tensor) -> None:
    """The largest of the processes' values, in place."""
    if world() > 1:
        dist.all_reduce(tensor, dist.ReduceOp.MAX)


def any_rank(flag: int) -> int:
    """The largest flag of all processes: so that all of them stop at the same step."""
    if world() == 1:
        return flag
    box = torch.tensor(flag)
    dist.all_reduce(box, dist.ReduceOp.MAX, group=_hosts)
    return int(box)


def check_equal(model: nn.Module) -> None:
    """Fails where the processes' weights differ: a step that did not exchange its gradients shows nowhere else.
    Collective."""
    if world() == 1:
        return
    # Of their bits, as whole numbers: the same in any order, on any device.
    bits = {4: torch.int32, 8: torch.int64}
    sums = torch.stack([p.detach().view(bits[p.element_size()]).sum() for p in model.parameters()])
    largest, smallest = sums.clone(), -sums
    all_max(largest)
    all_max(smallest)
    if not torch.equal(largest, -smallest):
        raise Failed("the processes' weights differ, which no step should cause: please report it")


def broadcast_buffers(model: nn.Module) -> None:
    """Rank 0's buffers (BatchNorm's running statistics) on every rank."""
    for buffer in model.buffers() if world() > 1 else ():
        dist.broadcast(buffer, 0)
