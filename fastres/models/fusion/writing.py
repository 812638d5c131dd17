"""Write the code of a fused forward from the graphs of the original one."""

from __future__ import annotations

import enum
import inspect
import re
from types import ModuleType
from typing import Any

from torch import fx

from fastres.models.fusion.generated import Code, ModuleName, Spec
from fastres.models.fusion.patterns import Owner, Site
from fastres.models.fusion.tracing import Listed, Variant, forward_of

KINDS = {"tensor": "Tensor", "list": "(list, tuple)", "any": "(Tensor, list, tuple)"}


def specification(owner: Owner) -> Spec:
    """Return the code of the owner's fused forward. Its graphs are changed.

    The forward calls the function of the first variant whose conditions hold, and otherwise the original forward.
    """
    if owner.is_sequential:
        return Spec("sequential")
    values: dict[str, Any] = {}
    lines, functions = [], []
    sums = ["fused_add", "fused_relu"] if owner.takes_sum else []
    for i, (variant, sites) in enumerate(zip(owner.variants, owner.sites, strict=True)):
        conditions = [*_conditions(variant, values), *_parts_fit(owner, i, sites)]
        for site in sites:
            _rewrite(variant.graph, site)
        if owner.takes_sum:
            _pass_sum_on(variant.graph, owner.tail_nodes[i])
        functions.append(_function(variant.graph, f"_variant_{i}"))
        called = ", ".join(["self", *variant.inputs, *sums])
        lines += [f"    if {' and '.join(dict.fromkeys(conditions))}:", f"        return _variant_{i}({called})"]
    header, call = _signature(owner)
    result = "rectified_sum(result, fused_add, fused_relu)" if owner.takes_sum else "result"
    source = "\n".join([header, *lines, f"    result = {call}", f"    return {result}", ""])
    return Spec("forward", Code(source, tuple(values.items())), tuple(functions), owner.takes_sum)


def _signature(owner: Owner) -> tuple[str, str]:
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
    if owner.takes_sum:
        header += [*([] if starred else ["*"]), "fused_add=None", "fused_relu=False"]
    return f"def forward({', '.join(header)}):", f"_original({', '.join(call)})"


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


def _rewrite(graph: fx.Graph, site: Site) -> None:
    """Let the norm's call compute the whole site. Calls of identities and of a ReLU module stay, for their hooks."""
    kwargs: dict[str, Any] = {"fused_relu": True}
    if site.residual is not None:
        kwargs["fused_add"] = site.residual
    with graph.inserting_before(site.add or site.node):
        value = graph.call_module(str(site.node.target), site.node.args, kwargs)
    relu = site.chain[-1]
    with graph.inserting_before(relu):
        for node in site.chain:
            if node.op == "call_module":
                value = graph.call_module(str(node.target), (value,), {"fused_relu": True} if node is relu else {})
    relu.replace_all_uses_with(value)
    for node in reversed([site.node, *site.chain]):
        graph.erase_node(node)


def _pass_sum_on(graph: fx.Graph, tail: fx.Node) -> None:
    """Add the parameters fused_add and fused_relu to the graph, and pass them to the module that is called last."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    with graph.inserting_after(placeholders[-1]):
        relu = graph.placeholder("fused_relu")
    with graph.inserting_after(placeholders[-1]):
        add = graph.placeholder("fused_add")
    tail.kwargs = {"fused_add": add, "fused_relu": relu}


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
