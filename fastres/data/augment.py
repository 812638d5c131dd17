"""Augment and normalise a batch on the device, or crop, resize and flip one image on the host.

Images are padded before they are normalised, so zero padding is black, as in the usual torchvision recipe.
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

# Values for n samples or steps by name, (n, ...) each; most names are fields of Samples.
Draws = dict[str, Tensor]


class BatchTransform:
    """Turn cropped pixels into the network's input: normalise, cut out and mix. Every loader calls it last.

    Args:
        spec: the description of the batches.
    """

    def __init__(self, spec: BatchSpec) -> None:
        self.spec = spec
        self.shift, self.scale = (
            tile_row(torch.tensor(of, device=spec.device), spec.image_size) for of in (spec.mean, spec.std)
        )
        # The fields of Samples that __call__ reads.
        self.fields = (*("cutout",) * bool(spec.cutout), *("blend", "box") * spec.mixes)

    def draws(self, samples: Samples) -> Draws:
        """Return the draws that __call__ needs for a training batch of these samples, on the device."""
        return on_device(samples, self.fields, self.spec.device)

    def __call__(self, pixels: Tensor, labels: Tensor, draws: Draws | None = None) -> tuple[Tensor, Tensor]:
        """Transform a batch without a host-device synchronisation, so that a CUDA graph can capture it.

        Args:
            pixels: (n, S, S, C) uint8, on the device.
            labels: (n,) int64, on the device.
            draws: from draws() for a training batch, on the device; None for an evaluation batch.

        Returns:
            Images (n, C, S, S) in the spec's dtype and memory format, and labels, (n,) int64, or (n, classes)
            float32 if images are mixed.
        """
        images = normalize(pixels, self.shift, self.scale, self.spec.dtype)
        if draws is not None and self.spec.cutout:
            images = cutout(images, draws["cutout"], self.spec.cutout)
        if draws is not None and self.spec.mixes:
            # Not F.one_hot, because on a CPU it checks the labels' values on the host, a synchronisation.
            classes = torch.arange(self.spec.classes, device=labels.device)
            shares = (labels[:, None] == classes).to(torch.float32)
            images, labels = mix(images, shares, draws["blend"].float(), draws["box"])
        images = images.contiguous(memory_format=self.spec.memory_format)  # cutout or mix may have changed strides
        if self.spec.memory_format == torch.contiguous_format:
            # With one channel both memory formats count as contiguous, so set NCHW strides explicitly.
            images = images.flatten(1).view(images.shape)
        return images, labels


def on_device(samples: Samples, fields: tuple[str, ...], device: torch.device) -> Draws:
    """Return these fields of the samples as tensors on the device."""
    return {name: to_device_async(getattr(samples, name), device) for name in fields}


def to_device_async(values: np.ndarray, device: torch.device) -> Tensor:
    """Return the values on the device. The host does not wait for a copy to a GPU: it reads pinned memory."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def normalize(images: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return (images - shift) / scale, rounded once to dtype.

    Args:
        images: (n, H, W, C) uint8, any strides.
        shift: (W·C,) float32, the mean from tile_row().
        scale: (W·C,) float32, the standard deviation from tile_row().
        dtype: the dtype of the result.

    Returns:
        (n, C, H, W), channels-last.
    """
    n, h, w, c = images.shape
    # Compute in rows of W·C, because broadcasting over an inner dimension of 3 is not vectorised on a CPU (7 x slower).
    rows = images.reshape(n * h, w * c).to(torch.float32).sub_(shift).div_(scale)
    return rows.to(dtype).view(n, h, w, c).permute(0, 3, 1, 2)


def tile_row(values: Tensor, width: int) -> Tensor:
    """Return a mean or standard deviation, (C,) for pixels in [0, 1], as (W·C,) for a row of pixels in [0, 255]."""
    return values.mul(255).repeat(width)


def crop_windows(images: Tensor, size: int, pad: int, pad_mode: str) -> Tensor:
    """Return every crop of every padded image as a view: images (n, H, W, C) uint8 -> (n, Y, X, C, size, size).

    Y = H + 2·pad - size + 1 and X = W + 2·pad - size + 1. The padding is zero unless pad_mode is "reflect".
    """
    if pad_mode == "reflect":  # torch cannot reflect uint8, so index rows and columns
        rows, columns = (
            torch.from_numpy(np.pad(np.arange(side), pad, "reflect")).to(images.device) for side in images.shape[1:3]
        )
        padded = images[:, rows][:, :, columns]
    else:
        padded = F.pad(images, (0, 0, pad, pad, pad, pad))
    return padded.unfold(1, size, 1).unfold(2, size, 1)


def crop_and_flip(windows: Tensor, index: Tensor, dy: Tensor, dx: Tensor, flip: Tensor) -> Tensor:
    """Return one crop of each indexed image, mirrored if flip is true: (n, size, size, C) uint8.

    This takes one gather and one select, and no host-device synchronisation. With normalize() it makes 120k CIFAR
    images/s on two CPU cores.

    Args:
        windows: from crop_windows().
        index: (n,) int64, the images.
        dy: (n,) int64, the first row of each crop in the padded image.
        dx: (n,) int64, the first column of each crop in the padded image.
        flip: (n,) bool.
    """
    crops = windows[index, dy, dx].permute(0, 2, 3, 1)
    return torch.where(flip[:, None, None, None], crops.flip(2), crops)


def cutout(images: Tensor, centre: Tensor, side: int) -> Tensor:
    """Return the images with a square of zeros in each (DeVries and Taylor 2017, section 3.2).

    Args:
        images: (n, C, H, W), normalised, so that zero is the mean colour.
        centre: (n, 2) int64, row and column of each square's centre. A part outside the image is cut off.
        side: the square's side in pixels.
    """
    first = centre - side // 2
    return images.masked_fill(_rectangle_mask(first, first + side, images.shape[2:]), 0)


def mix(images: Tensor, shares: Tensor, blend: Tensor, box: Tensor) -> tuple[Tensor, Tensor]:
    """Mix each image with its neighbour: mixup (Zhang et al. 2017, section 2) and CutMix (Yun et al. 2019, section 3).

    Images 0 and 1 are neighbours, 2 and 3 are, and so on. The order of the samples is random, so this pairing is as
    good as any, and it does not depend on the number of processes.

    Args:
        images: (n, C, H, W), n even.
        shares: (n, classes) float32, the labels' shares, summing to 1.
        blend: (n,) float32, the image's own share of each pixel outside the box.
        box: (n, 4) int64, top, bottom, left and right of the rectangle that the neighbour covers; bottom and right are
            excluded.

    Returns:
        The mixed images and the mixed shares: an image's share of the label is its mean share of the pixels.
    """
    height, width = images.shape[2:]
    own = blend[:, None, None, None]
    mixed = torch.lerp(_neighbours(images).float(), images.float(), own).to(images.dtype)
    mixed = torch.where(_rectangle_mask(box[:, 0::2], box[:, 1::2], images.shape[2:]), _neighbours(images), mixed)
    covered = (box[:, 1] - box[:, 0]) * (box[:, 3] - box[:, 2]) / (height * width)
    own = (blend * (1 - covered))[:, None]
    return mixed, torch.lerp(_neighbours(shares), shares, own)


def _neighbours(rows: Tensor) -> Tensor:
    """Return the rows in the order 1, 0, 3, 2, and so on."""
    swapped: Tensor = rows.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    return swapped


def _rectangle_mask(first: Tensor, last: Tensor, sides: torch.Size) -> Tensor:
    """Return (n, 1, H, W) bool, true inside the rectangle from `first` to before `last`, (n, 2) each."""
    y, x = (torch.arange(side, device=first.device) for side in sides)
    rows = (y >= first[:, :1]) & (y < last[:, :1])
    columns = (x >= first[:, 1:]) & (x < last[:, 1:])
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def crop_and_flip_one(
    image: np.ndarray, size: int, pad: int, pad_mode: str, dy: int, dx: int, flip: bool
) -> np.ndarray:
    """Pad, crop and flip one image on the host as crop_windows() and crop_and_flip() do on the device.

    The image is (H, W, C) uint8, and the result (size, size, C) uint8.
    """
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), "reflect" if pad_mode == "reflect" else "constant")
    crop = padded[dy : dy + size, dx : dx + size]
    return np.ascontiguousarray(crop[:, ::-1] if flip else crop)


def crop_box(height: int, width: int, generator: np.random.Generator) -> tuple[int, int, int, int]:
    """Return top, left, height and width of a random crop (Szegedy et al. 2014).

    Its area is 8 to 100 % of the image's, and its aspect ratio, width / height, is 3/4 to 4/3. After ten tries that do
    not fit, the crop is the largest central one with an allowed aspect ratio.
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
    """Return a crop_box() of the image, (H, W, C) uint8, resized to (size, size, C) uint8."""
    top, left, h, w = crop_box(image.shape[0], image.shape[1], generator)
    return _resize(image, (size, size), box=(left, top, left + w, top + h))


