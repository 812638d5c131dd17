"""NVIDIA apex's BatchNorm + ReLU (+ add) for channels-last fp16, as a norm of models/blocks.py.

It has not yet run on a GPU. apex is imported when it is used, because it is built from source and PyPI's package of
that name is another project.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor, nn


def ApexBatchNormAct2d(num_features: int) -> nn.Module:
    """Return a module that computes relu(BatchNorm(x) + residual) with apex.contrib.groupbn.

    It maps (N, C, H, W), channels-last fp16, to the same, and has BatchNorm2d's state_dict.

    Raises:
        ImportError: if apex's groupbn is not installed.
    """
    module: nn.Module = _module_class()(num_features, fuse_relu=True)
    return module


@cache
def _module_class() -> Any:
    """Return the class, whose base class is known only once apex is imported."""
    from apex.contrib.groupbn.batch_norm import BatchNorm2d_NHWC

    class ApexBatchNormAct2d(BatchNorm2d_NHWC):  # type: ignore[misc]  # apex has no annotations
        act = "relu"

        def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
            """Take x and residual as (N, C, H, W) channels-last, which are apex's contiguous (N, H, W, C)."""
            self.fuse_relu = self.act == "relu"
            residual = None if residual is None else residual.permute(0, 2, 3, 1)
            y: Tensor = super().forward(x.permute(0, 2, 3, 1), residual).permute(0, 3, 1, 2)
            return y

    return ApexBatchNormAct2d
