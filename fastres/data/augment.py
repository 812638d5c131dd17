"""Augmentation and normalisation, on a batch on the device and on one image on the host.

Zero padding is black, before normalisation, as in the usual torchvision recipe.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fastres.data.sampling import Samples
from fastres.data.spec import BatchSpec

Draws = dict[str, Tensor]  # fields of Samples as tensors, only those that images are made from: (n, ...) each


class BatchTransform:
    """From cropped pixels to what the network sees: normalised, cut out, mixed. The last step of every loader."""

    def __init__(self, spec: BatchSpec) -> None:
        self.spec = spec
        self.shift, self.scale = (
            tile_row(torch.tensor(of, device=spec.device), spec.image_size) for of in (spec.mean, spec.std)
        )
        self.fields = (*("cutout",) * bool(spec.cutout), *("blend", "box") * spec.mixes)

    def draws(self, samples: Samples) -> Draws:
        """What it takes of the samples, on the device."""
        return on_device(samples, self.fields, self.spec.device)

    def __call__(self, pixels: Tensor, labels: Tensor, draws: Draws | None = None) -> tuple[Tensor, Tensor]:
        """pixels: (n, S, S, C) uint8, labels: (n,) int64, both on the device, as `draws` are: with them it is a batch
        to train on. Nothing here waits for the device, so that a graph may hold it.

        Returns images (n, C, S, S) in the spec's dtype and memory format, and labels, (n, classes) float32 where mixed.
        """
        images = normalize(pixels, self.shift, self.scale, self.spec.dtype)
        if draws is not None and self.spec.cutout:
            images = cutout(images, draws["cutout"], self.spec.cutout)
        if draws is not None and self.spec.mixes:
            # Not F.one_hot, which on a CPU reads the labels on the host to check them.
            classes = torch.arange(self.spec.classes, device=labels.device)
            shares = (labels[:, None] == classes).to(torch.float32)
            images, labels = mix(images, shares, draws["blend"].float(), draws["box"])
        images = images.contiguous(memory_format=self.spec.memory_format)  # masks may cost the order
        if self.spec.memory_format == torch.contiguous_format:
            # One channel has any strides, until it is told which.
            images = images.flatten(1).view(images.shape)
        return images, labels


def on_device(samples: Samples, fields: tuple[str, ...], device: torch.device) -> Draws:
    return {name: sent(getattr(samples, name), device) for name in fields}


def sent(values: np.ndarray, device: torch.device) -> Tensor:
    """On the device, for which the host does not wait: it would, for memory that is not pinned."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def normalize(images: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """(images - shift) / scale, rounded once to dtype.

    images: (n, H, W, C) uint8 in any strides. shift, scale: (W·C,) float32, tile_row(). Returns (n, C, H, W)
    channels-last.
    """
    n, h, w, c = images.shape
    # As rows of W·C: broadcasting over an inner dimension of 3 keeps the CPU from vectorising (7 x slower).
    rows = images.reshape(n * h, w * c).to(torch.float32).sub_(shift).div_(scale)
    return rows.to(dtype).view(n, h, w, c).permute(0, 3, 1, 2)


def tile_row(values: Tensor, width: int) -> Tensor:
    """A mean or a standard deviation, (C,) float32 of pixels from 0 to 1 -> (W·C,) of a row of pixels from 0 to 255."""
    return values.mul(255).repeat(width)


def crop_windows(images: Tensor, size: int, pad: int, pad_mode: str) -> Tensor:
    """Every crop of every padded image as a view: images (n, H, W, C) uint8 -> (n, Y, X, C, size, size)."""
    if pad_mode == "reflect":  # torch reflects no bytes: rows and columns by their numbers
        rows, columns = (
            torch.from_numpy(np.pad(np.arange(side), pad, "reflect")).to(images.device)
            for side in images.shape[1:3]
        )
        padded = images[:, rows][:, :, columns]
    else:
        padded = F.pad(images, (0, 0, pad, pad, pad, pad))
    return padded.unfold(1, size, 1).unfold(2, size, 1)


def crop_and_flip(windows: Tensor, index: Tensor, dy: Tensor, dx: Tensor, flip: Tensor) -> Tensor:
    """The chosen crop of each chosen image, mirrored where flip: (n, size, size, C) uint8.

    index, dy, dx: (n,) int64; flip: (n,) bool. One gather and one select, no host synchronisation: 120k
    CIFAR images/s with normalize() on two CPU cores.
    """
    crops = windows[index, dy, dx].permute(0, 2, 3, 1)
    return torch.where(flip[:, None, None, None], crops.flip(2), crops)


def cutout(images: Tensor, centre: Tensor, side: int) -> Tensor:
    """Zeros, the mean colour, in a square of that side around a pixel of each image (DeVries and Taylor 2017,
    section 3.2); what of it is outside is lost.

    images: (n, C, H, W). centre: (n, 2) int64, row and column.
    """
    first = centre - side // 2
    inside = _inside(first, first + side, images.shape[2:])
    return images.masked_fill(inside, 0)


def mix(images: Tensor, shares: Tensor, blend: Tensor, box: Tensor) -> tuple[Tensor, Tensor]:
    """mixup (Zhang et al. 2017, section 2) and CutMix (Yun et al. 2019, section 3): each image with its neighbour.

    Rows 0 and 1 are neighbours, 2 and 3, and so on: the order is random, so any pairing is, and this one does not
    depend on how many processes share a batch. images: (n, C, H, W), n even. shares: (n, classes) float32, summing to
    1. blend: (n,) float32, the image's own share of each pixel. box: (n, 4) int64, top, bottom, left and right of the
    part that is its neighbour's alone. Both are returned mixed; the labels by the pixels' shares.
    """
    height, width = images.shape[2:]
    own = blend[:, None, None, None]
    mixed = torch.lerp(_neighbours(images).float(), images.float(), own).to(images.dtype)
    mixed = torch.where(_inside(box[:, 0::2], box[:, 1::2], images.shape[2:]), _neighbours(images), mixed)
    covered = (box[:, 1] - box[:, 0]) * (box[:, 3] - box[:, 2]) / (height * width)
    own = (blend * (1 - covered))[:, None]
    return mixed, torch.lerp(_neighbours(shares), shares, own)


def _neighbours(rows: Tensor) -> Tensor:
    """Rows 1, 0, 3, 2, and so on."""
    return rows.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def _inside(first: Tensor, last: Tensor, sides: torch.Size) -> Tensor:
    """Whether a pixel lies in the rectangle from `first` to before `last`, (n, 2) each: (n, 1, H, W) bool."""
    y, x = (torch.arange(side, device=first.device) for side in sides)
    rows = (y >= first[:, :1]) & (y < last[:, :1])
    columns = (x >= first[:, 1:]) & (x < last[:, 1:])
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def crop_and_flip_one(
    image: np.ndarray, size: int, pad: int, pad_mode: str, dy: int, dx: int, flip: bool
) -> np.ndarray:
    """crop_and_flip for one image on the host: (H, W, C) uint8 -> (size, size, C) uint8."""
    padded = np.pad(
        image, ((pad, pad), (pad, pad), (0, 0)), "reflect" if pad_mode == "reflect" else "constant"
    )
    crop = padded[dy : dy + size, dx : dx + size]
    return np.ascontiguousarray(crop[:, ::-1] if flip else crop)


def crop_box(height: int, width: int, generator: np.random.Generator) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random area (8 to 100 %) and aspect ratio (3/4 to 4/3) (Szegedy et al. 2014).

    Ten tries, then the largest central crop with an allowed aspect ratio.
    """
    for _ in range(10):
        area = height * width * generator.uniform(0.08, 1.0)
        aspect = math.exp(generator.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(generator.integers(height - h + 1)), int(generator.integers(width - w + 1)), h, w
    w = min(width, round(height * 4 / 3))
    h = min(height, round(width * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def resized_crop(image: np.ndarray, size: int, generator: np.random.Generator) -> np.ndarray:
    """A crop_box of the image, (H, W, C) uint8, resized to size x size."""
    top, left, h, w = crop_box(image.shape[0], image.shape[1], generator)
    return _resize(image, (size, size), box=(left, top, left + w, top + h))


def center_view(height: int, width: int, size: int) -> tuple[int, int, int, int]:
    """The evaluation view: height and width after the shorter side is size·256/224, then top and left of the central
    size x size."""
    scale = size * 256 / 224 / min(height, width)
    h, w = max(size, round(height * scale)), max(size, round(width * scale))
    return h, w, (h - size) // 2, (w - size) // 2


def resize_and_center_crop(image: np.ndarray, size: int) -> np.ndarray:
    """The center_view of the image, (H, W, C) uint8."""
    height, width, top, left = center_view(image.shape[0], image.shape[1], size)
    return _resize(image, (width, height))[top : top + size, left : left + size]


def _resize(
    image: np.ndarray, size: tuple[int, int], box: tuple[int, int, int, int] | None = None
) -> np.ndarray:
    gray = image.shape[2] == 1
    picture = Image.fromarray(image[:, :, 0] if gray else image)
    resized = np.array(picture.resize(size, Image.Resampling.BILINEAR, box=box))
    return resized[:, :, None] if gray else resized
