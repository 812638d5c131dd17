"""Bad files, and files that turn bad during a run: one line names them, skip_bad skips them, and nothing hangs."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastres import train
from fastres.config.cli import parse
from fastres.config.schema import DataConfig
from fastres.data.loaders.build import LOADERS
from fastres.data.sources.formats import decode
from fastres.data.sources.load import load_source
from fastres.data.sources.source import Source
from fastres.utils.errors import UsageError
from tests.commands import children, end_all, start_module, start_ranks
from tests.fixtures import coloured_noise, rejected, sha256, write_image_folder
from tests.test_loaders import make

every_loader = pytest.mark.parametrize("loader", LOADERS)
loader_of_files = pytest.mark.parametrize("loader", [name for name in LOADERS if name != "resident"])

NOISE = coloured_noise(np.zeros(1, int), 8, 1, seed=0)[0]  # (8, 8, 3) uint8


def load(root: Path, **fields: Any) -> Source:
    return load_source(DataConfig(**{"source": "imagefolder", "root": str(root), **fields}))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a folder of 8 x 8 PNGs: five cats and five dogs to train on, two of each to test.

    They are PNGs because all decoders read those alike.
    """
    return write_image_folder(tmp_path / "images", train=5, size=8, suffix=".png")


# PNGs that no library writes ----------------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(pixels: np.ndarray, *, width: int | None = None, cut: int = 0) -> bytes:
    """Return a PNG of RGB pixels, (H, W, 3) uint8 or uint16.

    `width` is a false width for the header, and `cut` the number of bytes removed from the compressed pixels.
    """
    header = struct.pack(
        ">IIBBBBB", width or pixels.shape[1], width or pixels.shape[0], 8 * pixels.itemsize, 2, 0, 0, 0
    )
    rows = zlib.compress(b"".join(b"\0" + row.astype(pixels.dtype.newbyteorder(">")).tobytes() for row in pixels))
    rows = rows[: len(rows) - cut]
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


WHOLE = png(NOISE)
DEEP = np.random.default_rng(0).integers(0, 2**16, (8, 8, 3)).astype(np.uint16)
ODD = {  # and the pixels that decoders read
    "without its end": (WHOLE[:-12], NOISE),
    "with a wrong checksum": (WHOLE[:-16] + bytes(4) + WHOLE[-12:], NOISE),
    "of sixteen bits": (png(DEEP), (DEEP >> 8).astype(np.uint8)),
}


@every_loader
@pytest.mark.parametrize("kind", ODD)
def test_every_decoder_reads_odd_pngs_alike(loader: str, kind: str, root: Path) -> None:
    content, pixels = ODD[kind]
    for path in root.rglob("*.png"):
        path.write_bytes(content)
    split = load(root, loader=loader).train
    ((images, _),) = make(loader, split, augment="none").train(0, 1)
    made = make(loader, type(split)(images=np.tile(pixels, (10, 1, 1, 1)), labels=split.labels), augment="none")
    ((expected, _),) = made.train(0, 1)
    assert torch.equal(images, expected)


@every_loader
def test_a_file_that_would_fill_the_memory_is_refused_by_name(loader: str, root: Path) -> None:
    bomb = root / "train" / "dog" / "00007.png"
    bomb.write_bytes(png(NOISE, width=30_000))
    with rejected(bomb, "exceeds limit"):
        list(make(loader, load(root, loader=loader).train).train(0, 4))


def test_a_file_that_dali_alone_cannot_decode_is_refused_by_name(root: Path) -> None:
    bad = root / "train" / "dog" / "00007.png"
    bad.write_bytes(png(NOISE, cut=4))
    assert np.array_equal(decode(bad), NOISE)
    with rejected(bad, "DALI cannot decode", "--data.loader dataloader"):
        list(make("dali", load(root, loader="dali").train).train(0, 4))


# Files, links and names --------------------------------------------------------------------------


def unreadable(path: Path) -> None:
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")


