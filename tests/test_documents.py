"""The documents agree with the code: README's length, and the links, commands, flags and paths that documents name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from fastres.__main__ import COMMANDS
from fastres.config.schema import FIELDS, SECTIONS
from tests.commands import ROOT

# CHANGELOG.md is left out, because it also names what older versions had.
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", ".github/PULL_REQUEST_TEMPLATE.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
MOST_WORDS = 1_000  # in README.md

IMPORTED_FROM = {"fastres": "fastres", "fastres_kernels": "kernels", "bench": "bench", "tests": "tests"}
TOP_FOLDERS = ("fastres", "kernels", "bench", "tests", "docs", "examples", ".ci")
SOURCE_SUFFIXES = (".py", ".cpp", ".sh", ".sbatch")

LINK = re.compile(r"\]\(([^)\s]+)\)")
MODULE = re.compile(rf"-m\s+((?:{'|'.join(IMPORTED_FROM)})(?:\.\w+)+)")
SUBCOMMAND = re.compile(r"^(?:\S*/|.*<\(|(?:\w+=\S+ )+)?fastres (\w+)", re.MULTILINE)
LONG_FORM = re.compile(r"python3? -m\s+fastres\.\w+")
FLAG = re.compile(rf"--((?:{'|'.join(SECTIONS)})(?:\.\w+)+)")
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
IN_BACKTICKS = re.compile(r"`([^`]+)`")
PATH = re.compile(r"[\w.*-]+(?:/[\w.*-]+)*/?")
HEADING_IN_CODE = re.compile(r'docs/EXPERIMENTS\.md,\s+"([^"]+)"')

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


def assert_none(wrong: list[str], document: Path) -> None:
    assert not wrong, f"{document.relative_to(ROOT)}: {', '.join(dict.fromkeys(wrong))}"


def is_a_module(name: str) -> bool:
    """Return True if `python -m NAME` finds a module of this checkout."""
    package, *rest = name.split(".")
    path = ROOT.joinpath(IMPORTED_FROM[package], *rest)
    return path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()


def names_source(text: str) -> bool:
    """Return True for a path in a folder of the checkout and for the name of a source file."""
    if not PATH.fullmatch(text):
        return False
    return (text.split("/")[0] in TOP_FOLDERS and "/" in text) or text.endswith(SOURCE_SUFFIXES)


def exists(path: str) -> bool:
    """Return True if the path, which may have wildcards, exists from the root or from a folder of the code.

    A name without a folder exists if a file of that name is anywhere in the code.
    """
    if "/" not in path:
        return any(True for folder in TOP_FOLDERS for _ in (ROOT / folder).rglob(path))
    return any(True for base in (ROOT, ROOT / "fastres", ROOT / "kernels") for _ in base.glob(path.rstrip("/")))


def unknown_commands(text: str) -> list[str]:
    """Return the words that follow `fastres` in the code of a document and are no command."""
    code = [*IN_BACKTICKS.findall(FENCED.sub("", text)), *FENCED.findall(text)]
    named = [name for part in code for name in SUBCOMMAND.findall(part)]
    return [name for name in named if name not in COMMANDS]


def options_of_models() -> set[str]:
    """Return the names that model.options may have, over all networks."""
    from fastres.models.registry import MODELS, build_model

    builders = [build_model, *(network.load() for network in MODELS.values())]
    return {name for builder in builders for name in inspect.signature(builder).parameters}


def test_the_readme_has_at_most_1000_words() -> None:
    words = len((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert words <= MOST_WORDS


@each_document
def test_every_relative_link_points_to_an_existing_file(document: Path) -> None:
    targets = LINK.findall(document.read_text(encoding="utf-8"))
    local = [target.split("#")[0] for target in targets if not re.match(r"[a-z]+:", target)]
    assert_none([target for target in local if target and not (document.parent / target).exists()], document)


@each_document
def test_every_command_is_a_module(document: Path) -> None:
    named = MODULE.findall(document.read_text(encoding="utf-8"))
    assert_none([name for name in named if not is_a_module(name)], document)


@each_document
def test_every_command_of_the_program_exists(document: Path) -> None:
    assert_none(unknown_commands(document.read_text(encoding="utf-8")), document)


def test_the_check_of_commands_reads_code_in_lines_and_in_blocks() -> None:
    text = (
        "fastres itself: `fastres train`, `.venv/bin/fastres tain`, `OMP_NUM_THREADS=1 fastres traim`\n"
        "```sh\nfastres plott runs/a\nfastres doctor\n```\n"
    )
    assert unknown_commands(text) == ["tain", "traim", "plott"]


def test_readme_alone_has_the_long_form_of_a_command() -> None:
    examples = [path for path in (ROOT / "examples").iterdir() if path.is_file()]
    recipes = [*(ROOT / "fastres/config/recipes").glob("*.yaml")]
    texts = {path.name: path.read_text(encoding="utf-8") for path in [*DOCUMENTS, *examples, *recipes]}
    assert {name for name, text in texts.items() if LONG_FORM.search(text)} == {"README.md"}


@each_document
def test_every_flag_is_a_field_of_the_configuration_or_an_option_of_a_model(document: Path) -> None:
    accepted = {*FIELDS, *(f"model.options.{name}" for name in options_of_models()), "model.options.NAME"}
    flags = FLAG.findall(document.read_text(encoding="utf-8"))
    assert_none([flag for flag in flags if flag not in accepted], document)


@each_document
def test_every_path_in_backticks_exists(document: Path) -> None:
    quoted = IN_BACKTICKS.findall(FENCED.sub("", document.read_text(encoding="utf-8")))
    words = [word for text in quoted for word in text.split()]
    assert_none([word for word in words if names_source(word) and not exists(word)], document)


def test_every_experiment_that_the_code_refers_to_is_a_heading() -> None:
    lines = (ROOT / "docs/EXPERIMENTS.md").read_text(encoding="utf-8").splitlines()
    headings = {line.lstrip("#").strip() for line in lines if line.startswith("#")}
    sources = [path for folder in ("fastres", "kernels", "bench") for path in (ROOT / folder).rglob("*.py")]
    named = {name for path in sources for name in HEADING_IN_CODE.findall(path.read_text(encoding="utf-8"))}
    assert named, "the pattern no longer matches any reference"
    assert named <= headings


@pytest.mark.parametrize(
    ("check", "right", "wrong"),
    [
        (is_a_module, "fastres.train", "fastres.tain"),
        (is_a_module, "fastres_kernels.report", "fastres_kernels.reports"),
        (exists, "kernels/batchnorm/fastest.json", "kernels/fastest.json"),
        (exists, "test_fuzz.py", "test_fuz.py"),
        (exists, "data/sampling.py", "data/permutation.py"),
    ],
)
def test_the_checks_tell_right_from_wrong(check: Callable[[str], bool], right: str, wrong: str) -> None:
    assert check(right)
    assert not check(wrong)
