"""Paths against the exact law, and the authors' recursion against its plain loop."""

import numpy as np
import pytest
import torch

import local_elasticity as le

T = np.array([0.5, 1.0, 2.0])
N, PATHS = 10, 3000


def model(drift="logits", **options):
    rng = np.random.default_rng(3)
    means = rng.normal(size=(3, 3))
    return le.LESDE(lambda t: 0.6 * np.exp(-t), lambda t: -0.3 * np.cos(t), 3, drift, 0.4, (means, 0.1), **options)


def z_scores(sde, means, within):
    """How far sampled means, covariances and variances within are from the law, in standard errors."""
    mean, c, v = sde.mean(T), sde.covariance(T, N), sde.within_variance(T) * (1 - 1 / N)
    flat = means.reshape(PATHS, T.size, -1)
    deviation = flat - mean.reshape(T.size, -1)
    diagonal = np.einsum("tii->ti", c)
    z_mean = deviation.mean(0) / np.sqrt(diagonal / PATHS)
    emp = np.einsum("xti,xtj->tij", deviation, deviation) / PATHS
    z_cov = (emp - c) / np.sqrt((diagonal[:, :, None] * diagonal[:, None, :] + c**2) / PATHS)
    z_within = (within.mean(0) / v - 1) / np.sqrt(2 / (N - 1) / PATHS)
    return [np.abs(z).max() for z in (z_mean, z_cov, z_within)]


@pytest.mark.parametrize("drift", ["isotropic", "logits"])
def test_moments_of_exact_paths_are_those_of_the_law(drift):
    sde = model(drift)
    found = sde.sample(T, N, PATHS, 1, keep="statistics")
    assert max(z_scores(sde, found.class_means, found.within_variance)) < 4.5
    assert max(z_scores(sde, found.class_means + 0.05, found.within_variance)) > 4.5  # the test can fail


def test_moments_with_a_covariance_per_class():
    rng = np.random.default_rng(0)
    root = rng.normal(size=(3, 3, 3)) / 3
    sde = le.LESDE(0.6, -0.3, 3, "logits", root @ root.transpose(0, 2, 1), (np.eye(3), 0.1))
    found = sde.sample(T, N, PATHS, 1, keep="statistics")
    assert max(z_scores(sde, found.class_means, found.within_variance)) < 4.5


def test_statistics_are_those_of_the_clouds():
    clouds = model().sample(T, N, 50, 2)
    found = model().sample(T, N, 50, 2, keep="statistics")
    assert clouds.shape == (50, 3, 3, N, 3)
    assert np.allclose(clouds.mean(axis=3), found.class_means)
    assert np.allclose(clouds.var(axis=3), found.within_variance)
    again = model().sample(T, N, 50, torch.Generator().manual_seed(2))
    assert np.array_equal(clouds, again)
    assert not np.allclose(clouds, model().sample(T, N, 50, np.random.default_rng(2)))


def test_paths_are_joint_in_time():
    sde = model("isotropic")
    x = sde.sample(T, 1, 20_000, 5, keep="means")[:, :, :, 0]
    fine = sde.covariance(T, 1)
    assert np.cov(x[:, 0, 0], x[:, 1, 0])[0, 1] > 0.5 * fine[0, 0, 0]
    one = sde._changed(initial_covariance=sde.initial_covariance * 0)
    step = one.sample([1.0, 1.0 + 1e-9], 50, 3, 0)
    assert np.abs(step[:, 1] - step[:, 0]).max() < 1e-3


def test_own_vector_drift_amplifies_noise_within_classes():
    sde = model(acts_on="own")
    x = sde.sample(T, N, PATHS, 0)
    v = x.var(axis=(0, 3))
    assert np.allclose(v, sde.within_variance(T), rtol=0.05)
    euler = sde.sample(T, N, 500, 0, method="euler-maruyama", step=0.02).var(axis=(0, 3))
    assert np.allclose(euler, sde.within_variance(T), rtol=0.15)
    assert (sde.within_variance(T) > 1.05 * model().within_variance(T)).any()


def test_discrete_recursion_tends_to_the_equation():
    sde = model()
    found = sde.sample(T, 40, 600, 0, method="discrete", step=0.01, keep="statistics")
    error = found.class_means.std(axis=0) / np.sqrt(600)
    assert (np.abs(found.class_means.mean(axis=0) - sde.mean(T)) / error).max() < 5
    assert np.allclose(found.within_variance.mean(0), sde.within_variance(T) * (1 - 1 / 40), rtol=0.03)


def test_discrete_recursion_moves_as_it_is_written():
    """Without noise and with one sample a class the path depends on the classes drawn only: replay them."""
    k, steps = 3, 40
    sde = le.LESDE(0.6, -0.3, k, "logits", 0.0, np.random.default_rng(0).normal(size=(k, k)))
    got = sde.sample(np.arange(steps + 1) * 0.1, 1, 1, 7, method="discrete", step=0.1)[0, :, :, 0]
    u = le.lesde.simplex(k)
    x = sde.means.copy()
    for m in range(1, steps + 1):
        candidates = []
        for label in range(k):
            impact = np.where(np.arange(k) == label, 0.6, -0.3)
            candidates.append(x + 0.1 * impact[:, None] * (u[label] @ x[label]) * u[label])
        distances = [np.abs(c - got[m]).max() for c in candidates]
        assert min(distances) < 1e-12
        x = candidates[int(np.argmin(distances))]


