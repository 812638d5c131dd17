"""`fastres plot RUN...`: plot the curves of one or several runs and print their final accuracies."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastres.runs.history import AGAINST
from fastres.utils.atomic_io import parse_json
from fastres.utils.errors import Parser, UsageError, run_command, user_path

if TYPE_CHECKING:
    from fastres.runs.pictures.facts import RunFacts

LOG = logging.getLogger(__name__)
BESIDE = Path()  # --html without a file


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


def read_runs(folders: list[Path]) -> list[RunFacts]:
    """Return the facts of the runs, and skip folders without a history with a line on stderr for each.

    Raises:
        UsageError: if no folder has a history.
    """
    from fastres.runs.pictures.facts import read_facts

    runs = []
    for folder in folders:
        try:
            runs.append(read_facts(folder))
        except UsageError as error:
            if len(folders) == 1:
                raise
            LOG.warning("skipped %s", error)
    if not runs:
        raise UsageError(f"none of the {len(folders)} folders holds a history; give folders of runs that have "
                         "evaluated at least once")  # fmt: skip
    return runs


def report_path(value: Path, picture: Path) -> Path:
    """Return the report's file: `value`, or beside the picture if --html has no file.

    Raises:
        UsageError: if the value is no name of a page, so that --html RUN cannot overwrite anything of a run.
    """
    if value == BESIDE:
        return picture.with_suffix(".html")
    if value.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--html {value}: does not end in .html; name the runs first, or give the report's file")
    return value


def parser() -> Parser:
    """Return the command line's parser."""
    parser = Parser("plot", description=__doc__.partition(": ")[2])
    parser.add_argument("runs", nargs="*", type=user_path, metavar="RUN", help="Folder of a run.")
    parser.add_argument("--output", type=user_path, metavar="FILE", help="Picture to write. (default: history.png in "
                        "the run, or comparison.png in this directory for several)")  # fmt: skip
    parser.add_argument("--against", choices=AGAINST, default="step", help="X-axis of the curves. (default: step)")
    parser.add_argument("--separate", action="store_true", help="Draw a line for each run. (default: one line with a "
                        "band for runs that differ only in their seeds)")  # fmt: skip
    parser.add_argument("--html", nargs="?", type=user_path, const=BESIDE, metavar="FILE", help="Also write a report "
                        "as one HTML file, which needs no network: results, settings that differ, curves, confusion "
                        "matrices, environment. The default FILE is the picture's name with .html.")  # fmt: skip
    return parser


def main(argv: list[str] | None = None) -> None:
    """Plot the runs that the command line names."""
    command = parser()
    arguments = command.parse_args(argv)
    folders: list[Path] = arguments.runs
    output = arguments.output or (folders[0] / "history.png" if len(folders) == 1 else Path("comparison.png"))
    html = None if arguments.html is None else report_path(arguments.html, output)
    if not folders:
        command.error("no RUN; give the folder of at least one run")
    runs = read_runs(folders)
    from fastres.runs.pictures.curves import curves_of, plot_curves

    curves = curves_of(runs, arguments.against, separate=arguments.separate)
    try:
        plot_curves(curves, output, arguments.against)
    except (OSError, ValueError) as error:
        raise UsageError(f"--output {output}: cannot be written ({error}); choose another") from None
    if html is not None:
        from fastres.runs.pictures.report import write_report

        try:
            write_report(curves, html, arguments.against)
        except OSError as error:
            raise UsageError(f"--html {html}: cannot be written ({error}); choose another") from None
    Console(width=None if sys.stdout.isatty() else 120).print(table_of([run.folder for run in runs]))
    print(f"curves: {output}")
    if html is not None:
        print(f"report: {html}")


if __name__ == "__main__":
    run_command(main)
