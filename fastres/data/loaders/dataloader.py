"""The DataLoader of torch, as the baseline. Worker processes decode and augment one sample at a time on the host."""

from __future__ import annotations

import multiprocessing.connection
import signal
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from multiprocessing.process import BaseProcess

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastres.data.augment import BatchTransform, crop_and_flip_one, resize_and_center_crop, resized_crop
from fastres.data.sampling import SampleOrder, Samples, sample_generator
from fastres.data.sources.source import Split
from fastres.data.spec import IGNORED, BatchSpec
from fastres.utils.errors import UsageError

DEATH_S = 1.0  # wait this long after an error for the death of the worker that caused it
REMEDY = "if memory or /dev/shm ran out, use fewer --data.workers or another --data.loader"


class HostLoader:
    """Make batches with torch's DataLoader; see Loader for the contract."""

    def __init__(self, split: Split, spec: BatchSpec) -> None:
        self.split, self.spec = split, spec
        self.transform = BatchTransform(spec)

    def train(self, first_step: int, last_step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield one augmented batch for each step of [first_step, last_step)."""
        order = self.spec.order(len(self.split))
        samples = _TrainSamples(self.split, self.spec, order, first_step, last_step)
        batches = self._batches(samples, order.rank_batch)
        for step, (pixels, labels) in zip(range(first_step, last_step), batches, strict=True):
            yield self.transform(pixels, labels, self.transform.draws(order.samples(step, step + 1)))

    def evaluate(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield every sample once over all processes, not augmented."""
        for pixels, labels in self._batches(_EvalSamples(self.split, self.spec), self.spec.eval_rank_batch):
            yield self.transform(pixels, labels)

    def _batches(self, samples: Dataset[tuple[np.ndarray, int]], batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield pixels (b, S, S, C) uint8 and labels (b,) int64, on the device.

        Raises:
            UsageError: if a sample cannot be read or a worker process dies.
        """
        cuda = self.spec.device.type == "cuda"
        others = multiprocessing.active_children()
        with _no_signal_on_death():
            batches = iter(DataLoader(samples, batch, num_workers=self.spec.workers, pin_memory=cuda))
        workers = [process for process in multiprocessing.active_children() if process not in others]
        while True:
            try:
                pixels, labels = next(batches)
            except StopIteration:
                return
            except Exception as error:
                if isinstance(error, UsageError):
                    # From a worker, the message is the end of the worker's traceback.
                    line = str(error).rpartition("fastres.utils.errors.UsageError: ")[2].strip()
                elif fate := _fate_of_any(workers):  # the death of a worker may surface as any error
                    line = f"a worker process of the dataloader {fate}; {REMEDY}"
                else:
                    raise
                # End the other workers here. The error's traceback would keep them for the garbage collector, which
                # may run in a forked process and wait there for seconds.
                traceback.clear_frames(error.__traceback__)
                del batches
                raise UsageError(line) from None
            yield (pixels.to(self.spec.device, non_blocking=True), labels.to(self.spec.device, non_blocking=True))


@contextmanager
def _no_signal_on_death() -> Iterator[None]:
    """Restore SIGCHLD's handler after the block, in which torch replaces it by one that raises if a worker dies.

    torch's handler raises wherever the main thread happens to be, for example in a step or while it writes a file.
    Without it, the next batch raises, within 5 s.
    """
    if threading.current_thread() is not threading.main_thread():  # torch installs it in the main thread only
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


def _fate_of_any(workers: list[BaseProcess]) -> str | None:
    """Return a phrase about the end of one of the processes, or None if all are running."""
    ended = multiprocessing.connection.wait([worker.sentinel for worker in workers], timeout=DEATH_S)
    for worker in workers:
        if worker.sentinel in ended:  # it closes a moment before the system knows the exit status
            worker.join(DEATH_S)
    for code in (worker.exitcode for worker in workers):
        if code is not None:
            return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    return None


class _TrainSamples(Dataset[tuple[np.ndarray, int]]):
    """This process's samples of the steps [first, last), one after another."""

    def __init__(self, split: Split, spec: BatchSpec, order: SampleOrder, first: int, last: int) -> None:
        self.split, self.spec, self.order, self.first, self.last = split, spec, order, first, last

    def __len__(self) -> int:
        return (self.last - self.first) * self.order.rank_batch

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        step, row = divmod(i, self.order.rank_batch)
        samples = _samples_of_step(self.order, self.first + step)
        index, flip = int(samples.index[row]), bool(samples.flip[row])
        size, pad = self.spec.image_size, self.order.pad
        dy, dx = int(samples.dy[row]), int(samples.dx[row])
        if self.spec.augment == "resized_crop":
            generator = sample_generator(self.order.seed, int(samples.epoch[row]), index)
            image = resized_crop(self.split.image(index), size, generator)
        else:
            image = self.split.sized_image(index, size, size)
        image = crop_and_flip_one(image, size, pad, self.spec.pad_mode, dy, dx, flip)
        return image, int(self.split.labels[index])


class _EvalSamples(Dataset[tuple[np.ndarray, int]]):
    """This process's samples of every evaluation batch, padded to equal sizes."""

    def __init__(self, split: Split, spec: BatchSpec) -> None:
        self.split, self.spec = split, spec
        self.batches = spec.eval_batches(len(split))

    def __len__(self) -> int:
        return len(self.batches) * self.spec.eval_rank_batch

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        batch, row = divmod(i, self.spec.eval_rank_batch)
        indices, count = self.batches[batch]
        index = int(indices[row])
        view = evaluation_view(self.split, index, self.spec.augment, self.spec.image_size)
        return view, int(self.split.labels[index]) if row < count else IGNORED


def evaluation_view(split: Split, index: int, augment: str, size: int) -> np.ndarray:
    """Return sample `index` as an evaluation sees it: (size, size, C) uint8.

    Raises:
        UsageError: if the image has another size and is not resized.
    """
    if augment == "resized_crop":
        return resize_and_center_crop(split.image(index), size)
    return split.sized_image(index, size, size)


@lru_cache(maxsize=4)
def _samples_of_step(order: SampleOrder, step: int) -> Samples:
    """Return this process's samples of a step, cached because a worker asks for one sample at a time."""
    return order.samples(step, step + 1)
