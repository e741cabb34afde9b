import json
import warnings

import numpy as np
import pytest
import torch
from scipy.signal import savgol_filter

import local_elasticity as le
from local_elasticity.cli import main
from local_elasticity.lesde import published
from local_elasticity.lesde.estimation.estimate import _bootstrap, _resampled, _weights
from local_elasticity.lesde.estimation.estimators import ESTIMATORS
from local_elasticity.lesde.estimation.observations import observe
from local_elasticity.lesde.estimation.smoothing import LocalQuadratic

STEPS = np.arange(400.0)
A_TRUE, B_TRUE = 4.5 * (1 - np.exp(-STEPS / 150)), -1.2 * (1 - np.exp(-STEPS / 200))


def start(K, seed=0, centred=True):
    X = np.random.default_rng(seed).normal(size=(K, K)) + 2 * np.eye(K)
    return X - X.mean(axis=1, keepdims=True) if centred else X + np.arange(K)[:, None]


def isotropic(X0, A, B):
    """The closed form of the I-model, written plainly."""
    K, mean = len(X0), X0.mean(axis=0)
    return np.stack(
        [mean * np.exp((a + (K - 1) * b) / K) + (X0 - mean) * np.exp((a - b) / K) for a, b in zip(A, B, strict=True)]
    )


def logits(X0, alpha, beta, t):
    """The L-model, integrated as it is written."""
    from scipy.integrate import solve_ivp

    K = len(X0)
    u = (np.eye(K) - 1 / K) / np.sqrt(1 - 1 / K)

    def slope(s, x):
        X = x.reshape(K, K)
        push = np.einsum("lj,l->lj", u, np.einsum("lj,lj->l", u, X)) / K
        return (beta(s) * push.sum(0) + (alpha(s) - beta(s)) * push).ravel()

    return solve_ivp(slope, (t[0], t[-1]), X0.ravel(), t_eval=t, rtol=1e-12, atol=1e-12).y.T.reshape(-1, K, K)


def logit_path(K, centred=True):
    return logits(
        start(K, centred=centred), lambda s: 0.03 * np.exp(-s / 150), lambda s: -0.006 * np.exp(-s / 200), STEPS
    )


