"""The environment of a run: versions, commit, and the names of the device and the processor."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastres.utils import ranks
from fastres.utils.version import __version__

if TYPE_CHECKING:
    import torch

    from fastres.training.engine import Engine

DALI = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")  # one of the packages is enough


def environment(engine: Engine) -> dict[str, Any]:
    """Return the versions, device, commit and command of this process, as written to env.json."""
    import torch  # not at the top, because fastres.doctor has to start without it

    from fastres.training.engine import as_setting

    device = engine.device
    return {
        "fastres": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
        "triton": version("triton"),
        "dali": next(filter(None, map(version, DALI)), None),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        "platform": platform.platform(),
        "device": device_name(device),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "processes": ranks.world_size(),
        "precision": engine.precision,
        "compile": engine.compile,
        "norm": as_setting(engine.norm),
        "auto": list(engine.reasons),
        "command": sys.orig_argv,
    }


def commit() -> str | None:
    """Return the checkout's commit, with -dirty if it has changes, or None for an installed package.

    An installed package may lie in the working tree of another repository, for example in a .venv. The commit counts
    only if the repository's root is the checkout and the repository tracks this file.
    """
    file = Path(__file__).resolve()
    try:
        root = _git("rev-parse", "--show-toplevel", folder=file.parent)
        if Path(root).resolve() != file.parents[2]:
            return None
        _git("ls-files", "--error-unmatch", file.name, folder=file.parent)
        return _git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*", folder=file.parent) or None
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str, folder: Path) -> str:
    """Return what git prints about a folder, whatever repository the environment names, as it does in a hook."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    done = subprocess.run(
        ["git", *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=10, check=True
    )
    return done.stdout.removesuffix("\n")


def device_name(device: torch.device) -> str:
    """Return the device's name as its maker gives it."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def cpu_name() -> str:
    """Return the processor's name, with the number of threads that torch uses."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    import torch

    threads = torch.get_num_threads()
    return f"{name} ({threads} thread{'s' * (threads != 1)})"


def version(package: str) -> str | None:
    """Return the installed version of a package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
