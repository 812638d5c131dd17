"""fastres/data/sources/ returns complete, verified data sets, or fails with a one-line reason."""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import os
import pickle
import shutil
import socket
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
from PIL import Image, ImageOps
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torchvision.datasets import CIFAR10, MNIST, ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from fastres.config.schema import DataConfig
from fastres.data.sources import torchvision_sets
from fastres.data.sources.download import extract, fetch
from fastres.data.sources.formats import decode, encoded, read_pickle, size_or_reason
from fastres.data.sources.load import SOURCES, load_source
from fastres.data.sources.source import NORMALIZATION, Source, Split, hold_out, normalization
from tests.fixtures import (
    CIFAR10_CLASSES,
    Creates,
    cifar_batch,
    rejected,
    write_cifar10,
    write_cifar100,
    write_idx,
    write_image_folder,
    write_mnist_idx,
    write_pickle,
    write_turned,
)


def load(source: Any, root: Path, **fields: Any) -> Source:
    """Load a source; an image folder as files, which every loader except the resident one uses."""
    options = {"source": source, "root": str(root), "download": False, "loader": "dataloader", **fields}
    return load_source(DataConfig(**options))


def assert_sound(split: Split, count: int, shape: tuple[int, ...], classes: int) -> None:
    images = split.array(workers=2)
    assert images.shape == (count, *shape) and images.dtype == np.uint8 and images.flags.writeable
    assert split.labels.shape == (count,) and split.labels.dtype == np.int64
    assert split.labels.min() >= 0 and split.labels.max() < classes
    assert len(split) == count and split.channels == shape[2]
    assert np.array_equal(split.image(count - 1), images[count - 1])


# Built-in sets ----------------------------------------------------------------------


def test_every_source_of_the_config_can_be_loaded() -> None:
    assert set(SOURCES) == set(get_args(get_type_hints(DataConfig)["source"]))


def test_digits_are_scaled_and_stratified(tmp_path: Path) -> None:
    digits = load("digits", tmp_path)
    assert_sound(digits.train, 1437, (8, 8, 1), 10)
    assert_sound(digits.test, 360, (8, 8, 1), 10)
    assert digits.train.array(1).max() == 255 and digits.notes == ()
    train, test = np.bincount(digits.train.labels), np.bincount(digits.test.labels)
    assert np.abs(test - (train + test) * 360 / 1797).max() <= 1
    known, labels = load_digits(return_X_y=True)
    _, test_of_sklearn = train_test_split(np.arange(1797), test_size=360, stratify=labels, random_state=0)
    assert np.array_equal(digits.test.labels, labels[np.sort(test_of_sklearn)])
    assert np.array_equal(
        digits.test.array(1), np.rint(known[np.sort(test_of_sklearn)] * (255 / 16)).reshape(-1, 8, 8, 1)
    )
    again = load("digits", tmp_path)
    assert np.array_equal(digits.test.array(1), again.test.array(1))


def test_synthetic_is_balanced_deterministic_and_learnable(tmp_path: Path) -> None:
    source = load("synthetic", tmp_path, synthetic_samples=200, image_size=20)
    assert_sound(source.train, 200, (20, 20, 3), 10)
    assert_sound(source.test, 50, (20, 20, 3), 10)
    assert set(np.bincount(source.train.labels)) == {20} and set(np.bincount(source.test.labels)) == {5}
    again = load("synthetic", tmp_path, synthetic_samples=200, image_size=20)
    assert np.array_equal(source.train.array(1), again.train.array(1))

    train, test = (split.array(1).reshape(len(split), -1).astype(float) for split in (source.train, source.test))
    means = np.stack([train[source.train.labels == label].mean(axis=0) for label in range(10)])
    nearest = ((test[:, None] - means) ** 2).sum(axis=2).argmin(axis=1)
    assert (nearest == source.test.labels).all()
    assert load("synthetic", tmp_path, synthetic_samples=1).train.image(0).shape == (32, 32, 3)


# CIFAR -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 4, 5])  # 2 is the published one
def test_cifar10_is_read_as_pickle_reads_it(tmp_path: Path, protocol: int) -> None:
    folder = write_cifar10(tmp_path, train=20, test=5, protocol=protocol)
    source = load("cifar10", tmp_path)
    assert_sound(source.train, 20, (32, 32, 3), 10)
    assert_sound(source.test, 5, (32, 32, 3), 10)
    assert source.classes == CIFAR10_CLASSES
    batch = pickle.loads((folder / "data_batch_2").read_bytes())
    planes = source.train.array(1)[4:8].transpose(0, 3, 1, 2)
    assert np.array_equal(planes.reshape(4, -1), batch["data"])
    assert source.train.labels[4:8].tolist() == batch["labels"]
    assert source.notes == tuple(
        f"cifar10 under {tmp_path} has {note}"
        for note in ("20 training images; the published set has 50,000", "5 test images; the published set has 10,000")
    )


