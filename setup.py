"""Packages and dependencies of fastres. Build system and tools are configured in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

EXTRAS = {
    "dali": ["nvidia-dali-cuda130>=1.50; sys_platform == 'linux'"],
    "tensorboard": ["tensorboard>=2.16"],
    "wandb": ["wandb>=0.17"],
    "export": ["onnx>=1.17", "onnxscript>=0.3", "onnxruntime>=1.20"],
    "bench": ["nvidia-ml-py>=12.535", "pytest>=8", "pytest-benchmark>=5.2", "scikit-learn>=1.4"],
    "peers": ["airbench>=0.1.8", "timm>=1.0"],
}
EXTRAS["dev"] = sorted(
    {package for name in ("bench", "dali", "export", "tensorboard", "wandb") for package in EXTRAS[name]}
    | {"hypothesis>=6.100", "mypy>=1.15", "pytest-xdist>=3.6", "ruff>=0.11", "types-PyYAML"}
)

VERSION = re.search(
    r'__version__ = "(.+)"', Path(__file__).with_name("fastres").joinpath("utils/version.py").read_text()
)[1]

setup(
    name="fastres",
    version=VERSION,
    description="A PyTorch training engine for residual networks: fused kernels, CUDA graphs, an exact schedule.",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="BSD-3-Clause",
    python_requires=">=3.11",
    # kernels/ is a package of its own that knows nothing of fastres. Its import name is
    # fastres_kernels, because `kernels` on PyPI is somebody else's.
    package_dir={"fastres": "fastres", "fastres_kernels": "kernels"},
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
        "fastres_kernels": ["py.typed"],
        "fastres_kernels.batchnorm": ["fastest.json"],
        "fastres_kernels.cpu": ["kernels.cpp"],
    },
    install_requires=[
        "torch>=2.11",
        "torchvision>=0.26",
        "filelock>=3.12",
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
)
