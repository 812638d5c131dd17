"""How the kernels are registered and launched: on a GPU, in Triton's interpreter, or not at all.

Everything that asks "is there Triton, and does it run this tensor" asks here, so that the package imports, and its
modules train through the reference, where Triton is not installed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

HAS_TRITON = importlib.util.find_spec("triton") is not None
# As Triton reads it: when a kernel is defined, so before the first import of this package.
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")
# Of activations; parameters and statistics are float32.
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# torch.compile's caches know a triton_op by the kernels in it, not by the Python around them or by whether Triton
# interprets: without this, a graph compiled by another version of this package is taken for this one's (it was: the
# reference's graph, from a run before, answered a run of the interpreter).
_sources = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.rglob("*.py")))
_digest = hashlib.sha256(_sources).hexdigest()[:16]
torch.compiler.config.cache_key_tag += f"fastres_kernels {_digest}{' interpreted' if INTERPRETED else ''};"


def runs_kernels(x: Tensor) -> bool:
    """Whether Triton kernels take x, (N, C, H, W): on a GPU, or anywhere when interpreting; else the reference does.
    RuntimeError where x is on another GPU than the current one, on which Triton would launch."""
    if x.is_cuda and not is_fake(x) and x.device.index != torch.cuda.current_device():
        raise RuntimeError(
            f"fastres_kernels: a tensor is on {x.device}, and the current device is "
            f"cuda:{torch.cuda.current_device()}; call torch.cuda.set_device({x.device.index}) before"
        )
    return HAS_TRITON and x.dtype in DTYPES and (x.is_cuda or INTERPRETED) and x.numel() > 0


def register(name: str, mutates: Iterable[str] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Registers a function of tensors that mutates none but the named as torch.ops.fastres_kernels.NAME.

    torch.compile sees through a `triton_op` to the kernels in it. Under the interpreter a triton_op runs but does not
    compile; there, and without Triton, the op is opaque.
    """
    if INTERPRETED or not HAS_TRITON:
        return torch.library.custom_op(f"fastres_kernels::{name}", mutates_args=mutates)
    return torch.library.triton_op(f"fastres_kernels::{name}", mutates_args=mutates)


def launchable(kernel: Any, *, opaque: bool = False) -> Any:
    """Return the kernel as the body of an op has to launch it: `launchable(kernel)[grid](...)`.

    `opaque`: the op is one that torch.compile does not look into.
    """
    launches = _launches.get()
    if launches is not None:
        return _Recorder(kernel, opaque, launches)
    return kernel if INTERPRETED or opaque else torch.library.wrap_triton(kernel)


def pointers(*tensors: Tensor | None, unused: Tensor) -> list[Tensor]:
    """The tensors as a kernel's arguments; `unused` in place of None, for its flags switch that argument off."""
    return [unused if tensor is None else tensor for tensor in tensors]


class Launch(NamedTuple):
    kernel: Any  # the triton.jit function
    opaque: bool  # as in `launchable`
    arguments: tuple[Any, ...]
    options: dict[str, Any]


# The list that `recording` fills, in the context that entered it.
_launches: ContextVar[list[Launch] | None] = ContextVar("fastres_kernels launches", default=None)


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Record launches in the list that is yielded, and run none of them. Other threads launch as usual."""
    launches: list[Launch] = []
    token = _launches.set(launches)
    try:
        yield launches
    finally:
        _launches.reset(token)


class _Recorder:
    """Stands for a kernel inside `recording`."""

    def __init__(self, kernel: Any, opaque: bool, launches: list[Launch]) -> None:
        self.kernel, self.opaque, self.launches = kernel, opaque, launches

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: self.launches.append(Launch(self.kernel, self.opaque, args, kwargs))


def channels_last(x: Tensor, *, warn: str = "") -> Tensor:
    """Return x, (N, C, H, W), with channels-last strides; x itself if it has them.

    `warn` names the tensor in a warning about the copy, which is issued once per name.
    """
    if x.is_contiguous(memory_format=torch.channels_last):
        return x
    if warn:
        warn_of_copy(warn)
    return x.contiguous(memory_format=torch.channels_last)


@cache  # one warning per name
def warn_of_copy(what: str) -> None:
    warnings.warn(
        f"fastres_kernels: {what} is not channels-last and is copied at every step; "
        "call .to(memory_format=torch.channels_last) on the model and its input",
        stacklevel=3,
    )
