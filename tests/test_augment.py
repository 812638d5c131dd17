"""Augmentations beyond crop and flip, by every loader, against numpy on one image at a time.

test_sampling.py tests their random draws.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastres.data.loaders.build import LOADERS
from fastres.data.sampling import Samples
from fastres.data.sources.source import Split
from tests.commands import run_fastres
from tests.fixtures import rejected, write_image_folder
from tests.test_loaders import (
    Batches,
    a_source,
    assert_equal,
    build,
    every_loader,
    folder,
    make,
    noise,
    normalized,
    spec,
)  # fmt: skip

CLASSES = 10


def one_image(split: Split, samples: Samples, row: int, **fields: Any) -> np.ndarray:
    """Return one row of a batch, padded, cropped and flipped: (S, S, C) uint8."""
    s = spec(split.channels, **fields)
    pad, size = s.pad if s.augment == "crop" else 0, s.image_size
    mode: Any = "reflect" if s.pad_mode == "reflect" else "constant"
    canvas = np.pad(split.image(int(samples.index[row])), ((pad, pad), (pad, pad), (0, 0)), mode)
    dy, dx = samples.dy[row], samples.dx[row]
    crop = canvas[dy : dy + size, dx : dx + size]
    return crop[:, ::-1] if samples.flip[row] else crop


def expected(split: Split, first: int, last: int, **fields: Any) -> Batches:
    """Return the batches of steps [first, last), computed by plain numpy."""
    s, batches = spec(split.channels, **fields), []
    for step in range(first, last):
        samples = s.order(len(split)).samples(step, step + 1)
        n = len(samples.index)
        plain = normalized(np.stack([one_image(split, samples, row, **fields) for row in range(n)]), 3)
        for image, (y, x) in zip(plain, samples.cutout.tolist(), strict=True):
            if s.cutout:
                top, left = y - s.cutout // 2, x - s.cutout // 2
                image[:, max(top, 0) : top + s.cutout, max(left, 0) : left + s.cutout] = 0
        labels = torch.from_numpy(split.labels[samples.index])
        if s.mixup or s.cutmix:
            plain, labels = mixed(plain, labels, samples)
        batches.append((plain, labels))
    return batches


def mixed(plain: Tensor, labels: Tensor, samples: Samples) -> tuple[Tensor, Tensor]:
    """Mix each image and label with its neighbour's, pixel by pixel."""
    images, shares = torch.empty_like(plain), torch.zeros(len(labels), CLASSES)
    for row in range(len(labels)):
        other, blend = row ^ 1, float(samples.blend[row])
        own = torch.full(plain.shape[2:], blend)
        top, bottom, left, right = samples.box[row]
        own[top:bottom, left:right] = 0
        images[row] = own * plain[row] + (1 - own) * plain[other]
        shares[row, labels[row]] += own.mean()
        shares[row, labels[other]] += 1 - own.mean()
    return images, shares


@every_loader
@pytest.mark.parametrize(
    "fields",
    [
        {"pad_mode": "reflect"},
        {"pad_mode": "reflect", "pad": 7},  # the most that an image of 8 pixels allows
        {"flip": "alternating"},
        {"cutout": 4},
        {"cutout": 3, "augment": "crop", "pad": 0},
        {"cutout": 99},  # the whole image is blank
    ],
    ids=str,
)
def test_batches_equal_a_reference_in_plain_numpy(loader: str, fields: dict[str, Any]) -> None:
    split = noise()
    assert_equal(list(make(loader, split, **fields).train(0, 9)), expected(split, 0, 9, **fields))


