"""The report of runs as one HTML file: results, settings, curves, confusion matrices and environment.

The file loads nothing and runs no script, which its content security policy also forbids. Jinja escapes every text.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fastres.runs.pictures import curves as pictures
from fastres.runs.pictures import style
from fastres.runs.pictures.confusion import NUMBERED, confusion_figure
from fastres.runs.pictures.curves import Curve
from fastres.runs.pictures.facts import UNKNOWN, RunFacts, read_classes
from fastres.utils.atomic_io import write_text
from fastres.utils.suggest import one_line
from fastres.utils.version import __version__

MISTAKES = 10  # in the table of the most frequent ones
PANEL = (5.6, 3.5)  # inches
NOT_COMPARED = ("run.dir",)  # settings that differ for every run and say nothing


def write_report(curves: Sequence[Curve], path: Path, against: str = "step") -> None:
    """Write the report of all runs of the curves.

    Args:
        curves: the lines of the pictures, from curves_of().
        path: the HTML file.
        against: one of AGAINST.

    Raises:
        OSError: if the file cannot be written.
    """
    runs = [run for curve in curves for run in curve.runs]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    title, subtitle = pictures.titles(curves)
    names = _unique_names(runs)
    settings = _compared(runs, lambda run: {k: v for k, v in run.settings.items() if k not in NOT_COMPARED})
    surroundings = _compared(runs, lambda run: run.environment)
    page = environment.get_template("report.html").render(
        version=__version__,
        title=title,
        subtitle=subtitle.removesuffix(" · final test accuracies in the legend"),
        names=names,
        results=(results := _results(runs, names)),
        result_pairs=list(zip(results[0], results[1][0], strict=True)),
        seeds=_seeds(curves),
        legend=_legend(curves),
        band=pictures.BAND if any(len(curve.runs) > 1 for curve in curves) else "",
        panels=_panels(curves, against),
        different_settings=settings[0],
        same_settings=settings[1],
        different_environment=surroundings[0],
        same_environment=surroundings[1],
        classes=[entry for i, run in enumerate(runs) if (entry := _classes(i, run, names[i]))],
    )
    write_text(path, page)


def _unique_names(runs: Sequence[RunFacts]) -> list[str]:
    """Return a name for each run: its folder's, or the path if there are several of that name."""
    names = [run.name for run in runs]
    return [one_line(run.name if names.count(run.name) == 1 else str(run.folder)) for run in runs]


