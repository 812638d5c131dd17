"""A thread that ends a process which would otherwise wait for ever.

A process would wait for ever in two cases: if the launcher is gone, nobody ends this process or starts another, and if
a rank hangs, no step completes on any rank. A rank that *died* needs no watchdog, because its connections break.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch does not list it in __all__

from fastres.utils.errors import complain

COMPUTES = "computes"
LOOK_EVERY_S = 0.5
ANSWER_S = 5.0  # time for every rank to report its activity; ranks notice a stall within LOOK_EVERY_S of each other
LEAVE_S = 10.0  # time after the launcher is gone, to reach the step that all ranks save

Check = Callable[[], None]


class Watchdog:
    """The heartbeat of the training loop and the checks that look at it."""

    def __init__(self) -> None:
        self.last: tuple[float, str] | None = None  # monotonic time of the last heartbeat, and the activity since
        self.checks: list[Check] = []

    def heartbeat(self, doing: str = COMPUTES) -> None:
        """Record a heartbeat and the current activity.

        Args:
            doing: COMPUTES for work that involves the other ranks. Any other text names rank-local work (loading data,
                writing a checkpoint), which is reported as the cause if this rank stalls.
        """
        self.last = (time.monotonic(), doing)

    @contextmanager
    def running(self, alone: bool) -> Iterator[None]:
        """Run the checks in a thread while the block runs: the launcher's, if there is one, and those in `checks`."""
        ended = threading.Event()
        if "TORCHELASTIC_RUN_ID" in os.environ:
            self.checks.append(_launcher_check())

        def look() -> None:
            while not ended.wait(LOOK_EVERY_S):
                for check in self.checks:
                    check()

        if self.checks or not alone:
            threading.Thread(target=look, name="fastres-watchdog", daemon=True).start()
        try:
            yield
        finally:
            self.last = None
            ended.set()

    def stall_check(self, rank: int, world_size: int, timeout_s: float, token: str) -> Check:
        """Return a check that ends the process if no heartbeat came for `timeout_s` seconds.

        Before they exit, the ranks exchange their activities through the launcher's store, so that the error names the
        rank that hangs.

        Args:
            rank: this process's rank.
            world_size: the number of processes.
            timeout_s: seconds without a heartbeat.
            token: equal on all ranks, and new for every start of the processes.
        """

        def check() -> None:
            last = self.last
            if last is None or time.monotonic() - last[0] < timeout_s:
                return
            verdict = [
                "the processes cannot reach each other, nor the launcher's store: the network between them is down"
            ]

            def ask() -> None:
                with suppress(OSError, RuntimeError):  # without a connection, the first verdict stays
                    verdict.insert(0, _roll_call(rank, world_size, token, last[1]))

            call = threading.Thread(target=ask, daemon=True)
            call.start()
            call.join(3 * ANSWER_S)  # a store behind a dead link never answers
            complain(f"no step for {timeout_s:g} s: {verdict[0]}; the last checkpoint is intact")
            os._exit(1)

        return check


def _launcher_check() -> Check:
    """Return a check that sends SIGTERM once the launcher is gone, and ends the process after LEAVE_S more seconds."""
    launcher, since = os.getppid(), 0.0

    def check() -> None:
        nonlocal since
        if os.getppid() == launcher:
            return
        if not since:
            since = time.monotonic()
            complain("the launcher is gone; saving and exiting")
            os.kill(os.getpid(), signal.SIGTERM)
        elif time.monotonic() - since > LEAVE_S:
            os._exit(128 + signal.SIGTERM)

    return check


def _roll_call(rank: int, world_size: int, token: str, doing: str) -> str:
    """Exchange activities with the other ranks, and name the rank that hangs. Raise OSError if the store is gone."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # Raise if the store cannot be reached, because torch would try again and again and print a stack each time.
    socket.create_connection((address, port), ANSWER_S).close()
    store = TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=ANSWER_S))
    keys = [f"fastres/{token}/does/{number}" for number in range(world_size)]
    store.set(keys[rank], doing)
    deadline = time.monotonic() + ANSWER_S
    while not store.check(keys) and time.monotonic() < deadline:
        time.sleep(0.1)
    answers = [store.get(key).decode() if store.check([key]) else "does not answer" for key in keys]
    hanging = [f"rank {n} {answer}" for n, answer in enumerate(answers) if answer != COMPUTES]
    return ", ".join(hanging) or "all processes wait for one another: is the network between them down?"
