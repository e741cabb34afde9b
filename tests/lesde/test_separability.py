"""Separability against brute force and the table of limits; collapse against its rate."""

import itertools

import numpy as np
import pytest

import local_elasticity as le
from local_elasticity.lesde.separability import binomial_interval, fast_separable, programmed_separable, theory


def brute_force(a, b):
    """In the plane: some line through two points, turned a little, splits the clouds, if any does."""
    points = np.concatenate([a, b])
    for i, j in itertools.combinations(range(len(points)), 2):
        d = points[j] - points[i]
        angle = np.arctan2(d[1], d[0]) + np.pi / 2
        for turn in (-1e-7, 1e-7):
            nu = np.array([np.cos(angle + turn), np.sin(angle + turn)])
            for sign in (1, -1):
                if (sign * a @ nu).min() > (sign * b @ nu).max():
                    return True
    return False


def test_linear_programming_decides_as_brute_force_does():
    rng = np.random.default_rng(0)
    seen = []
    for _ in range(80):
        a, b = rng.normal(size=(2, 6, 2)) * [1, 1e3]
        b = b + rng.normal() * np.array([1.0, 1e3])
        truth = brute_force(a, b)
        seen.append(truth)
        assert programmed_separable(a, b) == le.lesde.separable(a, b) == truth
        assert truth or not fast_separable(a, b)
    assert 10 < sum(seen) < 70


def test_clouds_far_from_the_origin_and_badly_scaled():
    rng = np.random.default_rng(1)
    a = rng.normal(size=(40, 3)) * [1e-6, 1, 1e6] + [5, 1e3, 0]
    b = a + np.array([2e-5, 0, 0])
    assert le.lesde.separable(a, b)
    assert not le.lesde.separable(a, a[::-1])
    with pytest.raises(le.InputError, match="finite"):
        le.lesde.separable(a * np.nan, b)
    with pytest.raises(le.InputError, match="two clouds"):
        le.lesde.separable(a, b[:, :2])


@pytest.mark.parametrize(("n", "p"), [(4, 2), (6, 3), (2, 3)])
def test_points_labelled_by_a_coin_are_separable_as_often_as_cover_counts(n, p):
    rng = np.random.default_rng([n, p])
    hits = balanced = 0
    for _ in range(400):
        points, label = rng.normal(size=(2 * n, p)), rng.random(2 * n) < 0.5
        hits += label.all() or not label.any() or le.lesde.separable(points[label], points[~label])
        balanced += le.lesde.separable(points[:n], points[n:])
    low, high = binomial_interval(np.array([hits]), 400, 0.999)
    assert low[0] <= le.lesde.cover_probability(n, p) <= high[0]
    assert balanced <= hits  # n labels of each kind are split more rarely
    assert (le.lesde.cover_probability(n, p) == pytest.approx(1)) == (2 * n <= p + 1)


def test_balanced_labels_on_a_line():
    rng = np.random.default_rng(0)
    hits = sum(le.lesde.separable(*rng.normal(size=(2, 2, 1))) for _ in range(400))
    low, high = binomial_interval(np.array([hits]), 400, 0.999)
    assert low[0] <= 2 / 6 <= high[0] < le.lesde.cover_probability(2, 1)


def test_binomial_interval_is_clopper_and_pearsons():
    from scipy.stats import binomtest

    low, high = binomial_interval(np.array([0, 3, 20]), 20)
    for at, hits in enumerate((0, 3, 20)):
        known = binomtest(hits, 20).proportion_ci()
        assert (low[at], high[at]) == pytest.approx((known.low, known.high))


def tail(r, c, **options):
    return le.LESDE(lambda t: c * (1 + t) ** -r, 0.0, 3, "isotropic", 0.1, np.eye(3), **options)


@pytest.mark.parametrize(
    ("r", "c", "at_1e7", "limit"),
    [
        (0.5, 3, 1, "separable"),
        (0.8, 3, 1, "separable"),
        (1.0, 2.25, 1, "separable"),
        (1.0, 0.75, 0, "not separable"),
        (1.2, 3, 0, "not separable"),
        (1.5, 3, 0, "not separable"),
    ],
)
def test_the_table_of_limits(r, c, at_1e7, limit):
    found = tail(r, c).separability([1e1, 1e7], 50, 12, 0)
    assert found.pair_probability[0] > 0.9
    assert abs(found.pair_probability[1] - at_1e7) < 0.1
    assert found.theory.limit == limit
    assert found.theory.tail_exponent == pytest.approx(r, abs=0.01)
    assert (found.low <= found.probability).all()
    assert (found.probability <= found.high).all()


def test_the_critical_scale_is_half_the_number_of_classes():
    says = theory(tail(1.0, 1.5), [1e7], 50)
    assert says.limit == "undecided"
    assert says.critical_scale == pytest.approx(1.5, rel=0.02)
    assert says.tail_scale == pytest.approx(1.5, rel=0.01)
    assert np.ptp(theory(tail(1.0, 1.5), [1e5, 1e7, 1e9], 50).log_ratio) < 0.01
    five = le.LESDE(lambda t: 2.5 / (1 + t), 0.0, 5, "isotropic", 0.1, np.eye(5))
    assert np.ptp(theory(five, [1e5, 1e7, 1e9], 50).log_ratio) < 0.01


def test_the_threshold_belongs_to_noise_that_does_not_vanish():
    dying = le.LESDE(lambda t: 3 * (1 + t) ** -1.0, 0.0, 3, "isotropic", lambda t: 0.1 / (1 + t), np.eye(3))
    assert "dies out" in theory(dying, [1e7], 50).reason
    assert theory(dying, [1e7], 50).log_ratio > theory(dying, [1e3], 50).log_ratio


