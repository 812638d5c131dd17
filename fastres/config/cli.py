"""Command-line parsing: recipes by name, files, flags, and one-line errors.

Precedence: defaults < recipe < `--config` files in their order < flags.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import logging
import re
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter, set_parsing_settings

from fastres.config.descriptions import describe
from fastres.config.files import RENAMED_VALUES, load_file, load_recipe, recipe_names, rename_values
from fastres.config.formats import read_yaml
from fastres.config.length import FOLLOWING, Layers, Length, in_steps, needs_data
from fastres.config.remedies import flag_meant_by_argument, flags_meant_by
from fastres.config.schema import DEFAULT_RECIPE, FIELDS, NO_SECTIONS, SECTIONS, Config, dump
from fastres.config.validation import check
from fastres.utils import process, ranks
from fastres.utils.errors import QUIET_HELP, UsageError, present_spellings, user_path
from fastres.utils.process import command_name
from fastres.utils.suggest import near_flags, question
from fastres.utils.version import __version__

LOG, RUN_LOG = logging.getLogger(__name__), logging.getLogger(process.RUN_LOG)
RENAMED_FLAGS = {"--print_config": "--print-config"}  # the old spellings work for one version
DEFAULT_LENGTH = Length(steps=Config().train.steps)


def parse(argv: list[str], prog: str | None = None, *, builds_network: bool = True) -> Config:
    """Return the configuration that a command line describes.

    Args:
        argv: the flags.
        prog: the command's name in --help; None for that of train.
        builds_network: check that model.name and its options can be built; False if the caller has the network.

    Raises:
        UsageError: if a file, a flag or their combination is invalid.
    """
    prog = prog or command_name("train")
    files, flags = _split_files_from_flags(argv, prog)
    if files.quiet:
        process.quieten()
    flags = _rename_flag_values(flags)
    _check_flow_values(flags)
    parser = train_parser(prog)
    layers = [(name, rename_values(load_file(user_path(name)), partial(_note, f"{name}: "))) for name in files.config]
    recipe = files.recipe or next((d["recipe"] for _, d in reversed(layers) if "recipe" in d), DEFAULT_RECIPE)
    layers.insert(0, (f"recipe {recipe}", load_recipe(recipe)))
    merged: dict[str, Any] = {}
    lengths = Layers(length=DEFAULT_LENGTH)
    for name, layer in layers:
        _reject_errors(partial(parser.parse_object, layer), where=f"{name}: ", given=layer)
        whole = layer.keys() >= set(SECTIONS)  # a whole run, as dump() writes it
        lengths.add(f"{name}: ", layer, DEFAULT_LENGTH, whole=whole)
        if whole:
            merged = {}  # a field newer than the dump takes its default, not the value in today's recipe
        merged = _merge(merged, layer)
    merged["recipe"] = recipe
    base = parser.parse_object(merged)
    namespace = _reject_errors(lambda: parser.parse_args(flags, namespace=base), given=flags)
    sections = parser.instantiate(namespace)
    config = Config(recipe=recipe, **{name: _plain(sections[name]) for name in SECTIONS})
    lengths.add("", _lengths_of_flags(flags, config), DEFAULT_LENGTH, whole=False)
    # The lines belong to the run's log, but --print-config prints nothing else on stdout.
    config = _with_length(config, lengths, LOG if files.print_config else RUN_LOG, builds_network)
    if files.print_config:
        if needs_data(config):
            LOG.info("the data decides train.steps and scales the schedule; the run's config.yaml has both")
        print(dump(config), end="")
        raise SystemExit(0)
    return config


# ------------------------------------------------------------------------------------------- details


def _lengths_of_flags(flags: list[str], config: Config) -> dict[str, Any]:
    """Return the fields of `config` that the flags set and that concern the run's length, as a nested dict."""
    given = {flag.partition("=")[0].removeprefix("--").removesuffix("+") for flag in flags if flag.startswith("--")}
    sections = {"train": ("steps", "epochs"), "schedule": FOLLOWING}
    return {
        section: {name: getattr(getattr(config, section), name) for name in names if f"{section}.{name}" in given}
        for section, names in sections.items()
    }


