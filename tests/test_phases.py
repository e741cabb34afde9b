import numpy as np
import pytest
import torch

import local_elasticity as le
from local_elasticity.similarity.phases import find_phases

T = np.geomspace(1, 1e4, 25)
U = np.log(T)


def curves(base, seed, units=20, shared=0.0):
    """Curves of pairs: levels, slopes and noise of their own, and noise that all share."""
    rng = np.random.default_rng(seed)
    level, slope = rng.normal(0, 0.5, units), rng.normal(0, 0.05, units)
    noise = rng.normal(0, 0.1, (len(T), units)) + shared * rng.normal(size=(len(T), 1))
    return np.exp(base[:, None] + level + slope * (U - U.mean())[:, None] + noise)


def hinge(at, slope=0.5):
    return slope * np.minimum(U, np.log(at))


@pytest.mark.parametrize("base", [0 * U, 0.4 * U], ids=["flat", "linear"])
def test_false_alarms_stay_under_five_percent(base):
    found = [find_phases(T, curves(base, i, shared=0.05 * (i % 2)), n_boot=60, seed=i).verdict for i in range(200)]
    assert found.count("two phases") < 10


def test_a_planted_change_point_lies_in_its_interval():
    draws = [find_phases(T, curves(hinge(150.0), i), n_boot=150, seed=i) for i in range(30)]
    found = [p for p in draws if p.verdict == "two phases"]
    assert len(found) >= 20
    inside = [p.interval[0] <= 150 <= p.interval[1] for p in found]
    assert np.mean(inside) >= 0.9
    assert all(abs(p.slopes[-1]) < 0.1 and p.change > 2 for p in found)
    assert "then inelastic" in str(found[0])


def test_a_sharp_change_point_is_found_sharply():
    p = find_phases(T, np.exp(hinge(150.0)[:, None] + np.linspace(-1, 1, 12)))
    assert p.verdict == "two phases"
    assert p.interval[0] <= 150 <= p.interval[1]
    assert p.interval[1] / p.interval[0] < 2
    assert p.agreement == 1


def test_a_delayed_phase_has_an_onset():
    base = 0.8 * (np.clip(U, np.log(10), np.log(400)) - np.log(10))
    p = find_phases(T, np.exp(base[:, None] + np.linspace(-1, 1, 12)))
    assert p.verdict == "two phases"
    assert 7 < p.onset < 14
    assert p.interval[0] <= 400 <= p.interval[1]


def test_a_curve_that_still_changes_has_not_settled():
    late = 0.5 * np.maximum(U - np.log(200), 0)
    p = find_phases(T, curves(late, 1))
    assert p.verdict == "none"
    assert "not settled" in p.reason
    assert np.isnan(p.change_point)


def test_noise_that_all_pairs_share_is_no_phase():
    found = [find_phases(T, curves(0 * U, i, shared=0.5), n_boot=100, seed=i).verdict for i in range(40)]
    assert found.count("two phases") <= 2


def test_sources_and_targets_are_resampled_on_their_own_sides():
    rng = np.random.default_rng(0)
    steep = rng.normal(0.5, 0.4, 8)  # the sources differ, the targets do not
    s = np.exp(np.minimum(U, 5)[:, None, None] * steep[:, None] + 0.02 * rng.normal(size=(len(T), 8, 30)))
    two_sided = find_phases(T, s)
    as_if_independent = find_phases(T, s.reshape(len(T), -1))
    assert two_sided.bend[0] < 0.6 * as_if_independent.bend[0]


def test_many_times_and_a_time_of_zero():
    t = np.arange(0, 2001.0)
    base = 0.6 * np.minimum(np.log(np.maximum(t, 1)), np.log(100))
    p = find_phases(t, np.exp(base[:, None] + np.linspace(-1, 1, 10)))
    assert p.verdict == "two phases"
    assert p.interval[0] <= 100 <= p.interval[1]
    assert len(p.times) <= 60


@pytest.mark.parametrize(
    ("times", "values", "says"),
    [
        (T[::-1], np.ones((25, 9)), "increasing"),
        (T, np.ones((24, 9)), "T"),
        (T[:5], np.ones((5, 9)), "8 times"),
        (T, np.ones((25, 3)), "at least 5"),
        (T, -np.ones((25, 9)), "at least 0"),
        (T, np.zeros((25, 9)), "positive median"),
    ],
)
def test_bad_input_is_refused(times, values, says):
    with pytest.raises(le.InputError, match=says):
        find_phases(times, values)


def tracked(steps=40):
    torch.manual_seed(0)
    xs, model = torch.randn(60, 3), le.networks.MLP(3, 1, depth=1, width=16)
    ys = xs.sum(1, keepdim=True)
    opt = torch.optim.SGD(model.parameters(), lr=0.05)
    labels = (xs[:, 0] > 0).long()
    probes = (xs[:12], labels[:12])
    loss = lambda f, y: ((f - y.reshape(-1, 1).float()) ** 2).mean()  # noqa: E731
    tracker = le.Tracker(
        model, loss, probes, update=le.SGD(0.05), definitions=["he_su"], schedule=le.log_spaced(12, total=steps)
    )
    for _ in range(steps):
        opt.zero_grad()
        loss(model(xs), ys).backward()
        opt.step()
        tracker.step()
    return tracker.finish()


def test_a_run_finds_its_phases():
    run = tracked()
    p = run.phases("he_su", n_boot=50)
    direct = find_phases(run.dataset["step"].values, run.s_rel("he_su").values, n_boot=50)
    assert (p.verdict, p.reason, p.over) == (direct.verdict, direct.reason, "pairs")
    np.testing.assert_array_equal(p.curve, np.median(run.s_rel("he_su").values, (1, 2)))
    with pytest.raises(le.InputError, match="without replicas"):
        run.phases("he_su", over="seeds")
    with pytest.raises(le.InputError, match="time"):
        run.phases("he_su", time="clock")


def test_a_band_over_seeds(monkeypatch):
    import xarray as xr

    rng = np.random.default_rng(0)
    s = np.exp(
        hinge(150.0)[:, None, None, None] + rng.normal(0, 0.1, (25, 8, 1, 1)) + rng.normal(0, 0.02, (25, 8, 6, 5))
    )
    data = xr.DataArray(s, dims=("step", "replica", "source", "target"), coords={"step": T})
    run = le.Run(xr.Dataset({"pairs": data, "x": ("replica", np.arange(8))}))
    monkeypatch.setattr(le.Run, "s_rel", lambda self, *_: data)
    p = run.phases("he_su")
    assert (p.over, p.n_units, p.verdict) == ("seeds", 8, "two phases")
    assert p.interval[0] <= 150 <= p.interval[1]
    assert run.phases("he_su", over="pairs").over == "pairs"
