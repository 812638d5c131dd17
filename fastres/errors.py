"""The two ways in which a command ends badly on purpose. Anything else is a bug and shows its traceback."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path


class Refused(Exception):
    """Input that cannot be accepted: one line that names the thing and the remedy. Exit status 2."""

    status = 2
    said = False  # by the process where it happened


class Failed(Exception):
    """A run that had started and cannot go on: one line with what is left of it. Exit status 1."""

    status = 1
    said = False


def run_command(main: Callable[[], int | None]) -> None:
    """Runs a command's main() and exits: its return value (None is 0), or one line on stderr and 2 or 1. Of several
    processes, each names its rank."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    try:
        status = main() or 0
    except (Refused, Failed) as error:
        who = f"rank {os.environ['RANK']}: " if several else ""
        line = " ".join(str(error).split())
        if not error.said:
            print(f"fastres: error: {who}{line}", file=sys.stderr, flush=True)
        if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # torchrun's last words repeat it
            Path(report).write_text(json.dumps({"message": line, "timestamp": int(time.time())}), "utf-8")
        status = error.status
    if several:
        # At the interpreter's end, whatever still refers to the process group leaves threads that nobody joins: 9 of 26
        # runs of a script that kept a network with shared statistics ended with SIGABRT after all was done (torch
        # 2.14, gloo). And after a failure, taking the group down would wait for processes that are gone.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
