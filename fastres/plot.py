"""`python -m fastres.plot RUN...`: the four curves of one run or of several overlaid, and the final accuracies."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastres.utils.atomic_io import atomic_write
from fastres.utils.errors import Parser, UsageError, run_command

PANELS = (  # (column, title): rows loss and accuracy, columns train and validation
    ("train_loss", "train loss"),
    ("eval_loss", "{} loss"),
    ("train_accuracy", "train accuracy"),
    ("eval_accuracy", "{} accuracy"),
)
SPLITS = ("test", "validation")
AGAINST = {"step": ("step", "step"), "time": ("train_time_s", "training time, s")}  # (column, what it says)


def read_history(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's history.csv, numbers as float."""
    try:
        with (run / "history.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        history = [{k: v if k == "eval_split" else float(v) for k, v in row.items()} for row in rows]
        needed = {"step", "train_time_s", "eval_split", *(column for column, _ in PANELS)}
        if not all(needed <= row.keys() and row["eval_split"] in SPLITS for row in history):
            raise ValueError("a column is not there")
        return history
    except FileNotFoundError:
        raise UsageError(
            f"{run} holds no history.csv: give folders of runs that have evaluated at least once"
        ) from None
    except OSError as error:
        raise UsageError(f"cannot read {run / 'history.csv'}: {error.strerror}") from None
    except (ValueError, TypeError, csv.Error):
        raise UsageError(f"{run / 'history.csv'} is not a history of fastres") from None


def plot_curves(runs: dict[str, list[dict[str, Any]]], path: Path, against: str = "step") -> None:
    """Draws train and validation loss and accuracy, 2 x 2, a line for each named history; `against`: one of AGAINST."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # not pyplot: no window, no global state
    from matplotlib.ticker import LogLocator

    x, label = AGAINST[against]
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    splits = {row["eval_split"] for rows in runs.values() for row in rows}
    split = " / ".join(sorted(splits)) or "validation"
    for axes, (column, title) in zip(figure.subplots(2, 2, sharex=True).flat, PANELS, strict=True):
        for name, rows in runs.items():
            axes.plot(
                [row[x] for row in rows],
                [row[column] for row in rows],
                label=name,
                linewidth=1.4,
                marker="o" if len(rows) < 3 else None,
            )
        axes.set_title(title.format(split))
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
        if "loss" in column and all(row[column] > 0 for rows in runs.values() for row in rows):
            axes.set_yscale("log")
            axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}")
        if len(runs) > 1:
            axes.legend()
    with atomic_write(path) as file:
        figure.savefig(file, dpi=130, format=path.suffix.removeprefix(".") or "png")


def table_of(runs: list[Path]) -> Table:
    """Final test accuracy of each run that has ended."""
    table = Table(title="final test accuracy")
    for column in ("run", "model", "parameters", "steps", "seed", "test accuracy", "test loss", "train time"):
        table.add_column(
            column, justify="left" if column in ("run", "model") else "right", no_wrap=column == "run"
        )
    for run in runs:
        try:
            s = json.loads((run / "summary.json").read_text(encoding="utf-8"))
            cells = [
                str(s["model"]),
                f"{s['parameters']:,}",
                f"{s['steps']:,}",
                str(s["seed"]),
                f"{s['test_accuracy']:.4f}",
                f"{s['test_loss']:.4f}",
                f"{s['train_time_s']:.0f} s",
            ]
        except FileNotFoundError:
            cells = [*["–"] * 6, "not finished"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            cells = [*["–"] * 6, "no summary of fastres"]
        table.add_row(*map(escape, (run.name, *cells)))  # a name such as [/x] is no markup
    return table


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="fastres.plot", description=__doc__.partition(": ")[2])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--output", type=Path, metavar="FILE", help="picture to write (default: history.png in the "
                        "run, or comparison.png here for several)")  # fmt: skip
    parser.add_argument(
        "--against", choices=AGAINST, default="step", help="what the curves are over (default: step)"
    )
    arguments = parser.parse_args(argv)
    runs: list[Path] = arguments.runs
    output = arguments.output or (runs[0] / "history.png" if len(runs) == 1 else Path("comparison.png"))
    names = (
        [run.name for run in runs] if len({run.name for run in runs}) == len(runs) else [str(r) for r in runs]
    )
    try:
        plot_curves(dict(zip(names, map(read_history, runs), strict=True)), output, arguments.against)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot write {output}: {error}") from None
    Console(width=None if sys.stdout.isatty() else 120).print(table_of(runs))
    print(f"curves: {output}")


if __name__ == "__main__":
    run_command(main)
