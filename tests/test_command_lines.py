"""All commands name equal flags equally and word their help alike, and old spellings of flags still work."""

from __future__ import annotations

import importlib
import io
import itertools
import re
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path

import pytest

from fastres.config.cli import RENAMED_FLAGS
from fastres.config.descriptions import describe
from fastres.config.schema import FIELDS
from fastres.utils.errors import Parser
from tests.commands import ROOT, run_module

COMMANDS = ["fastres.train", "fastres.predict", "fastres.evaluate", "fastres.export", "fastres.doctor"]
TOOLS = ["bench.report", "bench.held_out", "bench.counts", "bench.fuse_sweep", "bench.cpu_norm",
         "fastres_kernels.report"]  # fmt: skip

ENTRY = re.compile(r"  (\S.*?)(?:  +(\S.*))?")  # two or more blanks, or a new line, precede the text
IN_BRACKETS = re.compile(r" \((type|default): .*\)$")  # after the sentences


@cache
def help_of(command: str) -> str:
    """Return what --help prints, with each text in one line."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        patch.setattr("sys.argv", [command, "--help"])
        patch.setenv("COLUMNS", "5000")
        with pytest.raises(SystemExit):
            importlib.import_module(command).main()
    return printed.getvalue()


def entries_of(command: str) -> dict[str, str]:
    """Return the help texts of a command by the flags and the argument that they describe."""
    found: dict[str, str] = {}
    name = listing = ""
    for line in help_of(command).splitlines():
        if re.fullmatch(r"\S.*:", line):
            listing = line
        elif not line:
            listing = ""
        elif listing and (match := ENTRY.fullmatch(line)):
            name = match[1]
            found[name] = match[2] or ""
        elif listing:
            found[name] += line.strip()
    assert "-h, --help" in found
    return found


def flags_of(command: str) -> set[str]:
    """Return the flags of a command."""
    return {flag for name in entries_of(command) for flag in re.findall(r"--[\w.-]+", name)}


@pytest.mark.parametrize("command", [*COMMANDS, *TOOLS])
def test_help_texts_are_sentences(command: str) -> None:
    wrong = []
    for name, text in entries_of(command).items():
        sentences = IN_BRACKETS.sub("", text)
        flag = name.split()[0].rstrip(",").removeprefix("--")
        values = describe(flag) if flag in FIELDS else ""
        first = sentences.split(" ")[0]
        if sentences and not (sentences.endswith((".", ".)")) and (not first[0].islower() or first in values)):
            wrong.append(f"{name}: {text}")
    assert not wrong


@pytest.mark.parametrize("command", [*COMMANDS, *TOOLS])
def test_a_flag_with_a_dot_is_a_field_and_any_other_has_hyphens(command: str) -> None:
    for flag in flags_of(command):
        assert flag[2:] in FIELDS if "." in flag else re.fullmatch("--[a-z0-9]+(-[a-z0-9]+)*", flag), flag


def test_no_two_commands_spell_a_flag_differently() -> None:
    flags = sorted({flag for command in COMMANDS for flag in flags_of(command) if "." not in flag})
    assert not [pair for pair in itertools.permutations(flags, 2) if pair[1].startswith(pair[0])]


def test_an_old_spelling_works_and_prints_a_line_that_names_the_new_one(capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser(renamed={"--out": "--output"})
    parser.add_argument("--output")
    for arguments in (["--out", "a"], ["--out=a"]):
        assert parser.parse_args(arguments).output == "a"
        assert capsys.readouterr().err == "fastres: --out is now --output; the old spelling works for one version\n"
    assert parser.parse_args(["--output", "--out"[2:]]).output == "out"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("old", RENAMED_FLAGS)
def test_an_old_spelling_of_trains_flags_works(old: str) -> None:
    new = RENAMED_FLAGS[old]
    assert new in flags_of("fastres.train") and old not in help_of("fastres.train")
    before, now = (run_module("fastres.train", flag, cwd=ROOT) for flag in (old, new))
    assert (before.returncode, before.stdout) == (now.returncode, now.stdout) == (0, now.stdout) and now.stdout
    assert before.stderr == f"fastres: {old} is now {new}; the old spelling works for one version\n" + now.stderr


def test_the_kernels_report_takes_the_old_spelling_of_output(tmp_path: Path) -> None:
    done = run_module("fastres_kernels.report", "--json", tmp_path / "x.json", "--only", "nothing", cwd=ROOT)
    assert "fastres_kernels: --json is now --output; the old spelling works for one version" in done.stderr
