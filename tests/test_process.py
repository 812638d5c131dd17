"""The process of a command: its streams, its signals, and the variables that torchrun sets."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import pytest
from PIL import Image

from fastres.config.schema import DataConfig
from fastres.data.sources.cache import _entry
from fastres.train import main
from tests.commands import ROOT, Forked, children, run_module, run_python, start_module, users_environment
from tests.fixtures import write_image_folder

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
            *("--steps", 1, "--variants", "eager-fp32", "--no-trace", "--output", new),
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
    done = run_module("fastres.train", "--recipe", "digits", "--engine.conv", "own", "--print-config", closed=(2,))
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


@pytest.mark.parametrize("flag", ["--help", "--version", "--print-config"])
def test_help_to_a_reader_that_has_gone_is_no_error(flag: str) -> None:
    code = f"import sys; sys.argv[1:] = ['{flag}']; from fastres.train import main, run_command; run_command(main)"
    done = run_python("-c", f"import os\nr, w = os.pipe(); os.dup2(w, 1); os.close(r)\n{code}", cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")


# ---- torchrun's variables ------------------------------------------------------------------------------------

TWO = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("env", "line"),
    [
        ({"WORLD_SIZE": ""}, "WORLD_SIZE: '' is not a whole number, 1 or above; unset WORLD_SIZE for one process"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: 'two' is not"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE: '0' is not"),
        ({"WORLD_SIZE": "2"}, "RANK is not set, but WORLD_SIZE is 2; unset WORLD_SIZE for one process"),
        ({**TWO, "RANK": "x"}, "RANK: 'x' is not a whole number, 0 or above"),
        ({**TWO, "RANK": "-1"}, "RANK: '-1' is not"),
        ({**TWO, "RANK": "2"}, "RANK: 2 is not below WORLD_SIZE, 2"),
        ({"RANK": "1"}, "RANK: 1 is not below WORLD_SIZE, which is not set; unset RANK for one process"),
        ({**TWO, "LOCAL_RANK": "0,1"}, "LOCAL_RANK: '0,1' is not"),
        ({**TWO, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK: 1 is not below LOCAL_WORLD_SIZE, 1"),
        ({"LOCAL_WORLD_SIZE": "²"}, "LOCAL_WORLD_SIZE: '²' is not"),
        ({**TWO, "MASTER_ADDR": None}, "MASTER_ADDR is not set, but WORLD_SIZE is 2"),
        ({**TWO, "MASTER_ADDR": ""}, "MASTER_ADDR is not set, but WORLD_SIZE is 2"),
        ({**TWO, "MASTER_PORT": None}, "MASTER_PORT is not set, but WORLD_SIZE is 2"),
        ({**TWO, "MASTER_PORT": "auto"}, "MASTER_PORT: 'auto' is not a port"),
        ({"TORCHELASTIC_RESTART_COUNT": "x"}, "TORCHELASTIC_RESTART_COUNT: 'x' is not"),
    ],
)
def test_a_wrong_variable_of_torchruns_is_named_in_one_line(env: dict[str, str | None], line: str) -> None:
    done = run_module("fastres.train", *TINY, env=env)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"fastres: error: {line}") and done.stderr.count("\n") == 1
    assert "torchrun" in done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_names_a_wrong_variable(name: str, tmp_path: Path) -> None:
    done = run_module(*command(name, tmp_path, tmp_path), env={"WORLD_SIZE": ""}, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.startswith("fastres: error: WORLD_SIZE: ")


def test_variables_that_slurm_sets_for_one_process_change_nothing(tmp_path: Path) -> None:
    slurm = {"SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "3", "MASTER_ADDR": "node1"}
    done = run_module("fastres.train", *TINY, "--run.dir", tmp_path / "ü", env=slurm)
    assert done.returncode == 0 and has_done_its_work("train", tmp_path)


# ---- signals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("line", "module"),  # the module that is being imported when the signal comes
    [
        ("fastres.train --recipe digits", "jsonargparse"),
        ("fastres.train --recipe digits", "torch.autograd"),
        ("fastres doctor", "fastres.runs"),
        ("fastres.evaluate {run}", "yaml"),
        ("fastres.export {run}", "torch.nn"),
        ("fastres.plot {run}", "rich.table"),
        ("fastres.profile --block basic", "torch.optim"),
        ("fastres.doctor", "torch.autograd"),
        ("bench.report --targets", "matplotlib.figure"),
    ],
)
def test_a_signal_during_the_imports_ends_a_command_in_one_line(
    finished: Path, line: str, module: str, number: signal.Signals
) -> None:
    command = ["-m", *line.format(run=finished).split()]
    assert stopped_during_imports(command, module, 0, number) == (
        128 + number,
        [f"fastres: stopped by {number.name}\n"],
    )


@pytest.mark.parametrize("module", ["fastres", "jsonargparse", "torch.autograd"])
def test_a_signal_during_the_imports_ends_the_installed_program_in_one_line(module: str, tmp_path: Path) -> None:
    program = tmp_path / "fastres"  # as pip writes it
    program.write_text(
        "import sys\nfrom fastres.__main__ import run\nif __name__ == '__main__':\n    sys.exit(run())\n"
    )
    command = [str(program), "train", "--recipe", "digits", "--run.dir", str(tmp_path / "run")]
    assert stopped_during_imports(command, module, 0, signal.SIGTERM) == (143, ["fastres: stopped by SIGTERM\n"])


@pytest.mark.slow
def test_a_signal_during_any_import_ends_a_command_in_one_line(tmp_path: Path) -> None:
    """Some modules in C++ would abort the process if Python raised an exception during their initialisation."""
    command = ["-m", "fastres.train", "--recipe", "digits", "--run.dir", str(tmp_path / "run")]
    for after in range(0, 1600, 100):
        status, said = stopped_during_imports(command, "fastres", after, signal.SIGINT)
        assert (status, said) == (130, ["fastres: stopped by SIGINT\n"]), after


def stopped_during_imports(command: list[str], module: str, after: int, number: int) -> tuple[int, list[str]]:
    """Start a new Python with these arguments, and send the signal when it has imported the module and `after` more.

    Return the exit status, and the lines that the command has printed on stderr.
    """
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", *command],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=users_environment(), cwd=ROOT,
    )  # fmt: skip
    assert process.stderr is not None
    rows = iter(process.stderr)
    for row in rows:
        if row.split("|")[-1].strip().startswith(module) and "fastres.utils" not in row:
            break
    for _ in range(after):
        next(rows, "")
    process.send_signal(number)
    said = [row for row in rows if not row.startswith("import time:")]
    process.communicate()
    return process.returncode, said


IMAGES = "--data.source imagefolder --data.image_size 32 --model.name resnet20".split()


def write_slow_images(folder: Path, *, size: int = 4000) -> None:
    """Replace the images below `folder` by large ones, each of which takes a fraction of a second to decode."""
    image = io.BytesIO()
    Image.new("RGB", (size, size)).save(image, "png")
    for file in folder.rglob("*.*"):
        file.write_bytes(image.getvalue())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_images_are_decoded_ends_the_run_at_once(tmp_path: Path, number: signal.Signals) -> None:
    write_image_folder(tmp_path / "data", size=32)
    write_slow_images(tmp_path / "data/train")
    flags = [*IMAGES, "--data.root", tmp_path / "data", "--data.cache", tmp_path / "cache"]
    flags += ["--data.workers", 1, "--run.dir", tmp_path / "run"]
    process = start_module("fastres.train", *flags, stdout=tmp_path / "out")
    wait_for(lambda: list((tmp_path / "cache").glob("*.tmp")), process)
    process.send_signal(number)
    assert process.wait(60) == 128 + number
    assert (tmp_path / "out").read_text() == f"fastres: stopped by {number.name}\n"
    assert not (tmp_path / "run").exists() and not list((tmp_path / "cache").glob("*.tmp"))


def test_a_signal_while_another_process_decodes_ends_the_run_at_once(tmp_path: Path) -> None:
    write_image_folder(tmp_path / "data", size=32)
    cache = tmp_path / "cache"
    entry = _entry(tmp_path / "data/train", "train", DataConfig(cache=str(cache)))
    flags = (*IMAGES, "--data.root", tmp_path / "data", "--data.cache", cache, "--run.dir", tmp_path / "run")
    with filelock.FileLock(entry.with_suffix(".lock")):
        process = start_module("fastres.train", *flags, stdout=tmp_path / "out")
        wait_for(lambda: "waiting for another process" in text_of(tmp_path / "out"), process)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    assert text_of(tmp_path / "out").splitlines()[1:] == ["fastres: stopped by SIGINT"]


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_signal_while_the_dataloader_waits_for_its_first_batch_ends_the_run_at_once(
    tmp_path: Path, part: str
) -> None:
    """Images of test/ are first decoded when the evaluation is warmed up, those of train/ before step 1."""
    write_image_folder(tmp_path / "data", size=32)
    flags = [*IMAGES, "--data.root", tmp_path / "data", "--data.loader", "dataloader", "--data.workers", 2]
    flags += ["--data.augment", "resized_crop", "--train.batch_size", 4, "--engine.compile", "false"]
    write_slow_images(tmp_path / "data" / part)
    process = start_module("fastres.train", *flags, "--run.dir", tmp_path / "run", stdout=tmp_path / "out")
    wait_for(lambda: (tmp_path / "run/metrics.jsonl").exists() and children(process.pid), process)
    for pid in (process.pid, *children(process.pid)):  # as a terminal does
        os.kill(pid, signal.SIGINT)
    assert process.wait(60) == 130
    assert text_of(tmp_path / "out").splitlines()[-1] == "fastres: stopped by SIGINT"
    assert text_of(tmp_path / "out").count("SIGINT") == 1 and "Traceback" not in text_of(tmp_path / "out")


def test_a_signal_during_a_step_is_announced_before_the_step_ends(tmp_path: Path) -> None:
    flags = [*TINY, "--train.steps", 1_000_000, "--run.checkpoint_every", 1_000_000, "--run.dir", tmp_path / "run"]
    process = start_module("fastres.train", *flags, stdout=tmp_path / "out", stderr=tmp_path / "err")
    wait_for(lambda: '"step": 3' in text_of(tmp_path / "run/metrics.jsonl"), process)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert text_of(tmp_path / "err") == "fastres: SIGINT: the run finishes its step, saves and stops\n"
    last = text_of(tmp_path / "out").splitlines()[-1]
    assert last.startswith("stopped by SIGINT at step ")
    assert last.endswith(str((tmp_path / "run/checkpoints").resolve() / (tmp_path / "run/checkpoints/last").readlink()))


def test_a_signal_during_one_long_call_is_announced_and_ends_the_command() -> None:
    """Python's handler waits for the end of the call; here it never comes, as with the name of a server."""
    code = (
        "import ctypes, os, signal, threading\n"
        "from fastres.utils.errors import run_command\n"
        "def main():\n"
        "    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "    mutex = (ctypes.c_long * 8)()\n"
        "    for _ in range(2): ctypes.CDLL(None).pthread_mutex_lock(mutex)\n"
    )
    done = run_python("-c", code + "run_command(main)", cwd=ROOT, timeout_s=60)
    assert (done.returncode, done.stderr) == (130, "fastres: stopped by SIGINT\n")


