"""The command itself: real runs on real data, with real signals and real processes."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from fastres.config.cli import parse
from fastres.data.loaders.build import sample_images
from fastres.data.sources.load import load_source
from fastres.evaluate import evaluate_run
from fastres.export import export
from fastres.models.registry import build_model
from fastres.runs import checkpoint
from fastres.runs.history import read_history, read_metrics
from fastres.runs.loading import read_run
from fastres.runs.run_dir import RunDir
from fastres.train import main
from fastres.training.engine import resolve_engine
from fastres.training.signals import catch_signals
from fastres.utils.atomic_io import json_of, parse_json
from fastres.utils.errors import out_of_memory, run_command
from tests.commands import Forked, run_fastres, start_module, users_environment
from tests.fixtures import rejected, sha256, write_image_folder, write_mnist_idx

SUMMARY = {
    "test_accuracy", "test_loss", "steps", "parameters", "images_per_s", "train_time_s", "wall_time_s",
    "first_step_at_90", "device", "precision", "seed",
}  # fmt: skip
# 40 steps of the digits recipe; checkpoints every 8 steps fall in the middle of its epochs of 11.2.
SHORT = ("--recipe digits --train.steps 40 --train.eval_every 20 --train.log_every 4 --engine.precision fp32 "
         "--schedule.warmup_steps 10 --run.checkpoint_every 8 --run.keep_checkpoints 3").split()  # fmt: skip

Train = Callable[..., int]


@pytest.fixture
def train(capsys: pytest.CaptureFixture[str]) -> Train:
    """Run the command in this process and return its exit status; capsys captures its output."""

    def run(*flags: object) -> int:
        with pytest.raises(SystemExit) as exit_:
            run_command(lambda: main([str(flag) for flag in flags]))
        return exit_.value.code

    return run


@pytest.fixture
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Forked]]:
    """Start the command in a process of its own, which does not outlive the test."""
    started = []

    def run(*flags: object) -> Forked:
        started.append(start_module("fastres.train", *flags, stdout=tmp_path_factory.mktemp("output") / "output"))
        return started[-1]

    yield run
    for process in started:
        process.kill()


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the single line on stderr, which begins as every rejection does."""
    err = capsys.readouterr().err
    assert err.startswith("fastres: error: ") and err.count("\n") == 1, err
    return err


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an undisturbed SHORT run."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert main([*SHORT, "--run.dir", str(folder)]) == 0
    return folder


# ---- complete runs ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_digits_recipe_reaches_97_percent(train: Train, tmp_path: Path) -> None:
    assert train("--recipe", "digits", "--run.dir", tmp_path / "run") == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["test_accuracy"] >= 0.97
    assert summary["first_step_at_90"] <= 300
    assert summary["parameters"] == 269_434  # ResNet-20 with one input channel


def test_a_run_writes_all_the_documented_files(undisturbed: Path) -> None:
    left = {path.name for path in undisturbed.iterdir()} - {".lock"}
    assert left == {
        "config.yaml", "data.json", "env.json", "metrics.jsonl", "history.csv", "history.png", "summary.json",
        "checkpoints", "model.safetensors", "classes.csv", "confusion.csv", "confusion.png",
    }  # fmt: skip
    summary = json.loads((undisturbed / "summary.json").read_text())
    assert summary.keys() >= SUMMARY
    assert summary["steps"] == 40 and summary["seed"] == 0 and summary["test_samples"] == 360
    assert 0 < summary["train_time_s"] < summary["wall_time_s"]
    rows = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["split"] == "train"] == list(range(4, 41, 4))
    evaluations = [row for row in rows if row["split"] == "test"]
    assert [row["step"] for row in evaluations] == [20, 40]
    assert evaluations[-1]["accuracy"] == summary["test_accuracy"]
    with (undisturbed / "history.csv").open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == [20, 40]
    assert (undisturbed / "history.png").read_bytes().startswith(b"\x89PNG")
    best = max(evaluations, key=lambda row: row["accuracy"])
    chosen = {"best_step": best["step"], "best_accuracy": best["accuracy"], "best_split": "test"}
    assert summary.items() >= chosen.items()
    found = {path.name for path in checkpoint.found(undisturbed / "checkpoints")}
    assert found == {"step-00000040.pt", "step-00000032.pt", "step-00000024.pt", f"step-{best['step']:08}.pt"}
    links = {name: (undisturbed / "checkpoints" / name).readlink().name for name in ("last", "best")}
    assert links == {"last": "step-00000040.pt", "best": f"step-{best['step']:08}.pt"}
    (counted, *by_class), (header, *confusion) = (
        list(csv.reader((undisturbed / name).open())) for name in ("classes.csv", "confusion.csv")
    )
    assert counted == ["class", "samples", "correct", "accuracy", "most_often_taken_for"]
    assert header[1:] == [name for name, *_ in by_class] == [name for name, *_ in confusion] == [*"0123456789"]
    cells = np.array([row[1:] for row in confusion], int)
    assert [int(row[1]) for row in by_class] == cells.sum(1).tolist() and cells.sum() == 360
    assert cells.trace() == round(360 * summary["test_accuracy"]) == sum(int(row[2]) for row in by_class)
    assert 0.5 < summary["test_top5"] <= 1
    assert (undisturbed / "confusion.png").read_bytes().startswith(b"\x89PNG")
    assert {"torch", "device", "commit", "command"} <= json.loads((undisturbed / "env.json").read_text()).keys()


