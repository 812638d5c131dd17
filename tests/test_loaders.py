"""Every loader keeps the contract of fastres/data/__init__.py: all yield the same batches."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastres.config.cli import parse
from fastres.config.schema import DataConfig
from fastres.data.loaders import dali, resident
from fastres.data.loaders.build import LOADERS, Loader, build_loader
from fastres.data.sampling import SampleOrder
from fastres.data.sources.imagefolder import imagefolder
from fastres.data.sources.source import Source, Split
from fastres.data.spec import IGNORED, BatchSpec
from tests.fixtures import rejected, write_image_folder, write_turned

MEAN, STD = (0.49, 0.1, 0.3), (0.25, 0.5, 0.1)
Batches = list[tuple[Tensor, Tensor]]

every_loader = pytest.mark.parametrize("loader", LOADERS)
resizing_loader = pytest.mark.parametrize("loader", [name for name in LOADERS if name != "resident"])


def noise(n: int = 21, size: int = 8, channels: int = 3) -> Split:
    """Return images of noise, so that no two crops are alike."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n, size, size, channels), np.uint8)
    return Split(images=images, labels=rng.integers(0, 10, n))


def spec(channels: int = 3, **fields: Any) -> BatchSpec:
    defaults: dict[str, Any] = {
        "batch_size": 6,
        "eval_batch_size": 8,
        "seed": 3,
        "mean": MEAN[:channels],
        "std": STD[:channels],
        "image_size": 8,
        "augment": "crop",
        "pad": 2,
        "flip": True,
        "workers": 0,
        "device": torch.device("cpu"),
        "dtype": torch.float32,
    }
    return BatchSpec(**{**defaults, **fields})


def make(loader: str, split: Split, **fields: Any) -> Loader:
    return LOADERS[loader](split, spec(split.channels, **fields))


def normalized(images: np.ndarray, channels: int) -> Tensor:
    """Normalise pixel by pixel: (n, H, W, C) uint8 -> (n, C, H, W) float32."""
    f = np.float32
    mean, std = (np.array(v[:channels], f) * f(255) for v in (MEAN, STD))
    return torch.from_numpy((images.astype(f) - mean) / std).permute(0, 3, 1, 2)


def expected(split: Split, first: int, last: int, **fields: Any) -> Batches:
    """Return the batches of steps [first, last), computed by numpy one sample at a time."""
    s = spec(split.channels, **fields)
    pad, size = s.pad if s.augment == "crop" else 0, s.image_size
    order = SampleOrder(
        n=len(split), batch=s.batch_size, seed=s.seed, rank=s.rank, world_size=s.world_size, pad=pad,
        flip=s.flip and s.augment != "none",
    )  # fmt: skip
    batches = []
    for step in range(first, last):
        samples, images = order.samples(step, step + 1), []
        for index, dy, dx, flip in zip(samples.index, samples.dy, samples.dx, samples.flip, strict=True):
            canvas = np.zeros((size + 2 * pad, size + 2 * pad, split.channels), np.uint8)
            canvas[pad : pad + size, pad : pad + size] = split.image(int(index))
            crop = canvas[dy : dy + size, dx : dx + size]
            images.append(crop[:, ::-1] if flip else crop)
        labels = torch.from_numpy(split.labels[samples.index])
        batches.append((normalized(np.stack(images), split.channels), labels))
    return batches


def assert_equal(batches: Batches, reference: Batches) -> None:
    assert len(batches) == len(reference)
    for (images, labels), (images_, labels_) in zip(batches, reference, strict=True):
        assert torch.equal(images, images_) and torch.equal(labels, labels_)


# ---- training -----------------------------------------------------------------------------------------------


