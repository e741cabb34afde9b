import math

import numpy as np
import pytest
import torch

from local_elasticity.base.errors import InputError
from local_elasticity.similarity.tables import by_class

YS, YT = np.repeat([0, 2, 3], [4, 5, 3]), np.repeat([3, 0, 2], [3, 6, 2])


def similarity(seed=0, n_s=12, n_t=11):
    return np.random.default_rng(seed).lognormal(size=(n_s, n_t))


def test_equals_slow_loops():
    s, den = similarity(), np.random.default_rng(1).uniform(1, 2, 12)
    s[0, :4] = np.nan
    table = by_class(torch.tensor(s), torch.tensor(YS), YT.tolist(), denominators=den)
    for a, p in enumerate((0, 2, 3)):
        for b, q in enumerate((0, 2, 3)):
            index = [(i, j) for i in range(12) for j in range(11) if YS[i] == p and YT[j] == q]
            used = [(i, j) for i, j in index if not math.isnan(s[i, j])]
            x = [s[i, j] for i, j in used]
            assert table.values[a, b] == pytest.approx(sum(x) / len(x))
            assert table.median[a, b] == pytest.approx(np.median(x))
            want = sum(den[i] * s[i, j] for i, j in used) / sum(den[i] for i, _ in used)
            assert table.ratio_of_means[a, b] == pytest.approx(want)
            assert table.n_pairs[a, b] == len(used)
            assert table.n_undefined[a, b] == len(index) - len(used)
    off = ~np.eye(3, dtype=bool)
    assert table.intra == pytest.approx(np.diagonal(table.values).mean())
    assert table.inter == pytest.approx(table.values[off].mean())
    assert table.ratio == pytest.approx(table.inter / table.intra)
    assert table.classes.tolist() == [0, 2, 3]
    assert table.n_undefined.sum() == 4
    assert np.isnan(by_class(s, YS, YT).ratio_of_means).all()


def test_bootstrap_equals_slow_resampling():
    s = similarity()
    s[2, 5] = np.nan
    table = by_class(s, YS, YT, n_boot=40, seed=3)
    rng = np.random.default_rng(3)
    classes = (0, 2, 3)

    def draw(labels):
        return [rng.multinomial(n := (labels == c).sum(), np.full(n, 1 / n), size=40) for c in classes]

    w, v = draw(YS), draw(YT)
    means, medians = np.empty((40, 3, 3)), np.empty((40, 3, 3))
    for b in range(40):
        for p, i in enumerate(classes):
            for q, j in enumerate(classes):
                cell = s[
                    np.ix_(np.repeat(np.flatnonzero(i == YS), w[p][b]), np.repeat(np.flatnonzero(j == YT), v[q][b]))
                ]
                means[b, p, q], medians[b, p, q] = np.nanmean(cell), np.nanmedian(cell)
    np.testing.assert_allclose(table.standard_error, means.std(0, ddof=1))
    np.testing.assert_allclose(table.interval_low, np.percentile(means, 2.5, axis=0))
    np.testing.assert_allclose(table.interval_high, np.percentile(means, 97.5, axis=0))
    np.testing.assert_allclose(table.median_interval(), np.percentile(medians, [2.5, 97.5], axis=0))
    intra = np.diagonal(means, axis1=1, axis2=2).mean(1)
    np.testing.assert_allclose(table.intra_interval, np.percentile(intra, [2.5, 97.5]))


def test_same_seed_same_numbers_and_no_global_randomness():
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    a, b, c = (by_class(similarity(), YS, YT, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(a.interval_low, b.interval_low)
    assert a.ratio_interval == b.ratio_interval
    assert (a.interval_low != c.interval_low).any()
    assert (np.random.get_state()[1] == state).all()  # noqa: NPY002


def test_intervals_cover_a_two_way_random_effect():
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1], 15)
    hits, errors, means = [], [], []
    for trial in range(150):
        s = 5 + rng.normal(size=(30, 1)) + rng.normal(size=(1, 30)) + rng.normal(size=(30, 30))
        table = by_class(s, y, y, source_ids=np.arange(30), target_ids=np.arange(30, 60), seed=trial)
        hits.append((table.interval_low <= 5) & (table.interval_high >= 5))
        errors.append(table.standard_error)
        means.append(table.values)
    assert 0.87 < np.mean(hits) < 0.99
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.15)


