"""fastres/doctor.py finds missing parts, names the remedy, and survives broken ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastres import doctor
from fastres.training import engine
from fastres.training.engine import can_compile
from tests.commands import run_fastres
from tests.fixtures import write_mnist_idx


def findings(output: str, mark: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith(f"{mark} ")]


def test_a_machine_without_a_compiler_can_train_and_is_told_the_remedy(tmp_path: Path) -> None:
    write_mnist_idx(tmp_path / "sets", train=8, test=8)
    (tmp_path / "bin").mkdir()
    done = run_fastres("doctor", "--data.root", "sets", env={"PATH": str(tmp_path / "bin"), "CXX": None}, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert findings(done.stdout, "broken") == []
    (warning,) = (line for line in findings(done.stdout, "warning") if "compiler" in line)
    assert "apt-get install g++" in warning or "xcode-select --install" in warning
    assert any("training" in line and "fp32: a step of resnet20" in line for line in findings(done.stdout, "ok"))
    (found,) = (line for line in findings(done.stdout, "ok") if "under sets" in line)
    assert "mnist" in found and "cifar10" not in found
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "sets"]


def test_a_torchvision_that_does_not_fit_is_found_and_survived(tmp_path: Path) -> None:
    broken = tmp_path / "path" / "torchvision"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    done = run_fastres("doctor", env={"PYTHONPATH": str(tmp_path / "path")}, cwd=tmp_path, fresh=True)
    assert done.returncode == 1 and done.stderr == ""
    (line,) = findings(done.stdout, "broken")
    assert "torchvision::nms" in line and "pip install --force-reinstall torch torchvision" in line
    assert any("bf16: a step of resnet20" in line for line in findings(done.stdout, "ok"))


def test_a_step_that_fails_is_essential(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(_: object) -> float:
        raise RuntimeError("no kernel image is available\nfor this device")

    monkeypatch.setattr(doctor, "loss_of_step", fail)
    assert doctor.main([]) == 1
    broken = findings(capsys.readouterr().out, "broken")
    assert broken and all("no kernel image is available" in line for line in broken)


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "version", lambda package: None)
    monkeypatch.setattr(doctor, "loss_of_step", lambda engine: 1.0)
    assert doctor.main([]) == 1
    output = capsys.readouterr().out
    for extra in ("dali", "tensorboard", "wandb", "trackio", "mlflow", "export"):
        assert f"pip install 'fastres[{extra}]'" in output
    (line,) = findings(output, "broken")
    assert "pip install torch torchvision filelock" in line


def test_triton_needs_a_c_compiler_for_its_first_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    monkeypatch.setattr(engine, "_missing_headers", lambda: "")  # Python's version: a line of its own
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert can_compile(cuda) == (False, "no C compiler for Triton on the PATH: apt-get install gcc")
    clang = tmp_path / "clang"
    clang.write_text("#!/bin/sh\n")
    clang.chmod(0o755)
    assert can_compile(cuda) == (True, "Triton is installed")
    monkeypatch.setenv("CC", "no-such-cc")
    assert not can_compile(cuda)[0]