def quietly(*args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", le.IdentifiabilityWarning)
        return le.estimate(*args, **options)


def noisy(path, trials, sd, seed=0):
    rng = np.random.default_rng(seed)
    own = sd * rng.normal(size=(trials, 1, *path.shape[1:]))  # each trial starts elsewhere and stays there
    return path + own + sd * rng.normal(size=(trials, *path.shape))


# -- local fits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [5, 21, 99])
def test_even_times_are_savitzky_golay(window):
    y = np.random.default_rng(0).normal(size=(3, 200)).cumsum(axis=1)
    fit = LocalQuadratic(np.arange(200) * 0.5 + 3, window)
    np.testing.assert_allclose(fit.slope(y), savgol_filter(y, window, 2, deriv=1, delta=0.5), atol=1e-10)
    np.testing.assert_allclose(fit.value(y), savgol_filter(y, window, 2), atol=1e-9)


def test_uneven_times_are_fitted_one_by_one():
    rng = np.random.default_rng(1)
    t, y = np.sort(rng.uniform(0, 9, 60)), rng.normal(size=60)
    fit = LocalQuadratic(t, 9)
    for i in (0, 3, 30, 58):
        first = min(max(i - 4, 0), 51)
        plain = np.polynomial.Polynomial.fit(t[first : first + 9], y[first : first + 9], 2)
        assert fit.value(y)[i] == pytest.approx(plain(t[i]), abs=1e-8)
        assert fit.slope(y)[i] == pytest.approx(plain.deriv()(t[i]), abs=1e-7)


# -- inversion -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("K", [2, 3, 5, 10])
def test_isotropic_is_inverted(K):
    fit = le.estimate(isotropic(start(K, centred=False), A_TRUE, B_TRUE), STEPS, "isotropic")
    np.testing.assert_allclose(fit.A, A_TRUE, atol=1e-8)
    np.testing.assert_allclose(fit.B, B_TRUE, atol=1e-8)


@pytest.mark.parametrize("K", [2, 3, 5, 10])
def test_logits_are_inverted_without_centring(K):
    fit = quietly(logit_path(K, centred=False), STEPS, "logits")
    np.testing.assert_allclose(fit.A, A_TRUE, atol=1e-8)
    np.testing.assert_allclose(fit.B, B_TRUE, atol=1e-8)
    np.testing.assert_allclose(fit.alpha[5:-5], 0.03 * np.exp(-STEPS / 150)[5:-5], atol=1e-5)


def test_published_estimators():
    centred, not_centred = logit_path(3), logit_path(3, centred=False)
    for path, exact in ((centred, True), (not_centred, False)):
        fit = quietly(path, STEPS, "logits", estimator="published", window=21)
        error = max(np.abs(fit.A - A_TRUE).max(), np.abs(fit.B - B_TRUE).max())
        assert (error < 1e-7) == exact
        if not exact:
            assert error > 1
    np.testing.assert_array_equal(fit.A, published.estimate_logits(not_centred)[0])
    path = isotropic(start(3, centred=False), A_TRUE, B_TRUE)
    A, B = published.estimate_isotropic(path)
    np.testing.assert_allclose([A, B], [A_TRUE, B_TRUE], atol=1e-9)
    np.testing.assert_allclose(published.derivative(A, 21), savgol_filter(A, 21, 2, deriv=1))
    with pytest.raises(le.InputError, match="3 classes"):
        le.estimate(isotropic(start(4), A_TRUE, B_TRUE), STEPS, "logits", estimator="published")


def test_magnitudes_beyond_the_square_root_of_float64():
    fit = le.estimate(1e-200 * isotropic(start(3, centred=False), 20 * A_TRUE, B_TRUE), STEPS, "isotropic")
    np.testing.assert_allclose(fit.A, 20 * A_TRUE, rtol=1e-10, atol=1e-8)


def test_uneven_times_and_tensors():
    t = np.sort(np.random.default_rng(0).uniform(3, 400, 60))
    path = isotropic(start(3, centred=False), 0.01 * (t - t[0]), -0.001 * (t - t[0]))
    fit = le.estimate(torch.from_numpy(path), torch.from_numpy(t), "isotropic")
    np.testing.assert_allclose(fit.alpha, 0.01, rtol=1e-6)
    np.testing.assert_allclose(fit.beta, -0.001, rtol=1e-5)
    assert np.isnan(fit.intervals["A"][0]).all()
    assert "trials" in fit.no_interval


# -- logs ------------------------------------------------------------------------------------------------------------


def log_of(path, trials, sd, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, path.shape[1], size=(len(path), trials))
    return path[np.arange(len(path))[:, None], labels] + sd * rng.normal(size=(*labels.shape, path.shape[2])), labels


def test_logs_are_averaged_by_label_and_rows_are_the_same():
    z, y = log_of(logit_path(3), 40, 0.3)
    data = observe(logits=z, labels=y)
    for step, k in ((0, 0), (200, 2)):
        own = z[step, y[step] == k]
        np.testing.assert_allclose(data.class_means[step, k], own.mean(0))
        assert data.within_variance()[step, k] == pytest.approx(own.var(axis=0, ddof=1).mean())
        np.testing.assert_allclose(data.standard_error()[step, k], own.std(axis=0, ddof=1) / np.sqrt(len(own)))
    step, trial = np.indices(y.shape)
    order = np.random.default_rng(0).permutation(y.size)
    rows = [x.reshape(y.size, -1).squeeze()[order] for x in (z, y, trial, step)]
    table = quietly(logits=rows[0], labels=rows[1], trial=rows[2], t=rows[3], n_boot=20)
    np.testing.assert_allclose(table.A, quietly(logits=z, labels=y, n_boot=20).A)


@pytest.mark.parametrize("model", ["logits", "isotropic"])
def test_resampling_is_what_it_says(model):
    z, y = log_of(logit_path(3)[:50], 30, 0.3)
    data, rule = observe(logits=z, labels=y), ESTIMATORS[model, "defined"]
    A, B = _bootstrap(data, rule, 3, 4, 5, np.nan)
    kept = _bootstrap(data, rule, 3, 4, 5, np.nan, _resampled(data, rule, _weights(30, 4, 5)))
    np.testing.assert_array_equal(kept, (A, B))
    for draw, weights in enumerate(_weights(30, 4, 5)):
        again = np.repeat(np.arange(30), weights.astype(int))
        means = observe(logits=z[:, again], labels=y[:, again]).class_means
        features = rule.of_cells(means)
        a, b = rule.rates(features, features[:3].mean(0, keepdims=True))
        np.testing.assert_allclose(A[draw], a, atol=1e-9)
        np.testing.assert_allclose(B[draw], b, atol=1e-9)


def test_empty_cells_are_named_or_filled():
    X = logit_path(3)
    gaps = X.copy()
    gaps[17, 2] = np.nan
    with pytest.raises(le.InputError, match=r"t = 17, class 2"):
        le.estimate(gaps, STEPS)
    with pytest.warns(le.IdentifiabilityWarning, match="interpolated"):
        fit = le.estimate(gaps, STEPS, missing="interpolate")
    np.testing.assert_array_equal(fit.observations.filled, [[17, 2]])
    np.testing.assert_allclose(fit.class_means[17, 2], (X[16, 2] + X[18, 2]) / 2)
    z, y = log_of(X, 6, 0.1)
    with pytest.raises(le.InputError, match="probability"):
        le.estimate(logits=z, labels=y)
    assert np.isfinite(quietly(logits=z, labels=y, missing="interpolate").intervals["A"][0]).all()


# -- intervals -------------------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
@pytest.mark.parametrize("model", ["logits", "isotropic"])
def test_intervals_cover(model):
    t = STEPS[::8]
    A, B = A_TRUE[::8], B_TRUE[::8]
    X0 = np.array([[1.6, -0.8, -0.8], [-0.3, 0.6, -0.3], [-0.2, -0.7, 0.9]]) + (model == "isotropic") * np.arange(3) / 2
    path = le.LESDE(lambda s: 0.03 * np.exp(-s / 150), lambda s: -0.006 * np.exp(-s / 200), 3, model, 0.0, X0).mean(t)
    hits = np.zeros(4)
    sets = 300
    for seed in range(sets):
        fit = quietly(noisy(path, 40, 0.2, seed), t, model, seed=seed)
        assert min(fit.signal_to_noise.values()) > 5
        for at, (name, truth) in enumerate((("A", A), ("B", B))):
            low, high = fit.intervals[name]
            hits[at] += low[-1] <= truth[-1] <= high[-1]
            found = fit.average("alpha" if name == "A" else "beta", t[12], t[25])
            hits[2 + at] += found.low <= (truth[25] - truth[12]) / (t[25] - t[12]) <= found.high
    assert ((hits / sets >= 0.9) & (hits / sets <= 0.99)).all(), hits / sets


# -- tails, verdict, comparison --------------------------------------------------------------------------------------


@pytest.mark.parametrize("r", [0.5, 0.8, 1.0, 1.3])
@pytest.mark.parametrize("c", [0.02, 1.0, 5.0])
def test_dyadic_tail_is_the_exponent_and_the_published_one_is_not(r, c):
    t = np.arange(1, 10_001.0)
    A = c * (np.log(t) if r == 1 else (t ** (1 - r) - 1) / (1 - r))
    fit = le.estimate(isotropic(start(3, centred=False), A, 0 * A), t, "isotropic", window=5)
    assert fit.tail("dyadic").value == pytest.approx(r, abs=0.02)
    assert fit.tail("official").value == pytest.approx(float(1 - np.mean(np.log(A[-1000:]) / np.log(t[-1000:]))))


def test_loglog_and_unknown_names():
    t = np.arange(10_000.0)
    A = 2 * t**0.5
    fit = le.estimate(isotropic(start(3, centred=False), A, 0 * A), t, "isotropic", window=5)
    assert fit.tail("loglog").value == pytest.approx(0.5, abs=0.01)
    with pytest.raises(le.InputError, match="did you mean 'dyadic'"):
        fit.tail("dyadik")


def test_verdict_of_a_spread_that_vanishes_stays_readable():
    t = np.arange(60.0)
    rng = np.random.default_rng(0)
    X = logits(start(3), lambda s: 0.02, lambda s: -0.005, t) + 0.01 * rng.normal(size=(20, 60, 3, 3))
    for last, words in ((1e-200, "times the variance of now"), (0.0, "do not spread at all")):
        variance = np.append(np.linspace(1, 2, 59), last)
        why = quietly(class_means=X, t=t, model="logits", within_variance=variance).verdict().why
        assert words in why
        assert len(why) < 600


@pytest.mark.parametrize(("r", "word"), [(0.5, "separable"), (1.6, "not separable")])
def test_verdict(r, word):
    t = np.arange(0, 4000, 4.0)
    A = 4 * ((1 + t) ** (1 - r) - 1) / (1 - r) / (20 if r < 1 else 1)
    fit = quietly(noisy(isotropic(start(3, centred=False), A, 0 * A), 20, 0.001), t, "isotropic")
    assert fit.verdict().word == word
    single = le.estimate(isotropic(start(3, centred=False), A, 0 * A), t, "isotropic")
    assert single.verdict().word == "undecided"
    assert "interval" in single.verdict().why


@pytest.mark.parametrize("rates", ["exact", "smooth"])
def test_the_loop_closes(rates):
    X = logit_path(3, centred=False)
    fit = quietly(X, STEPS, "logits")
    again = fit.to_sde(rates=rates).mean(STEPS)
    assert np.linalg.norm(again - X) / np.linalg.norm(X) < 1e-3
    flipped = fit.compare(-2 * X)
    assert flipped.plain.sign_agreement < 0.01
    assert flipped.scalar == pytest.approx(-2, rel=0.01)
    assert flipped.rescaled.relative_rmse < 0.01
    assert flipped.plain.tail_cosine == pytest.approx(-1, abs=1e-4)
    errors = fit.held_out()
    assert errors["logits"].relative_rmse < 0.01 < errors["isotropic"].relative_rmse


def test_the_right_model_has_the_smaller_held_out_error():
    fit = quietly(noisy(isotropic(start(3, centred=False), A_TRUE, B_TRUE), 20, 0.1), STEPS, "isotropic")
    errors = fit.held_out()
    assert errors["isotropic"].relative_rmse < 0.5 * errors["logits"].relative_rmse
    assert fit.compare().band.startswith("standard error")


# -- what cannot be told ---------------------------------------------------------------------------------------------


def test_warnings_of_what_cannot_be_told():
    X = logit_path(3)
    with pytest.warns(le.IdentifiabilityWarning, match="not centred"):
        le.estimate(X + 3, STEPS)
    with pytest.warns(le.IdentifiabilityWarning, match="wrong labels"):
        fit = le.estimate(-X, STEPS)
    assert (fit.signs["A - B"] == -1).all()
    np.testing.assert_allclose(fit.A, A_TRUE, atol=1e-8)
    turned = X * np.sign(250.5 - STEPS)[:, None, None]
    with pytest.warns(le.IdentifiabilityWarning, match="changed its sign"):
        le.estimate(turned, STEPS)
    with pytest.warns(le.IdentifiabilityWarning, match="near zero"):
        le.estimate(noisy(0.05 * X, 10, 1.0), STEPS)
    equal = np.stack([np.eye(3) - 1 / 3] * 400) * np.exp(STEPS / 100)[:, None, None]
    with pytest.warns(le.IdentifiabilityWarning, match="cannot be told"):
        fit = le.estimate(equal, STEPS)
    assert np.isnan(fit.A).all()
    with pytest.raises(le.InputError):
        fit.to_sde()


GOOD = np.random.default_rng(0).normal(size=(20, 3, 3))
SPOILT = GOOD.copy()
SPOILT[4, 1, 2] = np.nan


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"class_means": GOOD[:, :1]}, "K = 1"),
        ({"class_means": GOOD[..., :2]}, "p = 2"),
        ({"class_means": GOOD[0]}, "shape"),
        ({"class_means": SPOILT}, "step 4, class 1"),
        ({"class_means": GOOD, "t": np.arange(19)}, "20 times"),
        ({"class_means": GOOD, "t": np.r_[0:10, 9, 11:20]}, r"t\[9\] = 9, t\[10\] = 9"),
        ({"class_means": GOOD[:5]}, "at least 6"),
        ({"class_means": GOOD, "window": 11}, "half"),
        ({"class_means": GOOD, "window": 4}, "odd"),
        ({"class_means": GOOD, "window": "mnist"}, "geomnist"),
        ({"class_means": GOOD, "baseline_window": 11}, "half"),
        ({"class_means": GOOD, "model": "logit"}, "did you mean 'logits'"),
        ({"class_means": GOOD, "missing": "skip"}, "interpolate"),
        ({"class_means": GOOD, "n_boot": -1}, "n_boot"),
        ({"class_means": GOOD, "logits": GOOD}, "both"),
        ({}, "neither"),
        ({"logits": GOOD}, "without"),
        ({"logits": GOOD, "labels": np.zeros((20, 3))}, "integer"),
        ({"logits": GOOD, "labels": np.full((20, 3), 3)}, r"0\.\.2"),
        ({"logits": SPOILT, "labels": np.zeros((20, 3), int)}, "step 4, trial 1"),
        ({"logits": GOOD, "labels": np.zeros((20, 3), int), "missing": "interpolate"}, "class 1"),
    ],
)
def test_bad_input_is_refused(options, says):
    with pytest.raises(le.InputError, match=says):
        quietly(**options)


