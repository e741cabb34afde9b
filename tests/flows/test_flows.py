"""Closed forms against integrators, finite steps, limits and bad input."""

import warnings

import numpy as np
import pytest
from cases import CASES, case
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp

import local_elasticity as le
from local_elasticity import flows
from local_elasticity.flows import UndefinedWarning

TIMES = np.array([0.0, 0.1, 0.7, 2.0, 8.0])
EVERY = pytest.mark.parametrize("name", CASES)


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UndefinedWarning)
        warnings.simplefilter("error", RuntimeWarning)
        yield


@EVERY
def test_weights_solve_the_differential_equation(name):
    c = case(name)
    start = c.flow.start
    found = solve_ivp(
        lambda _, w: c.rate(w.reshape(start.shape)).ravel(),
        (0, TIMES[-1]),
        start.ravel(),
        method="DOP853",
        t_eval=TIMES,
        rtol=1e-12,
        atol=1e-13,
    )
    expected = found.y.T.reshape(-1, *start.shape)
    np.testing.assert_allclose(c.flow.weights(TIMES), expected, atol=1e-9, rtol=1e-9)
    np.testing.assert_array_equal(c.flow.weights(TIMES)[0], c.flow.weights(0.0))


@EVERY
def test_the_loss_falls_as_its_flow_says(name):
    c = case(name)
    if name == "two layers, ReLU":
        with pytest.raises(le.InputError, match="training inputs"):
            c.flow.loss(0.0)
        return
    t, h = 0.3, 1e-4
    before, after = c.flow.loss(t - h), c.flow.loss(t + h)
    axes = tuple(range(np.ndim(before), c.flow.start.ndim))
    speed = (c.rate(c.flow.weights(t)) ** 2).sum(axes)
    if name == "gate, GLM-tron":  # no gradient flow of its loss, which falls all the same
        assert (after < before).all()
        return
    scale = c.flow.theta**2 if name == "ridge classifier" else 1.0
    np.testing.assert_allclose((before - after) / (2 * h), speed / scale, rtol=1e-5)


@EVERY
def test_x_against_itself_is_one(name):
    c = case(name)
    s = c.flow.s_rel(TIMES, c.x, c.x, c.label)
    assert np.isfinite(s).any()
    np.testing.assert_allclose(s[np.isfinite(s)], 1, rtol=1e-12)


@pytest.mark.parametrize("name", [name for name, make in CASES.items() if make().scalar])
def test_cauchy_schwarz(name):  # with several outputs or a penalty there is no such bound
    c = case(name)
    there, back = (c.flow.s_rel(TIMES, a, b, c.label) for a, b in ((c.x, c.x_prime), (c.x_prime, c.x)))
    product = (there * back)[np.isfinite(there * back)]  # K(x,x')^2 / (K(x,x) K(x',x'))
    assert len(product) > 10
    assert (product <= 1 + 1e-12).all()


@EVERY
def test_nothing_overflows_at_large_times(name):
    c = case(name)
    late = np.array([1e3, 1e6])
    assert np.isfinite(c.flow.weights(late)).all()
    s = c.flow.s_rel(late, c.x, c.x_prime, c.label)
    reasons = c.flow.why_undefined(late, c.x, c.x_prime, c.label)
    np.testing.assert_array_equal(np.isnan(s), reasons != "")
    if name not in ("softmax layer", "two layers, linear", "two layers, linear, no biases"):  # still moving, slowly
        np.testing.assert_allclose(s[0], s[1], rtol=2e-2)


@EVERY
def test_shapes_follow_times_starts_and_pairs(name):
    c = case(name)
    label = None if c.label is None else np.asarray(c.label)[:, None]
    s = c.flow.s_rel(TIMES, c.x[:, None], c.x_prime[None], label)
    n = len(c.x)
    assert s.shape == (len(TIMES), *c.flow._starts, n, n)
    np.testing.assert_allclose(
        np.diagonal(s, axis1=-2, axis2=-1), c.flow.s_rel(TIMES, c.x, c.x_prime, c.label), rtol=1e-10
    )
    assert c.flow.s_rel(0.5, c.x[0], c.x_prime[0], None if c.label is None else c.label[0]).shape == c.flow._starts


def step_change(f, gradient, w, x, x_prime, lr):
    moved = w - lr * gradient(w)
    return np.linalg.norm(f(moved, x_prime) - f(w, x_prime)) / np.linalg.norm(f(moved, x) - f(w, x))


