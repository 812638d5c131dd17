"""Set up the process of a command: its standard streams, the messages on them, and its signals.

A command's work must not depend on who reads its output, so a stream drops what it cannot write. All messages go
through Python's logging, under the logger "fastres", so that a program can send them elsewhere. SIGINT and SIGTERM end
a command in one line, at any moment from its first import on.
"""

from __future__ import annotations

import _thread
import contextlib
import io
import logging
import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from fastres.utils.suggest import printable

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE_S = 10.0  # time after a signal to finish the step and save
LEAVE_S = 0.8  # time after a signal to remove temporary files, if there is nothing to save


# ---- streams -----------------------------------------------------------------------------------------------------


class _Descriptor(io.FileIO):
    """The descriptor of stdout or stderr, which drops what it cannot write.

    A write fails if the reader has ended (EPIPE), the terminal is gone (EIO) or the disk is full (ENOSPC).
    """

    def write(self, data: Any) -> int:
        """Write some of the bytes, and return how many need not be written again."""
        try:
            while (written := super().write(data)) is None:  # the descriptor does not block and its reader is slow
                select.select([], [self], [])
            return written
        except OSError:
            return memoryview(data).nbytes


def guard_streams() -> None:
    """Let no standard stream raise: a closed one is the null device, and characters that it cannot encode are escaped.

    A stream that somebody else has put into `sys`, such as a test's, stays as it is.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        _open_if_closed(descriptor)
        stream = getattr(sys, name)
        if stream is None:  # Python found the descriptor closed when it started
            setattr(sys, name, open(os.devnull, "w" if descriptor else "r", encoding="utf-8"))  # noqa: SIM115, PTH123
        elif descriptor and stream is getattr(sys, f"__{name}__"):
            setattr(sys, name, _guarded(stream, descriptor))


def _open_if_closed(descriptor: int) -> None:
    """Open the null device as this descriptor if the descriptor is closed, because the next file would get its number.

    A library that prints would then write into that file.
    """
    try:
        os.fstat(descriptor)
    except OSError:
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, descriptor)
        if null != descriptor:
            os.close(null)
        os.set_inheritable(descriptor, True)


def _guarded(stream: io.TextIOWrapper, descriptor: int) -> io.TextIOWrapper:
    """Return a stream that writes to the descriptor as `stream` does, and does not raise."""
    with contextlib.suppress(OSError):
        stream.flush()
    raw = _Descriptor(descriptor, "wb", closefd=False)
    raw.name = stream.name
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering or raw.isatty(),
        write_through=stream.write_through,
    )


# ---- messages ----------------------------------------------------------------------------------------------------

LOG = "fastres"  # the logger of all messages; those of a module have the module's name
RUN_LOG = "fastres.run"  # the log of a training run
RESULT = {"result": True}  # marks, as `extra`, the message that a quiet command prints too


class ConsoleHandler(logging.Handler):
    """Print messages as the commands do: a run's log on stdout, and others on stderr, with "fastres: " before them.

    Attributes:
        quiet: print only warnings, errors and the result.
    """

    quiet = False

    def emit(self, record: logging.LogRecord) -> None:
        """Print the message in one line. A stream that cannot be written loses it."""
        if self.quiet and record.levelno < logging.WARNING and not getattr(record, "result", False):
            return
        of_a_run = record.name == RUN_LOG
        line = ("" if of_a_run else "fastres: ") + printable(record.getMessage())
        with contextlib.suppress(OSError, ValueError):
            print(line, file=sys.stdout if of_a_run else sys.stderr, flush=True)


@contextlib.contextmanager
def console_log(*, unless_handled: bool = False) -> Iterator[None]:
    """Print fastres's messages while the block runs, unless they are printed already.

    Args:
        unless_handled: leave the messages to the program's own logging handlers if it has any.
    """
    log = logging.getLogger(LOG)
    if any(isinstance(handler, ConsoleHandler) for handler in log.handlers) or (unless_handled and log.hasHandlers()):
        yield
        return
    handler, level, propagates = ConsoleHandler(), log.level, log.propagate
    log.addHandler(handler)
    log.propagate = False  # other packages may add handlers that would print the messages again
    if level == logging.NOTSET:
        log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagates


def quieten() -> None:
    """Let the command print only warnings, errors and the result."""
    for handler in logging.getLogger(LOG).handlers:
        if isinstance(handler, ConsoleHandler):
            handler.quiet = True


def shows_progress() -> bool:
    """Return True unless the command is quiet, or the program shows no messages of this level."""
    log = logging.getLogger(LOG)
    quiet = any(isinstance(handler, ConsoleHandler) and handler.quiet for handler in log.handlers)
    return not quiet and log.level <= logging.INFO


# ---- signals -----------------------------------------------------------------------------------------------------


class Stopped(KeyboardInterrupt):
    """A signal has come while there is nothing to save."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class StopSignal:
    """The signal that stops the command.

    Attributes:
        number: the signal's number, or 0 if none has come.
        saves: True while there is something to save. A signal is then only noted; otherwise it raises Stopped.
    """

    def __init__(self) -> None:
        self.number = 0
        self.saves = False
        self._since_s = 0.0
        self._pid = os.getpid()
        self._said = False
        self._line = _thread.allocate_lock()  # held by the thread that prints the line

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Note the first signal, or raise Stopped. A second one within GRACE_S changes nothing; a later one ends all.

        On Ctrl-C, both the terminal and torchrun send a signal. Worker processes inherit the handler and ignore
        signals, because this process ends them when it needs them no longer.
        """
        if os.getpid() != self._pid:
            return
        if self.number:
            if time.monotonic() - self._since_s > GRACE_S:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            return
        self.number, self._since_s = number, time.monotonic()
        self._announce(number)
        if not self.saves:
            if _is_importing(frame):  # some modules in C++ abort if an exception interrupts their initialisation
                os._exit(128 + number)
            sys.unraisablehook = _ignore  # Stopped may be raised in a destructor, where Python prints and drops it
            raise Stopped(number)

    def nothing_to_save(self) -> None:
        """End what `saves` began, and raise Stopped if a signal has come meanwhile."""
        self.saves = False
        if self.number:
            raise Stopped(self.number)

    def watch(self, pipe: int) -> None:
        """Print the line, and end the process if it does not leave. A call that takes long delays the handler."""
        while number := os.read(pipe, 1):
            if number[0] in SIGNALS:
                self._announce(number[0])
                if not self.saves:
                    time.sleep(LEAVE_S)
                    os._exit(128 + number[0])
        os.close(pipe)

    def _announce(self, number: int) -> None:
        with self._line:  # the handler waits until the line is printed, because it may end the process
            if not self._said:
                self._said = True
                say_stopped(number, saves=self.saves)


@contextlib.contextmanager
def catch_signals() -> Iterator[StopSignal]:
    """Catch SIGINT and SIGTERM while the block runs. Outside the main thread, where Python cannot, catch nothing."""
    stop = StopSignal()
    try:
        before = {number: signal.signal(number, stop.handle) for number in SIGNALS}
    except ValueError:
        yield stop
        return
    read, write = os.pipe()
    os.set_blocking(write, False)
    outer = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=_forget_wakeup)  # otherwise a child's signals would reach this process
    _thread.start_new_thread(stop.watch, (read,))
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        signal.set_wakeup_fd(outer)
        os.close(write)


def command_name(command: str = "") -> str:
    """Return the name of a command as its user types it, or of the program if no command is given.

    The way in which this process was started decides between fastres train, python -m fastres train and python -m
    fastres.train. Another program's process has the first one.
    """
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)  # set by python -m
    module = "" if spec is None else str(spec.name)
    if command and module.startswith("fastres.") and module != "fastres.__main__":
        return f"python -m fastres.{command}"
    return f"{'python -m ' if module == 'fastres.__main__' else ''}fastres {command}".rstrip()


def leave_while_importing() -> None:
    """End the process in one line on a signal, if Python is starting `fastres` or `python -m fastres.COMMAND`.

    Until Python has found the command's module, sys.argv[0] is "-m". run_command() replaces the handler.
    """
    if [Path(word).stem for word in getattr(sys, "argv", [])[:1]] in (["-m"], ["fastres"]):
        for number in SIGNALS:
            signal.signal(number, _leave)


def say_stopped(number: int, *, saves: bool = False) -> None:
    """Print that a signal stops the command, on rank 0 only, because all ranks of a run get the same signals.

    The line goes to the descriptor, because a handler may have interrupted a write to the stream.
    """
    what = f"{signal.Signals(number).name}: the run finishes its step, saves and stops"
    line = f"fastres: {what if saves else f'stopped by {signal.Signals(number).name}'}\n"
    with contextlib.suppress(OSError):
        if os.environ.get("RANK", "0") == "0":
            os.write(2, ("\n" * os.isatty(2) + line).encode())


def _leave(number: int, _: FrameType | None) -> None:
    say_stopped(number)
    os._exit(128 + number)


def _is_importing(frame: FrameType | None) -> bool:
    """Return True if the interrupted code runs inside an import statement."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _ignore(_: Any) -> None:
    """Print nothing."""


def _forget_wakeup() -> None:
    with contextlib.suppress(ValueError):
        signal.set_wakeup_fd(-1)
