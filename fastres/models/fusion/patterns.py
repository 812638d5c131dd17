"""Find every BatchNorm2d (-> add) -> ReLU in a network's forwards, and say what is in the way of the others."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fastres.models.fusion.modules import HOOKS, has_hooks
from fastres.models.fusion.tracing import Call, Untraceable, Variant, call_of, forward_of, trace

TIMM_NORM = ("timm.layers.norm_act", "BatchNormAct2d")
RELUS = (F.relu, F.relu_, torch.relu, torch.relu_)
ADDS = (operator.add, operator.iadd, torch.add)
NEW_TENSORS = (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.SyncBatchNorm, nn.ConvTranspose2d, nn.AvgPool2d, nn.MaxPool2d)


@dataclass
class Site:
    """One pattern in one graph: norm -> identities (-> add) -> identities -> relu."""

    norm: str  # the norm's full name
    node: fx.Node  # calls the norm, or a module whose last operation is the norm
    chain: list[fx.Node]  # the nodes after it, in order; the last one is the ReLU
    add: fx.Node | None = None

    @property
    def residual(self) -> fx.Node | None:
        """The other operand of the addition, which changes if a site that computes it is rewritten."""
        if self.add is None:
            return None
        path = [self.node, *self.chain]
        first, second = self.add.args
        other: Any = second if first is path[path.index(self.add) - 1] else first
        return other  # type: ignore[no-any-return]

    @property
    def relu_module(self) -> str:
        """The name of the ReLU in the owner, or empty if it is a function."""
        return str(self.chain[-1].target) if self.chain[-1].op == "call_module" else ""


@dataclass
class Owner:
    """A module whose forward calls norms, or modules that end in one."""

    module: nn.Module
    name: str
    variants: list[Variant] = field(default_factory=list)
    sites: list[list[Site]] = field(default_factory=list)  # by variant
    error: str = ""  # the reason why the forward could not be traced
    tail: str = ""  # the full name of the norm that is the last operation of every variant
    tail_nodes: list[fx.Node] = field(default_factory=list)  # by variant: the node that calls it
    takes_sum: bool = False  # another module's site passes a sum to this module's tail

    @property
    def is_sequential(self) -> bool:
        """True if the module calls its children in a row, as torch.nn.Sequential."""
        return forward_of(self.module) is nn.Sequential.forward


@dataclass
class Analysis:
    """The patterns of a network, and the reason for every norm that is in none."""

    model: nn.Module
    owners: dict[str, Owner]  # by full name
    reasons: dict[str, str]  # norm's full name -> why it is left alone
    norm_acts: list[str]  # names of timm's BatchNormAct2d that apply ReLU themselves

    def fusible(self) -> list[str]:
        """Return the full names of the norms in a pattern, in the network's order."""
        found = {site.norm for owner in self.owners.values() for sites in owner.sites for site in sites}
        found.update(self.norm_acts)
        return [name for name, _ in self.model.named_modules() if name in found]


def kind_of(module: nn.Module) -> type[nn.Module]:
    """Return the module's class before fastres.fuse."""
    original: type[nn.Module] = getattr(type(module), "original", type(module))
    return original


def is_timm_norm(kind: type[nn.Module]) -> bool:
    """Return True for timm's BatchNorm2d with an activation. timm need not be installed."""
    return (kind.__module__, kind.__name__) == TIMM_NORM


def is_norm(module: nn.Module) -> bool:
    """Return True for BatchNorm2d, its subclasses, and SyncBatchNorm."""
    return isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm)


def analyse(model: nn.Module) -> Analysis:
    """Return the patterns of the network, which is not changed. A network that is fused already gives the same."""
    names = {module: name for name, module in model.named_modules()}
    found = Analysis(model, {}, {}, [])
    norms = {name: module for module, name in names.items() if is_norm(module)}
    for name, norm in norms.items():
        found.reasons[name] = _ineligible(norm) or "no traced forward calls it"
    calls = _trace_all(found, names)
    repeated = _repeated(found, names, calls)
    for name in norms:
        if (why := repeated.get(name)) is not None and _ineligible(norms[name]) is None:
            found.reasons[name] = why
    for name, norm in norms.items():
        if name not in repeated and _applies_relu(norm) and _ineligible(norm) is None:
            found.norm_acts.append(name)
    for owner in found.owners.values():
        _Matcher(found, owner, norms, repeated).run()
    for name in found.fusible():
        found.reasons.pop(name, None)
    return found


