"""Networks of other packages by name, and the flag without which no module is imported."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file

from fastres import evaluate, export, fit, load_run, predict, train
from fastres.config.cli import parse
from fastres.config.schema import DataConfig
from fastres.data.sources.builtin import digits
from fastres.models.registry import build_model
from tests.commands import users_environment
from tests.fixtures import rejected

CODE = """
from pathlib import Path
from torch import nn

Path("imported").touch()

def build(num_classes, width=4):
    return nn.Sequential(nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(width, num_classes))

def no_network(num_classes):
    return num_classes

def fixed(num_classes):
    return build(7)

def fails(num_classes):
    raise RuntimeError("it is broken\\nin two lines")
"""
SHORT = ("--recipe digits --train.steps 4 --train.batch_size 32 --train.eval_every 4 --schedule.warmup_steps 1 "
         "--engine.precision fp32 --run.dir run").split()  # fmt: skip
TRUSTED = ("--model.trust_code", "true")


NETS = "nets_of_ones_own"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the module NETS, and a run of its network with an export."""
    folder = tmp_path_factory.mktemp("foreign")
    (folder / f"{NETS}.py").write_text(CODE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        assert train.main([*SHORT, "--model.name", f"{NETS}:build", "--model.options.width", "6", *TRUSTED]) == 0
        export.main(["run", *TRUSTED])
    return folder


@pytest.mark.slow
def test_the_installed_program_finds_a_module_in_the_folder_where_it_starts(tmp_path: Path) -> None:
    (tmp_path / "nets_of_this_folder.py").write_text(CODE)
    flags = ["--model.name", "nets_of_this_folder:build", *TRUSTED]
    program = Path(sys.executable).with_name("fastres")
    done = subprocess.run(
        [program, "train", *SHORT, *flags], cwd=tmp_path, env=users_environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/summary.json").exists()


@pytest.fixture
def nets(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return NETS, which can be imported, and notes in the current folder, a copy of `trained`, that it was."""
    sys.modules.pop(NETS, None)
    shutil.copytree(trained, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.syspath_prepend(tmp_path / "here")
    Path("imported").unlink()
    return NETS


def test_a_function_of_ones_own_is_trained_evaluated_exported_and_predicted(nets: str) -> None:
    assert load_file("run/model.safetensors")["0.weight"].shape == (6, 1, 3, 3)
    evaluate.main(["run", *TRUSTED])
    image = digits(DataConfig()).test.image(0)
    expected = load_run("run", flags=["--engine.device=cpu"], trust_code=True).predict([image], top=3)
    assert [name for name, _ in load_run("run/export.safetensors", trust_code=True).predict([image], top=3)[0]] == [
        name for name, _ in expected[0]
    ]
    assert "trust_code" not in Path("run/config.yaml").read_text() + Path("run/config.json").read_text()


@pytest.mark.parametrize(
    "command",
    [
        lambda name: train.main([*SHORT, "--run.dir", "other", "--model.name", f"{name}:build"]),
        lambda _: train.main(["--config", "run/config.yaml", "--run.dir", "other"]),
        lambda _: evaluate.main(["run"]),
        lambda _: export.main(["run", "--output", "again.safetensors"]),
        lambda _: predict.main(["run", "image.png"]),
        lambda _: predict.main(["run/export.safetensors", "image.png"]),
        lambda name: build_model(f"{name}:build"),
        lambda name: fit(f"{name}:build", load_digits()),
    ],
    ids=["train", "config", "evaluate", "export", "predict", "predict an export", "build_model", "fit"],
)
def test_no_command_imports_a_module_without_the_flag(nets: str, command: Callable[[str], object]) -> None:
    Path("image.png").touch()
    with pytest.raises(Exception, match=f"{nets}:build imports code; if you trust it, add --model.trust_code true"):
        command(nets)
    assert not Path("imported").exists() and nets not in sys.modules


def load_digits() -> object:
    return digits(DataConfig())


@pytest.mark.parametrize("kind", ["file", "options", "export"])
def test_no_file_can_give_the_flag(nets: str, kind: str) -> None:
    if kind == "export":
        content = json.dumps({"model": f"{nets}:build", "options": {"trust_code": True}, "num_classes": 10,
                              "data": json.loads(Path("run/data.json").read_text())})  # fmt: skip
        save_file(load_file("run/model.safetensors"), "forged.safetensors", {"fastres": content})
        with rejected("forged.safetensors"):
            load_run("forged.safetensors")
    else:
        field = {"file": "trust_code: true", "options": "options: {trust_code: true}"}[kind]
        Path("config.yaml").write_text(f"model: {{name: '{nets}:build', {field}}}\n")
        with rejected("trust_code"):
            parse(["--config", "config.yaml"])
    assert not Path("imported").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("NETS:no_network", ("returns int; it must return a torch.nn.Module",)),
        ("NETS:fixed", ("has 7 outputs for 10 classes",)),
        ("NETS:fails", ("NETS:fails: it is broken",)),
        ("NETS:absent", ("NETS:absent", "has no attribute 'absent'")),
        ("absent_package.nets:build", ("absent_package is not installed",)),
        ("torchvision/resnet18", ("takes images of 3 channels, not the 1 of the data",)),
        ("torchvision/resnet10", ("unknown network of torchvision 'resnet10'", "did you mean")),
        ("timm/resnet10tt", ("unknown network of timm 'resnet10tt'", "did you mean 'resnet10t'")),
        ("python/Net", ("python/Net was given in Python; use fastres.fit",)),
    ],
    ids=str,
)
def test_a_network_that_cannot_be_had_is_one_line(nets: str, name: str, words: tuple[str, ...]) -> None:
    with rejected(*(word.replace("NETS", nets) for word in words)):
        train.main([*SHORT, "--run.dir", "other", "--model.name", name.replace("NETS", nets), *TRUSTED])
    assert not Path("other").exists()


def test_names_of_torchvision_and_timm_build_their_networks() -> None:
    torch.manual_seed(0)
    ours = build_model("torchvision/regnet_y_400mf", num_classes=7)
    torch.manual_seed(0)
    theirs = torchvision.models.regnet_y_400mf(num_classes=7)
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
    torch.manual_seed(0)
    ours = build_model("timm/resnet10t", num_classes=7, in_channels=1)
    torch.manual_seed(0)
    theirs = timm.create_model("resnet10t", num_classes=7, in_chans=1)
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))


def test_a_network_of_timm_is_trained_and_evaluated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(tmp_path / "run")
    assert train.main([*SHORT, "--run.dir", run, "--model.name", "timm/resnet10t", "--train.steps", "2"]) == 0
    capsys.readouterr()
    evaluate.main([run])
    assert "equals the accuracy in" in capsys.readouterr().out
