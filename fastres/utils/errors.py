"""The two errors that a command reports in one line.

Any other exception is a bug and shows its traceback, except for exhausted memory and paths that the system rejects.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastres.utils import process, ranks
from fastres.utils.atomic_io import json_of
from fastres.utils.suggest import near_flags, printable, question
from fastres.utils.version import __version__

LOG = logging.getLogger(__name__)
LAUNCHER_S = 3.0  # time for a launcher to notice that a process has ended, and to end the others


QUIET_HELP = "Print only warnings, errors and the result."


class UsageError(Exception):
    """Invalid input: one line that names the setting and the remedy. Exit status 2."""

    status = 2
    said = False  # True if another rank has printed it


class RunError(Exception):
    """A run that has started and cannot continue: one line with the cause and the state that is left. Exit status 1."""

    status = 1
    said = False


class Parser(argparse.ArgumentParser):
    """The parser of a command other than train: one-line errors and no abbreviations, as in train.

    A help text is one or more sentences, with the default in brackets after them.

    Args:
        command: the name of the command, for --help; a program that is no command of fastres gives `prog` instead.
        renamed: present spellings of flags by their old ones, which work for one version.
        **how: arguments of ArgumentParser.
    """

    def __init__(self, command: str = "", *, renamed: Mapping[str, str] | None = None, **how: Any) -> None:
        how.setdefault("prog", process.command_name(command))
        if described := how.get("description"):  # of a module's docstring, where it follows the command and a colon
            how["description"] = described[0].upper() + described[1:]
        super().__init__(allow_abbrev=False, add_help=False, **how)
        self.renamed = renamed or {}
        self.add_argument("-h", "--help", action="help", help="Show this help message and exit.")
        self.add_argument("--version", action="version", version=f"fastres {__version__}",
                          help="Print the version and exit.")  # fmt: skip

    def add_trust_code(self) -> None:
        """Add --model.trust_code, for a command that builds a run's network."""
        self.add_argument("--model.trust_code", dest="trust_code", choices=("true", "false"), default="false",
                          help="Allow a network package.module:function to import that module. "
                          "(default: %(default)s)")  # fmt: skip

    def add_quiet(self) -> None:
        """Add --quiet, which takes effect when the command line is parsed."""
        self.add_argument("--quiet", action="store_true", help=QUIET_HELP)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse the arguments, with the present spellings of flags."""
        given = sys.argv[1:] if args is None else args
        found = super().parse_known_args(present_spellings(given, self.renamed), namespace)
        if getattr(found[0], "quiet", False):
            process.quieten()
        return found

    def error(self, message: str) -> Any:
        """Raise UsageError instead of printing the usage and exiting."""
        if match := re.match(r"unrecognized arguments: (\S+)", message):
            name, of = match[1].partition("=")[0], self._option_string_actions
            if name.startswith("-"):
                raise UsageError(f"unknown flag {name}{question(near_flags(name, of))}; --help lists all")
            raise UsageError(f"{name}: is one argument too many; --help lists all")
        raise UsageError(f"{message}; --help lists all")


def present_spellings(arguments: Sequence[str], renamed: Mapping[str, str]) -> list[str]:
    """Return the arguments with the present spellings of flags, and log a warning for each old one.

    Args:
        arguments: a command line's arguments.
        renamed: present spellings by old ones, such as {"--out": "--output"}.
    """
    present = []
    for argument in arguments:
        old, equals, value = argument.partition("=")
        new = renamed.get(old, old)
        if new != old and ranks.rank() == 0:
            LOG.warning("%s is now %s; the old spelling works for one version", old, new)
        present.append(f"{new}{equals}{value}")
    return present


def positive(text: str) -> int:
    """Return the text of a flag as a whole number above 0. Raise ArgumentTypeError for any other text."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def expand_user(text: str) -> str:
    """Return a path with ~ or ~USER at its beginning replaced by that user's home folder.

    Raises:
        UsageError: if there is no such user or home folder.
    """
    if not text.startswith("~"):
        return text
    try:
        return str(Path(text).expanduser())
    except RuntimeError:
        user = text.partition("/")[0]
        raise UsageError(
            f"{text}: {user} has no home folder here; give the whole path, or ./{user} for a folder of that name"
        ) from None


