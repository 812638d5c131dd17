"""Read a step's operators, kernels and memory from a trace of torch's profiler, and count their FLOPs and bytes.

An operator is a call as PyTorch dispatches it below autograd and autocast, or one kernel that torch.compile generated.
Views and bare allocations do no work and do not count. An operator's FLOPs are those of torch.utils.flop_counter, for
convolutions and matrix products. Its bytes are its inputs and outputs, each once, which is the least that it can move.

Reading a trace with kernels has not yet run on a GPU; the test has a trace written by hand.
"""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

PARTS = ("forward", "backward", "optimizer")  # of a step, and the names of its ranges in a trace
KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")  # a trace's categories of work on a GPU
GENERATED = re.compile(r"(graph_\d+_)?cpp_fused|triton_")  # the beginnings of the names of inductor's kernels
NOTHING_DONE = ("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::_unsafe_view",
                "aten::new_empty_strided", "aten::_local_scalar_dense")  # fmt: skip
WRITE_ONLY = ("aten::copy_", "aten::fill_", "aten::zero_")  # they do not read the tensor that they write to
# The arguments, by position, that an operator without a result writes to. Its schema marks the gradients as well.
WRITTEN = {"aten::_fused_sgd_": (0, 2)}  # parameters, momentum
# The names of dtypes in a trace. A list of tensors is named TensorList, whatever its dtypes.
TYPE_NAMES = {
    torch.float32: "float",
    torch.float64: "double",
    torch.float16: "c10::Half",
    torch.bfloat16: "c10::BFloat16",
    torch.int64: "long int",
    torch.int32: "int",
    torch.int16: "short int",
    torch.int8: "signed char",
    torch.uint8: "unsigned char",
    torch.bool: "bool",
}
ITEM_BYTES = {name: dtype.itemsize for dtype, name in TYPE_NAMES.items()}

Event = dict[str, Any]
Key = tuple[Any, ...]  # an operator's name, and shape and dtype of each tensor that it takes


# ------------------------------------------------------------------------------------------- work


class WorkCount(TorchDispatchMode):
    """Count FLOPs and bytes of every operator that runs eagerly inside the context."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no annotations here
        self.calls: Counter[Key] = Counter()
        self.work: dict[Key, tuple[int, int]] = {}  # FLOPs, bytes of one call

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name
        if not func.is_view and name not in NOTHING_DONE:
            given = [
                args[i] if i < len(args) else kwargs.get(argument.name)
                for i, argument in enumerate(func._schema.arguments)
            ]
            key = (name, *_key_of_values(given))
            count = flop_registry.get(func._overloadpacket)
            flops = count(*args, **kwargs, out_val=out) if count else 0
            read = _tensors(given[1:] if name in WRITE_ONLY else given)
            written = _tensors([given[place] for place in WRITTEN[name]] if name in WRITTEN else [out])
            self.calls[key] += 1
            self.work[key] = flops, sum(map(_bytes, read)) + sum(map(_bytes, written))
        return out

    @property
    def flops(self) -> int:
        """Return the FLOPs of all calls."""
        return sum(n * self.work[key][0] for key, n in self.calls.items())

    @property
    def bytes(self) -> int:
        """Return the bytes that all calls move at least."""
        return sum(n * self.work[key][1] for key, n in self.calls.items())


def _tensors(values: Any) -> Iterator[Tensor]:
    """Yield the tensors among the values and in their lists."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)


def _bytes(tensor: Tensor) -> int:
    # An expanded tensor has more elements than memory.
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())


def _key_of_values(values: list[Any]) -> Iterator[Any]:
    """Yield a Key's entries for an operator's arguments."""
    for value in values:
        if isinstance(value, Tensor):
            yield tuple(value.shape), TYPE_NAMES.get(value.dtype)
        elif isinstance(value, tuple | list) and any(isinstance(v, Tensor) for v in value):
            yield tuple(tuple(v.shape) for v in value if v is not None), "TensorList"


def _key_of_event(event: Event) -> Key:
    """Return the Key of an operator's event, which equals WorkCount's Key for such a call."""
    arguments = event.get("args", {})
    key: list[Any] = [event["name"]]
    for dims, kind in zip(arguments.get("Input Dims", ()), arguments.get("Input type", ()), strict=True):
        if kind == "TensorList":
            key.append((tuple(map(tuple, dims)), kind))
        elif kind not in ("", "Scalar", "ScalarList"):
            key.append((tuple(dims), kind))
    return tuple(key)


# ------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True, kw_only=True)
class Operator:
    """All calls of a step that have one name in a trace."""

    name: str
    calls: float
    seconds: float  # on the device
    share: float  # of the time of all operators on a CPU or of all kernels on a GPU
    flops: float | None
    bytes: float | None  # FLOPs and bytes are None if not known
    kernel: str | None  # on a GPU, the kernel that took the most time

    @property
    def intensity(self) -> float | None:
        """Return the FLOPs per byte."""
        return self.flops / self.bytes if self.flops is not None and self.bytes else None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, for JSON."""
        return asdict(self)


def load(path: Path) -> list[Event]:
    """Return the events of a gzipped trace in Chrome's format."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        events: list[Event] = json.load(file)["traceEvents"]
    return events


