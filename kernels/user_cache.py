"""Find the folder in which fastres keeps what it can make again: compiled kernels and decoded images."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def user_cache() -> Path:
    """Return fastres's folder in the user's cache folder, which may not exist yet.

    On Linux it is $XDG_CACHE_HOME/fastres or ~/.cache/fastres, and elsewhere the system's own place, such as
    ~/Library/Caches/fastres. Earlier versions used ~/.cache/fastres everywhere, so such a folder stays in use.

    Raises:
        RuntimeError: if the user has no home folder.
    """
    earlier = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fastres"
    return earlier if earlier.is_dir() else platformdirs.user_cache_path("fastres").expanduser()