# -- the impact matrix -----------------------------------------------------------------------------------------------


class Energy:
    """Losses whose step moves f(x') by lr <x, x'> H f(x), so that E is known."""

    def __init__(self, drift):
        self.drift = drift

    def __call__(self, out, y):
        if self.drift == "isotropic":
            return -0.5 * (out**2).sum()
        u = torch.eye(3, dtype=out.dtype)[y] - 1 / 3
        return -0.5 * ((out * u).sum(-1) ** 2 / (u**2).sum(-1)).sum()


def measured(drift, per_class=6, inter=0.25, lr=0.01):
    torch.manual_seed(0)
    G = torch.linalg.cholesky((1 - inter) * torch.eye(3) + inter).double()
    ys = torch.arange(3).repeat_interleave(per_class)
    model = torch.nn.Linear(3, 3, bias=False).double()
    return le.measure(model, Energy(drift), (G[ys], ys), update=le.SGD(lr), outputs="logits", route="step"), ys


@pytest.mark.parametrize("drift", ["isotropic", "logits"])
def test_impact_matrix_of_a_known_model(drift):
    impact, ys = measured(drift)
    E = le.impact_matrix(impact, ys, ys, drift)
    np.testing.assert_allclose(E.values, 0.01 * (0.75 * np.eye(3) + 0.25), rtol=1e-6)
    assert (E.alpha, E.beta) == (pytest.approx(0.01), pytest.approx(0.0025))
    assert E.departure < 1e-6
    assert E.interval_low[0, 1] <= E.values[0, 1] + 1e-12
    assert E.to_xarray()["values"].dims == ("target_class", "source_class")


