"""Freeze parts of a network: their parameters are not trained, and their BatchNorm runs in eval mode.

A BatchNorm counts as frozen if none of its parameters is trained. So nothing has to be remembered beside
`requires_grad`, which DistributedDataParallel, the optimizer and autograd go by too.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from fastres.utils.suggest import nearest, unknown

BACKBONE = "backbone"  # everything but the head


def freeze(model: nn.Module, parts: str | Sequence[str]) -> None:
    """Exclude parts of a network from training.

    Args:
        model: changed in place.
        parts: names of modules, such as "layer1" or "layer1.0.bn1", which stand for all that is in them; or "backbone"
            for everything but the head.

    Raises:
        ValueError: if there is no such module, or nothing would be left to train; the message is one line.
    """
    names = [parts] if isinstance(parts, str) else list(parts)
    modules = {name: module for name, module in model.named_modules() if name}
    for name in names:
        if name not in modules and name != BACKBONE:
            children = [child for child, _ in model.named_children()]
            near = next((known for known in modules if known.lower() == name.lower()), None)
            raise unknown("module", name, [BACKBONE, *children], near or nearest(name, modules))
    head = head_of(model) if BACKBONE in names else ""
    for name, parameter in model.named_parameters():
        if any(not name.startswith(f"{head}.") if part == BACKBONE else name.startswith(f"{part}.") for part in names):
            parameter.requires_grad = False
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"{', '.join(names)} leaves nothing to train; freeze less")
    if model.training:
        training_mode(model)


def head_of(model: nn.Module) -> str:
    """Return the name of the layer that makes the logits, the last fully connected one: fc in fastres's own networks.

    Raises:
        ValueError: if the network has none.
    """
    names: list[str] = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not names:
        raise ValueError("the network has no fully connected layer, so its head is not known")
    return names[-1]


def training_mode(model: nn.Module) -> None:
    """Put the model into training mode, but its frozen BatchNorms into eval mode, so that their statistics stay."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and _is_frozen(module):
            module.eval()


def _is_frozen(norm: nn.Module) -> bool:
    """Return True if the norm has parameters, and none of them is trained."""
    trained = [parameter.requires_grad for parameter in norm.parameters(recurse=False)]
    return bool(trained) and not any(trained)
