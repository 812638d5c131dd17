"""Build and load the C++ kernels for this machine's instruction set, and register them as operators of torch.

A kernel's source does not depend on torch. The machine's own compiler ($CXX, or g++) builds it once, in a few seconds,
into the user's cache; ctypes calls it, and it runs in torch's OpenMP threads.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastres_kernels.user_cache import user_cache

POINTER, INTEGER, REAL, BOOL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_bool

# The compiler's flags by instruction set. -ffp-contract=fast is g++'s default, and makes clang use FMA too.
INSTRUCTION_SETS: dict[str, tuple[str, ...]] = {
    "avx512_bf16": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512bf16"),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl"),
    "avx2": ("-mavx2", "-mfma"),
    "neon": (),
}
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=fast")


class Source(NamedTuple):
    """A source file beside this module."""

    name: str  # of the file
    functions: Mapping[str, tuple[Any, list[Any]]]  # by name: result type, argument types
    flags: tuple[str, ...] = ()  # after FLAGS and those of the instruction set
    libraries: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """The file."""
        return Path(__file__).with_name(self.name)


def instruction_set() -> tuple[str, str]:
    """Return the widest name in INSTRUCTION_SETS that torch uses and this CPU has, or "", and the reason if it is "".

    The environment variable ATEN_CPU_CAPABILITY therefore limits torch's kernels and these ones alike.
    """
    machine = platform.machine()
    if sys.platform != "linux" or machine not in ("x86_64", "aarch64"):
        return "", "the C++ kernels are for Linux on x86-64 and aarch64"
    if machine == "aarch64":
        return "neon", ""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability == "AVX512":
        return ("avx512_bf16" if "avx512_bf16" in cpu_flags() else "avx512"), ""
    if capability == "AVX2":
        return "avx2", ""
    return "", f"the C++ kernels need AVX2, and torch's CPU capability is {capability}"


@cache
def cpu_flags() -> frozenset[str]:
    """Return the words of /proc/cpuinfo, which has the names of the instructions that an x86-64 CPU has."""
    return frozenset(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())


def find(source: Source) -> tuple[ctypes.CDLL | None, str]:
    """Return the library for this machine, or None, and why. The first call builds it."""
    if source.name not in _found:
        _found[source.name] = _find(source)
    return _found[source.name]


_found: dict[str, tuple[ctypes.CDLL | None, str]] = {}  # by the source's name, because building takes seconds


def _find(source: Source) -> tuple[ctypes.CDLL | None, str]:
    """Return find's result for a source that has not been looked for."""
    isa, missing = instruction_set()
    if missing:
        return None, missing
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        return None, f"no C++ compiler {compiler} on the PATH: apt-get install g++"
    try:
        library = build(source, compiler, isa)
    except (OSError, subprocess.CalledProcessError) as error:
        said = str(getattr(error, "stderr", "") or error).strip().splitlines()
        return None, f"{compiler} did not build kernels/cpu/{source.name}: {said[0] if said else error}"
    return library, f"the CPU has {isa}, and {compiler} built the kernels for it"


def load(source: Source) -> ctypes.CDLL:
    """Return the library. Raise RuntimeError with the reason if this machine cannot run it."""
    library, why = find(source)
    if library is None:
        raise RuntimeError(f"fastres_kernels: {why}")
    return library


def command(source: Source, compiler: str, isa: str, output: str) -> list[str]:
    """Return the command that builds the source for an instruction set."""
    flags = (*FLAGS, *INSTRUCTION_SETS[isa], *source.flags)
    return [compiler, *flags, str(source.path), "-o", output, *source.libraries]


def build(source: Source, compiler: str, isa: str) -> ctypes.CDLL:
    """Return the library from the user's cache, or build it and cache it.

    The name of the file in the cache has a hash of source, headers, compiler and flags.

    Raises:
        CalledProcessError: if the source does not compile.
        OSError: if the compiler cannot be run or the library cannot be loaded.
    """
    described = " ".join(command(source, compiler, isa, "")[:-1]).replace(str(source.path), source.name)
    files = (source.path, *sorted(source.path.parent.glob("*.h")))
    key = hashlib.sha256(b"".join(file.read_bytes() for file in files) + described.encode()).hexdigest()[:16]
    file = f"kernels-{source.path.stem}-{key}.so"
    store: Path | None = None
    try:
        store = user_cache()
        with suppress(OSError):  # a missing or damaged file is built below
            return _open(source, store / file)
        store.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=store)
    except (OSError, RuntimeError):  # without a writable home every process builds its own library
        store, folder = None, tempfile.TemporaryDirectory()
    with folder as name:
        fresh = Path(name) / file
        subprocess.run(command(source, compiler, isa, str(fresh)), check=True, capture_output=True, text=True)
        library = _open(source, fresh)  # load first, so that a library that does not load is never cached
        if store:
            fresh.replace(store / file)  # atomic, so several processes may build at the same time
    return library


def _open(source: Source, path: Path) -> ctypes.CDLL:
    """Load the library and declare its functions. Raise OSError if it cannot be loaded."""
    library = ctypes.CDLL(str(path))
    for name, (result, arguments) in source.functions.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


# ---- what the kernels have in common -----------------------------------------------------------------------


@cache
def _operators() -> Any:
    """Return torch's library of this package's operators, to which operators are added."""
    return torch.library.Library("fastres_kernels", "FRAGMENT")


def register(schemas: Mapping[str, Callable[..., Any]]) -> Any:
    """Register functions as operators of torch, by schema, so that profilers and FLOP counters see them.

    Returns:
        torch.ops.fastres_kernels, which has the operators as attributes.
    """
    for schema, function in schemas.items():
        _operators().define(schema)
        _operators().impl(schema.partition("(")[0], function, "CPU")
    return torch.ops.fastres_kernels


def accepts(x: Tensor) -> bool:
    """Return True if x is a plain 4-D tensor on a CPU, is not empty, and is not being traced.

    torch.compile does not support the kernels' autograd functions. A tensor of a subclass, such as a fake tensor, and
    one under torch.func or forward-mode differentiation may have no memory or need other rules.
    """
    return (
        type(x) is Tensor
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None  # torch.jit.trace
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)  # for which is_contiguous may raise
        and torch.autograd.forward_ad._current_level < 0
        and x.is_cpu
        and x.layout == torch.strided  # an mkldnn tensor says that it is contiguous
        and x.ndim == 4
        and x.numel() > 0
    )


def is_channels_last(x: Tensor) -> bool:
    """Return True if x, (N, C, H, W), is dense and channels-last. Ask `accepts` first."""
    return x.is_contiguous(memory_format=torch.channels_last)


def dense(t: Tensor, dtype: torch.dtype, memory_format: torch.memory_format = torch.channels_last) -> Tensor:
    """Return t in the dtype and memory format; t itself if it already is."""
    return t.to(dtype).contiguous(memory_format=memory_format)


def pointers(*tensors: Tensor | None) -> list[int | None]:
    """Return the addresses of the tensors' data; None, which ctypes passes as a null pointer, for None."""
    return [None if t is None else t.data_ptr() for t in tensors]


def refuse_double_backward(what: str) -> None:
    """Raise NotImplementedError if the calling backward is itself to be differentiated."""
    if torch.is_grad_enabled():  # a backward runs with gradients enabled only under create_graph=True
        raise NotImplementedError(
            f"fastres_kernels: the C++ {what} has no double backward; use model.norm torch and engine.conv torch if "
            "you need gradients of gradients"
        )
