"""Several real processes under torchrun: the result of one process, and an end in bounded time after any failure."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastres.runs import checkpoint
from tests.commands import (
    Forked,
    children,
    end_all,
    run_worker,
    start_module,
    start_ranks,
    torchrun,
    users_environment,
)
from tests.fixtures import sha256

# The smallest ResNet on the digits, in small batches; log_every 1 makes the metrics the losses.
DIGITS = ("--recipe digits --model.name resnet8 --schedule.name constant --schedule.warmup_steps 0 --optim.lr 0.01 "
          "--train.log_every 1 --train.eval_every 1000").split()  # fmt: skip
EXACT = [*DIGITS, "--engine.precision", "fp64", "--train.batch_size", "32", "--train.steps", "24",
         "--run.checkpoint_every", "12"]  # fmt: skip
SHARED = ["--model.sync_norm", "true"]
# Long enough for every event to happen in its middle.
LONG = [*DIGITS, "--engine.precision", "fp32", "--train.batch_size", "32", "--run.checkpoint_every", "5",
        "--train.steps", "80"]  # fmt: skip


class Job:
    """The command in one process, in several forked ranks or, with `launcher`, under torchrun."""

    def __init__(
        self,
        folder: Path,
        *flags: object,
        processes: int = 2,
        launcher: bool = False,
        restarts: int = 0,
        start_new_session: bool = False,
    ) -> None:
        self.folder, self.said = folder, folder.with_suffix(".said")
        command = ["fastres.train", *map(str, flags), "--run.dir", str(folder)]
        self.ranks: list[Forked] = []
        if launcher:
            with self.said.open("w") as said:
                self.launcher = subprocess.Popen(
                    [sys.executable, *torchrun(processes, f"--max-restarts={restarts}"), "-m", *command],
                    stdout=said, stderr=said, env=users_environment(), start_new_session=start_new_session,
                )  # fmt: skip
        elif processes > 1:
            self.ranks = start_ranks(processes, *command, stdout=self.said)
        else:
            self.ranks = [start_module(*command, stdout=self.said)]

    @property
    def alive(self) -> bool:
        """True until the launcher or every rank has ended."""
        return any(process.poll() is None for process in self.ranks or [self.launcher])

    def wait_for_step(self, step: int) -> None:
        """Return once that step is logged."""
        deadline = time.monotonic() + 240
        while step not in losses(self.folder):
            assert self.alive and time.monotonic() < deadline, self.text()
            time.sleep(0.01)

    def wait_for_text(self, text: str) -> None:
        deadline = time.monotonic() + 120
        while text not in self.text():
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.05)

    def worker(self, rank: int) -> int:
        """Return the pid of that rank's process."""
        if self.ranks:
            return self.ranks[rank].pid
        for pid in children(self.launcher.pid):
            if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                return pid
        raise AssertionError(f"rank {rank} is not there: {self.text()}")

    def end(self) -> int:
        return end_all(self.ranks) if self.ranks else self.launcher.wait(timeout=240)

    def kill(self) -> None:
        """End all processes that are left."""
        for rank in self.ranks:
            rank.kill()
        if not self.ranks and self.launcher.poll() is None:
            for pid in [*children(self.launcher.pid), self.launcher.pid]:
                os.kill(pid, signal.SIGKILL)
            self.launcher.wait()

    def text(self) -> str:
        return self.said.read_text()

    def errors(self) -> list[str]:
        """Return the errors that fastres itself printed."""
        return [line for line in self.text().splitlines() if line.startswith("fastres: error: ")]


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """Start jobs in the test's folder; none outlives the test."""
    jobs = []

    def start(name: str, *flags: object, **how: Any) -> Job:
        jobs.append(Job(tmp_path / name, *flags, **how))
        return jobs[-1]

    yield start
    for one in jobs:
        one.kill()


def losses(run: Path) -> dict[int, float]:
    """Return the loss of each training step."""
    log = run / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return {row["step"]: row["loss"] for row in rows if row["split"] == "train"}


def weights_hash(run: Path) -> str:
    return sha256(run / "model.safetensors")


