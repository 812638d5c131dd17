"""Download files and unpack archives: each file is written beside its place, checksummed, and only then moved there."""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterable, Sequence
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen
from uuid import uuid4

from fastres.config.schema import DataConfig
from fastres.utils.errors import UsageError

LOG = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 10
CHUNK_BYTES = 1 << 20
MOST_BYTES = 1 << 30  # the limit for a file in an archive; the largest that is unpacked has 155 MB
REMEDIES = (
    "Point --data.root at a folder that has it or --data.mirror at a server that does, "
    "or use --recipe digits, which needs no download"
)


def fetch(url: str, path: Path, md5: str) -> None:
    """Download `url` to `path` atomically, after comparing its checksum.

    Raises:
        UsageError: if the checksum differs.
        OSError: if the file is unavailable or cannot be written.
    """
    part = path.with_name(f".{path.name}.{uuid4().hex}.part")
    digest = hashlib.md5(usedforsecurity=False)
    try:
        request = Request(url, headers={"User-Agent": "fastres"})
        with urlopen(request, timeout=CONNECT_TIMEOUT_S) as response:
            LOG.info("downloading %s to %s", url, path)
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("xb") as file:
                while chunk := response.read(CHUNK_BYTES):
                    digest.update(chunk)
                    file.write(chunk)
        if digest.hexdigest() != md5:
            raise UsageError(
                f"{url} has the wrong checksum: {part.stat().st_size:,} bytes of md5 {digest.hexdigest()}, "
                f"expected {md5}; nothing was kept. Try again, or name another --data.mirror"
            )
        part.replace(path)
    except (HTTPException, ValueError) as error:
        raise OSError(f"{type(error).__name__}: {error}") from error
    finally:
        part.unlink(missing_ok=True)


def obtain(what: str, path: Path, urls: Iterable[str], md5: str, config: DataConfig) -> None:
    """Download `path` from the first of `urls` that answers, or only from the mirror, under the same name.

    Args:
        what: the first words of the error, which name what is missing.
        path: the file.
        urls: tried in their order.
        md5: the file's checksum.
        config: data.download and data.mirror.

    Raises:
        UsageError: if no download works or is allowed, with the reason for each and the remedy.
    """
    if not config.download:
        raise UsageError(f"{what}, and --data.download is false. {REMEDIES}")
    if config.mirror is not None:
        if not re.match(r"(https?|file):", config.mirror):
            raise UsageError(f"data.mirror: {config.mirror} is not a URL; it must begin with http:, https: or file:")
        urls = [f"{config.mirror.rstrip('/')}/{path.name}"]
    failures = []
    for url in urls:
        try:
            return fetch(url, path, md5)
        except OSError as error:
            reason = error if isinstance(error, HTTPError) else getattr(error, "reason", error)
            failures.append(f"{url} ({reason})")
    raise UsageError(f"{what}, and cannot be downloaded from {' or '.join(failures)}. {REMEDIES}")


def extract(archive: Path, md5: str, folder: Path, names: Sequence[str]) -> None:
    """Unpack the members `folder.name`/NAME of a tar archive into `folder`, each atomically.

    Raises:
        UsageError: if the archive's checksum differs, it cannot be read, or it lacks a file.
    """
    try:
        with archive.open("rb") as file:
            found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        if found != md5:
            raise UsageError(f"{archive} has md5 {found}, expected {md5}; delete it to download it again")
        folder.mkdir(parents=True, exist_ok=True)
        # Unpack on the same file system, so that the moves are atomic.
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            with tarfile.open(archive) as tar:
                for name in names:  # only the expected members, so that no path comes from the archive
                    member = tar.getmember(f"{folder.name}/{name}")
                    content = tar.extractfile(member) if member.isreg() else None
                    if content is None or member.size > MOST_BYTES:
                        raise OSError(f"{member.name} is not a file, or has more than {MOST_BYTES:,} bytes")
                    with Path(scratch, name).open("xb") as file:
                        shutil.copyfileobj(content, file, CHUNK_BYTES)
            for name in names:
                Path(scratch, name).replace(folder / name)
    except (OSError, KeyError, tarfile.TarError, EOFError, zlib.error) as error:
        raise UsageError(f"cannot unpack {archive} into {folder}: {error}") from error
