"""Write the code of a fused forward from the graphs of the original one."""

from __future__ import annotations

import enum
import inspect
import re
from types import ModuleType
from typing import Any, NamedTuple

from torch import fx, nn

from fastres.models.fusion.generated import Code, ModuleName, Spec
from fastres.models.fusion.patterns import Owner, Site, is_norm
from fastres.models.fusion.tracing import Listed, Variant, forward_of


class Takes(NamedTuple):
    """The further arguments of a generated forward."""

    sum: bool  # fused_add and fused_relu: its last operation is a norm
    skip: bool  # fused_skip: it adds its first argument
    fork: bool  # fused_fork: its last operation is a site's ReLU

    def arguments(self) -> list[str]:
        """Return the arguments' names."""
        names = {"fused_add": self.sum, "fused_relu": self.sum, "fused_skip": self.skip, "fused_fork": self.fork}
        return [name for name, taken in names.items() if taken]


KINDS = {"tensor": "Tensor", "list": "(list, tuple)", "any": "(Tensor, list, tuple)"}


def specification(owner: Owner) -> Spec:
    """Return the code of the owner's fused forward. Its graphs are changed.

    The forward calls the function of the first variant whose conditions hold, and otherwise the original forward.
    """
    if owner.is_sequential:
        return Spec("sequential")
    values: dict[str, Any] = {}
    lines, functions = [], []
    found = list(zip(owner.variants, owner.sites, strict=True))
    skips, forks = [_skip_site(owner, *one) for one in found], [_fork_site(owner, *one) for one in found]
    takes = Takes(owner.takes_sum, all(skips), all(forks))
    for i, (variant, sites) in enumerate(found):
        conditions = [*_conditions(variant, values), *_parts_fit(owner, i, sites)]
        lines.append(f"    if {' and '.join(dict.fromkeys(conditions))}:")
        arguments = list(variant.inputs)
        arguments += ["fused_add", "fused_relu"] if takes.sum else []
        arguments += [f"{arguments[0]} if fused_skip is None else fused_skip"] if takes.skip else []
        called = f"_variant_{i}({', '.join(['self', *arguments])}"
        if takes.fork:
            unhooked = ", ".join(_module(str(node.target)) for node in _called(forks[i]))
            lines += [f"        if fused_fork and hooked({unhooked}):", f"            return {called}, False), None"]
        lines.append(f"        return {called}{', fused_fork' if takes.fork else ''})")
        new = _placeholders(variant.graph, takes)
        if takes.sum:
            owner.tail_nodes[i].kwargs = {"fused_add": new["fused_add"], "fused_relu": new["fused_relu"]}
        for site in sites:
            kwargs = {"fused_add": new["fused_skip"]} if takes.skip and site is skips[i] else {}
            kwargs |= {"fused_fork": new["fused_fork"]} if takes.fork and site is forks[i] else {}
            _rewrite(variant.graph, site, kwargs)
        functions.append(_function(variant.graph, f"_variant_{i}"))
    header, call = _signature(owner, takes)
    result = "rectified_sum(result, fused_add, fused_relu)" if takes.sum else "result"
    fallback = [f"    result = {call}", *(["    if fused_fork:", "        return result, None"] if takes.fork else [])]
    source = "\n".join([header, *lines, *fallback, f"    return {result}", ""])
    return Spec("forward", Code(source, tuple(values.items())), tuple(functions), *takes)


def _signature(owner: Owner, takes: Takes) -> tuple[str, str]:
    """Return the line `def forward(…)` and the call of the original forward with the same arguments."""
    parameters = list(inspect.signature(forward_of(owner.module)).parameters.values())[1:]
    header, call, starred = ["self"], ["self"], False
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            header.append("*")
            starred = True
        has_default = parameter.default is not parameter.empty
        header.append(f"{parameter.name}=_default_{parameter.name}" if has_default else parameter.name)
        call.append(f"{parameter.name}={parameter.name}" if starred else parameter.name)
    more = [f"{name}={'None' if name in ('fused_add', 'fused_skip') else 'False'}" for name in takes.arguments()]
    header += ["*"] * bool(more and not starred) + more
    return f"def forward({', '.join(header)}):", f"_original({', '.join(call)})"


# ---- skip connections --------------------------------------------------------------------------------------


def _skip_site(owner: Owner, variant: Variant, sites: list[Site]) -> Site | None:
    """Return the site that adds the forward's first argument, or None.

    The argument's other uses do not matter: autograd itself forbids to change the result of a ReLU in place.
    """
    first = next(iter(variant.graph.nodes))
    for site in sites:
        if first.op == "placeholder" and site.residual is first and is_norm(_child(owner, site.node)):
            return site
    return None