# ---- norms -------------------------------------------------------------------------------------------------


def _ineligible(norm: nn.Module) -> str | None:
    """Return the reason why the norm cannot be fused wherever it is called, or None."""
    kind = kind_of(norm)
    if kind is not nn.BatchNorm2d and not is_timm_norm(kind):
        return f"it is a {kind.__name__}"
    if "forward" in norm.__dict__:
        return "its forward was replaced"
    if has_hooks(norm):
        return "it has hooks, which would see another value"
    if is_timm_norm(kind):
        act, drop = norm.act, norm.drop
        if type(drop) is not nn.Identity:
            return f"{type(drop).__name__} follows"
        if type(act) not in (nn.ReLU, nn.Identity):
            return f"{type(act).__name__} follows"
        if has_hooks(act) or has_hooks(drop):  # type: ignore[arg-type]
            return "its activation has hooks"
    return None


def _applies_relu(norm: nn.Module) -> bool:
    """Return True for timm's BatchNormAct2d with a ReLU of its own."""
    return is_timm_norm(kind_of(norm)) and type(norm.act) is nn.ReLU


# ---- graphs ------------------------------------------------------------------------------------------------


def _trace_all(found: Analysis, names: dict[nn.Module, str]) -> Counter[str]:
    """Add the owners to the analysis, inner ones first; return how often the network calls each module, at most."""
    count: Counter[str] = Counter({"": 1})
    calls: dict[str, set[Call]] = {"": {()}}
    owners: dict[str, Owner] = {}
    for module, name in names.items():  # a module's callers come before it
        has_norms = any(is_norm(child) for child in module.modules())
        if not count[name] or not has_norms or is_norm(module) or forward_of(module) is nn.Module.forward:
            continue
        owners[name] = owner = _graphs(module, name, calls.get(name, {()}))
        for target, times in _targets(owner).items():
            count[names[module.get_submodule(target)]] += count[name] * times
        for node in (node for variant in owner.variants for node in variant.graph.nodes):
            if node.op == "call_module":
                child = module.get_submodule(str(node.target))
                calls.setdefault(names[child], set()).add(call_of(child, node))
    found.owners = dict(reversed(owners.items()))
    return count


def _graphs(module: nn.Module, name: str, calls: set[Call]) -> Owner:
    """Return the module with the graphs of its forward, or with the reason why there are none."""
    owner = Owner(module, name)
    try:
        if "forward" in module.__dict__ and getattr(module.__dict__["forward"], "spec", None) is None:
            raise Untraceable("its forward was replaced")
        if isinstance(module, torch.jit.ScriptModule | fx.GraphModule):
            raise Untraceable(f"it is a {'GraphModule' if isinstance(module, fx.GraphModule) else 'ScriptModule'}")
        owner.variants = [_chain(module)] if owner.is_sequential else trace(module, sorted(calls, key=repr))
    except Untraceable as error:
        owner.error = str(error)
    owner.sites = [[] for _ in owner.variants]
    return owner


def _chain(module: nn.Module) -> Variant:
    """Return the graph of a Sequential."""
    graph = fx.Graph()
    node = graph.placeholder("input")
    for name in module._modules:
        node = graph.call_module(name, (node,))
    graph.output(node)
    return Variant(graph, (), {"input": "any"})


def _repeated(found: Analysis, names: dict[nn.Module, str], calls: Counter[str]) -> dict[str, str]:
    """Return the modules that a forward does not call exactly once, by full name, with the reason."""
    model = found.model
    places = Counter(names[module] for _, module in model.named_modules(remove_duplicate=False))
    repeated: dict[str, str] = {}
    for name in names.values():
        parent = name.rpartition(".")[0]
        if name and parent in repeated:
            repeated[name] = repeated[parent]
        if calls[name] > 1 or places[name] > 1:
            repeated[name] = "a forward calls it more than once"
        elif not calls[name] and is_norm(model.get_submodule(name)):
            repeated[name] = _uncalled(found, name)
    return repeated


