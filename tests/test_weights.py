"""Weights load both ways between fastres and torchvision, and equal weights give equal bytes."""

from __future__ import annotations

import argparse
import os
import pickle
import subprocess
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn

from fastres.config.schema import OptimConfig
from fastres.models.registry import build_model
from fastres.models.weights import load_weights, save_weights
from fastres.runs import checkpoint
from fastres.training.step import TrainStep
from fastres.utils.errors import UsageError
from tests.fixtures import Creates, engine, rejected


class Calls:
    """An object that calls a function when Python itself unpickles it."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


def trained(model: nn.Module) -> nn.Module:
    """Return the model with running statistics that differ from a new model's."""
    with torch.no_grad():
        model.train()(torch.randn(4, 3, 32, 32))
    return model.eval()


def assert_same_logits(a: nn.Module, b: nn.Module) -> None:
    x = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(a.eval()(x), b.eval()(x), rtol=1e-5, atol=1e-5)


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{key}": tensor for key, tensor in state.items()}


def zeros(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: torch.zeros_like(tensor) for key, tensor in state.items()}


WRAPPERS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "bare": lambda state: state,
    "model": lambda state: {"model": state, "epoch": 3},
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "without num_batches_tracked": lambda state: {k: v for k, v in state.items() if "num_batches" not in k},
}
MORE_WRAPPERS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    **{
        key: lambda state, key=key: {"epoch": 3, key: state, "optimizer": {"state": {0: {}}, "param_groups": []}}
        for key in ("net", "network", "model_state_dict", "ema", "model_ema")
    },
    "an unusual key": lambda state: {"backbone_of_mine": state, "epoch": 3, "history": {}},
    "weights before their average": lambda state: {"ema": zeros(state), "model": state},
    "a checkpoint's average": lambda state: {"model_ema": prefixed(state, "module.") | {"n_averaged": torch.ones(())}},
    "DDP": lambda state: prefixed(state, "module."),
    "DDP in a checkpoint": lambda state: {"net": prefixed(state, "module."), "acc": 93.5, "epoch": 3},
    "compile": lambda state: prefixed(state, "_orig_mod."),
    "DDP and compile": lambda state: {"model": prefixed(state, "module._orig_mod.")},
    "compile and DDP": lambda state: {"state_dict": prefixed(state, "_orig_mod.module.")},
    "compiled stages": lambda state: {key.replace("layer1.", "layer1._orig_mod."): state[key] for key in state},
    "Lightning": lambda state: {"state_dict": prefixed(state, "model."), "hyper_parameters": {"lr": 0.1}},
    "a list of one and a mapping": lambda state: {"state_dict": state, "scheduler": [defaultdict(list, {1: [2]})]},
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("suffix", [".pth", ".pt"])
def test_starts_from_a_torchvision_file(tmp_path: Path, wrapper: str, suffix: str) -> None:
    theirs = trained(torchvision.models.resnet18(num_classes=10))
    path = tmp_path / f"resnet18{suffix}"
    torch.save(WRAPPERS[wrapper](theirs.state_dict()), path)
    ours = build_model("resnet18")
    assert load_weights(ours, path) == []
    assert_same_logits(ours, theirs)


@pytest.mark.parametrize("wrapper", MORE_WRAPPERS)
def test_common_wrappings_of_a_state_dict_are_read(tmp_path: Path, wrapper: str) -> None:
    saved, loaded = build_model("resnet8"), build_model("resnet8")
    torch.save(MORE_WRAPPERS[wrapper](saved.state_dict()), tmp_path / "model.ckpt")
    assert load_weights(loaded, tmp_path / "model.ckpt") == []
    assert all(torch.equal(tensor, loaded.state_dict()[key]) for key, tensor in saved.state_dict().items())