def test_cifar10_as_python_2_pickled_it(tmp_path: Path) -> None:
    folder = write_cifar10(tmp_path, train=5, test=1)
    expected = load("cifar10", tmp_path).test.array(1)
    pixels = pickle.loads((folder / "test_batch").read_bytes())["data"].tobytes()
    text = b"T" + len(pixels).to_bytes(4, "little") + pixels  # BINSTRING: Python 2's str
    (folder / "test_batch").write_bytes(
        b"\x80\x02}(U\x04data" + b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR"
        b"(K\x01K\x01M\x00\x0c\x86cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xff"
        b"J\xff\xff\xff\xffK\x00tb\x89" + text + b"tbU\x06labels](K\x00eu."
    )
    assert np.array_equal(load("cifar10", tmp_path).test.array(1), expected)


def test_cifar100_has_its_fine_labels(tmp_path: Path) -> None:
    write_cifar100(tmp_path, train=200, test=100)
    source = load("cifar100", tmp_path)
    assert_sound(source.train, 200, (32, 32, 3), 100)
    assert len(source.classes) == 100 and set(source.test.labels) == set(range(100))
    assert source.mean == NORMALIZATION["cifar100"][0]


def test_nothing_in_a_cifar_file_is_executed(tmp_path: Path) -> None:
    folder, witness = write_cifar10(tmp_path), tmp_path / "witness"
    write_pickle(folder / "data_batch_3", {"data": Creates(witness), "labels": []})
    pickle.loads((folder / "data_batch_3").read_bytes()).clear()
    assert witness.exists()  # a plain load would execute it
    witness.unlink()
    with rejected(folder / "data_batch_3", "io.open", "--data.root"):
        load("cifar10", tmp_path)
    assert not witness.exists()


@pytest.mark.parametrize("target", [os.system, eval, getattr, np.load, np.memmap, functools.partial, MNIST])
def test_a_pickle_may_name_nothing_but_arrays(tmp_path: Path, target: Any) -> None:
    write_pickle(tmp_path / "file", {"data": target})
    with rejected(tmp_path / "file", target.__name__):
        read_pickle(tmp_path / "file")


