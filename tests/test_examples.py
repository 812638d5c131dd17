"""The examples do what they say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest
from PIL import Image

from fastres import export, train
from tests.commands import ROOT, run_fastres, users_environment
from tests.fixtures import write_image_folder


@pytest.mark.slow
def test_the_notebook_runs_and_shows_progress_pictures_and_a_prediction(tmp_path: Path) -> None:
    notebook = nbformat.read(ROOT / "examples/train_on_arrays.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # committed without results
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    text = "".join(output.get("data", output).get("text/plain", output.get("text", "")) for output in outputs)
    assert "step 200: test loss" in text and "runs/fit-1" in text
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert float(text.rpartition("test accuracy ")[2].split(",")[0]) > 0.95


@pytest.mark.slow
@pytest.mark.parametrize("resizes", [False, True], ids=["crop", "resized crop"])
def test_onnxruntime_alone_predicts_as_fastres_does(tmp_path: Path, resizes: bool) -> None:
    write_image_folder(tmp_path / "data", size=40)
    flags = ["--recipe", "digits", "--data.source", "imagefolder", "--data.root", str(tmp_path / "data")]
    flags += ["--data.cache", str(tmp_path / "cache"), "--model.name", "resnet8", "--engine.precision", "fp32"]
    flags += ["--train.steps", "1", "--train.batch_size", "4", "--schedule.warmup_steps", "0"]
    if resizes:
        flags += ["--data.loader", "dataloader", "--data.workers", "0", "--data.augment", "resized_crop"]
        flags += ["--data.image_size", "32"]
    assert train.main([*flags, "--run.dir", str(tmp_path / "run")]) == 0
    export.main([str(tmp_path / "run"), "--format", "onnx"])

    files = sorted((tmp_path / "data/test").rglob("*.jpg"))
    for size in ((90, 50), (31, 77)):
        files.append(tmp_path / f"{size[0]}.jpg")
        Image.open(files[0]).resize(size).save(files[-1])
    file = tmp_path / "run/export.onnx"
    done = subprocess.run(
        [sys.executable, "-I", ROOT / "examples/predict_with_onnxruntime.py", file, *files],
        capture_output=True, text=True, check=True, env=users_environment({}),
    )  # fmt: skip
    expected = run_fastres("predict", file, *files)
    assert done.stdout.splitlines() == expected.stdout.splitlines()[1:] and len(files) == 6
