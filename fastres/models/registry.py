"""The networks by name. To add one, write a function with keyword-only options and add a line to MODELS."""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastres.utils.errors import UsageError, first_line
from fastres.utils.suggest import nearest, unknown

if TYPE_CHECKING:
    from torch import nn

METADATA = "fastres"  # the key of our metadata in files of weights
GIVEN = "python/"  # begins the names of networks that were given as objects
TORCHVISION, TIMM = "torchvision/", "timm/"  # begin the names of these packages' networks
FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")  # package.module:function

# torch is imported only when a network is built, so that a wrong name is rejected before it.


class Network:
    """A function of a module of fastres.models that builds a network, with the arguments that its name fixes.

    The function takes num_classes, in_channels and norm. Its options are its other parameters that are not fixed.
    """

    def __init__(self, function: str, *arguments: Any, **fixed: Any) -> None:
        self.function, self.arguments, self.fixed = function, arguments, fixed

    def load(self) -> Callable[..., nn.Module]:
        """Import the module and return the function with its fixed arguments."""
        module, _, name = self.function.partition(".")
        return partial(getattr(import_module(f"fastres.models.{module}"), name), *self.arguments, **self.fixed)


MODELS: dict[str, Network] = {
    "cifar_resnet": Network("cifar.cifar_resnet"),  # by its depth, 6n+2: resnetN and plainN
    "resnet18": Network("imagenet.ResNet", "basic", (2, 2, 2, 2)),
    "resnet34": Network("imagenet.ResNet", "basic", (3, 4, 6, 3)),
    "resnet50": Network("imagenet.ResNet", "bottleneck", (3, 4, 6, 3)),
    "resnet101": Network("imagenet.ResNet", "bottleneck", (3, 4, 23, 3)),
    "resnet152": Network("imagenet.ResNet", "bottleneck", (3, 8, 36, 3)),
    "resnext50_32x4d": Network("imagenet.ResNet", "bottleneck", (3, 4, 6, 3), groups=32, width_per_group=4),
    "resnext101_32x8d": Network("imagenet.ResNet", "bottleneck", (3, 4, 23, 3), groups=32, width_per_group=8),
    "resnext101_64x4d": Network("imagenet.ResNet", "bottleneck", (3, 4, 23, 3), groups=64, width_per_group=4),
    "wide_resnet50_2": Network("imagenet.ResNet", "bottleneck", (3, 4, 6, 3), width_per_group=128),
    "wide_resnet101_2": Network("imagenet.ResNet", "bottleneck", (3, 4, 23, 3), width_per_group=128),
    "mini_resnet": Network("mini.mini_resnet"),
    "speed_resnet": Network("speedrun.SpeedResNet"),
}


def build_model(
    name: str,
    *,
    num_classes: int = 10,
    in_channels: int = 3,
    norm: str = "torch",
    fused_convolutions: bool = False,
    trust_code: bool = False,
    **options: Any,
) -> nn.Module:
    """Build a network: (N, in_channels, H, W) -> (N, num_classes) logits.

    Args:
        name: one of MODELS, `resnetN` or `plainN` with N = 6n+2 (CIFAR family), `torchvision/NAME`, `timm/NAME`, or
            `package.module:function`.
        num_classes: outputs of the head.
        in_channels: channels of the images.
        norm: `torch`; `fused`, which computes BatchNorm + ReLU (+ addition) as one operation; `measured`, which does
            so for the shapes and devices where that was measured to be faster; or `apex`. The option `norm_layer`, a
            callable as torchvision's, overrides it.
        fused_convolutions: experimental and only with norm "fused"; convolutions normalise their own input, see
            fastres_kernels.experimental.
        trust_code: allow `package.module:function` to import the module.
        **options: the network's own options.

    Returns:
        The network on the CPU, in float32 and training mode, with random weights from torch's global generator.

    Raises:
        ValueError: if an argument is unknown or impossible; the message is one line.
    """
    if is_foreign(name):
        return _build_foreign(name, num_classes, in_channels, norm, trust_code, options)
    network = find(name)
    from fastres.models.blocks import NORMS

    build = network.load()
    norm_layer = options.pop("norm_layer", None) or NORMS.get(norm)
    if norm_layer is None:
        raise unknown("norm", norm, NORMS)
    if not callable(norm_layer):
        raise ValueError(f"norm_layer must be a callable, channels -> nn.Module, not {norm_layer!r}")
    arguments = {"num_classes": num_classes, "in_channels": in_channels, **options}
    _check(name, build, arguments)
    if fused_convolutions and norm_layer is not NORMS["fused"]:
        raise ValueError("fused_convolutions: need norm 'fused'")
    model = build(norm=norm_layer, **arguments)
    if fused_convolutions:
        from fastres_kernels.experimental import fuse_convolutions

        model = fuse_convolutions(model)
    return model