def _results(runs: Sequence[RunFacts], names: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Return the columns of the table of results, and a row for each run."""
    columns: dict[str, Callable[[RunFacts], str]] = {
        "test accuracy": lambda run: run.result,
        "top-5": lambda run: _number(run.number("test_top5"), ".4f"),
        "test loss": lambda run: _number(run.number("test_loss"), ".4f"),
        "model": lambda run: run.model,
        "parameters": lambda run: run.text("parameters"),
        "data": lambda run: run.data,
        "steps": lambda run: run.steps,
        "seed": lambda run: run.seed,
        "precision": lambda run: run.precision,
        "images/s": lambda run: _number(run.number("images_per_s"), ",.0f"),
        "training": lambda run: _seconds(run.number("train_time_s")),
        "device": lambda run: run.text("device"),
    }
    values = {column: [value(run) for run in runs] for column, value in columns.items()}
    shown = [column for column, of_runs in values.items() if any(value != UNKNOWN for value in of_runs)]
    return ["run", *shown], [[name, *(values[column][i] for column in shown)] for i, name in enumerate(names)]


def _seeds(curves: Sequence[Curve]) -> list[list[str]]:
    """Return a row for each finished configuration with several seeds: n, mean, standard deviation, extremes."""
    rows = []
    for curve in curves:
        accuracies = [run.accuracy for run in curve.runs if run.accuracy is not None]
        if len(accuracies) == len(curve.runs) > 1:
            figures = (statistics.fmean(accuracies), statistics.stdev(accuracies), min(accuracies), max(accuracies))
            rows.append([curve.label, str(len(accuracies)), *(f"{figure:.4f}" for figure in figures)])
    return rows


def _legend(curves: Sequence[Curve]) -> list[tuple[Markup, str]]:
    """Return a piece of its line as SVG, and the text, for each curve; nothing if there is only one run."""
    from matplotlib.lines import Line2D

    entries = []
    for i, curve in enumerate(curves if pictures.has_legend(curves) else ()):
        figure = style.new_figure(0.5, 0.17)
        figure.add_artist(Line2D([0.0, 0.5, 1.0], [0.5] * 3, markevery=[1], **pictures.LINE, **style.line_style(i)))
        entries.append((Markup(style.inline_svg(figure, f"legend-{i}", f"Line {i + 1}")), curve.legend))
    return entries


def _panels(curves: Sequence[Curve], against: str) -> list[tuple[str, Markup]]:
    """Return the title and the SVG of each panel."""
    panels = []
    for column, title in pictures.panel_titles(curves):
        figure = style.new_figure(*PANEL)
        axes = figure.add_axes((0.11, 0.145, 0.87, 0.83))
        pictures.draw_panel(axes, curves, column, against)
        last = "; ".join(f"{curve.label} ends at {curve.mean(column)[-1]:.4f}" for curve in curves)
        panels.append((title, Markup(style.inline_svg(figure, column.replace("_", "-"), f"Curve of {title}: {last}"))))
    return panels


def _compared(
    runs: Sequence[RunFacts], values_of: Callable[[RunFacts], dict[str, Any]]
) -> tuple[list[tuple[str, list[str]]], list[tuple[str, str]]]:
    """Return the keys in whose values runs differ, with the values, and the keys that are the same in all runs."""
    tables = [values_of(run) for run in runs]
    different, same = [], []
    for key in dict.fromkeys(key for table in tables for key in table):
        values = [_value(table[key]) if key in table else UNKNOWN for table in tables]
        if len(set(values)) > 1:
            different.append((key, values))
        else:
            same.append((key, values[0]))
    return different, same


def _classes(i: int, run: RunFacts, name: str) -> dict[str, Any] | None:
    """Return the confusion matrix and the tables of run `i`, or None if it has no confusion.csv."""
    classes = read_classes(run.folder)
    if classes is None:
        return None
    mistakes = classes.mistakes(MISTAKES)
    figure = confusion_figure(classes.counts, classes.names, f"test accuracy {classes.accuracy:.4f}, "
                              f"{classes.samples:,} images")  # fmt: skip
    described = f"Confusion matrix of {len(classes.names)} classes, accuracy {classes.accuracy:.4f}"
    if mistakes:
        described += f"; most often {mistakes[0][0]} is taken for {mistakes[0][1]}, {mistakes[0][2]:,} times"
    return {
        "name": name,
        "accuracy": f"{classes.accuracy:.4f}",
        "large": len(classes.names) > NUMBERED,
        "picture": Markup(style.inline_svg(figure, f"confusion-{i}", described)),
        "mistakes": [(a, b, f"{n:,}", f"{share:.1%}") for a, b, n, share in mistakes],
        "rows": [
            (label, f"{samples:,}", f"{correct:,}", _number(accuracy, ".4f"), mistake or UNKNOWN)
            for label, samples, correct, accuracy, mistake in classes.rows()
        ],
    }


def _value(value: Any) -> str:
    """Return a setting or an entry of the environment as text."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return one_line(" ".join(map(_value, value))) or "[]"
    return one_line(str(value))


def _number(value: float | None, form: str) -> str:
    """Return the value in the format, or a dash."""
    return UNKNOWN if value is None else f"{value:{form}}"


def _seconds(value: float | None) -> str:
    """Return seconds in the largest unit that leaves a number above one."""
    if value is None:
        return UNKNOWN
    size, unit = next((size, unit) for least, size, unit in pictures.TIME_UNITS if value >= least)
    return f"{value / size:,.1f} {unit}"
