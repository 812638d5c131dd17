"""Check that activations and gradients keep the channels-last order."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastres.models.freeze import training_mode
from fastres.training.engine import Engine
from fastres.training.step import Batch, ForwardLoss, preserving


def check_channels_last(model: nn.Module, engine: Engine, batch: Batch) -> None:
    """Check one eager forward and backward in the engine's precision. The model's state stays as it is.

    Raises:
        AssertionError: if an activation or gradient is not channels-last; it names the first such convolution or norm.
    """
    wrong: list[str] = []

    def check(what: str, tensor: Tensor) -> None:
        if not tensor.is_contiguous(memory_format=torch.channels_last):
            wrong.append(f"{what} has strides {tuple(tensor.stride())} for shape {tuple(tensor.shape)}")

    def checks(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], out: Any) -> None:
            # Check the input too, because a convolution with channels-last weights returns channels-last for any input.
            for what, tensor in (("input", inputs[0]), ("output", out)):
                # Norms that fork and convolutions that normalise return tuples with the tensor first.
                tensor = tensor[0] if isinstance(tensor, tuple) else tensor
                check(f"the {what} of {name}", tensor)
                if tensor.requires_grad:
                    tensor.register_hook(partial(check, f"the gradient of the {what} of {name}"))

        return hook

    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]
    handles = [module.register_forward_hook(checks(name)) for name, module in layers]
    try:
        with preserving(model.buffers()):
            training_mode(model)
            forward_loss = ForwardLoss(model, engine)
            forward_loss.run_eagerly()
            loss, _ = forward_loss(batch[0][:2], batch[1][:2])
            # Not backward(), because DDP's hooks would count it as the first step and never average a gradient again.
            torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    if wrong:
        raise AssertionError(wrong[0])
