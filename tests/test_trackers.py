"""TensorBoard and Weights & Biases have every row of metrics.jsonl once, whatever ended the processes of a run."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastres.config.cli import parse
from fastres.runs.history import read_metrics
from fastres.runs.run_dir import RunDir
from fastres.runs.trackers import start_tracker
from fastres.training.engine import resolve_engine
from tests.commands import run_fastres, start_module

FLAGS = ("--recipe digits --train.steps 40 --train.batch_size 16 --train.eval_every 20 --train.log_every 4 "
         "--model.name resnet8 --engine.precision fp32 --schedule.warmup_steps 10 --run.checkpoint_every 8 "
         "--run.keep_checkpoints 9").split()  # fmt: skip
BOTH = ("--run.tensorboard=true", "--run.wandb=true")

Steps = dict[str, list[int]]  # by tag


@pytest.fixture(autouse=True, scope="module")
def _offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let W&B write to files only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
            patch.setenv(name, str(tmp_path_factory.mktemp("wandb")))
        yield


def ended_by(number: int, folder: Path, *flags: str) -> None:
    """Run until step 20 is evaluated, send a signal, and leave the checkpoint of step 8 alone, so that steps repeat."""
    output = folder.with_suffix(".output")
    process = start_module("fastres.train", *FLAGS, *flags, "--run.dir", folder, stdout=output)
    deadline = time.monotonic() + 120
    while not any(row["split"] == "test" for row in read_metrics(folder / "metrics.jsonl")):
        assert process.poll() is None and time.monotonic() < deadline, output.read_text()
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait() == (-number if number == signal.SIGKILL else 128 + number)
    assert not (folder / "summary.json").exists(), "ended too late to show anything"
    for path in (folder / "checkpoints").iterdir():
        if path.name != "step-00000008.pt":
            path.unlink()
    # The names of TensorBoard's files order them by the second in which they began.
    time.sleep(1)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run with both trackers that was killed after step 20; its checkpoint is of step 8."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    ended_by(signal.SIGKILL, folder, *BOTH)
    return folder


def continued(folder: Path, *flags: str) -> None:
    """Run to the end."""
    done = run_fastres("train", *FLAGS, *flags, "--run.dir", folder)
    assert done.returncode == 0, done.stderr


def steps_of_metrics(folder: Path) -> Steps:
    """Return the steps of every scalar of metrics.jsonl."""
    steps = defaultdict(list)
    for row in read_metrics(folder / "metrics.jsonl"):
        for name in row.keys() - {"step", "split"}:
            steps[f"{row['split']}/{name}"].append(row["step"])
    assert steps["train/loss"] == list(range(4, 41, 4)) and steps["test/loss"] == [20, 40]
    return dict(steps)


def steps_of_tensorboard(folder: Path) -> Steps:
    """Return the steps of every scalar, as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def steps_of_wandb(folder: Path) -> dict[str, Steps]:
    """Return the steps of every scalar by W&B run, as W&B reads its files in the order in which they began."""
    from wandb.util import get_core_path

    steps: dict[str, Steps] = {}
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        run = steps.setdefault(path.stem, defaultdict(list))
        # `wandb leet inspect --json`, without the second that its Python takes
        inspect = [get_core_path(), "leet", "inspect", "--no-observability", "--json", "--run-file", path, path.parent]
        lines = subprocess.run(inspect, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
        for line in lines:
            item = json.loads(line).get("history", {}).get("item", {})
            for name in (name for name in item if not name.startswith("_")):
                run[name].append(item["_step"])
    return steps


# ---- a run of several processes in a row ---------------------------------------------------------------------


def test_a_run_from_a_checkpoint_elsewhere_has_no_metrics_of_a_failed_attempt(killed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(killed, tmp_path / "run", symlinks=True))
    shutil.rmtree(folder / "checkpoints")
    config = parse([*FLAGS, "--run.tensorboard=true", "--run.dir", str(folder)])
    run = RunDir(config)
    run.begin(resolve_engine(config), 12)  # the failed attempt's rows are of steps 4 to 20
    run.release()
    assert read_metrics(folder / "metrics.jsonl") == []
    assert not any(steps_of_tensorboard(folder).values())


def test_after_a_kill_both_have_every_step_once(killed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(killed, tmp_path / "run", symlinks=True))
    assert steps_of_tensorboard(folder)["test/accuracy"] == [20]  # a kill loses no row of TensorBoard's
    continued(folder, *BOTH)
    steps = steps_of_metrics(folder)
    assert steps_of_tensorboard(folder) == steps
    (in_wandb,) = steps_of_wandb(folder).values()  # one W&B run
    assert in_wandb == steps


@pytest.mark.slow
def test_after_a_signal_the_same_wandb_run_gets_the_other_rows(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ended_by(signal.SIGTERM, folder, "--run.wandb=true")
    (before,) = steps_of_wandb(folder).values()
    assert before["test/loss"] == [20] and before["train/loss"][:5] == [4, 8, 12, 16, 20]
    continued(folder, "--run.wandb=true")
    (in_wandb,) = steps_of_wandb(folder).values()
    assert in_wandb == steps_of_metrics(folder)


@pytest.mark.slow
def test_a_tracker_that_a_resumed_run_begins_gets_the_rows_before(killed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(killed, tmp_path / "run", symlinks=True))
    for name in ("tensorboard", "wandb"):
        shutil.rmtree(folder / name)
    (folder / "wandb.json").unlink()
    continued(folder, *BOTH)
    steps = steps_of_metrics(folder)
    assert steps_of_tensorboard(folder) == steps
    assert list(steps_of_wandb(folder).values()) == [steps]


@pytest.mark.slow
def test_a_run_after_a_failed_attempt_is_another_run_for_both(killed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(killed, tmp_path / "run", symlinks=True))
    shutil.rmtree(folder / "checkpoints")
    continued(folder, *BOTH, "--run.seed=1")
    steps = steps_of_metrics(folder)
    assert steps_of_tensorboard(folder) == steps
    _, new = sorted(steps_of_wandb(folder).values(), key=len)
    assert new == steps


# ---- the state of W&B ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "[]", '{"id": 1, "step": 2, "evaluated": true}', '{"id": "x"}'])
def test_with_a_damaged_wandb_json_a_resumed_run_is_another_wandb_run(tmp_path: Path, text: str) -> None:
    (tmp_path / "wandb.json").write_text(text)
    start_tracker("wandb", parse([]), tmp_path, [], 8).close()
    state = json.loads((tmp_path / "wandb.json").read_text())
    assert state.keys() == {"id", "step", "evaluated"} and state["id"] not in (1, "x")
    assert state["step"] == -1
