"""The log of a training run: the progress line, metrics.jsonl, the curves, and summary.json."""

from __future__ import annotations

import logging
import math
import signal
from pathlib import Path
from typing import Any

import torch

from fastres.config.schema import Config
from fastres.models.weights import save_weights
from fastres.runs.checkpoint import BEST
from fastres.runs.classes import accuracy_lines, output_names, write_classes
from fastres.runs.environment import device_name
from fastres.runs.exporting import metadata
from fastres.runs.resume import Best, Position
from fastres.runs.run_dir import RunDir
from fastres.training.build import Parts
from fastres.training.metrics import Evaluation, Metrics
from fastres.utils.atomic_io import write_json
from fastres.utils.errors import RunError
from fastres.utils.hardware import OtherLoad
from fastres.utils.process import RESULT, RUN_LOG
from fastres.utils.progress import ProgressLine
from fastres.utils.run_timer import RunTimer

LOG = logging.getLogger(RUN_LOG)


class TrainingLog:
    """Log a run on rank 0, and keep the metrics since the last log line and the last evaluation on every rank.

    Args:
        config: the run's configuration.
        run: the run's folder.
        parts: the run's parts.
        timer: the run's timer.
        progress: the line in the terminal.
        position: the run's position at its start.
        is_main: True on rank 0, which writes.
    """

    def __init__(
        self,
        config: Config,
        run: RunDir,
        parts: Parts,
        timer: RunTimer,
        progress: ProgressLine,
        position: Position,
        *,
        is_main: bool,
    ) -> None:
        self.config, self.run, self.parts, self.timer, self.progress = config, run, parts, timer, progress
        self.is_main = is_main
        self.start, self.since_eval, self.best = position.step, position.since_eval, position.best
        self.last_eval: Evaluation | None = None
        self._logged, self._logged_s = self.start, timer.train_time_s  # step and time of the last log line
        on_cpu = parts.step.engine.device.type == "cpu"
        self._other_load = OtherLoad(threads=torch.get_num_threads() if on_cpu else 1)

    # -------------------------------------------------------------------------------- when something is due

    def evaluation_due(self, done: int) -> bool:
        """Return True if the curve gets a point after `done` steps."""
        return self._due(done, self.config.train.eval_every)

    def checkpoint_due(self, done: int) -> bool:
        """Return True if a checkpoint is saved after `done` steps: at its interval, and after the best evaluation."""
        return self._due(done, self.config.run.checkpoint_every) or (self.best is not None and self.best.step == done)

    def line_due(self, done: int) -> bool:
        """Return True if the training metrics are logged after `done` steps."""
        return self._due(done, self.config.train.log_every) or self.evaluation_due(done)

    def _due(self, done: int, every: int) -> bool:
        return done % every == 0 or done == self.config.train.steps

    # -------------------------------------------------------------------------------- lines and rows

    def position(self, done: int) -> Position:
        """Return the run's position after `done` steps."""
        return Position(done, self.since_eval, self.best)

    def begin(self) -> None:
        """Log the notes, and a line with the run's network, data, length, device and folder."""
        for note in self.parts.notes:
            self._say(note)
        config, data = self.config, self.parts.data
        engine = self.parts.step.engine
        self._say(
            f"{config.model.name}, {self.parts.parameters:,} parameters, {data.source.name}: "
            f"{len(data.training):,} training images, {config.train.steps:,} steps of {config.train.batch_size} "
            f"on {device_name(engine.device)} in {engine.precision}, {self.run.folder}"
            + (f", resumed at step {self.start:,}" if self.start else "")
        )

    def read_metrics(self) -> Metrics:
        """Return the sums over all ranks since the last reset. Collective.

        Raises:
            RunError: if the loss has become non-finite.
        """
        metrics, bad_step = self.parts.step.metrics.read()
        if bad_step >= 0:
            raise RunError(
                f"the loss became non-finite at step {bad_step:,}; {self.run.checkpoint_hint()}; "
                "try a smaller --optim.lr or --engine.precision fp32"
            )
        return metrics

    def training(self, done: int, lr: float, metrics: Metrics) -> None:
        """Log the training metrics after `done` steps, and start new sums."""
        self.parts.step.metrics.reset()
        self.since_eval += metrics
        seconds = max(self.timer.train_time_s - self._logged_s, 1e-9)
        speed = (done - self._logged) * self.config.train.batch_size / seconds
        self._logged, self._logged_s = done, self.timer.train_time_s
        self.progress.update(
            done,
            (
                f"loss {metrics.mean_loss:.4f}",
                f"accuracy {metrics.accuracy:.2%}",
                f"{speed:,.0f} images/s",
                f"lr {lr:.4g}",
            ),
        )
        if self.is_main and (line := self._other_load.line(speed)):
            LOG.warning("%s", line)
        self._append(
            {"step": done, "split": "train", "loss": metrics.mean_loss, "accuracy": metrics.accuracy,
             "lr": lr, "images_per_s": speed, "train_time_s": self.timer.train_time_s}
        )  # fmt: skip

    def evaluation(self, done: int, lr: float, metrics: Evaluation) -> None:
        """Log a point of the curve after `done` steps, and remember the best one.

        An earlier point may be non-finite, for example in fp16 while running statistics lag behind.

        Raises:
            RunError: if the loss of the last point is not finite.
        """
        split = self.parts.data.curve_split
        self._say(f"step {done:,}: {split} loss {metrics.mean_loss:.4f}, accuracy {metrics.accuracy:.2%}")
        self._append(
            {"step": done, "split": split, "loss": metrics.mean_loss, "accuracy": metrics.accuracy,
             "train_loss": self.since_eval.mean_loss, "train_accuracy": self.since_eval.accuracy,
             "lr": lr, "train_time_s": self.timer.train_time_s}
        )  # fmt: skip
        self.since_eval, self.last_eval = Metrics(), metrics
        if self.best is None or metrics.accuracy > self.best.accuracy:
            self.best = Best(done, metrics.accuracy, split)
        if done == self.config.train.steps:
            self._check_finite(split, metrics)

    def stopped(self, done: int, number: int) -> None:
        """Log that signal `number` stopped the run after `done` steps."""
        if self.is_main:
            self.run.write_history()
            name = signal.Signals(number).name
            LOG.warning("stopped by %s at step %s; %s", name, f"{done:,}", self.run.checkpoint_hint())

    def _check_finite(self, split: str, final: Metrics) -> None:
        """Raise RunError if the loss of the last evaluation is not finite, before anything is saved with it."""
        if not math.isfinite(final.mean_loss):
            raise RunError(
                f"the {split} loss is not finite after the last step; {self.run.checkpoint_hint()}; "
                "try a smaller --optim.lr or --engine.precision fp32"
            )

    def _say(self, line: str, extra: dict[str, bool] | None = None) -> None:
        """Log a line on rank 0."""
        if self.is_main:
            LOG.info("%s", line, extra=extra)

    def _append(self, row: dict[str, Any]) -> None:
        if self.is_main:
            self.run.append_metrics(row)

    # -------------------------------------------------------------------------------- the end

    def final_is_known(self) -> bool:
        """Return True if the last point of the curve is the result on the test set."""
        return self.last_eval is not None and self.parts.data.curve_split == "test"

    def finish(self, final: Evaluation, *, captured: bool) -> None:
        """Write the weights, the curves, the result by class and the summary, and print the result.

        Args:
            final: metrics of the test set after the last step.
            captured: True if the steps were replayed from a CUDA graph.

        Raises:
            RunError: if the loss is not finite.
        """
        self._check_finite("test", final)
        if not self.is_main:
            return
        folder: Path = self.run.folder
        with self.run.writing():
            save_weights(self.parts.model, folder / "model.safetensors", metadata(self.config, self.run.data))
            self.run.write_history(self._summary(final, captured))
            write_classes(final, self.class_names, folder, self.config.model.name)
            write_json(folder / "summary.json", self._summary(final, captured))  # again: its times include the pictures
        for line in (*accuracy_lines(final, self.class_names), *self._best_line()):
            self._say(line)
        self._say(
            f"test accuracy {final.accuracy:.4f}, loss {final.mean_loss:.4f}, after {self.config.train.steps:,} "
            f"steps in {self.timer.train_time_s:.1f} s of training; curves: {folder / 'history.png'}",
            extra=RESULT,
        )

    @property
    def class_names(self) -> list[str]:
        """Return the names of the network's outputs."""
        return output_names(self.parts.data.source.classes, self.parts.evaluator.sums.classes)

    def _best_line(self) -> list[str]:
        """Return the line about the best checkpoint, unless it is that of the last step."""
        best = self.best
        if best is None or best.step == self.config.train.steps:
            return []
        path = self.run.checkpoints / BEST
        return [f"best checkpoint by {best.split} accuracy: step {best.step:,}, {best.accuracy:.4f}, {path}"]

    def _summary(self, final: Evaluation, captured: bool) -> dict[str, Any]:
        config, parts, timer = self.config, self.parts, self.timer
        steps, engine = config.train.steps, parts.step.engine
        best, top5 = self.best, final.top_accuracy
        at_90 = next((row for row in self.run.evaluations() if row["accuracy"] >= 0.9), None)
        return {
            "recipe": config.recipe,
            "model": config.model.name,
            "data": parts.data.source.name,
            "test_accuracy": final.accuracy,
            "test_loss": final.mean_loss,
            **({} if top5 is None else {"test_top5": top5}),
            "test_samples": final.samples,
            "test_views": 1 + config.train.eval_mirrored,  # views of an image whose logits are averaged
            "steps": steps,
            "parameters": parts.parameters,
            "images_per_s": steps * config.train.batch_size / timer.train_time_s if steps else None,
            "train_time_s": timer.train_time_s,
            "wall_time_s": timer.wall_time_s,
            "final_evaluation_s": parts.evaluator.time_s,
            "first_step_at_90": at_90 and at_90["step"],
            "first_train_time_s_at_90": at_90 and at_90["train_time_s"],
            "curve": parts.data.curve_split,
            "best_step": best and best.step,
            "best_accuracy": best and best.accuracy,
            "best_split": best and best.split,  # the samples that chose it
            "device": device_name(engine.device),
            "precision": engine.precision,
            "compile": parts.step.inner.compiled,
            "cuda_graph": captured,
            "seed": config.run.seed,
        }