def test_finite_steps_equal_the_formula_where_the_prediction_is_linear():
    for name, penalty in (("linear regression", 0.0), ("ridge", 0.3)):
        c = case(name)
        w = c.flow.weights(0.4)
        s = c.flow.s_rel(0.4, c.x, c.x_prime, c.label)
        for lr in (1.0, 0.01):
            for i, j in np.ndindex(s.shape):
                x, y = c.x[j], c.label[j]
                found = step_change(
                    lambda v, z: np.atleast_1d(v @ z),
                    lambda v, x=x, y=y, penalty=penalty: (v @ x - y) * x + penalty * v,
                    w[i],
                    x,
                    c.x_prime[j],
                    lr,
                )
                np.testing.assert_allclose(found, s[i, j], rtol=1e-10)


def test_finite_steps_equal_the_ridge_classifier_and_the_published_form_differs():
    c = case("ridge classifier")
    published = flows.RidgeClassifierFlow(c.flow.features, c.flow.labels, 0.02, 0.7, c.flow.start, published=True)
    w, s = c.flow.weights(0.4), c.flow.s_rel(0.4, c.x, c.x_prime, c.label)
    other = published.s_rel(0.4, c.x, c.x_prime, c.label)
    rho, n = c.flow.rho, c.flow.n_samples
    for i, j in np.ndindex(s.shape):
        h, h2, e = c.x[j], c.x_prime[j], np.eye(3)[c.label[j]]
        gradient = lambda v, h=h, e=e: np.outer(v @ h - e, h) + rho * v  # noqa: E731
        found = step_change(lambda v, z: v @ z, gradient, w[i], h, h2, 0.5)
        np.testing.assert_allclose(found, s[i, j], rtol=1e-10)
        # the notebook's numerator, as it stands in spec srel 2.3
        T, k = rho * np.eye(5) + np.outer(h, h) / n, c.label[j]
        num = (h @ h2) ** 2 - 2 * (h @ h2) * (w[i, k] @ T @ h2) + sum((row @ T @ h2) ** 2 for row in w[i])
        q = rho + h @ h
        den = (h @ h) ** 2 - 2 * (h @ h) * q * (w[i, k] @ h) + q**2 * sum((row @ h) ** 2 for row in w[i])
        np.testing.assert_allclose(np.sqrt(num / den), other[i, j], rtol=1e-10)
    assert np.abs(other / s - 1).max() > 0.1
    assert not np.allclose(published.s_rel(0.4, c.x, c.x, c.label), 1)
    np.testing.assert_array_equal(published.weights(1.0), c.flow.weights(1.0))


def test_the_published_loss_is_the_broadcast_one():
    c = case("ridge classifier")
    f = c.flow
    published = flows.RidgeClassifierFlow(f.features, f.labels, 0.02, 0.7, f.start, published=True)
    w = f.weights(0.4)[0]
    outputs = f.features @ w.T
    right = sum(0.5 * np.sum((np.eye(3)[k] - o) ** 2) for o, k in zip(outputs, f.labels, strict=True)) / 24
    np.testing.assert_allclose(f.loss(0.4)[0], right + f.rho / 2 * (w**2).sum(), rtol=1e-12)
    wrong = sum(np.sum((np.eye(3)[k][None, None] - o[:, None, None]) ** 2) for o, k in zip(outputs, f.labels))  # noqa: B905
    np.testing.assert_allclose(published.loss(0.4)[0], wrong / 48 + 0.02 / 6 * (w**2).sum(), rtol=1e-12)


@pytest.mark.parametrize("name", ["diagonal d=1", "diagonal d=2", "diagonal d=3", "gate, population", "gate, GLM-tron"])
def test_finite_steps_are_exact_and_tend_to_the_limit_at_order_one(name):
    c = case(name)
    label = np.full(len(c.x), 0.7)
    w = c.flow.weights(0.4)

    def f(v, z):
        return np.maximum(v @ z, 0) if name.startswith("gate") else (v**c.flow.depth) @ z

    lr = 0.05
    s = c.flow.s_rel(0.4, c.x, c.x_prime, label, lr=lr)
    for i, j in np.ndindex(s.shape):
        x, r = c.x[j], f(w[i], c.x[j]) - 0.7
        if name == "gate, population":
            gradient = r * x * (w[i] @ x > 0)
        elif name == "gate, GLM-tron":
            gradient = r * x
        else:
            gradient = r * c.flow.depth * w[i] ** (c.flow.depth - 1) * x
        moved = w[i] - lr * gradient
        below = f(moved, x) - f(w[i], x)
        if below == 0:
            assert np.isnan(s[i, j])
            continue
        np.testing.assert_allclose(
            np.abs((f(moved, c.x_prime[j]) - f(w[i], c.x_prime[j])) / below), s[i, j], rtol=1e-10
        )
    limit = c.flow.s_rel(0.4, c.x, c.x_prime, label)
    errors = [np.nanmax(np.abs(c.flow.s_rel(0.4, c.x, c.x_prime, label, lr=h) - limit)) for h in (1e-4, 5e-5)]
    if name in ("diagonal d=2", "diagonal d=3"):
        assert errors[0] / errors[1] == pytest.approx(2, rel=0.02)
    else:
        assert max(errors) < 1e-9