def test_self_pairs():
    s, y = similarity(n_s=6, n_t=6), np.repeat([0, 1], 3)
    inside, outside = by_class(s, y, y), by_class(s, y, y, exclude_self=True)
    assert (inside.self_pairs, outside.self_pairs) == ("in", "out")
    assert inside.n_pairs.tolist() == [[9, 9], [9, 9]]
    assert outside.n_pairs.tolist() == [[6, 9], [9, 6]]
    assert outside.values[0, 0] == pytest.approx(s[:3, :3][~np.eye(3, dtype=bool)].mean())
    assert np.isfinite(outside.interval_low).all()
    ids = [5, 6, 7, 8, 9, 10]
    crossed = by_class(s, y, y, exclude_self=True, source_ids=ids, target_ids=ids[::-1])
    assert crossed.n_pairs.tolist() == [[9, 6], [6, 9]]
    with pytest.raises(InputError, match="source_ids and target_ids"):
        by_class(similarity(), YS, YT, exclude_self=True)
    with pytest.raises(InputError, match="sample index"):
        by_class(s, y, y, exclude_self=True, source_ids=ids[:2], target_ids=ids)


def test_undefined_pairs_are_counted_and_never_clipped():
    s, y = similarity(n_s=6, n_t=6), np.repeat([0, 1], 3)
    s[0, 0], s[1, 2], s[:3, 3:] = np.nan, np.inf, np.nan
    table = by_class(s, y, y, exclude_self=True)
    assert table.n_undefined.tolist() == [[1, 9], [0, 0]]  # the self pair (0, 0) is out, not undefined
    assert table.n_pairs.tolist() == [[5, 0], [9, 6]]
    assert math.isnan(table.values[0, 1])
    assert math.isnan(table.inter)
    assert math.isfinite(table.intra)


def test_a_class_with_one_probe_has_no_interval():
    y = np.array([0, 0, 0, 1])
    table = by_class(similarity(n_s=4, n_t=4), y, y)
    assert np.isnan(table.standard_error).tolist() == [[False, True], [True, True]]
    assert np.isnan(table.interval_low).tolist() == [[False, True], [True, True]]
    assert np.isnan(table.median_interval()[0]).tolist() == [[False, True], [True, True]]
    assert np.isfinite(table.values).all()
    assert all(map(math.isnan, (*table.intra_interval, *table.inter_interval, *table.ratio_interval)))


def test_heavy_tails():
    s, y = np.ones((20, 20)), np.repeat([0, 1], 10)
    s[0, 0], s[15, 0] = -200.0, 50.0
    assert by_class(s, y, y).heavy_tailed.tolist() == [[True, False], [False, False]]
    few = np.ones((4, 4))
    few[0, 0] = 1e6
    assert not by_class(few, np.zeros(4, int), np.zeros(4, int)).heavy_tailed.any()


def test_one_class_and_no_bootstrap():
    table = by_class(similarity(n_s=4, n_t=4), [0] * 4, [0] * 4, n_boot=0)
    assert math.isnan(table.inter)
    assert math.isnan(table.ratio)
    assert np.isnan(table.interval_low).all()


def test_to_xarray():
    table = by_class(similarity(), YS, YT, class_names=["plane", "car", "bird", "cat"])
    data = table.to_xarray()
    assert data["mean"].dims == ("source_class", "target_class")
    assert data.source_class.values.tolist() == ["plane", "bird", "cat"]
    assert float(data["mean"].sel(source_class="plane", target_class="cat")) == table.values[0, 2]
    cells = {"mean", "median", "ratio_of_means", "standard_error", "interval_low", "interval_high"}
    counts = {"n_pairs", "n_undefined", "heavy_tailed"}
    scalars = {f"{a}{b}" for a in ("intra", "inter", "ratio") for b in ("", "_low", "_high")}
    assert set(data.data_vars) == cells | counts | scalars
    assert (float(data.ratio_low), float(data.ratio_high)) == table.ratio_interval
    assert data.attrs["self_pairs"] == "in"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"s": similarity(n_s=3)}, "shape"),
        ({"ys": YS.astype(float)}, "integer"),
        ({"ys": YS - 1}, "labels >= 0"),
        ({"ys": np.repeat([0, 2], 6)}, "empty class"),
        ({"yt": np.repeat([0, 2], [5, 6])}, "empty class"),
        ({"class_names": ["a", "b", "c"]}, "label 3"),
        ({"confidence": 95}, "confidence"),
        ({"denominators": np.ones(3)}, "denominators"),
    ],
)
def test_bad_input_is_refused(change, words):
    given = {"s": similarity(), "ys": YS, "yt": YT} | change
    with pytest.raises(InputError, match=words):
        by_class(**given)
