"""Train ResNet-20 through the reference in a process that cannot import Triton."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any


def hide_triton() -> None:
    """Make Triton appear not to be installed. Call it before anything imports torch."""
    sys.modules["triton"] = None  # type: ignore[assignment]
    find = importlib.util.find_spec

    def find_spec(name: str, *args: Any) -> Any:
        return None if name.startswith("triton") else find(name, *args)

    importlib.util.find_spec = find_spec  # type: ignore[assignment]


def main() -> None:
    assert "torch" not in sys.modules
    hide_triton()
    from fastres_kernels import triton_launch
    from tests.workers.kernels_train import assert_equal_losses, losses

    assert_equal_losses(list(losses("torch")), list(losses("fused")))
    assert not triton_launch.HAS_TRITON and "fastres_kernels.batchnorm.forward" not in sys.modules
    print("equal")


if __name__ == "__main__":
    main()
