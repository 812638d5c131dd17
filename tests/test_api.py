"""fastres from Python: fit, load_run and the parts of a loop of one's own."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import fastres
from fastres import train as command
from fastres.config.schema import Config, DataConfig, EngineConfig, TrainConfig
from fastres.data.sources.arrays import arrays
from fastres.data.sources.builtin import digits
from fastres.models.freeze import head_of
from tests.commands import ROOT, run_python, users_environment
from tests.fixtures import rejected, sha256

SHORT: dict[str, Any] = {"steps": 8, "batch_size": 32, "eval_every": 4, "schedule": {"warmup_steps": 2},
                         "data": {"flip": False}, "engine": {"precision": "fp32", "device": "cpu"}}  # fmt: skip


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    """Return the digits as arguments of fit()."""
    source = digits(DataConfig())
    return {"train": (source.train.images, source.train.labels), "test": (source.test.images, source.test.labels)}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def a_net(outputs: int = 10) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, outputs)
    )


# ---- fit ----------------------------------------------------------------------------------------------------


def test_a_name_trains_as_on_the_command_line(data: dict[str, Any]) -> None:
    summary = fastres.fit("resnet8", **data, **SHORT, shortcut="conv1x1", run={"seed": 3})
    flags = "--data.source digits --data.flip false --model.name resnet8 --model.shortcut conv1x1 --train.steps 8"
    flags += " --train.batch_size 32 --train.eval_every 4 --schedule.warmup_steps 2 --engine.precision fp32"
    assert command.main([*flags.split(), "--engine.device", "cpu", "--run.seed", "3", "--run.dir", "command"]) == 0
    ours, theirs = (load_file(Path(folder) / "model.safetensors") for folder in (summary["run_dir"], "command"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    written = json.loads(Path("command/summary.json").read_text())
    assert summary["test_accuracy"] == written["test_accuracy"] and summary["seed"] == 3


def test_a_network_is_trained_in_place_and_given_back_its_weights(data: dict[str, Any]) -> None:
    net = a_net()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    summary = fastres.fit(net, **data, **SHORT, run_dir="own")
    final = load_file("own/model.safetensors")
    assert all(torch.equal(net.state_dict()[key], final[key]) for key in final)
    assert not torch.equal(net.state_dict()["0.weight"], before["0.weight"])
    assert summary["run_dir"] == "own" and summary["model"] == "python/Sequential"

    # The same call again trains nothing, and the network gets the run's weights.
    again = a_net()
    assert fastres.fit(again, **data, **SHORT, run_dir="own") == summary
    assert all(torch.equal(again.state_dict()[key], final[key]) for key in final)


@pytest.mark.parametrize("fused_before", [False, True])
def test_a_network_is_fused_while_it_trains_and_given_back_as_it_was(data: dict[str, Any], fused_before: bool) -> None:
    def kinds(net: nn.Module) -> list[type[nn.Module]]:
        return [type(module) for module in net.modules()]

    net = fastres.fuse(a_net()) if fused_before else a_net()
    before, seen = kinds(net), []
    net[3].register_forward_hook(lambda *_: seen.append(fastres.fusion_report(net).fused == ("1",)))
    settings = {**SHORT, "engine": {"device": "cpu"}}
    fastres.fit(net, **data, **settings, norm="fused")
    assert seen[-1] and kinds(net) == before


def test_every_call_has_a_folder_of_its_own_also_in_a_thread(data: dict[str, Any]) -> None:
    folders: list[str] = []

    def train() -> None:
        folders.append(fastres.fit(a_net(), **data, **SHORT)["run_dir"])

    before = torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision(), signal.getsignal(signal.SIGINT)
    train()
    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert folders == ["runs/fit-1", "runs/fit-2"]
    assert sha256(Path("runs/fit-1/model.safetensors")) == sha256(Path("runs/fit-2/model.safetensors"))
    after = torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision(), signal.getsignal(signal.SIGINT)
    assert after == before


def test_a_source_and_a_recipe_are_taken(data: dict[str, Any]) -> None:
    source = arrays(
        **data, validation=(data["test"][0][:50], data["test"][1][:50]), classes=[f"c{i}" for i in range(10)]
    )
    summary = fastres.fit("resnet8", source, recipe="digits", **SHORT)
    assert (summary["recipe"], summary["curve"], summary["test_samples"]) == ("digits", "validation", 360)
    assert fastres.load_run(summary["run_dir"]).classes[9] == "c9"


def test_backbone_and_weights_find_the_head_of_any_network(data: dict[str, Any]) -> None:
    assert head_of(a_net()) == "5"
    fastres.fit(a_net(outputs=12), **data, **SHORT, run_dir="first")
    net = a_net()
    fastres.fit(net, **data, **SHORT, run_dir="second", weights="first/model.safetensors", freeze="backbone")
    first, second = (load_file(f"{run}/model.safetensors") for run in ("first", "second"))
    assert {key for key in second if not key.startswith("5.") and not torch.equal(first[key], second[key])} == set()
    assert first["5.weight"].shape == (12, 8) and second["5.weight"].shape == (10, 8)


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_call_continues(tmp_path: Path) -> None:
    code = """