def user_path(text: str) -> Path:
    """Return the path that a command's argument names, ~ expanded. Raise UsageError as expand_user does."""
    return Path(expand_user(text))


def first_line(error: BaseException) -> str:
    """Return the first non-empty line of the error's message, or its type name if the message is empty."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


OUT_OF_MEMORY = (
    "can't allocate memory",  # torch, on a CPU
    "cuda error: out of memory",  # for a context or for pinned memory
    "cublas_status_alloc_failed",
    "'out of memory'",  # NCCL
)


def out_of_memory(error: BaseException) -> bool:
    """Return True if `error` means that memory ran out.

    torch raises OutOfMemoryError only from its CUDA caching allocator; other sources are recognised by their message.
    """
    import torch

    said = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(words in said for words in OUT_OF_MEMORY)


def complain(what: str, said: bool = False) -> None:
    """Print one line on stderr, with the rank if there are several processes, and store it for torchrun's report.

    Args:
        what: the message.
        said: True if another rank has printed it.
    """
    line = printable(" ".join(what.split()))  # because the message may quote a file
    if not said:
        who = f"rank {ranks.rank()}: " if ranks.fault() is None and ranks.world_size() > 1 else ""
        print(f"fastres: error: {who}{line}", file=sys.stderr, flush=True)
    if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with contextlib.suppress(OSError):  # a launcher that has ended has removed its folder
            Path(report).write_text(json_of({"message": line, "timestamp": int(time.time())}), "utf-8")


@contextlib.contextmanager
def printed_once_per_host() -> Iterator[None]:
    """Let one process of each host print the block's UsageError, which all processes of a host raise.

    The others wait until the launcher ends them, because a launcher that sees them end first would end the one that
    prints.
    """
    try:
        yield
    except UsageError as error:
        if ranks.local_rank() > 0:
            error.said = True
            time.sleep(LAUNCHER_S)
        raise


def run_command(main: Callable[[], int | None]) -> None:
    """Run a command's main() and exit with its return value (None is 0), or with 2 or 1 after one line on stderr.

    The exit status does not depend on the command's output: see process.guard_streams(). If signal N stops the command,
    the status is 128 + N.
    """
    process.guard_streams()
    if fault := ranks.fault():
        complain(fault)
        sys.exit(UsageError.status)
    stopped = False
    try:
        with process.catch_signals(), process.console_log():
            status = _status(main)
    except KeyboardInterrupt as signalled:
        stopped, number = True, getattr(signalled, "number", signal.SIGINT)
        if not isinstance(signalled, process.Stopped):  # which has printed the line
            process.say_stopped(number)
        status = 128 + number
    if stopped or ranks.world_size() > 1:
        # Skip the interpreter's shutdown, because it waits for threads that are still decoding, and because any
        # reference to the process group leaves threads that nobody joins: 9 of 26 runs of a script that kept a network
        # with shared statistics ended with SIGABRT after their work was done (torch 2.14, gloo). After a failure,
        # destroying the group would wait for processes that have ended.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _status(main: Callable[[], int | None]) -> int:
    """Return the exit status of a command's main(), after printing the line of an error."""
    try:
        return main() or 0
    except (UsageError, RunError) as error:
        complain(str(error), error.said)
        return error.status
    except Exception as error:
        if out_of_memory(error):
            remedy = "use a smaller batch, or in training --train.accumulate 2 for micro-batches of the same batch"
            line, status = f"out of memory ({first_line(error)}); {remedy}", RunError.status
        elif isinstance(error, OSError) and error.filename is not None:
            line = f"{error.filename}: {error.strerror}; give a path that can be used"
            status = UsageError.status
        else:
            raise
        complain(line, getattr(error, "said", False))
        return status