FOREIGN: dict[str, Callable[[], Any]] = {
    "a number of numpy": lambda: np.float64(93.5),
    "an integer of numpy": lambda: np.int64(3),
    "an array": lambda: np.arange(6, dtype=np.float32).reshape(2, 3),
    "arguments": lambda: argparse.Namespace(lr=0.1, layers=[2, 2], out=Path("runs/x")),
    "a path": lambda: Path("runs/x"),
    "an object of the program's": lambda: Creates,
    "a class of torch": lambda: nn.Linear(2, 2),
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "before 1.6"])
def test_weights_are_read_from_beside_other_objects(tmp_path: Path, kind: str, new_format: bool) -> None:
    saved, loaded = build_model("resnet8"), build_model("resnet8")
    permitted = set(torch.serialization.get_safe_globals())
    if kind == "a class of torch" and not new_format:
        pytest.skip("torch reads no such file with weights_only")
    content = {"best": FOREIGN[kind](), "state_dict": prefixed(saved.state_dict(), "module."), "epoch": 3}
    torch.save(content, tmp_path / "model.pth.tar", _use_new_zipfile_serialization=new_format)
    assert load_weights(loaded, tmp_path / "model.pth.tar") == []
    assert all(torch.equal(tensor, loaded.state_dict()[key]) for key, tensor in saved.state_dict().items())
    assert set(torch.serialization.get_safe_globals()) == permitted  # the stand-ins serve one file


HOSTILE: dict[str, Callable[[Path], Any]] = {
    "open": Creates,
    "eval": lambda witness: Calls(eval, f"open({str(witness)!r}, 'w')"),
    "exec": lambda witness: Calls(exec, f"open({str(witness)!r}, 'w')"),
    "os.system": lambda witness: Calls(os.system, f"touch {witness}"),
    "subprocess": lambda witness: Calls(subprocess.call, ["touch", str(witness)]),
    "a method": lambda witness: Calls(getattr, Calls(Path, str(witness)), "touch"),
    "a second pickle": lambda witness: Calls(pickle.loads, pickle.dumps(Creates(witness))),
    "numpy's pickle": lambda witness: Calls(np.load, str(witness)),
    "torch's storage": lambda witness: Calls(torch.storage._load_from_bytes, pickle.dumps(Creates(witness))),
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "before 1.6"])
def test_a_hostile_object_beside_weights_runs_nothing(tmp_path: Path, kind: str, new_format: bool) -> None:
    model, witness, path = build_model("resnet8"), tmp_path / "witness", tmp_path / "model.pt"
    for place in ("args", "state_dict"):  # beside the weights, and in their place
        content = {"state_dict": model.state_dict(), "epoch": 3, place: HOSTILE[kind](witness)}
        torch.save(content, path, _use_new_zipfile_serialization=new_format)
        readable = place == "args" and kind != "os.system"  # torch rejects whatever names the module os
        with nullcontext() if readable else rejected(path):
            assert load_weights(model, path) == []
        assert not witness.exists()


def test_a_file_without_a_state_dict_says_what_it_holds(tmp_path: Path) -> None:
    path, model = tmp_path / "model.pt", build_model("resnet8")
    torch.save(nn.Linear(2, 2), path)
    assert_refused(model, path, "an object of torch.nn.modules.linear.Linear", "torch.save(model.state_dict()")
    torch.save({"model": argparse.Namespace(), "epoch": 3}, path)
    assert_refused(model, path, "epoch (a int), model (an object of argparse.Namespace)")
    torch.save({"a": model.state_dict(), "b": model.state_dict()}, path)  # which of the two?
    assert_refused(model, path, "a (a OrderedDict), b (a OrderedDict)")
    torch.save({"state_dict": {}, "path": os.path.join}, path)
    assert_refused(model, path, "path (posixpath.join)")
    torch.save({"state_dict": model.state_dict(), "run": os.system}, path)
    assert_refused(model, path, "posix.system", "nothing in a file is executed")
    torch.save({"fc.weight": torch.eye(2).to_sparse()}, path)
    assert_refused(model, path, "fc.weight", "sparse")
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)
    assert_refused(model, path, "TorchScript", "torch.jit.load")


