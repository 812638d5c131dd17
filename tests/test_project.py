"""The files around the code agree with one another: the version, the supported Pythons, the oldest torch, the image."""

from __future__ import annotations

import re
import tomllib
from typing import Any

import pytest
import yaml

from fastres.utils.version import __version__
from tests.commands import ROOT
from tests.test_install import INSTALLED_FROM

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
PYTHONS = [match[1] for text in PROJECT["classifiers"] if (match := re.fullmatch(r".* Python :: (3\.\d+)", text))]


def read_yaml(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text("utf-8"))


def test_changelog_and_citation_have_the_version_of_the_code() -> None:
    heading = re.search(r"^## (\S+), ", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert heading is not None and heading[1] == __version__
    assert read_yaml("CITATION.cff")["version"] == __version__


def test_the_citation_and_the_metadata_agree() -> None:
    citation = read_yaml("CITATION.cff")
    assert citation["title"] == PROJECT["name"]
    assert citation["license"] == PROJECT["license"]
    assert citation["authors"] == PROJECT["authors"]


def test_ci_runs_every_supported_python_with_the_oldest_and_the_newest_torch() -> None:
    job = read_yaml(".github/workflows/ci.yml")["jobs"]["ci"]
    assert job["strategy"]["matrix"] == {"python": PYTHONS, "torch": ["oldest", "newest"]}
    assert PROJECT["requires-python"] == f">={PYTHONS[0]}"
    *_, constrain, run = job["steps"]
    assert constrain["if"] == "matrix.torch == 'oldest'" and "PIP_CONSTRAINT=$PWD/.ci/oldest.txt" in constrain["run"]
    assert run == {"run": ".ci/run"}


def test_the_oldest_torch_of_ci_is_the_oldest_that_is_permitted() -> None:
    lines = (ROOT / ".ci/oldest.txt").read_text("utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line)
    required = dict(line.split(">=") for line in PROJECT["dependencies"])
    assert pinned == {name: f"{required[name]}.*" for name in ("torch", "torchvision")}


def test_the_image_has_what_an_installation_needs_and_runs_the_program_without_privileges() -> None:
    lines = (ROOT / "Dockerfile").read_text("utf-8").splitlines()
    copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert sorted(copied) == sorted(INSTALLED_FROM)
    sent = [line[1:] for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line.startswith("!")]
    assert sorted(sent) == sorted(INSTALLED_FROM)
    assert 'ENTRYPOINT ["fastres"]' in lines and "USER 1000" in lines
    assert next(line for line in lines if line.startswith("FROM ")) == f"FROM python:{PYTHONS[-1]}-slim"


@pytest.mark.parametrize("form", ["bug", "proposal"])
def test_an_issue_form_has_a_name_a_description_and_distinct_fields(form: str) -> None:
    content = read_yaml(f".github/ISSUE_TEMPLATE/{form}.yml")
    assert content["name"] and content["description"]
    fields = [field for field in content["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields) > 0
    assert all(field["attributes"]["label"] for field in fields)
