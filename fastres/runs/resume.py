"""Save the state of a run in a checkpoint, and resume from it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
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


@dataclass(frozen=True)
class Best:
    """The best point of the evaluation curve."""

    step: int
    accuracy: float
    split: str  # "test" or "validation": the samples that chose it


@dataclass(frozen=True)
class Position:
    """The position of a run: the steps that are done and what the log knows of them."""

    step: int = 0
    since_eval: Metrics = field(default_factory=Metrics)  # metrics of the steps since the last evaluation
    best: Best | None = None


def load_named(config: Config, run: RunDir, group: ProcessGroup) -> checkpoint.State | None:
    """Return the state of the checkpoint that run.resume names, or None if it names none. Collective.

    A run that torchrun restarted resumes from its own checkpoints instead, if it has any by then.
    """
    if config.run.resume in ("auto", "never"):
        return None
    if ranks.restarted() and group.broadcast_from_rank0(lambda: checkpoint.found(run.checkpoints)):
        return None
    # The best checkpoint so far stays in the other run's folder, so this run chooses among its own.
    return group.broadcast_from_rank0(lambda: checkpoint.load(Path(config.run.resume)) | {"best": None})


def load_latest(run: RunDir, group: ProcessGroup) -> checkpoint.State | None:
    """Return the state of the folder's newest checkpoint that can be read, or None. Collective."""
    return group.broadcast_from_rank0(lambda: checkpoint.latest(run.checkpoints))


def restore(state: checkpoint.State | None, run: RunDir, step: TrainStep, timer: RunTimer) -> Position:
    """Copy a checkpoint's state into the step and the timer, and return the position of the run.

    Args:
        state: a checkpoint's state; None starts from the beginning.
        run: the run, with the description of its data.
        step: the step.
        timer: the run's timer.

    Raises:
        UsageError: if the checkpoint belongs to other data or another model, or is beyond the run's last step.
    """
    if state is None:
        return Position()
    _check_data(state, run)
    try:
        step.load_state_dict(state["trainer"])
        timer.load_state_dict(state["clock"])
        best = state.get("best")  # checkpoints of earlier versions have none
        position = Position(state["step"], Metrics(**state["window"]), best and Best(**best))
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UsageError(f"run.resume: the checkpoint belongs to another model ({first_line(error)})") from None
    if position.step > (steps := run.config.train.steps):
        raise UsageError(f"run.resume: the checkpoint is of step {position.step:,}, beyond train.steps {steps:,}")
    return position


def _check_data(state: checkpoint.State, run: RunDir) -> None:
    """Raise UsageError if the data has changed since the checkpoint was written."""
    if run.data is None or "data" not in state:  # checkpoints of earlier versions do not describe their data
        return
    if found := changes(from_dict(state["data"], "the checkpoint"), run.data):
        raise UsageError(
            f"run.resume: the data has changed since the checkpoint of step {state['step']:,}: {'; '.join(found)}; "
            "restore the data, or start a new run from the run's weights (--run.dir NEW --model.weights FILE)"
        )


def save(run: RunDir, group: ProcessGroup, position: Position, step: TrainStep, timer: RunTimer) -> None:
    """Write a checkpoint of the run's position. Collective.

    Raises:
        RunError: if the ranks' weights differ, or the checkpoint cannot be written.
    """
    process_group.assert_replicas_equal(step.model)
    trainer = step.state_dict()
    group.watchdog.heartbeat("saves a checkpoint")
    if ranks.rank() == 0:
        best = position.best
        state = {"step": position.step, "window": asdict(position.since_eval), "best": best and asdict(best)}
        state |= {"clock": timer.state_dict(), "trainer": trainer}
        state |= {} if run.data is None else {"data": run.data.to_dict()}
        checkpoint.save(
            run.checkpoints, position.step, state, run.config.run.keep_checkpoints, best.step if best else None
        )
