"""The installations: pip and setuptools install a copy of the checkout into environments of their own."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from fastres.utils.version import __version__
from tests.commands import ROOT, users_environment

# The packages of the environment that runs the tests: pip, setuptools and lazy_loader, but not what its .pth files add.
PACKAGES = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
WHERE = "import fastres, fastres_kernels; print(fastres.__file__, fastres_kernels.__file__)"


def copy_checkout(folder: Path) -> Path:
    """Copy what an installation needs, and return the copy."""
    skipped = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("fastres", "kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=skipped)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def run(python: Path | str, *args: object, cwd: Path, env: Mapping[str, str | None] | None = None) -> str:
    """Run Python and return what it printed."""
    environment = users_environment({"PYTHONPATH": None, "PIP_NO_INDEX": "1", **(env or {})})
    command = [python, *map(str, args)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def editable(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a copy of the checkout, called fastres, and the Python that has it installed in editable mode."""
    folder = tmp_path_factory.mktemp("editable")
    checkout = copy_checkout(folder / "fastres")
    venv.create(folder / "venv", symlinks=True)
    python = next((folder / "venv").glob("*/python"))
    site_packages = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    )
    (site_packages / "zz_tests.pth").write_text("\n".join(PACKAGES) + "\n", encoding="utf-8")
    # --ignore-installed keeps pip away from the installation of the environment that runs the tests.
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--ignore-installed", "--disable-pip-version-check")
    run(python, "-m", "pip", "install", *options, "--editable", checkout, cwd=folder)
    return checkout, python


@pytest.mark.parametrize("where", [".", "fastres", "empty"])
def test_an_editable_installation_is_imported_in_any_folder(
    editable: tuple[Path, Path], where: str, tmp_path: Path
) -> None:
    checkout, python = editable
    folder = tmp_path if where == "empty" else checkout.parent / where  # "." is the one that holds the checkout
    expected = f"{checkout / 'fastres/__init__.py'} {checkout / 'kernels/__init__.py'}\n"
    assert run(python, "-c", WHERE, cwd=folder) == expected
    assert run(python, "-m", "fastres.train", "--version", cwd=folder) == f"fastres {__version__}\n"


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


def test_wheel_and_sdist_have_no_file_of_an_editable_installation(tmp_path: Path) -> None:
    checkout = copy_checkout(tmp_path / "fastres")
    build = "from setuptools import build_meta as b; b.build_wheel('out'); b.build_sdist('out')"
    (checkout / "out").mkdir()
    run(sys.executable, "-c", build, cwd=checkout)
    (wheel,) = (checkout / "out").glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
    assert {name.split("/")[0] for name in names} == {"fastres", "fastres_kernels", f"fastres-{__version__}.dist-info"}
    (sdist,) = (checkout / "out").glob("*.tar.gz")
    with tarfile.open(sdist) as file:
        names += file.getnames()
    assert not [name for name in names if name.endswith(".pth") or "editable" in name]
