"""Show the progress of a loop on one line."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.progress import BarColumn, Progress, Task, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from fastres.utils import process

PLAIN_EVERY_S = 10.0  # between lines if the output is not a terminal


class ProgressLine:
    """A progress bar in a terminal, or a message every ten seconds if the output is not a terminal.

    Args:
        what: the line's first words.
        total: steps of the loop.
        done: steps that are already done.
        enabled: show anything at all. A quiet command shows nothing either.
        stderr: write to stderr and remove the bar at the end.
    """

    def __init__(self, what: str, total: int, done: int = 0, *, enabled: bool, stderr: bool = False) -> None:
        self.what, self.total = what, total
        self.enabled = enabled and process.shows_progress()
        self._log = logging.getLogger(__name__ if stderr else process.RUN_LOG)
        self.console = Console(soft_wrap=True, stderr=stderr)
        self.live = self.enabled and self.console.is_terminal
        self._printed_at = time.monotonic()
        self._bar = _Bar(console=self.console, disable=not self.live, transient=stderr)
        self._task = self._bar.add_task(what, total=total, completed=done, figures=())

    def __enter__(self) -> ProgressLine:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, done: int, figures: Sequence[str] = ()) -> None:
        """Show that `done` steps of the total are done, followed by `figures`, the most important first."""
        self._bar.update(self._task, completed=done, figures=figures)
        if self.enabled and not self.live and time.monotonic() - self._printed_at >= PLAIN_EVERY_S:
            self._printed_at = time.monotonic()
            self._log.info("%s", f"{self.what} {done:,}/{self.total:,}  {'  '.join(figures)}".rstrip())


class _Bar(Progress):
    """A progress bar on one line."""

    def get_renderables(self) -> Iterable[RenderableType]:
        """Yield the line of each task."""
        for task in self.tasks:
            yield _Line(task)


class _Line:
    """The line of a task: what, bar, steps and total, figures, time left.

    In a narrow terminal the bar goes first, and then the figures from the last to the first.
    """

    left, bar = TimeRemainingColumn(), BarColumn(bar_width=20)

    def __init__(self, task: Task) -> None:
        self.task = task

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render as much as fits."""
        task = self.task
        steps = Text(f"{int(task.completed):,}/{int(task.total or 0):,}", style="progress.download")
        figures = [Text(figure) for figure in task.fields["figures"]]
        left = self.left.render(task) + Text(" left")
        cells: list[RenderableType] = [Text(task.description), self.bar.render(task), steps, *figures, left]
        widths = [len(task.description), 20, len(steps), *map(len, figures), len(left)]
        # The bar is the second cell, and the last figure the one before the last cell.
        for gone in [1, *[-2] * len(figures)]:
            if sum(widths) + len(widths) - 1 > options.max_width:
                del cells[gone], widths[gone]
        line = Table.grid(padding=(0, 1))
        for _ in cells:
            line.add_column(no_wrap=True)
        line.add_row(*cells)
        yield line