def center_view(height: int, width: int, size: int, zoom: float = 256 / 224) -> tuple[int, int, int, int]:
    """Return the height and width to which an evaluation resizes an image, then top and left of its central crop.

    The shorter side is resized to size·zoom, and the crop is size × size.
    """
    scale = size * zoom / min(height, width)
    h, w = max(size, round(height * scale)), max(size, round(width * scale))
    return h, w, (h - size) // 2, (w - size) // 2


def resize_and_center_crop(image: np.ndarray, size: int, zoom: float = 256 / 224) -> np.ndarray:
    """Return the center_view() of the image, (H, W, C) uint8, as (size, size, C) uint8."""
    height, width, top, left = center_view(image.shape[0], image.shape[1], size, zoom)
    return _resize(image, (width, height))[top : top + size, left : left + size]


def _resize(image: np.ndarray, size: tuple[int, int], box: tuple[int, int, int, int] | None = None) -> np.ndarray:
    """Return the image, or the part of it in `box` (left, top, right, bottom), resized to `size` (width, height)."""
    gray = image.shape[2] == 1
    picture = Image.fromarray(image[:, :, 0] if gray else image)
    resized = np.array(picture.resize(size, Image.Resampling.BILINEAR, box=box))
    return resized[:, :, None] if gray else resized