def test_impact_matrix_is_least_squares_and_names_what_it_cannot_tell():
    impact, ys = measured("isotropic")
    rng = np.random.default_rng(0)
    impact.change = torch.from_numpy(rng.normal(size=impact.change.shape))
    impact.source_before = torch.from_numpy(rng.normal(size=impact.source_before.shape))
    E = le.impact_matrix(impact, ys, ys)
    change, v = impact.change.numpy()[6:12, 12:], impact.source_before.numpy()[6:12]  # stepped on 1, moved 2
    x, y = np.broadcast_to(v[:, None], change.shape).ravel(), change.ravel()
    assert E.values[2, 1] == pytest.approx(np.linalg.lstsq(x[:, None], y, rcond=None)[0][0])
    assert E.departure > 0.1
    assert E.departure_by_chance > 0
    impact.source_before[:6] = 0
    E = le.impact_matrix(impact, ys, ys)
    assert np.isnan(E.values[:, 0]).all()
    assert np.isfinite(E.values[:, 1:]).all()
    assert "noise floor" in E.reasons[0, 0]
    with pytest.raises(le.InputError, match="source labels"):
        le.impact_matrix(impact, ys[:-1], ys)
    with pytest.raises(le.InputError, match="logits"):
        le.impact_matrix(impact, ys + 1, ys + 1, "logits")