import fastres
from fastres.config.schema import DataConfig
source = fastres.load_source(DataConfig(source="digits"))
try:
    fastres.fit("resnet8", source, steps=1_000_000, batch_size=32, log_every=1, run_dir="run",
                schedule={"name": "constant"}, run={"checkpoint_every": 1_000_000})
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=users_environment({})
    )
    assert process.stdout is not None
    deadline = time.monotonic() + 60
    while not Path("run/metrics.jsonl").exists() or '"step": 5,' not in Path("run/metrics.jsonl").read_text():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[0].splitlines()
    assert said[-1] == "interrupted" and said[-2].startswith("stopped by SIGINT at step ")
    assert process.returncode == 0 and len(list(Path("run/checkpoints").glob("step-*.pt"))) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"step": 8}, ("fit: unknown setting step (did you mean steps?)",)),
        ({"optim": {"lrr": 1}}, ("unknown flag --optim.lrr", "optim.lr")),
        ({"optim": {"lr": -1}}, ("optim.lr: '-1' is not a number above 0",)),
        ({"optim": {"lr": object()}}, ("optim.lr: <object", "is no setting")),
        ({"model": "resnet9"}, ("unknown model 'resnet9'", "resnet8")),
        ({"model": nn.Flatten()}, ("model: Flatten has no parameters",)),
        ({"model": nn.Conv2d(1, 10, 3)}, ("returns a tensor of shape (1, 10, 6, 6)", "it must return (N, classes)")),
        ({"model": nn.Conv2d(3, 10, 3)}, ("model: Conv2d cannot take images (1, 1, 8, 8)",)),
        ({"model": a_net(9)}, ("model: Sequential has 9 outputs, the data 10 classes",)),
        ({"num_classes": 12, "model": a_net()}, ("has 10 outputs", "num_classes is 12")),
        ({"test": None}, ("test: is missing",)),
        ({"train": (np.zeros((4, 8, 8), np.float32), np.zeros(4, int))}, ("the images are float32; give uint8",)),
        ({"train": (np.zeros((4, 8, 8, 5), np.uint8), np.zeros(4, int))}, ("have shape (4, 8, 8, 5)",)),
        ({"train": (np.zeros((4, 8, 8), np.uint8), np.zeros(3, int))}, ("4 images have labels of shape (3,)",)),
        ({"train": (np.zeros((4, 8, 8), np.uint8), np.full(4, -1))}, ("a label -1", "from 0")),
        ({"train": np.zeros(3)}, ("train: must be a pair, (images, labels), not ndarray",)),
        ({"train": (np.zeros((4, 9, 9), np.uint8), np.zeros(4, int))}, ("images of shape (8, 8, 1)", "(9, 9, 1)")),
        ({"classes": ["a", "b"]}, ("classes: 2 names, but there is a label 9",)),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_refused_in_one_line(
    data: dict[str, Any], change: dict[str, Any], words: tuple[str, ...]
) -> None:
    with rejected(*words):
        fastres.fit(**{"model": "resnet8", **data, **SHORT, **change})
    assert not Path("runs").exists()


@pytest.mark.parametrize("layout", ["NHWC", "NCHW", "NHW", "tensor"])
def test_arrays_of_every_layout_are_the_same_images(layout: str) -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 5, 5, 1), np.uint8)
    given: Any = {
        "NHWC": images, "NCHW": images.transpose(0, 3, 1, 2), "NHW": images[..., 0], "tensor": torch.from_numpy(images)
    }[layout]  # fmt: skip
    source = arrays((given, [0, 1, 2, 0, 1, 2]), (given, np.arange(6, dtype=np.uint8) % 3))
    assert np.array_equal(source.train.images, images) and source.classes == ("0", "1", "2")
    assert source.train.labels.dtype == source.test.labels.dtype == np.int64 and source.channels == 1