def test_starts_from_a_checkpoint_or_a_folder_of_a_run(tmp_path: Path) -> None:
    saved = trained(build_model("resnet8"))
    step = TrainStep(saved, engine(), OptimConfig())
    state = {"step": 3, "window": {}, "clock": {}, "trainer": step.state_dict()}
    written = checkpoint.save(tmp_path / "checkpoints", 3, state, keep=1)
    save_weights(saved, tmp_path / "model.safetensors")
    for source in (written, written.with_name("last"), tmp_path, str(tmp_path / "model.safetensors")):
        loaded = build_model("resnet8")
        assert load_weights(loaded, source) == []
        assert all(torch.equal(tensor, loaded.state_dict()[key]) for key, tensor in saved.state_dict().items())
    assert_refused(saved, tmp_path / "checkpoints", "model.safetensors", "does not exist")


def test_torchvisions_weights_are_taken_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens there
    theirs, ours = trained(torchvision.models.resnet18()), build_model("resnet18", num_classes=2)
    file = "resnet18-f37072fd.pth"
    with rejected("model.weights DEFAULT", f"https://download.pytorch.org/models/{file}", "--model.weights FILE"):
        load_weights(ours, "DEFAULT", "resnet18")
    torch.save(theirs.state_dict(), tmp_path / "hub/checkpoints" / file)
    for name in ("DEFAULT", "IMAGENET1K_V1", "ResNet18_Weights.IMAGENET1K_V1"):
        ours = build_model("resnet18", num_classes=2)
        assert load_weights(ours, name, "resnet18") == ["fc.weight", "fc.bias"]
        assert torch.equal(ours.get_parameter("layer4.1.conv2.weight"), theirs.layer4[1].conv2.weight)
    with rejected("IMAGENET1K_V2", "resnet18", "did you mean IMAGENET1K_V1", "DEFAULT"):
        load_weights(ours, "IMAGENET1K_V2", "resnet18")
    with rejected("resnet20", "torchvision"):
        load_weights(build_model("resnet20"), "DEFAULT", "resnet20")
    (tmp_path / "hub/checkpoints" / file).write_bytes(b"damaged")
    with rejected("model.weights DEFAULT", file):
        load_weights(ours, "DEFAULT", "resnet18")


def test_starts_from_a_file_in_the_format_before_pytorch_1_6(tmp_path: Path) -> None:
    theirs = trained(torchvision.models.resnet18(num_classes=10))
    torch.save(theirs.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    ours = build_model("resnet18")
    assert load_weights(ours, str(tmp_path / "old.pth")) == []
    assert_same_logits(ours, theirs)


def test_fastres_weights_load_in_torchvision(tmp_path: Path) -> None:
    ours = trained(build_model("resnet18").to(memory_format=torch.channels_last))
    save_weights(ours, tmp_path / "model.safetensors")
    theirs = torchvision.models.resnet18(num_classes=10)
    theirs.load_state_dict(safetensors.torch.load_file(tmp_path / "model.safetensors"), strict=True)
    assert_same_logits(ours, theirs)


@pytest.mark.parametrize("name", ["resnet20", "plain20", "mini_resnet", "resnet18"])
def test_saving_and_loading_is_exact(tmp_path: Path, name: str) -> None:
    saved, loaded = trained(build_model(name)), build_model(name)
    save_weights(saved, tmp_path / "model.safetensors")
    assert load_weights(loaded, tmp_path / "model.safetensors") == []
    for key, tensor in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key


def test_a_channels_last_model_stays_channels_last(tmp_path: Path) -> None:
    save_weights(build_model("resnet20"), tmp_path / "model.safetensors")
    model = build_model("resnet20").to(memory_format=torch.channels_last)
    load_weights(model, tmp_path / "model.safetensors")
    weights = [parameter for parameter in model.parameters() if parameter.dim() == 4]
    assert len(weights) == 19
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)


def test_a_head_of_another_size_is_left_as_initialised(tmp_path: Path) -> None:
    theirs = trained(torchvision.models.resnet18(num_classes=1000))
    torch.save(theirs.state_dict(), tmp_path / "resnet18.pth")
    ours = build_model("resnet18", num_classes=10)
    fresh = {key: ours.state_dict()[key].clone() for key in ("fc.weight", "fc.bias")}
    assert load_weights(ours, tmp_path / "resnet18.pth") == ["fc.weight", "fc.bias"]
    for key, tensor in ours.state_dict().items():
        assert torch.equal(tensor, fresh[key] if key in fresh else theirs.state_dict()[key]), key