@pytest.mark.parametrize("delay_s", [0.1, 0.3, pytest.param(0.6, marks=pytest.mark.slow)])
def test_a_signal_at_any_moment_leaves_a_run_that_the_same_command_finishes(tmp_path: Path, delay_s: float) -> None:
    process = start_module("fastres.train", *TINY, "--run.dir", tmp_path / "ü", stdout=tmp_path / "out")
    time.sleep(delay_s)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) in (0, 130)
    assert "Traceback" not in text_of(tmp_path / "out")
    done = run_module("fastres.train", *TINY, "--run.dir", tmp_path / "ü")
    assert done.returncode == 0 and has_done_its_work("train", tmp_path)


@pytest.mark.parametrize("times", [1, 3])
def test_main_trains_in_a_thread_without_handlers(tmp_path: Path, times: int) -> None:
    statuses: list[int] = []
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    def work() -> None:
        statuses.append(main([*TINY, "--run.dir", str(tmp_path / f"{len(statuses)}")]))

    for _ in range(times):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert statuses == [0] * times
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


def text_of(path: Path) -> str:
    """Return the file's text, or nothing if the file does not exist yet."""
    return path.read_text() if path.exists() else ""


def wait_for(condition: Callable[[], object], process: Forked) -> None:
    """Return when the condition is true."""
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.stdout.read_text()
        assert time.monotonic() < deadline, process.stdout.read_text()
        time.sleep(0.01)
