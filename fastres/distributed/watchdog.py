"""A thread beside the training: it ends a process that would otherwise stay for ever.

Two cases: the launcher is gone, so that nobody would end this process or start another; and no step comes any more
because a process hangs. Of a process that is gone, the others hear from their connections.
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

import torch.distributed as dist

from fastres.utils.errors import complain

COMPUTES = "computes"
LOOK_EVERY_S = 0.5
ANSWER_S = 5.0  # for all processes to say what they do; they notice within LOOK_EVERY_S of each other
LEAVE_S = 10.0  # without a launcher: time to reach the step that all save

_last: tuple[float, str] | None = None  # when the training was last heard of, and what it began to do


def beat(doing: str = COMPUTES) -> None:
    """Says that the training goes on, and what it does next: COMPUTES, or what no other process waits for by itself."""
    global _last
    _last = (time.monotonic(), doing)


def rest() -> None:
    """Says that there is no training to watch."""
    global _last
    _last = None


Look = Callable[[], None]


@contextmanager
def watching(alone: bool) -> Iterator[list[Look]]:
    """Watches this process as long as the block runs: whether its launcher is there, if it has one, and unless it is
    alone what is added to the list."""
    ended = threading.Event()
    looks = [_no_launcher()] if "TORCHELASTIC_RUN_ID" in os.environ else []

    def look() -> None:
        while not ended.wait(LOOK_EVERY_S):
            for one in looks:
                one()

    if looks or not alone:
        threading.Thread(target=look, name="fastres-watch", daemon=True).start()
    try:
        yield looks
    finally:
        rest()
        ended.set()


def _no_launcher() -> Look:
    """Looks whether the launcher is there still. Without it: as at SIGTERM, and after LEAVE_S out whatever happens."""
    launcher, since = os.getppid(), 0.0

    def look() -> None:
        nonlocal since
        if os.getppid() == launcher:
            return
        if not since:
            since = time.monotonic()
            complain("the launcher is gone; saving, and leaving")
            os.kill(os.getpid(), signal.SIGTERM)
        elif time.monotonic() - since > LEAVE_S:
            os._exit(128 + signal.SIGTERM)

    return look


def no_step(rank: int, world: int, timeout_s: float, token: str) -> Look:
    """Looks whether steps still come. Where none has for timeout_s, the processes tell each other what they do, and
    leave. `token`: equal on all processes, and new for each start."""

    def look() -> None:
        if _last is None or time.monotonic() - _last[0] < timeout_s:
            return
        verdict = [
            "the processes cannot reach each other, nor the launcher's store: the network between them is down"
        ]

        def answer() -> None:
            with suppress(OSError, RuntimeError):  # no connection: the verdict is there already
                verdict.insert(0, _roll_call(rank, world, token))

        call = threading.Thread(target=answer, daemon=True)
        call.start()
        call.join(3 * ANSWER_S)  # a store behind a dead link never answers
        complain(f"no step for {timeout_s:g} s: {verdict[0]}; the last checkpoint is intact")
        os._exit(1)

    return look


def _roll_call(rank: int, world: int, token: str) -> str:
    """Who hangs, in words."""
    assert _last is not None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # Raises where nobody can be reached: torch would try again and again, and print a stack each time.
    socket.create_connection((address, port), ANSWER_S).close()
    store = dist.TCPStore(
        address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=ANSWER_S)
    )
    keys = [f"fastres/{token}/does/{number}" for number in range(world)]
    store.set(keys[rank], _last[1])
    deadline = time.monotonic() + ANSWER_S
    while not store.check(keys) and time.monotonic() < deadline:
        time.sleep(0.1)
    answers = [store.get(key).decode() if store.check([key]) else "does not answer" for key in keys]
    hanging = [f"rank {n} {answer}" for n, answer in enumerate(answers) if answer != COMPUTES]
    return ", ".join(hanging) or "all processes wait for one another: is the network between them down?"
