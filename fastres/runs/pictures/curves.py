"""The curves of runs: loss and accuracy over the steps or the training time, with a band for several seeds."""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastres.runs.history import AGAINST, PANELS
from fastres.runs.pictures import style
from fastres.runs.pictures.facts import UNKNOWN, RunFacts
from fastres.utils.suggest import few

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend

MOST_NAMED = 3  # models, data sets or devices in a title
LOG_FROM = 3.0  # ratio of the largest to the smallest loss
TIME_UNITS = ((3 * 3600.0, 3600.0, "h"), (5 * 60.0, 60.0, "min"), (0.0, 1.0, "s"))  # (from s, s of a unit, unit)
LINE: dict[str, Any] = {"linewidth": 1.5, "markersize": 4.5}
LEGEND_ROW = 0.17  # inches
BAND = "Of several seeds, the line is the mean; the band and the brackets go from the smallest to the largest."


@dataclass(frozen=True)
class Curve:
    """A line of the picture: a run, or the mean of runs that differ only in their seeds."""

    label: str
    runs: list[RunFacts]  # with evaluations at the same steps, if there are several

    def values(self, column: str) -> list[list[float]]:
        """Return the values of a column, for each evaluation those of all runs."""
        return [[row[column] for row in rows] for rows in zip(*(run.history for run in self.runs), strict=True)]

    def mean(self, column: str) -> list[float]:
        """Return the mean over the runs for each evaluation."""
        return [statistics.fmean(of_runs) for of_runs in self.values(column)]

    def extremes(self, column: str) -> tuple[list[float], list[float]]:
        """Return the smallest and the largest value of all runs for each evaluation, NaN if one is NaN."""
        values = [[math.nan] if any(map(math.isnan, of_runs)) else of_runs for of_runs in self.values(column)]
        return [min(of_runs) for of_runs in values], [max(of_runs) for of_runs in values]

    @property
    def legend(self) -> str:
        """Return the line of the legend: the name and the final test accuracy."""
        accuracies = [run.accuracy for run in self.runs if run.accuracy is not None]
        if len(self.runs) == 1 or len(accuracies) < len(self.runs):
            return f"{self.label}: {self.runs[0].result if len(self.runs) == 1 else 'unfinished'}"
        return f"{self.label}: {statistics.fmean(accuracies):.4f} ({min(accuracies):.4f} to {max(accuracies):.4f})"


def curves_of(runs: Sequence[RunFacts], against: str = "step", *, separate: bool = False) -> list[Curve]:
    """Return the lines to draw.

    Runs that differ only in their seeds are one line. If two of them have the same seed, they are compared for another
    reason, such as a change of the code, so the second one belongs to another line.

    Args:
        runs: the runs, in the order of the legend.
        against: one of AGAINST; over the training time, only runs of the same device are one line.
        separate: draw a line for each run.
    """
    groups: dict[object, list[RunFacts]] = {}
    repeated: Counter[tuple[str, ...]] = Counter()
    for run in runs:
        key: object = id(run)
        if run.settings and not separate:
            same = (run.configuration(), run.text("device") if against == "time" else "")
            key = same, repeated[*same, run.seed]
            repeated[*same, run.seed] += 1
        groups.setdefault(key, []).append(run)
    names = [run.name for run in runs]
    curves = []
    for group in groups.values():
        if len(group) > 1:
            curves.append(Curve(f"{_common_name(group)}, {len(group)} seeds", group))
        else:
            name = group[0].name if names.count(group[0].name) == 1 else str(group[0].folder)
            curves.append(Curve(style.shorten(name), group))
    labels = [curve.label for curve in curves]
    return [
        curve if labels.count(curve.label) == 1 else Curve(f"{curve.label} ({curve.runs[0].name} …)", curve.runs)
        for curve in curves
    ]


