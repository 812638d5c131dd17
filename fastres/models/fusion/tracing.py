"""Record a module's forward as torch.fx graphs, together with everything that the graphs took for granted.

torch.fx runs the forward with placeholders instead of tensors, so a graph has only the branches that were taken. It is
valid as long as they would be taken again. Therefore `trace` records every plain attribute that the forward reads, for
the generated code to compare. It rejects forwards that depend on anything else: random numbers, tensors that are not
computed from the input, the gradient mode, a context manager, attributes that the forward writes.
"""

from __future__ import annotations

import enum
import inspect
import operator
import pickle
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Guard = tuple[str, str, Any]  # path of the module below the traced one, attribute, value

BASE_ATTRIBUTES = frozenset(nn.Module().__dict__) - {"training"}


@dataclass(frozen=True)
class Listed:
    """The value of an attribute that is a list or, as its items, a dictionary."""

    kind: str  # "list" or "dict"
    values: tuple[Any, ...]


class Untraceable(Exception):
    """A forward that no graph can stand for; the message is the reason, as the end of a sentence."""


class Given:
    """The value, in a Call, of a parameter that gets a tensor or another result."""


GIVEN = Given()
Call = tuple[tuple[str, Any], ...]  # the parameters with a default that a call gives: name, and GIVEN or a constant


@dataclass(frozen=True)
class Variant:
    """One graph of a forward, and the conditions under which it is the forward."""

    graph: fx.Graph  # all submodules are leaves
    guards: tuple[Guard, ...]
    inputs: dict[str, str]  # the graph's parameters -> "tensor", "list" or "any": what they were taken for
    constants: tuple[tuple[str, Any], ...] = ()  # parameters that have to be given with this value
    defaults: tuple[str, ...] = ()  # parameters that have to have their default


def forward_of(module: nn.Module) -> Callable[..., Any]:
    """Return the function forward(self, …) that the module had before fastres.fuse."""
    original: type[nn.Module] = getattr(type(module), "original", type(module))
    return original.forward


def call_of(module: nn.Module, node: fx.Node) -> Call:
    """Return how the node calls the module: which of its parameters with a default are given."""
    try:
        bound = inspect.signature(forward_of(module)).bind(module, *node.args, **node.kwargs)
    except TypeError:
        return ()
    given: list[tuple[str, Any]] = []
    for name, parameter in bound.signature.parameters.items():
        if name in bound.arguments and parameter.default is not parameter.empty:
            value = bound.arguments[name]
            computed = any(isinstance(leaf, fx.Node) for leaf in tree_leaves(value))
            given.append((name, GIVEN if computed else value))
    return tuple(given)


def trace(module: nn.Module, calls: Iterable[Call] = ((),)) -> list[Variant]:
    """Return the variants of the module's forward.

    There is one for each kind of call, and more if the forward differs by mode or by the kind of its input.

    Args:
        module: unchanged; all modules in it are leaves of the graphs.
        calls: the ways in which the module is called.

    Raises:
        Untraceable: if no graph can stand for the forward in any of the calls.
    """
    variants: list[Variant] = []
    error = None
    for call in calls:
        for kind in ("tensor", "list"):
            seen: list[bool] = []
            try:
                variants += _both_modes(module, call, kind, seen)
            except Untraceable as caught:
                error = error or caught
            if not seen:  # the forward does not ask whether its input is a tensor
                break
    if not variants:
        raise error or Untraceable("nothing calls it")
    return variants


def _both_modes(module: nn.Module, call: Call, inputs: str, seen: list[bool]) -> list[Variant]:
    """Return the variants for inputs of this kind; `seen` is appended to if the forward asks for their type."""
    train, evaluate, no_grad = (
        _trace_once(module, call, training, grad, inputs, seen)
        for training, grad in ((True, True), (False, True), (False, False))
    )
    if _text(no_grad) != _text(evaluate):
        raise Untraceable("its forward depends on the gradient mode")
    if _text(train) == _text(evaluate):
        unmoded = tuple(guard for guard in train.guards if guard[1] != "training")
        return [replace(train, guards=unmoded)]
    return [train, evaluate]


