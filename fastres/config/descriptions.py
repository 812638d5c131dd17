"""Describe the values that a field accepts, in the words of an error message."""

from __future__ import annotations

import types
import typing
from typing import Any, Literal

from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from fastres.config.schema import Config


def describe(key: str) -> str:
    """Return the values that the field `section.name` accepts, in words, from its type."""
    return " or ".join(_describe_type(kind) for kind in _types_of(key))


def words_of(key: str) -> list[str]:
    """Return the words that the field `section.name` accepts; a number, a path or other text is not among them."""
    words: list[str] = []
    for kind in _types_of(key):
        if kind is bool:
            words += ["true", "false"]
        elif typing.get_origin(kind) is Literal:
            words += map(str, typing.get_args(kind))
    return words


def _types_of(key: str) -> tuple[Any, ...]:
    section, _, name = key.partition(".")
    kind = typing.get_type_hints(typing.get_type_hints(Config)[section])[name.split(".")[0]]
    return typing.get_args(kind) if _is_union(kind) else (kind,)


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def _describe_type(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        values = [str(value) for value in typing.get_args(kind)]
        return values[0] if len(values) == 1 else "one of " + ", ".join(values)
    if typing.get_origin(kind) is tuple:
        return "a list of whole numbers such as [32000, 48000]"
    if typing.get_origin(kind) is list:
        of_text = str in typing.get_args(kind)
        return "a list of names such as [conv1, layer1]" if of_text else "a list of numbers such as [1, 2.5]"
    if typing.get_origin(kind) is dict:
        return "a mapping such as {stem: small}"
    return {
        bool: "true or false",
        str: "text (in quotes, if it looks like a number, true or false)",
        PositiveInt: "a whole number above 0",
        NonNegativeInt: "a whole number, 0 or above",
        PositiveFloat: "a number above 0",
        NonNegativeFloat: "a number, 0 or above",
        type(None): "null",
    }[kind]