def _common_name(runs: Sequence[RunFacts]) -> str:
    """Return the common beginning of the runs' names without the word seed at its end, or the network's name."""
    names = [run.name for run in runs]
    same = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    common = "".join(letters[0] for letters in same)
    if any(name[len(common) :][:1].isdigit() for name in names):
        common = common.rstrip("0123456789")  # seed1 and seed10 have the 1 in common
    common = re.sub(r"[-_.= ]*(seeds?)?[-_.= ]*$", "", common, flags=re.IGNORECASE)
    return style.shorten(common or runs[0].model)


# ---- the picture ------------------------------------------------------------------------------------------------


def plot_curves(curves: Sequence[Curve], path: Path, against: str = "step") -> None:
    """Draw train and evaluation loss and accuracy in 2 x 2 panels, below a title and a legend.

    Args:
        curves: the lines; at least one run has an evaluation.
        path: the picture's file, whose suffix is the format.
        against: one of AGAINST.

    Raises:
        OSError: if the file cannot be written.
        ValueError: if matplotlib does not know the format.
    """
    title, subtitle = titles(curves)
    legend = has_legend(curves)
    longest = max(len(curve.legend) for curve in curves)
    columns = max(1, min(len(curves), int(10.6 / (0.6 + 0.068 * longest))))
    rows = math.ceil(len(curves) / columns) + any(len(curve.runs) > 1 for curve in curves) if legend else 0
    # Inches from the top, because matplotlib's own layouts draw everything twice.
    width, header = 11.0, 0.8 + LEGEND_ROW * rows + (0.1 if rows else 0.0)
    height = header + 6.7
    figure = style.new_figure(width, height)
    figure.subplots_adjust(left=0.065, right=0.98, top=1 - (header + 0.15) / height, bottom=0.55 / height, wspace=0.15,
                           hspace=0.2)  # fmt: skip
    text: dict[str, Any] = {"color": style.INK, "va": "top", "parse_math": False}
    figure.text(0.02, 1 - 0.14 / height, title, fontsize=13, fontweight="bold", **text)
    figure.text(0.02, 1 - 0.44 / height, subtitle, fontsize=9.5, **text)
    panels = figure.subplots(2, 2, sharex=True)
    for axes, (column, name) in zip(panels.flat, panel_titles(curves), strict=True):
        draw_panel(axes, curves, column, against)
        axes.set_title(name, fontsize=11)
    for axes in panels[0]:
        axes.set_xlabel("")
    if legend:
        add_legend(figure, curves, columns, (0.012, 1 - 0.66 / height))
    style.save(figure, path)


def titles(curves: Sequence[Curve]) -> tuple[str, str]:
    """Return the title, with the network, the data and the result, and a line with the device and the length."""
    runs = [run for curve in curves for run in curve.runs]
    what = f"{_all(run.model for run in runs)} on {_all(run.data for run in runs)}".removesuffix(f" on {UNKNOWN}")
    if len(runs) == 1:
        run = runs[0]
        title = f"{what}: " + ("test accuracy " if run.accuracy is not None else "") + run.result
    else:
        title = f"{what}: {len(runs)} runs"
    parts = [_all(run.text("device") for run in runs), _all(run.precision for run in runs)]
    for unit, values in (("steps", (run.steps for run in runs)), ("seed", (run.seed for run in runs))):
        known = _all(values)
        if known != UNKNOWN and (unit == "steps" or len(runs) == 1):
            parts.append(f"{known.replace(', ', ' / ')} steps" if unit == "steps" else f"seed {known}")
    if len(runs) == 1:
        parts.append(style.shorten(runs[0].name))
    else:
        parts.append("final test accuracies in the legend")
    return title, " · ".join(part for part in parts if part != UNKNOWN)


def _all(values: Iterable[str]) -> str:
    """Return the different values, of many the first."""
    known = [style.shorten(value, 40) for value in dict.fromkeys(values) if value != UNKNOWN]
    return few(known, MOST_NAMED) or UNKNOWN


