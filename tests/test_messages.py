"""Messages go through Python's logging, and --quiet leaves warnings and the result."""

from __future__ import annotations

import io
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastres
from fastres import evaluate, export, predict
from fastres.config.schema import MAY_CHANGE, RunConfig
from fastres.train import main as train
from fastres.utils import process
from fastres.utils.errors import run_command
from fastres.utils.process import RESULT, RUN_LOG, console_log, quieten, shows_progress
from fastres.utils.progress import ProgressLine
from tests.commands import run_fastres

TINY = ("--recipe digits --model.name resnet8 --train.steps 6 --train.batch_size 16 --train.log_every 2 "
        "--train.eval_every 3 --schedule.warmup_steps 2 --engine.precision fp32").split()  # fmt: skip
OURS, RUN = logging.getLogger("fastres.data"), logging.getLogger(RUN_LOG)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("messages") / "run"
    assert train([*TINY, f"--run.dir={folder}"]) == 0
    return folder


# ---- where messages are printed ---------------------------------------------------------------------------------


def test_a_runs_log_is_on_stdout_and_other_messages_are_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with console_log():
        RUN.info("step %d", 3)
        RUN.warning("compile: false")
        OURS.info("downloading")
        OURS.warning("a name\nof two lines \x1b[2J")
        OURS.debug("unseen")
    printed = capsys.readouterr()
    assert printed.out == "step 3\ncompile: false\n"
    assert printed.err == "fastres: downloading\nfastres: a name\\nof two lines \\x1b[2J\n"


def test_a_quiet_command_prints_warnings_and_the_result(capsys: pytest.CaptureFixture[str]) -> None:
    with console_log():
        quieten()
        RUN.info("step 3")
        RUN.info("test accuracy 0.9", extra=RESULT)
        OURS.info("downloading")
        OURS.warning("a checkpoint is corrupt")
        assert not shows_progress()
        assert not ProgressLine("step", 10, enabled=True).enabled
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("test accuracy 0.9\n", "fastres: a checkpoint is corrupt\n")
    assert shows_progress()


def test_nothing_of_the_console_remains_after_a_command() -> None:
    log = logging.getLogger("fastres")
    before = (log.level, log.propagate, list(log.handlers))
    with console_log(), console_log():
        assert len(log.handlers) == len(before[2]) + 1
    assert (log.level, log.propagate, log.handlers) == before


@pytest.mark.parametrize("stream", ["closed", "ascii"])
def test_a_stream_that_cannot_be_written_raises_nothing(stream: str, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    if stream == "closed":
        out.close()
    monkeypatch.setattr(sys, "stdout", out)
    with console_log():
        RUN.info("10 × faster")


# ---- --quiet ----------------------------------------------------------------------------------------------------


def test_train_prints_the_result_only(tmp_path: Path) -> None:
    done = run_fastres("train", *TINY, "--quiet", "--run.dir", tmp_path / "run")
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = done.stdout.splitlines()
    assert line.startswith("test accuracy ") and line.endswith("history.png")
    again = run_fastres("train", *TINY, "--quiet", "--run.dir", tmp_path / "run")
    assert again.stdout.endswith("; nothing to do (another --run.dir begins a new run)\n")
    assert len(again.stdout.splitlines()) == 1


def test_train_prints_warnings_although_it_is_quiet(tmp_path: Path) -> None:
    flags = ("--quiet", "--run.dir", tmp_path / "run", "--engine.conv", "own", "--engine.conv", "torch")
    done = run_fastres("train", *TINY, *flags)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 1
    assert done.stderr == ("fastres: --engine.conv own is now --engine.conv cpp; the old name works for one version\n")


def test_quiet_is_no_setting_of_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not {"quiet", "log_level"} & vars(RunConfig()).keys() and "run.quiet" not in MAY_CHANGE
    assert train([*TINY, "--quiet", f"--run.dir={run}"]) == 0  # the same run
    assert "nothing to do" in capsys.readouterr().out


def test_evaluate_export_and_predict_print_their_result_only(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate.main([str(run), "--quiet"])
    (line,) = capsys.readouterr().out.splitlines()
    assert ": test accuracy " in line
    export.main([str(run), "--quiet", "--output", str(tmp_path / "x.safetensors")])
    assert len(capsys.readouterr().out.splitlines()) == 1
    predict.main([str(run), str(run / "confusion.png"), "--quiet"])
    assert capsys.readouterr().out.startswith("file,class,probability\n")


def test_errors_are_printed_although_a_command_is_quiet(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        run_command(lambda: evaluate.main([str(tmp_path), "--quiet"]))
    assert "is not the folder of a run" in capsys.readouterr().err


# ---- in a program of one's own ----------------------------------------------------------------------------------


def fit(folder: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (32, 8, 8, 1), dtype=np.uint8)
    labels = np.arange(32) % 4
    fastres.fit("resnet8", (images, labels), (images, labels), run_dir=folder, steps=2, batch_size=16,
                schedule={"warmup_steps": 0}, engine={"precision": "fp32"})  # fmt: skip


def test_fit_prints_the_log_of_a_run_in_a_program_without_handlers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # not pytest's
    fit(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("resnet8, ") for line in lines) and lines[-1].startswith("test accuracy ")


def test_fit_prints_nothing_below_the_level_that_a_program_sets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    log = logging.getLogger("fastres")
    log.setLevel(logging.WARNING)
    try:
        assert not shows_progress()
        fit(tmp_path)
    finally:
        log.setLevel(logging.NOTSET)
    assert capsys.readouterr() == ("", "")


def test_fit_leaves_the_messages_to_a_programs_handlers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="fastres"):
        fit(tmp_path)
    printed: Any = capsys.readouterr()
    assert printed == ("", "")
    assert {record.name for record in caplog.records} == {process.RUN_LOG}
    assert caplog.messages[-1].startswith("test accuracy ")
