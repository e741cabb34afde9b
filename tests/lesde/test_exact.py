"""The exact law against adaptive integrators and against simulation."""

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

import local_elasticity as le
from local_elasticity.lesde import exact

T = np.array([0.0, 0.3, 1.0, 2.5, 3.0])


def random_model(drift, k, seed=0, **options):
    """Time-varying alpha and beta, also of changing sign."""
    rng = np.random.default_rng([seed, k])
    c = rng.normal(size=6)
    alpha = lambda t: 1 + c[0] * np.sin(3 * c[1] * t) + c[2] * np.exp(-t)  # noqa: E731
    beta = lambda t: c[3] * np.cos(2 * c[4] * t) + 0.3 * c[5]  # noqa: E731
    means = rng.normal(size=(k, k if drift == "logits" else 4))
    return le.LESDE(alpha, beta, k, drift, lambda t: 0.3 + 0.1 * np.sin(t), (means, 0.2), **options)


def blocks_matrix(sde, t):
    """M(t) written out block by block from the definition."""
    k, p = sde.means.shape
    m = np.zeros((k * p, k * p))
    for a in range(k):
        for b in range(k):
            strength = float(sde.alpha(np.array(t)) if a == b else sde.beta(np.array(t)))
            if sde.drift.name == "logits":
                d = np.eye(k)[b] - 1 / k
                h = np.outer(d, d) / (d @ d)
            else:
                h = sde.drift.blocks[a, b]
            m[a * p : (a + 1) * p, b * p : (b + 1) * p] = sde.weights[b] * strength * h
    return m


def integrate(sde, t):
    size = sde.means.size

    def derivative(time, state):
        m, c = blocks_matrix(sde, time), state[size:].reshape(size, size)
        spread = float(sde.noise.variance(np.array(time))) * np.eye(size)
        return np.concatenate([m @ state[:size], (m @ c + c @ m.T + spread).ravel()])

    begin = np.concatenate([sde.means.ravel(), (0.2 * np.eye(size)).ravel()])
    found = solve_ivp(derivative, (0, t[-1]), begin, t_eval=t, rtol=1e-10, atol=1e-12, method="DOP853").y.T
    return found[:, :size].reshape(t.size, *sde.means.shape), found[:, size:].reshape(t.size, size, size)


@pytest.mark.parametrize("k", [2, 3, 5])
@pytest.mark.parametrize("drift", ["isotropic", "logits"])
def test_closed_forms_equal_an_adaptive_integrator(drift, k):
    sde = random_model(drift, k)
    mean, covariance = integrate(sde, T)
    assert np.abs(sde.mean(T) - mean).max() < 1e-7 * max(1, np.abs(mean).max())
    assert np.abs(sde.covariance(T, 7) - covariance / 7).max() < 1e-7 * max(1, np.abs(covariance).max())


@pytest.mark.parametrize("drift", ["isotropic", "logits"])
def test_means_of_ten_classes_equal_an_adaptive_integrator(drift):
    sde = random_model(drift, 10)
    found = solve_ivp(
        lambda s, x: blocks_matrix(sde, s) @ x, (0, 3), sde.means.ravel(), rtol=1e-9, atol=1e-11, method="DOP853"
    ).y[:, -1]
    assert np.abs(sde.mean(3.0)[0].ravel() - found).max() < 1e-7


def test_the_exponential_of_the_integral_is_not_the_logits_model():
    from scipy.linalg import expm

    sde = random_model("logits", 3)
    a, b, _ = exact.integral(sde, np.array([3.0]))
    own, other = sde.drift_matrices
    wrong = expm(a[0] * own + b[0] * other) @ sde.means.ravel()
    assert np.abs(wrong - sde.mean(3.0).ravel()).max() > 1e-3


