"""Fork commands from a process that has imported fastres and torch, which saves each of them two or three seconds.

`python -m tests.workers.zygote` reads one request per line from stdin and answers each with a line of JSON:

    {"fork": [MODULE, ARGUMENTS...], "env": …, "cwd": …, "stdout": FILE, "stderr": FILE, "closed": DESCRIPTORS}
        runs `python -m MODULE ARGUMENTS` in a new process with this environment; the answer is its pid
    {"poll": PID}
        the answer is null if it has not ended, otherwise its exit status and CPU seconds, its descendants' included

Only what importing does is shared between the commands. Environment, directory, output and arguments are their own.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import sys
import threading
import time
import traceback
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

from fastres.config.schema import Config
from fastres.config.validation import check
from fastres.utils import process, run_timer

IMPORTED = (
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "matplotlib.ticker",
    "torch.fx.experimental.symbolic_shapes",
    "fastres.data.loaders.build",
    "fastres.data.loaders.dataloader",
    "fastres.data.loaders.resident",
    "fastres.data.sources.imagefolder",
    "fastres.data.sources.load",
    "fastres.distributed",
    "fastres.runs.exporting",
    "fastres.runs.training_log",
    "fastres.training.build",
    "fastres.training.cuda_graph",
    "fastres.training.signals",
)


def fork(request: dict[str, Any]) -> int:
    """Start a command in a child process and return its pid there."""
    # A thread of the parent would not exist in the child, but a lock that it held would stay locked there.
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "the zygote has threads"
    if pid := os.fork():
        return pid
    module, *arguments = request["fork"]
    files = {request["stdout"], request["stderr"]}  # one if they are equal, because a pipe is opened once
    output = {file: os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND) for file in files}
    sources = (os.open(os.devnull, os.O_RDONLY), output[request["stdout"]], output[request["stderr"]])
    for source, target in zip(sources, (0, 1, 2), strict=True):
        os.dup2(source, target)
    for source in {*sources}:
        os.close(source)
    os.environ.clear()
    os.environ.update(request["env"])
    open_streams(request["closed"])
    os.chdir(request["cwd"])
    sys.path[0] = request["cwd"]
    sys.argv = [module, *arguments]
    sys.orig_argv = [sys.executable, "-m", module, *arguments]
    run_timer.STARTED = time.perf_counter()
    warnings.filterwarnings("ignore", ".*found in sys.modules after import of package", RuntimeWarning)
    os._exit(run(module))


def open_streams(closed: list[int]) -> None:
    """Set up the standard streams as Python does at its start."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if descriptor in closed:
            os.close(descriptor)
            setattr(sys, name, None)
            setattr(sys, f"__{name}__", None)
        elif descriptor and (encoding := os.environ.get("PYTHONIOENCODING")):
            stream.reconfigure(encoding=encoding, errors="backslashreplace" if name == "stderr" else "strict")


def run(module: str) -> int:
    """Run the module as `python -m` does, with what Python does at its exit, and return the exit status.

    Only the destruction of modules is left out, which takes half a second.
    """
    status: Any = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    except OSError:
        return 120  # as Python does
    return int(status)


def poll(pid: int) -> tuple[int, float] | None:
    """Return the exit status and CPU seconds of a command, or None if it has not ended."""
    ended, status, usage = os.wait4(pid, os.WNOHANG)
    return (os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime) if ended else None


def main() -> None:
    """Answer requests until stdin is closed."""
    for module in IMPORTED:
        import_module(module)
    check(Config())  # builds a network, which imports some more of torch
    sys.argv[0] = "-m"  # as when Python starts `python -m`, so that a signal ends a command before its first line, too
    process.leave_while_importing()
    gc.freeze()  # so that a collection in a child does not copy the pages that it shares with this process
    for line in sys.stdin:
        request = json.loads(line)
        answer = fork(request) if "fork" in request else poll(request["poll"])
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
