"""Ranks and world size, from torchrun's environment variables. Without torchrun there is one process."""

from __future__ import annotations

import os

LEAST = {  # the smallest value of each variable
    "WORLD_SIZE": 1,
    "RANK": 0,
    "LOCAL_WORLD_SIZE": 1,
    "LOCAL_RANK": 0,
    "TORCHELASTIC_RESTART_COUNT": 0,
}


def rank() -> int:
    """Return this process's number, 0 to world_size() - 1."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return the number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Return this process's number on its host, which is also its GPU's."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Return the number of processes on this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def restarted() -> bool:
    """Return True if torchrun has started these processes again after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def fault() -> str | None:
    """Return a line that names the variable that is missing or wrong and the remedy, or None if all are right."""
    given = os.environ
    for name, least in LEAST.items():
        text = given.get(name, str(least))
        if not (text.isascii() and text.isdecimal() and int(text) >= least):
            return f"{name}: {text!r} is not a whole number, {least} or above; {_remedy(name)}"
    if world_size() > 1:
        for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
            if not given.get(name):
                return f"{name} is not set, but WORLD_SIZE is {world_size()}; {_remedy('WORLD_SIZE')}"
        port = given["MASTER_PORT"]
        if not (port.isascii() and port.isdecimal() and int(port) < 1 << 16):
            return f"MASTER_PORT: {port!r} is not a port, 0 to 65535; {_remedy('WORLD_SIZE')}"
    for name, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if (name == "RANK" or size in given) and int(given.get(name, 0)) >= int(given.get(size, 1)):
            return f"{name}: {given[name]} is not below {size}, {given.get(size, 'which is not set')}; {_remedy(name)}"
    return None


def _remedy(name: str) -> str:
    return f"unset {name} for one process, or start several with torchrun, which sets it"