@every_loader
@pytest.mark.parametrize(
    "fields",
    [
        {"mixup": 0.4},
        {"cutmix": 1.0},
        {"mixup": 1.0, "cutmix": 1.0, "cutout": 4, "pad_mode": "reflect"},
        {"mixup": 0.4, "batch_size": 50},  # one step spans more than two epochs
        {"cutmix": 1.0, "batch_size": 12, "rank": 1, "world_size": 3},
    ],
    ids=str,
)
def test_images_and_labels_are_mixed_with_their_neighbours(loader: str, fields: dict[str, Any]) -> None:
    split, fields = noise(), {**fields, "classes": CLASSES}
    batches = list(make(loader, split, **fields).train(0, 9))
    for (images, shares), (images_, shares_) in zip(batches, expected(split, 0, 9, **fields), strict=True):
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert images.dtype == shares.dtype == torch.float32
        torch.testing.assert_close(images, images_, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(shares, shares_, rtol=0, atol=1e-6)
        torch.testing.assert_close(shares.sum(1), torch.ones(len(shares)))


def test_all_loaders_mix_bit_for_bit_alike() -> None:
    split, fields = noise(), {"mixup": 0.4, "cutmix": 1.0, "cutout": 3, "classes": CLASSES}
    for dtype in (torch.float32, torch.bfloat16):
        one, *others = (list(make(name, split, dtype=dtype, **fields).train(0, 9)) for name in LOADERS)
        assert one[0][0].dtype == dtype
        for other in others:
            assert_equal(other, one)


def test_chunks_of_the_resident_loader_do_not_separate_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    split, fields = noise(), {"mixup": 1.0, "cutmix": 1.0, "classes": CLASSES}
    whole = list(make("resident", split, **fields).train(0, 9))
    monkeypatch.setattr("fastres.data.loaders.resident.CHUNK", 4)
    assert_equal(list(make("resident", split, **fields).train(0, 9)), whole)


@every_loader
def test_evaluation_is_not_augmented(loader: str) -> None:
    split = noise()
    plain = list(make(loader, split).evaluate())
    fields = {"pad_mode": "reflect", "flip": "alternating", "cutout": 5, "mixup": 1.0, "cutmix": 1.0}
    assert_equal(list(make(loader, split, **fields, classes=CLASSES).evaluate()), plain)


@every_loader
def test_folders_of_images_are_reflected_too(loader: str, tmp_path: Path) -> None:
    split = folder(write_image_folder(tmp_path, train=5, size=8)).train
    in_memory = Split(images=split.array(1), labels=split.labels)
    fields = {"pad_mode": "reflect", "pad": 3}
    assert_equal(list(make(loader, split, **fields).train(0, 4)), expected(in_memory, 0, 4, **fields))


def test_cutout_blanks_the_expected_share_of_pixels() -> None:
    """A square of 16 around a uniform pixel of 32 keeps (24/32)² of its own area on average: 36 % of 25 % is lost."""
    split = Split(images=np.full((2_000, 32, 32, 1), 200, np.uint8), labels=np.zeros(2_000, np.int64))
    fields = {"image_size": 32, "batch_size": 2_000, "pad": 0, "cutout": 16}
    ((images, _),) = make("resident", split, **fields).train(0, 1)
    blank = (images == 0).float().mean(dim=(1, 2, 3))
    # Of each side of 16, y − 8 … y + 7 within 0 … 31, the mean length inside is 16 − 2·(1 + … + 8)/32 + 8/32 = 14.
    assert float(blank.mean()) == pytest.approx((14 / 32) ** 2, abs=0.005)
    assert float(blank.max()) == 0.25 and float(blank.min()) == (8 / 32) ** 2


# ---- from the command line ----------------------------------------------------------------------------------


def test_a_run_with_every_augmentation_is_the_same_from_either_loader(tmp_path: Path) -> None:
    flags = (
        "--recipe digits --model.name resnet8 --train.steps 24 --schedule.warmup_steps 0 --engine.precision fp32 "
        "--data.pad_mode reflect --data.pad 2 "
        "--data.flip alternating --data.cutout 2 --data.mixup 0.2 --data.cutmix 1 --data.workers 1 --run.dir"
    ).split()
    weights = []
    for name, loader in (("a", "resident"), ("b", "dataloader")):
        done = run_fastres("train", *flags, tmp_path / name, "--data.loader", loader)
        assert done.returncode == 0, done.stderr
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    assert "nan" not in done.stdout


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ("--data.mixup 1 --train.batch_size 9", ("data.mixup", "9", "odd", "train.batch_size")),
        ("--data.cutmix 1 --data.augment none", ("data.cutmix", "data.augment none")),
        ("--data.pad_mode reflect --data.pad 8", ("data.pad: 8", "8x8", "smaller")),
        ("--data.flip sometimes", ("data.flip", "alternating")),
        ("--data.pad_mode black", ("data.pad_mode", "zero, reflect")),
    ],
)
def test_an_impossible_augmentation_is_rejected(flags: str, names: tuple[str, ...], tmp_path: Path) -> None:
    done = run_fastres("train", "--recipe", "digits", *flags.split(), "--run.dir", tmp_path / "run")
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    (line,) = done.stderr.strip().splitlines()
    assert not [name for name in names if name not in line], line


def test_reflect_padding_is_rejected_only_if_something_is_padded() -> None:
    flags = ["--data.pad_mode", "reflect", "--data.pad", "8", "--train.batch_size", "2"]
    with rejected("data.pad: 8"):
        build(a_source(8, 8), *flags)
    assert len(list(build(a_source(8, 8), *flags, "--data.augment", "none").train(0, 1))) == 1
