"""Running fastres's commands as a user does, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path


def run_fastres(
    module: str, *args: str | Path, env: Mapping[str, str | None] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """`python -m fastres.MODULE ARGS` with one thread, and kernels not interpreted. `env` goes over this process's
    environment; None removes."""
    ours = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "TRITON_INTERPRET": None}
    changed = {**os.environ, **ours, **(env or {})}
    return subprocess.run(
        [sys.executable, "-m", f"fastres.{module}", *map(str, args)],
        cwd=cwd,
        env={name: value for name, value in changed.items() if value is not None},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
