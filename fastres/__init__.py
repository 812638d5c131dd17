"""fastres trains residual networks as fast as the hardware allows, and proves it."""

from fastres.utils import run_timer as run_timer  # first: it notes when the process started, before torch  # isort: skip
from fastres.models.registry import build_model

__version__ = "0.1.0"
__all__ = ["__version__", "build_model"]
