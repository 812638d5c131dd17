"""The length of a run in steps or epochs, and the schedule that is scaled to it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fastres import train
from fastres.config.cli import parse
from fastres.config.length import in_steps, needs_data
from fastres.config.schema import Config, TrainConfig, dump, to_dict
from fastres.training.build import build_parts
from fastres.training.schedule import lr_scale
from fastres.utils.process import console_log
from tests.fixtures import engine, rejected

Layer = dict[str, dict[str, Any]]
MULTISTEP = {"train": {"steps": 100}, "schedule": {"name": "multistep", "milestones": [50, 75], "warmup_steps": 10}}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def _console() -> Iterator[None]:
    """Print messages as the commands do."""
    with console_log():
        yield


def parsed(folder: Path, *layers: Layer, flags: str = "") -> Config:
    """Return the configuration of files, one for each layer, and flags."""
    argv = []
    for number, layer in enumerate(layers):
        (folder / f"{number}.json").write_text(json.dumps(layer))
        argv += ["--config", str(folder / f"{number}.json")]
    return parse([*argv, *flags.split()])


def schedule_of(config: Config) -> tuple[int, list[int], int]:
    return config.train.steps, list(config.schedule.milestones), config.schedule.warmup_steps


# ---- steps --------------------------------------------------------------------------------------------------


def test_a_shortened_recipe_has_a_shortened_schedule_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert schedule_of(parse(["--train.steps", "7800"])) == (7_800, [3_900, 5_850], 0)
    said = "schedule.milestones: [32000, 48000] -> [3900, 5850], because train.steps is 7800, not 64000\n"
    assert capsys.readouterr().out == said
    config = parse(["--recipe", "digits", "--train.steps=50"])
    assert config.schedule.warmup_steps == 8  # 100 * 50 / 600
    assert config.schedule.milestones == (32_000, 48_000)  # triangular does not use them
    assert capsys.readouterr().out == "schedule.warmup_steps: 100 -> 8, because train.steps is 50, not 600\n"


@pytest.mark.parametrize(
    "recipe", ["digits", "mnist-mini", "cifar10-resnet110", "cifar10-speedrun", "imagenet-resnet50"]
)
def test_every_recipe_can_be_shortened_to_any_number_of_steps(recipe: str) -> None:
    for steps in (0, 1, 7):
        config = parse(["--recipe", recipe, "--train.steps", str(steps)])
        assert config.train.steps == steps and config.schedule.warmup_steps <= steps


def test_the_learning_rate_is_that_of_the_whole_recipe_at_the_same_fraction() -> None:
    whole, short = parse([]), parse(["--train.steps", "640"])
    for step in range(0, 640, 8):
        assert lr_scale(short.schedule, step, 640) == lr_scale(whole.schedule, 100 * step, 64_000)


def test_milestones_that_coincide_each_apply(here: Path) -> None:
    config = parse(["--train.steps", "1"])
    assert config.schedule.milestones == (0, 1)
    assert lr_scale(config.schedule, 0, 1) == 0.1
    same = parsed(here, MULTISTEP, flags="--train.steps 1")
    assert same.schedule.milestones == (0, 1)
    none = parsed(here, MULTISTEP, flags="--train.steps 0")
    assert none.schedule.milestones == (0, 0) and lr_scale(none.schedule, 0, 1) == pytest.approx(0.01)
    (here / "config.yaml").write_text(dump(none))  # read back as it is
    assert parse(["--config", "config.yaml"]).schedule == none.schedule


def test_the_layers_decide(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps, later = {"train": {"steps": 20}}, {"schedule": {"warmup_steps": 7}}
    assert schedule_of(parsed(here, MULTISTEP)) == (100, [50, 75], 10)  # the same layer
    assert schedule_of(parsed(here, MULTISTEP, steps)) == (20, [10, 15], 2)
    assert schedule_of(parsed(here, MULTISTEP, later, steps)) == (20, [10, 15], 1)
    assert capsys.readouterr().out.count("schedule.") == 4
    assert schedule_of(parsed(here, MULTISTEP, steps, later)) == (20, [10, 15], 7)  # warmup_steps is later
    assert schedule_of(parsed(here, steps, MULTISTEP)) == (100, [50, 75], 10)
    assert schedule_of(parsed(here, MULTISTEP, flags="--train.steps 20 --schedule.milestones [3]")) == (20, [3], 2)
    # Rounded once: 75 and 10 are not scaled by way of 3 steps.
    assert schedule_of(parsed(here, MULTISTEP, {"train": {"steps": 3}}, flags="--train.steps 200")) == (
        200,
        [100, 150],
        20,
    )
    capsys.readouterr()
    assert schedule_of(parsed(here, MULTISTEP, steps, flags="--train.steps 100")) == (100, [50, 75], 10)
    assert capsys.readouterr().out == ""  # nothing has changed in the end


def test_given_values_are_checked_as_before(here: Path) -> None:
    with rejected("schedule.milestones", "ascending steps above 0"):
        parsed(here, MULTISTEP, flags="--train.steps 20 --schedule.milestones [0,0]")
    with rejected("schedule.warmup_steps: 30 is more than train.steps (20)"):
        parsed(here, MULTISTEP, flags="--train.steps 20 --schedule.warmup_steps 30")
    assert (
        schedule_of(parsed(here, {"train": {"steps": 0}}, {"schedule": {"warmup_steps": 0}}, {"train": {"steps": 5}}))[
            2
        ]
        == 0
    )


def test_config_yaml_holds_scaled_values_and_is_not_scaled_again(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = parse(["--recipe", "digits", "--train.steps", "50"])
    (here / "config.yaml").write_text(dump(config))
    assert yaml.safe_load(dump(config))["schedule"]["warmup_steps"] == 8
    capsys.readouterr()
    assert parse(["--config", "config.yaml"]) == config
    assert capsys.readouterr().out == ""
    assert parse(["--config", "config.yaml", "--train.steps", "25"]).schedule.warmup_steps == 4


number = st.integers(0, 500)
layer = st.fixed_dictionaries(
    {},
    optional={
        "steps": number,
        "warmup_steps": number,
        "milestones": st.lists(st.integers(1, 500), max_size=3, unique=True).map(sorted),
    },
)


@settings(max_examples=15, deadline=None)
@given(layers=st.lists(layer, min_size=1, max_size=3), last=layer)
def test_any_layers_scale_what_was_given_before_the_steps(tmp_path_factory: Any, layers: list[Any], last: Any) -> None:
    """The oracle looks for the layer that set each value, and for the steps there."""
    written = [{"steps": 64_000, "warmup_steps": 0, "milestones": [32_000, 48_000]}, *layers, last]
    steps = [next(w["steps"] for w in reversed(written[: i + 1]) if "steps" in w) for i in range(len(written))]
    place = {
        name: max(i for i, w in enumerate(written) if name in w) for name in ("steps", "warmup_steps", "milestones")
    }

    def expected(name: str, x: int) -> int:
        old = steps[place[name]]
        return round(Fraction(x * steps[-1], old)) if place["steps"] > place[name] and old else x

    milestones = [expected("milestones", x) for x in written[place["milestones"]]["milestones"]]
    warmup_steps = expected("warmup_steps", written[place["warmup_steps"]]["warmup_steps"])

    def sections(w: dict[str, Any]) -> Layer:
        return {
            "train": {k: v for k, v in w.items() if k == "steps"},
            "schedule": {k: v for k, v in w.items() if k != "steps"},
        }

    flags = [
        f"--{section}.{k}={v}".replace(" ", "") for section, values in sections(last).items() for k, v in values.items()
    ]
    folder = tmp_path_factory.mktemp("layers")
    if warmup_steps > steps[-1]:
        with rejected("schedule.warmup_steps"):
            parsed(folder, *map(sections, layers), flags=" ".join(flags))
        return
    config = parsed(folder, *map(sections, layers), flags=" ".join(flags))
    assert schedule_of(config) == (steps[-1], milestones, warmup_steps)
    (folder / "config.yaml").write_text(dump(config))
    assert parse(["--config", str(folder / "config.yaml")]) == config


def test_print_config_prints_only_the_configuration_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--train.steps", "640", "--print-config"])
    printed = capsys.readouterr()
    assert yaml.safe_load(printed.out)["schedule"]["milestones"] == [320, 480]
    line = "schedule.milestones: [32000, 48000] -> [320, 480], because train.steps is 640, not 64000"
    assert printed.err == f"fastres: {line}\n"


# ---- epochs -------------------------------------------------------------------------------------------------


def test_epochs_become_steps_and_scale_the_schedule() -> None:
    config = parse(["--recipe", "digits", "--train.epochs", "5"])
    assert needs_data(config) and config.schedule.warmup_steps == 100
    config, lines = in_steps(config, 1_437)
    assert (config.train.steps, config.train.epochs, config.schedule.warmup_steps) == (56, None, 9)
    assert lines == [
        "train.epochs 5: 56 steps of 128 for 1,437 images",
        "schedule.warmup_steps: 100 -> 9, because train.steps is 56, not 600",
    ]
    assert not needs_data(config)
    assert in_steps(parse(["--train.epochs", "0.0001"]), 1_437)[0].train.steps == 1
    assert in_steps(parse(["--train.epochs", "164"]), 50_000)[0].train.steps == 64_062


def test_epochs_and_steps_exclude_each_other_in_one_layer_and_a_later_layer_wins(here: Path) -> None:
    both = {"train": {"steps": 3, "epochs": 2}}
    with rejected("0.json", "train.epochs and train.steps", "leave one of them out"):
        parsed(here, both)
    with rejected("train.epochs and train.steps", "leave one of them out"):
        parse(["--train.epochs", "3", "--train.steps", "4"])
    epochs = {"train": {"epochs": 4}, "schedule": {"warmup_steps": 20}}
    later = parsed(here, epochs, flags="--train.steps 40")
    assert later.train.epochs is None and needs_data(later)  # 20 of 4 epochs: the data says how many steps that is
    assert in_steps(later, 1_280)[0].schedule.warmup_steps == 20
    assert in_steps(later, 2_560)[0].schedule.warmup_steps == 10
    assert in_steps(parsed(here, epochs, flags="--train.epochs 2"), 1_280)[0].schedule.warmup_steps == 10
    assert in_steps(parsed(here, MULTISTEP, flags="--train.epochs 2"), 1_280)[0].schedule.milestones == (10, 15)
    assert parsed(here, MULTISTEP, {"train": {"epochs": 4}}, flags="--train.epochs null").train.steps == 100


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "x", "true"])
def test_epochs_are_a_number_above_0(value: str) -> None:
    with rejected("train.epochs"):
        parse(["--train.epochs", value])


def test_the_configuration_of_a_run_in_epochs_survives_its_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--train.epochs", "2.5", "--print-config"])
    printed = capsys.readouterr()
    assert "config.yaml has both" in printed.err
    (here / "c.yaml").write_text(printed.out)
    assert to_dict(parse(["--config", "c.yaml"])) == yaml.safe_load(printed.out)


def test_parts_are_not_built_before_the_epochs_are_steps() -> None:
    with pytest.raises(ValueError, match="fix_length"):
        build_parts(Config(train=TrainConfig(epochs=3)), engine(), None)  # type: ignore[arg-type]


SMALL = ("--recipe digits --model.name resnet8 --train.batch_size 256 --data.validation 413 --train.eval_every 100 "
         "--engine.precision fp32").split()  # fmt: skip


def test_a_run_in_epochs_holds_steps_and_resumes_with_the_same_command(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*SMALL, "--train.epochs", "1.5", "--run.dir", "run"]
    assert train.main(command) == 0
    printed = capsys.readouterr()
    assert "train.epochs 1.5: 6 steps of 256 for 1,024 images" in printed.out
    assert "schedule.warmup_steps: 100 -> 1, because train.steps is 6, not 600" in printed.out
    written = yaml.safe_load((here / "run/config.yaml").read_text())
    assert (written["train"]["steps"], written["train"]["epochs"], written["schedule"]["warmup_steps"]) == (6, None, 1)
    assert json.loads((here / "run/summary.json").read_text())["steps"] == 6
    assert train.main(command) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert train.main([*SMALL, "--train.steps", "6", "--run.dir", "run"]) == 0  # the same run
    with rejected("train.steps: 6 -> 8"):
        train.main([*SMALL, "--train.epochs", "2", "--run.dir", "run"])
    with rejected("schedule.warmup_steps: 7 is more than train.steps (6)"):
        train.main([*command, "--schedule.warmup_steps", "7", "--run.dir", "other"])
    assert not (here / "other").exists()