def test_class_weights_reach_the_training_loss_alone(train: Train, tmp_path: Path) -> None:
    flags = [*TINY, "--train.steps", 4, "--train.log_every", 4]
    losses = {}
    for name, weights in (("none", "null"), ("equal", "[2,2,2,2,2,2,2,2,2,2]"), ("uneven", "[9,1,1,1,1,1,1,1,1,1]")):
        assert train(*flags, "--data.class_weights", weights, "--run.dir", tmp_path / name) == 0
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [row["loss"] for row in rows]
    assert losses["equal"] == pytest.approx(losses["none"], rel=1e-4)
    assert abs(losses["uneven"][0] - losses["none"][0]) > 0.01


def test_the_train_loss_of_the_history_is_the_mean_since_the_last_evaluation(undisturbed: Path) -> None:
    rows = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    for evaluation in (row for row in rows if row["split"] == "test"):
        since = [row for row in rows if row["split"] == "train" and 0 <= evaluation["step"] - row["step"] < 20]
        assert evaluation["train_loss"] == pytest.approx(sum(row["loss"] for row in since) / len(since))


def test_the_history_has_the_figures_of_every_evaluation(undisturbed: Path) -> None:
    rows = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    evaluations = [row for row in rows if row["split"] == "test"]
    with (undisturbed / "history.csv").open() as file:
        history = list(csv.DictReader(file))
    assert [(float(row["eval_loss"]), float(row["eval_accuracy"])) for row in history] == [
        (row["loss"], row["accuracy"]) for row in evaluations
    ]
    for name in ("train_loss", "train_accuracy", "lr", "train_time_s"):
        assert [float(row[name]) for row in history] == [row[name] for row in evaluations]
    summary = json.loads((undisturbed / "summary.json").read_text())
    assert float(history[-1]["eval_loss"]) == summary["test_loss"]


def test_the_images_per_second_of_a_row_are_those_since_the_row_before(undisturbed: Path) -> None:
    rows = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    before = {"step": 0, "train_time_s": 0.0}
    for row in (row for row in rows if row["split"] == "train"):
        images = (row["step"] - before["step"]) * 128
        assert row["images_per_s"] == pytest.approx(images / (row["train_time_s"] - before["train_time_s"]))
        before = row


def test_its_config_fed_back_repeats_the_run(train: Train, undisturbed: Path, tmp_path: Path) -> None:
    assert train("--config", undisturbed / "config.yaml", "--run.dir", tmp_path / "again") == 0
    assert sha256(tmp_path / "again/model.safetensors") == sha256(undisturbed / "model.safetensors")


def test_a_cpu_is_deterministic_without_being_told(train: Train, undisturbed: Path, tmp_path: Path) -> None:
    assert train(*SHORT, "--engine.deterministic", "true", "--run.dir", tmp_path / "run") == 0
    assert sha256(tmp_path / "run/model.safetensors") == sha256(undisturbed / "model.safetensors")


def test_another_seed_is_another_run(train: Train, undisturbed: Path, tmp_path: Path) -> None:
    assert train(*SHORT, "--run.seed", 1, "--run.dir", tmp_path / "run") == 0
    assert sha256(tmp_path / "run/model.safetensors") != sha256(undisturbed / "model.safetensors")


def test_a_finished_run_is_reported_and_left_alone(
    train: Train, undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: sha256(path) for path in undisturbed.rglob("*") if path.is_file()}
    assert train(*SHORT, "--run.dir", undisturbed) == 0
    assert "is finished: test accuracy" in capsys.readouterr().out
    assert before == {path: sha256(path) for path in undisturbed.rglob("*") if path.is_file()}


def test_held_out_samples_make_the_curve_and_the_test_set_the_result(train: Train, tmp_path: Path) -> None:
    assert train(*SHORT, "--data.validation", 237, "--run.dir", tmp_path / "run") == 0
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert {row["split"] for row in rows} == {"train", "validation"}
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["curve"] == "validation" and summary["test_samples"] == 360


@pytest.mark.parametrize("loader", ["dataloader", "dali"])
def test_every_loader_trains_the_weights_of_the_resident_one(
    train: Train, undisturbed: Path, tmp_path: Path, loader: str
) -> None:
    assert train(*SHORT, "--data.loader", loader, "--run.dir", tmp_path / "run") == 0
    assert sha256(tmp_path / "run/model.safetensors") == sha256(undisturbed / "model.safetensors")


def test_mini_resnet_learns_from_mnist_files(train: Train, tmp_path: Path) -> None:
    write_mnist_idx(tmp_path / "data", train=1024, test=256)
    flags = "--recipe mnist-mini --train.steps 40 --schedule.warmup_steps 10 --train.batch_size 32"
    flags += " --engine.compile false"
    assert train(*flags.split(), "--data.root", tmp_path / "data", "--run.dir", tmp_path / "run") == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["parameters"] == 152_202
    assert summary["test_accuracy"] > 0.5  # chance is 0.1


