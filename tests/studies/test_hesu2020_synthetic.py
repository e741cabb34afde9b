import itertools
import json

import numpy as np
import pytest
import torch
from torch import nn

from local_elasticity.base.errors import InputError
from local_elasticity.studies.hesu2020 import synthetic as hesu2020_synthetic
from local_elasticity.studies.hesu2020 import training as hesu2020
from local_elasticity.studies.hesu2020.synthetic import (
    SCALES,
    SYNTHETIC,
    Scale,
    bootstrap,
    check_claims,
    correlation,
    folded_boxes,
    resampled,
    torus,
)
from local_elasticity.studies.hesu2020.training import Rate, network, top_curvature, train


def test_torus_is_two_strands_around_a_ring():
    """The radius from the ring's middle line is 1 everywhere, and the two classes stand at opposite phases."""
    geometry = torus(60, seed=1)
    x, y, z = geometry.points.T
    ring = np.hypot(x, y) - 8.0
    np.testing.assert_allclose(ring**2 + z**2, 1.0)
    angle = np.arctan2(y, x)
    sign = np.where(geometry.labels == 1, 1, -1)
    np.testing.assert_allclose(z, sign * np.cos(4 * angle), atol=1e-9)
    np.testing.assert_allclose(ring, sign * np.sin(4 * angle), atol=1e-9)
    own = angle[geometry.labels == 1]
    expected = np.abs(np.angle(np.exp(1j * (own[:, None] - own))))
    np.testing.assert_allclose(geometry.distance, expected, atol=1e-9)
    assert geometry.labels.sum() == 30


def walked(points, slope, half, height):
    """Distance along the walls by walking around the box from its right corner, and along z."""
    corners = np.array([[half, 0], [0, height], [-half, 0], [0, -height], [half, 0]])
    side = np.hypot(half, height)
    places = []
    for x, y in points[:, :2]:
        for at, (a, b) in enumerate(itertools.pairwise(corners)):
            t = np.dot([x, y] - a, b - a) / side**2
            if -1e-9 <= t <= 1 + 1e-9 and np.allclose(a + t * (b - a), [x, y]):
                places.append((at + t) * side)
                break
        else:
            raise AssertionError(f"({x}, {y}) is on no wall")
    apart = np.abs(np.subtract.outer(places, places))
    return np.hypot(np.minimum(apart, 4 * side - apart), np.subtract.outer(points[:, 2], points[:, 2]))


def test_folded_boxes_are_closed_and_their_distance_goes_along_the_walls():
    geometry = folded_boxes(80, seed=2)
    outer = geometry.points[geometry.labels == 1]
    inner = geometry.points[geometry.labels == 0]
    np.testing.assert_allclose(geometry.distance, walked(outer, 1.2, 13 / 1.2, 13.0), atol=1e-9)
    walked(inner, 1.2, 11 / 1.2, 11.0)
    assert len(outer) == len(inner) == 40
    assert {-1, 1} == set(np.sign(outer[:, 1]))
    assert np.abs(outer[:, 2]).max() <= 1
    assert not np.allclose(geometry.distance, geometry.distance_published)
    same_half = np.sign(outer[:, None, 1]) == np.sign(outer[:, 1])
    np.testing.assert_allclose(geometry.distance[same_half], geometry.distance_published[same_half])
    assert (geometry.distance_published >= geometry.distance - 1e-9).all(), "the published box is too wide"


def test_network_and_twin_start_from_the_same_weights():
    net, twin = network(3, [5, 4], False, seed=7), network(3, [5, 4], True, seed=7)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters(), strict=True))
    x = torch.randn(6, 3)
    zero, two = twin(torch.zeros(1, 3)), twin(2 * x)
    torch.testing.assert_close(two - zero, 2 * (twin(x) - zero), msg="the twin is not affine")
    assert not torch.allclose(net(2 * x) - net(0 * x), 2 * (net(x) - net(0 * x)))


@pytest.mark.parametrize(("loss", "factor"), [("mse", 2.0), ("bce", 0.25)])
def test_top_curvature_is_where_gradient_descent_becomes_unstable(loss, factor):
    torch.manual_seed(0)
    x = torch.randn(20, 3)
    with_ones = torch.cat([x, torch.ones(20, 1)], 1).double()
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 1))
    top = float(torch.linalg.eigvalsh(with_ones.T @ with_ones / 20)[-1])
    assert top_curvature(model, x, loss) == pytest.approx(factor * top, rel=1e-5)


def linear_problem():
    torch.manual_seed(0)
    x = torch.randn(30, 3)
    labels = (x[:, 0] > 0).float()
    return x, labels, [nn.Sequential(nn.Flatten(), nn.Linear(3, 1)) for _ in range(2)]


@pytest.mark.parametrize("factor", [0.9, 1.5])
def test_a_rate_that_diverges_is_told_and_replaced(factor):
    x, labels, (first, second) = linear_problem()
    second.load_state_dict(first.state_dict())
    bound = 2 / top_curvature(first, x, "mse")
    model, rate, loss = train([first, second], x, labels, "mse", factor * bound, 200, len(x), seed=0)
    assert rate.bound == pytest.approx(bound)
    assert rate.diverged is (factor > 1)
    assert rate.lr == pytest.approx(factor * bound if factor < 1 else bound / 2)
    assert loss < 0.2
    assert all(p.isfinite().all() for p in model.parameters())
    assert ("diverged" in rate.words()) is (factor > 1)


