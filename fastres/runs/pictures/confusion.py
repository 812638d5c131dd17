"""The picture of a confusion matrix."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastres.runs.pictures import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NUMBERED = 25  # up to so many classes the picture has numbers
LABELLED = 120  # up to so many classes the picture has the names of the classes
LABEL_LENGTH = 18  # characters of a name in the picture


def confusion_figure(counts: Any, names: Sequence[str], title: str) -> Figure:
    """Return a figure of the confusion matrix: for each class, the shares of the predicted classes in per cent.

    The colours are shades of one hue, from white to dark blue, so the order of the values can be seen with any colour
    vision and in grey.

    Args:
        counts: images by class and predicted class, (classes, classes).
        names: the names of the classes.
        title: the title, with the accuracy.
    """
    import numpy as np
    from matplotlib.colors import PowerNorm

    counts, classes = np.asarray(counts), len(names)
    percent = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    short = [style.shorten(name, LABEL_LENGTH) for name in names]
    # Inches, because matplotlib's own layouts draw everything twice.
    side = min(max(1.5 + 0.45 * classes, 4.5), 13.0)
    points = 9.0 if classes <= NUMBERED else max(5.5, min(8.0, 0.85 * 72 * side / classes))  # of the names
    longest = max(map(_width, short)) if classes <= LABELLED else 4
    upright = longest * classes > 40  # names below the columns are turned
    left = 0.7 + 0.0095 * points * longest
    below = left if upright else 0.7
    width, height = left + side + 1.3, below + side + 0.6
    figure = style.new_figure(width, height)
    axes = figure.add_axes((left / width, below / height, side / width, side / height))
    norm = PowerNorm(0.5, 0, 100)  # the square root, so that an error of a few per cent can be seen
    image = axes.imshow(percent, cmap="Blues", norm=norm, interpolation="nearest")
    figure.text(left / width, 1 - 0.2 / height, title, fontsize=12, fontweight="bold", color=style.INK, va="top",
                parse_math=False)  # fmt: skip
    style.tidy(axes)
    axes.grid(visible=False)
    axes.set_xlabel("predicted class", fontsize=10)
    axes.set_ylabel("class", fontsize=10)
    if classes <= LABELLED:
        # No formulas in names, which may have a dollar sign.
        how: dict[str, Any] = {"fontsize": points, "parse_math": False}
        axes.set_xticks(range(classes), short, rotation=90 if upright else 0, **how)
        axes.set_yticks(range(classes), short, **how)
        _add_cells(axes, classes)
    if classes <= NUMBERED:
        _add_numbers(axes, counts, percent, norm)
    beside = figure.add_axes(((left + side + 0.2) / width, below / height, 0.2 / width, side / height))
    bar = figure.colorbar(image, cax=beside, ticks=[0, 1, 5, 10, 25, 50, 75, 100])
    bar.set_label("share of the class's images, %", color=style.INK)
    bar.ax.tick_params(color=style.INK, labelcolor=style.INK)
    return figure


def _add_cells(axes: Axes, classes: int) -> None:
    """Draw thin lines between the cells, along which the eye finds the names."""
    edges = [i + 0.5 for i in range(classes - 1)]
    axes.set_xticks(edges, minor=True)
    axes.set_yticks(edges, minor=True)
    axes.grid(which="minor", color="#9aa4b0", alpha=0.35, linewidth=0.5)
    axes.tick_params(which="minor", length=0)


def _add_numbers(axes: Axes, counts: Any, percent: Any, norm: Any) -> None:
    """Write each share that is not zero into its cell."""
    for row, line in enumerate(counts):
        for column in line.nonzero()[0]:
            value = percent[row, column]
            text = f"{value:.0f}" if value >= 0.95 else f"{value:.1f}"
            axes.text(column, row, text, ha="center", va="center", fontsize=9,
                      color="white" if norm(value) > 0.6 else "black")  # fmt: skip


def _width(text: str) -> int:
    """Return the width of a text in narrow characters."""
    return sum(2 if unicodedata.east_asian_width(c) in "FW" else 1 for c in text)
