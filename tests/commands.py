"""Run fastres's commands as a user does, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent  # the checkout


def users_environment(changes: Mapping[str, str | None] | None = None) -> dict[str, str]:
    """Return this process's environment as a user has it, but with one thread.

    Triton does not interpret kernels in it. `changes` override variables, and None removes one.
    """
    ours = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "TRITON_INTERPRET": None}
    changed = {**os.environ, **ours, **(changes or {})}
    return {name: value for name, value in changed.items() if value is not None}


def run_python(
    *args: object, env: Mapping[str, str | None] | None = None, cwd: Path | None = None, timeout_s: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run `python ARGS` in a user's environment; `env` overrides variables, and None removes one."""
    return subprocess.run(
        [sys.executable, *map(str, args)],
        cwd=cwd,
        env=users_environment(env),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def run_module(
    module: str,
    *args: object,
    env: Mapping[str, str | None] | None = None,
    cwd: Path | None = None,
    timeout_s: float = 300,
) -> subprocess.CompletedProcess[str]:
    """Run `python -m MODULE ARGS` in a user's environment."""
    return run_python("-m", module, *args, env=env, cwd=cwd, timeout_s=timeout_s)


def run_fastres(
    module: str, *args: str | Path, env: Mapping[str, str | None] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `python -m fastres.MODULE ARGS` in a user's environment."""
    return run_module(f"fastres.{module}", *args, env=env, cwd=cwd)


def torchrun(processes: int, *options: str) -> list[str]:
    """Return Python's arguments that start this many processes on this machine, before `-m MODULE`."""
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *options]


def run_worker(
    name: str, *args: object, processes: int = 0, env: Mapping[str, str | None] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run tests/workers/NAME.py in one process or, if `processes` is given, in several under torchrun."""
    launcher = torchrun(processes) if processes else []
    return run_python(*launcher, "-m", f"tests.workers.{name}", *args, env=env, cwd=ROOT)


def children(pid: int) -> list[int]:
    """Return the processes that a process has started, and all their descendants."""
    own = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return own + [further for child in own for further in children(child)]
