"""The command line and its files: precedence, recipes, the tutorial's config.json, rejections."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastres import doctor, evaluate, export, plot, profile, train
from fastres.config.cli import parse
from fastres.config.files import recipe_names
from fastres.config.formats import read_json, read_yaml, write_yaml
from fastres.config.schema import FIELDS, MAY_CHANGE, PATHS, Config, differences, dump, model_options, to_dict
from fastres.models.registry import build_model
from fastres.runs.run_dir import RunDir
from fastres.utils.errors import user_path
from tests.fixtures import rejected

RECIPES = {
    "digits",
    "mnist-mini",
    *(f"cifar10-resnet{depth}" for depth in (20, 32, 44, 56, 110)),
    "cifar100-resnet56",
    "cifar10-speedrun",
    "imagenet-resnet50",
    "finetune",
}


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Assert that parsing writes nothing, in every test."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    yield here
    assert list(here.iterdir()) == []


@pytest.fixture
def file(tmp_path: Path) -> Any:
    """Write a configuration file and return the flags that name it."""
    numbers = iter(range(99))

    def write(content: str | dict[str, Any]) -> list[str]:
        path = tmp_path / f"config{next(numbers)}.yaml"
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return ["--config", str(path)]

    return write


# ---- precedence ---------------------------------------------------------------------------------------------


def test_defaults_then_recipe_then_files_in_order_then_flags(file: Any) -> None:
    first = file("optim: {lr: 0.3, momentum: 0.5}\nrun: {seed: 3}\ntrain: {log_every: 7}")
    second = file("optim: {lr: 0.4}\nrun: {seed: 4}")
    config = parse(["--optim.lr", "0.5", *first, "--recipe", "digits", *second])
    assert config.recipe == "digits"
    assert config.data.workers == 2  # default
    assert config.train.steps == 600  # recipe over default
    assert config.train.log_every == 7  # file over recipe
    assert config.optim.momentum == 0.5  # from the first file, because the second does not set it
    assert config.run.seed == 4  # the second file over the first
    assert config.optim.lr == 0.5  # flag over files, wherever it stands
    assert parse([*second, *first]).run.seed == 3


def test_a_file_may_name_the_recipe_and_the_flag_wins(file: Any) -> None:
    names_digits, names_speedrun = file("recipe: digits"), file("recipe: cifar10-speedrun")
    assert parse(names_digits).train.steps == 600
    assert parse([*names_digits, *names_speedrun]).recipe == "cifar10-speedrun"
    assert parse([*names_speedrun, "--recipe", "digits"]).recipe == "digits"


def test_a_flag_sets_one_option_of_the_model_and_null_unsets_a_field() -> None:
    config = parse(["--model.name", "resnet18", "--model.options.stem", "small", "--model.options.v1", "true"])
    assert config.model.options == {"stem": "small", "v1": True}
    assert parse(["--model.shortcut", "conv1x1", "--model.shortcut", "null"]).model.shortcut is None


# ---- recipes ------------------------------------------------------------------------------------------------


def test_the_recipes_of_the_specification_are_there() -> None:
    assert set(recipe_names()) >= RECIPES


def test_without_arguments_it_is_the_schedule_of_he_et_al() -> None:
    config = parse([])
    assert config == parse(["--recipe", "cifar10-resnet20"])
    assert (config.model.name, config.model.shortcut, config.data.source) == ("resnet20", None, "cifar10")
    optim, schedule, data = config.optim, config.schedule, config.data
    assert (optim.name, optim.lr, optim.momentum, optim.weight_decay) == ("sgd", 0.1, 0.9, 1e-4)
    assert not optim.nesterov and optim.decay_norm_and_bias and not optim.scale_lr
    assert (config.train.batch_size, config.train.steps, config.train.label_smoothing) == (128, 64_000, 0)
    assert (schedule.name, schedule.milestones, schedule.factor) == ("multistep", (32_000, 48_000), 0.1)
    assert schedule.warmup_steps == 0
    assert (data.augment, data.pad, data.flip, data.validation) == ("crop", 4, True, 0)


def test_the_depths_differ_in_nothing_but_the_model_and_110_warms_up() -> None:
    base = to_dict(parse([]))
    for depth in (32, 44, 56):
        deeper = to_dict(parse(["--recipe", f"cifar10-resnet{depth}"]))
        assert differences(base, deeper) == [f"model.name: resnet20 -> resnet{depth}"]
    deepest = parse(["--recipe", "cifar10-resnet110"])
    assert {line.split(":")[0] for line in differences(base, to_dict(deepest))} == {
        "model.name", "schedule.warmup", "schedule.warmup_steps", "schedule.warmup_scale",
    }  # fmt: skip
    schedule = deepest.schedule
    assert (schedule.warmup, schedule.warmup_steps) == ("constant", 400)
    assert deepest.optim.lr * schedule.warmup_scale == pytest.approx(0.01)


# ---- config.yaml --------------------------------------------------------------------------------------------


def test_the_resolved_configuration_fed_back_is_the_same_run(file: Any) -> None:
    config = parse([
        "--recipe", "digits", "--model.name", "cifar_resnet", "--model.shortcut", "conv1x1",
        "--model.options.blocks_per_stage", "1", "--schedule.milestones", "[3, 5]", "--optim.lr", "1e-3",
        "--engine.compile", "false", "--run.dir", "somewhere", "--run.resume", "never", "--run.seed", "7",
    ])  # fmt: skip
    text = dump(config)
    assert "dir" not in yaml.safe_load(text)["run"] and "resume" not in yaml.safe_load(text)["run"]
    again = parse(file(text))
    assert again.recipe == "digits"
    assert again == dataclasses.replace(config, run=dataclasses.replace(config.run, dir=None, resume="auto"))
    assert dump(again) == text


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_parses_and_survives_the_round_trip(name: str, file: Any) -> None:
    config = parse(["--recipe", name])
    assert config.recipe == name
    assert parse(file(dump(config))) == config


def test_a_run_of_an_earlier_version_does_not_get_its_recipes_present_values(file: Any) -> None:
    written = to_dict(parse(["--recipe", "cifar10-speedrun"]))
    assert written["train"].pop("eval_mirrored") is True  # before the field existed
    config = parse([*file(yaml.safe_dump(written)), "--train.log_every", "7"])
    assert config.train.eval_mirrored is False
    assert (config.recipe, config.train.log_every) == ("cifar10-speedrun", 7)
    # A file of some fields builds on the recipe that it names.
    assert parse(file("recipe: cifar10-speedrun\ntrain: {log_every: 7}")).train.eval_mirrored is True


def test_print_config_prints_the_resolved_configuration_and_exits(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parse(["--print-config", "--optim.lr", "0.3"])
    assert left.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["optim"]["lr"] == 0.3


def test_differences_name_the_fields_and_ignore_names_and_places() -> None:
    old = to_dict(parse([]))
    assert differences(old, to_dict(parse(["--run.dir", "x", "--run.resume", "never"]))) == []
    assert differences(old, {**old, "recipe": "another name"}) == []
    changed = to_dict(parse(["--optim.lr", "0.2", "--schedule.milestones", "[1]", "--run.seed", "1"]))
    assert differences(old, changed) == [
        "optim.lr: 0.1 -> 0.2",
        "schedule.milestones: [32000, 48000] -> [1]",
        "run.seed: 0 -> 1",
    ]
    older = {**old, "optim": {k: v for k, v in old["optim"].items() if k != "nesterov"}}
    assert differences(older, old) == []  # written before the field existed
    assert differences(older, to_dict(parse(["--optim.nesterov", "true"]))) == ["optim.nesterov: false -> true"]


def test_the_fields_that_may_change_are_fields_with_reasons() -> None:
    assert set(MAY_CHANGE) <= set(FIELDS) and all(MAY_CHANGE.values())
    changed = ("--data.root=x --data.mirror=http://x --data.download=false --data.cache=x --data.workers=7 "
               "--train.eval_batch_size=7 --train.log_every=7 --run.checkpoint_every=7 --run.keep_checkpoints=7 "
               "--run.tensorboard=true --run.timeout_s=7")  # fmt: skip
    assert differences(to_dict(parse([])), to_dict(parse(changed.split()))) == []
    for kept in ("--data.validation=7", "--data.loader=dataloader", "--train.eval_every=7", "--run.seed=7"):
        assert len(differences(to_dict(parse([])), to_dict(parse([kept])))) == 1


def test_initial_weights_are_the_same_file_in_any_spelling(tmp_path: Path, in_an_empty_folder: Path) -> None:
    def weights(path: object) -> dict[str, Any]:
        return to_dict(parse([f"--model.weights={path}"]))

    for spelling in ("./w.pt", in_an_empty_folder / "w.pt", "../here/w.pt"):
        assert differences(weights("w.pt"), weights(spelling)) == []
    assert differences(weights("w.pt"), weights("v.pt")) == ["model.weights: w.pt -> v.pt"]
    assert differences(weights("w.pt"), to_dict(parse([]))) == ["model.weights: w.pt -> null"]


# ---- values that were renamed -------------------------------------------------------------------------------

OLD_NAME = "engine.conv own is now {}engine.conv cpp; the old name works for one version"


@pytest.mark.parametrize("flags", [["--engine.conv", "own"], ["--engine.conv=own"]])
def test_a_flag_takes_the_old_name_of_a_value_with_a_note(flags: list[str], caplog: pytest.LogCaptureFixture) -> None:
    assert parse(flags).engine.conv == "cpp"
    assert caplog.messages == ["--" + OLD_NAME.format("--")]


def test_a_file_takes_the_old_name_of_a_value_with_a_note(file: Any, caplog: pytest.LogCaptureFixture) -> None:
    flags = file("engine: {conv: own}")
    assert parse(flags).engine.conv == "cpp"
    assert caplog.messages == [f"{flags[1]}: " + OLD_NAME.format("")]


def test_the_present_name_of_a_value_needs_no_note(file: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(["--engine.conv", "cpp"]) == parse(file("engine: {conv: cpp}"))
    assert capsys.readouterr().err == ""


def test_a_run_that_was_started_with_the_old_name_of_a_value_is_resumed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    config = parse(["--engine.conv", "cpp", "--run.dir", str(run)])
    written = dump(config).replace("conv: cpp", "conv: own")
    assert written != dump(config)
    (run / "config.yaml").write_text(written)
    assert RunDir(config).check_resumable() is None  # the same run, not finished


# ---- the tutorial's config.json -----------------------------------------------------------------------------

TUTORIAL = {"height": 32, "width": 32, "label": 10, "num_layer": 3, "model_mode": "resnet", "zero_padding": True}


def parameters(config: Config) -> int:
    net = build_model(config.model.name, num_classes=config.model.num_classes, **model_options(config.model))
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(
    ("changed", "count"),
    [
        ({}, 269_722),  # maxpool_pad
        ({"zero_padding": False}, 272_474),  # conv1x1
        ({"model_mode": "cnn"}, 269_722),
        ({"model_mode": "cnn", "zero_padding": False}, 269_722),  # a plain net has no shortcut to choose
        ({"num_layer": 18}, 1_727_962),
    ],
)
def test_the_tutorials_nets_are_the_specifications(changed: dict[str, Any], count: int, file: Any) -> None:
    assert parameters(parse(file({**TUTORIAL, **changed}))) == count


def test_the_tutorials_keys_land_where_they_belong(file: Any) -> None:
    config = parse(file({**TUTORIAL, "label": 100}))
    assert config.model.num_classes == 100 and config.data.image_size == 32
    assert config.model.shortcut == "maxpool_pad"
    assert parse(file({**TUTORIAL, "zero_padding": False})).model.shortcut == "conv1x1"
    cnn = parse(file({**TUTORIAL, "model_mode": "cnn"}))
    assert cnn.model.shortcut is None and cnn.model.options["plain"] is True
    assert config.optim == parse([]).optim and config.train == parse([]).train  # the rest is the recipe's
    assert parse([*file(TUTORIAL), "--optim.lr", "0.2"]).optim.lr == 0.2


@pytest.mark.parametrize(("n", "depth"), [(8, 50), (25, 152)])
def test_a_tutorial_name_means_the_cifar_net_even_if_imagenet_has_that_name(n: int, depth: int, file: Any) -> None:
    model = parse(file({**TUTORIAL, "num_layer": n})).model
    net = build_model(model.name, num_classes=model.num_classes, **model_options(model))
    convolutions = [m for m in net.modules() if type(m).__name__ == "Conv2d"]
    assert len(convolutions) + 1 == depth  # and the linear layer
    assert convolutions[-1].out_channels == 64


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"width": 28}, ("height", "width", 28)),
        ({"learning_rate": 0.1}, ("learning_rate", "num_layer")),
        ({"optim": {"lr": 0.1}}, ("optim", "num_layer")),
        ({"model_mode": "vgg"}, ("model_mode", "vgg", "resnet or cnn")),
        ({"num_layer": 0}, ("num_layer", 0)),
        ({"num_layer": "3"}, ("num_layer", "'3'")),
        ({"num_layer": True}, ("num_layer", True)),
        ({"label": 2.5}, ("label", 2.5)),
        ({"zero_padding": "yes"}, ("zero_padding", "yes", "true or false")),
    ],
)
def test_a_wrong_tutorial_file_is_refused(changed: dict[str, Any], said: tuple[object, ...], file: Any) -> None:
    flags = file({**TUTORIAL, **changed})
    with rejected(flags[1], *said):
        parse(flags)


# ---- refusals: names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--recipe", "cifar10-resnet21"], ("cifar10-resnet21", "did you mean cifar10-resnet", "digits")),
        (["--recipe", "../recipes/digits"], ("../recipes/digits", "choose from")),
        (["--optim.lrr", "1"], ("--optim.lrr", "did you mean --optim.lr?")),
        (["--nosuch.thing", "1"], ("--nosuch.thing",)),
        (["--train.step", "3"], ("--train.step", "train.steps")),  # no abbreviations: a script would rot
        (["digits"], ("digits", "--recipe digits")),
        (["--optim.lr"], ("optim.lr: its value is missing; give a number above 0",)),
        (["--optim", "3"], ("optim",)),
        (["--model.name", "resnet21"], ("resnet21", "resnet20")),
        (["--model.options.stemm", "small"], ("stemm",)),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(argv: list[str], said: tuple[str, ...]) -> None:
    with rejected(*said):
        parse(argv)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("optim: {lrr: 1}", ("optim.lrr", "did you mean optim.lr?")),
        ("optimm: {lr: 1}", ("optimm",)),
        ("optimm: 1", ("optimm", "optim,")),  # together with the existing sections
        ("optim: 3", ("optim", "3")),
        ("optim:", ("optim",)),
        ("1: 2", ("1",)),
        ("recipe: nosuch", ("nosuch", "digits")),
        ("recipe: 3", ("recipe", "3")),
        ("recipe:", ("recipe",)),
        ("config: other.yaml", ("config",)),  # a flag, not a section
        ("print_config: true", ("print_config",)),
    ],
)
def test_an_unknown_name_in_a_file_is_refused(content: str, said: tuple[str, ...], file: Any) -> None:
    with rejected(*said):
        parse(file(content))


# ---- refusals: values ---------------------------------------------------------------------------------------

WRONG_TYPES = [  # field, values of a wrong type or range, and the accepted ones
    ("train.steps", ["x", 1.5, True, -1], "a whole number, 0 or above"),
    ("train.batch_size", [0], "a whole number above 0"),
    ("optim.lr", ["x", True, 0, [0.1]], "a number above 0"),
    ("optim.momentum", [-0.9], "a number, 0 or above"),
    ("optim.nesterov", ["maybe", 1], "true or false"),
    ("data.source", ["cifar11", True], "one of cifar10, cifar100, mnist"),
    ("model.shortcut", ["padd", 3], "one of pad, maxpool_pad, conv1x1 or null"),
    ("engine.compile", ["maybe", 3], "true or false or auto"),
    ("schedule.milestones", [5, ["a"], [1.5], [True]], "a list of whole numbers"),
    ("model.options", [3], "a mapping"),
    ("model.num_classes", ["x", 0], "a whole number above 0 or null"),
]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--data.pad_mode zero --data.pad -1", "data.pad: '-1' is not"),
        ("--schedule.warmup_steps 5 --schedule.warmup quadratic", "schedule.warmup: 'quadratic' is not"),
        ("--train.steps 5 --train.steps x", "train.steps: 'x' is not"),
        ("--train.steps=5 --train.steps=x", "train.steps: 'x' is not"),
    ],
)
def test_the_rejected_value_is_the_one_named(flags: str, said: str) -> None:
    with rejected(said):
        parse(flags.split())


@pytest.mark.parametrize(
    ("field", "value", "takes"), [(field, value, takes) for field, values, takes in WRONG_TYPES for value in values]
)
def test_a_value_of_another_type_is_refused_wherever_it_stands(field: str, value: Any, takes: str, file: Any) -> None:
    section, name = field.split(".")
    flags = file({section: {name: value}})
    with rejected(flags[1], field, takes):
        parse(flags)
    text = value if isinstance(value, str) else json.dumps(value)
    with rejected(field, takes):
        parse([f"--{field}={text}"])


@pytest.mark.parametrize(
    "field", ["model.name", "data.source", "train.steps", "optim.lr", "optim.nesterov", "schedule.milestones"]
)
def test_null_is_refused_where_a_value_is_needed(field: str, file: Any) -> None:
    section, name = field.split(".")
    with rejected(field):
        parse(file({section: {name: None}}))


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e400"])
def test_a_number_that_is_not_finite_is_refused(value: str, file: Any) -> None:
    with rejected("optim.weight_decay"):
        parse([f"--optim.weight_decay={value}"])
    literal = {"nan": ".nan", "inf": ".inf", "-inf": "-.inf", "1e400": "1.0e+400"}[value]
    with rejected("optim.weight_decay"):
        parse(file(f"optim: {{weight_decay: {literal}}}"))


IMPOSSIBLE = {
    "--train.label_smoothing 1": ("train.label_smoothing", "below 1"),
    "--optim.momentum 1": ("optim.momentum", "below 1"),
    "--optim.muon_momentum 1": ("optim.muon_momentum", "below 1"),
    "--optim.name muon --engine.precision fp16": ("muon", "fp16", "use engine.precision bf16"),
    "--optim.nesterov true --optim.momentum 0": ("optim.nesterov", "optim.momentum"),
    "--schedule.milestones [5,3]": ("schedule.milestones", "ascending"),
    "--schedule.milestones [3,3]": ("schedule.milestones", "ascending"),
    "--schedule.milestones [0,3]": ("schedule.milestones", "above 0"),
    "--schedule.warmup_steps 11 --train.steps 10": ("schedule.warmup_steps", "train.steps"),
    "--engine.device tpu": ("engine.device", "tpu", "cuda:N"),
    "--engine.device cuda:-1": ("engine.device", "cuda:N"),
    "--data.augment resized_crop --data.loader dataloader": ("resized_crop", "data.image_size"),
    "--data.augment resized_crop --data.image_size 32": ("resized_crop", "--data.loader dataloader or dali"),
    "--recipe digits --data.exif true": ("data.exif", "image files only", "--data.source imagefolder"),
    "--data.source synthetic --data.image_size 4": ("data.image_size", "4"),
    "--model.name plain20 --model.shortcut pad": ("plain20", "shortcut"),
    "--model.name cifar_resnet": ("cifar_resnet", "blocks_per_stage"),
    "--model.name resnet18 --model.options.groups 2": ("model", "groups"),
    "--run.seed 18446744073709551616": ("run.seed",),  # 2^64: neither torch nor Philox takes it
}


@pytest.mark.parametrize("flags", IMPOSSIBLE)
def test_an_impossible_value_is_refused_before_anything_is_loaded(flags: str) -> None:
    with rejected(*IMPOSSIBLE[flags]):
        parse(flags.split())


# ---- refusals: files ----------------------------------------------------------------------------------------


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, file: Any) -> None:
    with rejected("nowhere.yaml", "No such file"):
        parse(["--config", "nowhere.yaml"])
    with rejected(tmp_path, "directory"):
        parse(["--config", str(tmp_path)])
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x80")
    with rejected(tmp_path / "binary", "not a text file"):
        parse(["--config", str(tmp_path / "binary")])
    for content in ("{", "a: b: c", "optim: [", "!!python/object/apply:os.getcwd []"):
        flags = file(content)
        with rejected(flags[1], "YAML"):
            parse(flags)
    for content in ("- 1", "3", "", "just words"):
        flags = file(content)
        with rejected(flags[1], "sections"):
            parse(flags)


@pytest.mark.parametrize("flags", ["--data.root data --run.dir run", "--data.root=data --run.dir=run"])
def test_a_folder_may_have_the_name_of_a_section(flags: str) -> None:
    config = parse(flags.split())
    assert (config.data.root, config.run.dir) == ("data", "run")


# ---- ~ in paths ---------------------------------------------------------------------------------------------

PATH_FLAGS = [f"{section}.{name}" for section, names in PATHS.items() for name in names]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty folder that ~ stands for."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    return home


def value_of(config: Config, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


@pytest.mark.parametrize("key", PATH_FLAGS)
def test_a_tilde_is_expanded_in_every_path_of_flags_files_and_python(key: str, home: Path, tmp_path: Path) -> None:
    section, _, name = key.partition(".")
    assert value_of(parse([f"--{key}=~/x/y"]), key) == str(home / "x/y")
    (home / "c.yaml").write_text(f"{section}: {{{name}: ~/x}}")
    assert value_of(parse(["--config=~/c.yaml"]), key) == str(home / "x")
    kind = type(getattr(Config(), section))
    assert getattr(kind(**{name: "~"}), name) == str(home)
    assert getattr(kind(**{name: "a/~"}), name) == "a/~"
    assert getattr(kind(**{name: f"{tmp_path}/~x/"}), name) == f"{tmp_path}/~x/"
    with rejected(key, "~nosuchuser", "./~nosuchuser"):
        parse([f"--{key}", "~nosuchuser/x"])


def test_a_tilde_in_front_of_an_unknown_user_is_one_line(home: Path) -> None:
    with rejected("~nosuchuser/c.yaml", "no home folder"):
        parse(["--config", "~nosuchuser/c.yaml"])
    for command in (evaluate.main, export.main, plot.main):
        with rejected("~nosuchuser/run", "no home folder"):
            command(["~nosuchuser/run"])
    with rejected("~nosuchuser/out", "no home folder"):
        profile.main(["--output", "~nosuchuser/out"])
    with rejected("~nosuchuser/data", "no home folder"):
        doctor.main(["--data.root", "~nosuchuser/data"])


def test_every_command_expands_a_tilde(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "c.json").write_text(json.dumps(TUTORIAL | {"num_layer": 1, "height": 8, "width": 8}))
    flags = "--recipe digits --train.steps 2 --train.batch_size 8 --schedule.warmup_steps 1 --train.eval_every 2"
    assert train.main([*flags.split(), "--config=~/c.json", "--run.dir=~/run"]) == 0
    evaluate.main(["~/run", "--checkpoint=~/run/checkpoints/step-00000002.pt", "--data.root=~/d", "--data.cache=~/c"])
    export.main(["~/run", "--output=~/net.safetensors"])
    plot.main(["~/run", "--output=~/curves.png"])
    assert {path.name for path in home.iterdir()} == {"c.json", "run", "net.safetensors", "config.json", "curves.png"}
    assert profile.parser().parse_args(["--output=~/p"]).output == home / "p"
    (home / "data/MNIST/raw").mkdir(parents=True)
    assert f"under {home / 'data'}: mnist" in "".join(text for _, text in doctor.data(user_path("~/data")))


# ---- JSON and YAML, read strictly ---------------------------------------------------------------------------


def written(path: Path, content: str) -> list[str]:
    """Write a configuration file and return the flags that name it."""
    path.write_text(content, encoding="utf-8")
    return ["--config", str(path)]


@pytest.mark.parametrize("name", ["a.json", "b.JSON"])
def test_a_json_file_is_read_as_json(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    config = parse(written(path, json.dumps({"optim": {"lr": 1e-05}, "data": {"root": "a\tb"}}, indent="\t")))
    assert (config.optim.lr, config.data.root) == (1e-05, "a\tb")
    assert parse(written(path, '{"data": {"root": "\\/a\\ud83d\\ude00"}}')).data.root == "/a\U0001f600"
    assert parse(written(path, "\ufeff" + json.dumps(TUTORIAL, indent="\t"))).model.num_classes == 10


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{\n\t"optim": {"lr": 0.1},\n}', "line 3 column 1"),
        ("{'optim': {}}", "line 1 column 2"),
        ("optim: {lr: 0.1}", "line 1 column 1"),
        ('{"optim": {"lr": 0.1} // faster\n}', "line 1 column 23"),
        ('{"optim": {"lr": 010}}', "line 1 column 19"),
        ("", "line 1 column 1"),
        ('{"optim": {\n"momentum": NaN}}', "NaN is not a number in JSON; give a finite number: line 2 column 13"),
        ('{"optim": {"lr": -Infinity}}', "-Infinity is not a number in JSON; give a finite number: line 1 column 18"),
        ('{"run": {"seed": 1,\n\t"dir": "{\\"seed", "s\\u0065ed": 2}}', "'seed' is given twice, first in line 1"),
        (
            '{"optim": {"lr": 1},\n"run": {},\n"optim": {}}',
            "'optim' is given twice, first in line 1; remove one: line 3",
        ),
    ],
)
def test_a_json_file_is_read_strictly(content: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with rejected(path, "cannot be read as JSON", said):
        parse(written(path, content))


def test_objects_side_by_side_may_have_equal_keys(tmp_path: Path) -> None:
    content = '{"train": {"steps": 3, "batch_size": 8}, "schedule": {"warmup_steps": 0}, "data": {}}'
    assert parse(written(tmp_path / "config.json", content)).train.steps == 3
    path = tmp_path / "config.yaml"
    merged = "train: &t {steps: 3, log_every: 7}\nschedule: {warmup_steps: 0}\n"
    assert parse(written(path, merged)).train.log_every == 7


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("optim: {lr: 1}\nrun: {}\noptim: {}", "line 3, column 1: 'optim' is given twice, first in line 1; remove one"),
        ("run:\n  seed: 3\n  seed: 3", "line 3, column 3: 'seed' is given twice, first in line 2; remove one"),
        ("model: {options: {stem: small, 'stem': 1}}", "line 1, column 32: 'stem' is given twice, first in line 1"),
        ("run: {seed: 010}", "line 1, column 13: 010 would be a number in base 8; write 10, or '010' for text"),
        ("run: {seed: 019}", "write 19"),
        ("run: {seed: 000}", "write 0,"),
        ("run: {dir: 0012}", "'0012' for text"),
        ("run: {seed: 1:30}", "line 1, column 13: 1:30 would be a number in base 60; write it in decimal"),
        ("optim: {lr: 1:30.5}", "1:30.5 would be a number in base 60"),
        ("schedule: {milestones: [010, 020]}", "line 1, column 25: 010 would be a number in base 8"),
        ("optim:\n\tlr: 1", "line 2, column 1"),
    ],
)  # fmt: skip
def test_ambiguous_yaml_is_rejected_with_its_place(content: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    with rejected(path, "cannot be read as YAML", said):
        parse(written(path, content))


def test_a_flag_reads_lists_and_mappings_as_strictly_and_a_whole_number_in_decimal() -> None:
    assert parse(["--run.seed", "010"]).run.seed == 10
    assert parse(["--run.dir", "010", "--data.root", "1:30"]).run.dir == "010"
    with rejected("schedule.milestones", "010 would be a number in base 8"):
        parse(["--schedule.milestones", "[010, 020]"])
    with rejected("model.options", "'blocks_per_stage' is given twice"):
        parse(["--model.options={blocks_per_stage: 1, blocks_per_stage: 2}"])


@pytest.mark.parametrize(
    ("text", "lr"), [("1e-4", 1e-4), ("1E-4", 1e-4), ("+1e-4", 1e-4), (".5", 0.5), ("0.5", 0.5), ("2", 2.0)]
)
def test_numbers_in_yaml_are_those_of_json(text: str, lr: float, tmp_path: Path) -> None:
    config = parse(written(tmp_path / "c.yaml", f"optim: {{lr: {text}}}"))
    assert config.optim.lr == lr and type(config.optim.lr) is float


def test_an_option_of_the_model_is_a_number_in_every_spelling() -> None:
    assert read_yaml("{a: 1e-4, b: [0x10, 1_0], c: 0}") == {"a": 1e-4, "b": [16, 10], "c": 0}
    assert read_json('{"a": 1e-4}') == {"a": 1e-4}


@pytest.mark.parametrize(
    ("text", "value"), [("yes", True), ("no", False), ("on", True), ("off", False), ("true", True)]
)
def test_yes_and_no_are_true_and_false_in_files_and_flags(text: str, value: bool, tmp_path: Path) -> None:
    assert parse(written(tmp_path / "c.yaml", f"optim: {{nesterov: {text}}}")).optim.nesterov is value
    assert parse([f"--optim.nesterov={text}"]).optim.nesterov is value
    with rejected("data.root", str(value), "in quotes"):
        parse(written(tmp_path / "c.yaml", f"data: {{root: {text}}}"))
    assert parse(written(tmp_path / "c.yaml", f"data: {{root: '{text}'}}")).data.root == text


@pytest.mark.parametrize("text", "1e3 010 1:30 yes 2026-01-31 .5 0x10 1_0 1e-4 019".split())
def test_text_of_any_look_survives_config_yaml(text: str, file: Any) -> None:
    config = parse([])
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, mirror=text))
    assert parse(file(dump(config))) == config
    assert yaml.safe_load(dump(config)) == to_dict(config)  # for other programs too
    assert read_yaml(write_yaml({"a": text})) == yaml.safe_load(write_yaml({"a": text})) == {"a": text}
