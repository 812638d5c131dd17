"""Read state_dicts: from files of PyTorch and of safetensors, in the usual wrappings, and from torchvision by name.

Nothing in a file is executed. torch reads it with weights_only, and each class or function that it names beyond those
of tensors becomes an empty stand-in. So a checkpoint may hold numpy's numbers or a program's own objects beside its
weights.
"""

from __future__ import annotations

import _compat_pickle
import contextlib
import pickletools
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import safetensors.torch
import torch
from torch import Tensor

from fastres.utils.errors import UsageError, first_line
from fastres.utils.suggest import did_you_mean, few

PICKLED = (".pth", ".pt", ".th", ".tar", ".ckpt", ".bin")  # written by torch.save; .tar as in model.pth.tar
KINDS = "a .safetensors, .pth, .pt, .th, .tar, .ckpt or .bin file"
# Keys under which programs store a state_dict, and fastres's own. Averaged weights come last, and are read only if a
# file has no others.
WRAPPERS = (
    *("state_dict", "model_state_dict", "model_state", "model", "net", "network", "module", "weights", "params"),
    *("state", "trainer"),
    *("ema", "model_ema", "ema_state_dict", "state_dict_ema", "params_ema"),
)
MOST_WRAPPERS = 4  # around one state_dict
PREFIXES = ("module.", "model.", "net.")  # of all keys: DistributedDataParallel's, and a LightningModule's attribute
# Names that a file of tensors has anyway.
TENSORS = re.compile(
    r"torch\._utils\..*|torch\.\w*Storage|torch\.storage\..*|collections\..*|_codecs\.encode|builtins\.set"
)
COMPILED = re.compile(r"(^|\.)_orig_mod\.")  # added by torch.compile, also in the middle of a key


def read_weights(weights: str | Path, network: str = "") -> dict[str, Tensor]:
    """Return the state_dict that model.weights names, on the CPU.

    Args:
        weights: a file, a run's folder, or one of torchvision's names, such as IMAGENET1K_V2 or DEFAULT.
        network: the network's name, for torchvision.

    Raises:
        UsageError: if there is no such file or name, or the file has no state_dict.
    """
    if name := re.fullmatch(r"(?:\w+_Weights\.)?([A-Z][A-Z0-9_]*)", str(weights)):
        return _from_torchvision(name[1], network)
    path = Path(weights).expanduser()
    return _unprefixed(_from_file(path / "model.safetensors" if path.is_dir() else path))


# ---- torchvision's weights by name ----------------------------------------------------------------------------


def _from_torchvision(name: str, network: str) -> dict[str, Tensor]:
    """Return weights of torchvision, which downloads them into its own cache unless they are there."""
    from torchvision.models import get_model_weights

    try:
        choices = get_model_weights(network)
    except ValueError:
        raise UsageError(
            f"model.weights: torchvision has no {name} for {network}, only for its own networks, such as resnet18; "
            f"give {KINDS}"
        ) from None
    names = list(choices.__members__)
    if name not in names:
        raise UsageError(
            f"model.weights: torchvision has no {name} for {network}{did_you_mean(name, names)}; choose from "
            f"{', '.join(names)}, or give {KINDS}"
        )
    try:
        # check_hash compares a download with the hash in the file's name.
        state: dict[str, Tensor] = choices[name].get_state_dict(
            map_location="cpu", weights_only=True, check_hash=True, progress=False
        )
    except Exception as error:  # no network, no disk, a damaged file in the cache
        cache = Path(torch.hub.get_dir()) / "checkpoints"
        raise UsageError(
            f"model.weights {name}: cannot get {choices[name].url} ({first_line(error)}); download it on "
            f"another machine, and give it as --model.weights FILE or put it into {cache}; --model.weights null trains "
            "from random weights"
        ) from None
    return state


# ---- files ------------------------------------------------------------------------------------------------------


def _from_file(path: Path) -> dict[str, Tensor]:
    """Return the state_dict of a file. Raise UsageError if it has none."""
    suffix = (path.suffix or path.resolve().suffix).lower()  # checkpoints/best is a link to a .pt
    if suffix != ".safetensors" and suffix not in PICKLED:
        raise UsageError(f"weights file {path}: unknown kind {path.suffix!r}; give {KINDS}")
    if not path.is_file():
        raise UsageError(f"weights file {path}: does not exist; give the path of {KINDS}")
    if _is_torchscript(path):
        raise UsageError(
            f"weights file {path}: holds a TorchScript program, not a state_dict; in Python, save its weights: "
            f"torch.save(torch.jit.load({path.name!r}).state_dict(), 'weights.pth')"
        )
    try:
        content = safetensors.torch.load_file(path) if suffix == ".safetensors" else _without_executing(path)
    except Exception as error:  # a damaged or foreign file may raise anything, and torch's own message misleads
        raise UsageError(f"weights file {path}: cannot be read ({_why_unreadable(path, error)}") from error
    state = _state_dict_in(content)
    if state is None:
        raise UsageError(
            f"weights file {path}: holds no state_dict, but {_described(content)}; in the program that wrote it, save "
            "the weights alone: torch.save(model.state_dict(), 'weights.pth')"
        )
    if odd := [key for key, tensor in state.items() if not _is_dense(tensor)]:
        raise UsageError(
            f"weights file {path}: {few(sorted(odd))} is sparse, quantized or without values; save an ordinary "
            "model.state_dict() into it"
        )
    return dict(state)


