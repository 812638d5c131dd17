"""Packages and dependencies of fastres. Build system and tools are configured in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

try:
    from setuptools.command.editable_wheel import editable_wheel
except ImportError:  # a later setuptools, without this internal command
    editable_wheel = object

EXTRAS = {
    "dali": ["nvidia-dali-cuda130>=1.50; sys_platform == 'linux'"],
    "tensorboard": ["tensorboard>=2.16"],
    "wandb": ["wandb>=0.17"],
    "trackio": ["trackio>=0.43"],
    "mlflow": ["mlflow-skinny>=3.17"],
    "timm": ["timm>=1.0"],
    "export": ["onnx>=1.17", "onnxscript>=0.3", "onnxruntime>=1.20"],
    "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.8", "mkdocstrings[python]>=1.0", "ruff>=0.11"],
    "bench": ["nvidia-ml-py>=12.535", "pytest>=8", "pytest-benchmark>=5.2", "scikit-learn>=1.4"],
    "peers": ["airbench>=0.1.8", "timm>=1.0"],
}
EXTRAS["dev"] = sorted(
    {
        package
        for name in ("bench", "dali", "docs", "export", "mlflow", "tensorboard", "timm", "wandb")
        for package in EXTRAS[name]
    }
    | {
        "hypothesis>=6.100",
        "ipykernel>=6",
        "mypy>=1.15",
        "nbclient>=0.10",
        "pytest-xdist>=3.6",
        "ruff>=0.11",
        "types-PyYAML",
    }
)

VERSION = re.search(
    r'__version__ = "(.+)"', Path(__file__).with_name("fastres").joinpath("utils/version.py").read_text()
)[1]

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
    name="fastres",
    version=VERSION,
    description="A PyTorch training engine for residual networks: fused kernels, CUDA graphs, an exact schedule.",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="BSD-3-Clause",
    python_requires=">=3.11",
    package_dir=PACKAGE_DIR,
    packages=[
        *find_packages(include=["fastres", "fastres.*"]),
        "fastres_kernels",
        *(f"fastres_kernels.{name}" for name in find_packages("kernels")),
    ],
    package_data={
        "": ["*.pyi"],
        "fastres": ["py.typed"],
        "fastres.config.recipes": ["*.yaml"],
        "fastres.data.sources": ["digits.npz"],
        "fastres.runs.pictures": ["report.html"],
        "fastres_kernels": ["py.typed"],
        "fastres_kernels.batchnorm": ["fastest.json"],
        "fastres_kernels.cpu": ["*.cpp", "*.h", "fastest.json"],
    },
    install_requires=[
        "torch>=2.11",
        "torchvision>=0.26",
        "filelock>=3.12",
        "jinja2>=3.1",
        "jsonargparse[signatures]>=4.40",
        "lazy_loader>=0.4",
        "matplotlib>=3.8",
        "numpy>=1.26",
        "pillow>=10",
        "pyyaml>=6",
        "rich>=13",
        "safetensors>=0.4.5",
        "scipy>=1.11",
    ],
    extras_require=EXTRAS,
    cmdclass={} if editable_wheel is object else {"editable_wheel": EditableWheel},
)
