"""A recorder for a CPU with the rules of a CUDA graph, which checks that a step could be captured.

It is not a mock, because it replays the operators that it saw.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from fastres.training.cuda_graph import WARM_UP, CannotRecord, Recording, Work
from fastres.training.step import preserving

# Operators that allocate memory without initialising it; replaying them has no effect.
UNWRITTEN = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
# torch's tags of operators whose result, or its size, only the device knows.
SYNC_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
# Reads of values that are no operators on a CPU.
READS = (Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.cpu, Tensor.__repr__)


class OpRecorder:
    """Record operators with the tensors that they read and wrote, as autograd and the optimizer called them.

    Intermediate results stay in memory, so the recorder is for small networks. It does not see inside code that
    inductor compiled. It enforces the rules of a CUDA graph and raises CannotRecord for work that breaks one.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def record(self, work: Work, mutated: Sequence[Tensor]) -> Recording:
        """Record `work` as Recorder.record does. Raise CannotRecord if it breaks a rule of a CUDA graph."""
        leaves = [tensor for tensor in mutated if tensor.requires_grad]
        if any(map(_in_a_graph, leaves)):
            gc.collect()  # as capturing() in training/cuda_graph.py does
        if live := sum(map(_in_a_graph, leaves)):
            raise CannotRecord(
                f"{live} parameters still belong to a live autograd graph; on a GPU, capturing now would pull that "
                "graph's stream into the capture. Delete the old loss first"
            )
        watchers, kept = list[_OpWatcher](), list[int]()
        for _ in range(WARM_UP):
            watchers.append(_OpWatcher(self.device))
            with preserving(mutated), watchers[-1].watching():
                work()
            watchers[-1].check(mutated)
            kept.append(sum(watcher.kept_bytes() for watcher in watchers))
        if kept[-1] > kept[-2]:
            raise CannotRecord(
                f"the work keeps {kept[-1] - kept[-2]} more bytes at each call; replays would share one copy"
            )
        recording = _HostRecording()
        with preserving(mutated), _OpWatcher(self.device, recording).watching():
            work()
        recording.total_bytes = recording.count_bytes()
        return recording


@dataclass
class _Call:
    """One call of an operator."""

    operator: Any
    args: Any
    kwargs: Any
    made: dict[int, Tensor]  # the tensors that the call creates, by their place among its results

    def again(self) -> None:
        """Call the operator again and copy its results into the same memory."""
        results = _tensors(self.operator(*self.args, **self.kwargs))
        for place, tensor in self.made.items():
            if results[place].shape != tensor.shape:
                was, now = tuple(tensor.shape), tuple(results[place].shape)
                raise CannotRecord(f"{self.operator} made {was} when it was recorded, and makes {now}")
            tensor.copy_(results[place])


@dataclass
class _HostRecording:
    calls: list[_Call] = field(default_factory=list)
    total_bytes: int = 0  # of all tensors that the calls read and write

    @torch.no_grad()
    def replay(self) -> None:
        for call in self.calls:
            call.again()
        if (now := self.count_bytes()) != self.total_bytes:
            raise CannotRecord(f"a replay changed the memory it uses from {self.total_bytes} to {now} bytes")

    def count_bytes(self) -> int:
        used = (tensor for call in self.calls for tensor in _tensors((call.args, call.kwargs, call.made)))
        return sum({_storage(tensor): tensor.untyped_storage().nbytes() for tensor in used}.values())


