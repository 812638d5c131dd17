"""Read image files, CIFAR's pickles and MNIST's IDX. Nothing in a file is executed."""

from __future__ import annotations

import contextlib
import gzip
import io
import math
import pickle
import re
import zlib
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import numpy as np
from PIL import ExifTags, Image

from fastres.utils.errors import UsageError

# Formats that Pillow does not decode itself: it runs another program for EPS, and needs a plug-in for the others.
NOT_DECODED = {"EPS", "PDF", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"}
JPEG_END = b"\xff\xd9"
PNG_BITS = 24  # the offset of the bits per channel in a PNG

# The transposition that makes an image upright, by EXIF's orientation. PIL's ImageOps.exif_transpose has the same, but
# it also writes the EXIF again, and raises for values that cannot be written.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@cache
def formats() -> tuple[str, ...]:
    """Return the names of all formats that Pillow decodes."""
    Image.init()
    return tuple(sorted(set(Image.OPEN) - NOT_DECODED))


@cache
def image_suffixes() -> frozenset[str]:
    """Return the suffixes, in lower case and with their dot, of the files that Pillow decodes."""
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats())


def damaged(path: Path, reason: object) -> NoReturn:
    """Raise UsageError for a file of a published data set."""
    raise UsageError(
        f"{path} is damaged or of another format: {reason}. "
        "Delete it to download it again (from --data.mirror, if need be), point --data.root at a good copy, "
        "or use --recipe digits, which needs no file"
    )


def decode(path: Path, *, exif: bool = False) -> np.ndarray:
    """Return an image file as (H, W, 3) uint8 RGB: grey is repeated, alpha dropped, 16 bits cut to the upper 8.

    Args:
        path: the file.
        exif: turn the image upright, by EXIF's orientation. False ignores it, as torchvision does; Pillow applies that
            of a TIFF anyway.

    Raises:
        UsageError: if the file cannot be decoded.
    """
    try:
        with Image.open(path, formats=formats()) as image:
            pixels = _rgb(image)
            turn = _turn(image) if exif else None  # after _rgb, because a TIFF is upright once it is loaded
            return np.array(pixels if turn is None else pixels.transpose(turn))
    except Exception as error:  # PIL raises a dozen types of errors for damaged files
        raise UsageError(f"cannot read the image {path}: {_reason(path, error)}; replace or delete it") from error


def _rgb(image: Image.Image) -> Image.Image:
    """Return the image in RGB, with its pixels loaded."""
    image.load()
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # 16-bit grey, which some versions of convert() clip at 255
        return Image.fromarray((np.array(image) >> 8).astype(np.uint8)).convert("RGB")
    if "transparency" in image.info:  # a palette's alpha: convert() warns if it is not asked for it
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")


def _turn(image: Image.Image) -> Image.Transpose | None:
    """Return the transposition that makes an image upright, or None if it is upright or its EXIF cannot be read."""
    with contextlib.suppress(Exception):  # PIL raises many types for a damaged EXIF
        return UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return None


