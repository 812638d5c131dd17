"""Handle SIGTERM and SIGINT: the run finishes its step and saves before it exits."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from fastres.utils import ranks

SIGNAL_EVERY = 10  # steps between comparisons of the ranks' signals
GRACE_S = 10.0  # time after a signal to finish the step and save


class StopSignal:
    """The number of the signal that asks the run to stop, or 0 if none has come."""

    def __init__(self) -> None:
        self.number = 0
        self.since_s = 0.0

    def handle(self, number: int, _: FrameType | None) -> None:
        """Remember the first signal. A second one within GRACE_S changes nothing; a later one ends the process.

        On Ctrl-C, both the terminal and torchrun send a signal.
        """
        if not self.number:
            self.number, self.since_s = number, time.monotonic()
        elif time.monotonic() - self.since_s > GRACE_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


def polls_signals(done: int) -> bool:
    """Return True if the ranks compare their signals after `done` steps. One process does so after every step."""
    return ranks.world_size() == 1 or done % SIGNAL_EVERY == 0


@contextmanager
def stop_on_signal() -> Iterator[StopSignal]:
    """Catch SIGTERM and SIGINT while the block runs."""
    stop = StopSignal()
    before = {number: signal.signal(number, stop.handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
