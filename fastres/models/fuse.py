"""Fuse any network: compute its BatchNorm2d (+ add) + ReLU by fastres_kernels.BatchNormAct2d."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import nn

from fastres.models.fusion.generated import RootForward, Spec, generated_class
from fastres.models.fusion.modules import FusedNorm, FusedReLU
from fastres.models.fusion.patterns import Analysis, Owner, analyse, is_timm_norm, kind_of
from fastres.models.fusion.writing import specification
from fastres_kernels import BatchNormAct2d, Conv2d
from fastres_kernels.cpu.convolution import has_kernel


@dataclass(frozen=True)
class FusionReport:
    """The result of fastres.fuse for each BatchNorm2d of a network.

    Attributes:
        fused: names of the norms that are computed together with their ReLU.
        left: for the name of every other norm, the reason.
        convolutions: names of the convolutions that have a C++ kernel.
    """

    fused: tuple[str, ...]
    left: dict[str, str]
    convolutions: tuple[str, ...]

    def __str__(self) -> str:
        """Return a line with the numbers, and one for each reason."""
        total = len(self.fused) + len(self.left)
        by_reason: dict[str, list[str]] = {}
        for name, why in self.left.items():
            by_reason.setdefault(why, []).append(name)
        lines = [f"{len(self.fused)} of {total} BatchNorm2d fused"]
        for why, names in by_reason.items():
            more = f" and {len(names) - 2} more" if len(names) > 3 else ""
            lines.append(f"  left alone: {', '.join(names[: 2 if more else 3])}{more} ({why})")
        if self.convolutions:
            lines.append(f"{len(self.convolutions)} Conv2d with a C++ kernel, for fp32 and bf16 on CPUs that have it")
        return "\n".join(lines)


def fuse(model: nn.Module) -> nn.Module:
    """Compute every BatchNorm2d + ReLU, and BatchNorm2d + add + ReLU, of a network in one operation each.

    The operation is fastres_kernels.BatchNormAct2d with the algorithm "measured", which runs torch's own operations
    except for the shapes and devices where a kernel was measured to be faster. Convolutions with a C++ kernel use it
    where engine.conv would: on a CPU that has it. The network computes the same function.
    Its state_dict, parameters, class, methods, hooks, names and train/eval switching stay as they are. Copies, pickles,
    torch.compile, torch.export and DistributedDataParallel work as before. A hook that is registered later on a fused
    norm sees the result after the ReLU, and gradients of gradients exist only where torch's own operations run.

    The forwards are traced by torch.fx, module by module, and only the forward of the modules that contain a pattern is
    replaced. The original forward runs whenever what the trace took for granted does not hold: attributes with other
    values, arguments that are no tensors, a norm or a ReLU that was replaced.

    fusion_report(model) says what was fused, and why the rest was not. unfuse(model) undoes it.

    Args:
        model: any network; it is changed in place. It may be fused already.

    Returns:
        The model.
    """
    found = analyse(model)
    _mark_tails(found)
    unfuse(model)
    for module in model.modules():
        if _has_kernel(module):
            module.__class__ = generated_class(type(module), Spec("conv"))
    owners = [owner for owner in found.owners.values() if any(owner.sites) or owner.takes_sum]
    specs = {owner.module: specification(owner) for owner in owners}
    specs |= {owner.module: Spec("sequential") for owner in found.owners.values() if _connects(owner, specs)}
    _swap_leaves(found)
    for module, spec in specs.items():
        if module is model:
            model.__dict__["forward"] = RootForward(model, spec)
        else:
            module.__class__ = generated_class(type(module), spec)
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Give every module the class and the forward that it had before fastres.fuse. Weights stay as they are.

    Args:
        model: changed in place; a network that is not fused stays as it is.

    Returns:
        The model.
    """
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), RootForward):
            del module.__dict__["forward"]
        if type(module) in (FusedNorm, FusedReLU) or "spec" in vars(type(module)):  # not a class derived from these
            _restore(module)
    return model


def fusion_report(model: nn.Module) -> FusionReport:
    """Return what fastres.fuse did with each BatchNorm2d of the model, or would do if it is not fused yet.

    print(fusion_report(model)) prints a line with the numbers, and one for each reason why norms were left alone.

    Args:
        model: any network; it stays as it is.
    """
    found = analyse(model)
    fusible = set(found.fusible())
    fused, left = [], {}
    for name, module in model.named_modules():
        if name in fusible and isinstance(module, FusedNorm):
            fused.append(name)
        elif name in fusible:
            left[name] = "fastres.fuse was not called"
        elif name in found.reasons:
            left[name] = found.reasons[name]
    convolutions = [name for name, module in model.named_modules() if _has_kernel(module)]
    return FusionReport(tuple(fused), left, tuple(convolutions))


def _has_kernel(module: nn.Module) -> bool:
    """Return True for a convolution that the C++ kernels support, whether it is fused or not."""
    plain = kind_of(module) in (nn.Conv2d, Conv2d) and "forward" not in module.__dict__
    return plain and has_kernel(module)  # type: ignore[arg-type]


def _restore(module: Any) -> None:
    """Give a module its class back."""
    module.__dict__.pop("deferral", None)
    if kind_of(module) is nn.Conv2d:
        module.__dict__.pop("algorithm", None)  # which the engine sets
    if getattr(module, "group_name", "") and kind_of(module) is nn.BatchNorm2d:
        # It shares its statistics between processes, as after convert_sync_batchnorm of a network that is not fused.
        module.__class__, module.act, module.algorithm = BatchNormAct2d, "none", "two_pass"
    else:
        module.__dict__.pop("group_name", None)
        module.__class__ = kind_of(module)


def _connects(owner: Owner, specs: dict[nn.Module, Spec]) -> bool:
    """Return True for a Sequential in which a block's result is the next block's skip connection."""
    children = [specs.get(child, Spec("")) for child in owner.module._modules.values() if child is not None]
    return owner.is_sequential and any(a.takes_fork and b.takes_skip for a, b in pairwise(children))


def _mark_tails(found: Analysis) -> None:
    """Note which modules have to take a sum, because a site calls them in the place of the norm in them."""
    for owner in found.owners.values():
        for sites in owner.sites:
            for site in sites:
                _mark(found, owner, str(site.node.target))


def _mark(found: Analysis, owner: Owner, target: str) -> None:
    name = ".".join(filter(None, (owner.name, target)))
    tail = found.owners.get(name)
    if tail is not None and not tail.takes_sum:
        tail.takes_sum = True
        for node in tail.tail_nodes:
            _mark(found, tail, str(node.target))


def _swap_leaves(found: Analysis) -> None:
    """Give the norms and ReLUs of all patterns their fused classes."""
    norms = dict(found.model.named_modules())
    for name in found.fusible():
        norm = norms[name]
        timms = is_timm_norm(kind_of(norm))
        norm.__class__ = generated_class(kind_of(norm), Spec("norm")) if timms else FusedNorm
    for owner in found.owners.values():
        for sites in owner.sites:
            for site in sites:
                if site.relu_module:
                    owner.module.get_submodule(site.relu_module).__class__ = FusedReLU
