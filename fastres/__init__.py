"""fastres trains residual networks as fast as the hardware allows, and proves it."""

from fastres import clock as clock  # first: it notes when the process started, before torch is imported
from fastres.models import build_model

__version__ = "0.1.0"
__all__ = ["__version__", "build_model"]
