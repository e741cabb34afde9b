"""The shared list of flows: one of each kind, with pairs that suit it."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from local_elasticity import flows


@dataclass
class Case:
    flow: Any
    x: np.ndarray
    x_prime: np.ndarray
    label: Any
    rate: Any  # dw/dt in words of numpy, for weights shaped as flow.start
    scalar: bool = True  # one output and no penalty: Cauchy-Schwarz holds
    linear: bool = False  # the prediction is linear in the weights: finite steps equal the limit


def case(name: str) -> Case:
    return CASES[name]()


def _pairs(rng, p, n=6):
    return rng.standard_normal((n, p)), rng.standard_normal((n, p))


def linear_regression():
    rng = np.random.default_rng(1)
    X, y, w0 = rng.standard_normal((30, 4)), rng.standard_normal(30), rng.standard_normal((3, 4))
    x, x_prime = _pairs(rng, 4)
    return Case(
        flows.LinearRegressionFlow(X, y, w0),
        x,
        x_prime,
        rng.standard_normal(6),
        lambda w: -((w @ X.T - y) @ X) / 30,
        linear=True,
    )


def ridge():
    rng = np.random.default_rng(2)
    X, y, w0 = rng.standard_normal((20, 4)), rng.standard_normal(20), rng.standard_normal((3, 4))
    x, x_prime = _pairs(rng, 4)
    return Case(
        flows.RidgeFlow(X, y, 0.3, w0),
        x,
        x_prime,
        rng.standard_normal(6),
        lambda w: -((w @ X.T - y) @ X) / 20 - 0.3 * w,
        scalar=False,
        linear=True,
    )


def ridge_classifier():
    rng = np.random.default_rng(3)
    labels = np.arange(24) % 3
    h = np.maximum(rng.standard_normal((24, 5)) + labels[:, None], 0)
    w0, theta, penalty = rng.standard_normal((2, 3, 5)), 0.7, 0.02
    one_hot, rho = np.eye(3)[labels], 24 * penalty / 3
    x, x_prime = _pairs(rng, 5)
    return Case(
        flows.RidgeClassifierFlow(h, labels, penalty, theta, w0),
        x,
        x_prime,
        np.arange(6) % 3,
        lambda w: -(theta**2) * (np.swapaxes(w @ h.T - one_hot.T, -1, -1) @ h / 24 + rho * w),
        scalar=False,
        linear=True,
    )


def diagonal(depth, target=(1.0, 0.5, 0.0, -0.4)):
    def build():
        rng = np.random.default_rng(4)
        u, s = np.array(target), np.array([1.0, 0.8, 1.2, 0.9])
        w0 = np.abs(rng.standard_normal((3, 4))) + 0.2
        w0[1, 1] *= -1
        x, x_prime = _pairs(rng, 4)
        return Case(
            flows.DiagonalFlow(depth, s, u, w0),
            x,
            x_prime,
            rng.standard_normal(6),
            lambda w: -depth * s**2 * w ** (depth - 1) * (w**depth - u),
            linear=depth == 1,
        )

    return build


def gate(kind):
    def build():
        rng = np.random.default_rng(5)
        w_star, w0 = rng.standard_normal(3), rng.standard_normal((4, 3))
        x, x_prime = _pairs(rng, 3, 8)

        def population(w):
            rho, size = np.linalg.norm(w, axis=-1, keepdims=True), np.linalg.norm(w_star)
            phi = np.arccos((w @ w_star)[..., None] / rho / size)
            return -((w - w_star) / 2 + (phi * w_star - size * np.sin(phi) * w / rho) / (2 * np.pi))

        return Case(
            flows.ReLUGateFlow(w0, w_star, kind),
            x,
            x_prime,
            None,
            population if kind == "population" else lambda w: -(w - w_star) / 2,
        )

    return build


def softmax():
    rng = np.random.default_rng(6)
    labels = np.arange(18) % 3
    h, V = rng.standard_normal((18, 4)) + labels[:, None], rng.standard_normal((2, 3, 4))
    x, x_prime = _pairs(rng, 4)

    def rate(v):
        z = np.exp(v @ h.T)
        return (np.eye(3)[labels].T - z / z.sum(-2, keepdims=True)) @ h / 18

    flow = flows.SoftmaxLayerFlow(V, h, labels, definition="l2")
    return Case(flow, x, x_prime, np.arange(6) % 3, rate, scalar=False)


def two_layer(activation, biased=True):
    def build():
        rng = np.random.default_rng(7)
        X, y = rng.standard_normal((12, 3)), rng.standard_normal(12)
        W, a, b = rng.standard_normal((2, 3, 3)), rng.standard_normal((2, 3)), rng.standard_normal((2, 3))
        x, x_prime = _pairs(rng, 3)
        data = (X, y) if activation == "linear" else (None, None)
        flow = flows.TwoLayerNTK(W, a, b if biased else None, 0.1 if biased else 0.0, activation, *data)
        if activation == "relu":
            return Case(flow, x, x_prime, None, np.zeros_like)

        def rate(w):  # one start and one sample at a time, by hand
            out = np.zeros_like(w)
            for i, row in enumerate(w):
                hidden, outer = row[:9].reshape(3, 3), row[9:12]
                for xi, yi in zip(X, y, strict=True):
                    h = hidden @ xi + (row[12:15] if biased else 0)
                    pull = (yi - outer @ h - (row[15] if biased else 0)) / 12
                    out[i, :9] += pull * np.outer(outer, xi).ravel()
                    out[i, 9:12] += pull * h
                    if biased:
                        out[i, 12:15] += pull * outer
                        out[i, 15] += pull
            return out

        return Case(flow, x, x_prime, None, rate)

    return build


CASES = {
    "linear regression": linear_regression,
    "ridge": ridge,
    "ridge classifier": ridge_classifier,
    "diagonal d=1": diagonal(1),
    "diagonal d=2": diagonal(2),
    "diagonal d=3": diagonal(3),
    "diagonal d=5": diagonal(5),
    "gate, population": gate("population"),
    "gate, GLM-tron": gate("glmtron"),
    "softmax layer": softmax,
    "two layers, ReLU": two_layer("relu"),
    "two layers, linear": two_layer("linear"),
    "two layers, linear, no biases": two_layer("linear", biased=False),
}
