"""The result of an evaluation by class: the accuracy of each class, and the confusion matrix as table and picture."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fastres.runs.pictures import style
from fastres.runs.pictures.confusion import confusion_figure
from fastres.training.metrics import TOP, Evaluation
from fastres.utils.atomic_io import write_text
from fastres.utils.suggest import one_line

NAMED = 3  # classes in the line about the lowest accuracies


def accuracy_lines(evaluation: Evaluation, names: Sequence[str]) -> list[str]:
    """Return lines with the top-5 accuracy, if there are ten classes or more, and the lowest accuracies of classes."""
    lines = []
    if (top := evaluation.top_accuracy) is not None:
        lines.append(f"top-{TOP} accuracy {top:.4f}")
    by_class = [(accuracy, name) for name, accuracy in zip(names, evaluation.class_accuracy, strict=True)
                if not math.isnan(accuracy)]  # fmt: skip
    listed = ", ".join(
        f"{name} ({accuracy:.4f})" for accuracy, name in sorted(by_class, key=lambda row: row[0])[:NAMED]
    )
    few = len(by_class) <= NAMED
    lines.append(f"accuracy by class: {listed}" if few else f"lowest accuracies of {len(by_class):,} classes: {listed}")
    return lines


def output_names(classes: Sequence[str], outputs: int) -> list[str]:
    """Return the names of a network's outputs, of which there may be more than classes (model.num_classes)."""
    return [*classes, *(f"output {i}" for i in range(len(classes), outputs))]


def write_classes(evaluation: Evaluation, names: Sequence[str], folder: Path, what: str) -> None:
    """Write classes.csv, confusion.csv and confusion.png into a folder.

    Args:
        evaluation: the evaluation of a split.
        names: the names of the network's outputs.
        folder: the folder, which exists.
        what: the network's name, for the title of the picture.

    Raises:
        OSError: if the folder cannot be written.
    """
    names = [one_line(name) for name in names]
    counts = evaluation.confusion
    _write_csv(folder / "classes.csv", ("class", "samples", "correct", "accuracy", "most_often_taken_for"), (
        (name, row.sum(), row[i], f"{row[i] / row.sum():.6f}" if row.any() else "", _mistaken(row, i, names))
        for i, (name, row) in enumerate(zip(names, counts, strict=True))
    ))  # fmt: skip
    rows = ((name, *row) for name, row in zip(names, counts.tolist(), strict=True))
    _write_csv(folder / "confusion.csv", ("class \\ predicted", *names), rows)
    title = f"{what}: test accuracy {evaluation.accuracy:.4f}, {evaluation.samples:,} images"
    style.save(confusion_figure(counts, names, title), folder / "confusion.png")


def _mistaken(row: Any, i: int, names: Sequence[str]) -> str:
    """Return the wrong class that was predicted most often for samples of class i, or nothing if all are correct."""
    wrong = row.copy()
    wrong[i] = 0
    return names[wrong.argmax()] if wrong.any() else ""


def _write_csv(path: Path, header: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    table = io.StringIO(newline="")
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_text(path, table.getvalue())
