"""The two ways in which a command ends badly on purpose. Anything else is a bug and shows its traceback, but for memory
that ran out and paths that the system refuses."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastres.utils import ranks


class UsageError(Exception):
    """Input that cannot be accepted: one line that names the thing and the remedy. Exit status 2."""

    status = 2
    said = False  # by the process where it happened


class RunError(Exception):
    """A run that had started and cannot go on: one line with what is left of it. Exit status 1."""

    status = 1
    said = False


class Parser(argparse.ArgumentParser):
    """Of a command other than train: refuses in one line, and takes no abbreviations, as train does."""

    def __init__(self, **how: Any) -> None:
        super().__init__(allow_abbrev=False, **how)

    def error(self, message: str) -> Any:
        raise UsageError(f"{message}; --help lists all")


def first_line(error: BaseException) -> str:
    """Of what it says; its kind where it says nothing."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


OUT_OF_MEMORY = (
    "can't allocate memory",  # torch, on a CPU
    "cuda error: out of memory",  # of a context, or pinned
    "cublas_status_alloc_failed",
    "'out of memory'",  # NCCL
)


def out_of_memory(error: BaseException) -> bool:
    """Whether that is what it is. torch has a type of its own only for what its allocator of a GPU's memory says."""
    import torch

    said = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        words in said for words in OUT_OF_MEMORY
    )


def complain(what: str, said: bool = False) -> None:
    """One line on stderr, unless another process has said it; of several processes, with this one's rank. What torchrun
    says at its end repeats it."""
    # It may repeat what a file says: nothing in it may move a terminal's cursor or fail to be encoded.
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(what.split()))
    if not said:
        who = f"rank {ranks.rank()}: " if ranks.world_size() > 1 else ""
        print(f"fastres: error: {who}{line}", file=sys.stderr, flush=True)
    if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with contextlib.suppress(OSError):  # a launcher that is gone has taken its folder with it
            Path(report).write_text(json.dumps({"message": line, "timestamp": int(time.time())}), "utf-8")


def run_command(main: Callable[[], int | None]) -> None:
    """Runs a command's main() and exits: its return value (None is 0), or one line on stderr and 2 or 1."""
    try:
        status = main() or 0
    except (UsageError, RunError) as error:
        complain(str(error), error.said)
        status = error.status
    except Exception as error:
        if out_of_memory(error):
            remedy = "take a smaller batch, or in training --train.accumulate 2 for the same batch in parts"
            line, status = f"out of memory ({first_line(error)}): {remedy}", RunError.status
        elif isinstance(error, OSError) and error.filename is not None:
            line = f"{error.filename}: {error.strerror}; give a path that can be used"
            status = UsageError.status
        else:
            raise
        complain(line, getattr(error, "said", False))
    if ranks.world_size() > 1:
        # At the interpreter's end, whatever still refers to the process group leaves threads that nobody joins: 9 of 26
        # runs of a script that kept a network with shared statistics ended with SIGABRT after all was done (torch
        # 2.14, gloo). And after a failure, taking the group down would wait for processes that are gone.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