def _text(variant: Variant) -> str:
    """Return the variant's code, to compare it with another one's."""
    guards = sorted(f"{path}.{name}={value!r}" for path, name, value in variant.guards if name != "training")
    return "\n".join([variant.graph.python_code("self").src, *guards])


def _trace_once(module: nn.Module, call: Call, training: bool, grad: bool, inputs: str, seen: list[bool]) -> Variant:
    """Trace the forward in one mode. Raise Untraceable with the reason if that fails."""
    tracer = Tracer(forward_of(module), call, inputs, seen)
    read: dict[tuple[int, str], Any] = {}
    with ExitStack() as stack:
        stack.enter_context(in_mode(module, training))
        stack.enter_context(torch.set_grad_enabled(grad))
        stack.enter_context(recorded_reads(read))
        stack.enter_context(ForbidTensors())  # type: ignore[no-untyped-call]
        before = random_state()
        try:
            graph = tracer.trace(module)
        except Untraceable:
            raise
        except Exception as error:
            said = str(error).strip().splitlines()
            raise Untraceable(f"its forward cannot be traced: {said[0] if said else type(error).__name__}") from None
        if random_state() != before:
            raise Untraceable("its forward draws random numbers outside of torch's operations")
    paths = {id(child): path for path, child in module.named_modules()}
    guards = tuple((paths[owner], name, frozen(name, value)) for (owner, name), value in read.items() if owner in paths)
    kinds = dict.fromkeys(tracer.required, inputs if seen else "any")
    constants = tuple((name, frozen(name, value)) for name, value in call if value is not GIVEN)
    return Variant(graph, guards, kinds, constants, tuple(tracer.defaults))


def frozen(name: str, value: Any) -> Any:
    """Return a value that generated code can compare with the attribute. Raise Untraceable for a mutable object."""
    if type(value) in (list, dict):
        listed = isinstance(value, list)
        return Listed(type(value).__name__, frozen(name, tuple(value if listed else value.items())))
    if isinstance(value, tuple):
        return tuple(frozen(name, one) for one in value)
    plain = (bool, int, float, str, bytes, enum.Enum, torch.dtype, torch.device, torch.memory_format)
    if value is None or isinstance(value, plain) or callable(value):
        return value
    raise Untraceable(f"its forward reads the attribute {name}, a {type(value).__name__}, which may change")


# ---- the recorder ------------------------------------------------------------------------------------------


class _Value(fx.Proxy):
    """A placeholder that records in-place operators too, and that is a tensor if the forward asks for its type."""

    tracer: Tracer

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.split(".")[0] == "torch" or caller == __name__:
            return _Value
        if self.node.op != "placeholder":
            raise Untraceable("its forward asks for the type of a result")
        self.tracer.seen.append(True)
        return Tensor if self.tracer.inputs == "tensor" else list

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})


