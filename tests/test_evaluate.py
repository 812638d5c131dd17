"""fastres/evaluate.py repeats the run's figures to the last digit, or fails with a one-line reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fastres import evaluate, train
from fastres.evaluate import evaluate_run
from fastres.runs.loading import read_run
from fastres.training.engine import resolve_engine
from fastres.utils.errors import UsageError, run_command
from tests.commands import run_fastres
from tests.fixtures import rejected, write_image_folder

TINY = "--recipe digits --train.steps 40 --train.eval_every 40 --train.batch_size 64 --schedule.warmup_steps 10"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished run with checkpoints of steps 20 and 40."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    assert train.main([*TINY.split(), "--run.checkpoint_every", "20", "--run.dir", str(folder)]) == 0
    return folder


def summary_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


def said(capsys: pytest.CaptureFixture[str], *args: str | Path) -> str:
    capsys.readouterr()
    evaluate.main([str(arg) for arg in args])
    line, top5, by_class = capsys.readouterr().out.splitlines()
    assert top5.startswith("top-5 accuracy 0.") and by_class.startswith("lowest accuracies of 10 classes: ")
    return line


def test_evaluation_is_the_summary_to_the_last_digit(run: Path) -> None:
    config, weights = read_run(run)
    (totals, names), summary = evaluate_run(config, resolve_engine(config), weights), summary_of(run)
    assert totals.accuracy == summary["test_accuracy"] > 0.15  # an untrained network has 10 %
    assert totals.mean_loss == summary["test_loss"]
    assert totals.samples == summary["test_samples"] == 360
    assert totals.top_accuracy == summary["test_top5"] > 0.5
    assert names == [str(digit) for digit in range(10)]


def test_the_files_by_class_are_those_of_the_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, run, "--output", tmp_path / "new/result")
    for name in ("classes.csv", "confusion.csv", "confusion.png"):
        assert (tmp_path / "new/result" / name).read_bytes() == (run / name).read_bytes(), name
    (tmp_path / "file").touch()
    with rejected(f"--output {tmp_path / 'file'}: cannot be written", "choose another folder"):
        evaluate.main([str(run), "--output", str(tmp_path / "file")])


def test_command_prints_the_figures_and_that_they_agree(run: Path, tmp_path: Path) -> None:
    done = run_fastres("evaluate", run, cwd=tmp_path)
    summary = summary_of(run)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"test accuracy {summary['test_accuracy']:.4f}, loss {summary['test_loss']:.4f}, 360 images" in done.stdout
    assert "equals the accuracy in" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_difference_from_the_summary_is_reported(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    (copy / "summary.json").write_text(json.dumps(summary_of(run) | {"test_accuracy": 0.5}))
    assert "differs from the accuracy in" in said(capsys, copy)
    (copy / "summary.json").unlink()
    assert "summary.json does not exist" in said(capsys, copy)


def test_a_checkpoint_in_place_of_the_final_weights(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "equals the accuracy" in said(capsys, run, "--checkpoint", run / "checkpoints/step-00000040.pt")
    assert "differs from" in said(capsys, run, "--checkpoint", run / "checkpoints/step-00000020.pt")
    unfinished = Path(shutil.copytree(run, tmp_path / "unfinished"))
    (unfinished / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"not finished.* --checkpoint \S*step-00000040\.pt"):
        evaluate.main([str(unfinished)])


def test_flags_override_the_configuration_in_any_order(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "in fp32" in said(capsys, "--engine.precision", "fp32", "--data.root", "elsewhere", run)
    with pytest.raises(UsageError, match=r"^engine\.precision: 'fp8' is not one of"):
        evaluate.main([str(run), "--engine.precision", "fp8"])


def test_a_run_is_read_without_its_trackers(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(
        text.replace("wandb: false", "wandb: true").replace("tensorboard: false", "tensorboard: true")
    )
    assert "equals the accuracy" in said(capsys, copy)


def test_refuses_what_is_not_a_run_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run_command(lambda: evaluate.main([str(tmp_path)]))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"fastres: error: {tmp_path}: is not the folder of a run")


def test_several_processes_are_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with rejected("2 processes would each evaluate everything", "run without torchrun"):
        evaluate.main([str(run)])


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--data.source mnist --data.download false", "mnist is missing"),
        ("--data.source synthetic --data.image_size 8", "synthetic has 3 channels and the classes pattern0"),
        ("--checkpoint nothing.pt", "checkpoint nothing.pt does not exist"),
    ],
)
def test_refuses_data_and_weights_that_do_not_fit(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=reason):
        evaluate.main([str(run), *flags.split()])


def test_refuses_images_of_other_channels_although_their_classes_are_the_runs(run: Path, tmp_path: Path) -> None:
    coloured = write_image_folder(tmp_path, classes=tuple("0123456789"), train=1, test=1, size=8)
    with rejected("imagefolder has 3 channels", "the run's network has 1 channels"):
        evaluate.main([str(run), "--data.source", "imagefolder", "--data.root", str(coloured)])


def test_refuses_data_of_another_shape_for_a_run_without_data_json(run: Path, tmp_path: Path) -> None:
    """Runs of earlier versions do not describe their data."""
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    (copy / "data.json").unlink()
    with rejected("synthetic has 10 classes and 3 channels, the run's network 10 and 1"):
        evaluate.main([str(copy), "--data.source", "synthetic", "--data.image_size", "8"])


def test_a_run_with_apex_is_evaluated_without_apex(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    text = (copy / "config.yaml").read_text()
    assert "  norm: auto\n" in text
    (copy / "config.yaml").write_text(text.replace("  norm: auto\n", "  norm: apex\n"))
    evaluate.main([str(copy)])


def test_refuses_weights_of_another_network_or_damaged(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace("name: resnet20", "name: resnet32"))
    with pytest.raises(UsageError, match="the weights do not fit the run's resnet32"):
        evaluate.main([str(copy)])
    (copy / "config.yaml").write_text(text)
    (copy / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(UsageError, match=r"model\.safetensors: cannot be read"):
        evaluate.main([str(copy)])