def is_foreign(name: str) -> bool:
    """Return True for the name of a network that is not fastres's own."""
    return name.startswith((TORCHVISION, TIMM)) or FUNCTION.fullmatch(name) is not None


def check_foreign(name: str, trust_code: bool) -> None:
    """Raise ValueError if a foreign network may not be imported, or its package is not installed."""
    if FUNCTION.fullmatch(name) and not trust_code:
        raise ValueError(f"{name} imports code; if you trust it, add --model.trust_code true")
    here = str(Path.cwd())  # where `python -m fastres` looks for modules, and the program `fastres` does not
    if FUNCTION.fullmatch(name) and here not in sys.path and "" not in sys.path:
        sys.path.append(here)
    package = re.split("[/.:]", name)[0]
    if importlib.util.find_spec(package) is None:
        install = "pip install timm" if name.startswith(TIMM) else "install it, or start in the folder that has it"
        raise ValueError(f"{name}: {package} is not installed; {install}")


def _build_foreign(
    name: str, num_classes: int, in_channels: int, norm: str, trust_code: bool, options: dict[str, Any]
) -> nn.Module:
    """Return a foreign network, fused unless the norm is torch's.

    Raises:
        ValueError: if it cannot be built; the message is one line.
    """
    from torch import nn

    check_foreign(name, trust_code)
    builder, fixed = _foreign_builder(name, in_channels)
    try:
        model: Any = builder(num_classes=num_classes, **fixed, **options)
    except Exception as error:  # foreign code may raise anything
        raise ValueError(f"{name}: {first_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"{name} returns {type(model).__name__}; it must return a torch.nn.Module")
    return fuse_unless_torch(model, norm)


def fuse_unless_torch(model: nn.Module, norm: str) -> nn.Module:
    """Return a foreign network for one of NORMS, fused in place unless it is torch's. Raise ValueError for apex."""
    from fastres.models.fuse import fuse

    if norm == "torch":
        return model
    if norm not in ("fused", "measured"):
        raise ValueError(f"norm {norm} belongs to fastres's own networks; use auto, torch or fused")
    return fuse(model)


def _foreign_builder(name: str, in_channels: int) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Return a foreign network's function and the arguments that its package needs. Raise ValueError if it has none."""
    if name.startswith(TORCHVISION):
        from torchvision.models import get_model_builder, list_models

        _check_choice("torchvision", choice := name.removeprefix(TORCHVISION), list_models())
        if in_channels != 3:
            raise ValueError(f"{name} takes images of 3 channels, not the {in_channels} of the data; choose another")
        auxiliary = {"aux_logits": False, "init_weights": True} if choice in ("googlenet", "inception_v3") else {}
        return get_model_builder(choice), {"weights": None, **auxiliary}
    if name.startswith(TIMM):
        import timm

        _check_choice("timm", choice := name.removeprefix(TIMM), timm.list_models())
        return partial(timm.create_model, choice), {"pretrained": False, "in_chans": in_channels}
    module, _, function = name.partition(":")
    try:
        builder = getattr(import_module(module), function)
    except Exception as error:  # foreign code may raise anything
        raise ValueError(f"{name}: {first_line(error)}") from error
    takes = inspect.signature(builder).parameters
    return builder, {"in_channels": in_channels} if "in_channels" in takes else {}


def _check_choice(package: str, choice: str, names: Sequence[str]) -> None:
    """Raise ValueError with the nearest name if a package has no network of this name."""
    if choice not in names:
        raise unknown(f"network of {package}", choice, ["resnet18", "resnet50", "…"], nearest(choice, names))


def check_input_shape(name: str, shape: Sequence[int], *, training: bool, **options: Any) -> None:
    """Check that a network takes images of this shape, (N, C, H, W), by running one image on the CPU.

    All weights are zeros, so that building the network takes no time and no random numbers.

    Raises:
        UsageError: if the images are too small for the network or, in training, too few for BatchNorm.
    """
    # On the meta device the image would cost nothing, but BatchNorm there imports torch's compiler, for a second.
    import torch
    from torch import nn

    n, channels, height, width = shape
    options.pop("fused_convolutions", None)  # the network takes the same shapes

    def check_values(_: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        if training and n * inputs[0][0, 0].numel() == 1:
            raise ValueError("Expected more than 1 value per channel when training")

    with torch.device("meta"):
        model = build_model(name, **options | {"in_channels": channels}).eval()
    zeros = {
        name: torch.zeros(t.shape, dtype=t.dtype) for name, t in (*model.named_parameters(), *model.named_buffers())
    }
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.register_forward_pre_hook(check_values)
    try:
        with torch.no_grad():
            torch.func.functional_call(model, zeros, (torch.zeros((1, channels, height, width)),))
    except (RuntimeError, ValueError) as error:
        raise UsageError(
            f"{name} cannot take {n} image{'s' * (n > 1)} of {height}x{width} pixels at once "
            f"({first_line(error)}); use larger images, more of them at once, or another network"
        ) from None


def find(name: str) -> Network:
    """Return the network of this name. Raise ValueError with the nearest name if there is none."""
    if name in MODELS:
        return MODELS[name]
    if name.startswith(GIVEN):
        raise ValueError(f"{name} was given in Python; use fastres.fit, or fastres.load_run with `model`")
    near = None
    if family := re.fullmatch(r"(resnet|plain)([1-9]\d{0,5})", name):
        blocks, rest = divmod(int(family[2]) - 2, 6)
        if blocks >= 1 and rest == 0:
            if family[1] == "plain":
                return Network("cifar.cifar_resnet", blocks, plain=True, shortcut=None)
            return Network("cifar.cifar_resnet", blocks, plain=False)
        near = f"{family[1]}{6 * max(1, blocks + (rest > 3)) + 2}"
    raise unknown("model", name, ["resnet20", "plain20", "… (resnetN, plainN: N = 6n+2)", *MODELS], near)


def _check(name: str, build: Callable[..., nn.Module], arguments: dict[str, Any]) -> None:
    """Raise ValueError for an argument that the builder lacks or has fixed, and for a value of another type."""
    parameters = inspect.signature(build, eval_str=True).parameters
    fixed = getattr(build, "keywords", {})
    options = parameters.keys() - fixed.keys() - {"num_classes", "in_channels", "norm"} | {"norm_layer"}
    for key, value in arguments.items():
        if key in fixed:
            if value != fixed[key]:
                raise ValueError(f"{name} has {key}={fixed[key]!r} by its name: leave out {key}={value!r}")
            continue
        if key not in parameters:
            raise unknown(f"option of {name}:", key, sorted(options))
        kind = parameters[key].annotation
        if kind is bool and not isinstance(value, bool):
            raise ValueError(f"{name}: {key} must be true or false, not {value!r}")
        if kind is int and (type(value) is not int or value < 1):
            raise ValueError(f"{name}: {key} must be a whole number of at least 1, not {value!r}")
    for key, parameter in parameters.items():
        if parameter.default is parameter.empty and key not in arguments:
            raise ValueError(f"{name} needs the option {key}")
