"""docs/troubleshooting.md: every example prints its message, and every message of its table is in the code."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.commands import ROOT, run_module
from tests.fixtures import write_image_folder

PAGE = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
EXAMPLE = re.compile(r"^### (.+)\n\n```sh\nfastres (.+)\n```\n\n> `(fastres: error: .+)`$", re.MULTILINE)
ROW = re.compile(r"^\| (`.+?`) \| .+ \|$", re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with what the examples need: a finished run and image folders."""
    folder = tmp_path_factory.mktemp("troubleshooting")
    done = run_module("fastres", *shlex.split("train --recipe digits --train.steps 20"), cwd=folder)
    assert done.returncode == 0, done.stderr
    write_image_folder(folder / "damaged", suffix=".png")
    for path in write_image_folder(folder / "photos").rglob("*.jpg"):
        Image.open(path).resize((80, 60)).save(path)
    image = folder / "damaged/train/cat/00002.png"
    image.write_bytes(image.read_bytes()[:100])
    return folder


def matches(message: str, line: str) -> bool:
    """Return True if the line is the message, in which … stands for any text."""
    return re.fullmatch(".*".join(map(re.escape, message.split("…"))), line) is not None


@pytest.mark.parametrize(("command", "message"), [found[1:] for found in EXAMPLE.findall(PAGE)],
                         ids=[found[0] for found in EXAMPLE.findall(PAGE)])  # fmt: skip
def test_an_example_prints_its_message(command: str, message: str, folder: Path) -> None:
    if "torch sees no GPU" in message and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = run_module("fastres", *shlex.split(command), cwd=folder)
    assert done.returncode == (1 if "non-finite" in message else 2)
    assert matches(message, done.stderr.splitlines()[-1]), done.stderr


def test_every_command_of_the_page_is_an_example_or_prepares_them() -> None:
    fenced = re.findall(r"^```sh\n(.+?)\n```$", PAGE, re.MULTILINE | re.DOTALL)
    assert [f"fastres {command}" for _, command, _ in EXAMPLE.findall(PAGE)] == fenced


def test_every_message_of_the_table_is_in_the_code() -> None:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "fastres").rglob("*.py")]
    nodes = [node for source in sources for node in ast.walk(ast.parse(source))]
    texts = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    named = [message for row in ROW.findall(PAGE) for message in re.findall("`(.+?)`", row)]
    assert named, "the pattern no longer matches any row"
    fragments = [part.strip() for message in named for part in message.split("…") if part.strip()]
    assert [part for part in fragments if not any(part in text for text in texts)] == []
