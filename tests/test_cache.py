"""fastres/data/sources/cache.py decodes a folder of images once and never returns wrong images."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import multiprocessing
import os
import pty
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from platformdirs.macos import MacOS

from fastres import train
from fastres.config.schema import DataConfig
from fastres.data.sources.formats import decode
from fastres.data.sources.load import load_source
from fastres.data.sources.source import Source, Split, hold_out
from fastres.utils import progress
from fastres.utils.process import console_log
from fastres_kernels.user_cache import user_cache
from tests.commands import users_environment
from tests.fixtures import rejected, write_image_folder, write_turned


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_image_folder(tmp_path / "images", train=5, size=8)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Return the cache folder; the code under test creates it."""
    return tmp_path / "new" / "store"


def load(root: Path, store: Path, **fields: Any) -> Source:
    return load_source(DataConfig(**{"source": "imagefolder", "root": str(root), "cache": str(store), **fields}))


def kept(store: Path, part: str, suffix: str) -> Path:
    """Return the only file of that kind."""
    (path,) = store.glob(f"{part}-*{suffix}")
    return path


def pixels(root: Path, part: str) -> np.ndarray:
    """Decode every image of a part and return the pixels."""
    return np.stack([decode(path) for path in sorted((root / part).rglob("*.jpg"))])


def assert_right(source: Source, root: Path) -> None:
    for split, part in ((source.train, "train"), (source.test, "test")):
        assert isinstance(split.images, np.memmap)
        assert np.array_equal(split.images, pixels(root, part))


def replaced_unnoticed(path: Path) -> None:
    """Replace an image by another with as many bytes and the same time of change.

    Only decoding the file shows the difference.
    """
    status, before = path.stat(), decode(path)
    Image.new("RGB", (8, 8), (1, 2, 3)).save(path, format="BMP")
    content = path.read_bytes().ljust(status.st_size, b"\0")
    assert len(content) == status.st_size
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert not np.array_equal(decode(path), before)


# The cached files ------------------------------------------------------------------------------------


def test_images_are_decoded_once_and_mapped(root: Path, store: Path) -> None:
    first = load(root, store)
    assert_right(first, root)
    assert first.notes == (f"images are decoded once, into {store}, and later runs read them from there",)
    for part, count in (("train", 10), ("test", 4)):
        array, about = kept(store, part, ".npy"), json.loads(kept(store, part, ".json").read_text())
        assert np.array_equal(np.load(array, mmap_mode="r"), pixels(root, part))
        assert about["sha256"] == hashlib.sha256(array.read_bytes()).hexdigest()
        assert about["shape"] == [count, 8, 8, 3] and about["folder"] == str(root / part)
    assert {path.suffix for path in store.iterdir()} == {".npy", ".json", ".lock"}

    old = pixels(root, "train")
    replaced_unnoticed(sorted((root / "train").rglob("*.jpg"))[3])
    second = load(root, store)
    assert np.array_equal(second.train.images, old) and second.notes == ()


def test_writing_to_loaded_images_does_not_change_the_cache(root: Path, store: Path) -> None:
    """The array looks writable to torch, so nothing stops a write."""
    source = load(root, store)
    source.train.images[:] = 0
    again = load(root, store)
    assert_right(again, root)
    assert again.notes == ()


def test_other_loaders_cache_nothing(root: Path, store: Path) -> None:
    source = load(root, store, loader="dataloader")
    assert source.train.images is None and len(source.train.paths) == 10 and not store.exists()


def test_mapped_images_can_be_held_out_as_files_can(root: Path, store: Path) -> None:
    mapped = hold_out(load(root, store).train, 4)
    files = hold_out(load(root, store, loader="dataloader").train, 4)
    for a, b in zip(mapped, files, strict=True):
        assert np.array_equal(a.images, b.array(2)) and np.array_equal(a.labels, b.labels)
        assert a.array(2) is a.images


def test_a_run_from_the_cache_has_the_weights_of_one_without(root: Path, tmp_path: Path) -> None:
    (tmp_path / "a file").write_text("")
    flags = ("--data.source imagefolder --train.steps 3 --train.batch_size 4 --engine.compile false "
             "--engine.precision fp32 --model.name cifar_resnet --model.options.blocks_per_stage 1")  # fmt: skip
    hashes = []
    for number, where in enumerate(("a folder", "a folder", "a file")):  # made, found, and unavailable
        run, place = (tmp_path / f"run {number}", ["--data.cache", str(tmp_path / where), "--data.root", str(root)])
        assert train.main([*flags.split(), *place, "--run.dir", str(run)]) == 0
        hashes.append(hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest())
    assert hashes[0] == hashes[1] == hashes[2]


