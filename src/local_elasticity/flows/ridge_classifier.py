"""One-hot ridge classification on fixed features, the paper's penalised linear regression (Thm 3.2; spec srel 2.3)."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from local_elasticity.base.checks import check_flag, check_real
from local_elasticity.base.errors import InputError
from local_elasticity.flows.base import Array, Flow, Movements, checked_array, needed
from local_elasticity.flows.linear import checked_penalty
from local_elasticity.flows.quadratic import QuadraticFlow


class RidgeClassifierFlow(Flow):
    """Least squares to one-hot labels on features h, per-sample loss 1/2 |e_k - W h|^2 + (rho/2) |W|^2.

    rho = N penalty / K, N samples, K classes. The flow is dw_c/dt = -theta^2 (M w_c - a_c) with
    M = rho I + (1/N) sum h h^T and a_c = (1/N) sum of the features of class c, so
    w_c(t) = e^{-theta^2 t M} (w_c(0) - M^{-1} a_c) + M^{-1} a_c, and with x = h of class k and x' = h'

        S_rel(t) = |(W h - e_k) h.h' + rho W h'| / |(W h - e_k) |h|^2 + rho W h|   (norms over the K outputs),

    for steps of any size. Hypothesis: features do not move; classes need not be of equal size (N/K is their mean size).
    Source: eq. (8) of the paper as far as its code shows it; that S_rel(h, h) = 1 needs a numerator without 1/N is our
    derivation, equal to finite steps.

    Args:
        features: (N, p) features, samples in rows.
        labels: (N,) classes 0..K-1.
        penalty: at least 0.
        theta: only theta^2 enters, as a time scale.
        w0: (..., K, p) initial weights; zeros by default.
        published: S_rel and loss as the published code computed them: h h^T / N for h h^T in the numerator, and a loss
            whose labels were lost in a broadcast (each one-hot entry against each output) and whose penalty is
            penalty / (2K). Weights are the same.

    Raises:
        InputError: for a singular M, a class without samples, or labels that are not classes.
    """

    def __init__(
        self,
        features: Any,
        labels: Any,
        penalty: float,
        theta: float = 1.0,
        w0: Any = None,
        published: bool = False,
    ) -> None:
        self.features = checked_array("features", features, ndim=2)
        self.n_samples, self.dim = self.features.shape
        self.labels = _checked_classes(labels, self.n_samples)
        self.n_classes = int(self.labels.max()) + 1
        counts = np.bincount(self.labels, minlength=self.n_classes)
        if (counts == 0).any():
            raise InputError(
                expected=f"samples of every class 0..{self.n_classes - 1}",
                got=f"none of class {int(counts.argmin())}",
                do="relabel the classes without gaps",
            )
        if check_real("theta", theta) == 0:
            raise InputError(expected="theta other than 0", got=repr(theta), do="use theta=1.0 for plain gradient flow")
        self.penalty, self.theta = checked_penalty(penalty), float(theta)
        self.published = check_flag("published", published)
        self.rho = self.n_samples * self.penalty / self.n_classes
        shape = (self.n_classes, self.dim)
        self.start = self._checked_start(np.zeros(shape) if w0 is None else w0)
        one_hot = np.eye(self.n_classes)[self.labels]
        self.second_moment = self.features.T @ self.features / self.n_samples
        self.class_sums = one_hot.T @ self.features / self.n_samples  # a_c, (K, p)
        matrix = self.theta**2 * (self.second_moment + self.rho * np.eye(self.dim))
        self.quadratic = QuadraticFlow(matrix, self.theta**2 * self.class_sums, self.start)

    def restarted(self, w0: Any) -> RidgeClassifierFlow:
        """The same flow from other initial weights (..., K, p), without decomposing M again."""
        other = copy.copy(self)
        other.start = self._checked_start(w0)
        other.quadratic = self.quadratic.restarted(other.start)
        return other

    def _checked_start(self, w0: Any) -> Array:
        shape, start = (self.n_classes, self.dim), checked_array("w0", w0, self.dim)
        if start.ndim < 2 or start.shape[-2:] != shape:
            raise InputError(
                expected=f"w0 of shape (..., {shape[0]}, {shape[1]})",
                got=f"shape {start.shape}",
                do="one row of weights a class, last",
            )
        return start

    @property
    def _starts(self) -> tuple[int, ...]:
        return self.start.shape[:-2]

    def weights(self, t: Any) -> Array:
        """W at times t: (T, ..., K, p)."""
        return self._timed(t, self.quadratic.weights(t))

    def loss(self, t: Any) -> Array:
        """Mean over the samples of the per-sample loss, or with ``published`` what the code computed: (T, ...).

        Published: 1/(2N) sum_n sum_i sum_j (e_j - (W h_n)_i)^2 + penalty/(2K) |W|^2, which knows no labels.
        """
        w = self.quadratic.weights(t)
        own = np.einsum("...kp,pq,...kq->...", w, self.second_moment, w, optimize=True)
        square = (w**2).sum((-2, -1))
        if self.published:
            pulled = (w @ self.class_sums.sum(0)).sum(-1)
            fit = 0.5 * (self.n_classes - 2 * pulled + self.n_classes * own)
            return self._timed(t, fit + self.penalty / (2 * self.n_classes) * square)
        pulled = (w * self.class_sums).sum((-2, -1))
        return self._timed(t, 0.5 * (1 - 2 * pulled + own) + 0.5 * self.rho * square)

    def movements(self, t: np.ndarray, x: Array, x_prime: Array, label: Array | None, lr: float | None) -> Movements:
        """Norms over the outputs of (W h - e_k) h.h' + rho W h' and (W h - e_k) |h|^2 + rho W h."""
        classes = needed(label, "the class of each x")
        if (classes != np.round(classes)).any() or classes.min() < 0 or classes.max() >= self.n_classes:
            raise InputError(
                expected=f"labels in 0..{self.n_classes - 1}",
                got=f"{classes.min():g} to {classes.max():g}",
                do="pass the class of each x",
            )
        one_hot = np.eye(self.n_classes)[classes.astype(np.int64)].T  # (K, n)
        at_x, at_target = (
            self.quadratic.project(t, v).reshape(len(t), -1, self.n_classes, len(v)) for v in (x, x_prime)
        )
        inner, square = (x * x_prime).sum(-1), (x * x).sum(-1)
        seen = at_x / self.n_samples if self.published else at_x
        target = _norm((seen - one_hot) * inner + self.rho * at_target)
        return Movements(target, _norm((at_x - one_hot) * square + self.rho * at_x))


def _norm(x: Array) -> Array:
    return np.sqrt((x * x).sum(2))


def _checked_classes(labels: Any, n_samples: int) -> np.ndarray:
    classes = checked_array("labels", labels, ndim=1)
    if len(classes) != n_samples or (classes != np.round(classes)).any() or classes.min() < 0:
        raise InputError(
            expected=f"{n_samples} labels, classes 0, 1, ...",
            got=f"{len(classes)} from {classes.min():g} to {classes.max():g}",
            do="pass one class index for each row of features",
        )
    return classes.astype(np.int64)
