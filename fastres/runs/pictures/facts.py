"""Facts of a run for pictures and reports, read from its folder."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastres.config.files import rename_values
from fastres.config.formats import read_yaml
from fastres.config.schema import MAY_CHANGE, SECTIONS, Config, to_dict
from fastres.runs.history import read_progress
from fastres.utils.atomic_io import parse_json

UNKNOWN = "–"
OF_ONE_RUN = ("run.seed", "run.dir", "run.resume")  # settings in which seeds of one configuration differ


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """A run's history, and the content of its other files, each empty if it is missing or damaged."""

    folder: Path
    name: str
    history: list[dict[str, Any]]
    summary: dict[str, Any]
    settings: dict[str, Any]  # by section.field, with the defaults of the fields that config.yaml lacks
    environment: dict[str, Any]

    def text(self, *names: str) -> str:
        """Return the first of these that is known, of the summary, the settings and the environment, as text."""
        for name in names:
            for source in (self.summary, self.settings, self.environment):
                if isinstance(value := source.get(name), str | int | float) and value != "":
                    return f"{value:,}" if type(value) is int else str(value)
        return UNKNOWN

    def number(self, name: str) -> float | None:
        """Return a number of the summary, or None if it has no such number."""
        value = self.summary.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return None
        return float(value)

    @property
    def model(self) -> str:
        """Return the network's name."""
        return self.text("model", "model.name")

    @property
    def data(self) -> str:
        """Return the name of the data's source."""
        return self.text("data", "data.source")

    @property
    def precision(self) -> str:
        """Return the precision of the computation."""
        return self.text("precision", "engine.precision")

    @property
    def seed(self) -> str:
        """Return the seed."""
        return self.text("seed", "run.seed")

    @property
    def steps(self) -> str:
        """Return the steps that the run has, or is to have."""
        return self.text("steps", "train.steps")

    @property
    def accuracy(self) -> float | None:
        """Return the final test accuracy, or None for a run that has not finished."""
        return self.number("test_accuracy")

    @property
    def result(self) -> str:
        """Return the final test accuracy, or how far the run is."""
        if self.accuracy is not None:
            return f"{self.accuracy:.4f}"
        done = f"{self.history[-1]['step']:,.0f}" if self.history else "0"
        return f"unfinished, step {done}" + (f" of {self.steps}" if self.steps != UNKNOWN else "")

    def configuration(self) -> str:
        """Return a text that is equal for runs that differ only in their seeds: settings, precision and evaluations."""
        kept = {key: value for key, value in self.settings.items() if key not in MAY_CHANGE and key not in OF_ONE_RUN}
        steps = [row["step"] for row in self.history]
        splits = sorted({row["eval_split"] for row in self.history})
        return json.dumps([kept, self.precision, steps, splits], sort_keys=True, default=str)


@dataclass(frozen=True)
class Classes:
    """The confusion matrix of a run's last evaluation."""

    names: list[str]
    counts: list[list[int]]  # by class and predicted class

    def rows(self) -> list[tuple[str, int, int, float | None, str]]:
        """Return the name, images, correct ones, accuracy and most frequent mistake of each class."""
        rows = []
        for i, (name, row) in enumerate(zip(self.names, self.counts, strict=True)):
            wrong = [0 if j == i else n for j, n in enumerate(row)]
            mistake = self.names[wrong.index(max(wrong))] if any(wrong) else ""
            rows.append((name, sum(row), row[i], row[i] / sum(row) if any(row) else None, mistake))
        return rows

    def mistakes(self, most: int) -> list[tuple[str, str, int, float]]:
        """Return the most frequent mistakes: class, predicted class, images, and their share of the class."""
        found = [
            (self.names[i], self.names[j], n, n / sum(row))
            for i, row in enumerate(self.counts)
            for j, n in enumerate(row)
            if n and i != j
        ]
        return sorted(found, key=lambda mistake: (-mistake[2], -mistake[3]))[:most]

    @property
    def samples(self) -> int:
        """Return the number of images."""
        return sum(map(sum, self.counts))

    @property
    def accuracy(self) -> float:
        """Return the fraction of images whose class is predicted."""
        return sum(row[i] for i, row in enumerate(self.counts)) / max(1, self.samples)


def read_facts(folder: Path, summary: dict[str, Any] | None = None) -> RunFacts:
    """Read what is known of a run.

    Args:
        folder: the run's folder.
        summary: the content of summary.json, if it is not written yet.

    Raises:
        UsageError: if the folder has no evaluation.
    """
    return RunFacts(
        folder=folder,
        name=folder.name or folder.resolve().name,
        history=read_progress(folder),
        summary=summary or _mapping(folder / "summary.json", parse_json),
        settings=_settings(_mapping(folder / "config.yaml", read_yaml)),
        environment=_mapping(folder / "env.json", parse_json),
    )


def read_classes(folder: Path) -> Classes | None:
    """Return the content of confusion.csv, or None if it is missing or damaged."""
    try:
        with (folder / "confusion.csv").open(newline="", encoding="utf-8") as file:
            header, *rows = csv.reader(file)
        names, counts = header[1:], [[int(n) for n in row[1:]] for row in rows]
    except (OSError, ValueError, csv.Error):
        return None
    square = len(counts) == len(names) and all(len(row) == len(names) and min(row) >= 0 for row in counts)
    return Classes(names, counts) if names and square else None


def _mapping(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    """Return the mapping that a file contains, or an empty one if the file is missing or damaged."""
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _settings(content: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration by section.field, or nothing if there is none."""
    if not content or not all(isinstance(content.get(section, {}), dict) for section in SECTIONS):
        return {}
    content = rename_values(content)
    defaults = to_dict(Config())
    flat = {"recipe": content.get("recipe", defaults["recipe"])}
    for section in SECTIONS:
        flat |= {f"{section}.{name}": v for name, v in (defaults[section] | content.get(section, {})).items()}
    return flat
