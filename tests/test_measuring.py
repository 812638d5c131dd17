"""docs/measuring.md: every command is accepted by its program, the examples run, and what it quotes is in the code."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from fastres import profile
from fastres.config.cli import parse
from fastres.profiling import verdict
from fastres.utils import hardware
from fastres.utils.hardware import OtherLoad
from tests.commands import ROOT, run_module, run_python
from tests.fixtures import write_image_folder

PAGE = (ROOT / "docs/measuring.md").read_text(encoding="utf-8")
COMMAND = re.compile(r"`((?:OMP_NUM_THREADS=1 )?(?:(?:fastres|python -m|pytest) |bench/\w).+?)`")
FENCED = re.findall(r"^```sh\n(.+?)\n```$", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = list(dict.fromkeys([*COMMAND.findall(PAGE), *FENCED]))
LIMITS = next(command for command in FENCED if "--limits" in command)


def flags_of(command: str) -> tuple[str, list[str]]:
    """Return the program and its arguments; `…` stands for a training command's flags."""
    words = shlex.split(command.removeprefix("OMP_NUM_THREADS=1 ").replace("\\\n", ""))
    words = words[2:] if words[:2] == ["python", "-m"] else words
    program, *flags = [" ".join(words[:2]), *words[2:]] if words[0] == "fastres" else words
    return program, ["--recipe=digits" if word == "…" else word for word in flags]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_commands_program_accepts_its_flags(command: str) -> None:
    program, flags = flags_of(command)
    if program == "fastres train" or "--limits" in flags:
        parse([flag for flag in flags if flag != "--limits"])
    elif program == "fastres profile":
        profile.check_flags(profile.parser().parse_args(flags))
    elif program == "pytest":
        assert flags[-1] == "--benchmark-only" and (ROOT / flags[0]).exists()
    elif program == "bench/run_on_gpu.sh":
        assert "--data DIR" in (ROOT / program).read_text(encoding="utf-8")
    else:
        assert program in ("bench.report", "bench.counts") and not flags


@pytest.mark.slow
def test_the_benchmarks_of_the_page_are_found() -> None:
    paths = [arguments[0] for program, arguments in map(flags_of, COMMANDS) if program == "pytest"]
    done = run_python("-m", "pytest", *paths, "--collect-only", "-q", cwd=ROOT)
    assert done.returncode == 0 and "bench_throughput.py::" in done.stdout, done.stdout


@pytest.mark.slow
def test_the_example_of_limits_gives_the_pages_answer(tmp_path: Path) -> None:
    write_image_folder(tmp_path / "photos", size=1500, train=8, test=1)
    program, flags = flags_of(LIMITS)
    done = run_module(*program.split(), *flags, "--train.batch_size=4", "--model.name=resnet8", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    answer = next(line for line in PAGE.splitlines() if " limits this run (" in line)
    assert answer.removeprefix("> ").split(" (")[0] in done.stdout and answer.split("Remedy:")[1] in done.stdout


@pytest.mark.slow
def test_the_variants_of_the_page_are_measured(tmp_path: Path) -> None:
    program, flags = flags_of(next(command for command in FENCED if "+fuse" in command))
    short = ("--rounds=1", "--steps=1", "--batch-size=2", "--size=64", "--no-trace")
    done = run_module(*program.split(), *flags, *short, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "profiles/timm-resnet26d").iterdir()} == {
        "profile.json", "profile.csv", "profile.png"
    }  # fmt: skip


def test_the_thresholds_of_the_page_are_the_codes() -> None:
    assert f"a factor of {verdict.EDGE}" in PAGE and f"less than {verdict.FAR:.0%}".replace("%", " %") in PAGE
    assert hardware.OTHER_CORES == 0.25 and "used a quarter of a CPU core" in PAGE


def test_the_line_about_other_load_is_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    times = [{"unix_time_s": s, "own_s": 0.0, "all_s": used} for s, used in ((0.0, 0.0), (10.0, 12.0))]
    monkeypatch.setattr(hardware, "_cpu_times_or_none", lambda: times.pop(0))
    monkeypatch.setattr(hardware.os, "sched_getaffinity", lambda _: {0, 1})
    load = OtherLoad(threads=2)
    load.best = 2_310.0
    assert f"> `{load.line(1_104.0)}`" in PAGE
