"""fastres/export.py writes a file that gives the run's logits, or no file and a one-line reason."""

from __future__ import annotations

import dataclasses
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn

from fastres import export, train
from fastres.models.registry import build_model
from fastres.models.weights import save_weights
from fastres.runs.exporting import FORMATS
from fastres.runs.loading import read_run, rebuild
from fastres.utils.errors import RunError, UsageError, run_command
from tests.commands import run_fastres

DIGITS = "--recipe digits --train.steps 8 --train.eval_every 8 --train.batch_size 32 --schedule.warmup_steps 2"
RESNET18 = (
    "--model.name resnet18 --data.source synthetic --data.image_size 32 --data.synthetic_samples 64 "
    "--train.steps 2 --train.batch_size 8 --engine.compile false"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of resnet20 after 8 steps on the digits."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    assert train.main([*DIGITS.split(), "--run.dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def resnet18(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of resnet18 after 2 steps on synthetic images."""
    folder = tmp_path_factory.mktemp("runs") / "resnet18"
    assert train.main([*RESNET18.split(), "--run.dir", str(folder)]) == 0
    return folder


def original(run: Path) -> nn.Module:
    return rebuild(*read_run(run)).eval()


def assert_same_logits(network: Callable[[Tensor], Tensor], run: Path, *shape: int) -> None:
    with torch.no_grad():
        for n in (1, 3, 64):  # other sizes than those that export compares itself
            images = torch.randn(n, *shape)
            wanted = original(run)(images)
            limit = 1e-4 * wanted.abs().max().item()
            torch.testing.assert_close(network(images), wanted, rtol=0, atol=limit)


def test_safetensors_are_the_final_weights(run: Path, tmp_path: Path) -> None:
    done = run_fastres("export", run, "--output", "digits.safetensors", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "logits differ by at most 0" in done.stdout
    assert (tmp_path / "digits.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"digits.safetensors", "config.json"}


def test_safetensors_load_in_torchvision(resnet18: Path, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    export.main([str(resnet18), "--output", str(path)])
    theirs = torchvision.models.resnet18(num_classes=10)
    theirs.load_state_dict(safetensors.torch.load_file(path))
    assert_same_logits(theirs.eval(), resnet18, 3, 32, 32)


def test_program_reloads_for_any_batch(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "program.pt2"
    export.main([str(run), "--format", "torch_export", "--output", str(path)])
    assert_same_logits(torch.export.load(path).module(), run, 1, 8, 8)


def test_onnx_runs_for_any_batch(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra export")
    pytest.importorskip("onnxscript", reason="needs the extra export")
    capsys.readouterr()
    export.main([str(run), "--format", "onnx"])
    (line,) = capsys.readouterr().out.splitlines()
    assert "export.onnx: resnet20 in fp32 for images (N, 1, 8, 8)" in line
    session = onnxruntime.InferenceSession(run / "export.onnx", providers=["CPUExecutionProvider"])

    def network(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])

    assert_same_logits(network, run, 1, 8, 8)
    monkeypatch.setitem(sys.modules, "onnx", None)  # as if it were not installed
    with pytest.raises(UsageError, match=r"onnx is not installed; pip install 'fastres\[export\]'"):
        export.main([str(run), "--format", "onnx"])


def test_a_file_of_other_logits_is_not_kept(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_wrong(model: nn.Module, images: Tensor, path: Path, metadata: str) -> None:
        state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        state["fc.bias"][0] += 1
        safetensors.torch.save_file(state, path)

    wrong = dataclasses.replace(FORMATS["safetensors"], write=write_wrong)
    monkeypatch.setitem(FORMATS, "safetensors", wrong)
    with pytest.raises(RunError, match=r"--format safetensors: the reloaded network's logits differ by 1, of up to"):
        export.main([str(run), "--output", str(tmp_path / "weights.safetensors")])
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_are_not_finite_are_not_equal(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    model = original(run)
    with torch.no_grad():
        model.get_parameter("fc.bias")[0] = torch.nan
    save_weights(model, copy / "model.safetensors")
    with pytest.raises(RunError):
        export.main([str(copy)])
    assert not (copy / "export.safetensors").exists()


def test_the_side_of_images_is_required_if_the_run_has_none(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Runs of earlier versions have no data.json."""
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    (copy / "data.json").unlink()
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace("source: digits", "source: imagefolder"))
    output = tmp_path / "program.pt2"
    command = [str(copy), "--format", "torch_export", "--output", str(output)]
    with pytest.raises(UsageError, match=r"give --data\.image_size"):
        export.main(command)
    export.main([*command, "--data.image_size", "20"])
    assert "(N, 1, 20, 20)" in capsys.readouterr().out
    assert_same_logits(torch.export.load(output).module(), copy, 1, 20, 20)


def test_an_impossible_export_is_refused_in_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = tmp_path / "there.safetensors"
    there.write_text("mine")
    with pytest.raises(SystemExit, match="2"):
        run_command(lambda: export.main([str(run), "--output", str(there)]))
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"fastres: error: --output {there}: already exists; choose another or remove it"
    assert there.read_text() == "mine"
    with pytest.raises(UsageError, match=r"--output .*: cannot be written .*; choose another"):
        export.main([str(run), "--output", str(tmp_path / "no" / "folder.safetensors")])
    with pytest.raises(UsageError, match=r"--output .*: cannot be written .*; choose another"):
        export.main([str(run), "--format", "torch_export", "--output", str(tmp_path / "no" / "folder.pt2")])
    with pytest.raises(UsageError, match="is not the folder of a run"):
        export.main([str(tmp_path)])
    with pytest.raises(UsageError, match="--help lists all"):
        export.main([str(run), "--form", "onnx"])


def test_images_too_small_for_the_network_are_refused(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    model = build_model("mini_resnet", in_channels=1)
    save_weights(model, copy / "model.safetensors")
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(re.sub(r"name: resnet\w+", "name: mini_resnet", text))
    with pytest.raises(UsageError, match="mini_resnet cannot take 1 image of 2x2 pixels"):
        export.main([str(copy), "--format", "torch_export", "--data.image_size", "2"])