def test_own_blocks_and_class_weights_equal_an_integrator():
    rng = np.random.default_rng(1)
    blocks = rng.normal(size=(3, 3, 2, 2))
    sde = le.LESDE(lambda t: np.cos(t), -0.2, 3, blocks, 0.3, (rng.normal(size=(3, 2)), 0.2), [0.5, 0.3, 0.2])
    mean, covariance = integrate(sde, T)
    assert np.abs(sde.mean(T) - mean).max() < 1e-7
    assert np.abs(sde.covariance(T, 1) - covariance).max() < 1e-7
    weighted = le.LESDE(0.5, -0.1, 3, "logits", 0.1, np.eye(3), [0.5, 0.3, 0.2])
    assert weighted.modes is None
    assert not np.allclose(weighted.mean(2.0), le.LESDE(0.5, -0.1, 3, "logits", 0.1, np.eye(3)).mean(2.0))


@pytest.mark.parametrize("drift", ["isotropic", "logits"])
def test_closed_transitions_equal_integrated_ones_and_compose(drift):
    sde = random_model(drift, 3)
    closed = exact.transitions(sde, T)
    plain = sde._changed(drift=le.lesde.Drift("same blocks", sde.drift.blocks))
    integrated = exact.transitions(plain, T)
    for name in ("carry", "spread", "noise"):
        assert np.allclose(getattr(closed, name), getattr(integrated, name), atol=1e-9), name
    c = 0.2 * np.eye(sde.means.size)
    for carry, spread in zip(closed.carry, closed.spread, strict=True):
        c = carry @ c @ carry.T + spread
    assert np.allclose(c, sde.covariance(3.0, 1)[0], rtol=1e-9)


def test_moments_of_the_isotropic_model_are_those_of_the_formulas():
    k, p, n, a, b, s, v0, t = 4, 3, 9, 0.8, -0.3, 0.5, 0.2, 1.7
    sde = le.LESDE(a, b, k, "isotropic", s, (np.eye(k, p), v0))
    c = sde.covariance(t, n)[0].reshape(k, p, k, p)[:, 0, :, 0]
    for rate, of, share in (((a + (k - 1) * b) / k, np.full((k, k), 1 / k), 1 / k), ((a - b) / k, None, 1 - 1 / k)):
        projection = of if of is not None else np.eye(k) - 1 / k
        gathered = np.exp(2 * rate * t) * (v0 + s**2 * (1 - np.exp(-2 * rate * t)) / (2 * rate)) / n
        assert np.allclose((projection @ c @ projection)[0, 0], share * gathered)


def test_large_exponents_are_followed_on_a_log_scale():
    sde = le.LESDE(3000.0, -1000.0, 3, "logits", 0.1, np.eye(3))
    sign, log = sde.mean(1.5, log=True)
    small = le.LESDE(3.0, -1.0, 3, "logits", 0.1, np.eye(3))
    assert log.max() == pytest.approx(4000 / 3 * 1.5 + np.log(np.abs(small.mean(0.0)).max()), rel=1e-3)
    assert (np.sign(np.eye(3) - 0.5) == sign[0]).all()
    assert np.isfinite(sde.covariance(1.5, 5, log=True)[1]).all()
    with pytest.raises(le.InputError, match="log=True"):
        sde.mean(1.5)
    own, blocks = small.mean(1.5, log=True), small._changed(drift=le.lesde.Drift("blocks", small.drift.blocks))
    assert np.allclose(own[1], blocks.mean(1.5, log=True)[1], atol=1e-8)


def test_samples_of_a_rate_are_integrated_exactly():
    times, values = np.array([0.0, 1.0, 3.0]), np.array([5.0, 1.0, 2.0])
    linear = le.LESDE((times, values), 0.0, 2, "isotropic", 0.0, np.eye(2))
    step = le.LESDE((times, values), 0.0, 2, "isotropic", 0.0, np.eye(2), kind="step")
    assert exact.integral(linear, np.array([3.0]))[0] == pytest.approx(3.0 + 3.0)
    assert exact.integral(step, np.array([0.5, 3.0]))[0] == pytest.approx([0.5, 1.0 + 4.0])