def _with_length(config: Config, lengths: Layers, log: logging.Logger, builds_network: bool) -> Config:
    """Return the checked configuration with its length, scaled to it unless that needs the data; log what is scaled."""
    config = lengths.apply(config)
    lines: list[str] = []
    scaled = "milestones" in lengths.from_a_run
    if needs_data(config):
        check(config, scaled, builds_network=builds_network)
    else:
        scaled |= "milestones" in config.given_for
        config, lines = in_steps(config)
        check(config, scaled, builds_network=builds_network)
    for line in lines if ranks.rank() == 0 else ():
        log.info("%s", line)
    return config


class _HelpFormatter(DefaultHelpFormatter):
    """Print a list's default as a flag takes it, which is [1, 2] and not (1, 2)."""

    def _expand_help(self, action: argparse.Action) -> str:
        return re.sub(r"default: \((.*)\)\)$", r"default: [\1])", super()._expand_help(action))


@lru_cache
def train_parser(prog: str) -> ArgumentParser:
    """Return the parser of train's command line, whose name in --help is `prog`."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=prog,
        exit_on_error=False,
        allow_abbrev=False,
        formatter_class=_HelpFormatter,
        usage="%(prog)s [--recipe NAME] [--config FILE]... [--SECTION.FIELD VALUE]...",
        description="Train a residual network. Recipes: " + ", ".join(recipe_names()) + ".",
        epilog="For several processes, use torchrun --nproc_per_node N -m fastres.train. Precedence: recipe < files in "
        "their order < flags. If train.steps is set later than the schedule, milestones and warm-up are scaled. In "
        "files and flags, yes and on are true, no and off are false. Exit status: 0 done, 1 failed, 2 invalid input, "
        "128 + N stopped by signal N after saving; torchrun reports its own exit status.",
    )
    _add_file_arguments(parser)
    parser.add_class_arguments(Config, None, skip=NO_SECTIONS)
    for action in parser._actions:
        if action.dest in SECTIONS:  # jsonargparse's --SECTION FILE, a second way to give --config FILE
            action.help = argparse.SUPPRESS
    return parser


def _add_file_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", metavar="NAME", help=f"Recipe to start from; {DEFAULT_RECIPE} if none is given.")
    parser.add_argument(
        "--config",
        metavar="FILE",
        action="append",
        default=[],
        help="Configuration file: JSON if its name ends in .json (the tutorial's config.json too), otherwise YAML. May "
        "be repeated.",
    )
    parser.add_argument("--print-config", action="store_true", help="Print the resolved configuration and exit.")
    parser.add_argument("--quiet", action="store_true", help=QUIET_HELP)
    parser.add_argument("--version", action="version", version=f"fastres {__version__}", help="Print the "
                        "version and exit.")  # fmt: skip


def _split_files_from_flags(argv: list[str], prog: str) -> tuple[argparse.Namespace, list[str]]:
    first = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False, exit_on_error=False)
    _add_file_arguments(first)
    try:
        files, flags = first.parse_known_args(present_spellings(argv, RENAMED_FLAGS))
    except argparse.ArgumentError as error:
        raise UsageError(str(error)) from None
    for flag in flags:
        section = flag.partition("=")[0].removeprefix("--")
        if flag.startswith("--") and section in SECTIONS:
            raise UsageError(
                f"--{section} is a section; give its fields, such as --{_example_of(section)}, or --config FILE"
            )
    return files, flags


def _rename_flag_values(flags: list[str]) -> list[str]:
    """Return the flags with renamed values under their present names, and log a note for each."""
    renamed = list(flags)
    for i, flag in enumerate(flags):
        name, equals, value = flag.partition("=")
        names = RENAMED_VALUES.get(name.removeprefix("--"), {})
        if not equals:
            value = flags[i + 1] if i + 1 < len(flags) else ""
        if value in names:
            renamed[i if equals else i + 1] = f"{name}={names[value]}" if equals else names[value]
            _note("", name, value, names[value])
    return renamed


def _check_flow_values(flags: list[str]) -> None:
    """Raise UsageError for a flag's list or mapping that has an ambiguous number or a key twice, as in a file."""
    for flag, following in itertools.pairwise([*flags, ""]):
        name, equals, attached = flag.partition("=")
        key = name.removeprefix("--").removesuffix("+")
        if key in FIELDS and re.search("a list|a mapping", describe(key)):
            try:
                read_yaml(attached if equals else following)
            except (ValueError, RecursionError) as error:
                raise UsageError(f"{key}: cannot be read as YAML: {error}") from None


