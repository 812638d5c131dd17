"""The process of a command: its streams."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastres.train import main
from tests.commands import ROOT, Forked, run_module, run_python, start_module, users_environment

TINY = ("--recipe digits --model.name resnet8 --train.steps 6 --train.batch_size 32 --schedule.warmup_steps 3 "
        "--train.eval_every 3 --train.log_every 1 --run.checkpoint_every 2").split()  # fmt: skip
COMMANDS = ("train", "evaluate", "export", "plot", "profile", "doctor", "report")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run whose name is not ASCII."""
    folder = tmp_path_factory.mktemp("finished") / "rü"
    assert main([*TINY, "--run.dir", str(folder)]) == 0
    return folder


def command(name: str, run: Path, folder: Path) -> list[Any]:
    """Return a short command line of each command, which writes into `folder/ü`."""
    new = folder / "ü"
    return {
        "train": ["fastres.train", *TINY, "--run.dir", new],
        "evaluate": ["fastres.evaluate", run],
        "export": ["fastres.export", run, "--output", new],
        "plot": ["fastres.plot", run, "--output", new],
        "profile": [
            *("fastres.profile", "--block", "basic", "--channels", 4, "--size", 4, "--batch-size", 2, "--rounds", 1),
            *("--steps", 1, "--variants", "eager-fp32", "--no-trace", "--out", new),
        ],
        "doctor": ["fastres.doctor", "--data.root", new],
        "report": ["bench.report", "--targets"],
    }[name]


def has_done_its_work(name: str, folder: Path) -> bool:
    """Return True if the command has written everything that it writes into `folder/ü`."""
    new = folder / "ü"
    if name == "train":
        return json.loads((new / "summary.json").read_text())["steps"] == 6 and (new / "history.png").exists()
    if name == "profile":
        return (new / "profile.json").exists() and (new / "profile.png").exists()
    return new.exists() or name in ("evaluate", "doctor", "report")


# ---- readers that go away, full disks, closed streams, narrow encodings --------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_whose_reader_has_gone_does_its_work(finished: Path, tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    process = start_module(*command(name, finished, tmp_path), stdout=tmp_path / "pipe", cwd=ROOT)
    with (tmp_path / "pipe").open("rb"):
        pass
    assert process.wait(60) == 0
    assert has_done_its_work(name, tmp_path)


@pytest.mark.parametrize("name", ["train", "plot"])
def test_a_command_whose_disk_for_output_is_full_does_its_work(finished: Path, tmp_path: Path, name: str) -> None:
    process = start_module(*command(name, finished, tmp_path), stdout=Path("/dev/full"), cwd=ROOT)
    assert process.wait(60) == 0
    assert has_done_its_work(name, tmp_path)


def test_a_run_whose_terminal_closes_goes_on(tmp_path: Path) -> None:
    """A write to a terminal that is gone fails with EIO; with the bar, rich writes from a thread too."""
    master, slave = os.openpty()
    process = start_module(
        "fastres.train", *TINY, "--run.dir", tmp_path / "ü", stdout=Path(os.ttyname(slave)), env={"TERM": "xterm"}
    )
    assert b"resnet8" in read_until(master, b"resnet8", process)
    os.close(slave)
    os.close(master)
    assert process.wait(60) == 0
    assert has_done_its_work("train", tmp_path)


def read_until(master: int, wanted: bytes, process: Forked) -> bytes:
    """Return what the process has written to the terminal once it contains `wanted`."""
    shown = b""
    while wanted not in shown:
        assert process.poll() is None, shown
        shown += os.read(master, 4096)
    return shown


def test_a_reader_that_does_not_keep_up_with_a_pipe_that_does_not_block_gets_everything(tmp_path: Path) -> None:
    """A program that shares the pipe may have set it not to block, so that a write may fail with EAGAIN."""
    code = (
        "import os, sys; os.set_blocking(1, False)\n"
        "from fastres.utils.errors import run_command\n"
        "run_command(lambda: [print(i) for i in range(100_000)] and None)"
    )
    slow = "import sys, time; time.sleep(0.3); print(len(sys.stdin.read().splitlines()))"
    done = subprocess.run(
        ["sh", "-c", '"$0" -c "$1" | "$0" -c "$2"', sys.executable, code, slow],
        capture_output=True, text=True, env=users_environment(), cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.stdout == "100000\n" and done.stderr == ""


@pytest.mark.parametrize("name", COMMANDS)
def test_characters_that_the_output_cannot_encode_are_escaped(finished: Path, tmp_path: Path, name: str) -> None:
    done = run_module(*command(name, finished, tmp_path), env={"PYTHONIOENCODING": "ascii"}, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert has_done_its_work(name, tmp_path)
    assert (r"\xfc" in done.stdout) == (name != "report")


def test_an_error_about_a_name_that_cannot_be_encoded_is_one_line(tmp_path: Path) -> None:
    done = run_module("fastres.plot", tmp_path / "rü", env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and r"r\xfc: holds no history.csv" in done.stderr


def test_a_folder_whose_name_is_not_utf8_is_escaped(tmp_path: Path) -> None:
    run = os.fsdecode(os.fsencode(tmp_path) + b"/r\xff")
    done = run_module("fastres.train", *TINY, "--run.dir", run)
    assert done.returncode == 0, done.stderr
    assert r"r\udcff" in done.stdout and json.loads(Path(run, "summary.json").read_text())["steps"] == 6


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_without_standard_streams_does_its_work(finished: Path, tmp_path: Path, name: str) -> None:
    done = run_module(*command(name, finished, tmp_path), closed=(0, 1, 2), cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert has_done_its_work(name, tmp_path)


def test_without_stderr_nothing_goes_to_stdout_that_belongs_there(finished: Path) -> None:
    """To print(), a stream that is None is stdout."""
    done = run_module("fastres.train", "--recipe", "digits", "--engine.conv", "own", "--print_config", closed=(2,))
    assert done.returncode == 0 and "conv: cpp" in done.stdout and "now" not in done.stdout


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_new_python_without_a_stream_does_its_work(finished: Path, tmp_path: Path, closed: str) -> None:
    shell = f'exec "$0" -m fastres.plot "$1" --output "$2" {closed}'
    done = subprocess.run(
        ["sh", "-c", shell, sys.executable, finished, tmp_path / "p"],
        capture_output=True, text=True, env=users_environment(), cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == ""
    assert (tmp_path / "p").read_bytes().startswith(b"\x89PNG")


def test_a_usage_error_without_stderr_keeps_its_exit_status() -> None:
    done = run_module("fastres.train", "--optim.lrr", 1, closed=(2,))
    assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.parametrize("flag", ["--help", "--version", "--print_config"])
def test_help_to_a_reader_that_has_gone_is_no_error(flag: str) -> None:
    code = f"import sys; sys.argv[1:] = ['{flag}']; from fastres.train import main, run_command; run_command(main)"
    done = run_python("-c", f"import os\nr, w = os.pipe(); os.dup2(w, 1); os.close(r)\n{code}", cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
