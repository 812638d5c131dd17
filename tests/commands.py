"""Run fastres's commands as a user does, in processes of their own.

A command is forked from a process that has imported torch (tests/workers/zygote.py), unless `fresh` asks for a new
Python. Both are real processes, with their own environment, directory, output, signals and exit status.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent  # the checkout


def users_environment(changes: Mapping[str, str | None] | None = None) -> dict[str, str]:
    """Return this process's environment as a user has it, but with one thread.

    Triton does not interpret kernels in it. `changes` override variables, and None removes one.
    """
    ours = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "TRITON_INTERPRET": None}
    changed = {**os.environ, **ours, **(changes or {})}
    return {name: value for name, value in changed.items() if value is not None}


# ---- the process that forks ----------------------------------------------------------------------------------


class Zygote:
    """A process that has imported torch and forks commands; `cpu_s` is the CPU time of those that have ended."""

    def __init__(self) -> None:
        self.cpu_s = 0.0
        self.lock = threading.Lock()
        self.pipe = subprocess.Popen(
            [sys.executable, "-m", "tests.workers.zygote"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=users_environment(), cwd=ROOT,
            start_new_session=True,
        )  # fmt: skip
        atexit.register(self.close)

    def ask(self, **request: Any) -> Any:
        """Send a request and return the answer."""
        assert self.pipe.stdin is not None and self.pipe.stdout is not None
        with self.lock:
            print(json.dumps(request), file=self.pipe.stdin, flush=True)
            return json.loads(self.pipe.stdout.readline())

    def close(self) -> None:
        """Let the process end."""
        assert self.pipe.stdin is not None
        self.pipe.stdin.close()
        self.pipe.wait()


@cache
def zygote() -> Zygote:
    """Return this process's zygote, which starts at its first use."""
    return Zygote()


def forked_cpu_s() -> float:
    """Return the CPU seconds of all forked commands that have ended."""
    return zygote().cpu_s if zygote.cache_info().currsize else 0.0


class Forked:
    """A forked command, with the methods of subprocess.Popen that tests use."""

    def __init__(
        self,
        module: str,
        *args: object,
        stdout: Path,
        stderr: Path,
        env: Mapping[str, str | None] | None,
        cwd: Path,
        closed: Sequence[int],
    ) -> None:
        self.args = ["python", "-m", module, *map(str, args)]
        self.stdout, self.stderr = stdout, stderr
        self.returncode: int | None = None
        self.pid: int = zygote().ask(
            fork=[module, *map(str, args)],
            env=users_environment(env),
            cwd=str(cwd.absolute()),
            stdout=str(stdout.absolute()),
            stderr=str(stderr.absolute()),
            closed=list(closed),
        )

    def poll(self) -> int | None:
        """Return the exit status, or None if the command has not ended."""
        if self.returncode is None and (ended := zygote().ask(poll=self.pid)) is not None:
            self.returncode, cpu_s = ended
            zygote().cpu_s += cpu_s
        return self.returncode

    def wait(self, timeout: float = 240) -> int:
        """Return the exit status. Kill the command and raise TimeoutExpired after `timeout` seconds."""
        deadline, pause_s = time.monotonic() + timeout, 0.001
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                self.kill()
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.02)
        return status

    def output(self) -> str:
        """Wait for the end and return what the command printed on stdout."""
        self.wait()
        return self.stdout.read_text()

    def kill(self) -> None:
        """Send SIGKILL, unless the command has ended."""
        self.send_signal(signal.SIGKILL)

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the command has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)


# ---- whole commands ------------------------------------------------------------------------------------------


def start_module(
    module: str,
    *args: object,
    stdout: Path,
    stderr: Path | None = None,
    env: Mapping[str, str | None] | None = None,
    cwd: Path | None = None,
    closed: Sequence[int] = (),
) -> Forked:
    """Start `python -m MODULE ARGS`, forked, and append its output to the files; stderr goes to stdout's by default.

    The standard streams whose descriptors are in `closed` are closed, as by `>&-` in a shell. A file may also be a
    pipe with a name, a terminal or a device.
    """
    where = cwd or Path.cwd()
    return Forked(module, *args, stdout=stdout, stderr=stderr or stdout, env=env, cwd=where, closed=closed)


def run_module(
    module: str,
    *args: object,
    env: Mapping[str, str | None] | None = None,
    cwd: Path | None = None,
    timeout_s: float = 300,
    fresh: bool = False,
    closed: Sequence[int] = (),
) -> subprocess.CompletedProcess[str]:
    """Run `python -m MODULE ARGS` in a user's environment; `env` overrides variables, and None removes one."""
    if fresh:
        return run_python("-m", module, *args, env=env, cwd=cwd, timeout_s=timeout_s)
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        process = start_module(module, *args, stdout=out, stderr=err, env=env, cwd=cwd, closed=closed)
        status = process.wait(timeout_s)
        return subprocess.CompletedProcess(process.args, status, out.read_text(), err.read_text())


def run_fastres(
    module: str,
    *args: str | Path,
    env: Mapping[str, str | None] | None = None,
    cwd: Path | None = None,
    fresh: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run `python -m fastres.MODULE ARGS` in a user's environment."""
    return run_module(f"fastres.{module}", *args, env=env, cwd=cwd, fresh=fresh)


def run_python(
    *args: object, env: Mapping[str, str | None] | None = None, cwd: Path | None = None, timeout_s: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run `python ARGS` in a new Python and a user's environment."""
    return subprocess.run(
        [sys.executable, *map(str, args)],
        cwd=cwd,
        env=users_environment(env),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


# ---- several processes ---------------------------------------------------------------------------------------


def torchrun(processes: int, *options: str) -> list[str]:
    """Return Python's arguments that start this many processes on this machine, before `-m MODULE`."""
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *options]


def start_ranks(processes: int, module: str, *args: object, stdout: Path, stderr: Path | None = None) -> list[Forked]:
    """Start the ranks of a run on this machine, forked, as torchrun starts them but without a launcher.

    Tests of restarts, of signals to the launcher and of its end use torchrun itself.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sizes = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    return [
        start_module(
            *(module, *args),
            stdout=stdout,
            stderr=stderr,
            env={**shared, **sizes, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=ROOT,
        )
        for rank in range(processes)
    ]


def end_all(processes: Sequence[Forked], timeout_s: float = 240) -> int:
    """Wait for all processes, and return 0 if all have succeeded, otherwise the status of one that has failed."""
    return max((process.wait(timeout_s) for process in processes), key=abs)


def run_worker(
    name: str, *args: object, processes: int = 0, env: Mapping[str, str | None] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run tests/workers/NAME.py in a new Python or, if `processes` is given, in that many forked ranks.

    The ranks' stdout has all that they print, and their status is that of one that failed, if any has.
    """
    if not processes:
        return run_python("-m", f"tests.workers.{name}", *args, env=env, cwd=ROOT)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output"
        status = end_all(start_ranks(processes, f"tests.workers.{name}", *args, stdout=output))
        return subprocess.CompletedProcess([name], status, output.read_text(), "")


def children(pid: int) -> list[int]:
    """Return the processes that a process has started, and all their descendants."""
    own = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return own + [further for child in own for further in children(child)]
