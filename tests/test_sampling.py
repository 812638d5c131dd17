"""The order of samples and the random draws of their augmentation are pure functions, equal for every loader."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, chisquare, ks_2samp, kstest, uniform

from fastres.data.sampling import SampleOrder, Samples, permutation, sample_generator, words

FIELDS = ("epoch", "index", "dy", "dx", "flip")


def rows(samples: Samples) -> list[tuple[int, ...]]:
    """Return one (epoch, index, dy, dx, flip) per sample."""
    return [tuple(map(int, row)) for row in zip(*(getattr(samples, f) for f in FIELDS), strict=True)]


def everything(samples: Samples) -> list[tuple[float, ...]]:
    """Return all draws, one row per sample."""
    return [tuple(row) for row in np.column_stack(list(vars(samples).values())).tolist()]


def by_the_specification(order: SampleOrder, step: int) -> list[tuple[int, ...]]:
    """Compute step `step` of all processes, sample by sample, from raw Philox words."""

    def word(epoch: int, stream: int, position: int) -> int:
        generator = np.random.Philox(key=[order.seed, epoch], counter=[0, 0, 0, stream])
        return int(generator.random_raw(position + 1)[-1])

    batch = []
    for j in range(step * order.batch, (step + 1) * order.batch):
        epoch, position = j // order.n, j % order.n
        ranked = sorted(range(order.n), key=lambda i: word(epoch, 0, i))
        i = ranked[position]
        dy, dx = (word(epoch, stream, i) % (2 * order.pad + 1) for stream in (1, 2))
        flip = word(epoch, 3, i) >= 2**63
        batch.append((epoch, i, dy if order.pad else 0, dx if order.pad else 0, int(flip and order.flip)))
    return batch


@pytest.mark.parametrize(
    ("n", "batch", "pad", "flip"),
    [
        (10, 4, 4, True),  # step 2 spans two epochs
        (10, 5, 0, True),  # epochs end with a step
        (3, 7, 1, False),  # one step spans more than two epochs
        (1, 2, 2, True),  # a set of one
        (8, 8, 0, False),
    ],
)
def test_sample_j_is_perm_of_seed_and_j_div_n_at_j_mod_n(n: int, batch: int, pad: int, flip: bool) -> None:
    order = SampleOrder(n=n, batch=batch, seed=11, pad=pad, flip=flip)
    for step in range(6):
        assert rows(order.samples(step, step + 1)) == by_the_specification(order, step)


small = st.integers(1, 40)
orders = st.builds(
    SampleOrder, n=small, batch=st.sampled_from([4, 8, 12]), seed=st.integers(0, 2**64 - 1), pad=st.integers(0, 4),
    flip=st.sampled_from([False, True, "alternating"]), size=st.integers(1, 40), cutout=st.booleans(),
    mixup=st.sampled_from([0.0, 0.2, 1.0]), cutmix=st.sampled_from([0.0, 1.0, 2.0]),
)  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(order=orders, a=st.integers(0, 30), length=st.integers(0, 9), cut=st.integers(0, 9))
def test_blocks_join_and_batches_are_full(order: SampleOrder, a: int, length: int, cut: int) -> None:
    b, c = a + min(cut, length), a + length
    whole = everything(order.samples(a, c))
    assert everything(order.samples(a, b)) + everything(order.samples(b, c)) == whole
    assert len(whole) == length * order.batch


@settings(max_examples=50, deadline=None)
@given(order=orders, step=st.integers(0, 30), world_size=st.sampled_from([1, 2, 4]))
def test_the_batches_of_all_ranks_make_up_the_global_batch(order: SampleOrder, step: int, world_size: int) -> None:
    shares = [
        SampleOrder(**{**vars(order), "rank": rank, "world_size": world_size}).samples(step, step + 1)
        for rank in range(world_size)
    ]
    assert {len(share.index) for share in shares} == {order.batch // world_size}
    assert [row for share in shares for row in everything(share)] == everything(order.samples(step, step + 1))


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 1000), n=st.integers(1, 300))
def test_a_permutation_has_every_sample_once(seed: int, epoch: int, n: int) -> None:
    assert sorted(permutation(seed, epoch, n).tolist()) == list(range(n))


def test_other_seeds_and_epochs_have_other_orders() -> None:
    seeds = [0, 1, 2**32, 2**32 + 1, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 1]
    epochs = [int(e) for e in SampleOrder(n=100, batch=100, seed=0).samples(0, 3).epoch[::100]]
    assert epochs == [0, 1, 2]
    orders = {
        tuple(SampleOrder(n=100, batch=100, seed=seed).samples(epoch, epoch + 1).index.tolist())
        for seed in seeds
        for epoch in epochs
    }
    assert len(orders) == len(seeds) * len(epochs)


def test_draws_depend_on_seed_epoch_and_sample_alone() -> None:
    n = 60
    drawn = [
        {row[:2]: row[2:] for row in rows(SampleOrder(n=n, batch=batch, seed=3, pad=4, flip=True).samples(0, steps))}
        for batch, steps in ((60, 3), (12, 15), (45, 4), (180, 1))
    ]
    assert set(drawn[0]) == {(epoch, index) for epoch in range(3) for index in range(n)}
    for one, other in pairwise(drawn):
        assert one == other
    epochs = [[drawn[0][epoch, index] for index in range(n)] for epoch in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    flips = {row[:2]: row[4] for row in rows(SampleOrder(n=n, batch=60, seed=3, flip=True).samples(0, 3))}
    assert flips == {key: draw[2] for key, draw in drawn[0].items()}  # with a crop or without


def test_crops_and_flips_are_uniform_and_independent() -> None:
    n, sides = 90_000, 9
    samples = SampleOrder(n=n, batch=n, seed=0, pad=4, flip=True).samples(0, 1)
    cells = (samples.dy * sides + samples.dx) * 2 + samples.flip
    observed = np.bincount(cells, minlength=sides * sides * 2)
    assert len(observed) == sides * sides * 2
    expected = n / len(observed)
    chi_square = float(((observed - expected) ** 2 / expected).sum())
    assert 110 < chi_square < 225  # 161 degrees of freedom: one in a thousand is beyond each end
    correlation = np.corrcoef(np.arange(n), samples.index)[0, 1]
    assert abs(correlation) < 4 / n**0.5


def test_alternating_flip_mirrors_every_other_epoch() -> None:
    order = SampleOrder(n=1_000, batch=1_000, seed=0, flip="alternating")
    flips = []
    for epoch in range(4):
        samples = order.samples(epoch, epoch + 1)
        flips.append(samples.flip[np.argsort(samples.index)])
    assert 440 < flips[0].sum() < 560
    for one, other in pairwise(flips):
        assert (one != other).all()
    assert (flips[0] == SampleOrder(n=1_000, batch=1_000, seed=0, flip=True).samples(0, 1).flip[
        np.argsort(order.samples(0, 1).index)
    ]).all()  # fmt: skip


N = 20_000
drawing = {"n": N, "batch": N, "seed": 0, "size": 32}


def test_cutouts_are_centred_on_every_pixel_alike() -> None:
    samples = SampleOrder(**drawing, pad=4, flip=True, cutout=True).samples(0, 1)
    y, x = samples.cutout.T
    assert chisquare(np.bincount(y * 32 + x, minlength=32 * 32)).pvalue > 0.001
    others = np.column_stack([samples.dy, samples.dx, samples.flip])
    correlations = np.corrcoef(np.column_stack([samples.cutout, others]).T)[:2, 2:]
    assert np.abs(correlations).max() < 4 / N**0.5


@pytest.mark.parametrize("alpha", [0.2, 1.0, 2.0])
def test_mixup_shares_are_beta_distributed(alpha: float) -> None:
    samples = SampleOrder(**drawing, mixup=alpha).samples(0, 1)
    assert kstest(samples.blend, beta(alpha, alpha).cdf).pvalue > 0.001
    assert not samples.box.any()


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_cutmix_boxes_have_beta_distributed_areas_around_uniform_centres(alpha: float) -> None:
    size = 1_024  # large, so that rounding to pixels and the borders do not matter
    samples = SampleOrder(**{**drawing, "size": size}, cutmix=alpha).samples(0, 1)
    assert (samples.blend == 1).all()
    top, bottom, left, right = samples.box.T
    assert (top >= 0).all() and (bottom <= size).all() and (top <= bottom).all()
    assert (left >= 0).all() and (right <= size).all() and (left <= right).all()
    inside = (top > 0) & (bottom < size)
    # A side has size·√(1 − λ), uncut if it fits; then its centre is uniform on the rest of the side.
    sides = (bottom - top)[inside] / size
    fits = beta(alpha, alpha).rvs(200_000, random_state=np.random.default_rng(0))
    fits = np.sqrt(1 - fits)
    fits = fits[np.random.default_rng(1).random(len(fits)) < 1 - fits]
    assert ks_2samp(sides, fits).pvalue > 0.001
    centre = ((top + bottom) / 2 / size)[inside]
    assert kstest((centre - sides / 2) / (1 - sides), uniform.cdf).pvalue > 0.001
    both = inside & (left > 0) & (right < size)
    assert np.abs((bottom - top) - (right - left))[both].max() == 0  # the boxes of square images are squares


def test_a_coin_decides_between_mixup_and_cutmix() -> None:
    samples = SampleOrder(**drawing, mixup=1.0, cutmix=1.0).samples(0, 1)
    pasted = samples.blend == 1
    assert 0.48 < pasted.mean() < 0.52
    assert not samples.box[~pasted].any()
    assert kstest(samples.blend[~pasted], uniform.cdf).pvalue > 0.001
    assert samples.box[pasted].any(axis=1).mean() > 0.95


def test_every_pair_of_samples_becomes_neighbours_about_equally_often() -> None:
    """Mixup mixes neighbours in the order of a batch."""
    n, epochs = 8, 4_000
    index = SampleOrder(n=n, batch=n, seed=0).samples(0, epochs).index.reshape(-1, 2)
    low, high = np.sort(index, axis=1).T
    met = np.bincount(low * n + high, minlength=n * n).reshape(n, n)[np.triu_indices(n, 1)]
    assert chisquare(met).pvalue > 0.001


def test_the_stream_is_what_it_was_when_runs_were_recorded() -> None:
    # A change of these values changes every run: resumed runs go wrong, and recorded results cannot be repeated.
    assert words(0, 0, 0, 2).tolist() == [213000021201967259, 4455796210202625458]
    assert words(1, 2, 3, 2).tolist() == [1170280437898119671, 13051159143091778299]
    assert permutation(0, 0, 10).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    assert permutation(1, 0, 10).tolist() == [3, 5, 2, 9, 7, 0, 8, 6, 1, 4]
    assert permutation(7, 3, 50_000)[:5].tolist() == [38556, 22299, 8306, 33912, 39504]
    assert rows(SampleOrder(n=10, batch=4, seed=5, pad=4, flip=True).samples(2, 3)) == [
        (0, 7, 2, 2, 0),
        (0, 8, 8, 1, 0),
        (1, 7, 3, 5, 0),
        (1, 4, 4, 1, 0),
    ]
    order = SampleOrder(n=10, batch=4, seed=5, size=32, flip="alternating", cutout=True, mixup=0.2, cutmix=1.0)
    assert everything(order.samples(2, 3)) == [
        (0, 7, 0, 0, 0, 14, 3, pytest.approx(1.8154185e-14), 0, 0, 0, 0),
        (0, 8, 0, 0, 0, 24, 26, pytest.approx(0.98144223), 0, 0, 0, 0),
        (1, 7, 0, 0, 1, 8, 25, pytest.approx(0.99975047), 0, 0, 0, 0),
        (1, 4, 0, 0, 0, 16, 30, 1, 9, 25, 4, 20),
    ]
    assert sample_generator(3, 1, 4).integers(0, 1000, 5).tolist() == [921, 625, 920, 751, 467]


def test_cached_arrays_are_read_only() -> None:
    for cached in (words(0, 0, 0, 4), permutation(0, 0, 4)):
        with pytest.raises(ValueError, match="read-only"):
            cached[0] = 0


def test_all_streams_of_an_epoch_are_drawn_once() -> None:
    streams = range(11)
    first = [words(9, 0, stream, 4) for stream in streams]
    assert all(words(9, 0, stream, 4) is first[stream] for stream in streams)
