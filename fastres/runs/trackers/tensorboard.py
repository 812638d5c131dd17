"""TensorBoard."""

from __future__ import annotations

from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from fastres.config.schema import Config
from fastres.runs.trackers.tracker import Row, scalars_of


class TensorBoardTracker:
    """Write scalars for TensorBoard into the run's folder.

    Every process writes a file of its own, which begins with a mark: TensorBoard discards all events of the files
    before, from the first step of this process on.
    """

    def __init__(self, config: Config, folder: Path, rows: list[Row], step: int) -> None:
        events = folder / "tensorboard"
        had_events = events.is_dir() and any(events.iterdir())
        self.writer = SummaryWriter(str(events), purge_step=step + 1)
        for row in () if had_events else rows:
            self.log(row)

    def log(self, row: Row) -> None:
        """Pass on a row of metrics.jsonl, and write it to the file, so that a kill does not lose it."""
        for name, value in scalars_of(row):
            self.writer.add_scalar(name, value, row["step"])
        self.writer.flush()

    def close(self) -> None:
        """Close the file."""
        self.writer.close()