@pytest.mark.parametrize("dtype", ["O", "f8", "V8", "S8", "u1,O"])
def test_a_pickle_may_hold_no_arrays_but_of_whole_numbers(tmp_path: Path, dtype: str) -> None:
    write_pickle(tmp_path / "file", {"data": np.zeros(4, dtype)})
    with rejected(tmp_path / "file", "not of whole numbers"):
        read_pickle(tmp_path / "file")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("dtype", ["u1", "<i8", ">i4"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_of_whole_numbers_are_read_as_numpy_reads_them(
    tmp_path: Path, protocol: int, dtype: str, order: Any
) -> None:
    array = np.arange(6).reshape(2, 3).astype(dtype, order=order)
    write_pickle(tmp_path / "file", {"array": array, "numbers": [array[1, 2], 7]}, protocol)
    content = read_pickle(tmp_path / "file")
    assert np.array_equal(content["array"], array) and content["array"].dtype == array.dtype
    assert content["numbers"] == [5, 7]


def bad_batch(**fields: Any) -> dict[str, Any]:
    return {**cifar_batch(4, 10, "labels", 0), **fields}


BAD_BATCHES = {
    "labels are missing": bad_batch(labels=None),
    "labels are too few": bad_batch(labels=[0, 1, 2]),
    "labels are out of range": bad_batch(labels=[0, 1, 2, 10]),
    "labels are negative": bad_batch(labels=[0, 1, 2, -1]),
    "labels are enormous": bad_batch(labels=[0, 1, 2, 10**30]),
    "labels are fractions": bad_batch(labels=[0.5] * 4),
    "rows are short": bad_batch(data=np.zeros((4, 3071), np.uint8)),
    "rows are floats": bad_batch(data=np.zeros((4, 3072), np.float32)),
    "rows are a list": bad_batch(data=[[0] * 3072] * 4),
    "rows are none": bad_batch(data=np.zeros((0, 3072), np.uint8), labels=[]),
    "rows are a number": bad_batch(data=np.uint8(4)),
    "is a list": [1, 2, 3],
}


@pytest.mark.parametrize("content", BAD_BATCHES.values(), ids=BAD_BATCHES)
def test_a_bad_cifar_batch_is_refused(tmp_path: Path, content: Any) -> None:
    folder = write_cifar10(tmp_path)
    write_pickle(folder / "data_batch_4", content)
    with rejected(folder / "data_batch_4", "Delete it", "--data.root", "--data.mirror", "--recipe digits"):
        load("cifar10", tmp_path)


@pytest.mark.parametrize("name", ["data_batch_1", "test_batch", "batches.meta"])
@pytest.mark.parametrize("keep", [0, 1, 20], ids="{} bytes".format)
def test_a_truncated_cifar_file_is_refused(tmp_path: Path, name: str, keep: int) -> None:
    path = write_cifar10(tmp_path) / name
    path.write_bytes(path.read_bytes()[:keep])
    with rejected(path, "Delete it"):
        load("cifar10", tmp_path)


# MNIST -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize(("source", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_mnist_reads_idx_files_plain_or_gz(tmp_path: Path, source: str, folder: str, packed: bool) -> None:
    raw = write_mnist_idx(tmp_path, name=folder, train=30, test=12, packed=packed)
    data = load(source, tmp_path)
    assert_sound(data.train, 30, (28, 28, 1), 10)
    assert_sound(data.test, 12, (28, 28, 1), 10)
    path = raw / ("train-images-idx3-ubyte" + ".gz" * packed)
    content = gzip.decompress(path.read_bytes()) if packed else path.read_bytes()
    assert data.train.array(1).tobytes() == content[16:]
    assert len(data.classes) == 10 and len(data.notes) == 2


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
@pytest.mark.parametrize("keep", [0, 6, 17], ids="{} bytes".format)
def test_a_truncated_idx_file_is_refused(tmp_path: Path, name: str, keep: int, packed: bool) -> None:
    path = write_mnist_idx(tmp_path, packed=packed) / (name + ".gz" * packed)
    path.write_bytes(path.read_bytes()[:keep])
    with rejected(path, "Delete it", "--data.root", "--recipe digits"):
        load("mnist", tmp_path)


BAD_LABELS = {"too few": np.zeros(511), "out of range": np.full(512, 10), "images": np.zeros((512, 28, 28))}


@pytest.mark.parametrize("labels", BAD_LABELS.values(), ids=BAD_LABELS)
def test_labels_that_do_not_fit_the_images_are_refused(tmp_path: Path, labels: np.ndarray) -> None:
    path = write_mnist_idx(tmp_path) / "train-labels-idx1-ubyte"
    write_idx(path, labels)
    with rejected(path):
        load("mnist", tmp_path)


def test_idx_images_of_another_size_or_with_a_tail_are_refused(tmp_path: Path) -> None:
    path = write_mnist_idx(tmp_path) / "t10k-images-idx3-ubyte"
    good = path.read_bytes()
    for content in (good + b"\0", good[:-1]):
        path.write_bytes(content)
        with rejected(path, "announces 100,352 bytes"):
            load("mnist", tmp_path)
    write_idx(path, np.zeros((128, 32, 32)))
    with rejected(path, "28x28"):
        load("mnist", tmp_path)


# Folders of images -------------------------------------------------------------------------------


@pytest.mark.parametrize("held", ["test", "val"])
@pytest.mark.parametrize("suffix", [".jpg", ".JPEG", ".Png"])
def test_image_folder_is_sorted_by_class_and_file(tmp_path: Path, held: str, suffix: str) -> None:
    classes = ("zebra", "Ährenfeld", "white cat")
    write_image_folder(tmp_path, classes=classes, held=held, suffix=suffix)
    (tmp_path / "train" / "zebra" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / "zebra" / "._00000.jpg").write_text("a Mac's shadow of one")
    source = load("imagefolder", tmp_path)
    assert source.classes == ("white cat", "zebra", "Ährenfeld")
    assert_sound(source.train, 12, (32, 32, 3), 3)
    assert_sound(source.test, 6, (32, 32, 3), 3)
    assert source.train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert [path.parent.name for path in source.train.paths] == ["white cat"] * 4 + ["zebra"] * 4 + ["Ährenfeld"] * 4
    assert all(a < b for a, b in zip(source.train.paths, source.train.paths[1:], strict=False) if a.parent == b.parent)


def test_val_is_for_the_curve_and_test_for_the_result(tmp_path: Path) -> None:
    write_image_folder(tmp_path, held="val")
    assert len(load("imagefolder", tmp_path).test) == 4 and load("imagefolder", tmp_path).validation is None
    write_image_folder(tmp_path, held="test", test=3)
    source = load("imagefolder", tmp_path)
    assert source.validation is not None and len(source.validation) == 4 and len(source.test) == 6
    assert source.notes == (f"{tmp_path}: val/ is for the curve, test/ for the result",)


def test_class_folders_alone_are_divided_by_a_fixed_seed(tmp_path: Path) -> None:
    """One tenth of each class is for the test set, at least one image; a single image is for training."""
    write_image_folder(tmp_path, classes=("ant", "bee"), train=20, test=1)
    (tmp_path / "train" / "cat").mkdir()
    (tmp_path / "test" / "ant" / "00000.jpg").rename(tmp_path / "train" / "cat" / "only.jpg")
    for kind in ("ant", "bee", "cat"):
        (tmp_path / "train" / kind).rename(tmp_path / kind)
    (tmp_path / "train").rmdir()
    shutil.rmtree(tmp_path / "test")
    source = load("imagefolder", tmp_path)
    assert source.classes == ("ant", "bee", "cat")
    assert np.bincount(source.train.labels).tolist() == [18, 18, 1]
    assert np.bincount(source.test.labels).tolist() == [2, 2]
    assert not set(source.train.paths) & set(source.test.paths)
    assert load("imagefolder", tmp_path).test.paths == source.test.paths
    (note,) = source.notes
    assert "4 of 41 images are the test set, 10% of each class by seed 5000" in note
    resident = load("imagefolder", tmp_path, loader="resident")
    assert np.array_equal(resident.test.array(1), source.test.array(1))
    assert np.array_equal(resident.train.array(1), source.train.array(1))


@pytest.mark.parametrize("suffix", [".jpeg", ".PNG", ".webp", ".gif", ".bmp", ".tif", ".ppm", ".tga", ".jp2", ".ico"])
def test_every_format_that_pillow_decodes_is_an_image_at_any_depth(tmp_path: Path, suffix: str) -> None:
    root = write_image_folder(tmp_path / "images")
    deep = root / "train" / "cat" / "2024" / "may"
    deep.mkdir(parents=True)
    Image.new("RGB", (32, 32), "red").save(deep / f"photo{suffix}")
    source = load("imagefolder", root)
    assert deep / f"photo{suffix}" in source.train.paths and len(source.train) == 9 and source.notes == ()


def test_folders_are_read_as_torchvision_reads_them(tmp_path: Path) -> None:
    classes = ["ant", "Bee", "10", "9", "über ant", "a.b", "with\nline", "-dash", "$x_{", "犬"]
    names = [
        *(f"1{suffix}" for suffix in IMG_EXTENSIONS), "UPPER.JPG", "Mixed.JpEg", "two.dots.png", "not.jpg.txt", "notes",
        "sp ace.png", " .png", "ümläut.png", "10.png", "9.png", "-rf.png", "a\nb.png", "%s.png", "犬.png",
        "x" * 200 + ".png", "deep/1.png", "deep/deeper/UP.PNG", "deep.jpg/in a folder named as a file.png", "png",
    ]  # fmt: skip
    for part in ("train", "test"):
        for name in classes:
            for file in names:
                path = tmp_path / part / name / file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(b"nobody decodes it here")
        (tmp_path / part / "outside of a class.png").touch()
        (tmp_path / "elsewhere" / part).mkdir(parents=True)
        (tmp_path / "elsewhere" / part / "linked.png").touch()
        (tmp_path / part / "ant/link").symlink_to(tmp_path / "elsewhere" / part)
        (tmp_path / part / "ant/link.png").symlink_to(tmp_path / "elsewhere" / part / "linked.png")
        (tmp_path / part / "linked class").symlink_to(tmp_path / "elsewhere" / part)

    source = load("imagefolder", tmp_path)
    for part, split in (("train", source.train), ("test", source.test)):
        theirs = ImageFolder(tmp_path / part)
        assert list(source.classes) == theirs.classes and len(theirs.classes) == len(classes) + 1
        ours = [(str(path), label) for path, label in zip(split.paths, split.labels.tolist(), strict=True)]
        assert sorted(ours) == sorted(theirs.samples) and len(ours) > 250


def test_files_that_are_left_out_are_counted_by_kind(tmp_path: Path) -> None:
    root = write_image_folder(tmp_path / "images")
    (root / "train" / "cat" / "sub").mkdir()
    for name in ("cat/notes.txt", "cat/sub/more.txt", "dog/README", "dog/.DS_Store", "dog/figure.eps"):
        (root / "train" / name).write_text("text")
    (note,) = load("imagefolder", root).notes
    assert note == (
        f"5 files under {root} are left out, because their names are not those of images: 2 .txt, 1 hidden, "
        "1 without a suffix, …"
    )


def test_a_missing_part_of_an_image_folder_is_named(tmp_path: Path) -> None:
    root = tmp_path / "images"
    with rejected(f"data.root: no folder {root}; it must hold"):
        load("imagefolder", root)
    root.mkdir()
    with rejected("train", root):
        load("imagefolder", root)
    (root / "train").mkdir()
    with rejected("test (or val)", root):
        load("imagefolder", root)
    (root / "test").mkdir()
    with rejected("no class folders", root / "train"):
        load("imagefolder", root)
    (root / "train" / "cat").mkdir()
    with rejected("no images in", root / "train" / "cat"):
        load("imagefolder", root)
    write_image_folder(root, classes=("cat", "dog"))
    write_image_folder(root, classes=("wolf",), train=0)
    with rejected(root / "test" / "wolf", root / "train"):
        load("imagefolder", root)


def test_links_are_followed_and_those_that_lead_out_are_reported(tmp_path: Path) -> None:
    root = write_image_folder(tmp_path / "images")
    (root / "train" / "cat" / "again.jpg").symlink_to(root / "train" / "cat" / "00000.jpg")
    source = load("imagefolder", root)
    assert len(source.train) == 9 and source.notes == ()
    outside = write_image_folder(tmp_path / "outside")
    for link, target, count in (("cat/link.jpg", "train/cat/00000.jpg", 10), ("lynx", "train/cat", 13)):
        (root / "train" / link).symlink_to(outside / target)
        source = load("imagefolder", root)
        assert len(source.train) == count
        (note,) = source.notes
        assert note.startswith(f"1 links lead out of {root} and are followed; the first is {root / 'train' / link}")
        assert note.endswith(str(outside / target))
        (root / "train" / link).unlink()
    (root / "train" / "cat" / "loop.jpg").symlink_to("loop.jpg")
    with rejected("loop.jpg", root):
        load("imagefolder", root)
    (root / "train" / "cat" / "loop.jpg").unlink()
    (root / "train" / "cat" / "upwards").symlink_to("..")  # a folder in a class is no class
    (root / "train" / "cat" / "upwards.jpg").symlink_to("..")
    (tmp_path / "alias").symlink_to(root)  # the data folder itself may be a link
    assert len(load("imagefolder", tmp_path / "alias").train) == 9


LINKS = {  # each link and its target; the first one is named
    "to nothing": {"train/cat/link.jpg": "nothing.jpg"},
    "to itself": {"train/cat/link.jpg": "link.jpg"},
    "to each other": {"train/cat/link.jpg": "other.jpg", "train/cat/other.jpg": "link.jpg"},
    "of a class to nothing": {"train/lynx": "nothing"},
    "of classes to each other": {"test/lynx": "ocelot", "test/ocelot": "lynx"},
    "of a class to its parent": {"train/lynx": "."},
    "of the part to itself": {"val": "val"},
}


@pytest.mark.parametrize("links", LINKS)
def test_links_that_lead_to_no_image_are_refused_by_name(tmp_path: Path, links: str) -> None:
    root = write_image_folder(tmp_path / "images")
    for name, target in LINKS[links].items():
        (root / name).symlink_to(target)
    named = root / next(iter(LINKS[links]))
    if links == "of the part to itself":  # it is no image, but another file is
        assert len(load("imagefolder", root).test) == 4
        (root / "test").rename(root / "elsewhere")
        named = "test (or val)"
    with rejected(named):
        load("imagefolder", root)


GREY16 = Image.fromarray(np.full((6, 5), 0xABCD, np.uint16))
PALETTE = Image.new("P", (5, 6), 1)
PALETTE.putpalette([0, 0, 0, 10, 20, 30])
MODES: dict[str, tuple[Image.Image, dict[str, Any], tuple[int, int, int]]] = {  # with the resulting colour
    "rgb.jpg": (Image.new("RGB", (5, 6), (0, 0, 0)), {}, (0, 0, 0)),
    "grey.jpg": (Image.new("L", (5, 6), 128), {}, (128, 128, 128)),
    "cmyk.jpg": (Image.new("CMYK", (5, 6), (0, 0, 0, 0)), {}, (255, 255, 255)),
    "bits.png": (Image.new("1", (5, 6), 1), {}, (255, 255, 255)),
    "grey16.png": (GREY16, {}, (0xAB, 0xAB, 0xAB)),
    "grey-alpha.png": (Image.new("LA", (5, 6), (77, 9)), {}, (77, 77, 77)),
    "alpha.png": (Image.new("RGBA", (5, 6), (1, 2, 3, 4)), {}, (1, 2, 3)),
    "palette.png": (PALETTE, {}, (10, 20, 30)),
    "palette-alpha.png": (PALETTE, {"transparency": b"\x00\x80"}, (10, 20, 30)),
    "palette-key.png": (PALETTE, {"transparency": 1}, (10, 20, 30)),
    "progressive.jpg": (Image.new("RGB", (5, 6), (255, 255, 255)), {"progressive": True}, (255, 255, 255)),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", MODES)
def test_every_mode_of_image_becomes_rgb(tmp_path: Path, name: str) -> None:
    image, options, colour = MODES[name]
    image.save(tmp_path / name, **options)
    pixels = decode(tmp_path / name)
    assert pixels.shape == (6, 5, 3) and pixels.dtype == np.uint8
    assert (pixels == colour).all()


# EXIF --------------------------------------------------------------------------------------------

NOISE = np.random.default_rng(0).integers(0, 256, (6, 5, 3), np.uint8)
TURNED: dict[str, tuple[Image.Image, dict[str, Any]]] = {  # six high and five wide, without any symmetry
    "rgb.png": (Image.fromarray(NOISE), {}),
    "rgb.jpg": (Image.fromarray(NOISE), {}),
    "grey.jpg": (Image.fromarray(NOISE[..., 0]), {}),
    "cmyk.jpg": (Image.fromarray(NOISE).convert("CMYK"), {}),
    "rgb.webp": (Image.fromarray(NOISE), {"lossless": True}),
    "rgb.tif": (Image.fromarray(NOISE), {}),
    "rgb.avif": (Image.fromarray(NOISE), {}),
    "grey16.png": (Image.fromarray(NOISE[..., 0].astype(np.uint16) * 256 + 7), {}),
    "palette-key.png": (Image.fromarray(NOISE).quantize(16), {"transparency": 1}),
}


def as_pillow_says(path: Path, turned: bool) -> np.ndarray:
    with Image.open(path) as image:
        image.load()
        upright = ImageOps.exif_transpose(image) if turned else image
        if upright.mode.startswith("I"):  # 16 bits
            return np.repeat((np.array(upright) >> 8).astype(np.uint8)[..., None], 3, axis=2)
        return np.array(upright.convert("RGBA").convert("RGB"))


@pytest.mark.parametrize("name", TURNED)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_orientation_of_exif_is_applied_on_request_only(tmp_path: Path, name: str, orientation: int) -> None:
    upright, options = TURNED[name]
    path = write_turned(tmp_path / name, upright, orientation, **options)
    for exif in (False, True):
        pixels = decode(path, exif=exif)
        assert np.array_equal(pixels, as_pillow_says(path, exif))
        assert size_or_reason(path, exif=exif) == pixels.shape[:2]
        data, size, as_it_is = encoded(path, exif=exif)
        assert np.array_equal(np.array(Image.open(io.BytesIO(data.tobytes())).convert("RGB")), pixels)
        assert size == pixels.shape[:2]
        plain = name in ("rgb.png", "rgb.jpg", "grey.jpg")
        assert as_it_is == (plain and (orientation == 1 or not exif))
    assert np.array_equal(decode(path), decode(path, exif=False))
    assert decode(path, exif=True).shape == (6, 5, 3)
    if name in ("rgb.png", "rgb.webp", "rgb.tif"):
        assert np.array_equal(decode(path, exif=True), NOISE)


def exif_of(*entries: bytes) -> bytes:
    """Return EXIF in little-endian order with these entries of 12 bytes."""
    return b"Exif\0\0II*\0\x08\0\0\0" + len(entries).to_bytes(2, "little") + b"".join(entries) + bytes(4)


ORIENTATION_6 = bytes.fromhex("1201 0300 01000000 06000000")
ODD_EXIF: dict[str, tuple[dict[str, Any], bool]] = {  # how it is saved, and whether it turns the image
    "of XMP": ({"xmp": b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'}, True),
    "beside a value that cannot be written again": (
        {"exif": exif_of(ORIENTATION_6, bytes.fromhex("2801 0200 04000000 61626300"))},
        True,
    ),
    "out of range": ({"exif": exif_of(ORIENTATION_6.replace(b"\x06", b"\x09"))}, False),
    "of text": ({"exif": exif_of(bytes.fromhex("1201 0200 02000000 36000000"))}, False),
    "cut short": ({"exif": exif_of(ORIENTATION_6)[:20]}, False),
    "no EXIF": ({"exif": b"Exif\0\0nothing of the kind"}, False),
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data", "ignore:Truncated File Read")
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
@pytest.mark.parametrize("odd", ODD_EXIF)
def test_an_odd_exif_turns_an_image_or_leaves_it_as_it_is(tmp_path: Path, odd: str, suffix: str) -> None:
    options, turned = ODD_EXIF[odd]
    path = tmp_path / f"photo{suffix}"
    Image.fromarray(NOISE).save(path, **options)
    plain = as_pillow_says(path, False)
    turned = turned and not (suffix == ".png" and "xmp" in options)  # Pillow writes no XMP into a PNG
    assert np.array_equal(decode(path, exif=True), np.rot90(plain, -1) if turned else plain)
    data, _, as_it_is = encoded(path, exif=True)
    assert np.array_equal(np.array(Image.open(io.BytesIO(data.tobytes()))), decode(path, exif=True))
    assert as_it_is == (suffix != ".webp" and not turned)


@pytest.mark.parametrize("exif", [False, True])
def test_the_splits_of_a_folder_have_the_size_of_upright_images(tmp_path: Path, exif: bool) -> None:
    """skip_bad keeps the files of the most common size, of the stored or the upright images."""
    photo = Image.fromarray(NOISE)
    for part in ("train", "test"):
        for kind in ("cat", "dog"):
            for number in range(4):
                write_turned(tmp_path / part / kind / f"{number}.png", photo, 6)
            photo.transpose(Image.Transpose.ROTATE_90).save(tmp_path / part / kind / "stored.png")
    store = str(tmp_path / "store")
    source = load("imagefolder", tmp_path, exif=exif, skip_bad=True, cache=store, image_size=32)
    assert len(source.train) == (8 if exif else 10)
    height, width = (6, 5) if exif else (5, 6)
    first, second = hold_out(source.train, 3)
    resident = load("imagefolder", tmp_path, exif=exif, skip_bad=True, cache=store, loader="resident")
    assert np.array_equal(source.train.array(1), resident.train.images)
    for split in (source.train, source.test, first, second, resident.test):
        assert split.exif is exif
        assert np.array_equal(split.sized_image(0, height, width), split.array(1)[0])
        assert np.array_equal(split.image(0), NOISE if exif else np.rot90(NOISE))
    with rejected(source.train.paths[2], f"{width}x{height}", "9x9"):
        source.train.sized_image(2, 9, 9)


# Damaged files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
@pytest.mark.parametrize("damage", ["empty", "truncated", "text", "folder"])
def test_an_unreadable_image_is_refused_by_name(tmp_path: Path, suffix: str, damage: str) -> None:
    source = load("imagefolder", write_image_folder(tmp_path, size=64, suffix=suffix))
    path = source.train.paths[5]
    content = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    else:
        path.write_bytes({"empty": b"", "truncated": content[: len(content) // 2], "text": b"hello"}[damage])
    with rejected(path):
        source.train.image(5)
    with rejected(path, "it is empty" if damage == "empty" else path):
        source.train.array(workers=2)


def test_postscript_is_not_run_for_an_image(tmp_path: Path) -> None:
    path = tmp_path / "image.jpg"
    Image.new("RGB", (5, 6)).save(path, format="EPS")
    with rejected(path, "cannot identify"):
        decode(path)


@pytest.mark.parametrize("asked", [None, 32])
def test_unequal_sizes_name_the_file_both_sizes_and_the_remedy(asked: int | None, tmp_path: Path) -> None:
    source = load("imagefolder", write_image_folder(tmp_path, train=300), image_size=asked)
    for index in (590, 280, 400):
        Image.new("RGB", (30, 20)).save(source.train.paths[index])
    remedy = f"--data.loader dataloader (or dali) --data.augment resized_crop --data.image_size {asked or 224}"
    with rejected(source.train.paths[280], "30x20", "32x32", remedy):
        source.train.array(workers=2)
    with rejected(source.train.paths[280], "30x20", "32x32", remedy):
        source.train.subset(np.array([0, 280])).sized_image(1, 32, 32)
    with rejected("30x20", "32x32", remedy):
        load("imagefolder", tmp_path, image_size=asked, loader="resident")
    assert source.train.image(280).shape == (20, 30, 3)


# Downloads ---------------------------------------------------------------------------------------


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """Run a web server of `folder` on this machine; yield its URL."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(autouse=True)
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bypass any proxy of this machine for 127.0.0.1."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def dead() -> str:
    """Return the URL of a server that does not run."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_archive(path: Path) -> Path:
    """Write a tar archive of a small CIFAR-10, laid out as the published one."""
    folder = write_cifar10(path.parent / "unpacked", train=10, test=5)
    with tarfile.open(path, "w:gz") as tar:
        tar.add(folder, folder.name)
    return path


def test_fetch_brings_a_file_over_http_and_file(tmp_path: Path) -> None:
    original = tmp_path / "served" / "file.bin"
    original.parent.mkdir()
    original.write_bytes(os.urandom(3_000_000))
    with serving(original.parent) as url:
        for number, base in enumerate((url, original.parent.as_uri())):
            path = tmp_path / f"new folder {number}" / "file.bin"
            fetch(f"{base}/file.bin", path, md5(original))
            assert path.read_bytes() == original.read_bytes()
            assert list(path.parent.iterdir()) == [path]


def test_a_wrong_checksum_leaves_nothing_behind(tmp_path: Path) -> None:
    original, path = tmp_path / "original", tmp_path / "new" / "file"
    original.write_bytes(b"not what was published")
    with rejected(original.as_uri(), md5(original), "0" * 32, "22 bytes", "--data.mirror"):
        fetch(original.as_uri(), path, "0" * 32)
    assert list(path.parent.iterdir()) == []
    path.write_text("an older file")
    with rejected(original.as_uri()):
        fetch(original.as_uri(), path, "0" * 32)
    assert path.read_text() == "an older file" and len(list(path.parent.iterdir())) == 1


def test_cifar_is_downloaded_from_a_mirror_once(tmp_path: Path) -> None:
    archive = write_archive(tmp_path / CIFAR10.filename)
    published = type("Published", (CIFAR10,), {"tgz_md5": md5(archive)})
    root = tmp_path / "data"
    with serving(tmp_path) as url:
        config = DataConfig(root=str(root), mirror=url + "/")
        first = torchvision_sets.read_cifar("cifar10", published, "labels", config)
    second = torchvision_sets.read_cifar("cifar10", published, "labels", config)  # the server is gone
    assert len(first.train) == len(second.train) == 10
    assert sorted(path.name for path in root.iterdir()) == ["cifar-10-batches-py", archive.name]
    assert len(list((root / "cifar-10-batches-py").iterdir())) == 7

    (root / "cifar-10-batches-py" / "data_batch_2").unlink()  # the archive restores the lost file
    config = DataConfig(root=str(root), download=False)
    assert len(torchvision_sets.read_cifar("cifar10", published, "labels", config).train) == 10


def test_mnist_comes_from_the_first_server_that_answers(tmp_path: Path, dead: str) -> None:
    raw = write_mnist_idx(tmp_path / "served", train=20, test=10, packed=True)
    resources = [(file, md5(raw / file)) for file, _ in MNIST.resources]
    with serving(raw) as url:
        published = type("MNIST", (), {"resources": resources, "mirrors": [dead + "/", url + "/"]})
        config = DataConfig(root=str(tmp_path / "data"))
        loaded = torchvision_sets.read_mnist("mnist", published, tuple("0123456789"), config)
    assert len(loaded.train) == 20
    brought = {path.name for path in (tmp_path / "data" / "MNIST" / "raw").iterdir()}
    assert brought == {path.name for path in raw.iterdir()}


@pytest.mark.parametrize("source", ["cifar10", "cifar100", "mnist", "fashion_mnist"])
def test_a_mirror_with_another_file_is_refused(tmp_path: Path, source: str) -> None:
    served = tmp_path / "served"
    served.mkdir()
    for name in ("cifar-10-python.tar.gz", "cifar-100-python.tar.gz", "train-images-idx3-ubyte.gz"):
        (served / name).write_bytes(b"something else")
    with rejected("wrong checksum", md5(served / name), served.as_uri()):
        load(source, tmp_path / "data", download=True, mirror=served.as_uri())
    assert not [path for path in (tmp_path / "data").rglob("*") if path.is_file()]


@pytest.mark.parametrize("source", ["cifar10", "cifar100", "mnist", "fashion_mnist"])
def test_a_failed_download_is_one_line(tmp_path: Path, source: str, dead: str) -> None:
    root = tmp_path / "data"
    remedies = ("--data.root", "--data.mirror", "--recipe digits")
    with rejected(source, root, dead, "Connection refused", *remedies):
        load(source, root, download=True, mirror=dead)
    with serving(tmp_path) as url, rejected(source, root, url, "404", *remedies):
        load(source, root, download=True, mirror=url)
    with rejected(source, root, tmp_path.as_uri(), "No such file", *remedies):
        load(source, root, download=True, mirror=tmp_path.as_uri())
    with rejected(source, root, "--data.download is false", *remedies):
        load(source, root)
    with rejected("ftp://example.org", "it must begin with http:, https: or file:"):
        load(source, root, download=True, mirror="ftp://example.org")
    assert not root.exists()


def test_a_root_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file where the folder should be")
    write_archive(tmp_path / CIFAR10.filename)
    with rejected("cifar10", tmp_path / "data", "--data.root"):
        load("cifar10", tmp_path / "data", download=True, mirror=tmp_path.as_uri())


def test_an_archive_cannot_write_outside_its_folder(tmp_path: Path) -> None:
    archive = tmp_path / "archive.tar.gz"
    (tmp_path / "payload").write_text("payload")
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "payload", "../../escaped")
    folder = tmp_path / "a" / "cifar-10-batches-py"
    with rejected(archive, folder):
        extract(archive, md5(archive), folder, ["test_batch"])
    assert not list(tmp_path.rglob("escaped")) and list(folder.iterdir()) == []


def test_an_archive_already_there_is_checked(tmp_path: Path) -> None:
    (tmp_path / CIFAR10.filename).write_bytes(b"half a downl")
    with rejected(tmp_path / CIFAR10.filename, CIFAR10.tgz_md5, "delete it"):
        load("cifar10", tmp_path, download=True, mirror=tmp_path.as_uri())


# Splits ------------------------------------------------------------------------------------------


def numbered(count: int) -> Split:
    """Return images in which every pixel is the image's index."""
    images = np.arange(count, dtype=np.uint8)[:, None, None, None].repeat(3, axis=3)
    return Split(images=images, labels=np.arange(count))


def test_held_out_samples_are_the_same_in_every_run_and_in_no_other_split() -> None:
    train, held = hold_out(numbered(100), 30)
    again = hold_out(numbered(100), 30)[1]
    assert len(train) == 70 and len(held) == 30
    assert held.labels.tolist() == again.labels.tolist()
    assert sorted([*train.labels, *held.labels]) == list(range(100))
    for split in (train, held):
        assert (np.diff(split.labels) > 0).all()
        assert np.array_equal(split.array(1)[:, 0, 0, 0], split.labels)
    assert held.labels[:5].tolist() == [2, 8, 11, 12, 18]  # otherwise validation figures would not be comparable


def test_image_paths_are_held_out_likewise(tmp_path: Path) -> None:
    split = load("imagefolder", write_image_folder(tmp_path, train=5)).train
    train, held = hold_out(split, 3)
    assert sorted([*train.paths, *held.paths]) == sorted(split.paths)
    for part in (train, held):
        assert [path.parent.name for path in part.paths] == [("cat", "dog")[label] for label in part.labels]


@pytest.mark.parametrize("n", [100, 101])
def test_holding_out_everything_is_refused(n: int) -> None:
    with rejected(f"data.validation: {n} must be below the 100 images"):
        hold_out(numbered(100), n)


def test_normalization_is_the_exact_mean_and_deviation() -> None:
    images = np.random.default_rng(0).integers(0, 256, (3000, 4, 5, 3), np.uint8)
    images[..., 2] = 51
    mean, std = normalization(Split(images=images, labels=np.zeros(3000, np.int64)))
    pixels = images.astype(np.float64) / 255
    assert mean == pytest.approx(pixels.mean(axis=(0, 1, 2)), abs=1e-12)
    assert std[:2] == pytest.approx(pixels.std(axis=(0, 1, 2))[:2], abs=1e-12)
    assert std[2] == 1.0  # a constant channel is not divided by zero
