"""Deliberate faults of one line each, and the tests that catch them: see `python -m tests.faults --help`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

HEADING = "## The faults"  # in docs/testing.md, above the table


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A replacement of one text in one file, which the tests of that file's area have to notice."""

    name: str  # what is wrong
    file: str
    old: str  # occurs exactly once in the file
    new: str
    tests: str  # pytest's arguments
    caught_by: str  # the first test that fails: file::function

    def applied_to(self, folder: Path) -> str:
        """Return the content of the file in `folder` with the fault. Raise ValueError if the old text is not unique."""
        content = (folder / self.file).read_text(encoding="utf-8")
        if (found := content.count(self.old)) != 1:
            raise ValueError(f"fault {self.name!r}: {self.file} has its old text {found} times, not once")
        return content.replace(self.old, self.new)


def load_faults() -> list[Fault]:
    """Return the faults of faults.yaml in their order."""
    entries = yaml.safe_load(Path(__file__).with_name("faults.yaml").read_text(encoding="utf-8"))
    return [Fault(**entry) for entry in entries]


def table(faults: list[Fault]) -> str:
    """Return the faults as a table in Markdown, as docs/testing.md has it."""
    rows = [f"| {fault.name} | `{fault.file}` | `{fault.caught_by}` |" for fault in faults]
    return "\n".join(["| fault | file | caught by |", "|---|---|---|", *rows]) + "\n"


def section(document: str) -> str:
    """Return the text between HEADING and the next heading of a document, or "" if it has no such heading."""
    return document.partition(f"\n{HEADING}\n")[2].partition("\n## ")[0].strip("\n")
