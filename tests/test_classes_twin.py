"""Tables of classes, cell by cell and resample by resample: the slow twin of ``classes``, equal to the last bit."""

import math

import numpy as np
import pytest

import local_elasticity as le
from local_elasticity.similarity import tables as classes


def describe(pairs):
    """Mean, median, count and heavy tail of every cell."""
    k = len(pairs.rows)
    mean, median = np.full((k, k), np.nan), np.full((k, k), np.nan)
    count, heavy = np.zeros((k, k), np.int64), np.zeros((k, k), bool)
    for a, b, cell, used in pairs.cells():
        x = cell[used]
        count[a, b] = x.size
        if x.size:
            mean[a, b], median[a, b], heavy[a, b] = x.mean(), np.median(x), is_heavy(x)
    return mean, median, count, heavy


def is_heavy(x):
    """Whether the largest 1 % (rounded up) carry over half of the sum of absolute values."""
    if x.size < classes._HEAVY_PAIRS:
        return False
    size, top = np.abs(x), math.ceil(x.size / 100)
    return bool(np.partition(size, -top)[-top:].sum() > 0.5 * size.sum())


def cell_sums(pairs, x):
    """The sum of ``x`` over every cell."""
    return np.array([[x[np.ix_(r, c)].sum() for c in pairs.columns] for r in pairs.rows])


def bootstrap(pairs, n_boot, seed):
    """The cell means of every resample; NaN where a class has one probe."""
    w, v = classes._weights(pairs, n_boot, seed)
    filled, used = np.where(pairs.used, pairs.s, 0.0), pairs.used.astype(float)
    boot = np.empty((n_boot, len(pairs.rows), len(pairs.columns)))
    for a, r in enumerate(pairs.rows):
        sums, counts = w[a] @ filled[r], w[a] @ used[r]
        for b, c in enumerate(pairs.columns):
            total, n = np.einsum("bt,bt->b", sums[:, c], v[b]), np.einsum("bt,bt->b", counts[:, c], v[b])
            boot[:, a, b] = classes._divide(total, n)
    boot[:, classes._single(pairs)] = np.nan
    return boot


def interval(boot, confidence):
    """Percentile interval over the first dimension; NaN where no resample has a value."""
    tail = 50 * (1 - confidence)
    low, high = np.full(boot.shape[1:], np.nan), np.full(boot.shape[1:], np.nan)
    some = ~np.isnan(boot).all(0)
    if some.any():
        low[some], high[some] = np.nanpercentile(boot[:, some], [tail, 100 - tail], axis=0)
    return low, high


def spread(boot):
    """Standard deviation over the resamples that have a value, of which two are needed."""
    out = np.full(boot.shape[1:], np.nan)
    some = (~np.isnan(boot)).sum(0) > 1
    out[some] = np.nanstd(boot[:, some], axis=0, ddof=1)
    return out


def slowly(s, y_s, y_t, *, kept, denominators, n_boot, seed=0, confidence=0.95):
    """The numbers of ``by_class`` by name."""
    labels = np.unique(y_s)
    rows, columns = ([np.flatnonzero(y == c) for c in labels] for y in (y_s, y_t))
    pairs = classes._Pairs(s, kept & np.isfinite(s), rows, columns)
    values, median, n_pairs, heavy = describe(pairs)
    boot = bootstrap(pairs, n_boot, seed)
    low, high = interval(boot, confidence)
    ends = [interval(a, confidence) for a in classes._aggregates(boot)]
    weight = np.where(pairs.used, denominators[:, None], 0.0)
    sums = cell_sums(pairs, weight * np.where(pairs.used, s, 0.0)), cell_sums(pairs, weight)
    return {
        "values": values,
        "median": median,
        "n_pairs": n_pairs,
        "heavy_tailed": heavy,
        "n_undefined": cell_sums(pairs, kept.astype(float)).astype(np.int64) - n_pairs,
        "ratio_of_means": classes._divide(*sums),
        "standard_error": spread(boot),
        "interval_low": low,
        "interval_high": high,
        **{f"{name}_interval": np.array(end) for name, end in zip(("intra", "inter", "ratio"), ends, strict=True)},
    }


def same(table, wanted):
    for name, values in wanted.items():
        np.testing.assert_array_equal(np.asarray(getattr(table, name)), values, err_msg=name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("n_boot", [200, 7, 0])
@pytest.mark.parametrize("share", [0.0, 0.1])
@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize(("k", "n"), [(3, 20), (10, 5), (30, 2), (5, 7), (1, 4), (4, 1), (12, 9)])
def test_every_bit_of_a_table_is_that_of_the_plain_loops(k, n, exclude_self, share, n_boot):
    rng, y = np.random.default_rng(k), np.repeat(np.arange(k), n)
    s = rng.standard_normal((k * n, k * n)) ** 3
    s[rng.random(s.shape) < share] = np.nan
    denominators = rng.random(k * n)
    table = le.by_class(s, y, y, exclude_self=exclude_self, n_boot=n_boot, denominators=denominators)
    kept = ~np.eye(len(y), dtype=bool) if exclude_self else np.ones(s.shape, bool)
    same(table, slowly(s, y, y, kept=kept, denominators=denominators, n_boot=n_boot))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(12))
def test_classes_of_different_sizes_in_any_order(seed, monkeypatch):
    monkeypatch.setattr(classes, "_DRAWS_AT_ONCE", 500)  # a few source classes at a time
    rng = np.random.default_rng(seed)
    k = int(rng.integers(2, 8))
    y_s, y_t = (rng.permutation(np.repeat(np.arange(k), rng.integers(1, 9, k))) for _ in range(2))
    s, denominators = rng.standard_normal((y_s.size, y_t.size)), rng.random(y_s.size)
    s[rng.random(s.shape) < 0.2 * (seed % 2)] = np.nan
    table = le.by_class(s, y_s, y_t, denominators=denominators, n_boot=50)
    same(table, slowly(s, y_s, y_t, kept=np.ones(s.shape, bool), denominators=denominators, n_boot=50))


def test_the_dataset_holds_what_the_arrays_are():
    rng, y = np.random.default_rng(0), np.repeat(np.arange(3), 4)
    table = le.by_class(rng.standard_normal((12, 12)), y, y)
    data = table.to_xarray()
    assert set(map(str, data.data_vars)) == set(table.arrays())
    for name, values in table.arrays().items():
        np.testing.assert_array_equal(data[name].values, values)
