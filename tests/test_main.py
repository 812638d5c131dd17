"""`fastres COMMAND` and `python -m fastres COMMAND`: the commands, their names in --help, errors, and completion."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from fastres.__main__ import COMMANDS, SHELLS, main
from fastres.utils.atomic_io import parse_json
from tests.commands import ROOT, run_module
from tests.fixtures import rejected


def test_every_command_is_listed_with_its_purpose(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert {f"{name} {purpose}" for name, purpose in COMMANDS.items()} <= {*lines}


def test_every_module_with_a_main_is_a_command() -> None:
    modules = {path.stem for path in (ROOT / "fastres").glob("*.py") if "\ndef main(" in path.read_text("utf-8")}
    assert modules == {*COMMANDS, "__main__"}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("way", ["fastres", "python -m fastres", "python -m fastres."])
def test_help_names_the_command_as_it_was_typed(
    way: str, command: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    if way == "fastres":  # as in the installed program, the main module of this process has another name
        with pytest.raises(SystemExit, match="0"):
            main([command, "--help"])
        printed = capsys.readouterr().out
    else:
        module, *words = ("fastres", command) if way.endswith("fastres") else (f"fastres.{command}",)
        done = run_module(module, *words, "--help", cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        printed = done.stdout
    name = f"{way}{'' if way.endswith('.') else ' '}{command}"
    assert printed.startswith(f"usage: {name} [")
    named = {line.split(command)[0].strip() for line in printed.splitlines() if line.strip().startswith(way)}
    assert named <= {name.removesuffix(command).strip()}  # in examples


def test_help_of_evaluate_names_train_as_it_would_be_typed(tmp_path: Path) -> None:
    for module, words, name in (
        ("fastres", ["evaluate"], "python -m fastres train"),
        ("fastres.evaluate", [], "python -m fastres.train"),
    ):
        assert f"(see {name} --help)" in run_module(module, *words, "--help", cwd=tmp_path).stdout


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("trian", "unknown command 'trian'; did you mean 'train'? choose from train, predict, "),
        ("digits", "unknown command 'digits'; choose from train, predict, "),
        ("", "no command is given; choose from train, predict, evaluate, "),
        ("--recipe digits", "unknown flag --recipe; a command's flags follow its name, as in fastres train --help"),
        ("--print-completion ksh", "--print-completion: invalid choice: 'ksh'"),
        ("--print-completion bash train", "train: --print-completion takes the name of a shell and nothing else"),
        ("evaluate missing", "missing"),
        ("train --train.step 10", "unknown flag --train.step "),
    ],
)
def test_an_unusable_command_line_is_one_line(arguments: str, line: str) -> None:
    with rejected(line):
        main(arguments.split())


def test_an_error_ends_the_program_with_one_line_and_status_2(tmp_path: Path) -> None:
    done = run_module("fastres", "trian", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("fastres: error: unknown command 'trian'; did you mean 'train'?")
    assert done.stderr.count("\n") == 1


def test_a_command_does_the_same_work_as_its_module(tmp_path: Path) -> None:
    flags = ("--recipe digits --model.name resnet8 --model.norm torch --engine.conv torch --train.steps 10 "
             "--schedule.warmup_steps 5 --run.dir run").split()  # fmt: skip
    done = run_module("fastres", "train", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    summary = parse_json((tmp_path / "run/summary.json").read_text("utf-8"))
    assert parse_json((tmp_path / "run/env.json").read_text("utf-8"))["command"][1:] == [
        "-m",
        "fastres",
        "train",
        *flags,
    ]
    done = run_module("fastres.train", *flags, cwd=tmp_path)
    accuracy = f"{summary['test_accuracy']:.4f}"
    assert done.stdout == (
        f"run is finished: test accuracy {accuracy}; nothing to do (another --run.dir begins a new run)\n"
    )
    (tmp_path / "broken.png").touch()
    assert run_module("fastres", "predict", "run", "broken.png", cwd=tmp_path).returncode == 1


# ---- completion ----------------------------------------------------------------------------------------------

COMPLETE = """\
source "$1"
function=$(complete -p fastres | sed -E 's/.* -F ([^ ]+) .*/\\1/')
shift
COMP_WORDS=("$@")
COMP_CWORD=$(($# - 1))
$function fastres "${@: -1}" "${@: -2:1}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def bash_script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "fastres"
    done = run_module("fastres", "--print-completion", "bash", cwd=path.parent)
    assert (done.returncode, done.stderr) == (0, "")
    path.write_text(done.stdout)
    return path


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("fastres tr", {"train"}),
        ("fastres --ver", {"--version"}),
        ("fastres --print-completion ", {"bash", "zsh", "fish"}),
        ("fastres train --optim.na", {"--optim.name"}),
        ("fastres train --recipe cifar10-s", {"cifar10-speedrun"}),
        ("fastres train --engine.compile ", {"auto", "true", "false"}),
        ("fastres train --train.steps 10 --engine.precision bf", {"bf16"}),
        ("fastres train --config pho", {"photos.yaml", "photos"}),
        ("fastres predict pho", {"photos.yaml", "photos"}),
        ("fastres predict runs/x ph", {"photos.yaml", "photos"}),
        ("fastres export --format torch_e", {"torch_export"}),
        ("fastres profile --trac", {"--trace"}),
    ],
)
def test_bash_completes_commands_flags_words_and_files(
    bash_script: Path, typed: str, offered: set[str], tmp_path: Path
) -> None:
    (tmp_path / "photos.yaml").touch()
    (tmp_path / "photos").mkdir()
    command = ["bash", "--norc", "-c", COMPLETE, "bash", bash_script, *typed.split(" ")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert {word.rstrip("/") for word in done.stdout.split()} == offered
    assert done.stderr == ""


def test_bash_offers_every_flag_of_a_section(bash_script: Path, tmp_path: Path) -> None:
    from fastres.config.schema import FIELDS

    command = ["bash", "--norc", "-c", COMPLETE, "bash", bash_script, "fastres", "train", "--schedule."]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    fields = {f"--{field}" for field in FIELDS if field.startswith("schedule.")}
    assert fields <= {*done.stdout.split()} <= fields | {f"{field}+" for field in fields}


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_of_every_shell_has_all_commands_and_flags(shell: str, tmp_path: Path) -> None:
    done = run_module("fastres", "--print-completion", shell, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    flag = "-l optim.name" if shell == "fish" else "--optim.name"
    assert all(word in done.stdout for word in (*COMMANDS, flag, "cifar10-speedrun"))