def test_two_rates_that_diverge_are_an_error(monkeypatch):
    x, labels, pair = linear_problem()
    monkeypatch.setattr(hesu2020, "top_curvature", lambda *_: 1e-3)
    with pytest.raises(InputError, match="divergence"):
        train(pair, x, labels, "mse", 100.0, 50, len(x), seed=0)


@pytest.mark.parametrize("published", [0.05, 50.0])
def test_an_interrupted_training_continues_to_the_same_weights(tmp_path, monkeypatch, published):
    x, labels, _ = linear_problem()

    def pair():
        return [network(3, [6], False, seed=1) for _ in range(2)]

    whole = train(pair(), x, labels, "mse", published, 20, 7, seed=3)[0]
    monkeypatch.setattr(hesu2020, "SAVE_SECONDS", -1.0)
    path, save = tmp_path / "net.pt", hesu2020._save

    def stop_after_nine(place, model, epoch, loss, diverged):
        save(place, model, epoch, loss, diverged)
        if epoch == 9:
            raise KeyboardInterrupt

    monkeypatch.setattr(hesu2020, "_save", stop_after_nine)
    with pytest.raises(KeyboardInterrupt):
        train(pair(), x, labels, "mse", published, 20, 7, seed=3, checkpoint=path)
    monkeypatch.setattr(hesu2020, "_save", save)
    model, rate, _ = train(pair(), x, labels, "mse", published, 20, 7, seed=3, checkpoint=path)
    assert rate.diverged is (published > 1)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), model.parameters(), strict=True))


def test_correlation_and_its_interval():
    random = np.random.default_rng(0)
    place = random.uniform(size=30)
    distance = np.abs(place[:, None] - place)
    assert correlation(-distance, distance) == pytest.approx(-1)
    assert bootstrap(-distance, distance, 0) == pytest.approx((-1, -1))
    noisy = -distance + random.normal(scale=0.3, size=distance.shape)
    low, high = bootstrap(noisy, distance, 0)
    assert low < correlation(noisy, distance) < high < 0
    holes = np.where(random.uniform(size=distance.shape) < 0.2, np.nan, -distance)
    assert correlation(holes, distance) == pytest.approx(-1)
    assert np.isnan(correlation(np.ones((3, 3)), distance[:3, :3]))


def test_resampling_is_what_drawing_points_would_give():
    """Against the slow way: build the matrices of each draw, leaving out pairs of a point with a copy of itself."""
    random = np.random.default_rng(1)
    s, d = random.normal(size=(12, 12)), random.uniform(size=(12, 12))
    s[2, 5] = np.nan
    found = resampled([(s, d)], seed=4, repeats=20)
    draws = np.random.default_rng(4).integers(0, 12, (20, 12))
    for i, row in zip(draws, found, strict=True):
        twice = (i[:, None] == i) & ~np.eye(12, dtype=bool)
        assert row[0] == pytest.approx(correlation(np.where(twice, np.nan, s[np.ix_(i, i)]), d[np.ix_(i, i)]))
    assert bootstrap(s, d, 4)[0] == pytest.approx(np.quantile(resampled([(s, d)], 4), 0.025))


def judged_on(similarity_of):
    """The verdicts when network and twin have these similarities, as functions of distance."""
    results, rows = {}, {}
    for name, make in (("torus", torus), ("folded boxes", folded_boxes)):
        distance = make(40, 0).distance / make(40, 0).distance.max()
        for kind in ("network", "linear"):
            s = similarity_of[kind](distance)
            results[name, kind] = {"s_rel": s, "distance": distance}
            rows[name, kind] = {"r": correlation(s, distance), "interval": bootstrap(s, distance, 0)}
    return [claim.verdict for claim in check_claims(results, rows, 0)]


def test_claims_can_hold_and_fail():
    falling, folded = (lambda d: np.exp(-3 * d)), (lambda d: np.abs(1 - 2 * d))
    assert judged_on({"network": falling, "linear": folded}) == ["holds"] * 6
    assert judged_on({"network": falling, "linear": falling}) == ["holds", "fails", "fails"] * 2
    assert judged_on({"network": lambda d: -falling(d), "linear": folded}) == ["fails"] * 6


@pytest.mark.exhaustive
def test_runs_small_and_continues(tmp_path, monkeypatch, capsys):
    size = Scale(40, {"torus": 1024, "folded boxes": 512}, 30)
    status = SYNTHETIC.run_at(size, "test", tmp_path)
    found = json.loads((tmp_path / "claims.json").read_text())
    assert status == int(any(claim["verdict"] == "fails" for claim in found["claims"]))
    assert len(found["claims"]) == 6
    correlations = json.loads((tmp_path / "correlations.json").read_text())
    assert all(-1 <= row["r"] <= 1 and -1 <= row["published"] <= 1 for row in correlations.values())
    assert (tmp_path / "figures" / "similarity-against-distance.png").stat().st_size > 20_000
    assert "lr " in capsys.readouterr().out
    monkeypatch.setattr(hesu2020_synthetic, "train", lambda *_, **__: pytest.fail("trained again"))
    (tmp_path / "claims.json").unlink()
    assert SYNTHETIC.run_at(size, "test", tmp_path) == status
    assert json.loads((tmp_path / "claims.json").read_text()) == found


def test_scales_keep_rate_times_width():
    assert SCALES["paper"].shrink == {"torus": 1, "folded boxes": 1}
    assert SCALES["paper"].passes == 20_000
    assert "diverged" not in Rate(1.0, 1.0, 2.0, False).words()
