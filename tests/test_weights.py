"""Weights load both ways between fastres and torchvision, and equal weights give equal bytes."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn

from fastres.models.registry import build_model
from fastres.models.weights import load_weights, save_weights
from fastres.utils.errors import UsageError


def trained(model: nn.Module) -> nn.Module:
    """Return the model with running statistics that differ from a new model's."""
    with torch.no_grad():
        model.train()(torch.randn(4, 3, 32, 32))
    return model.eval()


def assert_same_logits(a: nn.Module, b: nn.Module) -> None:
    x = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(a.eval()(x), b.eval()(x), rtol=1e-5, atol=1e-5)


WRAPPERS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "bare": lambda state: state,
    "model": lambda state: {"model": state, "epoch": 3},
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "without num_batches_tracked": lambda state: {k: v for k, v in state.items() if "num_batches" not in k},
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