def panel_titles(curves: Sequence[Curve]) -> list[tuple[str, str]]:
    """Return the column and the title of each panel."""
    splits = {row["eval_split"] for curve in curves for run in curve.runs for row in run.history}
    split = " / ".join(sorted(splits)) or "validation"
    return [(column, title.format(split)) for column, title in PANELS]


def has_legend(curves: Sequence[Curve]) -> bool:
    """Return True unless the title says all that a legend would say."""
    return len(curves) > 1 or len(curves[0].runs) > 1


def draw_panel(axes: Axes, curves: Sequence[Curve], column: str, against: str) -> None:
    """Draw a column of the histories, with the labels of the axes."""
    x_column, x_label = AGAINST[against]
    longest = max((x for curve in curves for x in curve.mean(x_column)), default=0.0)
    unit_s, unit = 1.0, ""
    if against == "time":
        unit_s, unit = next((size, name) for least, size, name in TIME_UNITS if longest >= least)
    drawn: list[float] = []
    for i, curve in enumerate(curves):
        x, y = [value / unit_s for value in curve.mean(x_column)], curve.mean(column)
        every = max(1, len(x) // 8)
        how = style.line_style(i)
        # A single line needs no markers, unless it has too few points for a line.
        marked = len(curves) > 1 or len(x) < 3
        axes.plot(x, y, **LINE, markevery=(i % every, every),
                  **how | ({} if marked else {"marker": None}))  # fmt: skip
        drawn += y
        if len(curve.runs) > 1:
            low, high = curve.extremes(column)
            axes.fill_between(x, low, high, color=how["color"], alpha=0.2, linewidth=0)
            drawn += low + high
    style.tidy(axes)
    axes.set_xlabel(f"{x_label}, {unit}" if unit else x_label, fontsize=9.5)
    _set_x_ticks(axes, whole=against == "step")
    if "loss" in column:
        _set_loss_scale(axes, [value for value in drawn if math.isfinite(value)])


def _set_x_ticks(axes: Axes, *, whole: bool) -> None:
    """Set ticks with thousands separators, at whole numbers for steps."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=whole, steps=[1, 2, 2.5, 5, 10], min_n_ticks=1))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def _set_loss_scale(axes: Axes, values: Sequence[float]) -> None:
    """Set a logarithmic axis if the loss falls by a large factor, with labels between the powers of ten.

    On a linear axis the first evaluations would take all the height, and late differences could not be seen. A loss
    that hardly changes, or that is zero, stays on a linear axis.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if not values or min(values) <= 0 or max(values) / min(values) < LOG_FROM:
        return
    decades = math.log10(max(values)) - math.log10(min(values))
    axes.set_yscale("log")
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(plain)
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5, 7) if decades < 1.2 else (2, 5)))
    axes.yaxis.set_minor_formatter(plain if decades < 2.5 else NullFormatter())


def add_legend(figure: Figure, curves: Sequence[Curve], columns: int, corner: tuple[float, float]) -> Legend:
    """Add a legend of all lines, with its upper left corner there, and say in it what the bands are."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    lines = [Line2D([], [], **LINE, **style.line_style(i)) for i in range(len(curves))]
    handles: list[Any] = [
        (Patch(color=line.get_color(), alpha=0.2, linewidth=0), line) if len(curve.runs) > 1 else line
        for line, curve in zip(lines, curves, strict=True)
    ]
    labels = [curve.legend for curve in curves]
    rows = math.ceil(len(curves) / columns)
    legend = figure.legend(
        handles, [str(i) for i in range(len(handles))], loc="upper left", bbox_to_anchor=corner, ncols=columns,
        frameon=False, fontsize=9, handlelength=2.6, columnspacing=1.4, borderpad=0.1, labelspacing=0.35,
    )  # fmt: skip
    style.set_labels(legend, labels)
    if any(len(curve.runs) > 1 for curve in curves):
        at = corner[1] - (0.08 + LEGEND_ROW * rows) / figure.get_figheight()
        figure.text(corner[0] + 0.01, at, BAND, fontsize=9, color=style.INK, va="top", style="italic")
    return legend