@pytest.mark.parametrize("definition", ["l2", "kl", "kl_reverse"])
def test_softmax_finite_steps_tend_to_the_limit_at_order_one(definition):
    c = case("softmax layer")
    flow = flows.SoftmaxLayerFlow(c.flow.start, definition=definition)
    limit = flow.s_rel(0.0, c.x, c.x_prime, c.label)
    flow.definition = le.similarity.Definition(
        definition, flow.definition.on, flow.definition.numerator, flow.definition.denominator, 0.0, ""
    )
    errors = [np.abs(flow.s_rel(0.0, c.x, c.x_prime, c.label, lr=lr) / limit - 1).max() for lr in (2e-4, 1e-4)]
    assert errors[1] < 2e-3
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.05)


def test_kl_orders_agree_to_leading_order():
    c = case("softmax layer")
    one, other = (
        flows.SoftmaxLayerFlow(c.flow.start, definition=name).s_rel(0, c.x, c.x_prime, c.label)
        for name in ("kl", "kl_reverse")
    )
    np.testing.assert_allclose(one, other, rtol=1e-12)


def test_diagonal_limits():
    u, s = np.array([1.0, 0.3, 0.0]), np.array([1.0, 0.5, 2.0])
    x, x_prime = np.array([1.0, -2.0, 0.5]), np.array([0.3, 1.0, 2.0])
    for depth in (2, 3, 4):
        flow = flows.DiagonalFlow(depth, s, u, np.full(3, 0.1))
        np.testing.assert_allclose(flow.s_rel(0, x, x_prime), abs(x @ x_prime) / (x @ x), rtol=1e-12)
        gains = u ** (2 - 2 / depth)
        end = abs((x * x_prime * gains).sum()) / (x * x * gains).sum()
        np.testing.assert_allclose(flow.s_rel(1e9, x, x_prime), end, rtol=1e-5)
    flow = flows.DiagonalFlow(2, s, u, np.full(3, 1e-3))
    at = flow.transition_times()
    assert np.isnan(at[2])
    np.testing.assert_allclose(np.diagonal(flow.weights(np.sort(at[:2]))[:, :2]) ** 2 / u[:2], 0.5, rtol=1e-3)


@settings(max_examples=20, deadline=None)
@given(
    depth=st.sampled_from([2, 3, 4, 7]),
    u=st.floats(-2, 2),
    w0=st.floats(1e-3, 2),
    t=st.floats(1e-3, 5),
)
def test_the_implicit_formula_solves_the_equation_for_any_coordinate(depth, u, w0, t):
    flow = flows.DiagonalFlow(depth, [1.0], [u], [w0])
    rate = lambda _, w: -depth * w ** (depth - 1) * (w**depth - u)  # noqa: E731
    found = solve_ivp(rate, (0, t), [w0], method="LSODA", rtol=1e-12, atol=1e-14).y[0, -1]
    np.testing.assert_allclose(flow.weights(t)[0], found, rtol=1e-8, atol=1e-11)


def test_the_gate_jumps_and_its_mean_over_directions():
    rng = np.random.default_rng(0)
    flow = flows.ReLUGateFlow(rng.standard_normal(3), rng.standard_normal(3))
    angle = 1.1
    x = rng.standard_normal((200_000, 3))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    across = np.cross(x, rng.standard_normal(x.shape))
    across /= np.linalg.norm(across, axis=1, keepdims=True)
    s = flow.s_rel(1.0, x, np.cos(angle) * x + np.sin(angle) * across)
    assert np.nanmean(s) == pytest.approx(float(flow.isotropic_mean(angle)), abs=3e-3)
    path = flow.s_rel(np.linspace(0, 10, 50), x[:50], x[50:100])
    alone = np.abs((x[:50] * x[50:100]).sum(1))
    assert np.all(np.isnan(path) | np.isclose(path, 0) | np.isclose(path, alone))


def test_a_closed_gate_is_nan_with_a_reason():
    flow = flows.ReLUGateFlow([1.0, 0.0], [0.0, 1.0])
    with pytest.warns(UndefinedWarning, match=r"1 of 2: the gate is closed at x"):
        s = flow.s_rel(0.0, [[-1.0, 0.0], [1.0, 0.0]], [[1.0, 1.0], [-1.0, 1.0]])
    np.testing.assert_array_equal(s, [np.nan, 0.0])
    assert "closed" in flow.why_undefined(0.0, [-1.0, 0.0], [1.0, 1.0]).item()
    assert flow.why_undefined(0.0, [1.0, 0.0], [1.0, 1.0]).item() == ""


