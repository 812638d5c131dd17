"""Log rows to a tracker in a process that then ends: `python -m tests.workers.track NAME FOLDER DONE LAST END`.

The process starts the tracker for a run whose first DONE steps are done, logs every fourth step up to LAST, and closes
the tracker or, if END is killed, ends as after a signal. It prints the addresses outside of this machine that it has
connected to, and for trackio and MLflow the steps that the service then has.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from fastres.config.cli import parse
from fastres.runs.trackers.tracker import tracker_class


def rows_of(first: int, last: int) -> list[dict[str, Any]]:
    """Return the rows of the steps after `first`, with an evaluation every eighth step."""
    rows = []
    for step in range(first + 4, last + 1, 4):
        rows.append({"step": step, "split": "train", "loss": 1 / step})
        if step % 8 == 0:
            rows.append({"step": step, "split": "test", "loss": 2 / step})
    return rows


def stored(name: str, folder: Path) -> dict[str, list[int]]:
    """Return the steps of every scalar, as the service has them."""
    state = json.loads((folder / f"{name}.json").read_text())
    found: dict[str, list[int]] = {}
    if name == "mlflow":
        from mlflow.tracking import MlflowClient

        client = MlflowClient(tracking_uri=(folder / "mlflow").as_uri())
        for metric in client.get_run(state["id"]).data.metrics:
            found[metric] = sorted(m.step for m in client.get_metric_history(state["id"], metric))
    else:
        from trackio.sqlite_storage import SQLiteStorage

        for row in SQLiteStorage.get_logs("ours", state["name"]):
            for metric in row.keys() & {"train/loss", "test/loss"}:
                found.setdefault(metric, []).append(row["step"])
    return {metric: sorted(steps) for metric, steps in found.items()}


def main() -> None:
    """Log the rows and print what the module's docstring says."""
    name, folder, done, last, end = sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:5]), sys.argv[5]
    reached: list[str] = []

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if (
            event == "socket.connect"
            and isinstance(arguments[1], tuple)
            and arguments[1][0] not in ("127.0.0.1", "::1")
        ):
            reached.append(str(arguments[1]))

    sys.addaudithook(watch)
    config = parse([f"--run.trackers={name}", "--run.project=ours"])
    tracker = tracker_class(name)(config, folder, rows_of(0, done), done)
    for row in rows_of(done, last):
        tracker.log(row)
    if end == "killed":
        time.sleep(2)  # trackio writes in a thread
        print(json.dumps({"reached": reached}), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    tracker.close()
    print(json.dumps({"reached": reached, "steps": stored(name, folder)}))


if __name__ == "__main__":
    main()
