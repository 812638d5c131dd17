"""`python -m fastres.plot RUN...`: plot the curves of one or several runs and print their final accuracies."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastres.runs.history import AGAINST, plot_curves, read_history
from fastres.utils.atomic_io import parse_json
from fastres.utils.errors import Parser, UsageError, run_command, user_path


def table_of(runs: list[Path]) -> Table:
    """Return a table with a row for each run, with the final test accuracy if the run is finished."""
    table = Table(title="final test accuracy")
    for column in ("run", "model", "parameters", "steps", "seed", "test accuracy", "test loss", "train time"):
        table.add_column(column, justify="left" if column in ("run", "model") else "right", no_wrap=column == "run")
    for run in runs:
        try:
            s = parse_json((run / "summary.json").read_text(encoding="utf-8"))
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
            cells = [*["–"] * 6, "invalid summary"]
        table.add_row(*map(escape, (run.name, *cells)))  # a name such as [/x] must not count as markup
    return table


def parser() -> Parser:
    """Return the command line's parser."""
    parser = Parser("plot", description=__doc__.partition(": ")[2])
    parser.add_argument("runs", nargs="+", type=user_path, metavar="RUN", help="folder of a run")
    parser.add_argument("--output", type=user_path, metavar="FILE", help="picture to write (default: history.png in "
                        "the run, or comparison.png in this directory for several)")  # fmt: skip
    parser.add_argument("--against", choices=AGAINST, default="step", help="x-axis of the curves (default: step)")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Plot the runs that the command line names."""
    arguments = parser().parse_args(argv)
    runs: list[Path] = arguments.runs
    output = arguments.output or (runs[0] / "history.png" if len(runs) == 1 else Path("comparison.png"))
    names = [run.name for run in runs] if len({run.name for run in runs}) == len(runs) else [str(r) for r in runs]
    try:
        plot_curves(dict(zip(names, map(read_history, runs), strict=True)), output, arguments.against)
    except (OSError, ValueError) as error:
        raise UsageError(f"--output {output}: cannot be written ({error}); choose another") from None
    Console(width=None if sys.stdout.isatty() else 120).print(table_of(runs))
    print(f"curves: {output}")


if __name__ == "__main__":
    run_command(main)