class _OpWatcher(TorchDispatchMode):
    """Reject operators that a CUDA graph cannot capture, and add the others to the recording if there is one."""

    def __init__(self, device: torch.device, recording: _HostRecording | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no annotations here
        self.device, self.recording = device, recording
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}  # the operators' results: storage, bytes
        self.found: dict[int, tuple[Tensor, Tensor]] = {}  # tensors from outside, and their first values

    @contextmanager
    def watching(self) -> Iterator[None]:
        with _Reads(), self:
            yield

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if why := _why_not(operator, args):
            raise CannotRecord(_at(f"{operator} {why}"))
        given = _tensors((args, kwargs))
        storages = {_storage(tensor) for tensor in given}
        for tensor in given if self.recording is None else ():
            if _storage(tensor) not in self.made and _storage(tensor) not in self.found:
                self.found[_storage(tensor)] = tensor.detach(), _bytes(tensor).clone()
        out = operator(*args, **kwargs)
        results = _tensors(out)
        if any(tensor.device != self.device for tensor in (*given, *results)):
            raise CannotRecord(_at(f"{operator} takes a tensor from or to another device than {self.device}"))
        made = {place: tensor for place, tensor in enumerate(results) if _storage(tensor) not in storages}
        for tensor in made.values():
            storage = tensor.untyped_storage()
            self.made[_storage(tensor)] = StorageWeakRef(storage), storage.nbytes()
        writes = made or operator._schema.is_mutable  # otherwise it is a view
        if self.recording is not None and writes and operator.overloadpacket.__name__ not in UNWRITTEN:
            # Keep detached aliases, so that the recording keeps memory alive but no autograd graph.
            kept = tree_map_only(Tensor, Tensor.detach, (args, kwargs, made))
            self.recording.calls.append(_Call(operator, *kept))
        return out

    def kept_bytes(self) -> int:
        """Return the bytes that the work created and that are still alive."""
        alive = [size for storage, size in self.made.values() if not storage.expired()]
        return sum(alive)

    def check(self, mutated: Sequence[Tensor]) -> None:
        """Raise CannotRecord if the work wrote to a tensor from outside that is not in `mutated`."""
        declared = {_storage(tensor) for tensor in mutated}
        for storage, (tensor, before) in self.found.items():
            if storage not in declared and not torch.equal(_bytes(tensor), before):
                raise CannotRecord(
                    f"the work writes to a tensor {tuple(tensor.shape)} that is not among the mutated tensors"
                )


class _Reads(TorchFunctionMode):
    """Reject functions that read a tensor's values without an operator."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in READS:
            raise CannotRecord(_at(f"Tensor.{function.__name__} synchronises the host with the device"))
        return function(*args, **(kwargs or {}))


def forces_sync(operator: Any, args: tuple[Any, ...]) -> bool:
    """Return True if the operator needs a host-device synchronisation, because the host needs a value."""
    if operator in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default):
        masked = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        return masked and (len(args) < 3 or args[2].numel() > 1)  # a single value is a masked fill, without a wait
    return not SYNC_TAGS.isdisjoint(operator.tags)


def _why_not(operator: Any, args: tuple[Any, ...]) -> str | None:
    """Return the reason why a CUDA graph cannot capture the operator, or None."""
    if forces_sync(operator, args):
        return "synchronises the host with the device"
    if operator is torch.ops.aten.lift_fresh.default:
        return "takes a tensor made from numbers on the host, which would have to be copied at each replay"
    if torch.Tag.nondeterministic_seeded in operator.tags:
        return "draws random numbers, which recording would use up"
    return None


def _at(what: str) -> str:
    """Return `what` with the innermost line outside of torch and this file that led to it."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name != __name__ and name.partition(".")[0] != "torch":
            return f"{what} ({name}, line {frame.f_lineno})"
        frame = frame.f_back
    return what


def _in_a_graph(leaf: Tensor) -> bool:
    """Return True if an autograd graph of the leaf is alive.

    As long as a graph is alive, the node that accumulates the leaf's gradient stays the same, with the stream that it
    was created on (pytorch#180090).
    """

    def metadata() -> Any:  # of the node
        return get_gradient_edge(leaf).node.metadata

    metadata()["seen"] = True
    return "seen" in metadata()


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    """Return a number that is equal for tensors that share memory."""
    number: int = tensor.untyped_storage()._cdata
    return number


def _bytes(tensor: Tensor) -> Tensor:
    """Return the memory that the tensor is a view of: (bytes,) uint8."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
