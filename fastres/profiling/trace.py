"""What a trace of torch's profiler says of a step: operators, kernels, memory; and the work that they were given.

An operator is a call as PyTorch dispatches it below autograd and autocast, or one kernel that torch.compile generated;
views and bare allocations do nothing and do not count. Its FLOPs are those of torch.utils.flop_counter, convolutions
and matrix products; its bytes are its inputs and outputs, each once: the least that it can move.

Not yet run on a GPU: the reading of a trace with kernels, for which the test has a trace written by hand.
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
KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")  # a trace's categories of what runs on a GPU
GENERATED = re.compile(r"(graph_\d+_)?cpp_fused|triton_")  # how inductor names its kernels
NOTHING_DONE = ("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::_unsafe_view",
                "aten::new_empty_strided", "aten::_local_scalar_dense")  # fmt: skip
WRITE_ONLY = ("aten::copy_", "aten::fill_", "aten::zero_")  # do not read what they write to
# What is written where an operator returns nothing, by the arguments' places: its schema marks gradients too.
WRITTEN = {"aten::_fused_sgd_": (0, 2)}  # parameters, momentum
# As a trace names them; lists of tensors have one name for all.
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
Key = tuple[Any, ...]  # an operator's name, and shape and type of each tensor that it takes


# ------------------------------------------------------------------------------------------- work


class WorkCount(TorchDispatchMode):
    """Notes FLOPs and bytes of every operator that runs eagerly inside."""

    def __init__(self) -> None:
        super().__init__()
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
        return sum(n * self.work[key][0] for key, n in self.calls.items())

    @property
    def bytes(self) -> int:
        return sum(n * self.work[key][1] for key, n in self.calls.items())


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)


def _bytes(tensor: Tensor) -> int:
    # What is expanded has more elements than memory.
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())


def _key_of_values(values: list[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, Tensor):
            yield tuple(value.shape), TYPE_NAMES.get(value.dtype)
        elif isinstance(value, tuple | list) and any(isinstance(v, Tensor) for v in value):
            yield tuple(tuple(v.shape) for v in value if v is not None), "TensorList"


def _key_of_event(event: Event) -> Key:
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
    """One name in a trace, all its calls of a step together."""

    name: str
    calls: float
    seconds: float  # on the device
    share: float  # of the time of all operators on a CPU, of all kernels on a GPU
    flops: float | None
    bytes: float | None  # None: not known
    kernel: str | None  # on a GPU the longest of its kernels

    @property
    def intensity(self) -> float | None:
        """FLOP per byte."""
        return self.flops / self.bytes if self.flops is not None and self.bytes else None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def load(path: Path) -> list[Event]:
    """The events of a trace in Chrome's format."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return json.load(file)["traceEvents"]


def operators(events: list[Event], work: dict[Key, tuple[int, int]], steps: int) -> list[Operator]:
    """What took the time of `steps` steps, per step, the most expensive first. `work`: of every operator that may be
    called, from WorkCount.
    """
    names = {key[0] for key in work}
    owners: dict[Any, Event] = {}  # by the id of what runs inside it: the operator
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
        # Compiled code hands over the result's memory too, as the last tensor.
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
    """Kernels of a step on a GPU; operators of a step where there are none."""
    kernels = sum(event.get("cat") in KERNELS for event in events)
    return kernels / steps if kernels else sum(row.calls for row in rows)


def kernel_seconds(events: list[Event], steps: int) -> float | None:
    """Time of all kernels of a step together; None on a CPU."""
    taken = [event["dur"] / 1e6 for event in events if event.get("cat") in KERNELS]
    return sum(taken) / steps if taken else None


def peak_bytes(events: list[Event]) -> int | None:
    """The most that was allocated on the CPU at any time beyond what was there at the start; None: not recorded."""
    changes = [e["args"] for e in events if e["name"] == "[memory]"]
    held = peak = 0
    for change in changes:
        if change["Device Type"] == 0:
            held += change["Bytes"]
            peak = max(peak, held)
    return peak if changes else None


def _nested(events: Iterable[Event]) -> Iterator[tuple[Event, list[Event]]]:
    """Each event with those around it, the innermost first."""
    stack: list[Event] = []
    for event in sorted(events, key=lambda e: (str(e["tid"]), e["ts"], -e["dur"])):
        while stack and not _within(event, stack[-1]):
            stack.pop()
        yield event, stack[::-1]
        stack.append(event)


def _within(event: Event, other: Event) -> bool:
    return event["tid"] == other["tid"] and event["ts"] < other["ts"] + other["dur"]


def _id(event: Event) -> Any:
    return event.get("args", {}).get("External id")


def _generated_work(event: Event) -> tuple[int, int] | None:
    """Of a Triton kernel of inductor's, which is given all its tensors: each once. It does no matrix product, or its
    FLOPs are not known.
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


# ------------------------------------------------------------------------------------------- what binds


def bound(operator: Operator, flops_per_s: float, bytes_per_s: float) -> tuple[str, float | None]:
    """"compute" or "memory", by its FLOPs per byte against the device's; and the share that it reaches of what the
    device could do. Above 1: its tensors came from a cache.
    """  # fmt: skip
    if operator.bytes is None or operator.flops is None or operator.bytes == 0:
        return "unknown", None
    compute_s, memory_s = operator.flops / flops_per_s, operator.bytes / bytes_per_s
    side = "compute" if compute_s >= memory_s else "memory"
    return side, max(compute_s, memory_s) / operator.seconds