def _uncalled(found: Analysis, name: str) -> str:
    """Return the reason why no graph calls the norm: the nearest forward around it that could not be traced."""
    while name:
        name = name.rpartition(".")[0]
        if (owner := found.owners.get(name)) is not None and owner.error:
            return f"{name or 'the network'} is not understood: {owner.error}"
    return "no forward calls it"


def _targets(owner: Owner) -> Counter[str]:
    """Return how often the owner's forward calls each module in it, at most; once each if it could not be traced."""
    if owner.error:
        return Counter(_called_by_name(owner.module, ""))
    most: Counter[str] = Counter()
    for variant in owner.variants:
        most |= Counter(str(node.target) for node in variant.graph.nodes if node.op == "call_module")
    return most


def _called_by_name(module: nn.Module, prefix: str) -> Iterator[str]:
    """Yield the module's children, and instead of a ModuleList or ModuleDict the modules in it. No norms."""
    for name, child in module.named_children():
        if forward_of(child) is nn.Module.forward or isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _called_by_name(child, f"{prefix}{name}.")
        elif not is_norm(child) or _applies_relu(child):
            yield f"{prefix}{name}"


# ---- matching ----------------------------------------------------------------------------------------------


class _Rejected(Exception):
    """A norm in no pattern; the message is the reason."""


class _Leaves(Exception):
    """A norm whose result the forward returns unchanged."""


