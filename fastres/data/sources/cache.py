"""Folders of images, decoded once: what their files hold is kept in a folder of the user's, for the runs that follow.

Of each part of a folder (train, test) there may be four files there, and a lock, named after the part and its path:

    train-a3c5f20e91b07d44.npy     its images, which the resident loader maps into memory
    train-a3c5f20e91b07d44.json    what they were made from, and their checksum
    train-a3c5f20e91b07d44.sizes   of every file its size, or why it cannot be decoded (data.skip_bad)
    train-a3c5f20e91b07d44.bad     the files that were left out last, with the reasons (data.skip_bad)

Each is written whole or not at all, by one process at a time, and used only where the files it was made from are as
they were. Where the folder cannot be written everything works as without it, and a note says so.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import filelock
import numpy as np

from fastres.config.schema import DataConfig
from fastres.data.sources.formats import check_size, decode, size_or_reason
from fastres.utils import ranks
from fastres.utils.atomic_io import atomic_write
from fastres.utils.progress import ProgressLine

VERSION = 1  # of what is kept: to be raised where decode() gives other pixels
BLOCK = 256  # images per task of the thread pool: one task per image spends a second on futures alone

Size = tuple[int, int]  # height and width
T = TypeVar("T")


# What is kept of a folder -------------------------------------------------------------------------


def kept_images(
    folder: Path, paths: Sequence[Path], config: DataConfig
) -> tuple[np.ndarray | None, list[str]]:
    """The images of `paths`, all below `folder`, as (N, H, W, 3) uint8 mapped from the cache; and notes for the user.

    No images where the cache cannot be written. Raises UsageError where a file cannot be decoded, or is not of the first
    one's size.
    """
    wanted = _fingerprint(folder, paths)
    notes = []
    try:
        entry = _entry(folder, config)

        def make() -> None:
            _write_images(entry, folder, paths, wanted, config.workers)
            notes.append(f"images are decoded once, into {entry.parent}: later runs find them there")

        return _once(entry, folder, lambda: _read_images(entry, wanted, len(paths)), make), notes
    except OSError as error:
        return None, [_not_kept(error, config)]


def sizes_and_reasons(
    folder: Path, paths: Sequence[Path], config: DataConfig
) -> tuple[list[Size | str], list[str]]:
    """Of each of `paths`, all below `folder`, its size or why it cannot be decoded; and notes for the user."""
    wanted = _fingerprint(folder, paths)
    found: list[Size | str] = []
    try:
        entry = _entry(folder, config)
        file = entry.with_suffix(".sizes")

        def read() -> list[Size | str] | None:
            kept = _read_json(file, wanted)
            files = kept.get("files") if kept else None
            if not isinstance(files, list) or len(files) != len(paths) or not all(map(_is_size, files)):
                return None
            return [one if isinstance(one, str) else tuple(one) for one in files]

        def make() -> None:
            found.extend(itertools.chain.from_iterable(_each(size_or_reason, paths, config.workers)))
            _write_json(file, {"folder": str(_real(folder)), "fingerprint": wanted, "files": found})

        return _once(entry, folder, read, make), []
    except OSError as error:
        found = found or list(itertools.chain.from_iterable(_each(size_or_reason, paths, config.workers)))
        return found, [_not_kept(error, config)]


def keep_bad(folder: Path, lines: Iterable[str], config: DataConfig) -> Path | None:
    """Keeps a list of the files of `folder` that are left out; the list's place, None where it cannot be written."""
    content = "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape")
    try:
        file = _entry(folder, config).with_suffix(".bad")

        def read() -> Path | None:
            return file if file.exists() and file.read_bytes() == content else None

        return _once(file, folder, read, lambda: _write(file, content))
    except OSError:
        return None


def decode_all(paths: Sequence[Path], workers: int) -> np.ndarray:
    """The images of `paths` in memory, (N, H, W, 3) uint8. Refuses what kept_images() does."""
    shape, blocks = _decoded(paths, workers)
    images = np.empty(shape, np.uint8)
    for start, block in zip(range(0, len(paths), BLOCK), blocks, strict=True):
        images[start : start + BLOCK] = block
    return images


# Files of the cache -------------------------------------------------------------------------------


def _entry(folder: Path, config: DataConfig) -> Path:
    """Where everything that is kept of `folder` goes, but for the suffix. Raises OSError where that is no folder."""
    try:
        store = Path(_place(config)).expanduser()
    except RuntimeError as error:  # a user without a home, as in some containers
        raise OSError(str(error)) from None
    store.mkdir(parents=True, exist_ok=True)
    return store / f"{folder.name}-{hashlib.sha256(os.fsencode(_real(folder))).hexdigest()[:16]}"


def _place(config: DataConfig) -> str:
    return config.cache or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/fastres"


def _real(folder: Path) -> Path:
    return Path(os.path.realpath(folder))