def _reason(path: Path, error: BaseException) -> str:
    """Return the reason why an image file cannot be read, without the file's name."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    with contextlib.suppress(OSError):
        if path.stat().st_size == 0:
            return "it is empty"
    return str(error).replace(f" {str(path)!r}", "")


def size_or_reason(path: Path, *, exif: bool = False) -> tuple[int, int] | str:
    """Return height and width of an image file as decode() returns it, or the reason if decode() rejects it."""
    try:
        height, width, _ = decode(path, exif=exif).shape
        return height, width
    except UsageError as error:
        return _reason(path, error.__cause__ or error)


def check_size(what: object, size: tuple[int, int], wanted: tuple[int, int], asked: int | None) -> None:
    """Raise UsageError if an image's height and width differ from those of the other images.

    Args:
        what: the image, in words.
        size: its height and width.
        wanted: those of the other images.
        asked: data.image_size, for the remedy.
    """
    if size != wanted:
        raise UsageError(
            f"{what} has {size[1]}x{size[0]} pixels, others {wanted[1]}x{wanted[0]}; for images of unequal size use "
            f"{resizing_flags(asked)}"
        )


def resizing_flags(asked: int | None) -> str:
    """Return the flags with which images of any size are used, at the side `asked` if data.image_size gives one."""
    return f"--data.loader dataloader (or dali) --data.augment resized_crop --data.image_size {asked or 224}"


def encoded(path: Path, *, exif: bool = False) -> tuple[np.ndarray, tuple[int, int], bool]:
    """Return an image file's bytes for another decoder, which sees the same pixels in them as decode().

    Files that decoders disagree about (palettes, alpha, CMYK, 16 bits, rarer formats, a JPEG or PNG without its end, a
    PNG with wrong checksums) go through decode() and come as BMP, which is written in a fraction of the time that a PNG
    takes to compress. So do files that EXIF turns, because decoders differ in where they look for an orientation
    (Pillow reads that of XMP too, DALI does not).

    Args:
        path: the file.
        exif: as for decode. The other decoder ignores EXIF in either case.

    Returns:
        The bytes, (n,) uint8; height and width; and True if the bytes are the file's own.

    Raises:
        UsageError: if the file cannot be decoded.
    """
    try:
        data = np.fromfile(path, np.uint8)
        file = io.BytesIO(data.tobytes())
        with Image.open(file, formats=formats()) as image:
            size = image.height, image.width
            plain = image.mode in ("RGB", "L") and "transparency" not in image.info
            if image.format == "PNG":
                plain = plain and data[PNG_BITS] == 8
                image.verify()
            else:
                plain = plain and image.format == "JPEG" and JPEG_END in data[-64:].tobytes()
        if plain and exif:
            file.seek(0)
            with Image.open(file, formats=formats()) as image:  # again, because nothing may follow verify()
                plain = _turn(image) is None
        if plain:
            return data, size, True
    except Exception:  # PIL raises many types; decode() below reports the reason
        pass
    pixels, bitmap = decode(path, exif=exif), io.BytesIO()
    Image.fromarray(pixels).save(bitmap, "BMP")
    return np.frombuffer(bitmap.getbuffer(), np.uint8), pixels.shape[:2], False


class _Dtype:
    """A stand-in for numpy.dtype in a pickle, for whole numbers only."""

    def __init__(self, code: str, *_: Any) -> None:
        if not re.fullmatch(r"[<>|=]?[iu][1248]", code):
            raise pickle.UnpicklingError(f"it holds an array of {code!r}, not of whole numbers")
        self.value = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.value = self.value.newbyteorder(state[1])


class _Array:
    """A stand-in for numpy.ndarray, so that numpy's own code never gets a state that a file made up."""

    value = np.empty(0, np.uint8)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, raw = state
        buffer = raw.encode("latin1") if isinstance(raw, str) else raw  # Python 2's bytes are text here
        self.value = np.frombuffer(buffer, dtype.value).reshape(shape, order="F" if fortran else "C")


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _frombuffer(raw: bytes, dtype: _Dtype, shape: tuple[int, ...], order: str) -> _Array:
    array = _Array()
    array.__setstate__((1, shape, dtype, order == "F", raw))
    return array


def _scalar(dtype: _Dtype, raw: bytes) -> int:
    return int(np.frombuffer(raw, dtype.value)[0])


def _encode(text: str, encoding: str) -> bytes:
    return text.encode("latin1")  # pickle writes bytes for Python 2 in this encoding only


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickle containers, text, numbers and arrays of whole numbers. It imports nothing, so no code of a file runs."""

    KNOWN = MappingProxyType(
        {
            "numpy.ndarray": _Array,
            "numpy.dtype": _Dtype,
            "numpy.core.multiarray._reconstruct": _reconstruct,  # numpy 1, then numpy 2
            "numpy._core.multiarray._reconstruct": _reconstruct,
            "numpy.core.multiarray.scalar": _scalar,
            "numpy._core.multiarray.scalar": _scalar,
            "numpy.core.numeric._frombuffer": _frombuffer,
            "numpy._core.numeric._frombuffer": _frombuffer,
            "_codecs.encode": _encode,
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in self.KNOWN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array needs")
        return self.KNOWN[f"{module}.{name}"]


def read_pickle(path: Path) -> dict[Any, Any]:
    """Return a pickled dict of plain values and arrays of whole numbers. Raise UsageError for any other file."""
    try:
        with path.open("rb") as file:
            content = _ArrayUnpickler(file, encoding="latin1").load()
    except Exception as error:  # bytes from anywhere may raise anything
        damaged(path, "it ends too early" if isinstance(error, EOFError) else error)
    if not isinstance(content, dict):
        damaged(path, f"it holds a {type(content).__name__}, not a dict")
    return {key: value.value if isinstance(value, _Array) else value for key, value in content.items()}


def read_idx(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Return an IDX file of bytes, gzipped if named .gz, as (N, *shape) uint8.

    Raises:
        UsageError: if the header has another shape, or announces more or fewer bytes than follow.
    """
    try:
        packed = path.read_bytes()
        content = bytearray(gzip.decompress(packed) if path.suffix == ".gz" else packed)  # a writable buffer
    except (OSError, EOFError, zlib.error) as error:
        damaged(path, error)
    dims = 1 + len(shape)
    start = 4 + 4 * dims
    if len(content) < start:
        damaged(path, f"its header takes {start} bytes and it has {len(content)}")
    magic, count, *sides = np.frombuffer(content, ">u4", count=1 + dims).tolist()
    if magic != 0x0800 + dims or tuple(sides) != shape:
        kind = f"{'x'.join(map(str, shape))} images" if shape else "labels"
        damaged(path, f"its header is not that of {kind}")
    values = np.frombuffer(content, np.uint8, offset=start)
    if len(values) != count * math.prod(shape):
        damaged(path, f"its header announces {count * math.prod(shape):,} bytes and {len(values):,} follow")
    return values.reshape(-1, *shape)
