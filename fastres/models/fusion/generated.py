"""Classes with a generated forward, which modules get by `module.__class__ = …`, so that the module stays the object.

A generated class is a subclass of the module's own one and has its name. Its instances can be copied and pickled: the
original class and a `Spec` are stored, from which `generated_class` makes the class again.
"""

from __future__ import annotations

import copyreg
import importlib
import inspect
import linecache
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor, nn

from fastres.models.fusion.modules import (
    FusedConv2d,
    FusedNormAct,
    FusedReLU,
    FusedSequential,
    hooked,
    rectified_sum,
    same,
)

BASES: dict[str, tuple[type, ...]] = {"norm": (FusedNormAct,), "conv": (FusedConv2d,), "sequential": (FusedSequential,)}


@dataclass(frozen=True)
class Code:
    """Source of one function and the global names that it uses; a module is stored as its name with a dot before it."""

    source: str
    names: tuple[tuple[str, Any], ...] = ()

    def compiled(self, function: str, more: dict[str, Any]) -> Any:
        """Return the function of this name."""
        namespace = dict(more)
        for name, value in self.names:
            is_module = isinstance(value, ModuleName)
            namespace[name] = importlib.import_module(value.name) if is_module else value
        file = f"<fastres.fuse {hash(self) & 0xFFFFFFFF:08x}>"
        linecache.cache[file] = (len(self.source), None, self.source.splitlines(keepends=True), file)
        exec(compile(self.source, file, "exec"), namespace)
        return namespace[function]


@dataclass(frozen=True)
class ModuleName:
    """A module of Python, which cannot be pickled itself."""

    name: str


@dataclass(frozen=True)
class Spec:
    """The recipe of a generated class: code for a forward, or one of the classes of fusion/modules.py."""

    kind: str  # "forward", "sequential", "norm" or "conv"
    forward: Code = Code("")  # of the kind "forward"
    variants: tuple[Code, ...] = ()  # the functions _variant_0, … that `forward` calls
    takes_sum: bool = False
    takes_skip: bool = False
    takes_fork: bool = False

    def function(self, original: type[nn.Module]) -> Callable[..., Any]:
        """Return the generated forward(self, …) for modules of this class."""
        parameters = inspect.signature(original.forward).parameters.values()
        names: dict[str, Any] = {f"_default_{p.name}": p.default for p in parameters}
        names |= {"_original": original.forward, "rectified_sum": rectified_sum, "FusedReLU": FusedReLU}
        names |= {"Tensor": Tensor, "Identity": nn.Identity, "same": same, "hooked": hooked}
        for i, code in enumerate(self.variants):
            names[f"_variant_{i}"] = code.compiled(f"_variant_{i}", {})
        function: Callable[..., Any] = self.forward.compiled("forward", names)
        function.__doc__ = original.forward.__doc__
        return function


class Generated(nn.Module):
    """The first base of every generated class: copies and pickles an instance as (original class, spec, state)."""

    original: type[nn.Module]
    spec: Spec

    def __reduce_ex__(self, protocol: Any) -> Any:
        made = super().__reduce_ex__(max(2, protocol))
        if isinstance(made, tuple) and made[0] is copyreg.__newobj__:  # type: ignore[attr-defined]
            return _new, (self.original, self.spec), *made[2:]
        return made


def _new(original: type[nn.Module], spec: Spec) -> nn.Module:
    """Return an instance of the generated class without state, for pickle and copy.deepcopy."""
    kind = generated_class(original, spec)
    module: nn.Module = kind.__new__(kind)
    return module


def generated_class(original: Any, spec: Spec) -> Any:
    """Return the subclass of `original` that `spec` describes. Equal arguments give the same class."""
    return _made(original, spec)


@cache
def _made(original: Any, spec: Spec) -> Any:
    bases = (Generated, *BASES.get(spec.kind, ()), original)
    contents: dict[str, Any] = {"original": original, "spec": spec, "__doc__": original.__doc__}
    if spec.kind == "forward":
        contents |= {name: getattr(spec, name) for name in ("takes_sum", "takes_skip", "takes_fork")}
        contents["forward"] = spec.function(original)
    contents |= {"__module__": original.__module__, "__qualname__": original.__qualname__}
    return type(original.__name__, bases, contents)


class RootForward:
    """A forward for one module alone, stored in the module as the attribute `forward`, so that its class stays.

    The whole network gets it, because its class is what programs look at.
    """

    def __init__(self, module: nn.Module, spec: Spec) -> None:
        self.module, self.spec = module, spec
        original = type(module)
        sequential = spec.kind == "sequential"
        self.function: Any = FusedSequential.forward if sequential else spec.function(original)
        own = list(inspect.signature(original.forward).parameters.values())[1:]
        self.__signature__ = inspect.Signature(own)

    @property
    def __code__(self) -> Any:
        """The code of the function, which torch.export asks for."""
        return self.function.__code__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the module's output."""
        return self.function(self.module, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return RootForward, (self.module, self.spec)