def test_gamma_as_the_smallest_eigenvalue():
    sde = le.LESDE(1.0, -0.5, 3, "isotropic", 0.1, np.eye(3))
    assert theory(sde, [4.0], 10, "lambda_min").gap[0] == pytest.approx(0)
    assert theory(sde, [4.0], 10, "gap").gap[0] == pytest.approx(1.5)
    with pytest.raises(le.InputError, match="lambda_min"):
        theory(sde, [4.0], 10, "eigenvalue")  # pyright: ignore[reportArgumentType]


def test_blocks_that_are_not_definite_are_refused_by_the_theorem_only():
    blocks = np.broadcast_to(-np.eye(2), (3, 3, 2, 2))
    sde = le.LESDE(0.5, -0.1, 3, blocks, 0.1, np.ones((3, 2)))
    assert sde.sample([1.0], 2, 2, 0).shape == (2, 1, 3, 2, 2)
    with pytest.raises(le.InputError, match="positive semi-definite"):
        sde.separability([1.0], 5, 2)
    fine = le.LESDE(0.5, -0.1, 3, -blocks, 0.1, np.eye(3, 2))
    assert fine.separability([9.0], 5, 2).probability[0] == 1


def test_own_vector_drift_does_not_separate():
    """Noise within grows with the signal: their ratio stays finite."""
    own = le.LESDE(1.0, 0.0, 3, "isotropic", 1.0, np.eye(3), acts_on="own")
    mean = le.LESDE(1.0, 0.0, 3, "isotropic", 1.0, np.eye(3))
    t = [5.0, 20.0, 80.0]
    assert np.ptp(theory(own, t, 30).log_ratio[1:]) < 0.01
    assert own.separability(t, 30, 10).probability[-1] < 0.3
    assert mean.separability(t, 30, 10).probability[-1] == 1


def test_clouds_of_separability_follow_the_law():
    from local_elasticity.lesde.separability import clouds_at

    sde = le.LESDE(0.6, -0.3, 3, "logits", 0.4, (np.random.default_rng(0).normal(size=(3, 3)), 0.1))
    t, n, paths = np.array([1.5]), 10, 4000
    means, scaled = sde.mean(t)[0], clouds_at(sde, t, n, paths, np.random.default_rng(0))[0]
    factor = means.ravel() @ scaled.mean(axis=(0, 2)).ravel() / (scaled.mean(axis=(0, 2)) ** 2).sum()
    clouds = scaled * factor
    spread = np.sqrt(np.diag(sde.covariance(t, n)[0]).reshape(3, 3))
    assert np.allclose(clouds.mean(axis=3 - 1).std(axis=0), spread, rtol=0.06)
    assert np.allclose(clouds.var(axis=2).mean(axis=0), sde.within_variance(t)[0] * (1 - 1 / n), rtol=0.05)


def test_phase_diagram_is_ordered_and_drawn(tmp_path):
    from local_elasticity.report.figures import save

    diagram = le.lesde.phase_diagram([0.6, 1.4], [0.6, 2.5], [1e6], n_per_class=20, n_paths=4)
    assert (diagram.probability[0, :, 0] == 1).all()
    assert (diagram.probability[1, :, 0] < 0.2).all()
    assert (diagram.low <= diagram.all_pairs).all()
    assert all(path.stat().st_size > 5000 for path in save(diagram.plot(), tmp_path, "phase"))


# --- collapse --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [3, 5, 10])
def test_collapse_has_its_rate(k):
    rng = np.random.default_rng(k)
    sde = le.LESDE(1.0, -1.0, k, "logits", 0.1, np.eye(k) + 0.2 * rng.normal(size=(k, k)))
    t = np.linspace(6 * (k - 1), 10 * (k - 1), 5)
    found = sde.collapse(t)
    slope = np.polyfit(t, np.log(found.cosine_deviation), 1)[0]
    assert slope == pytest.approx(-min(1 / (k - 1), 2 / k), rel=0.02)
    ratio = found.cosine_deviation / found.predicted_rate
    assert ratio.max() / ratio.min() < 1.5
    assert found.possible
    assert found.side == "right"
    last = sde.collapse(25.0 * (k - 1))
    assert last.simplex_distance[0] < 1e-5
    assert last.equinorm[0] < 1e-5
    assert last.alignment[0] == pytest.approx(1)
    assert last.nc1[0] < 1e-3


def test_isotropic_drift_never_changes_angles():
    sde = le.LESDE(lambda t: np.exp(-t), -0.3, 4, "isotropic", 0.1, np.random.default_rng(0).normal(size=(4, 6)))
    found = sde.collapse([0.0, 1.0, 10.0, 100.0])
    assert np.abs(found.cosine - found.cosine[:1]).max() < 1e-12
    assert not found.possible
    assert "never change" in found.reason


def test_no_collapse_without_negative_impact_and_the_wrong_side():
    start = np.eye(3) + 0.1 * np.random.default_rng(0).normal(size=(3, 3))
    bounded = le.LESDE(1.0, lambda t: -np.exp(-t), 3, "logits", 0.1, start).collapse([20.0, 40.0])
    assert not bounded.possible
    assert bounded.cosine_deviation[-1] > 1e-3
    assert not le.LESDE(1.0, 0.2, 3, "logits", 0.1, start).collapse(20.0).possible
    wrong = le.LESDE(1.0, -1.0, 3, "logits", 0.1, -start).collapse(40.0)
    assert wrong.side == "wrong"
    assert wrong.alignment[0] == pytest.approx(-1)
    assert "wrong side" in wrong.reason