def _in_place(name: str) -> Callable[..., Any]:
    def method(self: _Value, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", getattr(operator, name), (self, other), {})

    return method


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor"):
    setattr(_Value, f"__{_name}__", _in_place(_name))


class Tracer(fx.Tracer):
    """A tracer for which every submodule is a leaf, and every parameter with a default has that default."""

    proxy_buffer_attributes = True

    def __init__(self, forward: Callable[..., Any], call: Call, inputs: str, seen: list[bool]) -> None:
        super().__init__()
        self.forward, self.call, self.inputs, self.seen = forward, dict(call), inputs, seen
        self.required: list[str] = []
        self.defaults: list[str] = []
        self.state: Any = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return True, so that every submodule is one node."""
        return True

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Return the forward with its constant arguments, and the module. Raise Untraceable for *args and **kwargs."""
        args: dict[str, Any] = {}
        for name, parameter in list(inspect.signature(self.forward).parameters.items())[1:]:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                raise Untraceable("its forward takes *args or **kwargs")
            if name in self.call and self.call[name] is not GIVEN:
                args[name] = self.call[name]
            elif parameter.default is parameter.empty or name in self.call:
                self.required.append(name)
                args[name] = self.create_proxy("placeholder", name, (), {})
            else:
                self.defaults.append(name)
        if not self.required:
            raise Untraceable("its forward has no input without a default")
        return partial(self.forward, **args), [self.root]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Return a placeholder that records in-place operators too."""
        return _Value(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Return a new node. Raise Untraceable if the gradient mode or autocast has changed since the first one."""
        cpu, cuda = (torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))
        state = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), cpu, cuda)
        self.state = self.state or state
        if state != self.state:
            raise Untraceable("its forward changes the gradient mode or autocast")
        return super().create_node(*args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        """Return a node's argument. Raise Untraceable for a tensor that would become a constant."""
        if type(a) is _Value:
            return a.node
        if isinstance(a, Tensor) and not any(a is own for own in (*self.root.parameters(), *self.root.buffers())):
            raise Untraceable("its forward uses a tensor that is neither a parameter nor a buffer")
        return super().create_arg(a)


class ForbidTensors(TorchDispatchMode):
    """A mode in which operations on real tensors raise Untraceable, because their results would become constants."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise Untraceable("its forward computes tensors that do not depend on its input")


@contextmanager
def in_mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Set `training` of the module and of all in it, without calling train(), and restore it."""
    modes = [(child, child.training) for child in module.modules()]
    for child, _ in modes:
        child.__dict__["training"] = training
    try:
        yield
    finally:
        for child, mode in modes:
            child.__dict__["training"] = mode


@contextmanager
def recorded_reads(read: dict[tuple[int, str], Any]) -> Iterator[None]:
    """Record the plain attributes that are read from any module, by (id of the module, name), and forbid writes."""
    containers: dict[int, tuple[Any, Any]] = {}  # by id: a list, dictionary or set that was read, and its copy

    def reading(module: nn.Module, name: str) -> Any:
        value = object.__getattribute__(module, name)
        if name not in BASE_ATTRIBUTES and name != "forward" and not name.startswith("__"):
            own = object.__getattribute__(module, "__dict__")
            if name in own and not isinstance(value, nn.Module | Tensor):
                read[id(module), name] = value
                if isinstance(value, list | dict | set):
                    containers.setdefault(id(value), (value, value.copy()))
        return value

    def writing(module: nn.Module, name: str, value: Any) -> None:
        raise Untraceable(f"its forward writes the attribute {name}")

    write = nn.Module.__setattr__
    nn.Module.__getattribute__ = reading  # type: ignore[method-assign, assignment]
    nn.Module.__setattr__ = writing  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del nn.Module.__getattribute__
        nn.Module.__setattr__ = write  # type: ignore[method-assign]
        changed = [_restored(*pair) for pair in containers.values()]
    if any(changed):
        raise Untraceable("its forward changes an attribute that is a list, dictionary or set")


def _restored(container: Any, before: Any) -> bool:
    """Give the container its former content; return True if it was changed."""
    identities = [
        [id(one) for pair in (values.items() if isinstance(values, dict) else enumerate(values)) for one in pair[-1:]]
        for values in (container, before)
    ]
    if len(container) == len(before) and identities[0] == identities[1]:
        return False
    container.clear()
    (container.extend if isinstance(container, list) else container.update)(before)
    return True


def random_state() -> tuple[Any, ...]:
    """Return the state of the generators of Python and numpy."""
    numpy = sys.modules.get("numpy")
    return random.getstate(), b"" if numpy is None else pickle.dumps(numpy.random.get_state(legacy=False))
