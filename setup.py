"""The packages of fastres and its editable installation. pyproject.toml has everything else."""

from pathlib import Path

from setuptools import find_packages, setup

try:
    from setuptools.command.editable_wheel import editable_wheel
except ImportError:  # a later setuptools, without this internal command
    editable_wheel = object

# kernels/ is a package of its own that knows nothing of fastres. Its import name is
# fastres_kernels, because `kernels` on PyPI is somebody else's.
PACKAGE_DIR = {"fastres": "fastres", "fastres_kernels": "kernels"}

# Python looks through sys.path before it asks the finder that setuptools installs for an editable installation. In the
# folder that holds the checkout `fastres/`, it would find the checkout as a package without an __init__.py. This module
# puts an entry for the packages on sys.path, where any package with an __init__.py has priority over one without.
EDITABLE_PATH = """\
\"\"\"Put the packages of an editable installation on sys.path. A .pth file imports this module.\"\"\"

import os
import sys
from importlib.util import spec_from_file_location

PACKAGES = {packages}


class Finder:
    @staticmethod
    def find_spec(name, target=None):
        init = os.path.join(PACKAGES[name], "__init__.py") if name in PACKAGES else ""
        return spec_from_file_location(name, init) if os.path.isfile(init) else None


def find_entry(entry):
    if entry != __file__:
        raise ImportError(entry)
    return Finder


sys.path_hooks.append(find_entry)
sys.path_importer_cache.pop(__file__, None)  # PYTHONPATH may have had the entry before the hook existed
if __file__ not in sys.path:
    sys.path.append(__file__)
"""


class EditableWheel(editable_wheel):
    """Add EDITABLE_PATH to the wheel of an editable installation.

    The method that is extended is internal to setuptools. If a later setuptools does not call it, or not with the
    unpacked wheel, setuptools' own files remain, and they work outside that one folder.
    """

    def _run_build_commands(self, *args, **options):
        outputs = super()._run_build_commands(*args, **options)
        wheel = Path(args[1]) if len(args) > 1 else None
        if wheel and any(wheel.glob("fastres-*.dist-info")):
            packages = {package: str(Path(folder).resolve()) for package, folder in PACKAGE_DIR.items()}
            module = EDITABLE_PATH.format(packages=ascii(packages))
            # Not _fastres_editable: griffe, which reads docstrings for the site, fails for modules of such a name,
            # because it takes them for scikit-build-core's.
            (wheel / "_fastres_path.py").write_text(module, encoding="ascii")
            (wheel / "_fastres_path.pth").write_text("import _fastres_path\n", encoding="ascii")
        return outputs


setup(
    package_dir=PACKAGE_DIR,
    packages=[
        *find_packages(include=["fastres", "fastres.*"]),
        "fastres_kernels",
        *(f"fastres_kernels.{name}" for name in find_packages("kernels")),
    ],
    cmdclass={} if editable_wheel is object else {"editable_wheel": EditableWheel},
)
