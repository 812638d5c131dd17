"""Configuration files and recipes, as nested dictionaries."""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from fastres.config.descriptions import describe
from fastres.config.formats import read_json, read_yaml
from fastres.config.schema import FIELDS, SECTIONS
from fastres.config.tutorial import TUTORIAL_KEYS, translate_tutorial
from fastres.utils.errors import UsageError
from fastres.utils.suggest import did_you_mean, near_flags, question

MOST_VALUES = 10_000  # in a configuration file, because nine lines of YAML anchors can expand to billions
# Values renamed before version 0.1.0; the old names are accepted in it, and dropped in the next version.
RENAMED_VALUES: dict[str, dict[str, str]] = {"engine.conv": {"own": "cpp"}}


def load_file(path: Path) -> dict[str, Any]:
    """Return a configuration file as a nested dict; the tutorial's flat config.json is translated.

    Args:
        path: the file; JSON if its name ends in .json, otherwise YAML.

    Raises:
        UsageError: if the file cannot be read, or has an unknown section or field.
    """
    kind, read = ("JSON", read_json) if path.suffix.lower() == ".json" else ("YAML", read_yaml)
    try:
        content = read(path.read_text(encoding="utf-8-sig"))  # Windows' editors begin a file with a mark
        if _count(content) > MOST_VALUES:
            raise UsageError(
                f"{path}: more than {MOST_VALUES:,} values after expanding YAML aliases; "
                "split the file or remove the aliases"
            )
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not a text file"
        near = question([f"--recipe {path}"]) if str(path) in recipe_names() else ""
        raise UsageError(f"cannot read configuration file {path}: {reason}{near}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read as {kind}: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path} must hold sections such as 'optim: {{lr: 0.1}}', not {type(content).__name__}")
    if set(content) & set(TUTORIAL_KEYS):
        return translate_tutorial(content, path)
    _check_fields(content, path)
    return content


def recipe_names() -> list[str]:
    """Return the names of the packaged recipes, sorted."""
    folder = resources.files("fastres.config.recipes")
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(name: str) -> dict[str, Any]:
    """Return a packaged recipe as a nested dict. Raise UsageError if there is none of that name."""
    if name not in recipe_names():
        near = question([f"--config {name}"]) if Path(name).is_file() else did_you_mean(name, recipe_names())
        raise UsageError(f"unknown recipe {name!r}{near}; choose from {', '.join(recipe_names())}")
    with resources.as_file(resources.files("fastres.config.recipes") / f"{name}.yaml") as path:
        return load_file(path)


def rename_values(content: dict[str, Any], note: Callable[[str, str, str], None] = lambda *_: None) -> dict[str, Any]:
    """Return a nested configuration with renamed values under their present names.

    Args:
        content: the configuration.
        note: is called for each renamed value with its field, old name and present name.
    """
    for key, names in RENAMED_VALUES.items():
        section, _, name = key.partition(".")
        fields = content.get(section)
        if isinstance(fields, dict) and isinstance(fields.get(name), str) and fields[name] in names:
            note(key, fields[name], names[fields[name]])
            content = content | {section: fields | {name: names[fields[name]]}}
    return content


def _check_fields(content: dict[str, Any], path: Path) -> None:
    """Raise UsageError for fields that jsonargparse would accept: command-line flags, unknown sections, any null."""
    if isinstance(model := content.get("model"), dict) and "trust_code" in model:
        raise UsageError(f"{path}: model.trust_code: a file cannot allow it; give --model.trust_code true as a flag")
    for section, fields in content.items():
        if section == "recipe":
            if not isinstance(fields, str):
                raise UsageError(f"{path}: recipe: {fields!r} is not the name of a recipe")
            continue
        if section not in SECTIONS:
            near = question(near_flags(str(section), [*SECTIONS, *FIELDS]))
            raise UsageError(f"{path}: unknown section {section!r}{near}; choose from {', '.join(SECTIONS)}")
        if not isinstance(fields, dict):
            raise UsageError(f"{path}: {section} must hold fields such as '{section}: {{...}}', not {fields!r}")
        for name, value in fields.items():
            key = f"{section}.{name}"
            if key not in FIELDS:  # jsonargparse would import the module of a field class_path
                near = question(near_flags(key, FIELDS))
                raise UsageError(f"{path}: unknown field {key}{near}; --help lists them all")
            if value is None and "null" not in describe(key):
                raise UsageError(f"{path}: {key}: null is not {describe(key)}")


def _count(value: Any, known: dict[int, int] | None = None) -> int:
    """Return the number of values inside `value`, counting every alias. Raise ValueError if a value contains itself."""
    known = {} if known is None else known
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = 0  # marks a value that is being counted
        known[id(value)] = 1 + sum(
            _count(item, known) for item in (value.values() if isinstance(value, dict) else value)
        )
    if known[id(value)] == 0:
        raise ValueError("a value contains itself")
    return known[id(value)]
