"""The cache of decoded image folders: a folder is decoded once, and later runs read the result from the cache.

For each part of a folder (train, test) the cache has up to four files and a lock, named after the part and its path:

    train-a3c5f20e91b07d44.npy     its images, which the resident loader maps into memory
    train-a3c5f20e91b07d44.json    the fingerprint of the files they were made from, and their checksum
    train-a3c5f20e91b07d44.sizes   the size of every file, or the reason why it cannot be decoded (data.skip_bad)
    train-a3c5f20e91b07d44.bad     the files that were left out last, with the reasons (data.skip_bad)

Each is written atomically, by one process at a time, and used only if the files it was made from and data.exif have not
changed. If the cache cannot be written, everything works without it, and a note reports it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import logging
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import filelock
import numpy as np

from fastres.config.schema import DataConfig
from fastres.data.sources.formats import check_size, decode, size_or_reason
from fastres.utils import ranks
from fastres.utils.atomic_io import atomic_write, json_of, parse_json
from fastres.utils.progress import ProgressLine
from fastres_kernels.user_cache import user_cache

LOG = logging.getLogger(__name__)

VERSION = 1  # of the cache; raise it when decode() returns other pixels
BLOCK = 256  # images per task of the thread pool, because one task per image would spend a second on futures

Size = tuple[int, int]  # height and width
T = TypeVar("T")


# Cached results of a folder -----------------------------------------------------------------------


def kept_images(
    folder: Path, part: str, paths: Sequence[Path], config: DataConfig
) -> tuple[np.ndarray | None, list[str]]:
    """Return the images of `paths`, all below `folder`, mapped from the cache, and notes for the user.

    `part` names the files of the cache: train, test or val.

    Returns:
        The images (N, H, W, 3) uint8, or None if the cache cannot be written; and the notes.

    Raises:
        UsageError: if a file cannot be decoded or has another size than the first.
    """
    wanted = _fingerprint(folder, paths, config)
    notes = []
    try:
        entry = _entry(folder, part, config)

        def make() -> None:
            _write_images(entry, folder, paths, wanted, config)
            notes.append(f"images are decoded once, into {entry.parent}, and later runs read them from there")

        return _once(entry, folder, lambda: _read_images(entry, wanted, len(paths)), make), notes
    except OSError as error:
        return None, [_not_kept(error, config)]


def sizes_and_reasons(
    folder: Path, part: str, paths: Sequence[Path], config: DataConfig
) -> tuple[list[Size | str], list[str]]:
    """Return the size of each of `paths`, or the reason why it cannot be decoded, and notes for the user.

    All paths are below `folder`.
    """
    wanted = _fingerprint(folder, paths, config)
    measured = partial(size_or_reason, exif=config.exif)
    found: list[Size | str] = []
    try:
        entry = _entry(folder, part, config)
        file = entry.with_suffix(".sizes")

        def read() -> list[Size | str] | None:
            kept = _read_json(file, wanted)
            files = kept.get("files") if kept else None
            if not isinstance(files, list) or len(files) != len(paths) or not all(map(_is_size, files)):
                return None
            return [one if isinstance(one, str) else tuple(one) for one in files]

        def make() -> None:
            found.extend(itertools.chain.from_iterable(_each(measured, paths, config.workers)))
            _write_json(file, {"folder": str(_real(folder)), "fingerprint": wanted, "files": found})

        return _once(entry, folder, read, make), []
    except OSError as error:
        found = found or list(itertools.chain.from_iterable(_each(measured, paths, config.workers)))
        return found, [_not_kept(error, config)]


def write_bad_list(folder: Path, part: str, lines: Iterable[str], config: DataConfig) -> Path | None:
    """Write the list of the files of `folder` that are left out. Return its path, or None if it cannot be written."""
    content = "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape")
    try:
        file = _entry(folder, part, config).with_suffix(".bad")

        def read() -> Path | None:
            return file if file.exists() and file.read_bytes() == content else None

        return _once(file, folder, read, lambda: _write(file, content))
    except OSError:
        return None


def decode_all(paths: Sequence[Path], workers: int, asked_size: int | None = None, *, exif: bool = False) -> np.ndarray:
    """Return the images of `paths` in memory, (N, H, W, 3) uint8. Raise UsageError as kept_images() does."""
    shape, blocks = _decoded(paths, workers, asked_size, exif)
    images = np.empty(shape, np.uint8)
    for start, block in zip(range(0, len(paths), BLOCK), blocks, strict=True):
        images[start : start + BLOCK] = block
    return images


# Files of the cache -------------------------------------------------------------------------------


def _entry(folder: Path, part: str, config: DataConfig) -> Path:
    """Return the path, without suffix, of the cache's files for a part. Raise OSError if the cache cannot be made."""
    try:
        store = _place(config)
    except RuntimeError as error:  # a user without a home, as in some containers
        raise OSError(str(error)) from None
    store.mkdir(parents=True, exist_ok=True)
    return store / f"{part}-{hashlib.sha256(os.fsencode(_real(folder))).hexdigest()[:16]}"


def _place(config: DataConfig) -> Path:
    """Return the cache's folder. Raise RuntimeError if the user has no home folder."""
    return Path(config.cache).expanduser() if config.cache else user_cache()


def _real(folder: Path) -> Path:
    """Return the path with all links resolved, also if a part of it is missing."""
    return Path(os.path.realpath(folder))