def _fork_site(owner: Owner, variant: Variant, sites: list[Site]) -> Site | None:
    """Return the site whose result the forward returns, or None."""
    output = variant.graph.output_node()
    for site in sites:
        if output.args == (site.chain[-1],) and is_norm(_child(owner, site.node)):
            return site
    return None


def _called(site: Any) -> list[fx.Node]:
    """Return the nodes of a site that call modules: the norm, identities and the ReLU."""
    return [node for node in (site.node, *site.chain) if node.op == "call_module"]


def _child(owner: Owner, node: fx.Node) -> nn.Module:
    return owner.module.get_submodule(str(node.target))


# ---- conditions --------------------------------------------------------------------------------------------


def _conditions(variant: Variant, values: dict[str, Any]) -> list[str]:
    """Return the conditions for the variant's arguments and attributes; `values` gets the names that they use."""
    conditions = [f"isinstance({name}, {KINDS[kind]})" for name, kind in variant.inputs.items()]
    conditions += [f"{name} is _default_{name}" for name in variant.defaults]
    compared = [(_expression(f"{path}.{name}" if path else name), value) for path, name, value in variant.guards]
    for attribute, value in [*variant.constants, *compared]:
        if value is None or isinstance(value, bool):
            conditions.append(f"{attribute} is {value}")
            continue
        constant = next((known for known, other in values.items() if other is value), f"_value_{len(values)}")
        values[constant] = value.values if isinstance(value, Listed) else value
        identical = callable(value) or isinstance(value, enum.Enum)
        if isinstance(value, Listed):
            conditions.append(f"type({attribute}) is {value.kind}")
            attribute = f"tuple({attribute}{'.items()' if value.kind == 'dict' else ''})"
        conditions.append(f"{attribute} is {constant}" if identical else f"same({attribute}, {constant})")
    return conditions


def _module(path: str) -> str:
    """Return the expression for a module below self, or for None if it was removed."""
    if "." in path:
        return _expression(path)
    return f"self._modules.get({path!r})"  # a third of the time of self.path, which goes through __getattr__


def _parts_fit(owner: Owner, i: int, sites: list[Site]) -> list[str]:
    """Return the conditions that the modules in the sites are still the fused ones."""
    called = [site.node for site in sites] + (owner.tail_nodes[i : i + 1] if owner.takes_sum else [])
    conditions = [f'getattr({_module(str(node.target))}, "takes_sum", False)' for node in called]
    for site in sites:
        modules = [node for node in site.chain if node.op == "call_module"]
        for node in modules:
            kind = "FusedReLU" if node is site.chain[-1] else "Identity"
            conditions.append(f"type({_module(str(node.target))}) is {kind}")
    return conditions


def _expression(path: str) -> str:
    """Return the expression for an attribute below self, which is None if a module on the way to it was removed."""
    expression = "self"
    for part in path.split("."):
        expression = f"getattr({expression}, {part!r}, None)"
    return expression


# ---- graphs ------------------------------------------------------------------------------------------------


def _placeholders(graph: fx.Graph, takes: Takes) -> dict[str, fx.Node]:
    """Add parameters for the further arguments of the forward to the graph, and return them by name."""
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    added: dict[str, fx.Node] = {}
    for name in takes.arguments():
        with graph.inserting_after(last):
            added[name] = last = graph.placeholder(name)
    return added


def _rewrite(graph: fx.Graph, site: Site, more: dict[str, Any]) -> None:
    """Let the norm's call compute the whole site. Calls of identities and of a ReLU module stay, for their hooks."""
    kwargs: dict[str, Any] = {"fused_relu": True}
    if site.residual is not None:
        kwargs["fused_add"] = site.residual
    with graph.inserting_before(site.add or site.node):
        value = graph.call_module(str(site.node.target), site.node.args, kwargs | more)
    relu = site.chain[-1]
    with graph.inserting_before(relu):
        for node in site.chain:
            if node.op == "call_module":
                value = graph.call_module(str(node.target), (value,), {"fused_relu": True} if node is relu else {})
    relu.replace_all_uses_with(value)
    for node in reversed([site.node, *site.chain]):
        graph.erase_node(node)


def _function(graph: fx.Graph, name: str) -> Code:
    """Return the graph's code as a function of this name."""
    code = graph.python_code("self")
    source = code.src.replace("def forward(", f"def {name}(", 1).strip() + "\n"
    used = set(re.findall(r"\w+", source))
    names = [
        (key, ModuleName(value.__name__) if isinstance(value, ModuleType) else value)
        for key, value in code.globals.items()
        if key in used
    ]
    return Code(source, tuple(names))