def test_the_imagenet_recipe_trains_on_a_folder_of_photographs(train: Train, tmp_path: Path) -> None:
    write_image_folder(tmp_path / "data", size=48)
    flags = ("--recipe imagenet-resnet50 --data.image_size 32 --data.workers 1 --engine.compile false "
             "--train.steps 2 --train.batch_size 4 --schedule.warmup_steps 1")  # fmt: skip
    assert train(*flags.split(), "--data.root", tmp_path / "data", "--run.dir", tmp_path / "run") == 0
    assert json.loads((tmp_path / "run/summary.json").read_text())["model"] == "resnet50"


def test_the_tutorials_config_file_is_a_run(train: Train, tmp_path: Path) -> None:
    example = Path(__file__).parent.parent / "examples/config.json"
    flags = "--data.source synthetic --train.steps 2 --engine.compile false --data.synthetic_samples 256"
    assert train("--config", example, *flags.split(), "--run.dir", tmp_path / "run") == 0
    model = yaml.safe_load((tmp_path / "run/config.yaml").read_text())["model"]
    assert model["shortcut"] == "maxpool_pad"
    assert json.loads((tmp_path / "run/summary.json").read_text())["parameters"] == 269_722


def test_weights_of_one_run_start_another_with_a_new_head(
    train: Train, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = undisturbed / "model.safetensors"
    no_steps = "--model.num_classes 12 --train.steps 0 --schedule.warmup_steps 0".split()
    assert train(*SHORT, "--model.weights", weights, *no_steps, "--run.dir", tmp_path / "run") == 0
    assert "head replaced (fc.bias, fc.weight)" in capsys.readouterr().out.replace(
        "fc.weight, fc.bias", "fc.bias, fc.weight"
    )
    old, new = load_file(weights), load_file(tmp_path / "run/model.safetensors")
    assert torch.equal(old["conv1.weight"], new["conv1.weight"]) and new["fc.weight"].shape == (12, 64)


def write_photographs(root: Path, train: int = 16, test: int = 8) -> Path:
    """Write JPEGs of uneven sizes, `train` and `test` of a sea and of a meadow, and return `root`."""
    rng = np.random.default_rng(0)
    for kind, tint in (("meadow", (0.35, 0.75, 0.25)), ("sea", (0.2, 0.4, 0.8))):
        for part, count in (("train", train), ("test", test)):
            (root / part / kind).mkdir(parents=True)
            for number in range(count):
                height, width = rng.integers(36, 90, 2)
                brightness = np.linspace(rng.uniform(0.4, 1), rng.uniform(0.4, 1), height)[:, None, None]
                pixels = 200 * brightness * np.array(tint) + rng.integers(0, 55, (height, width, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(root / part / kind / f"{number}.jpg")
    return root


def test_the_recipe_finetune_learns_two_kinds_of_photographs(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos, weights = write_photographs(tmp_path / "photos"), tmp_path / "resnet18.pth.tar"
    state = build_model("resnet18", num_classes=1000).state_dict()
    torch.save({"state_dict": {f"module.{key}": tensor for key, tensor in state.items()}, "epoch": 90}, weights)
    flags = ["--recipe", "finetune", "--data.root", photos, "--model.weights", weights, "--data.image_size", 24]
    smaller = "--train.steps 8 --train.batch_size 16 --train.log_every 4 --data.workers 0".split()
    assert train(*flags, *smaller, "--run.dir", tmp_path / "run") == 0
    assert "head replaced (fc.weight, fc.bias)" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    seen = [row["accuracy"] for row in rows if row["split"] == "train"]
    assert seen[-1] >= 0.85 and json.loads((tmp_path / "run/summary.json").read_text())["test_accuracy"] >= 0.85


def test_the_recipe_finetune_says_what_to_download_without_a_network(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens there
    flags = ["--recipe", "finetune", "--data.root", write_photographs(tmp_path / "photos", 1, 1)]
    assert train(*flags, "--run.dir", tmp_path / "run") == 2
    (said,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("Downloading:")]
    assert said.startswith(
        "fastres: error: model.weights DEFAULT: cannot get https://download.pytorch.org/models/resnet18"
    )
    assert "--model.weights FILE" in said and str(tmp_path / "cache/hub/checkpoints") in said
    assert not (tmp_path / "run").exists()


def test_a_run_with_a_frozen_backbone_trains_the_head_alone_and_resumes_bitwise(
    train: Train, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = undisturbed / "model.safetensors"
    flags = [*SHORT, "--model.weights", weights, "--model.freeze", "backbone", "--train.steps", 16]
    assert train(*flags, "--run.dir", tmp_path / "whole") == 0
    assert re.search(r"freeze: 650 of [\d,]+ parameters are trained", capsys.readouterr().out)
    old, new = load_file(weights), load_file(tmp_path / "whole/model.safetensors")
    assert {key for key in new if not torch.equal(old[key], new[key])} == {"fc.weight", "fc.bias"}
    state = tmp_path / "whole/checkpoints/step-00000008.pt"
    assert train(*flags, "--run.resume", state, "--run.dir", tmp_path / "resumed") == 0
    assert sha256(tmp_path / "resumed/model.safetensors") == sha256(tmp_path / "whole/model.safetensors")


def test_the_whitening_stem_is_fitted_once_and_kept(train: Train, tmp_path: Path) -> None:
    def stem_of(run: str) -> Tensor:
        return load_file(tmp_path / run / "model.safetensors")["conv1.weight"]

    flags = [*SHORT, "--model.name", "speed_resnet", "--train.steps", 24, "--optim.norm_bias_lr_scale", 64]
    assert train(*flags, "--run.dir", tmp_path / "whole") == 0
    config = parse([*map(str, flags)])
    source = load_source(config.data)
    expected = build_model("speed_resnet", in_channels=1)
    expected.whiten(sample_images(config, source, source.train))
    assert torch.equal(stem_of("whole"), expected.conv1.weight)

    # A resumed run takes the stem from the checkpoint instead of fitting its own.
    state = tmp_path / "whole/checkpoints/step-00000016.pt"
    assert train(*flags, "--run.resume", state, "--run.dir", tmp_path / "resumed") == 0
    assert sha256(tmp_path / "resumed/model.safetensors") == sha256(tmp_path / "whole/model.safetensors")

    # A run that starts from weights does so too, because the later layers fit this stem.
    others = ["--data.validation", 700, "--train.steps", 0, "--schedule.warmup_steps", 0]
    assert train(*flags, *others, "--run.dir", tmp_path / "others") == 0
    assert not torch.equal(stem_of("others"), stem_of("whole"))
    weights = ["--model.weights", tmp_path / "whole/model.safetensors"]
    assert train(*flags, *others, *weights, "--run.dir", tmp_path / "started") == 0
    assert torch.equal(stem_of("started"), stem_of("whole"))

    summary = json.loads((tmp_path / "whole/summary.json").read_text())
    run_config, tensors = read_run(tmp_path / "whole")
    engine = resolve_engine(run_config)
    engine.apply_torch_settings()
    totals, _ = evaluate_run(run_config, engine, tensors)
    assert totals.accuracy == summary["test_accuracy"]
    assert export(run_config, tensors, "torch_export", tmp_path / "speed.pt2")[1] == (1, 8, 8)


def test_tensorboard_events_are_written_on_request(train: Train, tmp_path: Path) -> None:
    assert train(*SHORT, "--run.tensorboard", "true", "--run.dir", tmp_path / "run") == 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    assert [event.step for event in events.Scalars("test/accuracy")] == [20, 40]


# ---- interruptions ------------------------------------------------------------------------------------------


def wait_for_step(folder: Path, step: int, process: Forked) -> None:
    """Return when the run has logged that step."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        log = folder / "metrics.jsonl"
        if log.exists() and any(f'"step": {s},' in log.read_text() for s in range(step, 41)):
            return
        assert process.poll() is None, process.stdout.read_text()
        time.sleep(0.01)
    raise AssertionError(f"step {step} did not come")


@pytest.mark.parametrize(("step", "loader"), [(9, "resident"), (22, "resident"), (31, "resident"), (14, "dali")])
def test_a_killed_run_ends_with_the_weights_of_an_undisturbed_one(
    start: Callable[..., Forked], train: Train, undisturbed: Path, tmp_path: Path, step: int, loader: str
) -> None:
    flags = [*SHORT, "--data.loader", loader, "--run.dir", tmp_path / "run"]
    process = start(*flags)
    wait_for_step(tmp_path / "run", step, process)
    process.kill()
    process.wait()
    assert not (tmp_path / "run/summary.json").exists(), "killed too late to show anything"
    assert train(*flags) == 0
    assert sha256(tmp_path / "run/model.safetensors") == sha256(undisturbed / "model.safetensors")
    for name, columns in (("history.csv", ("step", "train_loss", "eval_loss", "train_accuracy", "eval_accuracy")),):
        with (tmp_path / "run" / name).open() as a, (undisturbed / name).open() as b:
            rows, expected = list(csv.DictReader(a)), list(csv.DictReader(b))
        assert [[row[c] for c in columns] for row in rows] == [[row[c] for c in columns] for row in expected]


def test_the_metrics_of_steps_that_will_run_again_are_dropped(undisturbed: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    config = parse([*SHORT, "--run.dir", str(copy)])
    RunDir(config).begin(resolve_engine(config), 20)
    rows = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [4, 8, 12, 16, 20, 20]  # the last one is the evaluation


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_names_the_checkpoint_and_exits_with_128_plus_its_number(
    start: Callable[..., Forked], train: Train, undisturbed: Path, tmp_path: Path, number: signal.Signals
) -> None:
    flags = [*SHORT, "--run.dir", tmp_path / "run"]
    process = start(*flags)
    wait_for_step(tmp_path / "run", 12, process)
    process.send_signal(number)
    out = process.output()
    assert process.returncode == 128 + number, out
    newest = checkpoint.found(tmp_path / "run/checkpoints")[0]
    assert f"stopped by {number.name} at step {int(newest.stem[5:])}" in out and str(newest) in out
    assert train(*flags) == 0
    assert sha256(tmp_path / "run/model.safetensors") == sha256(undisturbed / "model.safetensors")


def test_the_first_of_two_signals_counts() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with catch_signals() as stop:
        assert stop.number == 0
        stop.saves = True
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)  # as torchrun sends one after the terminal's
        assert stop.number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_corrupt_newest_checkpoint_is_passed_over(
    start: Callable[..., Forked], train: Train, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*SHORT, "--run.dir", tmp_path / "run"]
    process = start(*flags)
    wait_for_step(tmp_path / "run", 28, process)
    process.kill()
    process.wait()
    newest = checkpoint.found(tmp_path / "run/checkpoints")[0]
    newest.write_bytes(newest.read_bytes()[:-1000])
    assert train(*flags) == 0
    assert "trying the previous checkpoint" in capsys.readouterr().err
    assert sha256(tmp_path / "run/model.safetensors") == sha256(undisturbed / "model.safetensors")


def test_a_non_finite_loss_ends_the_run_with_its_step_and_the_checkpoint_kept(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # At step 20 the learning rate jumps far beyond fp32's range.
    jump = "--schedule.name multistep --schedule.milestones [20] --schedule.factor 1e30 --schedule.warmup_steps 0"
    assert train(*SHORT, *jump.split(), "--run.dir", tmp_path / "run") == 1
    message = refusal(capsys)
    assert "non-finite at step 2" in message and "step-00000020.pt" in message
    state = checkpoint.load(tmp_path / "run/checkpoints/step-00000020.pt")
    assert all(tensor.isfinite().all() for tensor in state["trainer"]["model"].values())
    assert not (tmp_path / "run/summary.json").exists()


NAN_AT_THE_END = ("--train.steps 1 --schedule.name constant --optim.lr 1e30 --schedule.warmup_steps 0 "
                  "--model.name resnet8").split()  # fmt: skip


def strict(text: str) -> Any:
    """Return the value of JSON without NaN and infinity."""

    def fail(constant: str) -> None:
        raise AssertionError(constant)

    return json.loads(text, parse_constant=fail)


@pytest.mark.parametrize("validation", [0, 237])
def test_a_non_finite_last_evaluation_is_a_failure_without_a_summary(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str], validation: int
) -> None:
    flags = [*SHORT, *NAN_AT_THE_END, "--data.validation", validation, "--run.dir", tmp_path / "run"]
    for _ in range(2):  # the same command fails again
        assert train(*flags) == 1
        assert "loss is not finite after the last step; there is no checkpoint yet; try a smaller" in refusal(capsys)
        assert not (tmp_path / "run/summary.json").exists() and not (tmp_path / "run/model.safetensors").exists()
    rows = [strict(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] is None for row in rows] == [False, True]
    assert strict((tmp_path / "run/env.json").read_text())["precision"] == "fp32"


def test_a_non_finite_point_of_the_curve_is_null_in_json_and_a_gap_in_the_plot(tmp_path: Path) -> None:
    row = {"step": 1, "split": "test", "loss": math.inf, "accuracy": 0.1, "train_loss": 2.0, "train_accuracy": 0.1,
           "lr": 0.1, "train_time_s": 1.0}  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text(json_of(row) + "\n" + json_of(row | {"step": 2, "loss": 2.0}) + "\n")
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["loss"] for row in rows] == [None, 2.0]
    RunDir(parse(["--run.dir", str(tmp_path)])).write_history()
    assert [str(row["eval_loss"]) for row in read_history(tmp_path)] == ["nan", "2.0"]
    assert (tmp_path / "history.png").exists()


def test_json_is_strict_in_both_directions() -> None:
    value = {"a": [math.nan, (math.inf, 1.5)], "b": {"c": -math.inf}}
    assert json_of(value) == '{"a": [null, [null, 1.5]], "b": {"c": null}}'
    for text in ("NaN", "[Infinity]", '{"a": -Infinity}'):
        with pytest.raises(ValueError, match="is not JSON"):
            parse_json(text)


# ---- disks --------------------------------------------------------------------------------------------------

DISK = [*SHORT, "--model.name", "resnet8", "--train.log_every", "1"]


@pytest.mark.parametrize(
    ("largest", "flags", "what"),
    [
        # metrics.jsonl grows by some 200 bytes a step, a checkpoint has 0.6 MB, model.safetensors half of that.
        (2_000, "--run.checkpoint_every 1000", "cannot write to run.dir {run}: File too large; there is no checkpoint"),
        (100_000, "", "cannot write checkpoint {run}/checkpoints/step-00000008.pt: File too large; earlier check"),
        (30_000, "--train.steps 0 --schedule.warmup_steps 0", "cannot write to run.dir {run}: File too large; there"),
    ],
)  # fmt: skip
def test_a_failed_write_ends_the_run_with_one_line(tmp_path: Path, largest: int, flags: str, what: str) -> None:
    """The system's limit on file size stands in for a full disk, because the same call fails."""
    run = tmp_path / "run"
    done = subprocess.run(
        ["prlimit", f"--fsize={largest}", sys.executable, "-m", "fastres.train", *DISK, *flags.split(),
         "--run.dir", run],
        capture_output=True, text=True, env=users_environment({"PYTHONDONTWRITEBYTECODE": "1"}), check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("fastres: error: " + what.format(run=run)) and done.stderr.count("\n") == 1
    assert not list(run.rglob("*.tmp"))


def test_after_a_full_disk_the_run_resumes_from_the_last_checkpoint(
    start: Callable[..., Forked], train: Train, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("a disk of 2 MB can be made by root only")
    try:
        flags = [*DISK, "--run.keep_checkpoints", "9"]
        process = start(*flags, "--run.dir", disk / "run")
        out = process.output()
        assert process.returncode == 1 and "No space left on device; earlier checkpoints are intact" in out, out
        shutil.copytree(disk / "run", tmp_path / "run")
    finally:
        subprocess.run(["umount", disk], check=True)
    kept = [path.name for path in checkpoint.found(tmp_path / "run/checkpoints")]
    assert kept == ["step-00000020.pt", "step-00000016.pt", "step-00000008.pt"]
    assert train(*flags, "--run.dir", tmp_path / "run") == 0


def test_a_disk_that_is_read_only_is_refused(start: Callable[..., Forked], tmp_path: Path) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip("a read-only disk can be made by root only")
    try:
        process = start(*DISK, "--run.dir", tmp_path / "run")
        out = process.output()
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    assert process.returncode == 2 and out.count("\n") == 1
    assert f"cannot write to run.dir {tmp_path / 'run'}: Read-only file system; choose another" in out


def test_a_folder_that_vanishes_ends_the_run_in_a_line(start: Callable[..., Forked], tmp_path: Path) -> None:
    process = start(*DISK, "--train.steps", 1_000_000, "--run.dir", tmp_path / "run")
    wait_for_step(tmp_path / "run", 12, process)
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    out = process.output()
    assert process.returncode == 1
    assert out.splitlines()[-1].startswith(f"fastres: error: cannot write to run.dir {tmp_path / 'run'}: No such file")
    assert checkpoint.latest(tmp_path / "elsewhere/checkpoints") is not None


# ---- norms --------------------------------------------------------------------------------------------------


def losses(run: Path, steps: int) -> list[float]:
    """Return the logged losses of the training steps up to `steps`."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["split"] == "train" and row["step"] <= steps]


EVERY_STEP = ("--train.log_every", "1")  # the last one counts
# The digits' background is one value. When it comes close to ReLU's corner, rounding decides for thousands of pixels at
# once. So in float32 only the first steps agree closely; in float64 all do (test_models.py).


def test_the_fused_norm_trains_as_torchs(start: Callable[..., Forked], tmp_path: Path) -> None:
    for norm in ("torch", "fused"):
        short = ("--train.steps", 4, "--train.eval_every", 4, "--schedule.warmup_steps", 2)
        process = start(*SHORT, *EVERY_STEP, *short, "--model.norm", norm, "--run.dir", tmp_path / norm)
        out = process.output()
        assert process.returncode == 0, out
    assert losses(tmp_path / "fused", 3) == pytest.approx(losses(tmp_path / "torch", 3), rel=1e-3)
    weights = [set(load_file(tmp_path / norm / "model.safetensors")) for norm in ("torch", "fused")]
    assert weights[0] == weights[1]


# ---- rejections ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--recipe digitz", "did you mean digits?"),
        ("--recipe digits --optim.lrr 1", "did you mean --optim.lr?"),
        ("--recipe digits --model.name resnet21", "resnet20"),
        ("--recipe digits --model.name plain20 --model.shortcut pad", "plain"),
        ("--recipe digits --train.steps ten", "train.steps: 'ten' is not a whole number, 0 or above"),
        ("--recipe digits --engine.precision tf32", "tf32"),
        ("--recipe digits --engine.device cuda", "--engine.device cpu"),
        ("--recipe digits --engine.cuda_graph true", "cuda_graph"),
        ("--recipe digits --model.norm fused --engine.channels_last false", "model.norm fused"),
        ("--recipe digits --model.norm apex", "model.norm apex: NVIDIA's apex is not installed; use torch or fused"),
        ("--recipe digits --model.num_classes 3", "10 classes"),
        ("--recipe digits --data.validation 1437", "data.validation: 1437 must be below the 1,437 images"),
        ("--recipe digits --data.image_size 32", "8x8"),
        ("--recipe digits --model.weights nowhere.safetensors", "nowhere.safetensors"),
        ("--data.root nothing --data.download false", "--recipe digits"),
        ("--data.source imagefolder --data.root nothing", "nothing"),
        ("--recipe digits --run.resume nowhere.pt", "checkpoint nowhere.pt does not exist"),
        ("--recipe digits --engine.device cuda:300", "is not auto, cpu, cuda or cuda:N"),
        (f"--recipe digits --run.dir {'x' * 300}", "File name too long"),
        ("--data.root ~nosuchuser/data", "--data.root ~nosuchuser/data: "),
        ("--data.root nothing --data.mirror http://[", "http://["),
        ("--recipe digits --train.batch_size 1 --model.name resnet18", "resnet18 cannot take 1 image of 8x8 pixels"),
        ("--recipe digits --train.accumulate 128 --model.name resnet18", "resnet18 cannot take 1 image of 8x8 pixels"),
        (
            "--recipe digits --model.name speed_resnet --model.options.widths [8,8,8,8]",
            "speed_resnet cannot take 128 images of 8x8 pixels",
        ),
    ],
)
def test_bad_input_is_rejected_in_one_line_and_nothing_is_written(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    flags: str, named: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert train(*flags.split()) == 2
    assert named in refusal(capsys)
    assert list(tmp_path.iterdir()) == []


def test_insufficient_memory_is_one_line(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--data.source synthetic --data.synthetic_samples 100_000_000_000".split()
    assert train(*flags, "--run.dir", tmp_path / "run") == 1
    line = refusal(capsys)
    assert "out of memory (Unable to allocate" in line and "--train.accumulate 2" in line
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert out_of_memory(caught.value)
    # The error of a context or of pinned memory on a full GPU, which is not the allocator's.
    assert out_of_memory(torch.AcceleratorError("CUDA error: out of memory", 2))
    assert not out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


def test_processes_on_one_machine_do_not_share_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with rejected("engine.device cuda:0: 2 processes", "use cuda"):
        resolve_engine(parse(["--engine.device", "cuda:0"]))


def test_a_tracker_that_cannot_begin_is_refused(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/tensorboard").write_text("a file where the folder would be")
    assert train(*SHORT, "--run.tensorboard", "true", "--run.dir", tmp_path / "run") == 2
    assert "run.trackers: tensorboard: " in refusal(capsys)


def test_a_folder_that_holds_another_run_is_refused_and_kept(
    train: Train, undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: sha256(path) for path in undisturbed.rglob("*") if path.is_file()}
    assert train(*SHORT, "--optim.lr", 0.2, "--run.dir", undisturbed) == 2
    assert "optim.lr: 0.1 -> 0.2" in refusal(capsys)
    assert train(*SHORT, "--run.resume", "never", "--run.dir", undisturbed) == 2
    assert "already holds a run; leave out --run.resume" in refusal(capsys)
    state = checkpoint.found(undisturbed / "checkpoints")[-1]
    assert train(*SHORT, "--run.resume", state, "--run.dir", undisturbed) == 2
    assert "already holds a run; leave out --run.resume" in refusal(capsys)
    assert before == {path: sha256(path) for path in undisturbed.rglob("*") if path.is_file()}


TINY = ("--recipe digits --model.name resnet8 --train.steps 8 --train.batch_size 32 --train.eval_every 4 "
        "--schedule.warmup_steps 2 --run.checkpoint_every 4 --engine.precision fp32").split()  # fmt: skip


def test_fields_that_compute_nothing_may_change_when_a_run_is_resumed(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_image_folder(tmp_path / "d", train=20, test=4, size=16)
    flags = [*TINY, "--data.source", "imagefolder", "--data.cache", "c"]
    assert train(*flags, "--data.root", "d", "--run.dir", "whole") == 0
    assert train(*flags, "--data.root", "d", "--run.dir", "run") == 0
    run = tmp_path / "run"
    run.joinpath("checkpoints/step-00000008.pt").unlink()  # as if it had been killed after step 4
    run.joinpath("summary.json").unlink()
    run.joinpath("model.safetensors").unlink()
    others = ("--data.workers 4 --data.cache other --data.download false --data.mirror http://localhost/ "
              "--train.log_every 1 --train.eval_batch_size 3 --run.checkpoint_every 3 --run.keep_checkpoints 9 "
              "--run.timeout_s 60").split()  # fmt: skip
    capsys.readouterr()
    assert train(*flags, *others, "--data.root", f"{tmp_path}/d/../d/", "--run.dir", "./run/") == 0
    assert "resumed at step 4" in capsys.readouterr().out
    assert sha256(run / "model.safetensors") == sha256(tmp_path / "whole/model.safetensors")
    accuracies = [
        json.loads((tmp_path / name / "summary.json").read_text())["test_accuracy"] for name in ("run", "whole")
    ]
    assert accuracies[0] == accuracies[1]
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["workers"] == 4  # evaluate finds the moved data
    for spelling in ("d/", "./d", tmp_path / "d"):
        assert train(*flags, "--data.root", spelling, "--run.dir", "run") == 0
        assert "nothing to do" in capsys.readouterr().out


def test_a_rejected_change_names_the_way_round_which_works(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert train(*TINY, "--train.steps", 4, "--run.dir", "run") == 0
    capsys.readouterr()
    assert train(*TINY, "--optim.lr", "0.05", "--run.dir", "run") == 2
    line = refusal(capsys)
    way = "--run.dir NEW --run.resume run/checkpoints/step-00000004.pt"
    assert "train.steps: 4 -> 8, optim.lr: 0.1 -> 0.05" in line and way in line
    assert train(*TINY, "--optim.lr", "0.05", *way.split()) == 0
    assert "resumed at step 4" in capsys.readouterr().out


def test_a_folder_without_a_checkpoint_may_be_used_with_other_settings(train: Train, tmp_path: Path) -> None:
    """A run that failed before its first checkpoint has left nothing to lose."""
    write_image_folder(tmp_path / "data", size=32)
    flags = ["--data.source", "imagefolder", "--data.root", tmp_path / "data", "--train.batch_size", 4]
    flags += ["--model.name", "resnet8", "--run.dir", tmp_path / "run", "--data.loader", "dataloader"]
    flags += ["--train.steps", 4, "--train.eval_every", 4, "--schedule.warmup_steps", 1, "--engine.compile", "false"]
    for victim in sorted((tmp_path / "data/train").rglob("*.*"))[1::4]:
        victim.write_bytes(victim.read_bytes()[:100])
    assert train(*flags) == 1
    assert (tmp_path / "run/config.yaml").exists() and not checkpoint.found(tmp_path / "run/checkpoints")
    assert train(*flags, "--data.skip_bad", "true", "--run.resume", "never") == 0
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["data"]["skip_bad"] is True
    assert json.loads((tmp_path / "run/summary.json").read_text())["steps"] == 4


@pytest.mark.parametrize("left", ["summary.json", "model.safetensors", "checkpoints/step-00000040.pt"])
def test_a_folder_with_any_result_is_protected(
    train: Train, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], left: str
) -> None:
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    for name in ("config.yaml", left):
        shutil.copy(undisturbed / name, tmp_path / "run" / name)
    assert train(*SHORT, "--optim.lr", 0.2, "--run.dir", tmp_path / "run") == 2
    assert "optim.lr: 0.1 -> 0.2" in refusal(capsys)


def test_a_second_writer_is_kept_out(
    start: Callable[..., Forked], train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    with filelock.FileLock(tmp_path / "run/.lock"):
        process = start(*SHORT, "--run.dir", tmp_path / "run")
        out = process.output()
    assert process.returncode == 2 and "is being written by another process" in out and out.count("\n") == 1
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_a_folder_that_cannot_be_written_is_refused(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert train(*SHORT, "--run.dir", tmp_path / "file/run") == 2
    assert "cannot write to run.dir" in refusal(capsys)
    assert train(*SHORT, "--run.dir", tmp_path / "file") == 2
    assert "is a file" in refusal(capsys)


def test_a_checkpoint_of_another_model_is_refused(
    train: Train, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = checkpoint.found(undisturbed / "checkpoints")[0]
    assert train(*SHORT, "--model.name", "resnet32", "--run.resume", state, "--run.dir", tmp_path / "run") == 2
    assert "the checkpoint belongs to another model" in refusal(capsys)
    broken = tmp_path / "broken.pt"
    broken.write_bytes(state.read_bytes()[:5000])
    assert train(*SHORT, "--run.resume", broken, "--run.dir", tmp_path / "run") == 2
    assert "broken.pt cannot be read" in refusal(capsys)


def test_a_checkpoint_beyond_the_last_step_is_refused(
    train: Train, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = undisturbed / "checkpoints/step-00000040.pt"
    flags = (*SHORT, "--run.resume", state, "--run.dir", tmp_path / "run")
    assert train(*flags, "--train.steps", 39) == 2
    assert "the checkpoint is of step 40, beyond train.steps 39" in refusal(capsys)
    assert not (tmp_path / "run").exists()
    assert train(*flags) == 0  # a checkpoint of the last step has nothing left to train
    assert sha256(tmp_path / "run/model.safetensors") == sha256(undisturbed / "model.safetensors")


def test_an_unreadable_image_is_refused_by_name(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_image_folder(tmp_path / "data", size=32)
    victim = sorted((tmp_path / "data/train").rglob("*.*"))[3]
    victim.write_bytes(b"not an image")
    flags = ["--data.source", "imagefolder", "--data.root", tmp_path / "data", "--run.dir", tmp_path / "run"]
    assert train(*flags) == 2
    assert victim.name in refusal(capsys)
    assert not (tmp_path / "run").exists()


def test_without_a_compiler_auto_runs_eager_and_says_so(tmp_path: Path) -> None:
    bare = {"PATH": str(tmp_path), "CXX": None}
    synthetic = ("--data.source synthetic --data.synthetic_samples 128 --train.batch_size 8 --train.steps 2 "
                 "--model.name cifar_resnet --model.options.blocks_per_stage 1").split()  # fmt: skip
    command = [*synthetic, "--run.dir", tmp_path / "run"]
    done = run_fastres("train", *command, env=bare)
    assert done.returncode == 0, done.stderr
    assert "compile: false (no C++ compiler" in done.stdout
    done = run_fastres("train", *command, "--engine.compile", "true", env=bare)
    assert done.returncode == 2 and "engine.compile true: no C++ compiler" in done.stderr
