"""Weights & Biases."""

from __future__ import annotations

from pathlib import Path

import wandb

from fastres.config.schema import Config, to_dict
from fastres.runs.trackers.tracker import NO_ROW, Place, Row, place_of, read_state, scalars_of
from fastres.utils.atomic_io import write_json


class WandbTracker:
    """Send scalars to Weights & Biases.

    The file wandb.json in the run's folder has the id of the W&B run, which a resumed run continues, and the last row
    that was sent when a process closed the W&B run. A kill loses rows that were logged but had not left the process,
    so a resumed run passes on all earlier rows, and the tracker leaves out those that W&B has: online those up to the
    last step on the server, and offline those that wandb.json says were sent.
    """

    def __init__(self, config: Config, folder: Path, rows: list[Row], step: int) -> None:
        self.file = folder / "wandb.json"
        known = _read_state(self.file) if step else None  # a run that starts from the beginning is another W&B run
        id_, sent = known or (None, NO_ROW)
        self.run = wandb.init(
            project=config.run.project,
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

    def log(self, row: Row) -> None:
        """Pass on a row of metrics.jsonl, unless W&B has it already."""
        if place_of(row) > self.sent:
            self.run.log(dict(scalars_of(row)), step=row["step"])
            self.sent = place_of(row)

    def close(self) -> None:
        """Send all rows that are still buffered."""
        self.run.finish()
        self._write_state()

    def _write_state(self) -> None:
        if not self.run.disabled:
            write_json(self.file, {"id": self.run.id, "step": self.sent[0], "evaluated": self.sent[1]})


def _read_state(file: Path) -> tuple[str, Place] | None:
    """Return the id and the place of the last row of wandb.json, or None if the file is missing or damaged."""
    state = read_state(file)
    id_, step, evaluated = state.get("id"), state.get("step"), state.get("evaluated")
    if isinstance(id_, str) and type(step) is int and isinstance(evaluated, bool):
        return id_, (step, evaluated)
    return None
