"""The installations: pip and setuptools install a copy of the checkout into environments of their own.

The environments see the packages of the one that runs the tests, so they need no network.
"""

from __future__ import annotations

import email
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from PIL import Image

from fastres.utils.version import __version__
from tests.commands import ROOT, users_environment

# The packages of the environment that runs the tests: pip, setuptools and lazy_loader, but not what its .pth files add.
PACKAGES = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
INSTALLED_FROM = ("fastres", "kernels", "setup.py", "pyproject.toml", "README.md", "LICENSE")
WHERE = "import fastres, fastres_kernels; print(fastres.__file__, fastres_kernels.__file__)"
BUILD = "import sys; from setuptools import build_meta; build_meta.build_{}(sys.argv[1])"


def copy_checkout(folder: Path) -> Path:
    """Copy what an installation needs, and return the copy."""
    skipped = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in INSTALLED_FROM:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=skipped)
        else:
            shutil.copy(ROOT / name, folder)
    return folder


def run(python: Path | str, *args: object, cwd: Path, env: Mapping[str, str | None] | None = None) -> str:
    """Run Python and return what it printed."""
    environment = users_environment({"PYTHONPATH": None, "PIP_NO_INDEX": "1", **(env or {})})
    command = [python, *map(str, args)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def new_environment(folder: Path) -> Path:
    """Create an environment that sees PACKAGES, and return its Python."""
    venv.create(folder / "venv", symlinks=True)
    python = next((folder / "venv").glob("*/python"))
    site_packages = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    )
    (site_packages / "zz_tests.pth").write_text("\n".join(PACKAGES) + "\n", encoding="utf-8")
    return python


def install(python: Path, *what: object, cwd: Path) -> None:
    """Install with pip; --ignore-installed keeps it away from the environment that runs the tests."""
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--ignore-installed", "--disable-pip-version-check")
    run(python, "-m", "pip", "install", *options, *what, cwd=cwd)


