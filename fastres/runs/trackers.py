"""Trackers: services that show a run's metrics beside its own files."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from fastres.config.schema import Config, to_dict
from fastres.utils.errors import UsageError, first_line


class Tracker(Protocol):
    """The calls that a run makes to a tracker."""

    def log(self, row: dict[str, Any]) -> None:
        """Pass on a row of metrics.jsonl."""

    def close(self) -> None:
        """Send all rows that are still buffered."""


class TensorBoardTracker:
    """Write scalars for TensorBoard into the run's folder."""

    def __init__(self, config: Config, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, row: dict[str, Any]) -> None:
        """Pass on a row of metrics.jsonl."""
        for name, value in _scalars(row):
            self.writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Write all rows that are still buffered."""
        self.writer.close()


class WandbTracker:
    """Send scalars to Weights & Biases."""

    def __init__(self, config: Config, folder: Path) -> None:
        import wandb

        self.run = wandb.init(project="fastres", name=folder.name, dir=str(folder), config=to_dict(config))

    def log(self, row: dict[str, Any]) -> None:
        """Pass on a row of metrics.jsonl."""
        self.run.log(dict(_scalars(row)), step=row["step"])

    def close(self) -> None:
        """Send all rows that are still buffered."""
        self.run.finish()


# By their field in RunConfig.
TRACKERS: dict[str, Callable[[Config, Path], Tracker]] = {"tensorboard": TensorBoardTracker, "wandb": WandbTracker}


def start_tracker(name: str, config: Config, folder: Path) -> Tracker:
    """Start a tracker by its name in TRACKERS. Raise UsageError if it does not start."""
    try:
        return TRACKERS[name](config, folder)
    except Exception as error:  # whatever a service or its client raises
        raise UsageError(f"run.{name}: {first_line(error)}; fix the cause, or leave it out") from None


def _scalars(row: dict[str, Any]) -> list[tuple[str, float]]:
    return [
        (f"{row['split']}/{name}", value)
        for name, value in row.items()
        if name not in ("step", "split") and value is not None and math.isfinite(value)
    ]
