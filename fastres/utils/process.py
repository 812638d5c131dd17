"""Set up the process of a command: its standard streams.

A command's work must not depend on who reads its output, so a stream drops what it cannot write.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import sys
from typing import Any


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