# -- the command -----------------------------------------------------------------------------------------------------


def call(*arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return stop.value.code


@pytest.mark.exhaustive
def test_command_reads_both_files_and_writes(tmp_path, capsys):
    path = logit_path(3)
    z, y = log_of(path, 30, 0.3)
    np.savez(tmp_path / "means.npz", class_means=noisy(path, 8, 0.1)[:, ::4], t=STEPS[::4], truth=np.array("{}"))
    np.savez(tmp_path / "log.npz", logits=z, labels=y)
    for name in ("means", "log"):
        out = tmp_path / name
        assert call("estimate", tmp_path / f"{name}.npz", "--out", out, "--n-boot", 40) == 0
        found = json.loads((out / "estimate.json").read_text())
        low, high = found["summary"]["end"]["A"][1:]
        assert low - 0.5 < A_TRUE[-1] < high + 0.5
        assert len(found["series"]["alpha_low"]) == len(found["series"]["t"])
        for figure in ("rates", "model-and-data", "tail"):
            assert (out / "figures" / f"{figure}.png").stat().st_size > 5000
        assert "verdict: " in capsys.readouterr().out


def test_command_reads_a_run(tmp_path):
    torch.manual_seed(0)
    ys = torch.arange(30) % 3
    xs = torch.randn(30, 4) + 2 * torch.eye(3, 4)[ys]
    model, loss_fn = torch.nn.Linear(4, 3), torch.nn.CrossEntropyLoss()
    opt = torch.optim.SGD(model.parameters(), lr=0.05)
    store = tmp_path / "run.zarr"
    tracker = le.Tracker(model, loss_fn, (xs, ys), update=le.SGD(0.05), schedule=le.every(1), store=store, route="step")
    for _ in range(10):
        opt.zero_grad()
        loss_fn(model(xs), ys).backward()
        opt.step()
        tracker.step()
    tracker.finish()
    assert call("estimate", tmp_path, "--out", tmp_path / "out") == 0
    found = json.loads((tmp_path / "out" / "estimate.json").read_text())
    assert found["series"]["t"] == list(range(1, 11))
    assert found["summary"]["no_interval"]


def test_command_refuses_other_files(tmp_path, capsys):
    (tmp_path / "a.npz").write_text("no")
    np.savez(tmp_path / "b.npz", x=np.zeros(3))
    for path in (tmp_path / "a.npz", tmp_path / "b.npz", tmp_path / "c.npz", tmp_path):
        assert call("estimate", path) == 2
        assert "a run" in capsys.readouterr().err
