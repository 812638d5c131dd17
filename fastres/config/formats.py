"""Read YAML and JSON strictly, and write YAML.

A value that two readers would read differently is rejected instead of guessed. YAML is 1.1 as PyYAML reads it, except:

- A key that is given twice in one mapping is an error.
- `010` (octal in YAML 1.1) and `1:30` (base 60) are errors.
- `1e-4` is a number, as in YAML 1.2 and JSON, and `2026-01-31` is text.

yes, no, on and off are true and false, as in YAML 1.1 and on the command line.
"""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

AMBIGUOUS = "tag:fastres,ambiguous"
_INT, _FLOAT, _TIMESTAMP = (f"tag:yaml.org,2002:{name}" for name in ("int", "float", "timestamp"))
_PATTERNS = {  # of plain scalars, by tag
    AMBIGUOUS: r"[-+]?(0[0-9_]+|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)",
    _INT: r"[-+]?(0|[1-9][0-9_]*|0b[0-1_]+|0x[0-9a-fA-F_]+)",
    _FLOAT: r"[-+]?([0-9][0-9_]*(\.[0-9_]*([eE][-+]?[0-9]+)?|[eE][-+]?[0-9]+)|\.[0-9][0-9_]*([eE][-+]?[0-9]+)?"
    r"|\.(inf|Inf|INF))|\.(nan|NaN|NAN)",
}


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the rules of this module."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML's own attribute)
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_INT, _FLOAT, _TIMESTAMP)]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping. Raise MarkedYAMLError if one of its keys is given twice."""
        known: dict[tuple[str, str], yaml.Node] = {}
        # Another node has no keys, and PyYAML rejects it below.
        for key, _ in node.value if node.id == "mapping" else ():
            if isinstance(key, yaml.ScalarNode):
                first = known.setdefault((key.tag, key.value), key)
                if first is not key:
                    raise _error(key, f"{key.value!r} is given twice, first in line {_line(first)}; remove one")
        return super().construct_mapping(node, deep)

    def construct_ambiguous(self, node: yaml.ScalarNode) -> Any:
        """Raise MarkedYAMLError for a number that YAML 1.1 reads in base 8 or 60."""
        if ":" in node.value:
            problem = f"{node.value} would be a number in base 60; write it in decimal"
        else:
            problem = f"{node.value} would be a number in base 8; write {node.value.lstrip('+-0_') or '0'}"
        raise _error(node, f"{problem}, or '{node.value}' for text")


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper, which also quotes the text that _Loader would read as something else."""


for _tag, _pattern in _PATTERNS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(f"(?:{_pattern})$"), list("-+.0123456789"))
_Loader.add_constructor(AMBIGUOUS, _Loader.construct_ambiguous)


def read_yaml(text: str) -> Any:
    """Return the content of a YAML document.

    Raises:
        ValueError: if it is not YAML or is ambiguous; the message is one line with line and column.
    """
    try:
        return _Loader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{where}{error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


def read_json(text: str) -> Any:
    """Return the content of a JSON document.

    Raises:
        ValueError: if it is not JSON, has NaN or Infinity, or gives a key twice; the message is one line with line and
            column.
    """
    content = json.loads(text)
    objects: list[dict[str, int]] = []  # the objects around a place in the text, with their keys' positions
    for match in re.finditer(r'("(?:[^"\\]|\\.)*")(\s*:)?|[{}]|NaN|-?Infinity', text):
        if match[0] == "{":
            objects.append({})
        elif match[0] == "}":
            objects.pop()
        elif match[1] is None:
            raise json.JSONDecodeError(f"{match[0]} is not a number in JSON; give a finite number", text, match.start())
        elif match[2] is not None:
            key = json.loads(match[1])
            if key in objects[-1]:
                line = text.count("\n", 0, objects[-1][key]) + 1
                problem = f"{key!r} is given twice, first in line {line}; remove one"
                raise json.JSONDecodeError(problem, text, match.start())
            objects[-1][key] = match.start()
    return content


def write_yaml(content: dict[str, Any]) -> str:
    """Return the content as YAML, with its keys in their order."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False)


def _error(node: yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1
