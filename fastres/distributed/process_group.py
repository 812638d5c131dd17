"""Ranks and the collectives between them. Without torchrun there is one process, and every function is a no-op."""

from __future__ import annotations

import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from fastres.distributed.watchdog import Watchdog
from fastres.utils import ranks
from fastres.utils.errors import RunError, UsageError
from fastres_kernels import convert_sync_batchnorm

T = TypeVar("T")


class ProcessGroup:
    """The processes of a run: their control messages, and the watchdog that ends them if one hangs.

    Control messages use gloo even on GPUs: they never synchronise the device, and they have a long timeout, because the
    other ranks may have to wait while rank 0 decodes a data set.
    """

    def __init__(self, watchdog: Watchdog | None = None, control: dist.ProcessGroup | None = None) -> None:
        self.watchdog = watchdog or Watchdog()
        self.control = control  # gloo's; None for one process

    def broadcast_from_rank0(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 and return its result on every rank; an error is raised everywhere and printed once."""
        if ranks.world_size() == 1:
            return work()
        box: list[Any] = [None]
        if ranks.rank() == 0:
            try:
                box[0] = (work(), None)
            except Exception as error:
                box[0] = (None, error)
        dist.broadcast_object_list(box, group=self.control)
        result: T = box[0][0]
        failure: Any = box[0][1]
        if failure is not None:
            failure.said = ranks.rank() != 0
            raise failure
        return result

    def rank0_first(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0, then on one rank of each other host, then on the rest, and return its result.

        Rank 0 may download and write, another host may have a disk of its own, and the rest find the work done.
        """
        done: list[T] = []
        self.broadcast_from_rank0(lambda: done.append(work()))
        if not done and ranks.local_rank() == 0:
            done.append(work())
        if ranks.world_size() > 1:
            dist.barrier(self.control)
        return done[0] if done else work()

    def max_over_ranks(self, flag: int) -> int:
        """Return the largest flag of all ranks, so that all of them stop at the same step."""
        if ranks.world_size() == 1:
            return flag
        box = torch.tensor(flag)
        dist.all_reduce(box, dist.ReduceOp.MAX, group=self.control)
        return int(box)

    def with_heartbeat(self, batches: Iterator[T]) -> Iterator[T]:
        """Yield the batches, with a heartbeat around the wait for each.

        A UsageError of the data becomes a RunError, because the run has started by then.
        """
        try:
            with closing(batches):  # type: ignore[type-var]
                while True:
                    self.watchdog.heartbeat("waits for its data")
                    batch = next(batches, None)
                    self.watchdog.heartbeat()
                    if batch is None:
                        return
                    yield batch
        except UsageError as error:
            raise RunError(str(error)) from None


@contextmanager
def join_process_group(device: torch.device, timeout_s: float = 600.0) -> Iterator[ProcessGroup]:
    """Initialise the process group (NCCL on GPUs, gloo on CPUs, nothing for one process).

    A watchdog ends the run if a rank makes no progress for `timeout_s` seconds or if the launcher dies.

    Raises:
        RunError: if another process has died.
    """
    watchdog = Watchdog()
    if ranks.world_size() == 1:
        with watchdog.running(alone=True):
            yield ProcessGroup(watchdog)
        return
    try:
        with watchdog.running(alone=False):
            later = timedelta(seconds=timeout_s + 60)  # the watchdog comes first, because it can name who hangs
            store, _, _ = next(rendezvous("env://", timeout=later))
            session = _session(store, later.total_seconds())
            store = dist.PrefixStore(session, store)  # type: ignore[attr-defined]  # torch does not list it in __all__
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(
                backend, store=store, rank=ranks.rank(), world_size=ranks.world_size(), timeout=later
            )
            control = dist.new_group(backend="gloo", timeout=timedelta(days=1))
            watchdog.checks.append(watchdog.stall_check(ranks.rank(), ranks.world_size(), timeout_s, session))
            yield ProcessGroup(watchdog, control)  # type: ignore[arg-type]
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        why = str(error).rpartition("] ")[2].partition(". ")[0]  # a message of gloo's begins with a place in its source
        raise RunError(
            f"lost the connection to another process ({why}); see the error of that process, if it printed one"
        ) from None
    dist.destroy_process_group()


def _session(store: Any, wait_s: float) -> str:
    """Return a name that the processes of this start share and that no earlier start had.

    torchrun's store outlives the processes that it restarts. Without a name of their own, restarted processes read the
    addresses of their predecessors and wait for dead processes (pytorch#135712; seen with torch 2.14).

    Raises:
        RunError: on rank 0, if another rank has not joined within `wait_s` seconds.
    """
    me, deadline = uuid.uuid4().hex, time.monotonic() + wait_s
    if ranks.rank() > 0:
        store.set(f"fastres/hello/{ranks.rank()}", me)
        session: str = store.get(f"fastres/welcome/{me}").decode()  # waits until rank 0 has set it
        store.set(f"fastres/{session}/{ranks.rank()}", "here")
        return session
    others = {number: f"fastres/hello/{number}" for number in range(1, ranks.world_size())}
    while missing := [number for number in others if not store.check([f"fastres/{me}/{number}"])]:
        if time.monotonic() > deadline:
            raise RunError(f"rank {missing[0]} of {ranks.world_size()} processes has not joined within {wait_s:g} s")
        for number in missing:
            if store.check([others[number]]):  # if it is the previous start's, nobody waits for the answer
                store.set(f"fastres/welcome/{store.get(others[number]).decode()}", me)
        time.sleep(0.01)
    return me


def wrap(module: nn.Module, device: torch.device, compress_gradients: bool = False) -> nn.Module:
    """Return the module in DDP, or the module itself for one process. Collective."""
    return module if ranks.world_size() == 1 else data_parallel(module, device, compress_gradients)


def data_parallel(module: nn.Module, device: torch.device, compress_gradients: bool = False) -> nn.Module:
    """Return the module in DDP; each rank keeps its own BatchNorm running statistics. Collective.

    Args:
        module: is on the device, compiled or not.
        device: the module's device.
        compress_gradients: all-reduce the gradients in bf16.

    Raises:
        UsageError: if the backend cannot add bf16 and compress_gradients is set.
    """
    import torch._dynamo.config  # takes a second; DDP imports it too

    # Otherwise dynamo splits the module's graph at DDP's buckets, and several processes run another program than one.
    # Little overlap is lost, because in bf16 all gradients except BatchNorm's come out of one cast at the end
    # (step.BatchedCast).
    torch._dynamo.config.optimize_ddp = False
    with warnings.catch_warnings():
        # torch 2.14 prefers forward_sync_buffers, which torch 2.11 does not have.
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
            raise UsageError(
                f"engine.compress_gradients: {dist.get_backend()} of torch {torch.__version__} cannot add bf16; "
                "leave it out"
            ) from None
        wrapped.register_comm_hook(None, bf16_compress_hook)
    return wrapped


def no_sync(module: nn.Module) -> AbstractContextManager[None]:
    """Keep gradients local inside the block; the next backward outside it all-reduces them."""
    return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()


def enable_sync_batchnorm(model: nn.Module) -> None:
    """Make every BatchNorm use the statistics of the global batch, if there are several processes."""
    if ranks.world_size() > 1:
        convert_sync_batchnorm(model)


def all_sum(*tensors: Tensor) -> None:
    """All-reduce each tensor by its sum, in place."""
    for tensor in tensors if ranks.world_size() > 1 else ():
        dist.all_reduce(tensor)


def all_max(tensor: Tensor) -> None:
    """All-reduce the tensor by its maximum, in place."""
    if ranks.world_size() > 1:
        dist.all_reduce(tensor, dist.ReduceOp.MAX)


def assert_replicas_equal(model: nn.Module) -> None:
    """Raise RunError if the ranks' weights differ. Collective.

    No other check would notice a step that did not all-reduce its gradients.
    """
    if ranks.world_size() == 1:
        return
    # Sums of the weights' bits as integers do not depend on the order of the summation or on the device.
    bits = {4: torch.int32, 8: torch.int64}
    sums = torch.stack([p.detach().view(bits[p.element_size()]).sum() for p in model.parameters()])
    largest, smallest = sums.clone(), -sums
    all_max(largest)
    all_max(smallest)
    if not torch.equal(largest, -smallest):
        raise RunError("the processes' weights differ, which is a bug of fastres; please report it")


def broadcast_buffers(model: nn.Module) -> None:
    """Copy rank 0's buffers (BatchNorm's running statistics) to every rank."""
    for buffer in model.buffers() if ranks.world_size() > 1 else ():
        dist.broadcast(buffer, 0)
