"""How far something has come, on one line."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_EVERY_S = 10.0  # between lines where the output is not a terminal


class ProgressLine:
    """One line that moves in a terminal; elsewhere a plain line every ten seconds. On stderr it is gone at the end."""

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
        """`done` of the total, and what else there is to say of that."""
        self._bar.update(self._task, completed=done, figures=figures)
        if not self.live and time.monotonic() - self._printed_at >= PLAIN_EVERY_S:
            self._printed_at = time.monotonic()
            self.say(f"{self.what} {done:,}/{self.total:,}  {figures}".rstrip())

    def say(self, line: str) -> None:
        """A line that stays."""
        if self.enabled:
            self._bar.console.print(line, highlight=False, markup=False)
