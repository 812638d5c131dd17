"""Show the progress of a loop on one line."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_EVERY_S = 10.0  # between lines if the output is not a terminal


class ProgressLine:
    """A progress bar in a terminal, or a plain line every ten seconds if the output is not a terminal.

    Args:
        what: the line's first words.
        total: steps of the loop.
        done: steps that are already done.
        enabled: show anything at all.
        stderr: write to stderr and remove the bar at the end.
    """

    def __init__(self, what: str, total: int, done: int = 0, *, enabled: bool, stderr: bool = False) -> None:
        self.what, self.total, self.enabled = what, total, enabled
        self.console = Console(soft_wrap=True, stderr=stderr)
        self.live = enabled and self.console.is_terminal
        self._printed_at = time.monotonic()
        self._bar = Progress(
            TextColumn(what),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=self.console,
            disable=not self.live,
            transient=stderr,
        )
        self._task = self._bar.add_task("", total=total, completed=done, figures="")

    def __enter__(self) -> ProgressLine:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, done: int, figures: str = "") -> None:
        """Show that `done` steps of the total are done, followed by `figures`."""
        self._bar.update(self._task, completed=done, figures=figures)
        if not self.live and time.monotonic() - self._printed_at >= PLAIN_EVERY_S:
            self._printed_at = time.monotonic()
            self.say(f"{self.what} {done:,}/{self.total:,}  {figures}".rstrip())

    def say(self, line: str) -> None:
        """Print a line that stays."""
        if self.enabled:
            self._bar.console.print(line, highlight=False, markup=False)
