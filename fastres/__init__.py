"""fastres trains residual networks as fast as the hardware allows, and proves it."""

from fastres.models import build_model
from fastres.utils import (
    run_timer as clock,  # first: it notes when the process started, before torch is imported
)

__version__ = "0.1.0"
__all__ = ["__version__", "build_model"]