def _fingerprint(folder: Path, paths: Iterable[Path], config: DataConfig) -> str:
    """Return a hash of data.exif and of names, sizes and times of modification, which changes with any of the files."""
    digest, start = hashlib.sha256(b"%d\n" % VERSION), len(os.fsencode(folder)) + 1
    if config.exif:  # without it, the hash is the one of versions that had no data.exif
        digest.update(b"exif\n")
    for path in paths:
        digest.update(os.fsencode(path)[start:] + b"\0")
        with contextlib.suppress(OSError):  # a link to nothing has only a name
            status = path.stat()
            digest.update(b"%d %d\n" % (status.st_size, status.st_mtime_ns))
    return digest.hexdigest()


def _once(entry: Path, folder: Path, read: Callable[[], T | None], make: Callable[[], None]) -> T:
    """Return what `read` returns, after one process has run `make` if it returns None.

    Raises:
        OSError: if `read` returns None even then.
    """
    found = read()
    if found is None:
        with _alone(entry.with_suffix(".lock"), folder):
            found = read()  # again, because another process may have run make() meanwhile
            if found is None:
                make()
                found = read()
    if found is None:
        raise OSError("the written file cannot be read back")
    return found


@contextlib.contextmanager
def _alone(path: Path, folder: Path) -> Iterator[None]:
    """Keep other processes out of the block, and log a line before waiting. A killed process loses its lock."""
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        if ranks.rank() == 0:
            LOG.warning("waiting for another process, which is decoding %s", folder)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _write(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    with atomic_write(path) as file:
        file.write(content)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON atomically."""
    _write(path, json_of(content).encode())


def _read_json(path: Path, wanted: str) -> dict[str, Any] | None:
    """Return the file's content, or None if it is missing, damaged, or has another fingerprint."""
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
        return content if content["fingerprint"] == wanted else None
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _is_size(one: Any) -> bool:
    """Return True for an entry of .sizes: height and width, or a reason."""
    return isinstance(one, str) or (
        isinstance(one, list) and len(one) == 2 and all(type(side) is int and side > 0 for side in one)
    )


def _write_images(entry: Path, folder: Path, paths: Sequence[Path], fingerprint: str, config: DataConfig) -> None:
    """Write the array and then its description, because an array without a description does not count."""
    for suffix in (".json", ".npy"):  # the previous version, because its space may be needed
        entry.with_suffix(suffix).unlink(missing_ok=True)
    shape, blocks = _decoded(paths, config.workers, config.image_size, config.exif)
    header, digest = io.BytesIO(), hashlib.sha256()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    pieces: Iterable[bytes | memoryview] = itertools.chain(
        [header.getvalue()], (np.stack(block).data for block in blocks)
    )
    # Write the file instead of mapping it, because on a full disk a write raises but a mapped page kills the process.
    with atomic_write(entry.with_suffix(".npy")) as file:
        for piece in pieces:
            file.write(piece)
            digest.update(piece)
    description = {"folder": str(_real(folder)), "fingerprint": fingerprint, "shape": shape}
    _write_json(entry.with_suffix(".json"), description | {"sha256": digest.hexdigest()})


def _read_images(entry: Path, wanted: str, count: int) -> np.ndarray | None:
    """Return the array, mapped, or None if it is missing, of other files, or fails its checksum."""
    description = _read_json(entry.with_suffix(".json"), wanted)
    try:
        # Open the file once, because another process may replace it meanwhile.
        with entry.with_suffix(".npy").open("rb") as file:
            if description and hashlib.file_digest(file, "sha256").hexdigest() == description["sha256"]:
                shape = tuple(description["shape"])
                if len(shape) != 4 or shape[0] != count:
                    return None
                offset = file.tell() - math.prod(shape)
                # Copy on write, although nobody writes, because torch warns about arrays that are read-only.
                return np.memmap(file, np.uint8, "c", offset, shape)
    except (FileNotFoundError, ValueError, KeyError, TypeError, OverflowError):
        pass
    return None


def _not_kept(error: OSError, config: DataConfig) -> str:
    """Return the note that the cache cannot be written."""
    try:
        place = f" in {_place(config)}"
    except RuntimeError:  # the error says that there is no home folder
        place = ""
    return (
        f"data.cache: decoded images cannot be stored{place} ({error.strerror or error}); "
        "give a writable folder with --data.cache"
    )


# Decoding -----------------------------------------------------------------------------------------


def _decoded(
    paths: Sequence[Path], workers: int, asked_size: int | None, exif: bool
) -> tuple[tuple[int, ...], Iterator[list[np.ndarray]]]:
    """Return the shape of all images together, and an iterator over the images, (H, W, 3) uint8, in blocks of BLOCK.

    `asked_size` is data.image_size, for the error about images of unequal size.
    """
    height, width, channels = decode(paths[0], exif=exif).shape

    def sized(path: Path) -> np.ndarray:
        image = decode(path, exif=exif)
        check_size(path, image.shape[:2], (height, width), asked_size)
        return image

    return (len(paths), height, width, channels), _each(sized, paths, workers)


def _each(work: Callable[[Path], T], paths: Sequence[Path], workers: int) -> Iterator[list[T]]:
    """Yield the results of `work` for each path, in their order, in blocks of BLOCK, by `workers` threads."""
    ended = threading.Event()

    def block(start: int) -> list[T]:
        return [work(path) for path in paths[start : start + BLOCK] if not ended.is_set()]

    show = ProgressLine("decoding", len(paths), enabled=ranks.rank() == 0, stderr=True)
    done, pool = 0, ThreadPoolExecutor(max(workers, 1))
    with show as progress:
        try:
            for results in pool.map(block, range(0, len(paths), BLOCK)):
                done += len(results)
                progress.update(done)
                yield results
        finally:  # after an error or a signal, do not wait for the threads
            ended.set()
            pool.shutdown(wait=False, cancel_futures=True)
