"""Optimizers: parameter groups, a learning rate that lives on the device, and momentum that starts from zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastres.config import OptimConfig
from fastres.engine import find_apex
from fastres.errors import Refused


def sgd(groups: list[dict[str, Any]], lr: Tensor, config: OptimConfig) -> torch.optim.Optimizer:
    """torch's SGD, fused: one kernel for all parameters."""
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=config.momentum, nesterov=config.nesterov, fused=True)
    if config.momentum:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                # Where fp16's first step overflows, the fused kernel skips the update but marks the momentum as
                # begun, in memory that nobody has written. Zeros make the first step the same as without them.
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def apex_sgd(groups: list[dict[str, Any]], lr: Tensor, config: OptimConfig) -> torch.optim.Optimizer:
    """apex's FusedSGD, where a genuine apex is installed. It reads lr on the host at every step."""
    optimizers, reason = find_apex("optimizers")
    if optimizers is None:
        raise Refused(f"optim.name apex_sgd: {reason}; use --optim.name sgd")
    return optimizers.FusedSGD(groups, lr=lr, momentum=config.momentum, nesterov=config.nesterov)


OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], Tensor, OptimConfig], torch.optim.Optimizer]] = {
    "sgd": sgd,
    "apex_sgd": apex_sgd,
}


def build_optimizer(model: nn.Module, config: OptimConfig, lr: Tensor) -> torch.optim.Optimizer:
    """The configured optimizer over the model's parameters.

    lr: () float32 on the model's device; filling it in place changes the learning rate without recompiling.
    """
    scaled = norm_biases(model) if config.norm_bias_lr_scale != 1 else []
    parameters = [p for p in model.parameters() if all(p is not bias for bias in scaled)]
    if config.decay_norm_and_bias:
        groups: list[dict[str, Any]] = [{"params": parameters, "weight_decay": config.weight_decay}]
    else:  # BatchNorm's parameters and all biases are the ones of one dimension
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
        ]
    if scaled:
        scale = config.norm_bias_lr_scale
        # So that a step takes the same share of them as of other parameters.
        decay = config.weight_decay / scale if config.decay_norm_and_bias else 0.0
        groups.append({"params": scaled, "weight_decay": decay, "lr": lr.clone(), "lr_scale": scale})
    return OPTIMIZERS[config.name](groups, lr, config)


def norm_biases(model: nn.Module) -> list[Tensor]:
    """The biases of the model's BatchNorms."""
    norms = (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    return [norm.bias for norm in norms if norm.bias is not None]


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[Tensor, float]:
    """The tensors that the optimizer reads its learning rates from, each with its multiple of the schedule's."""
    return {group["lr"]: group.get("lr_scale", 1.0) for group in optimizer.param_groups}
