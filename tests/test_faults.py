"""The list of faults fits the code, the tests and docs/testing.md. `python -m tests.faults` introduces the faults."""

from __future__ import annotations

import ast
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.commands import ROOT
from tests.faults import Fault, load_faults, section, table
from tests.faults.__main__ import main

FAULTS = load_faults()
COUNT = 56

each_fault = pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name.replace(" ", "_"))


def files_of(arguments: str) -> list[Path]:
    """Return the files among pytest's arguments."""
    return [ROOT / word for word in shlex.split(arguments) if word.startswith("tests/")]


def parts() -> Iterator[Path]:
    """Yield every package and every command, relative to the checkout."""
    for path in sorted((ROOT / "fastres").iterdir()):
        if (path / "__init__.py").is_file() or (path.suffix == ".py" and path.stem != "__init__"):
            yield path.relative_to(ROOT)
    for folder in ("kernels/batchnorm", "kernels/cpu", "kernels/experimental", "bench/lib"):
        yield Path(folder)


def test_they_have_different_names() -> None:
    assert len(FAULTS) == len({fault.name for fault in FAULTS}) == COUNT


@each_fault
def test_a_fault_replaces_one_text_of_one_line(fault: Fault) -> None:
    faulty, right = fault.applied_to(ROOT), (ROOT / fault.file).read_text(encoding="utf-8")
    assert faulty != right
    assert fault.old and "\n" not in fault.old + fault.new
    if fault.file.endswith(".py"):
        assert ast.dump(ast.parse(faulty)) != ast.dump(ast.parse(right))  # it is code, and no comment


@each_fault
def test_the_test_that_catches_a_fault_is_among_those_that_run(fault: Fault) -> None:
    file, _, function = fault.caught_by.partition("::")
    assert files_of(fault.tests) and ROOT / file in files_of(fault.tests)
    assert all(path.is_file() for path in files_of(fault.tests))
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("part", list(parts()), ids=str)
def test_every_package_and_command_has_a_fault(part: Path) -> None:
    assert any(Path(fault.file).is_relative_to(part) for fault in FAULTS)


def test_the_document_has_the_table_of_faults() -> None:
    document = (ROOT / "docs/testing.md").read_text(encoding="utf-8")
    assert section(document) == table(FAULTS).strip(), "write `python -m tests.faults --list` into it"


def test_a_fault_that_does_not_apply_is_named(tmp_path: Path) -> None:
    fault = replace(FAULTS[0], file="code.py", old="a + b")
    for content, times in (("a - b\n", 0), ("a + b\na + b\n", 2)):
        (tmp_path / "code.py").write_text(content)
        with pytest.raises(ValueError, match=rf"{fault.name}.*code\.py has its old text {times} times"):
            fault.applied_to(tmp_path)


def test_a_fault_that_does_not_exist_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(COUNT + 1)]) == main(["no such fault"]) == 2
    assert (
        f"'no such fault' is neither a number from 1 to {COUNT} nor a part of a fault's name" in capsys.readouterr().err
    )
