"""The order and the randomness of a run, as pure functions: the same for every loader and any number of processes.

Sample j of a run is perm(seed, j div N)[j mod N]; step k takes the samples j in [kB, (k+1)B), B the global
batch, so batches are always full. Crop and flip are drawn from (seed, epoch, sample index).

Everything is computed from Philox's raw 64-bit words (Salmon et al. 2011), a counter-based generator whose
stream numpy guarantees, and not from a library's shuffle, whose result may change with its version.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

PERMUTATION, CROP_Y, CROP_X, FLIP, RESIZED_CROP = range(5)  # streams: disjoint parts of Philox's counter


@lru_cache(maxsize=8)
def words(seed: int, epoch: int, stream: int, n: int) -> np.ndarray:
    """n raw words of a stream: (n,) uint64, read-only."""
    raw = _philox(seed, epoch, counter=(0, 0, 0, stream)).random_raw(n)
    raw.setflags(write=False)
    return raw


@lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order of an epoch: (n,) int64, the ranks of n random words; read-only."""
    order = np.argsort(words(seed, epoch, PERMUTATION, n), kind="stable")
    order.setflags(write=False)
    return order


def sample_generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    """A generator of one sample's own, for draws whose number is not known beforehand (resized crops)."""
    return np.random.Generator(_philox(seed, epoch, counter=(0, 0, index, RESIZED_CROP)))


def _philox(seed: int, epoch: int, counter: tuple[int, int, int, int]) -> np.random.Philox:
    # As uint64: numpy would take a list of both kinds of integers through float64, where large seeds are one.
    return np.random.Philox(key=np.array([seed, int(epoch)], np.uint64), counter=np.array(counter, np.uint64))


@dataclass(frozen=True)
class Samples:
    """Which samples, and how each is cropped and flipped; all fields (n,)."""

    epoch: np.ndarray  # int64
    index: np.ndarray  # int64, into the split
    dy: np.ndarray  # int64, rows cut from the top of the padded image, 0 to 2·pad
    dx: np.ndarray  # int64, columns cut from its left
    flip: np.ndarray  # bool, after the crop


@dataclass(frozen=True, kw_only=True)
class Order:
    """The samples of one process's share of every step."""

    n: int  # samples in the split
    batch: int  # samples of a step, over all processes
    seed: int
    rank: int = 0
    world: int = 1
    pad: int = 0
    flip: bool = False

    @property
    def local_batch(self) -> int:
        return self.batch // self.world

    def samples(self, first_step: int, last_step: int) -> Samples:
        """This process's samples of the steps [first_step, last_step), step after step."""
        steps = np.arange(first_step, last_step, dtype=np.int64)[:, None]
        share = np.arange(self.rank * self.local_batch, (self.rank + 1) * self.local_batch, dtype=np.int64)
        epoch, position = np.divmod((steps * self.batch + share).ravel(), self.n)
        zeros = np.zeros_like(epoch)
        out = Samples(epoch, zeros, zeros.copy(), zeros.copy(), zeros.astype(bool))
        for e in np.unique(epoch):
            here = epoch == e
            index = permutation(self.seed, e, self.n)[position[here]]
            out.index[here] = index
            if self.pad:
                sides = np.uint64(2 * self.pad + 1)
                out.dy[here] = words(self.seed, e, CROP_Y, self.n)[index] % sides
                out.dx[here] = words(self.seed, e, CROP_X, self.n)[index] % sides
            if self.flip:
                out.flip[here] = words(self.seed, e, FLIP, self.n)[index] >> np.uint64(63)
        return out
