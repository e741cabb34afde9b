"""Diagonal d-homogeneous predictor f(x) = <w^d, x>: closed for d = 1, 2, implicit for d >= 3 (spec srel 2.4)."""

from __future__ import annotations

from typing import Any

import numpy as np

from local_elasticity.base.checks import check_whole
from local_elasticity.base.errors import InputError
from local_elasticity.flows.base import Array, Flow, Movements, checked_array, checked_times, needed
from local_elasticity.flows.implicit import magnitude


class DiagonalFlow(Flow):
    """f_w(x) = sum_j w_j^d x_j, trained on L = 1/2 E (f(x) - <u, x>)^2 with E x x^T = diag(s_j^2).

    dw_j/dt = -d s_j^2 w_j^{d-1} (w_j^d - u_j), each coordinate by itself; with v = w^d:

        d = 1: v = u + (v0 - u) e^{-s^2 t}
        d = 2: v = v0 / (e^{-a} + v0 (1 - e^{-a}) / u), a = 4 s^2 u t, also in its limit u = 0 and for u < 0
        d >= 3: s^2 t = -(1/d) int_{w0}^{w} dy / (y^{d-1} (y^d - u)), solved for w; closed for u = 0

        S_rel(t) = |sum_j x_j x'_j w_j^{2d-2}| / sum_j x_j^2 w_j^{2d-2}    (limit of small steps)

    so S_rel depends on w/|w| only and is constant for d = 1. With w0 = alpha for all j, coordinate j of d = 2 grows at
    about ``transition_times``: elastic before, inelastic after the last of them. With ``lr`` the update is the finite
    step on 1/2 (f(x) - label)^2. Hypothesis: diagonal second moment, noise-free targets. Source: spec srel 2.4, which
    stands in for the paper's Thms 5.1-5.3; our derivation.

    Args:
        depth: d, a whole number of at least 1.
        scale: (p,) s_j > 0, root mean square of coordinate j of x.
        target: (p,) u_j, the predictor <u, x> to be learned.
        w0: (..., p) initial weights; a weight of 0 stays 0 for d >= 2.
    """

    def __init__(self, depth: int, scale: Any, target: Any, w0: Any) -> None:
        self.depth = check_whole("depth", depth)
        self.scale = checked_array("scale", scale, ndim=1)
        self.dim = len(self.scale)
        if (self.scale <= 0).any():
            raise InputError(
                expected="scale > 0", got=f"minimum {self.scale.min():g}", do="drop coordinates that are always 0"
            )
        self.target = checked_array("target", target, self.dim, ndim=1)
        self.start = checked_array("w0", w0, self.dim)

    def weights(self, t: Any) -> Array:
        """W at times t: (T, ..., p)."""
        times = np.expand_dims(checked_times(t), tuple(range(1, self.start.ndim + 1)))
        if self.depth == 1:
            decay = np.exp(-(self.scale**2) * times)
            return self._timed(t, self.target + (self.start - self.target) * decay)
        sign = np.sign(self.start)
        pull = self.target * (sign if self.depth % 2 else 1.0)  # what |w|^d is drawn to
        size = magnitude(self.depth, self.depth * self.scale**2 * times, pull, np.abs(self.start))
        return self._timed(t, sign * size)

    def loss(self, t: Any) -> Array:
        """1/2 sum_j s_j^2 (w_j^d - u_j)^2: (T, ...)."""
        return 0.5 * (self.scale**2 * (self.weights(t) ** self.depth - self.target) ** 2).sum(-1)

    def transition_times(self) -> Array:
        """When each coordinate of d = 2 has grown half way: log(u_j / w0_j^2) / (4 s_j^2 u_j), (..., p).

        NaN for a coordinate with nothing to grow to (u_j <= w0_j^2).

        Raises:
            InputError: for another depth.
        """
        if self.depth != 2:
            raise InputError(
                expected="depth 2", got=f"depth {self.depth}", do="read the time off weights(t): there is no formula"
            )
        v0 = self.start**2
        grows = (self.target > v0) & (v0 > 0)
        ratio = np.where(grows, self.target / np.where(v0 > 0, v0, 1.0), np.nan)
        # v = u / (1 + (u/v0 - 1) e^{-4 s^2 u t}) is u/2 where the exponential is 1 / (u/v0 - 1); 1 is small beside u/v0
        return np.log(ratio) / (4 * self.scale**2 * np.where(grows, self.target, 1.0))

    def movements(self, t: np.ndarray, x: Array, x_prime: Array, label: Array | None, lr: float | None) -> Movements:
        """Kernel values with w scaled to largest size 1, or the finite step's changes of f."""
        w = self.weights(t).reshape(len(t), -1, self.dim)
        if lr is not None:
            return self._finite(w, x, x_prime, needed(label, "y of each x"), lr)
        largest = np.abs(w).max(-1, keepdims=True)
        with np.errstate(invalid="ignore"):
            gains = np.where(largest > 0, w / np.where(largest > 0, largest, 1.0), 0.0) ** (2 * self.depth - 2)
        dead = np.broadcast_to(largest == 0, (*w.shape[:2], len(x))) & (self.depth > 1)
        return Movements(
            gains @ (x * x_prime).T, gains @ (x * x).T, {"all weights are 0, where every gradient vanishes": dead}
        )

    def _finite(self, w: Array, x: Array, x_prime: Array, label: Array, lr: float) -> Movements:
        d, w = self.depth, w[:, :, None, :]
        residual = (w**d * x).sum(-1) - label
        step = -lr * residual[..., None] * d * w ** (d - 1) * x
        # (w + step)^d - w^d with step factored out: nothing cancels
        change = step * sum((w + step) ** k * w ** (d - 1 - k) for k in range(d))
        fitted = {"x is fitted exactly: there is no step": residual == 0}
        return Movements((change * x_prime).sum(-1), (change * x).sum(-1), fitted)