def _fingerprint(folder: Path, paths: Iterable[Path]) -> str:
    """A hash of names, sizes and times of change; it differs where anything has been done to any of the files."""
    digest, start = hashlib.sha256(b"%d\n" % VERSION), len(os.fsencode(folder)) + 1
    for path in paths:
        digest.update(os.fsencode(path)[start:] + b"\0")
        with contextlib.suppress(OSError):  # a link to nothing has a name only
            status = path.stat()
            digest.update(b"%d %d\n" % (status.st_size, status.st_mtime_ns))
    return digest.hexdigest()


def _once(entry: Path, folder: Path, read: Callable[[], T | None], make: Callable[[], None]) -> T:
    """What `read` finds; where it finds nothing, after `make`, which one process at a time does. Raises OSError."""
    found = read()
    if found is None:
        with _alone(entry.with_suffix(".lock"), folder):
            found = read()  # again: another process may have made it since
            if found is None:
                make()
                found = read()
    if found is None:
        raise OSError("what was written cannot be read back")
    return found


@contextlib.contextmanager
def _alone(path: Path, folder: Path) -> Iterator[None]:
    """Keeps other processes out, and says so where it has to wait. The lock goes with its process, however killed."""
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        _say(f"waiting for another process, which is decoding {folder}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _write(path: Path, content: bytes) -> None:
    with atomic_write(path) as file:
        file.write(content)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    _write(path, json.dumps(content).encode())


def _read_json(path: Path, wanted: str) -> dict[str, Any] | None:
    """What was written there; None where that is nothing, or of other files than those of the fingerprint."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if content["fingerprint"] == wanted else None
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _is_size(one: Any) -> bool:
    """Whether it is what stands for a file in .sizes: height and width, or a reason."""
    return isinstance(one, str) or (
        isinstance(one, list) and len(one) == 2 and all(type(side) is int and side > 0 for side in one)
    )


def _write_images(entry: Path, folder: Path, paths: Sequence[Path], fingerprint: str, workers: int) -> None:
    """The array first, then its description: without the right one it does not count."""
    for suffix in (".json", ".npy"):  # of the folder as it was: its room may be needed
        entry.with_suffix(suffix).unlink(missing_ok=True)
    shape, blocks = _decoded(paths, workers)
    header, digest = io.BytesIO(), hashlib.sha256()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    pieces: Iterable[bytes | memoryview] = itertools.chain(
        [header.getvalue()], (np.stack(block).data for block in blocks)
    )
    # Written, not mapped: where the disk is full a write is an error, and a mapped page kills the process.
    with atomic_write(entry.with_suffix(".npy")) as file:
        for piece in pieces:
            file.write(piece)
            digest.update(piece)
    description = {"folder": str(_real(folder)), "fingerprint": fingerprint, "shape": shape}
    _write_json(entry.with_suffix(".json"), description | {"sha256": digest.hexdigest()})


def _read_images(entry: Path, wanted: str, count: int) -> np.ndarray | None:
    """The array, mapped; None where there is none, of other files, or not as it was written."""
    description = _read_json(entry.with_suffix(".json"), wanted)
    try:
        with entry.with_suffix(".npy").open("rb") as file:  # once: another process may replace it meanwhile
            if description and hashlib.file_digest(file, "sha256").hexdigest() == description["sha256"]:
                shape = tuple(description["shape"])
                if len(shape) != 4 or shape[0] != count:
                    return None
                offset = file.tell() - math.prod(shape)
                # Copied where written to, which nobody does: torch takes no arrays that it must not write to.
                return np.memmap(file, np.uint8, "c", offset, shape)
    except (FileNotFoundError, ValueError, KeyError, TypeError, OverflowError):
        pass
    return None


def _not_kept(error: OSError, config: DataConfig) -> str:
    return (
        f"decoded images are not kept for later runs in {_place(config)} ({error.strerror or error}): "
        "name a folder that can be written with --data.cache"
    )


# Decoding -----------------------------------------------------------------------------------------


def _decoded(paths: Sequence[Path], workers: int) -> tuple[tuple[int, ...], Iterator[list[np.ndarray]]]:
    """The shape of the images of `paths` together, and the images, (H, W, 3) uint8, in blocks of BLOCK."""
    height, width, channels = decode(paths[0]).shape

    def sized(path: Path) -> np.ndarray:
        image = decode(path)
        check_size(path, image.shape[:2], (height, width))
        return image

    return (len(paths), height, width, channels), _each(sized, paths, workers)


def _each(work: Callable[[Path], T], paths: Sequence[Path], workers: int) -> Iterator[list[T]]:
    """What `work` gives for each path, in their order, in blocks of BLOCK, by that many threads."""

    def block(start: int) -> list[T]:
        return [work(path) for path in paths[start : start + BLOCK]]

    show = ProgressLine("decoding", len(paths), enabled=ranks.rank() == 0, stderr=True)
    done = 0
    with show as progress, ThreadPoolExecutor(max(workers, 1)) as pool:
        for results in pool.map(block, range(0, len(paths), BLOCK)):
            done += len(results)
            progress.update(done)
            yield results


def _say(line: str) -> None:
    if ranks.rank() == 0:
        print(f"fastres: {line}", file=sys.stderr, flush=True)
