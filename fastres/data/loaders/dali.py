"""The DALI loader: decode, resize, crop and flip in C++ threads, on a GPU if there is one.

The pipeline gets the crop and flip of every sample as inputs, so order and augmentation are the same as in every other
loader. A pipeline is built for the requested steps, so a run resumes at any step without any state of DALI's.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from fastres.data.augment import BatchTransform, center_view, crop_box, to_device_async
from fastres.data.sampling import Samples, sample_generator
from fastres.data.sources.formats import encoded
from fastres.data.sources.source import Split
from fastres.data.spec import IGNORED, BatchSpec
from fastres.utils.errors import UsageError

PREFETCH = 2  # batches that DALI prepares ahead

Feed = dict[str, Any]  # by input of the pipeline, an array or list with an entry for each sample of a batch
T = TypeVar("T")


class DaliLoader:
    """Make batches with DALI; see Loader for the contract."""

    def __init__(self, split: Split, spec: BatchSpec) -> None:
        try:
            import nvidia.dali  # noqa: F401
        except ImportError as error:
            raise UsageError(
                f"data.loader dali: {error}; pip install nvidia-dali-cuda130, or use --data.loader dataloader"
            ) from None
        self.split, self.spec = split, spec
        self.labels = torch.from_numpy(split.labels).to(spec.device)
        self.transform = BatchTransform(spec)
        # For each file that has been read: height and width; mtime in ns, and bytes.
        self.sizes = np.zeros((len(split), 2), np.int32)
        self.stamps = np.zeros((len(split), 2), np.int64)
        self.reflected = spec.margin if spec.pad_mode == "reflect" else 0

    def train(self, first_step: int, last_step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield one augmented batch for each step of [first_step, last_step)."""
        order = self.spec.order(len(self.split))
        steps = (order.samples(step, step + 1) for step in range(first_step, last_step))
        for samples, pixels in self._batches(steps, self._feed_train, lambda samples: samples.index):
            yield self.transform(pixels, self._labels(samples.index), self.transform.draws(samples))

    def evaluate(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield every sample once over all processes, not augmented."""
        batches = self.spec.eval_batches(len(self.split))
        fed = self._batches((index for index, _ in batches), self._feed_evaluation, lambda index: index)
        for (_, count), (index, pixels) in zip(batches, fed, strict=True):
            images, labels = self.transform(pixels, self._labels(index))
            labels[count:] = IGNORED
            yield images, labels

    def _labels(self, index: np.ndarray) -> Tensor:
        return self.labels[to_device_async(index, self.spec.device)]

    # ---- the pipeline's inputs -----------------------------------------------------------------------------

    def _feed_train(self, samples: Samples) -> Feed:
        size, pad = self.spec.image_size, self.spec.margin
        feed, sizes = self._images(samples.index)
        if self.spec.augment == "resized_crop":
            generators = (
                sample_generator(self.spec.seed, int(epoch), int(index))
                for epoch, index in zip(samples.epoch, samples.index, strict=True)
            )
            boxes = np.array(
                [crop_box(h, w, g) for (h, w), g in zip(sizes.tolist(), generators, strict=True)], np.int32
            )
            feed |= {"box_start": boxes[:, :2], "box_shape": boxes[:, 2:]}
            feed["resized"] = np.full((len(boxes), 2), size, np.float32)
        feed["start"] = (np.stack([samples.dy, samples.dx], 1) - pad + self.reflected).astype(np.int32)
        feed["flip"] = samples.flip.astype(np.int32)
        return feed

    def _feed_evaluation(self, index: np.ndarray) -> Feed:
        feed, sizes = self._images(index)
        feed["start"] = np.full((len(sizes), 2), self.reflected, np.int32)
        feed["flip"] = np.zeros(len(sizes), np.int32)
        if self.spec.augment == "resized_crop":
            views = np.array([center_view(h, w, self.spec.image_size) for h, w in sizes.tolist()], np.int32)
            feed |= {"box_start": np.zeros_like(sizes), "box_shape": sizes}
            feed |= {"resized": views[:, :2].astype(np.float32), "start": views[:, 2:]}
        return feed

    def _images(self, index: np.ndarray) -> tuple[Feed, np.ndarray]:
        """Return the samples' pixels, (b, H, W, C), or their files' bytes, and heights and widths, (b, 2) int32.

        Raises:
            UsageError: if an image cannot be decoded, or has another size and is not resized.
        """
        if self.split.images is not None:
            images = self.split.images[index]
            return {"images": images}, np.tile(np.array(images.shape[1:3], np.int32), (len(index), 1))
        files = [self._file(int(i)) for i in index]
        sizes = self.sizes[index]
        if self.spec.augment != "resized_crop":
            side = self.spec.image_size
            for i in index[(sizes != side).any(1)]:
                height, width = self.sizes[i].tolist()
                self.split.check_size(int(i), height, width, side, side)
        return {"images": files}, sizes

    def _file(self, index: int) -> np.ndarray:
        """Return the bytes of a file, (n,) uint8.

        The header is read the first time, and again if the file has changed. For a file in the system's page cache this
        takes 40 us, and 9 us without the header.
        """
        path, stamp = self.split.paths[index], (0, 0)
        with suppress(OSError), path.open("rb", buffering=0) as file:  # encoded() reports the reason
            status = os.fstat(file.fileno())
            stamp = status.st_mtime_ns, status.st_size
            if stamp == tuple(self.stamps[index]):
                return np.frombuffer(file.readall(), np.uint8)
        data, self.sizes[index], as_it_is = encoded(path, exif=self.split.exif)
        self.stamps[index] = stamp if as_it_is else 0
        return data

    # ---- the pipeline --------------------------------------------------------------------------------------

    def _batches(
        self, items: Iterator[T], feed: Callable[[T], Feed], samples_of: Callable[[T], np.ndarray]
    ) -> Iterator[tuple[T, Tensor]]:
        """Yield each item with its pixels: (b, S, S, C) uint8.

        Args:
            items: one for each batch.
            feed: returns the pipeline's inputs of an item.
            samples_of: returns the indices of an item's samples.
        """
        from nvidia.dali.plugin.pytorch import feed_ndarray

        ahead: deque[T] = deque()  # fed to the pipeline, and not returned yet

        def source() -> Iterator[tuple[Any, ...]]:
            for item in items:
                ahead.append(item)
                batch = feed(item)
                yield tuple(_dense(batch[name]) for name in self._inputs())

        pipeline = self._pipeline(source())
        try:
            while True:
                try:
                    (out,) = pipeline.run()
                except StopIteration:
                    return
                except RuntimeError as error:
                    fed = [samples_of(item) for item in ahead] if self.split.images is None else []
                    for batch in fed:  # the bad file is in one of these; DALI does not tell which
                        for index in batch:
                            self.split.image(int(index))
                    raise UsageError(self._error_line(str(error), fed)) from error
                batch = out.as_tensor()
                pixels = torch.empty(batch.shape(), dtype=torch.uint8, device=self.spec.device)
                # On torch's stream, as in DALI's own iterator: work that is queued there may still use the memory.
                on_gpu = self.spec.device.type == "cuda"
                stream = torch.cuda.current_stream(self.spec.device) if on_gpu else None
                feed_ndarray(batch, pixels, cuda_stream=stream)
                yield ahead.popleft(), pixels
        finally:
            # End the pipeline's threads here, because it is part of reference cycles. A pipeline that was left to the
            # garbage collector was collected in a forked process, which lacks these threads, and waited for ever.
            pipeline._shutdown()

    def _error_line(self, error: str, fed: list[np.ndarray]) -> str:
        """Return DALI's error in one line, with the files that it may mean, given the samples of each batch in work."""
        if (number := re.search(r"sample #(\d+)", error)) and fed:
            names = dict.fromkeys(str(self.split.paths[batch[int(number[1])]]) for batch in fed)
            return f"DALI cannot decode {' or '.join(names)}; replace it, or use --data.loader dataloader"
        return f"DALI: {(error.rpartition('encountered:')[2].strip() or error).splitlines()[0]}"

    def _inputs(self) -> list[str]:
        """Return the names of the pipeline's inputs."""
        resizes = self.spec.augment == "resized_crop"
        return ["images", "start", "flip", *(["box_start", "box_shape", "resized"] if resizes else [])]

    def _pipeline(self, source: Iterator[tuple[Any, ...]]) -> Any:
        """Build the pipeline: bytes or pixels -> (b, S, S, C) uint8, decoded, resized, padded, cropped and flipped."""
        from nvidia.dali import Pipeline, fn, types

        spec, on_gpu = self.spec, self.spec.device.type == "cuda"
        batch = spec.order(1).rank_batch
        pipeline = Pipeline(
            batch_size=max(batch, spec.eval_rank_batch),
            num_threads=max(1, spec.workers),
            device_id=spec.device.index if on_gpu else None,
            prefetch_queue_depth=PREFETCH,
        )
        with pipeline:
            inputs = self._inputs()
            outputs = fn.external_source(source=source, num_outputs=len(inputs), batch=True)
            given = dict(zip(inputs, outputs, strict=True))
            if self.split.images is None:
                images = self._decoded(given)
            else:
                images = fn.reshape(given["images"].gpu() if on_gpu else given["images"], layout="HWC")
                if "box_start" in given:
                    images = fn.slice(images, start=given["box_start"], shape=given["box_shape"], axes=(0, 1))
            if "resized" in given:
                # PIL calls the triangular filter bilinear.
                height, width = given["resized"][0], given["resized"][1]
                images = fn.resize(images, resize_y=height, resize_x=width, interp_type=types.INTERP_TRIANGULAR)
            if self.reflected:
                images = _reflect(images, self.reflected)
            side = [spec.image_size, spec.image_size]
            images = fn.slice(
                images, start=given["start"], shape=side, axes=(0, 1), out_of_bounds_policy="pad", fill_values=0
            )
            pipeline.set_outputs(fn.flip(images, horizontal=given["flip"]))
        pipeline.build()
        return pipeline

    def _decoded(self, given: dict[str, Any]) -> Any:
        """Return the files as RGB, cropped to their boxes if given.

        DALI ignores EXIF, because encoded() has turned the files that are to be turned.
        """
        from nvidia.dali import fn, types

        device = "mixed" if self.spec.device.type == "cuda" else "cpu"
        options = {"device": device, "output_type": types.RGB, "adjust_orientation": False}
        if device == "mixed":
            options["jpeg_fancy_upsampling"] = True  # decode the colours of an edge as a CPU does
        if "box_start" not in given:
            return fn.decoders.image(given["images"], **options)
        box = {"start": given["box_start"], "shape": given["box_shape"], "axes": (0, 1)}
        return fn.decoders.image_slice(given["images"], **box, **options)


def _dense(values: Any) -> Any:
    """Return the values in contiguous memory, because DALI takes no strides."""
    return np.ascontiguousarray(values) if isinstance(values, np.ndarray) else values


def _reflect(images: Any, pad: int) -> Any:
    """Return the images padded by reflection at the border, because DALI itself pads with one value only."""
    from nvidia.dali import fn

    above, below = images[1 : pad + 1], images[-pad - 1 : -1]
    images = fn.cat(fn.flip(above, vertical=1, horizontal=0), images, fn.flip(below, vertical=1, horizontal=0), axis=0)
    left, right = images[:, 1 : pad + 1], images[:, -pad - 1 : -1]
    return fn.cat(fn.flip(left), images, fn.flip(right), axis=1)