def _note(where: str, name: str, old: str, new: str) -> None:
    """Log that a value was renamed."""
    if ranks.rank() == 0:
        LOG.warning("%s%s %s is now %s %s; the old name works for one version", where, name, old, name, new)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with the fields of `over`; a field's value is replaced as a whole."""
    merged = dict(base)
    for section, fields in over.items():
        merged[section] = {**merged.get(section, {}), **fields} if isinstance(fields, dict) else fields
    return merged


def _reject_errors(read: Callable[[], Any], *, where: str = "", given: Any) -> Any:
    """Run `read`, and turn a multi-line error of jsonargparse into a UsageError of one line with field and remedy."""
    try:
        return read()
    except (ArgumentError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
        text = " ".join(str(error).split())
    if match := re.match(r'Parser key "([\w.]+)"', text):
        key = match[1]
        raise UsageError(f"{where}{key}: {_given(given, key)!r} is not {describe(key)}") from None
    if (match := re.match(r"argument --([\w.]+)\S*: expected one argument", text)) and match[1] in FIELDS:
        raise UsageError(f"{match[1]}: its value is missing; give {describe(match[1])}") from None
    if match := re.match(r"unrecognized arguments: (\S+)", text):
        raise UsageError(_unknown_argument(match[1])) from None
    if match := re.match(r"Group '(\w+)' does not accept option '([\w.]+)'", text):
        key = f"{match[1]}.{match[2]}"
        raise UsageError(
            f"{where}unknown field {key}{question(near_flags(key, FIELDS))}; --help lists them all"
        ) from None
    raise UsageError(f"{where}{text}") from None


def _unknown_argument(argument: str) -> str:
    """Return the error for an argument that is no flag of train's, with the flag that was meant."""
    if argument.startswith("-"):
        name = argument.partition("=")[0]
        return f"unknown flag {name}{question(flags_meant_by(name))}; --help lists them all"
    meant = flag_meant_by_argument(argument)
    return f"{argument}: every setting needs a flag{question([meant] if meant else [])}; --help lists them all"


def _example_of(section: str) -> str:
    return next(field for field in FIELDS if field.startswith(f"{section}."))


def _given(given: Any, key: str) -> Any:
    """Return the value that was given for a field, in a nested dict or a list of flags."""
    if isinstance(given, dict):
        section, _, name = key.partition(".")
        return given[section][name.split(".")[0]]
    for flag, value in reversed([*itertools.pairwise([*given, ""])]):  # the last one counts
        name, equals, attached = flag.partition("=")
        if name == f"--{key}" or name.startswith(f"--{key}."):
            return attached if equals else value
    return None


def _plain(section: Any) -> Any:
    """Return the section with plain ints and floats: jsonargparse's own classes should not reach a file."""
    values = {
        name: int(value) if isinstance(value, int) and not isinstance(value, bool)
        else float(value) if isinstance(value, float)
        else value
        for name, value in vars(section).items()
    }  # fmt: skip
    return dataclasses.replace(section, **values)
