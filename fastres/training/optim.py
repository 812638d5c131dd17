"""The optimizers: parameter groups, learning rates on the device, and momentum that starts from zero."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastres.config.schema import OptimConfig
from fastres.training.engine import find_apex
from fastres.utils.errors import UsageError


class SGD(torch.optim.SGD):
    """torch.optim.SGD without the wrappers that import torch._dynamo, which takes a second.

    torch wraps these methods so that torch.compile does not trace them. fastres does not compile the optimizer's step.
    """

    add_param_group = inspect.unwrap(torch.optim.SGD.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.SGD.zero_grad)
    state_dict = inspect.unwrap(torch.optim.SGD.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.SGD.load_state_dict)
    step = torch.no_grad()(inspect.unwrap(torch.optim.SGD.step))


def sgd(groups: list[dict[str, Any]], lr: Tensor, config: OptimConfig) -> torch.optim.Optimizer:
    """Return torch's fused SGD: one kernel for all parameters."""
    optimizer = SGD(groups, lr=lr, momentum=config.momentum, nesterov=config.nesterov, fused=True)
    return _from_zero_momentum(optimizer)


def _from_zero_momentum(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimizer with momentum buffers of zeros, which leave the first step as it is.

    If fp16's first step overflows, the fused kernel skips the update but marks the momentum as initialised, in memory
    that nothing has written.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if group["momentum"] or "muon_momentum" in group:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


class Muon(SGD):
    """The fused SGD of torch, with the orthogonalised momentum as gradient in groups with `muon_momentum`.

    It keeps each weight's norm at the square root of its number of filters (Jordan et al. 2024, "Muon: An optimizer for
    hidden layers in neural networks", as in cifar10-airbench), so the learning rate alone sets the length of a step.
    The parameters of such a group are weights of convolutions, (K, C, kh, kw), without weight decay. torch.optim.Muon
    is not used because it takes only matrices and reads its learning rate on the host.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Run one step, like torch.optim.SGD.step."""
        for group in self.param_groups:
            for weight in group["params"] if "muon_momentum" in group else ():
                momentum, buffer = group["muon_momentum"], self.state[weight]["momentum_buffer"]
                buffer.mul_(momentum).add_(weight.grad)
                weight.grad.copy_(orthogonal(weight.grad.add(buffer, alpha=momentum)))  # Nesterov's momentum
                weight.mul_(len(weight) ** 0.5 / weight.norm())
        return super().step(closure)


def orthogonal(filters: Tensor) -> Tensor:
    """Return (K, C, kh, kw) filters, seen as a matrix of K rows, with singular values near 1.

    Values of at least 2 % of the matrix's norm become 0.68 to 1.21. The method is three steps of the Newton-Schulz
    iteration with the coefficients of Jordan et al. (2024), in bf16, which is precise enough, or in float64 for float64
    weights.
    """
    rows = filters.permute(0, 2, 3, 1)  # a view of channels-last memory; the order of the columns does not matter
    matrix = rows.flatten(1)
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix).to(torch.float64 if filters.dtype == torch.float64 else torch.bfloat16)
    x = x / x.norm().clamp_min(1e-12)  # all-zero momentum stays zero instead of becoming NaN
    for _ in range(3):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    y: Tensor = (x.T if tall else x).unflatten(1, rows.shape[1:])
    return y.permute(0, 3, 1, 2)


def muon(groups: list[dict[str, Any]], lr: Tensor, config: OptimConfig) -> torch.optim.Optimizer:
    """Return Muon for the weights of convolutions and torch's fused SGD for the rest."""
    rest = [{**group, "params": [p for p in group["params"] if p.ndim != 4]} for group in groups]
    filters = {
        "params": [p for group in groups for p in group["params"] if p.ndim == 4],
        "lr": lr.clone(),
        "lr_scale": config.muon_lr / config.lr,
        "muon_momentum": config.muon_momentum,
        **{"momentum": 0.0, "nesterov": False, "weight_decay": 0.0},  # the SGD that applies the step
    }
    optimizer = Muon([*rest, filters], lr=lr, momentum=config.momentum, nesterov=config.nesterov, fused=True)
    return _from_zero_momentum(optimizer)


def apex_sgd(groups: list[dict[str, Any]], lr: Tensor, config: OptimConfig) -> torch.optim.Optimizer:
    """Return apex's FusedSGD, which reads lr on the host at every step. Raise UsageError without a genuine apex."""
    optimizers, reason = find_apex("optimizers")
    if optimizers is None:
        raise UsageError(f"optim.name apex_sgd: {reason}; use --optim.name sgd")
    optimizer: torch.optim.Optimizer = optimizers.FusedSGD(
        groups, lr=lr, momentum=config.momentum, nesterov=config.nesterov
    )
    return optimizer


OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], Tensor, OptimConfig], torch.optim.Optimizer]] = {
    "sgd": sgd,
    "muon": muon,
    "apex_sgd": apex_sgd,
}


def build_optimizer(model: nn.Module, config: OptimConfig, lr: Tensor) -> torch.optim.Optimizer:
    """Return the configured optimizer over the model's parameters that are not frozen.

    Args:
        model: the network, on its device.
        config: the optimizer's fields.
        lr: () float32 on the model's device; filling it in place changes the learning rate without recompiling.

    Raises:
        UsageError: if optim.name is apex_sgd and apex is unavailable.
    """
    scaled = norm_biases(model) if config.norm_bias_lr_scale != 1 else []
    trained = [p for p in model.parameters() if p.requires_grad]
    parameters = [p for p in trained if all(p is not bias for bias in scaled)]
    if config.decay_norm_and_bias:
        groups: list[dict[str, Any]] = [{"params": parameters, "weight_decay": config.weight_decay}]
    else:  # BatchNorm's parameters and all biases have one dimension
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
        ]
    if scaled:
        scale = config.norm_bias_lr_scale
        # Dividing the decay keeps the decay per step the same as for other parameters.
        decay = config.weight_decay / scale if config.decay_norm_and_bias else 0.0
        groups.append({"params": scaled, "weight_decay": decay, "lr": lr.clone(), "lr_scale": scale})
    return OPTIMIZERS[config.name](groups, lr, config)


def norm_biases(model: nn.Module) -> list[Tensor]:
    """Return the biases of the model's BatchNorms that are not frozen."""
    norms = (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    return [norm.bias for norm in norms if norm.bias is not None and norm.bias.requires_grad]


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[Tensor, float]:
    """Return the tensors that hold the optimizer's learning rates, each with its multiple of the schedule's rate."""
    return {group["lr"]: group.get("lr_scale", 1.0) for group in optimizer.param_groups}