class _Matcher:
    """Finds the patterns in one owner's graphs. The modules in it have been searched before."""

    def __init__(self, found: Analysis, owner: Owner, norms: dict[str, nn.Module], repeated: dict[str, str]) -> None:
        self.found, self.owner, self.norms, self.repeated = found, owner, norms, repeated

    def run(self) -> None:
        """Add the owner's sites and its tail to the analysis, or reasons."""
        tails = []
        for variant, sites in zip(self.owner.variants, self.owner.sites, strict=True):
            tails.append(self._search(variant.graph, sites))
        if tails and all(tail is not None and tail[0] == tails[0][0] for tail in tails):  # type: ignore[index]
            if has_hooks(self.owner.module) or self.owner.name in self.repeated or not self.owner.name:
                return
            self.owner.tail = tails[0][0]  # type: ignore[index]
            self.owner.tail_nodes = [tail[1] for tail in tails]  # type: ignore[index]

    def _search(self, graph: fx.Graph, sites: list[Site]) -> tuple[str, fx.Node] | None:
        """Add the graph's sites; return the norm that is its last operation, and the node that calls it."""
        leaving = None
        added: set[fx.Node] = set()
        called = [(node, norm) for node in graph.nodes if (norm := self._norm_of(node)) is not None]
        direct = [pair for pair in called if self._child(pair[0]) is self.norms.get(pair[1])]
        for node, norm in [*direct, *(pair for pair in reversed(called) if pair not in direct)]:
            try:
                sites.append(self._site(node, norm, added))
            except _Rejected as why:
                self.found.reasons[norm] = str(why)
            except _Leaves:
                self.found.reasons[norm] = "no ReLU follows"
                leaving = (norm, node)
        return leaving

    def _child(self, node: fx.Node) -> nn.Module:
        return self.owner.module.get_submodule(str(node.target))

    def _norm_of(self, node: fx.Node) -> str | None:
        """Return the full name of the norm that the node calls, or whose result it returns, or None."""
        if node.op != "call_module":
            return None
        child = self._child(node)
        name = ".".join(filter(None, (self.owner.name, str(node.target))))
        if not is_norm(child):
            tail = self.found.owners.get(name)
            return (tail.tail or None) if tail is not None else None
        fits = name in self.norms and name not in self.repeated and _ineligible(child) is None
        return name if fits and not _applies_relu(child) else None

    def _site(self, node: fx.Node, norm: str, added: set[fx.Node]) -> Site:
        """Return the pattern that begins at the node. Raise _Rejected or _Leaves if there is none.

        `added` has the additions that are in a site, and gets this site's.
        """
        if len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
            raise _Rejected("it is called with more than one argument")
        site, at = Site(norm, node, []), node
        while not (site.chain and _is_relu(at, self)):
            user = self._only_user(at, site)
            if site.add is None and _is_add(user):
                self._check_addition(user, at)
                site.add = user
            elif not (_is_relu(user, self) or self._is_identity(user)):
                raise _Rejected(f"{self._described(user)} follows{' the addition' if site.add else ''}")
            site.chain.append(user)
            at = user
        if site.add is not None:
            self._check_move(site, added)
            added.add(site.add)
        return site

    def _only_user(self, node: fx.Node, site: Site) -> fx.Node:
        """Return the only node that uses the node's value. Raise _Rejected or _Leaves if there is none."""
        if len(node.users) != 1:
            raise _Rejected(f"its result has {len(node.users)} uses")
        user = next(iter(node.users))
        if user.op == "output":
            if user.args == (node,) and site.add is None:
                raise _Leaves
            raise _Rejected("no ReLU follows")
        return user

    def _is_identity(self, node: fx.Node) -> bool:
        return node.op == "call_module" and type(self._child(node)) is nn.Identity

    def _described(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return type(self._child(node)).__name__
        return str(getattr(node.target, "__name__", node.target))

    def _check_addition(self, add: fx.Node, norm: fx.Node) -> None:
        """Raise _Rejected if the fused operation would differ from the addition to the norm's result."""
        operands = list(add.args)
        residual = operands[0] if operands[1] is norm else operands[1]
        if not isinstance(residual, fx.Node) or residual is norm:
            raise _Rejected("the addition's other operand is a number")
        in_place = add.target in (operator.iadd, "add_")
        if in_place and operands[0] is residual and not self._is_new(residual):
            raise _Rejected("the addition changes its other operand in place, which may be used elsewhere")

    def _is_new(self, node: fx.Node) -> bool:
        """Return True if nobody else can see the node's tensor being changed in place."""
        if len(node.users) != 1 or node.op not in ("call_module", "call_function"):
            return False
        if node.op == "call_module" and (self._norm_of(node) or isinstance(self._child(node), NEW_TENSORS)):
            return True
        if node.target in (operator.add, operator.mul, torch.add, torch.mul, torch.cat):
            return True
        return node.op == "call_module" and all(map(self._is_new, node.all_input_nodes))

    def _check_move(self, site: Site, added: set[fx.Node]) -> None:
        """Raise _Rejected if the norm cannot be computed where the addition is."""
        if site.add in added:
            raise _Rejected("the addition after it is fused with another norm")
        is_norm_itself = self._child(site.node) is self.norms[site.norm]
        x: Any = site.node.args[0]
        node = site.node.next
        while node is not site.add:
            if node not in site.chain and node.op in ("call_module", "call_function", "call_method"):
                if not is_norm_itself and self._draws(node) and self._draws(site.node):
                    raise _Rejected("another order of the modules would draw other random numbers")
                writes = self._may_write(node) or (not is_norm_itself and self._may_write(site.node))
                if writes and len(x.users) > 1:
                    raise _Rejected("its input may be changed in place before the addition")
            node = node.next

    def _draws(self, node: fx.Node) -> bool:
        """Return True if the node may draw random numbers."""
        modules = self._child(node).modules() if node.op == "call_module" else [node.target]
        names = [getattr(one, "__name__", type(one).__name__).lower() for one in modules]
        return any("drop" in name or "stochastic" in name or "rand" in name for name in names)

    def _may_write(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return any(getattr(child, "inplace", False) for child in self._child(node).modules())
        name = str(getattr(node.target, "__name__", node.target))
        is_operator = name in operator.__all__ and name.startswith("i")
        return name.endswith("_") or is_operator or bool(node.kwargs.get("inplace"))


def _is_relu(node: fx.Node, graph: _Matcher) -> bool:
    """Return True if the node computes ReLU. Raise _Rejected if hooks are in the way."""
    if node.op == "call_module":
        relu = graph._child(node)
        if kind_of(relu) is not nn.ReLU or len(node.args) != 1 or node.kwargs:
            return False
        if has_hooks(relu, HOOKS[1:]) or "forward" in relu.__dict__:
            raise _Rejected("the ReLU after it has hooks")
        return True
    if node.op == "call_method":
        return node.target in ("relu", "relu_")
    return node.op == "call_function" and node.target in RELUS and node.kwargs.keys() <= {"inplace"}


def _is_add(node: fx.Node) -> bool:
    """Return True if the node adds two values, without further arguments."""
    known = (node.op == "call_function" and node.target in ADDS) or (
        node.op == "call_method" and node.target in ("add", "add_")
    )
    return known and len(node.args) == 2 and not node.kwargs
