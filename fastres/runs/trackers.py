"""Trackers: services that show a run's metrics beside its own files."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from fastres.config.schema import Config, to_dict
from fastres.utils.atomic_io import parse_json, write_json
from fastres.utils.errors import UsageError, first_line


class Tracker(Protocol):
    """The calls that a run makes to a tracker."""

    def log(self, row: dict[str, Any]) -> None:
        """Pass on a row of metrics.jsonl."""

    def close(self) -> None:
        """Send all rows that are still buffered."""


class TensorBoardTracker:
    """Write scalars for TensorBoard into the run's folder.

    Every process writes a file of its own, which begins with a mark: TensorBoard discards all events of the files
    before, from the first step of this process on.
    """

    def __init__(self, config: Config, folder: Path, rows: list[dict[str, Any]], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        events = folder / "tensorboard"
        had_events = events.is_dir() and any(events.iterdir())
        self.writer = SummaryWriter(str(events), purge_step=step + 1)
        for row in () if had_events else rows:
            self.log(row)

    def log(self, row: dict[str, Any]) -> None:
        """Pass on a row of metrics.jsonl, and write it to the file, so that a kill does not lose it."""
        for name, value in _scalars(row):
            self.writer.add_scalar(name, value, row["step"])
        self.writer.flush()

    def close(self) -> None:
        """Close the file."""
        self.writer.close()


class WandbTracker:
    """Send scalars to Weights & Biases.

    The file wandb.json in the run's folder has the id of the W&B run, which a resumed run continues, and the last row
    that was sent when a process closed the W&B run. A kill loses rows that were logged but had not left the process,
    so a resumed run passes on all earlier rows, and the tracker leaves out those that W&B has: online those up to the
    last step on the server, and offline those that wandb.json says were sent.
    """

    def __init__(self, config: Config, folder: Path, rows: list[dict[str, Any]], step: int) -> None:
        import wandb

        self.file = folder / "wandb.json"
        known = _read_state(self.file) if step else None  # a run that starts from the beginning is another W&B run
        id_, sent = known or (None, NO_ROW)
        self.run = wandb.init(
            project="fastres",
            name=folder.name,
            dir=str(folder),
            config=to_dict(config),
            id=id_,
            resume="allow" if id_ else None,
        )
        self.sent = sent if self.run.offline else (self.run.starting_step - 1, True)
        self._write_state()
        for row in rows:
            self.log(row)

    def log(self, row: dict[str, Any]) -> None:
        """Pass on a row of metrics.jsonl, unless W&B has it already."""
        place = (row["step"], row["split"] != "train")  # the training row of a step precedes its evaluation
        if place > self.sent:
            self.run.log(dict(_scalars(row)), step=row["step"])
            self.sent = place

    def close(self) -> None:
        """Send all rows that are still buffered."""
        self.run.finish()
        self._write_state()

    def _write_state(self) -> None:
        if not self.run.disabled:
            write_json(self.file, {"id": self.run.id, "step": self.sent[0], "evaluated": self.sent[1]})


NO_ROW = (-1, True)  # the place before the first row


def _read_state(file: Path) -> tuple[str, tuple[int, bool]] | None:
    """Return the id and the place of the last row of wandb.json, or None if the file is missing or damaged."""
    try:
        state = parse_json(file.read_text(encoding="utf-8"))
        id_, step, evaluated = state["id"], state["step"], state["evaluated"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    right = isinstance(id_, str) and type(step) is int and isinstance(evaluated, bool)
    return (id_, (step, evaluated)) if right else None


# By their field in RunConfig.
TRACKERS: dict[str, Callable[[Config, Path, list[dict[str, Any]], int], Tracker]] = {
    "tensorboard": TensorBoardTracker,
    "wandb": WandbTracker,
}


def start_tracker(name: str, config: Config, folder: Path, rows: list[dict[str, Any]], step: int) -> Tracker:
    """Start a tracker, or continue what an earlier process of the run has told it.

    Args:
        name: the tracker's name in TRACKERS.
        config: the run's configuration.
        folder: the run's folder.
        rows: the rows of metrics.jsonl of the steps that are done.
        step: the number of steps that the run in this folder has done; 0 if what the folder has is of another run.

    Raises:
        UsageError: if the tracker does not start.
    """
    try:
        return TRACKERS[name](config, folder, rows, step)
    except Exception as error:  # whatever a service or its client raises
        raise UsageError(f"run.{name}: {first_line(error)}; fix the cause, or leave it out") from None


def _scalars(row: dict[str, Any]) -> list[tuple[str, float]]:
    return [
        (f"{row['split']}/{name}", value)
        for name, value in row.items()
        if name not in ("step", "split") and value is not None and math.isfinite(value)
    ]
