"""The eager oracle: plain PyTorch, any dtype up to float64, forward and (through autograd) backward."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def batch_norm_act(norm: nn.BatchNorm2d, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """relu(norm(x) + residual). x, residual: (N, C, H, W), any strides; the result has x's dtype and strides."""
    y = norm(x)
    return F.relu(y if residual is None else y + residual)
