"""Trackers have every row of metrics.jsonl once, whatever ended the processes of a run, and never end a run."""

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

from fastres.config import validation
from fastres.config.cli import parse
from fastres.runs.history import read_metrics
from fastres.runs.run_dir import RunDir
from fastres.runs.trackers.tracker import TRACKERS, Trackers, tracker_class
from fastres.train import main
from fastres.training.engine import resolve_engine
from tests.commands import run_fastres, run_worker, start_module
from tests.fixtures import rejected, sha256

FLAGS = ("--recipe digits --train.steps 40 --train.batch_size 16 --train.eval_every 20 --train.log_every 4 "
         "--model.name resnet8 --engine.precision fp32 --schedule.warmup_steps 10 --run.checkpoint_every 8 "
         "--run.keep_checkpoints 9").split()  # fmt: skip
BOTH = ("--run.tensorboard=true", "--run.trackers=wandb")

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
    tracker_class("wandb")(parse([]), tmp_path, [], 8).close()
    state = json.loads((tmp_path / "wandb.json").read_text())
    assert state.keys() == {"id", "step", "evaluated"} and state["id"] not in (1, "x")
    assert state["step"] == -1


# ---- trackio and MLflow ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["trackio", "mlflow"])
def test_a_killed_and_continued_run_is_one_run_with_every_step_once(name: str, tmp_path: Path) -> None:
    pytest.importorskip(name, reason=f"{name} is not installed: pip install '.[{name}]'")
    here = {"TRACKIO_DIR": str(tmp_path / "trackio"), "MLFLOW_TRACKING_URI": None}
    killed = run_worker("track", name, tmp_path, 0, 20, "killed", env=here)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    continued = run_worker("track", name, tmp_path, 8, 24, "closed", env=here)
    assert continued.returncode == 0, continued.stderr
    result = json.loads(continued.stdout.splitlines()[-1])
    assert result["steps"] == {"train/loss": [4, 8, 12, 16, 20, 24], "test/loss": [8, 16, 24]}
    for process in (killed, continued):
        assert json.loads(process.stdout.splitlines()[-1])["reached"] == []  # nothing has left the machine


# ---- trackers of other packages --------------------------------------------------------------------------------

PACKAGE = """
import json

class Notes:
    def __init__(self, config, folder, rows, step):
        self.file = folder / "notes.jsonl"
        self.project = config.run.project

    def log(self, row):
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\\n")

    def close(self):
        (self.file.parent / "closed").write_text(self.project)

class Broken(Notes):
    def log(self, row):
        if row["step"] > 4:
            raise ConnectionError("the server is gone")
        super().log(row)

class BrokenEnd(Notes):
    def close(self):
        raise RuntimeError("cannot close")

class BrokenStart(Notes):
    def __init__(self, *run):
        raise RuntimeError("no account")
"""
ENTRY_POINTS = """[fastres.trackers]
notes = notes_of_somebody:Notes
broken = notes_of_somebody:Broken
broken_end = notes_of_somebody:BrokenEnd
broken_start = notes_of_somebody:BrokenStart
missing = notes_of_somebody:Missing
"""


@pytest.fixture
def _package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install a package with trackers."""
    site = tmp_path / "site"
    (site / "notes-1.0.dist-info").mkdir(parents=True)
    (site / "notes-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: notes\nVersion: 1.0\n")
    (site / "notes-1.0.dist-info/entry_points.txt").write_text(ENTRY_POINTS)
    (site / "notes_of_somebody.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(site)


@pytest.mark.usefixtures("_package")
def test_an_installed_package_adds_a_tracker_by_an_entry_point(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert main([*FLAGS, "--run.trackers=[notes]", "--run.project=cats", f"--run.dir={folder}"]) == 0
    assert read_metrics(folder / "notes.jsonl") == read_metrics(folder / "metrics.jsonl")
    assert (folder / "closed").read_text() == "cats"


@pytest.mark.usefixtures("_package")
def test_a_tracker_that_fails_changes_nothing_but_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone, folder = tmp_path / "alone", tmp_path / "run"
    assert main([*FLAGS, f"--run.dir={alone}"]) == 0
    assert main([*FLAGS, "--run.trackers=[broken,broken_end]", f"--run.dir={folder}"]) == 0
    assert sha256(folder / "model.safetensors") == sha256(alone / "model.safetensors")
    assert [row["step"] for row in read_metrics(folder / "metrics.jsonl")][:2] == [4, 8]
    assert capsys.readouterr().err.splitlines() == [
        "fastres: run.trackers: broken failed (the server is gone); the run continues without it",
        "fastres: run.trackers: broken_end failed (cannot close); the run continues without it",
    ]


@pytest.mark.usefixtures("_package")
def test_a_tracker_that_does_not_start_ends_a_new_run_and_no_resumed_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = parse([*FLAGS, "--run.trackers=[broken_start,missing,notes]"])
    with rejected("run.trackers: broken_start: no account; fix the cause, or leave it out"):
        Trackers().start(config, tmp_path, [], 0)
    trackers = Trackers()
    trackers.start(config, tmp_path, [], 8)
    trackers.log({"step": 9, "split": "train", "loss": 1.0})
    assert (tmp_path / "notes.jsonl").exists() and len(caplog.records) == 2


@pytest.mark.usefixtures("_package")
def test_an_unknown_tracker_is_refused_with_the_nearest_name() -> None:
    with rejected("run.trackers: unknown tracker 'note'; did you mean 'notes'? choose from tensorboard, wandb"):
        parse(["--run.trackers=note"])


def test_a_tracker_without_its_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for flag in ("--run.trackers=[mlflow]", "--run.trackers=mlflow"):
        with rejected("run.trackers: mlflow is not installed; pip install 'fastres[mlflow]'"):
            parse([flag])
    with rejected("run.trackers: wandb is not installed; pip install 'fastres[wandb]'"):
        parse(["--run.wandb=true"])


def test_the_configuration_knows_the_trackers_of_fastres() -> None:
    assert set(validation.TRACKERS) == set(TRACKERS)
