"""Checkpoints are written atomically, verified when read, and never executed."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from fastres.runs import checkpoint
from fastres.utils.errors import RunError, UsageError
from tests.fixtures import Creates, rejected


def a_state(step: int = 3) -> dict[str, Any]:
    """Return a nested state with every kind of leaf of a trainer's state."""
    generator = torch.Generator().manual_seed(step)
    return {
        "step": step,
        "trainer": {
            "model": {
                "weight": torch.randn(4, 3, 2, 2, generator=generator).to(memory_format=torch.channels_last),
                "half": torch.randn(5, generator=generator).to(torch.bfloat16),
                "counter": torch.tensor(7),
            },
            "optimizer": {"state": {0: {"momentum_buffer": None}, 1: {}}, "groups": [{"lr": 0.1, "on": True}]},
            "rng": torch.get_rng_state(),
        },
        "window": (1.5, -0.0, float("inf"), "text"),
    }


def assert_same(one: Any, other: Any) -> None:
    """Assert that both have the same containers, types and bits."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
        assert one.stride() == other.stride()
    else:
        assert repr(one) == repr(other)


def load_or_error(path: Path) -> tuple[dict[str, Any] | None, str | None]:
    """Return the state in the file, or the message of the error."""
    try:
        return checkpoint.load(path), None
    except UsageError as error:
        return None, str(error)


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path / "checkpoints", 3, a_state(), keep=2)
    assert path == tmp_path / "checkpoints" / "step-00000003.pt"
    assert_same(checkpoint.load(path), a_state())


def test_the_newest_k_are_kept(tmp_path: Path) -> None:
    for step in (5, 1_000, 20, 3):
        checkpoint.save(tmp_path, step, a_state(step), keep=2)
    assert [path.name for path in checkpoint.found(tmp_path)] == ["step-00001000.pt", "step-00000020.pt"]
    latest = checkpoint.latest(tmp_path)
    assert latest is not None and latest["step"] == 1_000


def test_the_best_is_kept_and_linked_beside_the_last(tmp_path: Path) -> None:
    def links() -> dict[str, str]:
        return {link.name: link.readlink().name for link in tmp_path.iterdir() if link.is_symlink()}

    checkpoint.save(tmp_path, 1, a_state(1), keep=1)
    assert links() == {"last": "step-00000001.pt"}
    for step in (2, 3, 4):
        checkpoint.save(tmp_path, step, a_state(step), keep=1, best=2)
        assert links() == {"last": f"step-{step:08}.pt", "best": "step-00000002.pt"}
    assert [path.name for path in checkpoint.found(tmp_path)] == ["step-00000004.pt", "step-00000002.pt"]
    assert_same(checkpoint.load(tmp_path / "best"), a_state(2))
    checkpoint.save(tmp_path, 5, a_state(5), keep=1, best=5)
    assert links() == {"last": "step-00000005.pt", "best": "step-00000005.pt"}
    assert [path.name for path in checkpoint.found(tmp_path)] == ["step-00000005.pt"]
    checkpoint.save(tmp_path, 6, a_state(6), keep=1, best=3)  # it was chosen in another folder, or removed
    assert links() == {"last": "step-00000006.pt"}


def test_a_file_system_without_links_keeps_the_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", no_links)
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, a_state(step), keep=1, best=1)
    assert sorted(os.listdir(tmp_path)) == ["step-00000001.pt", "step-00000003.pt"]  # noqa: PTH208


def test_checkpoints_of_more_than_eight_digits_are_the_newest(tmp_path: Path) -> None:
    steps = [99_999_999, 1_000_000_000, 100_000_000, 12_345_678_901]
    for step in steps:
        checkpoint.save(tmp_path, step, a_state(step), keep=9)
    for other in ("step-1.pt", "step-00000001.pt.tmp", "step-0000000x.pt", "step-best.pt"):
        (tmp_path / other).touch()
    assert [path.name for path in checkpoint.found(tmp_path)] == [
        "step-12345678901.pt", "step-1000000000.pt", "step-100000000.pt", "step-99999999.pt",
    ]  # fmt: skip
    latest = checkpoint.latest(tmp_path)
    assert latest is not None and latest["step"] == 12_345_678_901
    checkpoint.save(tmp_path, 12_345_678_902, a_state(), keep=2)
    assert [path.name for path in checkpoint.found(tmp_path)] == ["step-12345678902.pt", "step-12345678901.pt"]


def test_without_a_save_there_is_no_latest_checkpoint(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.latest(tmp_path / "nowhere") is None
    with rejected(tmp_path / "step-00000001.pt"):
        checkpoint.load(tmp_path / "step-00000001.pt")


def test_files_that_a_kill_left_behind_are_ignored(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, a_state(1), keep=2)
    (tmp_path / "step-00000002.pt.tmp").write_bytes(b"cut sho")
    latest = checkpoint.latest(tmp_path)
    assert latest is not None and latest["step"] == 1
    checkpoint.save(tmp_path, 2, a_state(2), keep=2)
    assert sorted(os.listdir(tmp_path)) == ["last", "step-00000001.pt", "step-00000002.pt"]  # noqa: PTH208


# ---- damage -------------------------------------------------------------------------------------------------


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, a_state(), keep=1)
    whole = path.read_bytes()
    for length in {0, 1, 3, 4, 100, *range(0, len(whole), len(whole) // 40), len(whole) - 1}:
        path.write_bytes(whole[:length])
        with rejected(path):
            checkpoint.load(path)


@pytest.mark.parametrize("seed", range(4))
def test_a_flipped_bit_is_refused_or_harmless(tmp_path: Path, seed: int) -> None:
    path = checkpoint.save(tmp_path, 1, a_state(), keep=1)
    whole, random_ = path.read_bytes(), random.Random(seed)
    pickled = (whole.index(b"state"), whole.index(b"sha256") + 80)  # a flip there may change the structure
    for place in random_.choices(range(len(whole)), k=60) + random_.choices(range(*pickled), k=60):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << random_.randrange(8)
        path.write_bytes(damaged)
        state, error = load_or_error(path)
        if error is not None:
            assert str(path) in error and "\n" not in error
        else:
            assert_same(state, a_state())


def test_loading_falls_back_to_the_last_good_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, a_state(step), keep=3)
    newest, middle, oldest = checkpoint.found(tmp_path)
    newest.write_bytes(newest.read_bytes()[:-50])
    middle.write_bytes(b"")
    latest = checkpoint.latest(tmp_path)
    assert latest is not None and latest["step"] == 1
    said = caplog.messages
    assert len(said) == 2 and str(newest) in said[0] and str(middle) in said[1]

    oldest.unlink()
    with rejected(tmp_path):  # never a silent start from step 0
        checkpoint.latest(tmp_path)


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    path, witness = tmp_path / "step-00000001.pt", tmp_path / "witness"
    torch.save({"state": Creates(witness), "sha256": ""}, path)
    torch.load(path, weights_only=False)["state"].close()
    assert witness.exists()  # a plain load would execute it
    witness.unlink()
    with rejected(path):
        checkpoint.load(path)
    assert not witness.exists()


@pytest.mark.parametrize("content", [{"weight": torch.zeros(1)}, [1], torch.zeros(1), {"state": {}}])
def test_a_third_party_file_is_rejected(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "model.pt")
    with rejected(tmp_path / "model.pt", "not a checkpoint"):
        checkpoint.load(tmp_path / "model.pt")


def test_a_folder_that_cannot_be_written_is_a_failure_of_one_line(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(RunError) as caught:
        checkpoint.save(tmp_path / "checkpoints", 1, a_state(), keep=1)
    assert str(tmp_path / "checkpoints") in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, a_state(1), keep=1)
    (tmp_path / "step-00000002.pt.tmp").symlink_to("/dev/full")
    with pytest.raises(RunError) as caught:
        checkpoint.save(tmp_path, 2, a_state(2), keep=1)
    assert "\n" not in str(caught.value) and "step-00000002.pt" in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["last", "step-00000001.pt"]  # noqa: PTH208
    assert (tmp_path / "last").readlink() == Path("step-00000001.pt")


# ---- the digest ---------------------------------------------------------------------------------------------


def test_the_digest_is_of_the_content_alone() -> None:
    tensor = torch.arange(24.0).reshape(2, 3, 2, 2)
    same = [
        tensor.clone(),
        tensor.to(memory_format=torch.channels_last),
        torch.arange(48.0)[::2].div(2).reshape(2, 3, 2, 2),
        torch.nn.Parameter(tensor),
    ]
    if torch.cuda.is_available():
        same.append(tensor.cuda())
    assert {checkpoint.digest({"a": [one, 1]}) for one in same} == {checkpoint.digest({"a": [tensor, 1]})}
    assert checkpoint.digest(torch.tensor(float("nan"))) == checkpoint.digest(torch.tensor(float("nan")))


def test_the_digest_tells_different_contents_apart() -> None:
    tensor = torch.arange(4.0)
    one_ulp = tensor.clone()
    one_ulp[3] = one_ulp[3].nextafter(torch.tensor(9.0))
    contents = [
        {"a": tensor},
        {"a": one_ulp},
        {"a": tensor.reshape(2, 2)},
        {"a": tensor.to(torch.float64)},
        {"a": tensor.view(torch.int32)},
        {"b": tensor},
        {"a": [0.0, 1.0, 2.0, 3.0]},
        {"a": -tensor},
        {},
        {"a": None},
        {"a": {}},
        {"a": []},
        {"a": ()},
        {"a": 0},
        {"a": False},
        {"a": 0.0},
        {"a": -0.0},
        {"a": "0"},
        {0: 0},
        {"0": 0},
        {"a": {"b": 0}},
        {"a.b": 0},
    ]
    digests = [checkpoint.digest(content) for content in contents]
    clashes = [(contents[i], contents[j]) for j in range(len(digests)) for i in range(j) if digests[i] == digests[j]]
    assert clashes == []
