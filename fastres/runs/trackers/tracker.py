"""The interface of a tracker, the trackers by name, and those of a run."""

from __future__ import annotations

import logging
import math
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, Protocol

from fastres.config.schema import Config, trackers_of
from fastres.config.validation import TRACKER_GROUP
from fastres.utils.atomic_io import parse_json
from fastres.utils.errors import UsageError, first_line

LOG = logging.getLogger(__name__)

Row = dict[str, Any]  # of metrics.jsonl

# By name: module and class, which imports the tracker's package only when a run has the tracker. Other packages add
# trackers by entry points of the group TRACKER_GROUP.
TRACKERS = {
    "tensorboard": "tensorboard.TensorBoardTracker",
    "wandb": "wandb.WandbTracker",
    "trackio": "trackio.TrackioTracker",
    "mlflow": "mlflow.MlflowTracker",
}


class Tracker(Protocol):
    """A service that shows metrics. Its class is called as Tracker(config, folder, rows, step).

    The arguments are the run's configuration and folder, the rows of metrics.jsonl of the steps that are done, and the
    number of these steps, 0 if the run starts from the beginning. A tracker that has some of the rows already, from an
    earlier process of the run, leaves them out.

    Any method may raise an exception: the run then continues without the tracker.
    """

    def __init__(self, config: Config, folder: Path, rows: list[Row], step: int) -> None: ...

    def log(self, row: Row) -> None:
        """Pass on a row of metrics.jsonl."""

    def close(self) -> None:
        """Send all rows that are still buffered."""


class Trackers:
    """The trackers of a run. One that fails is left out from then on, because a run does not depend on its trackers."""

    def __init__(self) -> None:
        self._running: dict[str, Tracker] = {}

    def start(self, config: Config, folder: Path, rows: list[Row], step: int) -> None:
        """Start the configuration's trackers, or continue what an earlier process of the run has told them.

        Args:
            config: the run's configuration.
            folder: the run's folder.
            rows: the rows of metrics.jsonl of the steps that are done.
            step: the number of steps that the run in this folder has done; 0 if what the folder has is of another run.

        Raises:
            UsageError: if a tracker does not start, and the run starts from the beginning, so that nothing is lost.
        """
        for name in trackers_of(config.run):
            try:
                self._running[name] = tracker_class(name)(config, folder, rows, step)
            except Exception as error:  # whatever a service or its client raises
                if step == 0:
                    raise UsageError(
                        f"run.trackers: {name}: {first_line(error)}; fix the cause, or leave it out"
                    ) from None
                self._report(name, error)

    def log(self, row: Row) -> None:
        """Pass a row of metrics.jsonl to all trackers."""
        for name, tracker in list(self._running.items()):
            try:
                tracker.log(row)
            except Exception as error:
                del self._running[name]
                self._report(name, error)

    def close(self) -> None:
        """Close all trackers."""
        for name, tracker in self._running.items():
            try:
                tracker.close()
            except Exception as error:
                self._report(name, error)
        self._running.clear()

    def _report(self, name: str, error: Exception) -> None:
        LOG.warning("run.trackers: %s failed (%s); the run continues without it", name, first_line(error))


def tracker_class(name: str) -> type[Tracker]:
    """Return the class of the tracker of this name, which is one of TRACKERS or an entry point."""
    if name in TRACKERS:
        module, _, class_name = TRACKERS[name].partition(".")
        found: type[Tracker] = getattr(import_module(f"fastres.runs.trackers.{module}"), class_name)
        return found
    (entry, *_) = metadata.entry_points(group=TRACKER_GROUP, name=name)
    loaded: type[Tracker] = entry.load()
    return loaded


# ---- for the trackers -------------------------------------------------------------------------------------------

Place = tuple[int, bool]  # of a row: its step, and whether it is an evaluation
NO_ROW: Place = (-1, True)  # the place before the first row


def place_of(row: Row) -> Place:
    """Return the place of a row. The training row of a step precedes its evaluation."""
    return row["step"], row["split"] != "train"


def scalars_of(row: Row) -> list[tuple[str, float]]:
    """Return the finite numbers of a row, with names such as train/loss."""
    return [
        (f"{row['split']}/{name}", value)
        for name, value in row.items()
        if name not in ("step", "split") and value is not None and math.isfinite(value)
    ]


def read_state(file: Path) -> dict[str, Any]:
    """Return the content of a tracker's file in the run's folder, or nothing if it is missing or damaged."""
    try:
        state = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return state if isinstance(state, dict) else {}
