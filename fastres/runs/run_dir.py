"""What a run leaves behind: its folder, its lock, configuration, environment, metrics, summary."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import filelock
import yaml

from fastres.config.schema import Config, differences, dump, to_dict
from fastres.plot import plot_curves, read_history
from fastres.runs import checkpoint
from fastres.runs.environment import environment
from fastres.training.engine import Engine
from fastres.utils import ranks
from fastres.utils.atomic_io import atomic_write
from fastres.utils.errors import RunError, UsageError, first_line

HISTORY = (
    "step",
    "train_loss",
    "train_accuracy",
    "eval_split",
    "eval_loss",
    "eval_accuracy",
    "lr",
    "train_time_s",
)


class Run:
    """The folder of a run. Every process has one of these; only rank 0 takes the folder and writes."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.folder = Path(config.run.dir or f"runs/{config.recipe}")
        self.checkpoints = self.folder / "checkpoints"
        self._lock = filelock.FileLock(self.folder / ".lock", timeout=0)
        self._trackers: list[Any] = []

    # -------------------------------------------------------------------------------- before it starts

    def examine(self) -> dict[str, Any] | None:
        """Whether this folder may be used, writing nothing: the summary of the same run where it is finished,
        None where there is something to do. UsageError where it holds another run."""
        if self.folder.exists() and not self.folder.is_dir():
            raise UsageError(f"run.dir {self.folder} is a file; choose a folder")
        known = self.folder / "config.yaml"
        if not known.exists():
            if checkpoint.found(self.checkpoints):
                raise UsageError(
                    f"run.dir {self.folder} holds checkpoints without a config.yaml; choose another folder"
                )
            return None
        if self.config.run.resume != "auto" and not ranks.restarted():
            raise UsageError(
                f"run.dir {self.folder} already holds a run; leave out --run.resume to continue it, "
                "or choose another --run.dir"
            )
        try:
            old = yaml.safe_load(known.read_text(encoding="utf-8"))
            changed = differences(old, to_dict(self.config))
        except (OSError, ValueError, AttributeError, TypeError, RecursionError, yaml.YAMLError):
            raise UsageError(f"{known} cannot be read; choose another --run.dir") from None
        if changed:
            raise UsageError(
                f"run.dir {self.folder} holds a run that differs in {'; '.join(changed[:5])}: "
                "choose another --run.dir, or give the values it was started with"
            )
        summary = self.folder / "summary.json"
        if not summary.exists():
            return None
        try:
            content = json.loads(summary.read_text(encoding="utf-8"))
            float(content["test_accuracy"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            raise UsageError(
                f"{summary} is not a summary of fastres: remove it to finish the run again"
            ) from None
        return content

    def claim(self) -> None:
        """Takes the folder: nobody else may write here until this process ends."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except filelock.Timeout:
            raise UsageError(
                f"run.dir {self.folder} is being written by another process; choose another"
            ) from None
        except OSError as error:
            raise UsageError(
                f"cannot write to run.dir {self.folder}: {error.strerror}; choose another"
            ) from None
        self.examine()  # again: another process may have been here since

    def begin(self, engine: Engine, step: int) -> None:
        """Writes what is known before the first step, and drops the metrics of steps that will be taken again."""
        with self.writing():
            if not (self.folder / "config.yaml").exists():
                write_text(self.folder / "config.yaml", dump(self.config))
            write_text(self.folder / "env.json", json.dumps(environment(engine), indent=2) + "\n")
            rows = [row for row in read_metrics(self.folder / "metrics.jsonl") if row["step"] <= step]
            write_text(self.folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        for name in TRACKERS:
            if getattr(self.config.run, name):
                try:
                    self._trackers.append(TRACKERS[name](self))
                except Exception as error:  # whatever a service or its client has to say
                    raise UsageError(f"run.{name}: {first_line(error)}; see to it, or leave it out") from None

    def kept(self) -> str:
        """Where the newest checkpoint is, in words."""
        newest = checkpoint.found(self.checkpoints)
        return f"the state is in {newest[0]}" if newest else "there is no checkpoint yet"

    @contextmanager
    def writing(self) -> Iterator[None]:
        """A full disk, or a folder that has gone, in one line."""
        try:
            yield
        except OSError as error:
            raise RunError(
                f"cannot write to run.dir {self.folder}: {error.strerror}; {self.kept()}"
            ) from None

    def release(self) -> None:
        """Lets others write here."""
        for tracker in self._trackers:
            tracker.close()
        self._lock.release()

    # -------------------------------------------------------------------------------- while it runs

    def log(self, row: dict[str, Any]) -> None:
        """Appends a line to metrics.jsonl and passes it to the trackers."""
        with self.writing():
            with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            for tracker in self._trackers:
                tracker.log(row)

    def evaluations(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl that are evaluations."""
        return [row for row in read_metrics(self.folder / "metrics.jsonl") if row["split"] != "train"]

    def write_history(self) -> None:
        """history.csv and history.png from the evaluations so far."""
        rows = [
            {name: row[name] for name in HISTORY if name in row}
            | {"eval_split": row["split"], "eval_loss": row["loss"], "eval_accuracy": row["accuracy"]}
            for row in self.evaluations()
        ]
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, HISTORY)
        writer.writeheader()
        writer.writerows(rows)
        with self.writing():
            write_text(self.folder / "history.csv", table.getvalue())
            if rows:
                plot_curves({self.folder.name: read_history(self.folder)}, self.folder / "history.png")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl that are rows; one that a kill cut short, say, is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        with suppress(ValueError, RecursionError):
            if _is_row(row := json.loads(line)):
                rows.append(row)
    return rows


def _is_row(row: Any) -> bool:
    """Whether all is there that a history needs."""
    if not isinstance(row, dict) or row.get("split") not in ("train", "test", "validation"):
        return False
    numbers = ["loss", "accuracy", "lr", "train_time_s"]
    numbers += ["train_loss", "train_accuracy"] if row["split"] != "train" else []
    return type(row.get("step")) is int and all(type(row.get(name)) in (int, float) for name in numbers)


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    with atomic_write(path) as file:
        file.write(text.encode())


# ------------------------------------------------------------------------------------------- trackers


class TensorBoardTracker:
    """Scalars for TensorBoard, in the run's folder."""

    def __init__(self, run: Run) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run.folder / "tensorboard"))

    def log(self, row: dict[str, Any]) -> None:
        for name, value in _scalars(row):
            self.writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self.writer.close()


class WandbTracker:
    """Scalars for Weights & Biases."""

    def __init__(self, run: Run) -> None:
        import wandb

        self.run = wandb.init(
            project="fastres", name=run.folder.name, dir=str(run.folder), config=to_dict(run.config)
        )

    def log(self, row: dict[str, Any]) -> None:
        self.run.log(dict(_scalars(row)), step=row["step"])

    def close(self) -> None:
        self.run.finish()


TRACKERS = {"tensorboard": TensorBoardTracker, "wandb": WandbTracker}  # by their fields in RunConfig


def _scalars(row: dict[str, Any]) -> list[tuple[str, float]]:
    return [(f"{row['split']}/{name}", value) for name, value in row.items() if name not in ("step", "split")]
