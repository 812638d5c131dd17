"""The two ways in which a command ends badly on purpose. Anything else is a bug and shows its traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable


class Refused(Exception):
    """Input that cannot be accepted: one line that names the thing and the remedy. Exit status 2."""

    status = 2


class Failed(Exception):
    """A run that had started and cannot go on: one line with what is left of it. Exit status 1."""

    status = 1


def run_command(main: Callable[[], int | None]) -> None:
    """Runs a command's main() and exits: its return value (None is 0), or one line on stderr and 2 or 1."""
    try:
        status = main()
    except (Refused, Failed) as error:
        line = " ".join(str(error).split())
        print(f"fastres: error: {line}", file=sys.stderr, flush=True)
        status = error.status
    sys.exit(status or 0)