@pytest.mark.parametrize("home", ["XDG_CACHE_HOME", "HOME"])
def test_the_cache_is_in_the_users_cache_folder(
    home: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv(home, str(tmp_path / "home"))
    load_source(DataConfig(source="imagefolder", root=str(root)))
    assert kept(tmp_path / "home" / ("fastres" if home != "HOME" else ".cache/fastres"), "train", ".npy")


def test_the_cache_of_an_earlier_version_stays_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On macOS the user's caches are in ~/Library/Caches, where earlier versions did not put theirs."""
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("platformdirs.user_cache_path", lambda name: MacOS(name).user_cache_path)
    assert user_cache() == tmp_path / "Library/Caches/fastres"
    (tmp_path / ".cache/fastres").mkdir(parents=True)
    assert user_cache() == tmp_path / ".cache/fastres"


def test_without_a_home_folder_there_is_no_cache(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "~")  # what the expansion of ~ is for a user without a home
    assert_in_memory(load_source(DataConfig(source="imagefolder", root=str(root))), root, "home directory")


# When it is rebuilt ----------------------------------------------------------------------------

CHANGES: dict[str, Callable[[Path, Path], object]] = {  # (a file, its class)
    "added": lambda file, of_class: shutil.copy(file, of_class / "new.jpg"),
    "removed": lambda file, of_class: file.unlink(),
    "renamed": lambda file, of_class: file.rename(of_class / "00002 again.jpg"),  # its path stays the same
    "moved": lambda file, of_class: file.rename(of_class.parent / "dog" / "zzz.jpg"),
    "replaced": lambda file, of_class: Image.new("RGB", (8, 8), (9, 9, 9)).save(file),
    "touched": lambda file, of_class: os.utime(file, ns=(1, 1)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_folder_that_has_changed_is_decoded_again(change: str, root: Path, store: Path) -> None:
    load(root, store)
    CHANGES[change](root / "train" / "cat" / "00002.jpg", root / "train" / "cat")
    again = load(root, store)
    assert_right(again, root)
    assert len(again.notes) == 1
    assert kept(store, "train", ".npy")  # it replaces the older one
    assert load(root, store).notes == ()


def test_upright_images_are_kept_apart_from_those_as_stored(root: Path, store: Path) -> None:
    photo = root / "train" / "cat" / "00002.jpg"
    write_turned(photo, Image.open(photo), 6)
    stored, upright = decode(photo), decode(photo, exif=True)
    assert not np.array_equal(stored, upright)
    for exif, made in ((False, 1), (False, 0), (True, 1), (True, 0), (False, 1)):
        source = load(root, store, exif=exif)
        assert np.array_equal(source.train.images[2], upright if exif else stored) and len(source.notes) == made


@pytest.mark.parametrize("first", [False, True])
def test_sizes_of_upright_images_are_kept_apart_from_those_as_stored(first: bool, root: Path, store: Path) -> None:
    wide = root / "train" / "cat" / "00002.jpg"
    write_turned(wide, Image.open(wide).resize((8, 6)), 6)
    for exif in (first, not first, first):
        (note,) = load(root, store, exif=exif, skip_bad=True, loader="dataloader").notes
        assert ("8x6 pixels" if exif else "6x8 pixels") in note


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "array: a bit flipped": (".npy", flip_a_bit),
    "array: cut short": (".npy", lambda path: path.write_bytes(path.read_bytes()[:-1])),
    "array: with a tail": (".npy", lambda path: path.write_bytes(path.read_bytes() + b"\0")),
    "array: empty": (".npy", lambda path: path.write_bytes(b"")),
    "array: gone": (".npy", Path.unlink),
    "description: cut short": (".json", lambda path: path.write_bytes(path.read_bytes()[:-1])),
    "description: empty": (".json", lambda path: path.write_bytes(b"")),
    "description: gone": (".json", Path.unlink),
    "description: not text": (".json", lambda path: path.write_bytes(b"\xff\xfe")),
    "description: a list": (".json", lambda path: path.write_text("[1]")),
    "description: without a checksum": (".json", lambda path: path.write_text(without(path, "sha256"))),
    "description: without a shape": (".json", lambda path: path.write_text(without(path, "shape"))),
}


def without(path: Path, key: str) -> str:
    content = json.loads(path.read_text())
    del content[key]
    return json.dumps(content)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_rebuilt(damage: str, root: Path, store: Path) -> None:
    load(root, store)
    suffix, hurt = DAMAGES[damage]
    hurt(kept(store, "train", suffix))
    again = load(root, store)
    assert_right(again, root)
    assert len(again.notes) == 1 and load(root, store).notes == ()


def test_an_array_beside_the_description_of_another_does_not_count(root: Path, store: Path) -> None:
    """A process killed between the two writes leaves such a pair."""
    load(root, store)
    array, about = kept(store, "train", ".npy"), kept(store, "train", ".json")
    old = about.read_bytes()
    Image.new("RGB", (8, 8), (9, 9, 9)).save(root / "train" / "cat" / "00002.jpg")
    load(root, store)
    about.write_bytes(old)
    assert array.exists()
    assert_right(load(root, store), root)


def test_an_undecodable_image_is_rejected_and_leaves_no_cache(root: Path, store: Path) -> None:
    bad = root / "train" / "dog" / "00007.jpg"
    good = bad.read_bytes()
    bad.write_bytes(good[:100])
    with rejected(bad, "cannot read the image"):
        load(root, store)
    Image.new("RGB", (6, 9)).save(bad)
    with rejected(bad, "6x9", "8x8", "resized_crop"):
        load(root, store)
    assert {path.suffix for path in store.iterdir()} == {".lock"}
    bad.write_bytes(good)
    assert_right(load(root, store), root)


# Several processes -------------------------------------------------------------------------------


class Loading:
    """A process that loads a folder, forked from this one; it prints hashes of the images, then its notes."""

    def __init__(self, root: Path, store: Path, stderr: int | None = None, before: Callable[[], Any] = int) -> None:
        folder = Path(tempfile.mkdtemp(dir=root.parent))
        self.out, self.err = folder / "out", folder / "err"

        def work() -> None:
            err = os.open(self.err, os.O_WRONLY | os.O_CREAT) if stderr is None else stderr
            os.dup2(err, 2)
            sys.stderr = open(2, "w", buffering=1)  # noqa: SIM115
            before()
            with console_log():
                source = load(root, store, workers=1)
            self.out.write_text("\n".join([*(line(split) for split in (source.train, source.test)), *source.notes]))

        self.process = multiprocessing.get_context("fork").Process(target=work)
        self.process.start()

    def end(self) -> list[str]:
        """Return the process's last output: a line for each split, then the notes."""
        self.process.join(timeout=120)
        assert self.process.exitcode == 0, self.err.read_text()
        return self.out.read_text().splitlines()


def line(split: Split) -> str:
    return f"{hashlib.sha256(split.array(1)).hexdigest()}, {'in memory' if split.images is None else 'mapped'}"


def line_of(root: Path, part: str, where: str) -> str:
    """Return the output expected of such a process."""
    return f"{hashlib.sha256(pixels(root, part)).hexdigest()}, {where}"


def wait_for(happened: Callable[[], object], *processes: Loading) -> None:
    deadline = time.monotonic() + 120
    while not happened():
        assert all(loading.process.is_alive() for loading in processes) and time.monotonic() < deadline
        time.sleep(0.001)


def test_one_of_two_processes_decodes_and_the_other_reports_that_it_waits(root: Path, store: Path) -> None:
    load(root, store)
    kept(store, "train", ".npy").unlink()
    with kept(store, "train", ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until both have started
        both = [Loading(root, store) for _ in range(2)]
        said = f"fastres: waiting for another process, which is decoding {root / 'train'}\n"
        wait_for(lambda: all(one.err.exists() and one.err.read_text() == said for one in both), *both)
        assert not list(store.glob("train-*.npy"))
        fcntl.flock(lock, fcntl.LOCK_UN)
    printed = [one.end() for one in both]
    assert [lines[:2] for lines in printed] == [[line_of(root, part, "mapped") for part in ("train", "test")]] * 2
    assert sorted(len(lines) for lines in printed) == [2, 3]  # the one that decoded prints a note
    assert all(one.err.read_text() == said for one in both)


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """Return a folder of 1,028 images that takes a second or so to decode: one file under many names."""
    root = write_image_folder(tmp_path / "many", train=1, test=1, size=192)
    for number in range(1_024):
        (root / "train" / "cat" / f"{number:04}-again.jpg").hardlink_to(root / "train" / "cat" / "00000.jpg")
    return root


def test_a_process_killed_while_it_writes_leaves_nothing_that_is_used(many: Path, store: Path) -> None:
    loading = Loading(many, store)
    wait_for(lambda: any(path.stat().st_size for path in store.glob("train-*.tmp")), loading)
    loading.process.kill()
    loading.process.join()
    assert kept(store, "train", ".tmp") and not list(store.glob("*.npy")), "killed too late to show anything"
    source = load(many, store)
    assert_right(source, many)
    assert len(source.notes) == 1
    assert not list(store.glob("*.tmp")) and load(many, store).notes == ()


# When nothing can be cached -----------------------------------------------------------------------


def assert_in_memory(source: Source, root: Path, reason: str) -> None:
    """Assert that the images are right, not from the cache, and reported with one note."""
    (note,) = source.notes
    assert "decoded images cannot be stored" in note and reason in note and "--data.cache" in note and "\n" not in note
    for split, part in ((source.train, "train"), (source.test, "test")):
        assert split.images is None
        assert np.array_equal(split.array(2), pixels(root, part))


def test_a_file_where_the_folder_should_be_is_a_note(root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert_in_memory(load(root, tmp_path / "file"), root, "File exists")
    assert_in_memory(load(root, tmp_path / "file" / "below"), root, "Not a directory")


def test_a_folder_that_cannot_be_written_is_a_note(root: Path, store: Path) -> None:
    store.mkdir(parents=True)
    store.chmod(0o500)
    if os.access(store, os.W_OK):
        pytest.skip("this user may write everywhere")
    assert_in_memory(load(root, store), root, f"{store} (Permission denied)")


def test_a_folder_that_can_only_be_read_is_used(root: Path, store: Path) -> None:
    load(root, store)
    for path in (*store.iterdir(), store):
        path.chmod(0o500)
    if os.access(store, os.W_OK):
        pytest.skip("this user may write everywhere")
    source = load(root, store)
    assert source.notes == () and source.train.images is not None


def assert_train_is_not_kept(lines: list[str], many: Path, reason: str) -> None:
    assert lines[:2] == [line_of(many, "train", "in memory"), line_of(many, "test", "mapped")]
    words = ("decoded images cannot be stored", reason, "--data.cache")
    assert [note for note in lines[2:] if all(word in note for word in words)]


def test_a_file_size_limit_is_a_note(many: Path, store: Path) -> None:
    """1 MB: enough for the two test images (221 kB), not for the 1,026 of training."""
    most = 2**20, 2**20
    loading = Loading(many, store, before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, most))
    assert_train_is_not_kept(loading.end(), many, "File too large")
    assert kept(store, "test", ".npy") and not [*store.glob("train-*.npy"), *store.glob("*.tmp")]


def test_a_full_disk_is_a_note(many: Path, store: Path) -> None:
    """The file system has 1 MB, and only this process sees it."""
    store.mkdir(parents=True)
    script = f"mount -t tmpfs -o size=1m none '{store}' && exec \"$@\""
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh"]
    if shutil.which("unshare") is None or subprocess.run([*command, "true"], check=False).returncode:
        pytest.skip("this user may mount nothing, not even for itself")
    code = "import sys; from tests import test_cache; test_cache.print_loaded(*sys.argv[1:])"
    done = subprocess.run(
        [*command, sys.executable, "-c", code, many, store],
        env=users_environment(), cwd=Path(__file__).parent.parent,
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert_train_is_not_kept(done.stdout.splitlines(), many, "No space left on device")


def print_loaded(root: str, store: str) -> None:
    source = load(Path(root), Path(store))
    print(line(source.train), line(source.test), *source.notes, sep="\n")


# Progress ----------------------------------------------------------------------------------------


def test_without_a_terminal_the_first_process_reports_progress_in_plain_lines(
    root: Path, store: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    load(root, store / "fast")
    assert capfd.readouterr() == ("", "")  # within ten seconds
    monkeypatch.setattr(progress, "PLAIN_EVERY_S", 0.0)
    with console_log():
        load(root, store / "slow")
    lines = ["fastres: decoding 10/10", "fastres: decoding 4/4"]
    assert capfd.readouterr().err.splitlines() == lines
    monkeypatch.setenv("RANK", "1")
    with console_log():
        load(root, store / "another")
    assert capfd.readouterr() == ("", "")


def test_progress_is_a_bar_on_a_terminal(many: Path, store: Path) -> None:
    terminal, end = pty.openpty()
    loading = Loading(many, store, stderr=end, before=lambda: os.environ.update(TERM="xterm"))
    os.close(end)
    seen = b""
    with contextlib.suppress(OSError):  # if the other end is closed
        while chunk := os.read(terminal, 65536):
            seen += chunk
    os.close(terminal)
    assert len(loading.end()) == 3
    assert b"1,026/1,026" in seen and b"2/2" in seen
    assert seen.count(b"decoding") > seen.count(b"\n") == 2  # a line for each part, which moves and then disappears


def test_a_split_in_memory_returns_its_array_without_a_copy(root: Path) -> None:
    images = np.zeros((2, 4, 4, 1), np.uint8)
    assert Split(images=images, labels=np.zeros(2, np.int64)).array(1) is images