def test_other_undefined_ratios_say_why():
    flow = flows.LinearRegressionFlow(np.eye(2), [1.0, 1.0], [0.0, 0.0])
    assert "fitted" in flow.why_undefined(0.0, [1.0, 0.0], [1.0, 1.0], 0.0).item()
    assert "does not move" in flow.why_undefined(0.0, [0.0, 0.0], [1.0, 1.0]).item()
    dead = flows.DiagonalFlow(3, [1.0], [1.0], [0.0])
    assert "all weights are 0" in dead.why_undefined(1.0, [1.0], [1.0]).item()


GOOD = flows.LinearRegressionFlow(np.eye(2), [1.0, 2.0], [0.0, 0.0])


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: flows.LinearRegressionFlow(np.ones((3, 2)), np.ones(3), np.ones(2)), "singular"),
        (lambda: flows.RidgeFlow(np.ones((1, 2)), np.ones(1), 0.0, np.ones(2)), "singular"),
        (lambda: flows.RidgeClassifierFlow(np.ones((4, 2)), [0, 1, 0, 1], 0.0), "singular"),
        (lambda: flows.QuadraticFlow([[1.0, 0.5], [0.0, 1.0]], [0, 0], [0, 0]), "symmetric"),
        (lambda: flows.QuadraticFlow([[1.0, 0.0], [0.0, -1.0]], [0, 0], [0, 0]), "positive definite"),
        (lambda: flows.QuadraticFlow(np.ones((2, 3)), [0, 0], [0, 0]), "square"),
        (lambda: flows.RidgeFlow(np.eye(2), np.ones(2), -1.0, np.ones(2)), "penalty"),
        (lambda: flows.RidgeFlow(np.eye(2), np.ones(3), 1.0, np.ones(2)), "label"),
        (lambda: flows.RidgeFlow(np.eye(2), np.ones(2), 1.0, np.ones(2)).s_rel(0, [1, 0], [0, 1]), "label"),
        (lambda: flows.RidgeFlow(np.eye(2), np.ones(2), 1.0, np.ones(3)), r"\(\.\.\., 2\)"),
        (lambda: flows.RidgeClassifierFlow(np.eye(3), [0, 2, 0], 1.0), "class 1"),
        (lambda: flows.RidgeClassifierFlow(np.eye(2), [0, 1], 1.0, theta=0.0), "theta"),
        (lambda: flows.RidgeClassifierFlow(np.eye(2), [0, 1], 1.0).s_rel(0, [1, 0], [0, 1], 2), "labels in 0..1"),
        (lambda: flows.DiagonalFlow(0, [1.0], [1.0], [1.0]), "depth: a whole number >= 1"),
        (lambda: flows.DiagonalFlow(1.5, [1.0], [1.0], [1.0]), "depth: a whole number >= 1"),
        (lambda: flows.DiagonalFlow(2, [0.0], [1.0], [1.0]), "scale"),
        (lambda: flows.DiagonalFlow(3, [1.0], [1.0], [1.0]).transition_times(), "depth 2"),
        (lambda: flows.ReLUGateFlow([0.0, 0.0], [1.0, 0.0]), "w0"),
        (lambda: flows.ReLUGateFlow([1.0, 0.0], [1.0, 0.0], "populaton"), "did you mean 'population'"),
        (lambda: flows.ReLUGateFlow.isotropic_mean(4.0), "0..pi"),
        (lambda: flows.SoftmaxLayerFlow(np.ones((1, 3))), "K >= 2"),
        (lambda: flows.SoftmaxLayerFlow(np.ones((2, 3))).s_rel(0, np.ones(3), np.ones(3)), "class of each x"),
        (lambda: flows.SoftmaxLayerFlow(np.ones((2, 3)), definition="l1").s_rel(0, np.ones(3), np.ones(3), 0), "lr="),
        (lambda: flows.TwoLayerNTK(np.ones((2, 3)), np.ones(2), X=np.ones((4, 3)), y=np.ones(4)), "linear"),
        (lambda: flows.TwoLayerNTK(np.ones((2, 3)), np.ones(2), activation="tanh"), "activation"),
        (lambda: GOOD.weights([0.0, 2.0, 1.0]), "increasing"),
        (lambda: GOOD.weights([1.0, 1.0]), "increasing"),
        (lambda: GOOD.weights(-1.0), "at least 0"),
        (lambda: GOOD.weights(np.inf), "finite"),
        (lambda: GOOD.s_rel(0, [1.0, np.nan], [1, 1]), "finite x"),
        (lambda: GOOD.s_rel(0, [1.0, 1.0, 1.0], [1, 1]), r"x of shape"),
        (lambda: GOOD.s_rel(0, np.ones((3, 2)), np.ones((2, 2))), "broadcast"),
        (lambda: GOOD.s_rel(0, [1, 0], [1, 1], lr=0.0), "lr"),
    ],
)
def test_bad_input_is_refused(build, says):
    with pytest.raises(le.InputError, match=says):
        build()
