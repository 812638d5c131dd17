"""Write the script that completes the command line of `fastres` in a shell: `fastres --print-completion SHELL`.

The script has all names in it, so that the Tab key starts no Python.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Mapping

import shtab

from fastres.config.descriptions import words_of
from fastres.config.files import recipe_names
from fastres.config.schema import FIELDS, PATHS
from fastres.utils.errors import user_path

PATH_FIELDS = {f"{section}.{name}" for section, names in PATHS.items() for name in names}


def script(shell: str, root: argparse.ArgumentParser, commands: Mapping[str, str]) -> str:
    """Return the completion script for a shell.

    Args:
        shell: bash, zsh or fish.
        root: the parser of `fastres` without a command, to which the commands' parsers are added.
        commands: the names of the commands, each with its purpose.
    """
    root.prog = "fastres"
    subparsers = root.add_subparsers(parser_class=argparse.ArgumentParser)
    for name, purpose in commands.items():
        parser = importlib.import_module(f"fastres.{name}").parser()
        for action in parser._actions:
            _add_values(action)
        subparsers.add_parser(name, help=purpose, parents=[parser], add_help=False)
    return shtab.complete(root, shell)


def _add_values(action: argparse.Action) -> None:
    """Tell shtab the values of a flag or an argument, if they are files or the words of a closed set."""
    if action.type is user_path or action.dest in PATH_FIELDS or action.dest == "config":
        action.complete = shtab.FILE  # type: ignore[attr-defined]
    elif action.dest == "recipe":
        action.choices = recipe_names()
    elif action.dest in FIELDS:
        action.choices = words_of(action.dest) or None