def finished(folder: Path, *flags: object, processes: int) -> Path:
    job = Job(folder, *flags, processes=processes)
    assert job.end() == 0, job.text()
    return folder


# ---- the same result -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, 24 steps in float64."""
    return finished(tmp_path_factory.mktemp("one") / "run", *EXACT, *SHARED, processes=1)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "norm"), [(2, "fused"), (4, "fused"), (2, "torch")])
def test_processes_that_share_statistics_have_the_losses_of_one_and_each_others_checkpoints(
    one: Path, tmp_path: Path, processes: int, norm: str
) -> None:
    several = finished(tmp_path / "run", *EXACT, *SHARED, "--model.norm", norm, processes=processes)
    expected = losses(one)
    assert len(expected) == 24
    assert losses(several) == pytest.approx(expected, rel=1e-8)
    ours, alone = (json.loads((run / "summary.json").read_text()) for run in (several, one))
    assert ours["test_loss"] == pytest.approx(alone["test_loss"], rel=1e-8)
    assert ours["test_accuracy"] == alone["test_accuracy"] and ours["test_samples"] == 360


@pytest.mark.slow
def test_a_compiled_step_in_several_processes_has_the_losses_of_one(one: Path, tmp_path: Path) -> None:
    """On a GPU, the step is compiled by default."""
    short = "--engine.compile true --train.steps 5 --run.checkpoint_every 1000".split()
    several = finished(tmp_path / "run", *EXACT, *SHARED, *short, processes=2)
    assert json.loads((several / "summary.json").read_text())["compile"] is True
    expected = {step: loss for step, loss in losses(one).items() if step <= 5}
    assert losses(several) == pytest.approx(expected, rel=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize(("writers", "readers"), [(2, 1), (1, 2)])
def test_a_checkpoint_resumes_on_another_number_of_processes(
    one: Path, tmp_path: Path, writers: int, readers: int
) -> None:
    run = one if writers == 1 else finished(tmp_path / "run", *EXACT, *SHARED, processes=writers)
    state = run / "checkpoints/step-00000012.pt"
    again = finished(tmp_path / "again", *EXACT, *SHARED, "--run.resume", state, processes=readers)
    rest = {step: loss for step, loss in losses(one).items() if step > 12}
    assert len(rest) == 12 and losses(again) == pytest.approx(rest, rel=1e-8)


@pytest.mark.slow
def test_micro_batches_and_processes_give_the_same_gradient(one: Path, tmp_path: Path) -> None:
    """BatchNorm sees one micro-batch, or one per-rank batch, at a time."""
    apart = finished(tmp_path / "apart", *EXACT, processes=2)
    assert losses(apart) != pytest.approx(losses(one), rel=1e-3)
    accumulated = finished(tmp_path / "accumulated", *EXACT, "--train.accumulate", 2, processes=1)
    assert losses(accumulated) == pytest.approx(losses(apart), rel=1e-8)
    both = finished(tmp_path / "both", *EXACT, "--train.accumulate", 2, processes=2)
    four = finished(tmp_path / "four", *EXACT, "--train.accumulate", 4, processes=1)
    assert losses(both) == pytest.approx(losses(four), rel=1e-8)


@pytest.mark.slow
def test_a_frozen_backbone_stays_and_several_processes_have_the_losses_of_one(
    job: Callable[..., Job], tmp_path: Path
) -> None:
    """Frozen BatchNorms normalise each sample alike, so no statistics have to be shared."""
    flags = [*EXACT, "--model.freeze", "backbone", "--optim.weight_decay", "0.1", "--train.steps", "20"]
    one, two = job("one", *flags, processes=1), job("two", *flags)
    assert one.end() == two.end() == 0, one.text() + two.text()
    assert losses(two.folder) == pytest.approx(losses(one.folder), rel=1e-8)
    weights = [load_file(each.folder / "model.safetensors") for each in (one, two)]
    for key, tensor in weights[0].items():
        if not key.startswith("fc."):
            assert torch.equal(tensor, weights[1][key]), key
            statistics = {"running_mean": 0, "running_var": 1, "num_batches_tracked": 0}
            assert all(torch.all(tensor == value) for name, value in statistics.items() if key.endswith(name)), key


@pytest.mark.slow
def test_compressed_gradients_differ_and_still_train(tmp_path: Path) -> None:
    flags = [*DIGITS, "--optim.scale_lr", "true", "--engine.precision", "fp32", "--train.batch_size", 32,
             "--train.steps", 10]  # fmt: skip
    plain = finished(tmp_path / "plain", *flags, processes=2)
    compressed = finished(tmp_path / "compressed", *flags, "--engine.compress_gradients", "true", processes=2)
    assert losses(compressed)[1] == losses(plain)[1]  # before the first exchange
    assert losses(compressed) != losses(plain)
    assert losses(compressed)[10] == pytest.approx(losses(plain)[10], rel=0.1)
    rows = [json.loads(line) for line in (plain / "metrics.jsonl").read_text().splitlines()]
    assert {row["lr"] for row in rows} == {0.02}  # scale_lr: 0.01 for each process


# ---- failures ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run LONG on two undisturbed processes."""
    return finished(tmp_path_factory.mktemp("undisturbed") / "run", *LONG, processes=2)


@pytest.mark.slow
def test_a_killed_process_is_started_again_and_the_weights_are_those_of_an_undisturbed_run(
    job: Callable[..., Job], undisturbed: Path
) -> None:
    run = job("run", *LONG, "--run.resume", "never", launcher=True, restarts=2)
    for rank, step in ((1, 12), (0, 40)):
        run.wait_for_step(step)
        assert not (run.folder / "summary.json").exists()
        os.kill(run.worker(rank), signal.SIGKILL)
        run.wait_for_text(f"fastres: error: rank {1 - rank}: lost the connection to another process (")
    assert run.end() == 0, run.text()
    assert run.text().count("resumed at step") == 2
    assert weights_hash(run.folder) == weights_hash(undisturbed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_the_same_step(
    job: Callable[..., Job], undisturbed: Path, number: signal.Signals
) -> None:
    run = job("run", *LONG)
    run.wait_for_step(12)
    os.kill(run.worker(1), number)
    assert run.end() != 0
    newest = checkpoint.found(run.folder / "checkpoints")[0]
    assert f"stopped by {number.name} at step {int(newest.stem[5:])}; the state is in {newest}" in run.text()
    assert run.errors() == []
    again = job("run", *LONG)
    assert again.end() == 0, again.text()
    assert weights_hash(run.folder) == weights_hash(undisturbed)


def test_without_its_launcher_no_process_stays(job: Callable[..., Job]) -> None:
    run = job("run", *LONG, "--train.steps", 1_000_000, launcher=True)
    run.wait_for_step(5)
    workers = [run.worker(0), run.worker(1)]
    run.launcher.kill()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline, run.text()
        time.sleep(0.05)
    assert "the launcher is gone; saving and exiting" in run.text()
    assert "stopped by SIGTERM at step" in run.text()


@pytest.mark.slow
def test_a_process_that_hangs_is_named_and_ends_the_run(job: Callable[..., Job]) -> None:
    run = job("run", *LONG, "--train.steps", 1_000_000, "--run.timeout_s", 6, launcher=True)
    run.wait_for_step(12)
    stopped = run.worker(1)
    os.kill(stopped, signal.SIGSTOP)
    run.wait_for_text("fastres: error: rank 0: no step for 6 s: rank 1 does not answer; the last checkpoint is")
    os.kill(stopped, signal.SIGKILL)  # torchrun gives it 30 s
    assert run.end() != 0
    assert checkpoint.latest(run.folder / "checkpoints") is not None


def test_a_process_whose_data_does_not_come_says_so_itself() -> None:
    done = run_worker("ranks", "wait_for_data_on_rank_1", processes=2)
    assert done.returncode != 0
    # Each process reports it, unless the launcher ends it first.
    assert re.search(r"fastres: error: rank [01]: no step for 2 s: rank 1 waits for its data; ", done.stdout)


def test_all_processes_learn_of_a_non_finite_loss_in_one() -> None:
    done = run_worker("ranks", "find_a_bad_loss_on_rank_1", processes=2)
    assert done.stdout.count("first bad step 4") == 2, done.stdout


def test_weights_that_drifted_apart_are_not_saved() -> None:
    """They drift apart if a backward outside DDP comes first, because no gradients are exchanged after that."""
    done = run_worker("ranks", "compare_weights_that_drift_apart", processes=2)
    assert done.stdout.count("equal") == 2 and done.returncode != 0
    assert re.search(r"fastres: error: rank [01]: the processes' weights differ", done.stdout)


def test_an_error_of_rank_0_is_printed_once(job: Callable[..., Job], undisturbed: Path, tmp_path: Path) -> None:
    (tmp_path / "run").symlink_to(undisturbed)
    run = job("run", *LONG, "--optim.lr", 0.02)
    assert run.end() != 0
    (line,) = run.errors()
    assert line.startswith("fastres: error: rank 0: run.dir ") and "optim.lr: 0.01 -> 0.02" in line


def test_rank_0_speaks_writes_and_counts_for_all(undisturbed: Path) -> None:
    said = undisturbed.with_suffix(".said").read_text()
    assert said.count("step 80: test loss") == 1 and "FutureWarning" not in said
    assert json.loads((undisturbed / "env.json").read_text())["processes"] == 2
    assert sorted(losses(undisturbed)) == list(range(1, 81))
    # The statistics are rank 0's. Every save has checked that the weights of both are equal.
    weights = load_file(undisturbed / "model.safetensors")
    state = checkpoint.latest(undisturbed / "checkpoints")
    assert state is not None and state["step"] == 80
    assert all(torch.equal(weights[name], tensor) for name, tensor in state["trainer"]["model"].items())


@pytest.mark.slow
def test_torchrun_with_one_process_is_the_plain_command(job: Callable[..., Job], tmp_path: Path) -> None:
    flags = [*LONG, "--train.steps", 20]
    alone = finished(tmp_path / "alone", *flags, processes=1)
    launched = job("launched", *flags, launcher=True, processes=1)
    assert launched.end() == 0, launched.text()
    assert weights_hash(launched.folder) == weights_hash(alone)


@pytest.mark.slow
def test_ctrl_c_at_the_launcher_saves_one_step_of_all(job: Callable[..., Job]) -> None:
    run = job("run", *LONG, launcher=True, start_new_session=True)
    run.wait_for_step(12)
    os.killpg(run.launcher.pid, signal.SIGINT)  # as a terminal does: the launcher and its workers at once
    assert run.end() != 0
    newest = checkpoint.found(run.folder / "checkpoints")[0]
    assert f"stopped by SIGINT at step {int(newest.stem[5:])}; the state is in {newest}" in run.text()


def test_a_batch_that_the_processes_cannot_share_is_refused(job: Callable[..., Job]) -> None:
    run = job("run", *LONG, "--train.batch_size", 126, "--train.accumulate", 4)
    assert run.end() != 0
    remedy = "2 processes with --train.accumulate 4; use --train.batch_size 120 or another number of processes"
    (line,) = run.errors()
    assert f"train.batch_size: 126 cannot be split equally over {remedy}" in line and not run.folder.exists()


@pytest.mark.parametrize("flag", ["--optim.lrr", "--engine.cuda_graph"])
def test_a_usage_error_is_printed_once(job: Callable[..., Job], flag: str) -> None:
    """The first error is one of the command line, the second one of the machine."""
    run = job("run", *LONG, flag, "true")
    assert run.end() == 2
    assert run.text().count("\n") == 1 and run.errors()[0].startswith("fastres: error: rank 0: ")


@pytest.mark.slow
def test_under_torchrun_a_usage_error_is_printed_once_and_without_a_traceback_of_fastres(
    job: Callable[..., Job],
) -> None:
    run = job("run", *LONG, "--optim.lrr", 1, launcher=True)
    assert run.end() == 1
    assert len(run.errors()) == 1 and "/fastres/" not in run.text()
    assert run.text().count("did you mean --optim.lr?") == 2  # fastres's line, and torchrun's report of it
