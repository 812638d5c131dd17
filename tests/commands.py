"""Running fastres's commands as a user does, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent  # of the checkout


def users_environment(changes: Mapping[str, str | None] | None = None) -> dict[str, str]:
    """This process's environment as a user's is, but for one thread: kernels are not interpreted. `changes` go over it;
    None removes."""
    ours = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "TRITON_INTERPRET": None}
    changed = {**os.environ, **ours, **(changes or {})}
    return {name: value for name, value in changed.items() if value is not None}


def run_module(
    module: str,
    *args: object,
    env: Mapping[str, str | None] | None = None,
    cwd: Path | None = None,
    timeout_s: float = 300,
) -> subprocess.CompletedProcess[str]:
    """`python -m MODULE ARGS` in a user's environment; `env` goes over it, None removes."""
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, args)],
        cwd=cwd,
        env=users_environment(env),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def run_fastres(
    module: str, *args: str | Path, env: Mapping[str, str | None] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """`python -m fastres.MODULE ARGS`, likewise."""
    return run_module(f"fastres.{module}", *args, env=env, cwd=cwd)


def run_worker(name: str, *args: object, torchrun: int = 0) -> subprocess.CompletedProcess[str]:
    """Run tests/workers/NAME.py in a process of its own or, under torchrun, in as many as `torchrun` says."""
    module = f"tests.workers.{name}"
    if not torchrun:
        return run_module(module, *args, cwd=ROOT)
    launcher = ["--standalone", f"--nproc_per_node={torchrun}", "-m", module]
    return run_module("torch.distributed.run", *launcher, *args, cwd=ROOT)


def children(pid: int) -> list[int]:
    """The processes that a process has started, and those that they have."""
    own = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return own + [further for child in own for further in children(child)]
