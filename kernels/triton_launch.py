"""Register and launch the Triton kernels, on a GPU or in Triton's interpreter.

Only this module decides whether Triton is installed and can run a tensor. Without Triton, the package still imports and
its modules train through the reference.
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
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

if TYPE_CHECKING:
    from torch._library.custom_ops import CustomOpDef

HAS_TRITON = importlib.util.find_spec("triton") is not None
# Triton reads this variable when a kernel is defined, so it has to be set before the first import of this package.
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")
# dtypes of activations; parameters and statistics are float32.
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# torch.compile's caches identify a triton_op by its kernels, but not by the Python code around them nor by whether
# Triton interprets. Without this tag, a graph compiled by another version of this package could be reused. This has
# happened: a run under the interpreter reused a cached graph of the reference implementation.
_sources = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.rglob("*.py")))
_digest = hashlib.sha256(_sources).hexdigest()[:16]
torch.compiler.config.cache_key_tag += f"fastres_kernels {_digest}{' interpreted' if INTERPRETED else ''};"


def runs_kernels(x: Tensor) -> bool:
    """Return True if the Triton kernels can run x, (N, C, H, W); otherwise the ops call the reference.

    The kernels run on GPUs, and on every device under the interpreter.

    Raises:
        RuntimeError: if x is on another GPU than the current one, because Triton would launch on the current one.
    """
    if x.is_cuda and not is_fake(x) and x.device.index != torch.cuda.current_device():
        raise RuntimeError(
            f"fastres_kernels: a tensor is on {x.device}, but the current device is "
            f"cuda:{torch.cuda.current_device()}; call torch.cuda.set_device({x.device.index}) first"
        )
    return HAS_TRITON and x.dtype in DTYPES and (x.is_cuda or INTERPRETED) and x.numel() > 0


def register(name: str, mutates: Iterable[str] = ()) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Return a decorator that registers a function as torch.ops.fastres_kernels.NAME; it mutates only `mutates`.

    torch.compile traces the kernels inside a `triton_op`. Under the interpreter a triton_op runs but does not compile,
    so there, and without Triton, the op is a custom_op, which torch.compile does not look into.
    """
    if INTERPRETED or not HAS_TRITON:
        return torch.library.custom_op(f"fastres_kernels::{name}", mutates_args=mutates)
    return torch.library.triton_op(f"fastres_kernels::{name}", mutates_args=mutates)


def launchable(kernel: Any, *, opaque: bool = False) -> Any:
    """Return the kernel wrapped for a launch in the body of an op: `launchable(kernel)[grid](...)`.

    Pass `opaque` in an op that torch.compile does not look into.
    """
    launches = _launches.get()
    if launches is not None:
        return _Recorder(kernel, opaque, launches)
    return kernel if INTERPRETED or opaque else torch.library.wrap_triton(kernel)


def pointers(*tensors: Tensor | None, unused: Tensor) -> list[Tensor]:
    """Return the tensors as kernel arguments, with `unused` instead of None; the kernel's flags disable those."""
    return [unused if tensor is None else tensor for tensor in tensors]


class Launch(NamedTuple):
    """A kernel launch that `recording` intercepted."""

    kernel: Any  # the triton.jit function
    opaque: bool  # as in `launchable`
    arguments: tuple[Any, ...]
    options: dict[str, Any]


# The list that `recording` fills; None outside of it. A context variable, so other threads are not affected.
_launches: ContextVar[list[Launch] | None] = ContextVar("fastres_kernels launches", default=None)


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Yield a list that receives every launch of this thread instead of running it; other threads launch as usual."""
    launches: list[Launch] = []
    token = _launches.set(launches)
    try:
        yield launches
    finally:
        _launches.reset(token)


class _Recorder:
    """Stand in for a kernel inside `recording`: append each launch to the list."""

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
    """Warn that the tensor called `what` is copied to channels-last at every step."""
    warnings.warn(
        f"fastres_kernels: {what} is not channels-last and is copied at every step; "
        "call .to(memory_format=torch.channels_last) on the model and its input",
        stacklevel=3,
    )