# ---- load_run -----------------------------------------------------------------------------------------------


def test_a_run_predicts_files_and_arrays_as_the_command_does(data: dict[str, Any], tmp_path: Path) -> None:
    net = a_net()
    summary = fastres.fit(net, **data, **SHORT, classes=[f"digit {i}" for i in range(10)])
    run = fastres.load_run(summary["run_dir"], model=net)
    assert run.model is net and not net.training and run.classes == tuple(f"digit {i}" for i in range(10))
    image = data["test"][0][0]
    Image.fromarray(image[..., 0]).save("digit.png")
    Image.fromarray(image[..., 0]).resize((40, 30)).save("large.png")
    found = run.predict(
        [image, image[..., 0], np.repeat(image, 3, 2), "digit.png", Path("digit.png"), "large.png"], top=3
    )
    assert len(found) == 6 and all(row == found[0] for row in found[:5])
    with torch.no_grad():
        logits = net(run.preprocess(image)[None]).softmax(1)[0]
    order = logits.argsort(descending=True, stable=True)[:3]
    assert [name for name, _ in found[0]] == [f"digit {i}" for i in order]
    assert [share for _, share in found[0]] == pytest.approx(logits[order].tolist(), rel=1e-4)
    with rejected("an image is float64 of shape (8, 8, 1); give a path, or uint8"):
        run.predict([image / 255])
    with rejected("python/Sequential was given in Python", "fastres.load_run"):
        fastres.load_run(summary["run_dir"])
    with rejected("the weights do not fit"):
        fastres.load_run(summary["run_dir"], model=a_net(11))


# ---- the parts ----------------------------------------------------------------------------------------------


def test_the_parts_make_the_loop_of_a_run(data: dict[str, Any]) -> None:
    summary = fastres.fit("resnet8", **data, steps=4, batch_size=32, engine={"precision": "fp32", "device": "cpu"},
                          schedule={"name": "constant"}, optim={"lr": 0.05})  # fmt: skip
    config = Config(train=TrainConfig(batch_size=32), engine=EngineConfig(precision="fp32", device="cpu"))
    engine = fastres.resolve_engine(config)
    source = fastres.arrays(**data)
    loader = fastres.build_loader(config, source, source.train, device=engine.device, dtype=engine.dtype)
    torch.manual_seed(0)
    model = engine.place(fastres.build_model("resnet8", in_channels=1, norm=engine.norm))
    step = fastres.TrainStep(model, engine, config.optim)
    for images, labels in loader.train(0, 4):
        step(images, labels, lr=0.05)
    assert int(step.metrics.step) == 3
    final = load_file(Path(summary["run_dir"]) / "model.safetensors")
    assert all(torch.equal(value, final[key]) for key, value in model.state_dict().items())
    test = fastres.build_loader(config, source, source.test, device=engine.device, dtype=engine.dtype)
    assert fastres.Evaluator(model, engine, 10)(test.evaluate()).accuracy == summary["test_accuracy"]


@pytest.mark.slow
@pytest.mark.parametrize("example", ["own_loop.py", "own_network.py"])
def test_the_examples_learn_the_digits(example: str) -> None:
    said = output_of(example, 100)
    found = [line.partition("test accuracy ")[2].partition(" ")[0] for line in said if "test accuracy " in line]
    assert float(found[-1].strip(",")) > 0.9


@pytest.mark.slow
def test_the_example_of_fuse_names_what_it_left_alone_and_a_ratio() -> None:
    said = output_of("accelerate_torchvision.py", 1)
    assert said[0] == "17 of 20 BatchNorm2d fused" and "downsample.1" in said[1]
    assert re.fullmatch(r"fused trains at \d\.\d\d times the speed \(n = 1, interleaved\)", said[-1])


def output_of(example: str, argument: int) -> list[str]:
    """Run an example, and return the lines of its output."""
    assert len((ROOT / "examples" / example).read_text().splitlines()) < 40
    done = run_python(ROOT / "examples" / example, argument, cwd=Path.cwd())
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_importing_fastres_costs_nothing(tmp_path: Path) -> None:
    done = run_python("-c", "import sys, fastres; dir(fastres); print('torch' in sys.modules)", cwd=tmp_path)
    assert done.stdout == "False\n" and {"fit", "load_run", "TrainStep"} <= set(dir(fastres))