def euler_law(sde, t, steps):
    """Mean and covariance of the Euler recursion itself, by its own recursion of moments."""
    h, size = t / steps, sde.means.size
    own, other = sde.drift_matrices
    x, c = sde.means.ravel(), 0.1 * np.eye(size)
    for j in range(steps):
        s = np.array(j * h)
        m = np.eye(size) + h * (sde.alpha(s) * own + sde.beta(s) * other)
        x, c = m @ x, m @ c @ m.T + h * 0.16 * np.eye(size)
    return x, c


def test_euler_maruyama_has_weak_order_one():
    sde = model()
    errors = []
    for steps in (8, 16, 32, 64):
        x, c = euler_law(sde, 2.0, steps)
        gap = np.concatenate([x - sde.mean(2.0).ravel(), (c - sde.covariance(2.0, 1)[0]).ravel()])
        errors.append(np.abs(gap).max())
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    assert np.abs(orders - 1).max() < 0.15
    coarse = sde.sample([2.0], 1, 40_000, 0, method="euler-maruyama", step=0.25, keep="means")[:, 0].reshape(40_000, -1)
    x, c = euler_law(sde, 2.0, 8)
    error = np.sqrt(np.diag(c) / 40_000)
    assert (np.abs(coarse.mean(0) - x) / error).max() < 4.5  # the sampler follows its own law ...
    assert (np.abs(coarse.mean(0) - sde.mean(2.0).ravel()) / error).max() > 6  # ... which is not the exact one


def test_a_velocity_replaces_the_drift():
    sde = le.LESDE(0.0, 0.0, 3, "isotropic", 0.0, np.ones((3, 2)))
    x = sde.sample([1.0], 1, 2, 0, method="euler-maruyama", step=1e-3, velocity=lambda t, means: -means)
    assert np.allclose(x, np.exp(-1), rtol=1e-3)


def plain_published(starts, alpha, beta):
    """The authors' loop, from the formula: forward Euler of the L-model with h = 1."""
    trials, k, _ = starts.shape
    x = np.zeros((trials, len(alpha), k, k))
    x[:, 0] = starts
    d = np.eye(k) - 1 / k
    for trial in range(trials):
        for m in range(1, len(alpha)):
            for a in range(k):
                move = np.zeros(k)
                for b in range(k):
                    h = np.outer(d[b], d[b]) / np.linalg.norm(d[b]) ** 2
                    move += (alpha[m] if a == b else beta[m]) * h @ x[trial, m - 1, b]
                x[trial, m, a] = x[trial, m - 1, a] + move / k
    return x


@pytest.mark.parametrize("k", [2, 3, 5])
def test_published_recursion_equals_its_plain_loop(k):
    rng = np.random.default_rng(k)
    t = np.arange(120)
    alpha, beta = 0.1 * rng.normal(size=120) + 0.1, 0.1 * rng.normal(size=120)
    starts = rng.normal(size=(3, k, k))
    sde = le.LESDE((t, alpha), (t, beta), k, "logits", 0.0, (np.zeros((k, k)), 1.0))
    plain = plain_published(starts, alpha, beta)
    found = sde.sample(t, 1, 3, 0, method="published", starts=starts)
    scale = np.abs(plain).max(axis=(0, 2, 3), keepdims=True)
    assert (np.abs(found - plain) / scale).max() < 1e-12
    out = np.empty_like(found)
    assert sde.sample(t, 1, 3, 0, method="published", starts=starts, out=out) is out
    assert np.array_equal(out, found)


def test_published_moments_are_exact():
    t = np.arange(60)
    sde = le.LESDE((t, np.full(60, 0.05)), (t, np.full(60, -0.03)), 3, "logits", 0.0, (np.eye(3), [0.5, 1.0, 2.0]))
    mean, sd = sde.published_moments(t)
    many = sde.sample(t, 1, 20_000, 0, method="published")
    assert np.abs((many.mean(axis=0) - mean) / (sd / np.sqrt(20_000))).max() < 4.5
    assert np.allclose(many.std(axis=0), sd, rtol=0.03)


def test_float32_and_options():
    sde = model()
    assert sde.sample(T, 3, 2, 0, dtype="float32").dtype == np.float32
    assert isinstance(sde.sample(T, 3, 2, 0, device="cpu"), torch.Tensor)
    for bad, says in (
        ({"method": "exactly"}, "method: one of"),
        ({"keep": "all"}, "keep"),
        ({"dtype": "float16"}, "'float32', 'float64'"),
        ({"method": "discrete", "step": 0.3}, "whole steps"),
        ({"method": "published"}, "every step"),
        ({"out": np.empty(1)}, "neither starts nor out"),
    ):
        with pytest.raises(le.InputError, match=says):
            sde.sample(T, 3, 2, 0, **bad)
    with pytest.raises(le.InputError, match="increase"):
        sde.sample([1.0, 1.0], 3, 2, 0)
    with pytest.raises(le.InputError, match="logits drift"):
        model("isotropic").sample(np.arange(3), 3, 2, 0, method="published")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_paths_on_cuda():
    sde = model()
    found = sde.sample(T, N, PATHS, 1, keep="statistics", device="cuda")
    assert max(z_scores(sde, found.class_means.cpu().numpy(), found.within_variance.cpu().numpy())) < 4.5
