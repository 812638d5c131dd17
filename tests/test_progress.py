"""The line of progress, in real terminals of several widths."""

from __future__ import annotations

import fcntl
import os
import re
import select
import struct
import termios
from pathlib import Path

import pytest

from fastres.utils.progress import ProgressLine
from tests.commands import start_module

FIGURES = ("loss 0.1234", "accuracy 97.50%", "2,314 images/s", "lr 0.09999")


def terminal(columns: int) -> tuple[int, str]:
    """Return the descriptor that shows what a new terminal of this width is sent, and the terminal's path."""
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    return master, os.ttyname(slave)


def lines_of(shown: bytes) -> list[str]:
    """Return the lines that a terminal was sent, without its control sequences."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    return [line.rstrip() for line in re.split(r"[\r\n]+", text) if line.strip()]


@pytest.mark.parametrize(
    ("columns", "steps", "bar", "figures"),
    [
        (140, "12,000/64,000", True, 4),
        (108, "12,000/64,000", True, 4),
        (100, "12,000/64,000", False, 4),
        (80, "12,000/64,000", False, 3),
        (60, "12,000/64,000", False, 2),
        (40, "12,000/64,000", False, 0),
        (40, "300/600", False, 1),
    ],
)
def test_the_bar_goes_first_and_then_the_last_figures(
    monkeypatch: pytest.MonkeyPatch, columns: int, steps: str, bar: bool, figures: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    done, total = (int(number.replace(",", "")) for number in steps.split("/"))
    progress = ProgressLine("step", total, enabled=True)
    progress.update(done, FIGURES)
    with progress.console.capture() as captured:
        progress.console.print(*progress._bar.get_renderables())
    line = captured.get().rstrip("\n")
    assert "\n" not in line and len(line.rstrip()) <= columns
    words = " ".join([*FIGURES[:figures], "-:--:-- left"])
    assert line.rstrip() == f"step {'━━━╸' + ' ' * 17 if bar else ''}{steps} {words}"


@pytest.mark.parametrize("columns", [80, 40])
def test_a_narrow_terminal_shows_step_total_and_time_left(tmp_path: Path, columns: int) -> None:
    flags = "--recipe digits --model.name resnet8 --train.steps 12 --train.batch_size 32 --schedule.warmup_steps 3"
    master, path = terminal(columns)
    process = start_module(
        *("fastres.train", *flags.split(), "--train.log_every", 1, "--run.dir", "run"),
        stdout=Path(path), stderr=tmp_path / "err", env={"TERM": "xterm", "COLUMNS": None}, cwd=tmp_path,
    )  # fmt: skip
    shown = b""
    while select.select([master], [], [], 0.1)[0] or process.poll() is None:
        if select.select([master], [], [], 0)[0]:
            shown += os.read(master, 4096)
    assert process.wait() == 0, (tmp_path / "err").read_text()
    bars = [line for line in lines_of(shown) if line.startswith("step ") and line.endswith(" left")]
    assert bars and all(re.search(r"\d+/12 .*(\d|-):[-\d]{2}:[-\d]{2} left$", line) for line in bars), bars
    assert any(line.startswith("step 12/12 loss ") for line in bars)
    assert not any("━" in line for line in bars if "loss" in line)