@every_loader
def test_a_file_that_may_not_be_read_is_refused_by_name(loader: str, root: Path) -> None:
    secret = root / "train" / "dog" / "00007.png"
    unreadable(secret)
    with rejected(f"cannot read the image {secret}: Permission denied; "):
        list(make(loader, load(root, loader=loader).train).train(0, 4))


def test_a_folder_that_may_not_be_read_is_refused_by_name(root: Path) -> None:
    unreadable(root / "train" / "dog")
    with rejected(root / "train" / "dog", "Permission denied"):
        load(root)


@every_loader
@pytest.mark.parametrize(
    "name", ["schön, mit Leerzeichen.png", "two\nlines.png", "not \udcff unicode.png", "[bold].png"]
)
def test_a_bad_file_of_any_name_is_named(loader: str, name: str, root: Path) -> None:
    bad = root / "train" / "dog" / name
    bad.write_bytes(b"text")
    with pytest.raises(UsageError) as caught:
        list(make(loader, load(root, loader=loader).train, workers=1).train(0, 4))
    assert f"cannot read the image {bad}: " in str(caught.value)
    assert "Traceback" not in str(caught.value)


# Skipped on request ------------------------------------------------------------------------


def broken_files(folder: Path) -> dict[str, str]:
    """Write bad files of every kind, and return the reason reported for each."""
    (folder / "b0 empty.png").write_bytes(b"")
    (folder / "b1 text.jpg").write_bytes(b"not an image")
    (folder / "b2 truncated.png").write_bytes(WHOLE[: len(WHOLE) // 2])
    Image.fromarray(NOISE).save(folder / "b3 truncated.jpg")
    os.truncate(folder / "b3 truncated.jpg", 600)
    (folder / "b4 bomb.png").write_bytes(png(NOISE, width=30_000))
    (folder / "b5 nowhere.png").symlink_to("there is none.png")
    (folder / "b6 loop.png").symlink_to("b6 loop.png")
    Image.new("RGB", (9, 5)).save(folder / "b7 size.png")
    return {
        "b0 empty.png": "it is empty",
        "b1 text.jpg": "cannot identify image file",
        "b2 truncated.png": "image file is truncated",
        "b3 truncated.jpg": "Truncated File Read",
        "b4 bomb.png": "Image size (900000000 pixels) exceeds limit of",
        "b5 nowhere.png": "No such file or directory",
        "b6 loop.png": "Too many levels of symbolic links",
        "b7 size.png": "9x5 pixels, most have 8x8",
    }


def odd_files(folder: Path) -> set[str]:
    """Write good files of every kind, and return their names."""
    grey = NOISE[..., 0]
    kinds = {
        "grey.png": Image.fromarray(grey),
        "grey of sixteen bits.png": Image.fromarray(grey.astype(np.uint16) * 256),
        "palette.png": Image.fromarray(NOISE).quantize(16),
        "alpha.png": Image.fromarray(np.dstack([NOISE, grey])),
        "grey with alpha.png": Image.fromarray(np.dstack([grey, grey])),
        "cmyk.jpg": Image.fromarray(NOISE).convert("CMYK"),
        "grey.jpg": Image.fromarray(grey),
        "ein Füchslein.png": Image.fromarray(NOISE),
    }
    for name, image in kinds.items():
        image.save(folder / name)
    (folder / "deep.png").write_bytes(png(DEEP))
    return {*kinds, "deep.png"}


def test_bad_files_are_skipped_counted_and_named(root: Path, tmp_path: Path) -> None:
    folder, store = root / "train" / "cat", tmp_path / "store"
    good = odd_files(folder) | {f"{number:05}.png" for number in range(5)}
    reasons = broken_files(folder)
    source = load(root, loader="dataloader", skip_bad=True, cache=str(store))
    assert {path.name for path in source.train.paths if path.parent == folder} == good
    assert source.train.labels.tolist() == [0] * len(good) + [1] * 5 and len(source.test) == 4

    (note,) = source.notes
    total = len(good) + len(reasons) + 5
    assert note.startswith(
        f"8 of the {total} images of {root / 'train'} are left out: cat/b0 empty.png (it is empty), "
    )
    assert " and 5 more; all are listed in " in note and "\n" not in note
    listed = Path(note.partition("all are listed in ")[2]).read_text().splitlines()
    assert len(listed) == 8 and listed[0] in note and listed[2] in note and listed[3] not in note
    for line, (name, reason) in zip(listed, reasons.items(), strict=True):
        assert line.startswith(f"cat/{name} ({reason}") and str(root) not in line


def test_up_to_three_bad_files_are_all_named(root: Path) -> None:
    for number in range(3):
        (root / "test" / "dog" / f"bad{number}.png").write_bytes(b"")
    (note,) = load(root, loader="dataloader", skip_bad=True).notes
    assert note.count("(it is empty)") == 3 and "more" not in note


def test_without_bad_files_nothing_is_reported(root: Path) -> None:
    assert load(root, loader="dataloader", skip_bad=True).notes == ()


def test_the_bad_files_found_are_remembered(root: Path, tmp_path: Path) -> None:
    bad, fields = (
        root / "train" / "cat" / "00002.png",
        {"loader": "dali", "skip_bad": True, "cache": str(tmp_path / "s")},
    )
    good = bad.read_bytes()
    bad.write_bytes(bytes(len(good)))
    status = bad.stat()
    first = load(root, **fields)
    assert bad not in first.train.paths and len(first.train) == 9
    bad.write_bytes(good)
    os.utime(bad, ns=(status.st_atime_ns, status.st_mtime_ns))  # only decoding it shows a difference
    second = load(root, **fields)
    assert second.train.paths == first.train.paths and second.notes == first.notes
    bad.touch()
    assert len(load(root, **fields).train) == 10


@pytest.mark.parametrize("content", [b"", b"{", b"[1]"])
def test_a_damaged_list_of_bad_files_is_rebuilt(content: bytes, root: Path, tmp_path: Path) -> None:
    fields = {"loader": "dali", "skip_bad": True, "cache": str(tmp_path / "s")}
    (root / "train" / "cat" / "00002.png").write_bytes(b"")
    first = load(root, **fields)
    (found,) = (tmp_path / "s").glob("train-*.sizes")
    found.write_bytes(content)
    assert load(root, **fields).train.paths == first.train.paths


@pytest.mark.parametrize("loader", ["resident", "dataloader"])
def test_bad_files_are_skipped_even_if_nothing_can_be_cached(loader: str, root: Path, tmp_path: Path) -> None:
    (root / "train" / "cat" / "00002.png").write_bytes(b"")
    (tmp_path / "file").write_text("")
    source = load(root, loader=loader, skip_bad=True, cache=str(tmp_path / "file"))
    assert len(source.train) == 9 and source.train.array(2).shape == (9, 8, 8, 3)
    not_kept, left_out = source.notes
    assert "decoded images cannot be stored" in not_kept and "File exists" in not_kept
    assert left_out.endswith("are left out: cat/00002.png (it is empty)")  # and there is no list


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_class_without_a_good_file_is_refused_by_name(part: str, root: Path) -> None:
    for path in (root / part / "dog").iterdir():
        path.write_bytes(b"")
    with rejected(root / part / "dog", "no usable image", "it is empty"):
        load(root, skip_bad=True)


def test_the_most_common_size_of_training_images_counts(root: Path) -> None:
    for name in ("train/cat/00000", "train/dog/00009", "test/cat/00000", "test/dog/00003"):
        Image.new("RGB", (7, 7)).save(root / f"{name}.png")
    source = load(root, skip_bad=True)
    assert source.train.array(1).shape == (8, 8, 8, 3) and source.test.array(1).shape == (2, 8, 8, 3)
    resized = load(root, skip_bad=True, loader="dali", augment="resized_crop", image_size=8)
    assert (len(resized.train), len(resized.test), resized.notes) == (10, 4, ())
    for path in (root / "test").rglob("*.png"):  # the test set is not the training set
        Image.new("RGB", (7, 7)).save(path)
    with rejected(root / "test" / "cat", "7x7 pixels, most have 8x8"):
        load(root, skip_bad=True)


def test_only_image_folders_skip_files() -> None:
    with rejected("data.skip_bad", "--data.source imagefolder"):
        parse(["--recipe", "digits", "--data.skip_bad", "true"])


# Whole runs --------------------------------------------------------------------------------------

TINY = (
    "--data.source imagefolder --model.name cifar_resnet --model.options.blocks_per_stage 1 --engine.compile false "
    "--engine.precision fp32 --train.batch_size 4 --train.eval_every 1000000 --train.log_every 1"
).split()


def test_every_loader_skips_the_same_files(root: Path, tmp_path: Path) -> None:
    broken_files(root / "train" / "cat")
    broken_files(root / "test" / "dog")
    hashes = set()
    for loader in LOADERS:
        run, place = (tmp_path / loader, ["--data.root", str(root), "--data.loader", loader, "--data.skip_bad", "true"])
        assert train.main([*TINY, *place, "--train.steps", "5", "--run.dir", str(run)]) == 0
        hashes.add(sha256(run / "model.safetensors"))
    assert len(hashes) == 1


class Started:
    """A training run in its own processes that has begun to train and would never end."""

    def __init__(self, root: Path, folder: Path, *flags: str, processes: int = 0) -> None:
        self.folder, self.out, self.err = folder, folder.with_suffix(".out"), folder.with_suffix(".err")
        steps = [] if "--train.steps" in flags else ["--train.steps", "1000000"]
        command = ["fastres.train", *TINY, *steps, *flags, "--data.root", root, "--run.dir", folder]
        if processes:
            self.processes = start_ranks(processes, *command, stdout=self.out, stderr=self.err)
        else:
            self.processes = [start_module(*command, stdout=self.out, stderr=self.err)]
        self.wait_for_step(8)
        self.workers = [pid for process in self.processes for pid in children(process.pid)]

    def wait_for_step(self, step: int) -> None:
        log, deadline = self.folder / "metrics.jsonl", time.monotonic() + 240
        while not log.exists() or log.read_text().count("\n") < step:
            assert self.processes[0].poll() is None, self.err.read_text()
            assert time.monotonic() < deadline, self.err.read_text()
            time.sleep(0.02)

    def end(self) -> int:
        """Wait until all processes of the run have ended, and return the exit status."""
        status = end_all(self.processes)
        deadline = time.monotonic() + 120
        while alive := [pid for pid in self.workers if Path(f"/proc/{pid}").exists()]:
            assert time.monotonic() < deadline, alive
            time.sleep(0.05)
        return status

    def line(self) -> str:
        """Return the single line that the run printed on stderr."""
        line = self.err.read_text()
        assert line.startswith("fastres: error: ") and line.count("\n") == 1, line
        return line


@pytest.fixture
def started(root: Path, tmp_path: Path) -> Iterator[Callable[..., Started]]:
    """Start runs, and end the processes that a failed test leaves."""
    runs: list[Started] = []

    def start(*flags: str, **options: Any) -> Started:
        runs.append(Started(root, tmp_path / "run", *flags, **options))
        return runs[-1]

    yield start
    for run in runs:
        for process in run.processes:
            process.kill()
        for pid in run.workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def replace(path: Path, image: Image.Image) -> None:
    """Replace the file atomically, so that a reader finds either the old file or the new one."""
    new = path.with_name(f".{path.name}")
    image.save(new)
    new.replace(path)


TURNS: dict[str, tuple[Callable[[Path], object], str]] = {  # how a file turns bad, and the text that reports it
    "deleted": (Path.unlink, "No such file or directory"),
    "truncated": (lambda path: os.truncate(path, 60), "truncated"),
    "of another size": (lambda path: replace(path, Image.new("RGB", (9, 5))), "has 9x5 pixels, others 8x8"),
}


@loader_of_files
@pytest.mark.parametrize("turn", TURNS)
def test_a_file_that_turns_bad_while_it_is_used_is_named(loader: str, turn: str, root: Path) -> None:
    change, said = TURNS[turn]
    victim = root / "train" / "dog" / "00007.png"
    batches = make(loader, load(root, loader=loader).train, workers=1).train(0, 1_000)
    for _ in range(4):  # it has been read twice
        next(batches)
    change(victim)
    with rejected(victim, said):
        for _ in batches:
            pass
    assert not multiprocessing.active_children()  # a worker left to the garbage collector delays others


@pytest.mark.parametrize(
    ("loader", "turn", "file"),
    [
        ("dataloader", "deleted", "train/dog/00007.png"),
        ("dali", "of another size", "train/dog/00007.png"),
        ("dataloader", "truncated", "test/dog/00003.png"),  # during an evaluation
    ],
)
def test_a_run_whose_files_turn_bad_ends_with_one_line_and_status_1(
    loader: str, turn: str, file: str, root: Path, started: Callable[..., Started]
) -> None:
    evaluating = ["--train.eval_every", "10"] if file.startswith("test") else []
    run = started("--data.loader", loader, *evaluating)
    change, said = TURNS[turn]
    change(root / file)
    assert run.end() == 1
    assert str(root / file) in run.line() and said in run.line()


def test_the_resident_loader_does_not_notice_files_that_turn_bad(root: Path, started: Callable[..., Started]) -> None:
    run = started("--data.loader", "resident", "--train.steps", "300", "--run.checkpoint_every", "1000000")
    for path, (change, _) in zip(sorted((root / "train").rglob("*.png")), TURNS.values(), strict=False):
        change(path)
    assert run.processes[0].poll() is None, "too late to show anything"
    assert run.end() == 0, run.err.read_text()


# Processes ---------------------------------------------------------------------------------------


def test_a_killed_worker_is_an_error_of_the_next_batch_and_of_nothing_else(root: Path) -> None:
    batches = make("dataloader", load(root, loader="dataloader").train, workers=2).train(0, 1_000)
    next(batches)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    for _ in range(100):  # just as a step or a checkpoint would continue
        time.sleep(0.01)
    with rejected("a worker process of the dataloader was killed by SIGKILL", "--data.workers"):
        for _ in batches:
            pass


def test_a_killed_worker_ends_the_run_with_one_line(started: Callable[..., Started]) -> None:
    run = started("--data.loader", "dataloader", "--data.workers", "2")
    assert len(run.workers) == 2
    os.kill(run.workers[0], signal.SIGKILL)
    assert run.end() == 1
    assert "a worker process of the dataloader was killed by SIGKILL" in run.line()


def test_workers_end_when_their_run_is_killed(started: Callable[..., Started]) -> None:
    run = started("--data.loader", "dataloader", "--data.workers", "2")
    assert len(run.workers) == 2
    run.processes[0].kill()
    assert run.end() == -signal.SIGKILL


def test_neither_of_two_processes_waits_for_one_whose_file_turns_bad(
    root: Path, started: Callable[..., Started]
) -> None:
    run = started("--data.loader", "dataloader", "--data.workers", "1", processes=2)
    assert len(run.workers) == 2  # each process has one
    victim = root / "train" / "dog" / "00007.png"
    victim.write_bytes(b"text")
    assert run.end() != 0
    assert re.search(rf"fastres: error: rank [01]: cannot read the image {victim}: ", run.err.read_text())


def test_two_processes_skip_the_same_files(root: Path, tmp_path: Path, started: Callable[..., Started]) -> None:
    broken_files(root / "train" / "cat")
    run = started(
        "--data.skip_bad", "true", "--data.cache", str(tmp_path / "store"), "--train.steps", "20", processes=2
    )
    assert run.end() == 0, run.err.read_text()
    assert run.out.read_text().count("8 of the 18 images of") == 1
