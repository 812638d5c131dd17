"""The modules that networks are built of."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .ops import batch_norm_act, update_running_statistics
from .tables import fastest


class Skip(NamedTuple):
    """An activation on its way over a skip connection; what BatchNormAct2d gives with `fork` and its `residual`
    takes.
    """

    y: Tensor  # (N, C, H, W)
    gradient: (
        Tensor  # takes y's gradient in its stead, so that y's own backward receives it apart: see ops.py
    )


class BatchNormAct2d(nn.BatchNorm2d):
    """act(BatchNorm2d(x) + residual) in one operation, with the parameters and the state_dict of torch.nn.BatchNorm2d.

    (N, C, H, W) channels-last -> (N, C, H, W) channels-last, of x's dtype: bf16, fp16 or fp32 through Triton kernels on
    a GPU, anything through the reference elsewhere. Parameters and statistics are float32. `act`: "relu" or "none";
    `algorithm`: "two_pass" for any size, "cooperative" for what fits on the GPU at once, the other elsewhere, or
    "measured": what tables.py names for the device and the shape, torch's own operations elsewhere. Gradients of
    gradients are refused by a NotImplementedError.
    """

    forks = True  # forward has an argument `fork`

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        act: str = "relu",
        *,
        algorithm: str = "two_pass",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if act not in ("relu", "none"):
            raise ValueError(f"BatchNormAct2d: act should be 'relu' or 'none', not {act!r}")
        if algorithm not in ("two_pass", "cooperative", "measured"):
            raise ValueError(
                f"BatchNormAct2d: algorithm should be 'two_pass', 'cooperative' or 'measured', not {algorithm!r}"
            )
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.act = act
        self.algorithm = algorithm
        self.group_name = ""  # of the processes that share the statistics: see synchronise

    def forward(self, x: Tensor, residual: Tensor | Skip | None = None, fork: bool = False) -> Any:
        """x, residual: (N, C, H, W) of one shape -> the same; with `fork` a tuple of it and, for a skip connection
        around what follows, a Skip of it: handed to another BatchNormAct2d as its residual, it brings its gradient
        into this one's backward apart, which adds the two on its way. ValueError on any other shape, and in training
        on one value per channel.
        """
        algorithm = self.algorithm
        if algorithm == "measured":
            algorithm = fastest(x, residual is not None)
        if algorithm == "torch":
            y = self._unfused(x, residual)
            return (y, Skip(y, y)) if fork else y
        self._check_input_dim(x)
        if x.shape[1] != self.num_features:
            raise ValueError(f"BatchNormAct2d({self.num_features}): the input has {x.shape[1]} channels")
        skip = residual.gradient if isinstance(residual, Skip) else None
        if isinstance(residual, Skip):
            residual = residual.y.detach()
        if residual is not None:
            if residual.shape != x.shape:
                raise ValueError(
                    f"BatchNormAct2d: the residual has shape {tuple(residual.shape)}, the input {tuple(x.shape)}"
                )
            residual = residual.to(x.dtype)
        mean = var = None
        if not self.training and self.running_mean is not None:
            mean, var = self.running_mean, self.running_var
        elif x.numel() == x.shape[1] and not self.group_name:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size {x.shape}"
            )
        group = self.group_name if mean is None else ""
        y, used_mean, used_var, count, _, gradient = batch_norm_act(
            x,
            residual,
            skip,
            self.weight,
            self.bias,
            mean,
            var,
            self.eps,
            self.act == "relu",
            fork,
            group,
            algorithm,
        )
        if self.training and self.track_running_stats:
            values = x.numel() // x.shape[1]
            if group:
                used_var, values = used_var * (count / (count - 1)), 1
            update_running_statistics(
                used_mean,
                used_var,
                self.running_mean,
                self.running_var,
                self.num_batches_tracked,
                values,
                self.momentum,
            )
        return (y, Skip(y, gradient)) if fork else y

    def _unfused(self, x: Tensor, residual: Tensor | Skip | None) -> Tensor:
        """The same through torch, for torch.compile to fuse as it can."""
        y = super().forward(x)
        if residual is not None:
            y += residual.y if isinstance(residual, Skip) else residual
        return F.relu(y, inplace=True) if self.act == "relu" else y

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, act={self.act!r}"


def synchronise(model: nn.Module, group: dist.ProcessGroup | None = None) -> nn.Module:
    """Makes every BatchNormAct2d of the model share its training statistics with the processes of the group (None: all
    of them), forward and backward, as torch.nn.SyncBatchNorm does on GPUs. Returns the model."""
    name = (group or dist.group.WORLD).group_name  # type: ignore[union-attr]
    for module in model.modules():
        if isinstance(module, BatchNormAct2d):
            module.group_name = name
    return model