@every_loader
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"flip": False},
        {"pad": 0},
        {"augment": "none"},  # neither is applied, whatever pad and flip are
        {"batch_size": 50},  # one step spans more than two epochs
        {"rank": 1, "world_size": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("channels", [3, 1])
def test_batches_are_cropped_flipped_and_normalised(loader: str, fields: dict[str, Any], channels: int) -> None:
    split = noise(channels=channels)
    batches = list(make(loader, split, **fields).train(0, 9))  # epochs end within steps 3 and 6
    assert_equal(batches, expected(split, 0, 9, **fields))
    for images, labels in batches:
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert images.dtype == torch.float32 and labels.dtype == torch.int64


@every_loader
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision_is_rounded_once(loader: str, dtype: torch.dtype) -> None:
    split = noise()
    reference = [(images.to(dtype), labels) for images, labels in expected(split, 0, 4)]
    assert_equal(list(make(loader, split, dtype=dtype).train(0, 4)), reference)


@every_loader
def test_an_epoch_has_every_sample_once_with_its_label(loader: str) -> None:
    n = 24
    pixels = np.arange(n, dtype=np.uint8)[:, None, None, None] * 10 + 10  # the sample's number; padding is 0
    split = Split(images=np.tile(pixels, (1, 8, 8, 3)), labels=(np.arange(n) * 7) % 10)
    for epoch in range(2):
        seen: list[int] = []
        for images, labels in make(loader, split).train(epoch * 4, epoch * 4 + 4):
            bytes_ = images[:, 0].amax(dim=(1, 2)) * STD[0] * 255 + MEAN[0] * 255
            numbers = ((bytes_ - 10) / 10).round().long()
            assert torch.equal(labels, numbers * 7 % 10)
            seen += numbers.tolist()
        assert sorted(seen) == list(range(n))
        assert seen != sorted(seen)


@every_loader
def test_the_seed_and_nothing_else_decides(loader: str) -> None:
    split = noise()
    once = list(make(loader, split).train(0, 5))
    torch.manual_seed(1)
    np.random.default_rng(1)
    assert_equal(list(make(loader, split).train(0, 5)), once)
    other = list(make(loader, split, seed=4).train(0, 5))
    assert not any(torch.equal(a, b) for (a, _), (b, _) in zip(once, other, strict=True))


@every_loader
def test_a_run_that_starts_at_step_k_has_the_batches_of_one_that_reaches_it(loader: str) -> None:
    split = noise()
    whole, made = list(make(loader, split).train(0, 11)), make(loader, split)
    assert_equal(list(made.train(5, 11)), whole[5:])  # in the middle of an epoch
    assert_equal(list(made.train(0, 5)), whole[:5])  # a loader can be iterated again
    assert list(made.train(4, 4)) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_change_nothing(workers: int) -> None:
    split = noise()
    made = make("dataloader", split, workers=workers)
    assert_equal(list(made.train(2, 9)), expected(split, 2, 9))
    assert_equal(list(made.evaluate()), list(make("dataloader", split).evaluate()))


def test_blocks_and_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    split = noise()
    monkeypatch.setattr(resident, "CHUNK", 5)
    monkeypatch.setattr(resident, "BLOCK_BYTES", 2 * 6 * 3 * 8 * 8 * 4)  # two steps
    assert_equal(list(make("resident", split).train(1, 8)), expected(split, 1, 8))


# ---- evaluation ---------------------------------------------------------------------------------------------


@every_loader
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(("n", "eval_batch_size"), [(21, 8), (16, 8), (2, 2), (5, 100), (7, 1)])
def test_evaluation_has_every_sample_exactly_once(loader: str, world_size: int, n: int, eval_batch_size: int) -> None:
    split = noise(n)
    of_ranks = [
        list(make(loader, split, eval_batch_size=eval_batch_size, rank=rank, world_size=world_size).evaluate())
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in of_ranks}) == 1  # a process with one more step would wait forever
    assert {len(labels) for batches in of_ranks for _, labels in batches} == {-(-eval_batch_size // world_size)}
    whole = normalized(split.array(1), 3)
    found = []
    for images, labels in (batch for batches in of_ranks for batch in batches):
        assert images.shape == (len(labels), 3, 8, 8) and images.isfinite().all()
        assert images.is_contiguous(memory_format=torch.channels_last)
        for image, label in zip(images, labels.tolist(), strict=True):
            if label != IGNORED:
                (index,) = (i for i in range(n) if torch.equal(whole[i], image))  # unchanged: no crop, no flip
                assert label == split.labels[index]
                found.append(index)
    assert sorted(found) == list(range(n))


# ---- folders of images --------------------------------------------------------------------------------------


def folder(root: Path, **fields: Any) -> Source:
    """Return a folder's splits as files, which every loader accepts."""
    return imagefolder(DataConfig(source="imagefolder", root=str(root), loader="dataloader", **fields))


@every_loader
def test_all_loaders_read_a_folder_of_images_alike(loader: str, tmp_path: Path) -> None:
    split = folder(write_image_folder(tmp_path, train=5, size=8)).train
    assert split.images is None
    in_memory = Split(images=split.array(1), labels=split.labels)
    assert_equal(list(make(loader, split).train(0, 4)), expected(in_memory, 0, 4))
    assert_equal(list(make(loader, split).evaluate()), list(make(loader, in_memory).evaluate()))


def consume(loader: str, split: Split, **fields: Any) -> None:
    """Consume two epochs and an evaluation."""
    made = make(loader, split, **fields)
    for _ in made.train(0, 2 * len(split)):
        pass
    for _ in made.evaluate():
        pass


@every_loader
@pytest.mark.parametrize("workers", [0, 1])
def test_images_of_unequal_size_are_refused_by_name(loader: str, workers: int, tmp_path: Path) -> None:
    odd = write_image_folder(tmp_path, size=8) / "train" / "dog" / "00005.jpg"
    Image.new("RGB", (12, 9)).save(odd)
    split = folder(tmp_path).train
    assert odd in split.paths[1:]
    with rejected(odd, "12x9", "8x8", "resized_crop"):
        consume(loader, split, workers=workers)


@every_loader
@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_decoded_is_refused_by_name(loader: str, workers: int, tmp_path: Path) -> None:
    bad = write_image_folder(tmp_path, size=8) / "train" / "dog" / "00005.jpg"
    bad.write_bytes(bad.read_bytes()[:100])
    with rejected(bad, "cannot read the image"):
        consume(loader, folder(tmp_path).train, workers=workers)


@resizing_loader
def test_resized_crop_takes_images_of_any_size(loader: str, tmp_path: Path) -> None:
    colours = {"cat": (250, 0, 0), "dog": (0, 0, 250)}
    for part in ("train", "test"):
        for kind, colour in colours.items():
            (tmp_path / part / kind).mkdir(parents=True)
            for number, size in enumerate(((40, 20), (9, 33), (16, 16))):
                Image.new("RGB", size, colour).save(tmp_path / part / kind / f"{number}.png")
    split = folder(tmp_path).train
    fields = {"augment": "resized_crop", "image_size": 16}
    made = make(loader, split, **fields)
    for batches in (list(made.train(0, 3)), list(made.evaluate())):
        for images, labels in batches:
            assert images.shape == (len(labels), 3, 16, 16)
            assert images.is_contiguous(memory_format=torch.channels_last)
            for image, label in zip(images, labels.tolist(), strict=True):
                if label != IGNORED:  # every crop of a one-coloured image has that colour; nothing is black
                    colour = np.array(list(colours.values())[label], np.uint8)
                    whole = normalized(np.tile(colour, (1, 16, 16, 1)), 3)[0]
                    assert torch.allclose(image, whole)
    assert sum(int((labels != IGNORED).sum()) for _, labels in made.evaluate()) == len(split)


@resizing_loader
def test_resized_crop_is_drawn_per_sample_and_epoch_and_repeats(loader: str) -> None:  # of six equal images
    split = Split(images=np.repeat(noise(1, size=64).array(1), 6, axis=0), labels=np.zeros(6, np.int64))
    fields = {"augment": "resized_crop", "image_size": 16}
    batches = list(make(loader, split, **fields).train(0, 2))
    crops = torch.cat([images for images, _ in batches])
    assert len({crop.numpy().tobytes() for crop in crops}) == 12  # no draw is shared by a batch or by all epochs
    assert_equal(list(make(loader, split, **fields).train(1, 2)), batches[1:])


@resizing_loader
def test_evaluation_crops_the_centre(loader: str) -> None:
    rng = np.random.default_rng(0)
    half = rng.integers(0, 256, (64, 24, 3), np.uint8)
    image = np.concatenate([half, half[:, ::-1]], axis=1)  # symmetric, 64 high and 48 wide
    split = Split(images=image[None], labels=np.zeros(1, np.int64))
    made = make(loader, split, augment="resized_crop", image_size=42, eval_batch_size=1)
    ((view, _),) = made.evaluate()  # 48 is 42·256/224, so nothing is resized
    assert torch.allclose(view, normalized(image[None, 11:53, 3:45], 3), atol=0.05)
    assert torch.allclose(view, view.flip(3), atol=0.05)


# ---- two decoders --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write crops of scikit-learn's two photographs as JPEGs and return the folder.

    train/CLASS has 12 each, of unequal sizes; those of test have one size.
    """
    from sklearn.datasets import load_sample_images

    root, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for name, photograph in zip(("china", "flower"), load_sample_images().images, strict=True):
        for part, count in (("train", 12), ("test", 4)):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                h, w = rng.integers(60, 200, 2) if part == "train" else (64, 64)
                top, left = (int(rng.integers(limit - side)) for limit, side in zip((427, 640), (h, w), strict=True))
                crop = Image.fromarray(photograph[top : top + h, left : left + w])
                crop.save(root / part / name / f"{number:02}.jpg", quality=90)
    return root


@pytest.mark.parametrize(
    "fields", [{"augment": "resized_crop", "image_size": 48}, {"image_size": 64, "pad": 4}], ids=str
)
def test_dali_and_pil_see_the_same_photographs(photographs: Path, fields: dict[str, Any]) -> None:
    """They differ by rounding in the inverse DCT and in the filter of resizing: under a grey level on average."""
    source = folder(photographs)
    split = source.train if "augment" in fields else source.test
    theirs, ours = (make(loader, split, **fields) for loader in ("dataloader", "dali"))
    compared = 0
    for batches in (
        zip(theirs.train(0, 6), ours.train(0, 6), strict=True),
        zip(theirs.evaluate(), ours.evaluate(), strict=True),
    ):
        for (a, labels_a), (b, labels_b) in batches:
            assert torch.equal(labels_a, labels_b)
            levels = (a - b).abs() * torch.tensor(STD)[:, None, None] * 255
            assert levels.mean() < 1
            assert levels.quantile(0.999) < 16
            compared += len(labels_a)
    assert compared > 40


def turned_copies(root: Path, to: Path, suffix: str) -> Path:
    """Write the images below `root` to `to`, turned by every orientation of EXIF; return `to`."""
    for number, path in enumerate(sorted(root.rglob("*.*"))):
        place = to / path.relative_to(root).with_suffix(suffix)
        write_turned(place, Image.open(path), 1 + number % 8)
    return to


@every_loader
def test_every_loader_turns_images_upright(loader: str, tmp_path: Path) -> None:
    root = write_image_folder(tmp_path / "upright", train=8, size=8, suffix=".png")
    upright, split = folder(root).train, folder(turned_copies(root, tmp_path / "turned", ".png"), exif=True).train
    assert_equal(list(make(loader, split).train(0, 6)), expected(upright, 0, 6))
    assert_equal(list(make(loader, split).evaluate()), list(make(loader, upright).evaluate()))
    ignoring = folder(tmp_path / "turned").train
    ((images, _), *_), ((stored, _), *_) = (make(loader, one, augment="none").evaluate() for one in (split, ignoring))
    equal = [torch.equal(a, b) for a, b in zip(images, stored, strict=True)]
    assert len(equal) == 8 and sum(equal) == 1  # one of the eight orientations


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_crops_of_turned_photographs_are_crops_of_upright_ones(photographs: Path, suffix: str, tmp_path: Path) -> None:
    """Boxes lie in the upright image, whose sides differ from those in the header of its file."""
    fields = {"augment": "resized_crop", "image_size": 48}
    split = folder(turned_copies(photographs, tmp_path, suffix), exif=True).train
    theirs, ours = (make(loader, split, **fields) for loader in ("dataloader", "dali"))
    batches = [*theirs.train(0, 4), *theirs.evaluate()]
    if suffix == ".png":  # without loss, so the upright files have the same pixels
        upright = make("dataloader", folder(photographs).train, **fields)
        assert_equal(batches, [*upright.train(0, 4), *upright.evaluate()])
    for (a, labels_a), (b, labels_b) in zip(batches, [*ours.train(0, 4), *ours.evaluate()], strict=True):
        assert torch.equal(labels_a, labels_b)
        levels = (a - b).abs() * torch.tensor(STD)[:, None, None] * 255
        assert levels.mean() < 1 and levels.quantile(0.999) < 16


def test_dali_sees_in_rare_formats_what_pil_sees(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    grey, colours = rng.integers(0, 256, (8, 8), np.uint8), rng.integers(0, 256, (8, 8, 3), np.uint8)
    pictures = {
        "grey.png": Image.fromarray(grey),
        "palette.png": Image.fromarray(colours).quantize(16),
        "alpha.png": Image.fromarray(np.dstack([colours, grey])),
        "grey with alpha.png": Image.fromarray(np.dstack([grey, grey[::-1]])),
        "sixteen bits.png": Image.fromarray(grey.astype(np.uint16) * 256 + 77),
        "schön, mit Leerzeichen.png": Image.fromarray(colours),
        "a bitmap.png": Image.fromarray(colours),
        "cmyk.jpg": Image.fromarray(colours).convert("CMYK"),
        "grey.jpg": Image.fromarray(grey),
    }
    for part in ("train", "test"):
        (tmp_path / part / "a class").mkdir(parents=True)
        for name, picture in pictures.items():
            picture.save(tmp_path / part / "a class" / name, "BMP" if "bitmap" in name else None)
    split = folder(tmp_path).train
    fields = {"augment": "none", "batch_size": len(pictures)}
    ((theirs, _),), ((ours, _),) = (list(make(name, split, **fields).train(0, 1)) for name in ("dataloader", "dali"))
    assert (theirs - ours).abs().max() < 0.05  # a few grey levels in the JPEGs; a wrong mode would be a hundred
    assert len({image.numpy().tobytes() for image in ours}) == 5  # colours, their palette, their CMYK, grey, its JPEG


@every_loader
@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_a_damaged_file_is_named(loader: str, damage: str, photographs: Path, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(photographs, root)
    bad = root / "test" / "china" / "02.jpg"
    whole = bad.read_bytes()
    bad.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"not an image"}[damage])
    with rejected("02.jpg"):
        list(make(loader, folder(root).test, image_size=64).evaluate())


@pytest.mark.parametrize("end", ["exhausted", "closed", "failed"])
def test_dali_leaves_nothing_for_a_forked_process_to_collect(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However a run ends, it shuts its pipeline down; no other process collects it later."""
    made: list[Any] = []
    build = dali.DaliLoader._pipeline
    monkeypatch.setattr(dali.DaliLoader, "_pipeline", lambda *args: made.append(build(*args)) or made[-1])
    batches = make("dali", noise()).train(0, 3)
    next(batches)
    if end == "exhausted":
        assert len(list(batches)) == 2
    elif end == "closed":
        batches.close()
    else:
        with pytest.raises(ZeroDivisionError):
            batches.throw(ZeroDivisionError())
    assert made[0]._pipe is None


def test_without_dali_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with rejected("data.loader dali", "pip install", "--data.loader dataloader"):
        make("dali", noise())


# ---- build_loader -------------------------------------------------------------------------------------------


def build(source: Source, *flags: str, split: Split | None = None) -> Loader:
    place = {"device": torch.device("cpu"), "dtype": torch.float32}
    return build_loader(parse(["--data.workers", "0", *flags]), source, split or source.train, **place)


def a_source(height: int, width: int) -> Source:
    images = np.zeros((4, height, width, 3), np.uint8)
    split = Split(images=images, labels=np.zeros(4, np.int64))
    return Source(name="somewhere", train=split, test=split, classes=("a",), mean=MEAN, std=STD)


@every_loader
@pytest.mark.parametrize("size", [6, 12])
def test_a_part_of_another_size_than_the_training_images_is_refused(loader: str, size: int) -> None:
    test = a_source(size, size).train
    with rejected("image 0", f"{size}x{size}", "8x8"):
        build(a_source(8, 8), "--data.loader", loader, split=test)


@every_loader
def test_a_loader_is_built_as_configured(loader: str) -> None:
    flags = ["--data.loader", loader, "--train.batch_size", "2", "--data.pad", "1"]
    made = build(a_source(8, 8), *flags)
    ((images, labels),) = made.train(0, 1)
    assert images.shape == (2, 3, 8, 8) and labels.shape == (2,)
    ((images, labels),) = made.evaluate()  # one batch of all samples, not of eval_batch_size
    assert len(labels) == 4
    assert images.is_contiguous(memory_format=torch.channels_last)
    plain = build(a_source(8, 8), *flags, "--engine.channels_last", "false")
    for images, _ in (*plain.train(0, 2), *plain.evaluate()):
        assert images.stride() == (192, 64, 8, 1)
    grey = replace(a_source(8, 8), train=noise(4, channels=1), mean=MEAN[:1], std=STD[:1])
    for images, _ in build(grey, *flags, "--engine.channels_last", "false").train(0, 2):
        assert images.stride() == (64, 64, 8, 1)
    with rejected("data.pad: 8", "8x8"):
        build(a_source(8, 8), *flags[:-1], "8")
    remedy = "--data.loader dataloader (or dali) --data.augment resized_crop --data.image_size"
    with rejected("data.image_size", "16", "8x8", f"{remedy} 16"):
        build(a_source(8, 8), *flags, "--data.image_size", "16")
    with rejected("9x8", f"{remedy} 224"):
        build(a_source(8, 9), *flags)
    with rejected("9x8", f"{remedy} 16"):
        build(a_source(8, 9), *flags, "--data.image_size", "16")
