"""The commit in env.json: that of the checkout, and of no other repository."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from fastres.runs.environment import commit
from tests.commands import ROOT, run_python

SHOW = "from fastres.runs import environment; print(environment.commit())"


def git(folder: Path, *arguments: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    done = subprocess.run(["git", *who, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def repository(folder: Path) -> Path:
    folder.mkdir()
    git(folder, "init", "-q")
    (folder / "file").write_text("1")
    git(folder, "add", "file")
    git(folder, "commit", "-q", "-m", "first")
    return folder


def copy_package(folder: Path) -> None:
    """Copy fastres into the folder as an installation does."""
    for name in ("fastres", "kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "kernels").rename(folder / "fastres_kernels")


def commit_of(folder: Path) -> str:
    """Return what the package in `folder` says in a new Python, or its error."""
    done = run_python("-c", SHOW, cwd=folder)
    return done.stdout.strip() or done.stderr


@pytest.mark.parametrize("place", [".venv/lib/python3/site-packages", "."])
def test_a_package_inside_another_repository_has_no_commit(tmp_path: Path, place: str) -> None:
    """The second place is the repository's root, but the repository does not track the package."""
    repository(tmp_path / "other")
    folder = tmp_path / "other" / place
    folder.mkdir(parents=True, exist_ok=True)
    copy_package(folder)
    assert commit_of(folder) == "None"


def test_a_package_tracked_in_a_folder_of_another_repository_has_no_commit(tmp_path: Path) -> None:
    other = repository(tmp_path / "other")
    (other / "vendor").mkdir()
    copy_package(other / "vendor")
    git(other, "add", "vendor")
    git(other, "commit", "-q", "-m", "vendor")
    assert commit_of(other / "vendor") == "None"


def test_a_checkout_has_its_own_commit_whatever_repository_the_environment_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout, other = repository(tmp_path / "checkout"), repository(tmp_path / "other")
    copy_package(checkout)
    git(checkout, "add", ".")
    git(checkout, "commit", "-q", "-m", "fastres")
    head = git(checkout, "rev-parse", "--short=12", "HEAD")
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    assert commit_of(checkout) == head
    (checkout / "file").write_text("2")
    assert commit_of(checkout) == f"{head}-dirty"


def test_without_git_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit() is None