def operators(events: list[Event], work: dict[Key, tuple[int, int]], steps: int) -> list[Operator]:
    """Return the operators of a trace per step, the most expensive first.

    Args:
        events: the trace's events.
        work: FLOPs and bytes of one call of every operator that may be called, from WorkCount.
        steps: the number of traced steps.
    """
    names = {key[0] for key in work}
    owners: dict[Any, Event] = {}  # the operator by the id of each event inside it
    found: list[Event] = []
    for event, parents in _nested(e for e in events if e.get("cat") == "cpu_op" and e["ph"] == "X"):
        owner = next((owners[_id(parent)] for parent in parents if _id(parent) in owners), None)
        if owner is None and (event["name"] in names or GENERATED.match(event["name"])):
            owner = event
            found.append(event)
        if owner is not None:
            owners[_id(event)] = owner

    seconds: dict[str, float] = defaultdict(float)
    kernel_s: dict[str, Counter[str]] = defaultdict(Counter)
    kernels = [event for event in events if event.get("cat") in KERNELS]
    for kernel in kernels:
        owner = owners.get(_id(kernel))
        kernel_s[owner["name"] if owner else kernel["name"]][kernel["name"]] += kernel["dur"] / 1e6
    if kernels:
        seconds |= {name: sum(of.values()) for name, of in kernel_s.items()}
    else:
        for event in found:
            seconds[event["name"]] += event["dur"] / 1e6

    calls = Counter(event["name"] for event in found)
    done: dict[str, list[tuple[int, int] | None]] = defaultdict(list)
    for event in found:
        key = _key_of_event(event)
        # Compiled code passes the result's memory too, as the last tensor.
        done[event["name"]].append(work.get(key) or work.get(key[:-1]) or _generated_work(event))
    total_s = sum(seconds.values())
    launched = Counter(kernel["name"] for kernel in kernels)
    rows = []
    for name, taken_s in sorted(seconds.items(), key=lambda item: -item[1]):
        known = [each for each in done[name] if each is not None]
        complete = bool(known) and len(known) == len(done[name])
        rows.append(
            Operator(
                name=name,
                calls=(calls[name] or launched[name]) / steps,
                seconds=taken_s / steps,
                share=taken_s / total_s,
                flops=sum(flops for flops, _ in known) / steps if complete else None,
                bytes=sum(moved for _, moved in known) / steps if complete else None,
                kernel=kernel_s[name].most_common(1)[0][0] if kernel_s[name] else None,
            )
        )
    return rows


def launches(events: list[Event], rows: list[Operator], steps: int) -> float:
    """Return the number of kernels of a step, or of operators if the trace has no kernels."""
    kernels = sum(event.get("cat") in KERNELS for event in events)
    return kernels / steps if kernels else sum(row.calls for row in rows)


def kernel_seconds(events: list[Event], steps: int) -> float | None:
    """Return the seconds that all kernels of a step take together; None if the trace has none."""
    taken = [event["dur"] / 1e6 for event in events if event.get("cat") in KERNELS]
    return sum(taken) / steps if taken else None


def peak_bytes(events: list[Event]) -> int | None:
    """Return the most bytes allocated on the CPU at any time beyond those at the start, or None if not recorded."""
    changes = [e["args"] for e in events if e["name"] == "[memory]"]
    allocated = peak = 0
    for change in changes:
        if change["Device Type"] == 0:
            allocated += change["Bytes"]
            peak = max(peak, allocated)
    return peak if changes else None


def _nested(events: Iterable[Event]) -> Iterator[tuple[Event, list[Event]]]:
    """Yield each event with the events around it, the innermost first."""
    stack: list[Event] = []
    for event in sorted(events, key=lambda e: (str(e["tid"]), e["ts"], -e["dur"])):
        while stack and not _within(event, stack[-1]):
            stack.pop()
        yield event, stack[::-1]
        stack.append(event)


def _within(event: Event, other: Event) -> bool:
    within: bool = event["tid"] == other["tid"] and event["ts"] < other["ts"] + other["dur"]
    return within


def _id(event: Event) -> Any:
    return event.get("args", {}).get("External id")


def _generated_work(event: Event) -> tuple[int, int] | None:
    """Return FLOPs and bytes of one of inductor's Triton kernels, or None for another event.

    A kernel's arguments are all its tensors, and each moves once. These kinds of kernels do no matrix product, so they
    have 0 FLOPs in flop_counter's sense.
    """
    if not event["name"].startswith(("triton_poi_", "triton_red_", "triton_per_")):
        return None
    total = 0
    for shape, kind in _key_of_event(event)[1:]:
        if kind not in ITEM_BYTES:
            return None
        size = ITEM_BYTES[kind]
        for length in shape:
            size *= length
        total += size
    return 0, total


# ------------------------------------------------------------------------------------------- roofline


def bound(operator: Operator, flops_per_s: float, bytes_per_s: float) -> tuple[str, float | None]:
    """Return the side of the roofline that an operator is on, and the share of it that the operator reaches.

    Args:
        operator: the operator, with FLOPs and bytes.
        flops_per_s: the device's rate of computing.
        bytes_per_s: the device's rate of moving.

    Returns:
        "compute" or "memory", and the share, which is above 1 if the tensors came from a cache; "unknown" and None if
        the FLOPs or bytes are not known.
    """
    if operator.bytes is None or operator.flops is None or operator.bytes == 0:
        return "unknown", None
    compute_s, memory_s = operator.flops / flops_per_s, operator.bytes / bytes_per_s
    side = "compute" if compute_s >= memory_s else "memory"
    return side, max(compute_s, memory_s) / operator.seconds
