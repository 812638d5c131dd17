"""The history of a run: metrics.jsonl while it trains, and history.csv, the table of its evaluations."""

from __future__ import annotations

import csv
import io
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastres.utils.atomic_io import parse_json, write_text
from fastres.utils.errors import UsageError

HISTORY = ("step", "train_loss", "train_accuracy", "eval_split", "eval_loss", "eval_accuracy", "lr", "train_time_s")
PANELS = (  # (column, title): rows loss and accuracy, columns train and validation
    ("train_loss", "train loss"),
    ("eval_loss", "{} loss"),
    ("train_accuracy", "train accuracy"),
    ("eval_accuracy", "{} accuracy"),
)
SPLITS = ("test", "validation")
AGAINST = {"step": ("step", "step"), "time": ("train_time_s", "training time")}  # (column, label of the axis)


def read_history(run: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's history.csv, numbers as float. Raise UsageError if it is missing or not a history."""
    try:
        with (run / "history.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        history = [{k: v if k == "eval_split" else float(v) for k, v in row.items()} for row in rows]
        needed = {"step", "train_time_s", "eval_split", *(column for column, _ in PANELS)}
        if not all(needed <= row.keys() and row["eval_split"] in SPLITS for row in history):
            raise ValueError("a column is missing")
        return history
    except FileNotFoundError:
        raise UsageError(
            f"{run}: holds no history.csv; give folders of runs that have evaluated at least once"
        ) from None
    except OSError as error:
        raise UsageError(f"cannot read {run / 'history.csv'}: {error.strerror}") from None
    except (ValueError, TypeError, csv.Error):
        raise UsageError(f"{run / 'history.csv'} is not a history of fastres") from None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics.jsonl, without a line that a kill has cut short."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        with suppress(ValueError, RecursionError):
            if _is_row(row := parse_json(line)):
                rows.append(row)
    return rows


def _is_row(row: Any) -> bool:
    """Return True if the row has every value that a history needs."""
    if not isinstance(row, dict) or row.get("split") not in ("train", "test", "validation"):
        return False
    numbers = ["accuracy", "lr", "train_time_s"]
    numbers += ["train_loss", "train_accuracy"] if row["split"] != "train" else []
    if type(row.get("step")) is not int or not all(type(row.get(name)) in (int, float) for name in numbers):
        return False
    return "loss" in row and type(row["loss"]) in (int, float, type(None))  # None if it was not finite


def history_of(evaluations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of a history for the rows of metrics.jsonl that are evaluations."""
    return [
        {name: row[name] for name in HISTORY if name in row}
        | {"eval_split": row["split"], "eval_accuracy": row["accuracy"]}
        | {"eval_loss": math.nan if row["loss"] is None else row["loss"]}
        for row in evaluations
    ]


def read_progress(run: Path) -> list[dict[str, Any]]:
    """Return the history of a run that may be running: history.csv is written only when a run ends or is stopped.

    Raises:
        UsageError: if the run has no evaluation yet, or its history.csv is not a history.
    """
    if not (run / "summary.json").exists():
        with suppress(OSError):
            rows = read_metrics(run / "metrics.jsonl")
            if evaluations := [row for row in rows if row["split"] != "train"]:
                return history_of(evaluations)
    return read_history(run)


def write_history(evaluations: list[dict[str, Any]], folder: Path) -> None:
    """Write history.csv into the run's folder.

    Args:
        evaluations: the rows of metrics.jsonl that are evaluations.
        folder: the run's folder.

    Raises:
        OSError: if the folder cannot be written.
    """
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, HISTORY)
    writer.writeheader()
    writer.writerows(history_of(evaluations))
    write_text(folder / "history.csv", table.getvalue())
