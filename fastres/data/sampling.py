"""Order and augmentation of a run's samples as pure functions, the same for every loader and number of processes.

Sample j of a run is perm(seed, j div N)[j mod N], with N samples in the split. Step k takes the samples j in
[kB, (k+1)B), with B the global batch size, so batches are always full. A sample's augmentation is drawn from (seed,
epoch, sample index).

Everything is computed from the raw 64-bit words of Philox (Salmon et al. 2011), a counter-based generator whose stream
numpy guarantees. A library's shuffle may change its result with its version.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

# Streams: disjoint parts of Philox's counter.
(
    PERMUTATION, CROP_Y, CROP_X, FLIP, RESIZED_CROP,
    CUTOUT_Y, CUTOUT_X, MIX_SHARE, MIX_KIND, CUTMIX_Y, CUTMIX_X,
) = range(11)  # fmt: skip


def words(seed: int, epoch: int, stream: int, n: int) -> np.ndarray:
    """Return n raw words of a stream: (n,) uint64, read-only."""
    drawn = _drawn(seed, epoch, n)
    if stream not in drawn:
        raw = _philox(seed, epoch, counter=(0, 0, 0, stream)).random_raw(n)
        raw.setflags(write=False)
        drawn[stream] = raw
    return drawn[stream]


@lru_cache(maxsize=2)  # a batch may span two epochs
def _drawn(seed: int, epoch: int, n: int) -> dict[int, np.ndarray]:
    """Return the cache of an epoch's words by stream. words() fills it; every batch of the epoch reads all streams."""
    return {}


@lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """Return the order of an epoch, the ranks of n random words: (n,) int64, read-only."""
    order = np.argsort(words(seed, epoch, PERMUTATION, n), kind="stable")
    order.setflags(write=False)
    return order


def sample_generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    """Return a generator for one sample, for draws whose number is not known beforehand (resized crops)."""
    return np.random.Generator(_philox(seed, epoch, counter=(0, 0, index, RESIZED_CROP)))


def _philox(seed: int, epoch: int, counter: tuple[int, int, int, int]) -> np.random.Philox:
    """Return the generator of (seed, epoch) at this counter."""
    # Use uint64, because numpy would convert a list of mixed integers through float64, in which large seeds coincide.
    return np.random.Philox(key=np.array([seed, int(epoch)], np.uint64), counter=np.array(counter, np.uint64))


@dataclass(frozen=True)
class Samples:
    """n samples and the augmentation of each."""

    epoch: np.ndarray  # (n,) int64
    index: np.ndarray  # (n,) int64, into the split
    dy: np.ndarray  # (n,) int64, rows cut from the top of the padded image, 0 to 2·pad
    dx: np.ndarray  # (n,) int64, columns cut from its left
    flip: np.ndarray  # (n,) bool, after the crop
    cutout: np.ndarray  # (n, 2) int64, row and column of the centre of the square that is blanked
    blend: np.ndarray  # (n,) float64, the image's own share of each pixel; its neighbour has the rest
    box: np.ndarray  # (n, 4) int64, top, bottom, left, right of the rectangle that its neighbour covers

    def slice(self, start: int, stop: int) -> Samples:
        """Return the samples [start, stop)."""
        return Samples(*(values[start:stop] for values in vars(self).values()))


@dataclass(frozen=True, kw_only=True)
class SampleOrder:
    """The samples that one process takes at every step."""

    n: int  # samples in the split
    batch: int  # the global batch size: samples of a step over all processes
    seed: int
    rank: int = 0
    world_size: int = 1
    size: int = 1  # side of a crop, in pixels
    pad: int = 0
    flip: bool | Literal["alternating"] = False
    cutout: bool = False
    mixup: float = 0.0  # parameter of the Beta distribution; 0: none
    cutmix: float = 0.0  # likewise

    @property
    def rank_batch(self) -> int:
        """Return the per-rank batch size."""
        return self.batch // self.world_size

    def samples(self, first_step: int, last_step: int) -> Samples:
        """Return this process's samples of the steps [first_step, last_step), step after step."""
        steps = np.arange(first_step, last_step, dtype=np.int64)[:, None]
        rows = np.arange(self.rank * self.rank_batch, (self.rank + 1) * self.rank_batch, dtype=np.int64)
        epoch, position = np.divmod((steps * self.batch + rows).ravel(), self.n)
        n = len(epoch)
        out = Samples(
            epoch=epoch,
            index=np.zeros(n, np.int64),
            dy=np.zeros(n, np.int64),
            dx=np.zeros(n, np.int64),
            flip=np.zeros(n, bool),
            cutout=np.zeros((n, 2), np.int64),
            blend=np.ones(n),
            box=np.zeros((n, 4), np.int64),
        )
        for e in np.unique(epoch):
            in_epoch = epoch == e
            index = out.index[in_epoch] = permutation(self.seed, e, self.n)[position[in_epoch]]
            if self.pad:
                out.dy[in_epoch] = self._below(2 * self.pad + 1, e, CROP_Y, index)
                out.dx[in_epoch] = self._below(2 * self.pad + 1, e, CROP_X, index)
            if self.flip == "alternating":
                out.flip[in_epoch] = self._coin(0, FLIP, index) ^ bool(e % 2)
            elif self.flip:
                out.flip[in_epoch] = self._coin(e, FLIP, index)
            if self.cutout:
                out.cutout[in_epoch, 0] = self._below(self.size, e, CUTOUT_Y, index)
                out.cutout[in_epoch, 1] = self._below(self.size, e, CUTOUT_X, index)
            if self.mixup or self.cutmix:
                out.blend[in_epoch], out.box[in_epoch] = self._mixing(e, index)
        return out

    def _mixing(self, epoch: int, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return blend and box of the samples at `index`. With mixup and cutmix, a coin decides for each sample."""
        from scipy.special import betaincinv  # takes 0.2 s, which a run without mixup and cutmix saves

        cutmix = np.full(len(index), self.cutmix > 0)
        if self.mixup and self.cutmix:
            cutmix = self._coin(epoch, MIX_KIND, index)
        alpha = np.where(cutmix, self.cutmix, self.mixup)
        # Invert Beta's distribution function at 53 random bits, as many as a float64 has.
        uniform = (words(self.seed, epoch, MIX_SHARE, self.n)[index] >> np.uint64(11)) * 2.0**-53
        share = betaincinv(alpha, alpha, uniform)
        box = np.zeros((len(index), 4), np.int64)
        half = (self.size * np.sqrt(1 - share[cutmix]) / 2).astype(np.int64)
        for first, stream in ((0, CUTMIX_Y), (2, CUTMIX_X)):
            centre = self._below(self.size, epoch, stream, index[cutmix])
            box[cutmix, first] = np.maximum(centre - half, 0)
            box[cutmix, first + 1] = np.minimum(centre + half, self.size)
        return np.where(cutmix, 1, share), box

    def _below(self, bound: int, epoch: int, stream: int, index: np.ndarray) -> np.ndarray:
        """Return a uniform whole number below `bound` for each sample: (n,) int64."""
        drawn: np.ndarray = words(self.seed, epoch, stream, self.n)[index] % np.uint64(bound)
        return drawn.astype(np.int64)

    def _coin(self, epoch: int, stream: int, index: np.ndarray) -> np.ndarray:
        """Return a fair coin's toss for each sample: (n,) bool."""
        drawn: np.ndarray = words(self.seed, epoch, stream, self.n)[index] >> np.uint64(63)
        return drawn.astype(bool)
