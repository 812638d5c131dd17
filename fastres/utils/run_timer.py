"""Measure the wall time of a run, and the time that it spends on training alone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

STARTED = time.perf_counter()  # fastres imports this first, before torch is imported


class RunTimer:
    """Seconds of training and of the whole run, added up over restarts. Stopping synchronises the device."""

    def __init__(self, device_type: str) -> None:
        self.device_type = device_type
        self._train = self._wall = 0.0  # of earlier processes of the run; _train also has the intervals of this one
        self._since: float | None = None

    def start(self) -> None:
        """Start counting training time."""
        self._wait()
        self._since = time.perf_counter()

    def stop(self) -> None:
        """Stop counting training time."""
        self._train, self._since = self.train_time_s, None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the block, such as an evaluation or a checkpoint, from the training time."""
        self.stop()
        yield
        self.start()

    @property
    def train_time_s(self) -> float:
        """Return the seconds of training so far."""
        if self._since is None:
            return self._train
        self._wait()
        return self._train + time.perf_counter() - self._since

    @property
    def wall_time_s(self) -> float:
        """Return the seconds since the run began, without interruptions."""
        return self._wall + time.perf_counter() - STARTED

    def state_dict(self) -> dict[str, float]:
        """Return both times."""
        return {"train_time_s": self.train_time_s, "wall_time_s": self.wall_time_s}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from saved times."""
        self._train, self._wall = state["train_time_s"], state["wall_time_s"]

    def _wait(self) -> None:
        if self.device_type == "cuda":
            import torch

            torch.cuda.synchronize()
