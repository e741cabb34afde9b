"""Linear regression and ridge regression: f(x) = w.x, with w(t) and S_rel(t) in closed form (spec srel 2.1, 2.2)."""

from __future__ import annotations

from typing import Any

import numpy as np

from local_elasticity.base.checks import check_rate
from local_elasticity.base.errors import InputError
from local_elasticity.flows.base import Array, Flow, Movements, checked_array, needed
from local_elasticity.flows.quadratic import QuadraticFlow


class RidgeFlow(Flow):
    """Ridge regression, L = 1/(2n) sum (w.x_i - y_i)^2 + (penalty/2) |w|^2, under gradient flow.

    With H = X^T X / n + penalty I and b = X^T y / n:
    w(t) = e^{-Ht} (w0 - H^{-1} b) + H^{-1} b. The update at (x, y) is on 1/2 (w.x - y)^2 + (penalty/2) |w|^2, so with
    r = w(t).x - y

        S_rel(t) = |r x.x' + penalty w(t).x'| / |r |x|^2 + penalty w(t).x|,

    for steps of any size: the prediction is linear in w. Source: spec srel 2.2; our derivation, not the
    paper's wording.

    Args:
        X: (n, p) inputs, samples in rows.
        y: (n,) labels.
        penalty: at least 0.
        w0: (..., p) initial weights.

    Raises:
        InputError: for a singular H (a penalty of 0 and dependent columns, or fewer samples than columns).
    """

    def __init__(self, X: Any, y: Any, penalty: float, w0: Any) -> None:
        self.inputs, self.labels = checked_array("X", X, ndim=2), checked_array("y", y, ndim=1)
        if len(self.labels) != len(self.inputs):
            raise InputError(
                expected=f"one label for each of the {len(self.inputs)} rows of X",
                got=f"{len(self.labels)}",
                do="pass X (n, p) and y (n,)",
            )
        self.penalty = checked_penalty(penalty)
        n, self.dim = self.inputs.shape
        self.start = checked_array("w0", w0, self.dim)
        moments = self.inputs.T @ self.inputs / n + self.penalty * np.eye(self.dim)
        self.quadratic = QuadraticFlow(moments, self.inputs.T @ self.labels / n, self.start)

    def weights(self, t: Any) -> Array:
        """W at times t: (T, ..., p)."""
        return self._timed(t, self.quadratic.weights(t))

    def loss(self, t: Any) -> Array:
        """1/(2n) sum (w.x_i - y_i)^2 + (penalty/2) |w|^2: (T, ...)."""
        w = self.quadratic.weights(t)
        residuals = w @ self.inputs.T - self.labels
        return self._timed(t, 0.5 * (residuals**2).mean(-1) + 0.5 * self.penalty * (w**2).sum(-1))

    def movements(self, t: np.ndarray, x: Array, x_prime: Array, label: Array | None, lr: float | None) -> Movements:
        """R x.x' + penalty w.x' and r |x|^2 + penalty w.x."""
        label = needed(label, "y of each x")
        at_x, at_target = (self._starts_in_a_row(self.quadratic.project(t, v)) for v in (x, x_prime))
        residual = at_x - label
        inner, square = (x * x_prime).sum(-1), (x * x).sum(-1)
        return Movements(residual * inner + self.penalty * at_target, residual * square + self.penalty * at_x)

    def _starts_in_a_row(self, projected: Array) -> Array:
        return projected.reshape(len(projected), -1, projected.shape[-1])


class LinearRegressionFlow(RidgeFlow):
    """Linear regression, L = 1/(2n) sum (w.x_i - y_i)^2, under gradient flow: no elasticity at all.

    S_rel = |x.x'| / |x|^2, whatever w, t, the label and the size of the step: w(t) moves, S_rel does not. Where a
    label is given and x is fitted to it exactly there is no step, and S_rel is undefined.
    Source: spec srel 2.1; our derivation, not the paper's wording.

    Args:
        X: (n, p) inputs, samples in rows.
        y: (n,) labels.
        w0: (..., p) initial weights.

    Raises:
        InputError: for a singular X^T X.
    """

    def __init__(self, X: Any, y: Any, w0: Any) -> None:
        super().__init__(X, y, 0.0, w0)

    def movements(self, t: np.ndarray, x: Array, x_prime: Array, label: Array | None, lr: float | None) -> Movements:
        """x.x' and |x|^2; the residual cancels."""
        shape = (len(t), int(np.prod(self._starts)), len(x))
        target, source = (np.broadcast_to(v.sum(-1), shape) for v in (x * x_prime, x * x))
        if label is None:
            return Movements(target, source)
        fitted = self._starts_in_a_row(self.quadratic.project(t, x)) == label
        return Movements(target, source, {"x is fitted exactly: there is no step": fitted})


def checked_penalty(penalty: float) -> float:
    """A finite penalty of at least 0."""
    return check_rate("penalty", penalty)
