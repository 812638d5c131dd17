"""Modules that take the place of BatchNorm2d, ReLU, Conv2d and Sequential in a network that fastres.fuse has changed.

A module takes its place by `module.__class__ = …`, so the object stays: parameters, buffers, hooks, names and
references. Called as before, each module computes what it computed before, so code that fastres.fuse has not seen, such
as a method `forward_features`, stays right. Only a forward that fastres.fuse has written calls them with the arguments
`fused_add`, `fused_relu`, `fused_fork` and `fused_skip`:

    norm(x, fused_add=residual, fused_relu=True)    relu(BatchNorm(x) + residual)
    norm(x, fused_relu=True, fused_fork=True)       the result y, and None or a Skip: y for a skip connection
    relu(x, fused_relu=True)                        x, which is rectified already; hooks run as usual
    block(x, fused_skip=skip)                       block(x), whose skip connection takes its input from `skip`

The gradient of a Skip arrives separately, and the norm that made it adds the two gradients in a pass that it makes
anyway. Only FusedSequential asks for one, and hands it to the next module, so nothing else sees the partial gradient.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules import module as torch_module

from fastres_kernels import BatchNormAct2d, Conv2d, Skip
from fastres_kernels.cpu.batchnorm import DTYPES

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
GLOBAL_HOOKS = (
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)


def rectified_sum(y: Any, fused_add: Any, fused_relu: bool) -> Any:
    """Return relu(y + fused_add), without the parts that are None or False, in torch's own operations."""
    if fused_add is not None:
        y = y + (fused_add.y if isinstance(fused_add, Skip) else fused_add)
    return F.relu(y) if fused_relu else y


def same(value: Any, constant: Any) -> bool:
    """Return True if an attribute still has the value of a trace, also in its type. It may be a tensor by now."""
    return type(value) is type(constant) and bool(value == constant)


def has_hooks(module: nn.Module, kinds: tuple[str, ...] = HOOKS) -> bool:
    """Return True if the module has hooks of these kinds."""
    return any(getattr(module, kind, None) for kind in kinds)


def hooked(*modules: nn.Module | None) -> bool:
    """Return True if one of the modules, or every module, has hooks, or if one of them is None."""
    return any(GLOBAL_HOOKS) or any(module is None or has_hooks(module) for module in modules)


def _is_traced(x: object) -> bool:
    """Return True if torch.fx traces the call."""
    return isinstance(x, Proxy)


def _as_leaf(module: nn.Module, x: Any) -> Any:
    """Return the result of a call of `module` that torch.fx records as one node, as for the modules of torch.nn."""
    return x.tracer.create_proxy("call_module", x.tracer.path_of_module(module), (x,), {})


class FusedNorm(BatchNormAct2d):
    """BatchNorm2d that can add a residual and apply ReLU in the same operation; without arguments, BatchNorm2d."""

    original: type[nn.Module] = nn.BatchNorm2d  # the class before fastres.fuse
    takes_sum = True  # forward has the arguments fused_add and fused_relu
    forks = False
    algorithm = "measured"  # so that it runs torch's own operations unless a kernel was measured to be faster
    group_name = ""

    def forward(self, x: Tensor, fused_add: Any = None, fused_relu: bool = False, fused_fork: bool = False) -> Any:
        """Return relu(BatchNorm(x) + fused_add), of x's shape (N, C, H, W), without the parts that are None or False.

        Args:
            x: (N, C, H, W).
            fused_add: what the network adds, usually a tensor like x or a Skip; None for no addition.
            fused_relu: apply ReLU.
            fused_fork: also return a Skip of the result, or None if torch's own operations compute the result.
        """
        added = fused_add.y if isinstance(fused_add, Skip) else fused_add
        if _is_traced(x):
            y = rectified_sum(_as_leaf(self, x), fused_add, fused_relu)
        elif self._needs_torch(x, fused_relu):
            y = nn.BatchNorm2d.forward(self, x)
            if added is not None:  # in place, because normalisation's backward reads its input and not its output
                y = y.add_(added) if _like(added, x) else y + added
            y = F.relu(y, inplace=True) if fused_relu else y
        elif added is None or _like(added, x):
            return self._normalise(x, fused_add, fused_fork, fused_relu)
        else:  # broadcast, or of another dtype
            y = rectified_sum(self._normalise(x, None, False, False), added, fused_relu)
        return (y, None) if fused_fork else y

    def _needs_torch(self, x: Tensor, fused_relu: bool) -> bool:
        """Return True if only torch's own operations can compute the result, which saves looking for kernels."""
        if self.group_name or self.algorithm != "measured":
            return False
        # A stride says in less time than is_contiguous that x is not channels-last, which training in C++ needs.
        kernels = x.device.type != "cpu" or (x.dtype in DTYPES and (not self.training or x.stride()[1:2] == (1,)))
        return not fused_relu or not (kernels or (self.training and self.deferral is not None))

    def extra_repr(self) -> str:
        """Return torch's description of the module."""
        return str(nn.BatchNorm2d.extra_repr(self))


