"""`fastres plot` draws curves of one or several runs and prints a table of final accuracies.

tests/test_report.py has the HTML report.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from PIL import Image

from fastres import plot
from fastres.runs.history import HISTORY, PANELS
from fastres.runs.pictures import style
from fastres.runs.pictures.curves import add_legend, curves_of, draw_panel, titles
from fastres.runs.pictures.facts import RunFacts, read_facts
from tests.fixtures import rejected


def a_run(folder: Path, rate: float, seconds: float, accuracy: float | None, evaluations: int = 4) -> Path:
    """Write the history of some evaluations, and a summary if the run has ended."""
    folder.mkdir()
    with (folder / "history.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, HISTORY)
        writer.writeheader()
        for i in range(1, evaluations + 1):
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
    assert size(runs[0] / "history.png")[0] == 1430 and "history.png" in out
    assert "0.8125" in out and "269,722" in out and "32 s" in out


def test_several_are_overlaid_and_stand_in_one_table(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    plot.main(list(map(str, runs)))
    out = capsys.readouterr().out
    assert size(tmp_path / "comparison.png")[0] == 1430
    assert "pad" in out and "0.8125" in out and "plain" in out and "not finished" in out


def test_curves_over_training_time_differ(runs: list[Path], tmp_path: Path) -> None:
    pictures = {}
    for against in plot.AGAINST:
        plot.main([*map(str, runs), "--against", against, "--output", str(tmp_path / f"{against}.png")])
        with Image.open(tmp_path / f"{against}.png") as picture:
            pictures[against] = picture.tobytes()
    assert pictures["step"] != pictures["time"]


def test_folders_without_a_history_are_skipped_with_a_line_each(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "picture.png").write_bytes(b"")
    folders = [tmp_path / "empty", runs[0], tmp_path / "picture.png"]
    plot.main([*map(str, folders), "--output", str(tmp_path / "a.png")])
    out = capsys.readouterr().out
    assert "pad" in out and "empty" not in out
    first, second = caplog.messages
    assert f"skipped {folders[0]}: holds no history.csv" in first and f"skipped cannot read {folders[2]}" in second
    with rejected("none of the 2 folders", "evaluated at least once"):
        plot.main([str(folders[0]), str(folders[2])])
    with rejected(str(folders[0]), "holds no history.csv"):
        plot.main([str(folders[0])])
    with rejected("no RUN"):
        plot.main([])


def test_a_run_is_drawn_while_it_trains(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = {"lr": 0.1, "train_time_s": 1.0, "train_loss": 2.0, "loss": 2.1, "train_accuracy": 0.1, "accuracy": 0.2}
    rows = [{"split": "test", "step": step} | figures for step in (10, 20)]
    running = tmp_path / "running"
    running.mkdir()
    cut_short = '{"split": "test", "st'
    (running / "metrics.jsonl").write_text("\n".join([*map(json.dumps, rows), cut_short]))
    assert [row["step"] for row in read_facts(running).history] == [10, 20]
    plot.main([str(running)])
    assert "not finished" in capsys.readouterr().out and size(running / "history.png")[0] == 1430
    (runs[0] / "metrics.jsonl").write_text(json.dumps(rows[0]))
    assert len(read_facts(runs[0]).history) == 4  # that of a finished run is in history.csv


def test_a_picture_that_cannot_be_written_is_refused(runs: list[Path], tmp_path: Path) -> None:
    with rejected("--outptu", "--help lists all"):
        plot.main([str(runs[0]), "--outptu", "a.png"])
    beside = tmp_path / "a.tmp"
    beside.write_text("somebody's")
    plot.main([str(runs[0]), "--output", str(tmp_path / "a.png")])
    assert beside.read_text() == "somebody's"
    with rejected("cannot be written", "nowhere"):
        plot.main([str(runs[0]), "--output", str(tmp_path / "nowhere" / "a.png")])


# ---- what a picture says -------------------------------------------------------------------------------------


def facts(
    folder: Path, seed: int = 0, lr: float = 0.1, accuracy: float | None = 0.75, evaluations: int = 4
) -> RunFacts:
    """Write a run with a configuration and return its facts."""
    a_run(folder, 1 + 0.1 * seed, 1 + seed, accuracy, evaluations)
    (folder / "config.yaml").write_text(
        f"optim: {{lr: {lr}}}\nrun: {{seed: {seed}, dir: {folder}}}\ntrain: {{steps: 400}}\n"
    )
    (folder / "env.json").write_text(json.dumps({"device": "a device", "precision": "bf16"}))
    return read_facts(folder)


def test_the_title_has_network_data_device_and_result(tmp_path: Path) -> None:
    done, running = facts(tmp_path / "a"), facts(tmp_path / "b", accuracy=None, evaluations=2)
    title, below = titles(curves_of([done]))
    assert title == "resnet20 on cifar10: test accuracy 0.7500"
    assert below == "a device · bf16 · 400 steps · seed 3 · a"
    assert titles(curves_of([running]))[0] == "resnet20 on cifar10: unfinished, step 200 of 400"
    assert titles(curves_of([done, running]))[0] == "resnet20 on cifar10: 2 runs"


def test_seeds_of_one_configuration_are_one_line_with_a_band(tmp_path: Path) -> None:
    runs = [facts(tmp_path / f"wide-seed{seed}", seed, accuracy=None, evaluations=3) for seed in (1, 10)]
    other = facts(tmp_path / "_other", seed=2, lr=0.2, evaluations=3)
    band, single = curves = curves_of([*runs, other])
    assert (band.label, single.label) == ("wide, 2 seeds", "_other") and band.runs == runs
    low, high = band.extremes("train_loss")
    assert low[0] == pytest.approx(2 / 2.0) and high[0] == pytest.approx(2 / 1.1)
    assert band.mean("train_loss")[0] == pytest.approx((low[0] + high[0]) / 2)
    assert [curve.label for curve in curves_of(runs, separate=True)] == ["wide-seed1", "wide-seed10"]
    runs[0].environment["device"] = "a slower device"
    assert [len(curves_of(runs, against)) for against in plot.AGAINST] == [1, 2]
    figure = style.new_figure(11, 7)
    draw_panel(figure.subplots(), curves, "train_loss", "step")
    (shade,) = figure.axes[0].collections
    assert len(shade.get_paths()) == 1
    legend = add_legend(figure, curves, 1, (0, 1))
    figure.canvas.draw()
    assert [text.get_text() for text in legend.get_texts()] == ["wide, 2 seeds: unfinished", "_other: 0.7500"]
    assert len({text.get_window_extent().y0 for text in legend.get_texts()}) == 2  # both are drawn


def test_runs_of_one_seed_are_compared_and_not_averaged(tmp_path: Path) -> None:
    before = [facts(tmp_path / f"before{seed}", seed) for seed in (1, 2)]
    after = [facts(tmp_path / f"after{seed}", seed) for seed in (1, 2)]
    shorter = facts(tmp_path / "shorter", 5, evaluations=3)
    # The summary of a_run has the seed 3, which a run of another seed must not have.
    for run in (*before, *after, shorter):
        run.summary["seed"] = run.settings["run.seed"]
    assert [curve.label for curve in curves_of([*before, *after, shorter])] == [
        "before, 2 seeds", "after, 2 seeds", "shorter",
    ]  # fmt: skip


@pytest.mark.parametrize("last", [1, 3, 9, 64_000])
def test_ticks_of_steps_are_whole_numbers(last: int, tmp_path: Path) -> None:
    run = facts(tmp_path / "run")
    for i, row in enumerate(run.history, 1):
        row["step"] = float(max(1, last * i // 4))
    figure = style.new_figure(11, 7)
    axes = figure.subplots()
    draw_panel(axes, curves_of([run]), "eval_accuracy", "step")
    figure.canvas.draw()
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels and all(float(label.replace(",", "")).is_integer() for label in labels)
    assert last < 10_000 or "20,000" in labels


def test_a_loss_has_a_logarithmic_axis_only_if_that_helps(tmp_path: Path) -> None:
    run = facts(tmp_path / "run")

    def scale(column: str) -> str:
        axes = style.new_figure(11, 7).subplots()
        draw_panel(axes, curves_of([run]), column, "step")
        return str(axes.get_yscale())

    assert [scale(column) for column, _ in PANELS] == ["log", "log", "linear", "linear"]
    for row in run.history:
        row["train_loss"] = 2.3 + row["step"] / 1e5  # an axis of powers of ten would have no label here
    run.history[1]["eval_loss"] = 0.0
    assert [scale(column) for column, _ in PANELS] == ["linear"] * 4


def test_forty_lines_can_be_told_apart() -> None:
    styles = [tuple(style.line_style(i).values()) for i in range(40)]
    assert len(set(styles)) == 40 and len({color for color, *_ in styles}) == 6
