"""What a command line asks for: recipes by name, files, flags, and one line that refuses what they cannot mean.

Precedence: defaults < recipe < `--config` files in their order < flags.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import itertools
import re
import types
import typing
from collections.abc import Callable
from functools import lru_cache, partial
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from fastres.config.schema import DEFAULT_RECIPE, FIELDS, SECTIONS, Config, check, dump
from fastres.utils.errors import UsageError

TUTORIAL_KEYS = ("height", "width", "label", "num_layer", "model_mode", "zero_padding")
MOST_VALUES = 10_000  # in a configuration file: nine lines of YAML's anchors can stand for billions


def parse(argv: list[str], prog: str = "fastres.train") -> Config:
    """The configuration that a command line asks for. Refuses, in one line, what it cannot mean."""
    files, flags = _split_files_from_flags(argv, prog)
    parser = _parser(prog)
    layers = [(name, load_file(Path(name))) for name in files.config]
    recipe = files.recipe or next((d["recipe"] for _, d in reversed(layers) if "recipe" in d), DEFAULT_RECIPE)
    layers.insert(0, (f"recipe {recipe}", load_recipe(recipe)))
    merged: dict[str, Any] = {}
    for name, layer in layers:
        _refuse_errors(partial(parser.parse_object, layer), where=f"{name}: ", given=layer)
        if layer.keys() >= set(SECTIONS):  # a whole run, as dump() writes it
            merged = {}  # a field that it does not have, of a later version, was not the recipe's of today
        merged = _merge(merged, layer)
    merged["recipe"] = recipe
    base = parser.parse_object(merged)
    namespace = _refuse_errors(lambda: parser.parse_args(flags, namespace=base), given=flags)
    sections = parser.instantiate(namespace)
    config = Config(**{f.name: _plain(sections[f.name]) for f in dataclasses.fields(Config)})
    check(config)
    if files.print_config:
        print(dump(config), end="")
        raise SystemExit(0)
    return config


def load_file(path: Path) -> dict[str, Any]:
    """A configuration file (YAML or JSON) as a nested dict; the tutorial's flat config.json is translated."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        if _count(content) > MOST_VALUES:
            raise UsageError(
                f"{path} holds more than {MOST_VALUES:,} values, those that it repeats by * counted"
            )
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not a text file"
        raise UsageError(f"cannot read configuration file {path}: {reason}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} is neither YAML nor JSON: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UsageError(
            f"{path} must hold sections such as 'optim: {{lr: 0.1}}', not {type(content).__name__}"
        )
    if set(content) & set(TUTORIAL_KEYS):
        return translate_tutorial(content, path)
    _check_fields(content, path)
    return content


def recipe_names() -> list[str]:
    """Names of the packaged recipes, sorted."""
    folder = resources.files("fastres.config.recipes")
    return sorted(
        entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml")
    )


def load_recipe(name: str) -> dict[str, Any]:
    """A packaged recipe as a nested dict."""
    if name not in recipe_names():
        raise UsageError(
            f"unknown recipe {name!r}{_nearest(name, recipe_names())}; there are: {', '.join(recipe_names())}"
        )
    with resources.as_file(resources.files("fastres.config.recipes") / f"{name}.yaml") as path:
        return load_file(path)


def translate_tutorial(flat: dict[str, Any], path: Path) -> dict[str, Any]:
    """The tutorial's config.json (height, width, label, num_layer, model_mode, zero_padding) in our sections."""
    if unknown := sorted(set(flat) - set(TUTORIAL_KEYS), key=str):
        raise UsageError(f"{path}: unknown key {unknown[0]!r}; the tutorial's are {', '.join(TUTORIAL_KEYS)}")
    mode, n = flat.get("model_mode", "resnet"), flat.get("num_layer", 3)
    if mode not in ("resnet", "cnn"):
        raise UsageError(f"{path}: model_mode is {mode!r}; it is resnet or cnn")
    for key in ("num_layer", "height", "width", "label"):
        if key in flat and (type(flat[key]) is not int or flat[key] < 1):
            raise UsageError(f"{path}: {key} is {flat[key]!r}; it is a whole number above 0")
    if type(flat.get("zero_padding", True)) is not bool:
        raise UsageError(f"{path}: zero_padding is {flat['zero_padding']!r}; it is true or false")
    if flat.get("height") != flat.get("width"):
        raise UsageError(f"{path}: height {flat.get('height')} and width {flat.get('width')} must be equal")
    # Not resnetN: 50 and 152 are ImageNet's.
    model: dict[str, Any] = {"name": "cifar_resnet", "options": {"blocks_per_stage": n}}
    if mode == "cnn":
        model["options"]["plain"] = True
    else:
        model["shortcut"] = "maxpool_pad" if flat.get("zero_padding", True) else "conv1x1"
    if "label" in flat:
        model["num_classes"] = flat["label"]
    return {"model": model} | ({"data": {"image_size": flat["height"]}} if "height" in flat else {})


# ------------------------------------------------------------------------------------------- details


def _check_fields(content: dict[str, Any], path: Path) -> None:
    """What jsonargparse lets pass in a file: flags of the command line, a section that is none, null anywhere."""
    for section, fields in content.items():
        if section == "recipe":
            if not isinstance(fields, str):
                raise UsageError(f"{path}: recipe: {fields!r} is not the name of a recipe")
            continue
        if section not in SECTIONS:
            near = _nearest(str(section), SECTIONS)
            raise UsageError(f"{path}: unknown section {section!r}{near}; there are: {', '.join(SECTIONS)}")
        if not isinstance(fields, dict):
            raise UsageError(
                f"{path}: {section} must hold fields such as '{section}: {{...}}', not {fields!r}"
            )
        for name, value in fields.items():
            key = f"{section}.{name}"
            if key not in FIELDS:  # jsonargparse would import the module of a field class_path
                raise UsageError(f"{path}: unknown field {key}{_nearest(key, FIELDS)}; --help lists them all")
            if value is None and "null" not in _describe(key):
                raise UsageError(f"{path}: {key}: null is not {_describe(key)}")


