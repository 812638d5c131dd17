"""All commands name equal flags equally and word their help alike, and old spellings of flags still work."""

from __future__ import annotations

import importlib
import io
import itertools
import re
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path

import pytest

from fastres import export, profile
from fastres.config.cli import RENAMED_FLAGS, parse
from fastres.config.descriptions import describe
from fastres.config.remedies import NAMES_ELSEWHERE
from fastres.config.schema import FIELDS, differences, to_dict
from fastres.runs.environment import environment
from fastres.training.engine import resolve_engine
from fastres.utils.errors import Parser, UsageError
from tests.commands import ROOT, run_module

COMMANDS = ["fastres.train", "fastres.predict", "fastres.evaluate", "fastres.export", "fastres.plot",
            "fastres.profile", "fastres.doctor"]  # fmt: skip
TOOLS = ["bench.report", "bench.held_out", "bench.counts", "bench.fuse_sweep", "bench.cpu_norm",
         "fastres_kernels.report"]  # fmt: skip

ENTRY = re.compile(r"  (\S.*?)(?:  +(\S.*))?")  # two or more blanks, or a new line, precede the text
IN_BRACKETS = re.compile(r" \((type|default): .*\)$")  # after the sentences


@cache
def help_of(command: str) -> str:
    """Return what --help prints, with each text in one line."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        patch.setattr("sys.argv", [command, "--help"])
        patch.setenv("COLUMNS", "5000")
        with pytest.raises(SystemExit):
            importlib.import_module(command).main()
    return printed.getvalue()


def entries_of(command: str) -> dict[str, str]:
    """Return the help texts of a command by the flags and the argument that they describe."""
    found: dict[str, str] = {}
    name = listing = ""
    for line in help_of(command).splitlines():
        if re.fullmatch(r"\S.*:", line):
            listing = line
        elif not line:
            listing = ""
        elif listing and (match := ENTRY.fullmatch(line)):
            name = match[1]
            found[name] = match[2] or ""
        elif listing:
            found[name] += line.strip()
    assert "-h, --help" in found
    return found


def flags_of(command: str) -> set[str]:
    """Return the flags of a command."""
    return {flag for name in entries_of(command) for flag in re.findall(r"--[\w.-]+", name)}


@pytest.mark.parametrize("command", [*COMMANDS, *TOOLS])
def test_help_texts_are_sentences(command: str) -> None:
    wrong = []
    for name, text in entries_of(command).items():
        sentences = IN_BRACKETS.sub("", text)
        flag = name.split()[0].rstrip(",").removeprefix("--")
        values = describe(flag) if flag in FIELDS else ""
        first = sentences.split(" ")[0]
        if sentences and not (sentences.endswith((".", ".)")) and (not first[0].islower() or first in values)):
            wrong.append(f"{name}: {text}")
    assert not wrong
    _, described, *_ = help_of(command).split("\n\n")
    assert described[0].isupper(), described


@pytest.mark.parametrize("command", [*COMMANDS, *TOOLS])
def test_a_flag_with_a_dot_is_a_field_and_any_other_has_hyphens(command: str) -> None:
    for flag in flags_of(command):
        assert flag[2:] in FIELDS if "." in flag else re.fullmatch("--[a-z0-9]+(-[a-z0-9]+)*", flag), flag


def test_no_two_commands_spell_a_flag_differently() -> None:
    flags = sorted({flag for command in COMMANDS for flag in flags_of(command) if "." not in flag})
    assert not [pair for pair in itertools.permutations(flags, 2) if pair[1].startswith(pair[0])]


# ---- old spellings ------------------------------------------------------------------------------------------


def test_an_old_spelling_works_and_prints_a_line_that_names_the_new_one(caplog: pytest.LogCaptureFixture) -> None:
    parser = Parser(renamed={"--out": "--output"})
    parser.add_argument("--output")
    for arguments in (["--out", "a"], ["--out=a"]):
        assert parser.parse_args(arguments).output == "a"
        assert caplog.messages == ["--out is now --output; the old spelling works for one version"]
        caplog.clear()
    assert parser.parse_args(["--output", "--out"[2:]]).output == "out"
    assert not caplog.messages


@pytest.mark.parametrize("old", RENAMED_FLAGS)
def test_an_old_spelling_of_trains_flags_works(old: str) -> None:
    new = RENAMED_FLAGS[old]
    assert new in flags_of("fastres.train") and old not in help_of("fastres.train")
    before, now = (run_module("fastres.train", flag, cwd=ROOT) for flag in (old, new))
    assert (before.returncode, before.stdout) == (now.returncode, now.stdout) == (0, now.stdout) and now.stdout
    assert before.stderr == f"fastres: {old} is now {new}; the old spelling works for one version\n" + now.stderr


def test_the_kernels_report_takes_the_old_spelling_of_output(tmp_path: Path) -> None:
    done = run_module("fastres_kernels.report", "--json", tmp_path / "x.json", "--only", "nothing", cwd=ROOT)
    assert "fastres_kernels: --json is now --output; the old spelling works for one version" in done.stderr


def test_profile_takes_the_old_spelling_of_output(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UsageError, match="--channels belongs to --block"):
        profile.main(["--out", "somewhere", "--channels", "16"])
    assert caplog.messages == ["--out is now --output; the old spelling works for one version"]


# ---- the flag that was meant --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("--lr 0.1", "--optim.lr"),
        ("--lr=0.1", "--optim.lr"),
        ("--batch_size 64", "--train.batch_size"),
        ("--batch-size 64", "--train.batch_size"),
        ("--batchsize 64", "--train.batch_size"),
        ("-b 64", "--train.batch_size"),
        ("--steps 10", "--train.steps"),
        ("--seed 1", "--run.seed"),
        ("--precision bf16", "--engine.precision"),
        ("--epochs 3", "--train.epochs"),
        ("--weight-decay 0.1", "--optim.weight_decay"),
        ("--train.lr 0.1", "--optim.lr"),
        ("--modle.name resnet20", "--model.name"),
        ("--opt sgd", "--optim.name"),
        ("--amp", "--engine.precision bf16"),
        ("--no-flip", "--data.flip false"),
        ("--device cpu", "--engine.device"),
        ("--output runs/x", "--run.dir"),
        ("--name x", "--model.name, --optim.name or --schedule.name"),
        ("digits", "--recipe digits"),
        ("digist", "--recipe digits"),
        ("resnet50", "--model.name resnet50"),
        ("timm/resnet18", "--model.name timm/resnet18"),
        ("optim.lr=0.1", "--optim.lr=0.1"),
        ("mine.yaml", "--config mine.yaml"),
        ("photos", "--data.root photos"),
        ("runs/a", "--config runs/a/config.yaml"),
        ("runs/a/checkpoints/step-00000020.pt", "--run.resume runs/a/checkpoints/step-00000020.pt"),
        ("model.safetensors", "--model.weights model.safetensors"),
        ("--config digits", "--recipe digits"),
        ("--recipe mine.yaml", "--config mine.yaml"),
    ],
)
def test_an_unknown_argument_is_answered_with_the_flag_that_was_meant(
    given: str, meant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("photos", "runs/a"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("mine.yaml", "runs/a/config.yaml"):
        (tmp_path / file).touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=re.escape(f" (did you mean {meant}?)")):
        parse(given.split())


def test_an_unknown_argument_that_is_like_nothing_gets_no_suggestion() -> None:
    for given in ("--frobnicate", "0.1", "README.md"):
        with pytest.raises(UsageError, match="; --help lists them all") as error:
            parse([given])
        assert "did you mean" not in str(error.value)


@pytest.mark.parametrize("name", NAMES_ELSEWHERE)
def test_a_name_of_another_program_leads_to_a_field_that_takes_the_value(name: str) -> None:
    field, _, value = NAMES_ELSEWHERE[name].partition(" ")
    assert field in FIELDS and name not in {known.partition(".")[2] for known in FIELDS}
    if value and "cuda" not in value:
        section, _, field = field.partition(".")
        parsed = getattr(getattr(parse(["--model.name=resnet18", f"--{section}.{field}={value}"]), section), field)
        assert str(parsed).lower() == value.lower()


@pytest.mark.parametrize(
    ("command", "given", "meant"),
    [
        ("predict", "run image.png --device cpu", "unknown flag --device (did you mean --engine.device?)"),
        ("predict", "run image.png --batch_size 3", "unknown flag --batch_size (did you mean --batch-size?)"),
        ("evaluate", "run --output_dir x", "unknown flag --output_dir (did you mean --output?)"),
        ("evaluate", "run other", "other: is one argument too many"),
        ("export", "run --image-size 32", "unknown flag --image-size (did you mean --data.image_size?)"),
    ],
)
def test_other_commands_name_the_flag_that_was_meant(command: str, given: str, meant: str) -> None:
    with pytest.raises(UsageError, match=re.escape(meant)):
        importlib.import_module(f"fastres.{command}").main(given.split())


@pytest.mark.parametrize(("field", "value"), [("lr", "0.1"), ("train.lr", "0.1")])
def test_a_field_in_the_wrong_place_of_a_file_is_answered_with_its_own(field: str, value: str, tmp_path: Path) -> None:
    section, _, name = field.rpartition(".")
    (tmp_path / "x.yaml").write_text(f"{section}: {{{name}: {value}}}" if section else f"{name}: {value}")
    with pytest.raises(UsageError, match=r"did you mean optim\.lr\?"):
        parse(["--config", str(tmp_path / "x.yaml")])


# ---- printed settings can be typed --------------------------------------------------------------------------


def field_named(name: str) -> str:
    """Return the field of a line that auto has printed."""
    (field,) = (field for field in (f"engine.{name}", f"model.{name}") if field in FIELDS)
    return field


def test_the_choices_of_auto_are_values_of_their_fields() -> None:
    engine = resolve_engine(parse([]))
    assert len(engine.reasons) == 6
    for line in engine.reasons:
        match = re.fullmatch(r"(\w+): (\S+) \(.+\)", line)
        assert match, line
        parse([f"--{field_named(match[1])}={match[2]}"])


def test_the_norm_that_is_chosen_per_shape_is_printed_as_auto() -> None:
    engine = resolve_engine(parse(["--engine.precision=bf16"]))
    (line,) = (line for line in engine.reasons if line.startswith("norm: "))
    assert line.startswith("norm: auto (fused or torch for each shape" if engine.norm == "measured" else "norm: torch")
    assert environment(engine)["norm"] == line.split()[1]


@pytest.mark.parametrize("field", [field for field in FIELDS if field not in ("train.epochs", "run.resume")])
def test_a_printed_default_is_a_value_of_its_field(field: str) -> None:
    texts = {name.split()[0].rstrip(",")[2:]: text for name, text in entries_of("fastres.train").items() if "." in name}
    (default,) = re.findall(r"default: (.*)\)$", texts[field])
    section, _, name = field.partition(".")
    parsed = parse([f"--{field}={default}"])
    assert getattr(getattr(parsed, section), name) == getattr(getattr(parse([]), section), name)


def test_a_difference_that_a_resumed_run_rejects_is_printed_as_it_is_typed() -> None:
    new = to_dict(parse(["--data.flip=false", "--data.image_size=32", "--schedule.milestones=[1,2]"]))
    assert differences(to_dict(parse([])), new) == [
        "data.flip: true -> false",
        "data.image_size: null -> 32",
        "schedule.milestones: [32000, 48000] -> [1, 2]",
    ]


@pytest.mark.parametrize("written", ["torch.export", "torch-export", "torch_export"])
def test_a_format_of_export_may_be_written_as_torch_does(written: str) -> None:
    with pytest.raises(UsageError, match="is not the folder of a run"):
        export.main(["nowhere", "--format", written])