def test_functions_of_a_scalar_and_jumps_are_integrated():
    def scalar(t):
        return 1.0 if t < 0.7 else 3.0

    sde = le.LESDE(scalar, 0.0, 2, "isotropic", 0.0, np.eye(2))
    assert exact.integral(sde, np.array([2.0]))[0] == pytest.approx(0.7 + 3 * 1.3, abs=1e-10)
    tail = le.LESDE(lambda t: 3 * (1 + t) ** -0.5, 0.0, 3, "isotropic", 0.1, np.eye(3))
    assert exact.integral(tail, np.array([1e9]))[0] == pytest.approx(6 * (np.sqrt(1e9 + 1) - 1), rel=1e-12)


def test_label_noise_is_the_confusion_matrix_applied_twice():
    k, p = 4, 0.35
    sde = le.LESDE(0.7, -0.2, k, "isotropic", 0.1, np.eye(k))
    confusion = (1 - p - p / (k - 1)) * np.eye(k) + p / (k - 1)
    expected = confusion @ sde.impact_matrix(0.0)[0] @ confusion.T
    assert np.allclose(sde.with_label_noise(p).impact_matrix(0.0)[0], expected)
    assert np.ptp(sde.with_label_noise((k - 1) / k).impact_matrix(0.0)) < 1e-12


def test_tensors_in_tensors_out():
    start = torch.eye(3, dtype=torch.float32)
    sde = le.LESDE(0.5, -0.1, 3, "logits", 0.1, start)
    assert sde.mean(torch.tensor([1.0, 2.0])).dtype == torch.float32
    assert isinstance(sde.sample([1.0], 4, 2, 0), torch.Tensor)
    plain = le.LESDE(0.5, -0.1, 3, "logits", 0.1, np.eye(3))
    assert isinstance(plain.mean(1.0), np.ndarray)
    assert np.allclose(sde.mean(1.0).numpy(), plain.mean(1.0), rtol=1e-6)
    assert isinstance(plain.mean(torch.tensor([1.0])), torch.Tensor)


GOOD = {"alpha": 0.5, "beta": -0.1, "n_classes": 3, "drift": "logits", "sigma": 0.1, "initial": np.eye(3)}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"n_classes": 1, "initial": np.eye(1)}, "n_classes: a whole number >= 2"),
        ({"initial": np.ones((3, 4))}, "p = K = 3"),
        ({"initial": np.ones((2, 3))}, "initial class means"),
        ({"initial": (np.eye(3), -1.0)}, "none negative"),
        ({"initial": np.full((3, 3), np.nan)}, "NaN"),
        ({"sigma": -0.1}, "at least 0"),
        ({"sigma": np.array([-1.0, 1, 1])}, "none negative"),
        ({"sigma": np.stack([-np.eye(3)] * 3)}, "positive semi-definite"),
        ({"alpha": np.ones(5)}, "without its times"),
        ({"alpha": ([0, 1], [1.0])}, "same length"),
        ({"alpha": ([0, 0], [1.0, 1.0])}, "increase"),
        ({"alpha": ([0, 1], [1.0, np.nan])}, "finite samples"),
        ({"drift": "logit"}, "did you mean 'logits'"),
        ({"drift": np.ones((3, 3, 2, 2))}, "blocks"),
        ({"class_weights": [1, 1, 1]}, "sum to 1"),
    ],
)
def test_bad_input_is_refused(change, says):
    with pytest.raises(le.InputError, match=says):
        le.LESDE(**{**GOOD, **change})


def test_times_beyond_the_samples_and_values_that_are_none_are_refused():
    short = le.LESDE(**{**GOOD, "alpha": ([0.0, 5.0], [1.0, 1.0])})
    for call in (short.mean, lambda t: short.covariance(t, 2), lambda t: short.sample([t], 2, 2, 0)):
        with pytest.raises(le.InputError, match="alpha on the whole time grid"):
            call(6.0)
    with pytest.raises(le.InputError, match="finite alpha"):
        le.LESDE(**{**GOOD, "alpha": lambda t: 1 / (t * 0)}).mean(1.0)
    with pytest.raises(le.InputError, match="from 0 on"):
        le.LESDE(**GOOD).mean(-1.0)
