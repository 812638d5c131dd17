"""`python -m fastres.plot` draws curves of one or several runs and prints a table of final accuracies."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from PIL import Image

from fastres import plot
from fastres.runs.history import HISTORY
from tests.fixtures import rejected


def a_run(folder: Path, rate: float, seconds: float, accuracy: float | None) -> Path:
    """Write the history of four evaluations, and a summary if the run has ended."""
    folder.mkdir()
    with (folder / "history.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, HISTORY)
        writer.writeheader()
        for i in range(1, 5):
            loss = {"train_loss": 2 / (rate * i), "eval_loss": 2.2 / (rate * i)}
            accuracies = {"train_accuracy": 0.2 * i, "eval_accuracy": 0.19 * i}
            row = {"step": 100 * i, "eval_split": "test", "lr": 0.1, "train_time_s": seconds * i * i}
            writer.writerow(row | loss | accuracies)
    if accuracy is not None:
        summary = {"model": "resnet20", "parameters": 269_722, "steps": 400, "seed": 3, "test_loss": 0.5,
                   "test_accuracy": accuracy, "train_time_s": 16 * seconds}  # fmt: skip
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [a_run(tmp_path / "pad", 1.0, 2.0, 0.8125), a_run(tmp_path / "plain", 0.7, 1.0, None)]


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        picture.load()
        return picture.size


def test_one_run_is_drawn_into_its_folder(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    plot.main([str(runs[0])])
    out = capsys.readouterr().out
    assert size(runs[0] / "history.png") == (1430, 975) and "history.png" in out
    assert "0.8125" in out and "269,722" in out and "32 s" in out


def test_several_are_overlaid_and_stand_in_one_table(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    plot.main(list(map(str, runs)))
    out = capsys.readouterr().out
    assert size(tmp_path / "comparison.png") == (1430, 975)
    assert "pad" in out and "0.8125" in out and "plain" in out and "not finished" in out


def test_curves_over_training_time_differ(runs: list[Path], tmp_path: Path) -> None:
    pictures = {}
    for against in plot.AGAINST:
        plot.main([*map(str, runs), "--against", against, "--output", str(tmp_path / f"{against}.png")])
        with Image.open(tmp_path / f"{against}.png") as picture:
            pictures[against] = picture.tobytes()
    assert pictures["step"] != pictures["time"]


def test_a_folder_without_a_history_and_a_picture_that_cannot_be_written_are_refused(
    runs: list[Path], tmp_path: Path
) -> None:
    with rejected("holds no history.csv", "evaluated at least once"):
        plot.main([str(tmp_path)])
    with rejected("--outptu", "--help lists all"):
        plot.main([str(runs[0]), "--outptu", "a.png"])
    beside = tmp_path / "a.tmp"
    beside.write_text("somebody's")
    plot.main([str(runs[0]), "--output", str(tmp_path / "a.png")])
    assert beside.read_text() == "somebody's"
    with rejected("cannot be written", "nowhere"):
        plot.main([str(runs[0]), "--output", str(tmp_path / "nowhere" / "a.png")])
