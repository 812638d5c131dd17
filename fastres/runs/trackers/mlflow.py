"""MLflow."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from fastres.config.schema import Config, to_dict
from fastres.runs.trackers.tracker import NO_ROW, Place, Row, place_of, read_state, scalars_of
from fastres.utils.atomic_io import write_json


class MlflowTracker:
    """Log scalars to MLflow: to the server or database of MLFLOW_TRACKING_URI, or into the run's folder.

    The file mlflow.json in the run's folder has the id of the MLflow run, which a resumed run continues with the rows
    after the last one that MLflow has.
    """

    def __init__(self, config: Config, folder: Path, rows: list[Row], step: int) -> None:
        # MLflow reads these when it is imported: without a server, nothing may leave the machine.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow.entities import Metric
        from mlflow.tracking import MlflowClient

        self._metric = Metric
        store = os.environ.get("MLFLOW_TRACKING_URI") or (folder / "mlflow").absolute().as_uri()
        self.client = MlflowClient(tracking_uri=store)
        file = folder / "mlflow.json"
        known = read_state(file).get("id") if step else None  # a run from the beginning is another MLflow run
        if isinstance(known, str):
            self.id = known
            self.client.update_run(self.id, status="RUNNING")
            self.sent = self._last_place()
        else:
            self.id = self._create_run(config, folder)
            self.sent = NO_ROW
            write_json(file, {"id": self.id})
        for row in rows:
            self.log(row)

    def log(self, row: Row) -> None:
        """Pass on a row of metrics.jsonl, unless MLflow has it already."""
        if place_of(row) > self.sent:
            now_ms = int(time.time() * 1_000)
            metrics = [self._metric(name, value, now_ms, row["step"]) for name, value in scalars_of(row)]
            self.client.log_batch(self.id, metrics=metrics)
            self.sent = place_of(row)

    def close(self) -> None:
        """Mark the MLflow run as ended."""
        self.client.set_terminated(self.id)

    def _create_run(self, config: Config, folder: Path) -> str:
        """Create an MLflow run with the configuration as its parameters, and return its id."""
        from mlflow.entities import Param

        experiment = self.client.get_experiment_by_name(config.run.project)
        experiment_id = experiment.experiment_id if experiment else self.client.create_experiment(config.run.project)
        id_: str = self.client.create_run(experiment_id, run_name=folder.name).info.run_id
        fields = {
            f"{section}.{name}": value
            for section, values in to_dict(config).items()
            if isinstance(values, dict)
            for name, value in values.items()
        }
        self.client.log_batch(id_, params=[Param(name, str(value)) for name, value in fields.items()])
        return id_

    def _last_place(self) -> Place:
        """Return the place of the last row that MLflow has."""
        names: dict[str, Any] = self.client.get_run(self.id).data.metrics
        places = [
            (metric.step, not name.startswith("train/"))
            for name in names
            if name.endswith("/loss")
            for metric in self.client.get_metric_history(self.id, name)
        ]
        return max(places, default=NO_ROW)