def _like(residual: Any, x: Tensor) -> bool:
    """Return True if the residual is a tensor of x's shape, dtype and device."""
    same_kind = isinstance(residual, Tensor) and residual.dtype == x.dtype and residual.device == x.device
    return same_kind and residual.shape == x.shape


class FusedNormAct(FusedNorm):
    """FusedNorm in the place of timm's BatchNormAct2d, which has the modules `drop` and `act` of its own.

    fastres.fuse makes a class of this one and timm's. If `act` is a ReLU, every call applies it in the same operation.
    If `drop` or `act` is replaced later, timm's own forward runs.
    """

    def forward(self, x: Tensor, fused_add: Any = None, fused_relu: bool = False, fused_fork: bool = False) -> Any:
        """Return relu(act(BatchNorm(x)) + fused_add), without the parts that are None or False."""
        drop, act = type(self._modules.get("drop")), type(self._modules.get("act"))
        if drop is nn.Identity and act is nn.Identity:
            return super().forward(x, fused_add, fused_relu, fused_fork)
        fits = drop is nn.Identity and act is nn.ReLU
        if fused_add is None and fits and not _is_traced(x):
            return super().forward(x, None, True, fused_fork)
        y = rectified_sum(self.original.forward(self, x), fused_add, fused_relu)
        return (y, None) if fused_fork else y


class FusedReLU(nn.ReLU):
    """ReLU that returns its input unchanged if a norm has applied ReLU already; without arguments, ReLU."""

    original: type[nn.Module] = nn.ReLU

    def forward(self, input: Tensor, fused_relu: bool = False) -> Tensor:
        """Return relu(input), or the input if `fused_relu` says that it is rectified."""
        if _is_traced(input) and not fused_relu:
            y: Tensor = _as_leaf(self, input)
            return y
        return input if fused_relu else super().forward(input)


class FusedConv2d(Conv2d):
    """Conv2d that computes in C++ where engine.conv would, on a CPU that has the kernels.

    fastres.fuse makes a class of this one and the module's own.
    """

    original: type[nn.Module]
    algorithm = "cpp"

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution of the input."""
        y: Tensor = _as_leaf(self, input) if _is_traced(input) else super().forward(input)
        return y


class FusedSequential(nn.Sequential):
    """Sequential that calls a norm and the ReLU after it as one operation, and whose last norm can take a sum.

    The result of a module that ends in such an operation is handed to the next module twice, for its skip connection
    too. The modules are looked at in every call, so they may be replaced, appended and sliced.
    """

    takes_sum = True

    def forward(self, input: Any, fused_add: Any = None, fused_relu: bool = False) -> Any:
        """Return relu(the last module's output + fused_add), without the parts that are None or False."""
        # `input` is overwritten by each result, as in torch's Sequential, so that its memory is free for the next one.
        modules = list(self._modules.values())
        at, skip = 0, None
        while at < len(modules):
            module: Any = modules[at]
            kind, end = type(module), at + 1
            takes_sum = getattr(kind, "takes_sum", False)  # of the class, because a module's own lookup is slow
            if not takes_sum and skip is None and not getattr(kind, "takes_fork", False):
                input, at = module(input), end  # a convolution, for example
                continue
            while end < len(modules) and type(modules[end]) is nn.Identity:
                end += 1
            is_last = end == len(modules)
            if takes_sum:
                skip = None
                if is_last and (fused_relu or fused_add is not None):
                    input = module(input, fused_add=fused_add, fused_relu=fused_relu)
                    fused_add, fused_relu = None, False
                elif not is_last and type(modules[end]) is FusedReLU:
                    input = module(input, fused_relu=True)
                    for identity in modules[at + 1 : end]:
                        input = identity(input)
                    input = modules[end](input, fused_relu=True)
                    at = end
                else:
                    input = module(input)
            else:
                input, skip = _forked(module, input, skip, not is_last)
            at += 1
        return rectified_sum(input, fused_add, fused_relu)


def _forked(module: Any, value: Any, skip: Skip | None, fork: bool) -> tuple[Any, Skip | None]:
    """Return the module's output, and a Skip of it or None. `skip` is one of its input, which it may take."""
    forks, takes = (getattr(type(module), name, False) for name in ("takes_fork", "takes_skip"))
    forks, takes = forks and fork, takes and skip is not None
    if not (forks or takes) or hooked(module):
        return module(value), None
    arguments: dict[str, Any] = {"fused_skip": skip} if takes else {}
    if not forks:
        return module(value, **arguments), None
    pair: tuple[Any, Skip | None] = module(value, **arguments, fused_fork=True)
    return pair