@pytest.fixture(scope="module")
def editable(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a copy of the checkout, called fastres, and the Python that has it installed in editable mode."""
    folder = tmp_path_factory.mktemp("editable")
    checkout = copy_checkout(folder / "fastres")
    python = new_environment(folder)
    install(python, "--editable", checkout, cwd=folder)
    return checkout, python


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the sdist of the checkout, and with the wheel made from that sdist."""
    folder = tmp_path_factory.mktemp("built")
    checkout = copy_checkout(folder / "fastres")
    run(sys.executable, "-c", BUILD.format("sdist"), folder, cwd=checkout)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as file:
        file.extractall(folder, filter="data")
    run(sys.executable, "-c", BUILD.format("wheel"), folder, cwd=folder / f"fastres-{__version__}")
    return folder


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the programs of an environment that has the wheel installed."""
    folder = tmp_path_factory.mktemp("installed")
    python = new_environment(folder)
    (wheel,) = built.glob("*.whl")
    install(python, wheel, cwd=folder)
    return python.parent


@pytest.mark.parametrize("where", [".", "fastres", "empty"])
def test_an_editable_installation_is_imported_in_any_folder(
    editable: tuple[Path, Path], where: str, tmp_path: Path
) -> None:
    checkout, python = editable
    folder = tmp_path if where == "empty" else checkout.parent / where  # "." is the one that holds the checkout
    expected = f"{checkout / 'fastres/__init__.py'} {checkout / 'kernels/__init__.py'}\n"
    assert run(python, "-c", WHERE, cwd=folder) == expected
    assert run(python, "-m", "fastres.train", "--version", cwd=folder) == f"fastres {__version__}\n"
    assert run(python.with_name("fastres"), "--version", cwd=folder) == f"fastres {__version__}\n"


def test_a_package_on_pythonpath_precedes_an_editable_installation(editable: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "fastres").mkdir()
    (tmp_path / "fastres/__init__.py").write_text("")
    env = {"PYTHONPATH": str(tmp_path)}
    printed = run(editable[1], "-c", "import fastres; print(fastres.__file__)", cwd=editable[0].parent, env=env)
    assert printed == f"{tmp_path / 'fastres/__init__.py'}\n"


def test_a_process_that_inherits_sys_path_imports_an_editable_installation(editable: tuple[Path, Path]) -> None:
    checkout, python = editable
    inherited = run(python, "-c", "import os, sys; print(os.pathsep.join(sys.path[1:]))", cwd=checkout.parent).strip()
    printed = run(python, "-c", WHERE, cwd=checkout.parent, env={"PYTHONPATH": inherited})
    assert printed.startswith(f"{checkout / 'fastres/__init__.py'} ")


def test_wheel_and_sdist_have_no_file_of_an_editable_installation(built: Path) -> None:
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
    assert {name.split("/")[0] for name in names} == {"fastres", "fastres_kernels", f"fastres-{__version__}.dist-info"}
    with tarfile.open(sdist) as file:
        names += file.getnames()
    assert not [name for name in names if name.endswith(".pth") or "editable" in name]


def test_a_wheel_has_every_file_of_the_packages(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name}
    expected = {
        path.relative_to(ROOT).as_posix().replace("kernels/", "fastres_kernels/", folder == "kernels")
        for folder in ("fastres", "kernels")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert names == expected


def test_the_metadata_has_version_licence_readme_and_requirements(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        folder = f"fastres-{__version__}.dist-info"
        said = email.message_from_string(file.read(f"{folder}/METADATA").decode())
        programs = file.read(f"{folder}/entry_points.txt").decode()
        assert f"{folder}/licenses/LICENSE" in file.namelist()
    assert said["Version"] == __version__
    assert said["License-Expression"] == "BSD-3-Clause"
    assert said["Author"] == "The fastres contributors"
    assert said.get_payload() == (ROOT / "README.md").read_text("utf-8")
    assert "torch>=2.11" in said.get_all("Requires-Dist", [])
    assert {"dali", "dev", "export", "timm"} <= {*said.get_all("Provides-Extra", [])}
    assert programs.split() == ["[console_scripts]", "fastres", "=", "fastres.__main__:run"]


def test_the_installed_program_names_itself_in_help_and_errors(installed: Path, tmp_path: Path) -> None:
    assert run(installed / "fastres", "--version", cwd=tmp_path) == f"fastres {__version__}\n"
    assert run(installed / "fastres", "--help", cwd=tmp_path).startswith("usage: fastres COMMAND ")
    assert run(installed / "fastres", "plot", "--help", cwd=tmp_path).startswith("usage: fastres plot ")
    done = subprocess.run([installed / "fastres", "trian"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("fastres: error: unknown command 'trian'; did you mean 'train'? ")


def test_an_extra_is_installed_without_the_checkout_as_the_error_messages_say(installed: Path, tmp_path: Path) -> None:
    command = ("-m", "pip", "install", "--dry-run", "--no-index", "--disable-pip-version-check", "fastres[tensorboard]")
    printed = run(installed / "python", *command, cwd=tmp_path)
    assert "already satisfied: tensorboard>=" in printed and "Would install" not in printed


@pytest.mark.slow
def test_the_installed_program_trains_predicts_and_checks_the_machine(installed: Path, tmp_path: Path) -> None:
    fastres = installed / "fastres"
    assert "can train here" in run(fastres, "doctor", cwd=tmp_path)
    # The worker processes of a DataLoader import the main module again, which is the program here.
    flags = "--recipe digits --train.steps 50 --data.loader dataloader --data.workers 1 --engine.compile false"
    run(fastres, "train", *flags.split(), cwd=tmp_path)
    Image.new("L", (8, 8)).save(tmp_path / "digit.png")
    printed = run(fastres, "predict", "runs/digits", "digit.png", cwd=tmp_path)
    assert re.fullmatch(r"file,class,probability\ndigit.png,\d,\d\.\d{6}\n", printed)
