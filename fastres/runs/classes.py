"""The result of an evaluation by class: the accuracy of each class, and the confusion matrix as table and picture."""

from __future__ import annotations

import csv
import io
import math
import unicodedata
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastres.training.metrics import TOP, Evaluation
from fastres.utils.atomic_io import atomic_write, write_text
from fastres.utils.suggest import one_line

NAMED = 3  # classes in the line about the lowest accuracies
NUMBERED = 25  # up to so many classes the picture has numbers
LABELLED = 60  # up to so many classes the picture has the names of the classes
LABEL_LENGTH = 18  # characters of a name in the picture


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
    with atomic_write(folder / "confusion.png") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the font lacks the characters of some languages and draws boxes
        _picture(evaluation, names, title).savefig(file, dpi=130, format="png")


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


def _picture(evaluation: Evaluation, names: Sequence[str], title: str) -> Any:
    """Return a figure of the confusion matrix: for each class, the shares of the predicted classes in per cent."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    counts, classes = evaluation.confusion, len(names)
    percent = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    short = [name if len(name) <= LABEL_LENGTH else name[: LABEL_LENGTH - 1] + "…" for name in names]
    # Inches, because matplotlib's own layouts draw everything twice.
    side = min(max(1.5 + 0.45 * classes, 4.5), 13.0)
    longest = max(map(_width, short)) if classes <= LABELLED else 4
    upright = longest * classes > 40  # names below the columns are turned
    left = 0.7 + 0.085 * longest
    below = left if upright else 0.7
    width, height = left + side + 1.3, below + side + 0.5
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((left / width, below / height, side / width, side / height))
    norm = PowerNorm(0.5, 0, 100)  # the square root, so that an error of a few per cent can be seen
    image = axes.imshow(percent, cmap="Blues", norm=norm)
    axes.set_title(title, fontsize=11, parse_math=False)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("class")
    if classes <= LABELLED:
        # No formulas in names, which may have a dollar sign.
        style: dict[str, Any] = {"fontsize": 9 if classes <= NUMBERED else 7, "parse_math": False}
        axes.set_xticks(range(classes), short, rotation=90 if upright else 0, **style)
        axes.set_yticks(range(classes), short, **style)
    if classes <= NUMBERED:
        for row, column in np.argwhere(counts):
            value = percent[row, column]
            text = f"{value:.0f}" if value >= 0.95 else f"{value:.1f}"
            axes.text(column, row, text, ha="center", va="center", fontsize=8,
                      color="white" if norm(value) > 0.6 else "black")  # fmt: skip
    beside = figure.add_axes(((left + side + 0.2) / width, below / height, 0.2 / width, side / height))
    bar = figure.colorbar(image, cax=beside, ticks=[0, 1, 5, 10, 25, 50, 75, 100])
    bar.set_label("share of the class's images, %")
    return figure


def _width(text: str) -> int:
    """Return the width of a text in narrow characters."""
    return sum(2 if unicodedata.east_asian_width(c) in "FW" else 1 for c in text)