# ---- equal weights, equal bytes ----------------------------------------------------------------------------


def digest(model: nn.Module, path: Path) -> str:
    save_weights(model, path)
    return sha256(path.read_bytes()).hexdigest()


def test_bytes_depend_on_the_weights_alone(tmp_path: Path) -> None:
    model = build_model("resnet18", in_channels=1)  # with 1 channel, strides fit both memory formats
    first = digest(model, tmp_path / "a.safetensors")
    assert digest(model, tmp_path / "b.safetensors") == first
    assert digest(model.to(memory_format=torch.channels_last), tmp_path / "c.safetensors") == first
    other = build_model("resnet18", in_channels=1)
    load_weights(other, tmp_path / "a.safetensors")
    assert digest(other, tmp_path / "a.safetensors") == first
    with torch.no_grad():
        other.get_parameter("fc.bias")[0] += 1e-6
    assert digest(other, tmp_path / "a.safetensors") != first


def test_saving_replaces_whole_files_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"what was there before")
    save_weights(build_model("resnet8"), path)
    assert load_weights(build_model("resnet8"), path) == []
    occupied = tmp_path / "folder.safetensors"
    occupied.mkdir()
    with pytest.raises(IsADirectoryError):
        save_weights(build_model("resnet8"), occupied)
    assert sorted(tmp_path.iterdir()) == [occupied, path]


def test_whoever_reads_the_old_file_reads_all_of_it(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_weights(build_model("resnet8"), path)
    before = path.read_bytes()
    with path.open("rb") as old:
        save_weights(build_model("resnet8"), path)
        assert old.read() == before
    assert path.read_bytes() != before


# ---- refusals ----------------------------------------------------------------------------------------------


def assert_refused(model: nn.Module, path: Path, *words: str) -> None:
    """Assert that loading fails with one line that names the file and the words, and leaves the model unchanged."""
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(UsageError) as refused:
        load_weights(model, path)
    message = str(refused.value)
    assert "\n" not in message
    assert [word for word in (str(path), *words) if word not in message] == []
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_refuses_a_file_that_is_not_there_or_of_another_kind(tmp_path: Path) -> None:
    model = build_model("resnet8")
    assert_refused(model, tmp_path / "nowhere.pth", "does not exist")
    assert_refused(model, tmp_path / "model.onnx", "'.onnx'", ".safetensors")
    (tmp_path / "folder.pt").mkdir()
    assert_refused(model, tmp_path / "folder.pt", "does not exist")


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_refuses_a_truncated_file(tmp_path: Path, suffix: str, kept: float) -> None:
    model, path = build_model("resnet8"), tmp_path / f"model{suffix}"
    if suffix == ".pth":
        torch.save(model.state_dict(), path)
    else:
        save_weights(model, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    assert_refused(model, path, "cannot be read", "damaged")


@pytest.mark.parametrize("content", [nn.Linear(2, 2), [torch.zeros(2)], {"fc.weight": 3}])
def test_refuses_what_is_not_a_state_dict(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "model.pt")
    assert_refused(build_model("resnet8"), tmp_path / "model.pt", "model.state_dict()")


def test_refuses_another_net(tmp_path: Path) -> None:
    path = tmp_path / "resnet14.safetensors"
    save_weights(build_model("resnet14"), path)
    assert_refused(build_model("resnet8"), path, "unknown", "layer1.1.bn1.bias", "more")
    assert_refused(build_model("resnet20"), path, "lacks", "layer1.2.bn1.bias", "more")
    assert_refused(build_model("resnet14", in_channels=1), path, "conv1.weight 16×3×3×3 for 16×1×3×3")


def test_a_missing_head_is_refused(tmp_path: Path) -> None:
    state = build_model("resnet8").state_dict()
    torch.save({key: state[key] for key in state if not key.startswith("fc.")}, tmp_path / "body.pt")
    assert_refused(build_model("resnet8"), tmp_path / "body.pt", "lacks fc.bias, fc.weight")
