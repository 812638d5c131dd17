"""Save the state of a run in a checkpoint, and resume from it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from fastres.config.schema import Config
from fastres.data.description import changes, from_dict
from fastres.distributed import process_group
from fastres.distributed.process_group import ProcessGroup
from fastres.runs import checkpoint
from fastres.runs.run_dir import RunDir
from fastres.training.metrics import Metrics
from fastres.training.step import TrainStep
from fastres.utils import ranks
from fastres.utils.errors import UsageError, first_line
from fastres.utils.run_timer import RunTimer


def load_named(config: Config, run: RunDir, group: ProcessGroup) -> checkpoint.State | None:
    """Return the state of the checkpoint that run.resume names, or None if it names none. Collective.

    A run that torchrun restarted resumes from its own checkpoints instead, if it has any by then.
    """
    if config.run.resume in ("auto", "never"):
        return None
    if ranks.restarted() and group.broadcast_from_rank0(lambda: checkpoint.found(run.checkpoints)):
        return None
    return group.broadcast_from_rank0(lambda: checkpoint.load(Path(config.run.resume)))


def load_latest(run: RunDir, group: ProcessGroup) -> checkpoint.State | None:
    """Return the state of the folder's newest checkpoint that can be read, or None. Collective."""
    return group.broadcast_from_rank0(lambda: checkpoint.latest(run.checkpoints))


def restore(state: checkpoint.State | None, run: RunDir, step: TrainStep, timer: RunTimer) -> tuple[int, Metrics]:
    """Copy a checkpoint's state into the step and the timer.

    Args:
        state: a checkpoint's state; None starts from the beginning.
        run: the run, with the description of its data.
        step: the step.
        timer: the run's timer.

    Returns:
        The number of steps that are done, and their metrics since the last evaluation.

    Raises:
        UsageError: if the checkpoint belongs to other data or another model, or is beyond the run's last step.
    """
    if state is None:
        return 0, Metrics()
    _check_data(state, run)
    try:
        step.load_state_dict(state["trainer"])
        timer.load_state_dict(state["clock"])
        start, since_eval = state["step"], Metrics(**state["window"])
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UsageError(f"run.resume: the checkpoint belongs to another model ({first_line(error)})") from None
    if start > (steps := run.config.train.steps):
        raise UsageError(f"run.resume: the checkpoint is of step {start:,}, beyond train.steps {steps:,}")
    return start, since_eval


def _check_data(state: checkpoint.State, run: RunDir) -> None:
    """Raise UsageError if the data has changed since the checkpoint was written."""
    if run.data is None or "data" not in state:  # checkpoints of earlier versions do not describe their data
        return
    if found := changes(from_dict(state["data"], "the checkpoint"), run.data):
        raise UsageError(
            f"run.resume: the data has changed since the checkpoint of step {state['step']:,}: {'; '.join(found)}; "
            "restore the data, or start a new run from the run's weights (--run.dir NEW --model.weights FILE)"
        )


def save(run: RunDir, group: ProcessGroup, done: int, step: TrainStep, timer: RunTimer, since_eval: Metrics) -> None:
    """Write a checkpoint of `done` steps. Collective.

    Raises:
        RunError: if the ranks' weights differ, or the checkpoint cannot be written.
    """
    process_group.assert_replicas_equal(step.model)
    trainer = step.state_dict()
    group.watchdog.heartbeat("saves a checkpoint")
    if ranks.rank() == 0:
        state = {"step": done, "window": asdict(since_eval), "clock": timer.state_dict(), "trainer": trainer}
        state |= {} if run.data is None else {"data": run.data.to_dict()}
        checkpoint.save(run.checkpoints, done, state, run.config.run.keep_checkpoints)
