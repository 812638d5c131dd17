"""The folder of a run: its lock, configuration, environment, metrics and summary."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock

from fastres.config.files import rename_values
from fastres.config.formats import read_yaml
from fastres.config.schema import Config, differences, dump, to_dict
from fastres.data.description import DataDescription
from fastres.runs import checkpoint
from fastres.runs.environment import environment
from fastres.runs.history import read_metrics, write_history
from fastres.runs.pictures.curves import curves_of, plot_curves
from fastres.runs.pictures.facts import read_facts
from fastres.runs.trackers.tracker import Trackers
from fastres.training.engine import Engine
from fastres.utils import ranks
from fastres.utils.atomic_io import json_of, parse_json, write_json, write_text
from fastres.utils.errors import RunError, UsageError


class RunDir:
    """The folder of a run. Every rank has one of these; only rank 0 acquires the folder and writes."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.data: DataDescription | None = None  # known once the data is open
        self.folder = Path(config.run.dir or f"runs/{config.recipe}")
        self.checkpoints = self.folder / "checkpoints"
        self._lock = filelock.FileLock(self.folder / ".lock", timeout=0)
        self._trackers = Trackers()

    def check_resumable(self) -> dict[str, Any] | None:
        """Return the summary if the folder holds this run and the run is finished, otherwise None. Nothing is written.

        A run that ended before its first checkpoint has left nothing to lose, so another may use its folder.

        Raises:
            UsageError: if the folder holds another run or cannot be used.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise UsageError(f"run.dir {self.folder} is a file; choose a folder")
        known = self.folder / "config.yaml"
        if not known.exists():
            if checkpoint.found(self.checkpoints):
                raise UsageError(
                    f"run.dir {self.folder} holds checkpoints without a config.yaml; choose another folder"
                )
            return None
        if not self._holds_results():
            return None
        if self.config.run.resume != "auto" and not ranks.restarted():
            raise UsageError(
                f"run.dir {self.folder} already holds a run; leave out --run.resume to continue it, "
                "or choose another --run.dir"
            )
        try:
            old = rename_values(read_yaml(known.read_text(encoding="utf-8")))
            changed = differences(old, to_dict(self.config))
        except (OSError, ValueError, AttributeError, TypeError, RecursionError):
            raise UsageError(f"{known} cannot be read; choose another --run.dir") from None
        if changed:
            newest = checkpoint.found(self.checkpoints)[:1]
            way = f", or continue from its checkpoint with --run.dir NEW --run.resume {newest[0]}" if newest else ""
            raise UsageError(
                f"run.dir {self.folder}: holds a run that differs in {', '.join(changed[:5])}; "
                f"choose another --run.dir, or give the values that the run was started with{way}"
            )
        return self._finished_summary()

    def _holds_results(self) -> bool:
        """Return True if the folder holds a checkpoint or a finished run's weights or summary."""
        final = ("summary.json", "model.safetensors")
        return bool(checkpoint.found(self.checkpoints)) or any((self.folder / name).exists() for name in final)

    def _finished_summary(self) -> dict[str, Any] | None:
        """Return the content of summary.json, or None if it does not exist. Raise UsageError if it is no summary."""
        summary = self.folder / "summary.json"
        if not summary.exists():
            return None
        try:
            content: dict[str, Any] = parse_json(summary.read_text(encoding="utf-8"))
            float(content["test_accuracy"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            raise UsageError(f"{summary}: is not a summary of fastres; remove it to finish the run again") from None
        return content

    def acquire(self) -> None:
        """Lock the folder, so that no other process writes to it until this one ends or releases it.

        Raises:
            UsageError: if another process holds the lock, or the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except filelock.Timeout:
            raise UsageError(f"run.dir {self.folder} is being written by another process; choose another") from None
        except OSError as error:
            raise UsageError(f"cannot write to run.dir {self.folder}: {error.strerror}; choose another") from None
        self.check_resumable()  # again, because another process may have written here meanwhile

    def begin(self, engine: Engine, step: int) -> None:
        """Write configuration, data and environment, and drop the metrics after `step`, whose steps will run again.

        A resumed run writes its configuration again, because fields of MAY_CHANGE, such as data.root, may have changed.
        A run in a folder without results is another run than the failed one before it, even if it continues from a
        checkpoint elsewhere, so none of the metrics in the folder are its own.
        """
        done = step if self._holds_results() else 0
        with self.writing():
            write_text(self.folder / "config.yaml", dump(self.config))
            if self.data is not None:
                write_json(self.folder / "data.json", self.data.to_dict())
            write_json(self.folder / "env.json", environment(engine))
            rows = [row for row in read_metrics(self.folder / "metrics.jsonl") if row["step"] <= done]
            write_text(self.folder / "metrics.jsonl", "".join(json_of(row) + "\n" for row in rows))
        self._trackers.start(self.config, self.folder, rows, done)

    def checkpoint_hint(self) -> str:
        """Return a phrase that names the newest checkpoint."""
        newest = checkpoint.found(self.checkpoints)
        return f"the state is in {newest[0]}" if newest else "there is no checkpoint yet"

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turn an OSError of the block, such as a full disk, into a RunError of one line."""
        try:
            yield
        except OSError as error:
            raise RunError(
                f"cannot write to run.dir {self.folder}: {error.strerror}; {self.checkpoint_hint()}"
            ) from None

    def release(self) -> None:
        """Close the trackers and let other processes write to the folder."""
        self._trackers.close()
        self._lock.release()

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl and pass it to the trackers."""
        with self.writing(), (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json_of(row) + "\n")
        self._trackers.log(row)

    def evaluations(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl that are evaluations."""
        return [row for row in read_metrics(self.folder / "metrics.jsonl") if row["split"] != "train"]

    def write_history(self, summary: dict[str, Any] | None = None) -> None:
        """Write history.csv and, if there are any evaluations, history.png.

        Args:
            summary: the content of summary.json, which is written last, for the picture of a finished run.
        """
        with self.writing():
            evaluations = self.evaluations()
            write_history(evaluations, self.folder)
            if evaluations:
                plot_curves(curves_of([read_facts(self.folder, summary)]), self.folder / "history.png")
