"""Fork runs of fastres.train for tests/soak.py, from a process that has imported it: `python -m tests.workers.zygote`.

The process reads one request per line from stdin, and answers each with a line of JSON:

    ["fork", argv, log]  starts a run whose output goes to `log`, and answers with its pid
    ["poll", pid]        answers with the exit status of a run, or null if it has not ended
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import matplotlib.backends.backend_agg
import matplotlib.figure
import matplotlib.ticker  # noqa: F401 - a run imports them, but not at its beginning

from fastres import train
from fastres.utils.errors import run_command


def fork(argv: list[str], log: str) -> int:
    """Start a run in a child process and return its pid."""
    # A thread of the parent would not exist in the child, but a lock that it held would stay locked there.
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "the zygote has threads"
    if pid := os.fork():
        return pid
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    run_command(lambda: train.main(argv))
    raise AssertionError("run_command() exits")


def poll(pid: int) -> int | None:
    """Return the exit status of a run, or None if it has not ended."""
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def main() -> None:
    """Answer requests until stdin is closed."""
    for line in sys.stdin:
        kind, *arguments = json.loads(line)
        answer = fork(*arguments) if kind == "fork" else poll(*arguments)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
