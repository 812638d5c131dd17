"""Commands start without the packages that they do not use, which is what makes --help and a mistyped flag quick.

The tests look at sys.modules and not at a clock. torch takes 1.6 s to import, torch's compiler one more.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from PIL import Image

from tests.commands import ROOT, run_fastres, run_python

COMPILER = {"torch._dynamo", "torch._inductor"}
HEAVY = {
    "torch",
    "numpy",
    "scipy",
    "sklearn",
    "matplotlib",
    "pandas",
    "torchvision",
    "tensorboard",
    "PIL",
    "nvidia.dali",
}


def imported(*command: object, status: int = 0, env: Mapping[str, str] | None = None) -> set[str]:
    """Run a command, check its exit status, and return the modules that it imported."""
    done = run_python("-m", "tests.workers.imported", *command, cwd=ROOT, env=env)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["status"] == status, done.stdout + done.stderr
    return set(found["modules"])


@pytest.mark.parametrize("flag", ["--help", "--version"])
@pytest.mark.parametrize("command", ["train", "predict", "evaluate", "export", "plot", "profile", "doctor"])
def test_help_and_version_import_neither_torch_nor_numpy(command: str, flag: str) -> None:
    assert not imported(f"fastres.{command}", flag) & HEAVY


@pytest.mark.parametrize("command", ["--help", "--version", "train --help", "doctor --help", "--print-completion zsh"])
def test_the_program_imports_neither_torch_nor_numpy_for_help_and_completion(command: str) -> None:
    assert not imported("fastres", *command.split()) & HEAVY


def test_the_program_imports_only_the_command_that_is_asked_for() -> None:
    others = {"fastres.train", "fastres.predict", "fastres.evaluate", "fastres.export", "fastres.profile"}
    assert not imported("fastres", "--help") & {*others, "fastres.plot", "fastres.doctor", "jsonargparse", "shtab"}
    assert not imported("fastres", "plot", "--help") & {*others, "fastres.doctor", "shtab"}


@pytest.mark.parametrize(
    "command",
    [
        "train --optim.lrr 0.1",  # a name
        "train --recipe digit",
        "train --config missing.yaml",
        "train --model.name resnet21",
        "train --optim.lr fast",  # a type
        "train --engine.precision bf8",
        "train --train.batch_size 0",  # a range
        "train --optim.momentum 1",
        "train --schedule.milestones [3,2]",
        "train --train.steps 10 --schedule.warmup_steps 20",  # a combination
        "train --train.batch_size 10 --train.accumulate 3",
        "train --data.augment resized_crop",
        "train --engine.device gpu",
        "evaluate",
        "evaluate missing --enginee.device cpu",
        "export missing --format tflite",
        "predict missing photo.png --top 0",
        "plot missing --against accuracy",
        "profile --variants eager-bf8",
        "profile --limits --optim.lrr 0.1",
        "profile --model resnet21",
        "profile --device gpu",
        "profile --block basic --options stem=small",
        "doctor --data.rot data",
    ],
)
def test_an_error_of_names_types_and_ranges_imports_no_torch(command: str) -> None:
    module, *arguments = command.split()
    assert not imported(f"fastres.{module}", *arguments, status=2) & HEAVY


def test_a_wrong_variable_of_torchruns_is_reported_without_torch() -> None:
    assert not imported("fastres.train", status=2, env={"WORLD_SIZE": "2"}) & HEAVY


def test_importing_fastres_imports_nothing_heavy() -> None:
    modules = imported("fastres.utils.version") & (HEAVY | {"jsonargparse", "yaml", "rich"})
    assert not modules


RUN = "--recipe digits --model.name resnet8 --train.steps 10 --schedule.warmup_steps 5 --run.dir"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert run_fastres("train", *RUN.split(), folder).returncode == 0
    return folder


def test_a_run_that_does_not_compile_imports_no_compiler(tmp_path: Path) -> None:
    """The run takes the C++ kernels where the CPU has the instructions, and torch's own operations elsewhere."""
    modules = imported("fastres.train", *RUN.split(), tmp_path / "run")
    assert not modules & (COMPILER | {"torchvision", "sklearn", "scipy", "tensorboard", "nvidia.dali", "pandas"})


@pytest.mark.parametrize("command", ["evaluate", "export"])
def test_a_command_on_a_run_imports_no_compiler_and_no_pictures(run: Path, command: str) -> None:
    unused = {"torchvision", "sklearn", "scipy", "matplotlib", "onnx", "pandas"}
    assert not imported(f"fastres.{command}", run) & (COMPILER | unused)


def test_predict_imports_no_compiler_and_no_pictures(run: Path, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "grey.png")
    modules = imported("fastres.predict", run, tmp_path / "grey.png")
    assert not modules & (COMPILER | {"torchvision", "sklearn", "scipy", "matplotlib", "onnx", "pandas"})


def test_plot_imports_no_torch(run: Path) -> None:
    modules = imported("fastres.plot", run)
    assert "matplotlib" in modules and not modules & {"torch", "scipy", "sklearn"}