def _count(value: Any, known: dict[int, int] | None = None) -> int:
    """How many values there are in a value, repeated ones each time. ValueError where one holds itself."""
    known = {} if known is None else known
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = 0  # until it is known
        known[id(value)] = 1 + sum(
            _count(item, known) for item in (value.values() if isinstance(value, dict) else value)
        )
    if known[id(value)] == 0:
        raise ValueError("a value holds itself")
    return known[id(value)]


@lru_cache
def _parser(prog: str) -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=prog,
        exit_on_error=False,
        allow_abbrev=False,
        usage="torchrun -m %(prog)s [--recipe NAME] [--config FILE]... [--SECTION.FIELD VALUE]...",
        description="Trains a residual network. Recipes: " + ", ".join(recipe_names()) + ".",
        epilog="Precedence: recipe < files in their order < flags. Exit status: 0 done, 1 failed, 2 refused input, "
        "128 + N stopped by signal N and saved; torchrun reports its own.",
    )
    _add_file_arguments(parser)
    parser.add_class_arguments(Config, None, skip={"recipe"})
    for action in parser._actions:
        if action.dest in SECTIONS:  # jsonargparse's --SECTION FILE, a second way to say --config FILE
            action.help = argparse.SUPPRESS
    return parser


def _add_file_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--recipe", metavar="NAME", help=f"recipe to start from; {DEFAULT_RECIPE} where none is named"
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        action="append",
        default=[],
        help="configuration file, YAML or JSON, the tutorial's config.json too; may be repeated",
    )
    parser.add_argument(
        "--print_config", action="store_true", help="print the resolved configuration and leave"
    )


def _split_files_from_flags(argv: list[str], prog: str) -> tuple[argparse.Namespace, list[str]]:
    first = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False, exit_on_error=False)
    _add_file_arguments(first)
    try:
        files, flags = first.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UsageError(str(error)) from None
    for flag in flags:
        section = flag.partition("=")[0].removeprefix("--")
        if flag.startswith("--") and section in SECTIONS:
            raise UsageError(
                f"--{section} is a section; give its fields, such as --{_example_of(section)}, or --config FILE"
            )
    return files, flags


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Sections of `over` field by field over `base`; a field's value is replaced whole."""
    merged = dict(base)
    for section, fields in over.items():
        merged[section] = {**merged.get(section, {}), **fields} if isinstance(fields, dict) else fields
    return merged


def _refuse_errors(read: Callable[[], Any], *, where: str = "", given: Any) -> Any:
    """Runs `read`; jsonargparse's several lines of what was wrong become one that names field and remedy."""
    try:
        return read()
    except (ArgumentError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
        text = " ".join(str(error).split())
    if match := re.match(r'Parser key "([\w.]+)"', text):
        key = match[1]
        raise UsageError(f"{where}{key}: {_given(given, key)!r} is not {_describe(key)}") from None
    if match := re.match(r"unrecognized arguments: (--)?([\w.]+)", text):
        raise UsageError(
            f"unknown flag --{match[2]}{_nearest(match[2], FIELDS)}; --help lists them all"
        ) from None
    if match := re.match(r"Group '(\w+)' does not accept option '([\w.]+)'", text):
        key = f"{match[1]}.{match[2]}"
        raise UsageError(
            f"{where}unknown field {key}{_nearest(key, FIELDS)}; --help lists them all"
        ) from None
    raise UsageError(f"{where}{text}") from None


def _example_of(section: str) -> str:
    return next(field for field in FIELDS if field.startswith(f"{section}."))


def _given(given: Any, key: str) -> Any:
    """The value that was given for a field, from a nested dict or from a list of flags."""
    if isinstance(given, dict):
        section, _, name = key.partition(".")
        return given[section][name.split(".")[0]]
    for flag, value in reversed([*itertools.pairwise([*given, ""])]):  # the last one counts
        name, equals, attached = flag.partition("=")
        if name == f"--{key}" or name.startswith(f"--{key}."):
            return attached if equals else value
    return None


def _describe(key: str) -> str:
    """What a field takes, in words: from its type."""
    section, _, name = key.partition(".")
    kind = typing.get_type_hints(typing.get_type_hints(Config)[section])[name.split(".")[0]]
    return " or ".join(
        _describe_type(part) for part in (typing.get_args(kind) if _is_union(kind) else (kind,))
    )


def _plain(section: Any) -> Any:
    """A section whose numbers are int and float: jsonargparse's are classes of its own, which no file should hold."""
    if isinstance(section, str):
        return section
    values = {
        name: int(value) if isinstance(value, int) and not isinstance(value, bool)
        else float(value) if isinstance(value, float)
        else value
        for name, value in vars(section).items()
    }  # fmt: skip
    return dataclasses.replace(section, **values)


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def _describe_type(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) is tuple:
        return "a list of whole numbers such as [32000, 48000]"
    if typing.get_origin(kind) is dict:
        return "a mapping such as {stem: small}"
    return {
        bool: "true or false",
        str: "text",
        PositiveInt: "a whole number above 0",
        NonNegativeInt: "a whole number, 0 or above",
        PositiveFloat: "a number above 0",
        NonNegativeFloat: "a number, 0 or above",
        type(None): "null",
    }[kind]


def _nearest(word: str, choices: Any) -> str:
    close = difflib.get_close_matches(word, list(choices), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