def _is_torchscript(path: Path) -> bool:
    """Return True for an archive of torch.jit.save."""
    with contextlib.suppress(OSError, ValueError, zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())
    return False


class StandIn:
    """An inert object in the place of one that a file names. `name` is the class or function that the file names."""

    name = ""

    def __new__(cls, *_: Any, **__: Any) -> StandIn:
        """Return an object without content, whatever the arguments."""
        return super().__new__(cls)

    def __setstate__(self, _: Any) -> None:
        """Ignore the state in the file."""


def _without_executing(path: Path) -> Any:
    """Return the content of a file of torch.save, in which stand-ins replace all that is not a tensor or plain."""
    stand_ins: list[tuple[Callable[..., Any], str]] = [
        (_empty_mapping if name == "collections.defaultdict" else type(name, (StandIn,), {"name": name}), alias)
        for name in _named_in(path)
        for alias in _aliases(name)
    ]
    # No name in a file leads to an import. torch looks up the names of tensors first, then those that are permitted
    # here. Permissions of others are suspended: torch's compiler alone permits a hundred classes.
    permitted = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        torch.serialization.add_safe_globals(stand_ins)  # type: ignore[arg-type]  # pairs are documented
        return torch.load(path, map_location="cpu", weights_only=True)
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(permitted)


def _empty_mapping(*_: Any) -> OrderedDict[Any, Any]:
    """Return a mapping that the file's items are put into."""
    return OrderedDict()


def _named_in(path: Path) -> list[str]:
    """Return the classes and functions that a file of torch.save names, as "module.name"."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            pickled = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            with archive.open(pickled) as file:
                return sorted(set(_globals_of(file)))
    with path.open("rb") as file:  # before PyTorch 1.6: a magic number, a version, the system, then the content
        return sorted({name for _ in range(4) for name in _globals_of(file)})


def _globals_of(file: IO[bytes]) -> Iterator[str]:
    """Yield the globals of one pickle."""
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name == "GLOBAL":
            yield str(argument).replace(" ", ".")


def _aliases(name: str) -> set[str]:
    """Return the names by which torch may look up a global, because it translates some between Python 2 and 3."""
    module, _, attribute = name.rpartition(".")
    pairs = {(module, attribute)}
    for names, modules in (
        (_compat_pickle.NAME_MAPPING, _compat_pickle.IMPORT_MAPPING),
        (_compat_pickle.REVERSE_NAME_MAPPING, _compat_pickle.REVERSE_IMPORT_MAPPING),
    ):
        pairs |= {names.get((module, attribute), (modules.get(module, module), attribute))}
    return {".".join(pair) for pair in pairs}


def _why_unreadable(path: Path, error: Exception) -> str:
    """Return the reason in a parenthesis that is open, and the remedy."""
    names: list[str] = []
    with contextlib.suppress(Exception):  # a damaged file may raise anything
        names = [name for name in _named_in(path) if not TENSORS.fullmatch(name)]
    if names:
        return (
            f"{type(error).__name__}; beside tensors it holds {few(sorted(names))}, and nothing in a file is executed)"
            "; if you trust it, save model.state_dict() alone in the program that wrote it"
        )
    return f"{type(error).__name__}; it is damaged); download it again, or save model.state_dict() into it"


# ---- the state_dict in what was read ----------------------------------------------------------------------------


def _state_dict_in(content: Any, depth: int = MOST_WRAPPERS) -> Mapping[str, Tensor] | None:
    """Return the state_dict in a file's content: the content, or what is under WRAPPERS or the only one under a key."""
    if not isinstance(content, Mapping) or not content:
        return None
    if all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()):
        return content
    for key in WRAPPERS if depth else ():
        if (found := _state_dict_in(content.get(key), depth - 1)) is not None:
            return found
    others = [found for value in content.values() if depth and (found := _state_dict_in(value, 0)) is not None]
    return others[0] if len(others) == 1 else None


def _unprefixed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the state_dict without the prefixes that wrappers of a model add, and an average's counter."""
    plain = {COMPILED.sub(r"\1", key): tensor for key, tensor in state.items() if key != "n_averaged"}
    for prefix in PREFIXES:
        if plain and all(key.startswith(prefix) for key in plain):
            return _unprefixed({key.removeprefix(prefix): tensor for key, tensor in plain.items()})
    return plain


def _described(content: Any) -> str:
    """Return the content in words."""
    if not isinstance(content, Mapping):
        return _kind(content)
    return (
        f"the keys {few(sorted(f'{key} ({_kind(value)})' for key, value in content.items()))}" if content else "nothing"
    )


def _kind(value: Any) -> str:
    """Return the kind of a value in words."""
    if isinstance(value, StandIn):
        return f"an object of {value.name}"
    return value.name if isinstance(value, type) and issubclass(value, StandIn) else f"a {type(value).__name__}"


def _is_dense(tensor: Tensor) -> bool:
    """Return True for a tensor that is dense, in memory and not quantized."""
    return tensor.layout is torch.strided and not (tensor.is_meta or tensor.is_quantized)
