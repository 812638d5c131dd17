"""trackio, which keeps metrics on this machine, under TRACKIO_DIR."""

from __future__ import annotations

import contextlib
import sys
import uuid
from pathlib import Path

import trackio

from fastres.config.schema import Config, to_dict
from fastres.runs.trackers.tracker import NO_ROW, Row, place_of, read_state, scalars_of
from fastres.utils.atomic_io import write_json


class TrackioTracker:
    """Write scalars to trackio.

    The file trackio.json in the run's folder has the name of the trackio run, which a resumed run continues with the
    rows after the last step that trackio has stored. trackio's own lines go to stderr.
    """

    def __init__(self, config: Config, folder: Path, rows: list[Row], step: int) -> None:
        file = folder / "trackio.json"
        known = read_state(file).get("name") if step else None  # a run from the beginning is another trackio run
        name = known if isinstance(known, str) else f"{folder.name}-{uuid.uuid4().hex[:8]}"
        with contextlib.redirect_stdout(sys.stderr):
            self.run = trackio.init(
                project=config.run.project,
                name=name,
                config=to_dict(config),
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        write_json(file, {"name": name})
        last_step = self.run._initial_last_step
        self.sent = NO_ROW if last_step is None else (last_step, True)
        for row in rows:
            self.log(row)

    def log(self, row: Row) -> None:
        """Pass on a row of metrics.jsonl, unless trackio has it already."""
        if place_of(row) > self.sent:
            self.run.log(dict(scalars_of(row)), step=row["step"])
            self.sent = place_of(row)

    def close(self) -> None:
        """Write all rows that are still buffered."""
        with contextlib.redirect_stdout(sys.stderr):
            trackio.finish()  # not run.finish(), after which trackio would finish the run again as the process ends
