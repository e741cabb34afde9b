"""The single ReLU gate f(x) = max(0, w.x): S_rel jumps only when x' crosses the gate (spec srel 2.5; Lemma 4.3)."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from local_elasticity.base.checks import check_choice
from local_elasticity.base.errors import InputError
from local_elasticity.flows.base import Array, Flow, Movements, checked_array, checked_times, integrate

Kind = Literal["population", "glmtron"]
CLOSED = "the gate is closed at x (w.x <= 0): the update does not move its prediction"


class ReLUGateFlow(Flow):
    """One gate learns another, y = max(0, w*.x), from x ~ N(0, I).

    ``kind="population"``: gradient flow of L = 1/2 E (max(0, w.x) - y)^2. With R = |w*|, rho = |w|, phi their angle

        dw/dt = -[ (w - w*)/2 + (phi w* - R sin(phi) w/rho) / (2 pi) ],

    integrated to 1e-9 in the plane of w0 and w*. ``kind="glmtron"``: the same without the gate's derivative in the
    update, dw/dt = -(w - w*)/2, so w(t) = w* + e^{-t/2} (w0 - w*).

    S_rel in the limit of small steps is 1[w.x' > 0] |x.x'| / |x|^2 where w.x > 0, for both kinds. With ``lr`` it is the
    finite step w+ = w - lr r x, r = max(0, w.x) - label (GLM-tron also where the gate is closed). ``label`` is the
    teacher's, max(0, w*.x), unless given. Where the gate is closed at x, S_rel is NaN, with that reason.
    Source: spec srel 2.5; our derivation, Lemma 4.3 of the paper not seen.

    Args:
        w0: (..., p) initial weights, not 0.
        w_star: (p,) the weights to be learned, not 0.
        kind: "population" or "glmtron".
    """

    def __init__(self, w0: Any, w_star: Any, kind: Kind = "population") -> None:
        self.kind: Kind = check_choice("kind", kind, Kind)
        self.target = checked_array("w_star", w_star, ndim=1)
        self.dim = len(self.target)
        self.start = checked_array("w0", w0, self.dim)
        for name, w in (("w_star", self.target), ("w0", self.start)):
            if (np.linalg.norm(w, axis=-1) == 0).any():
                raise InputError(expected=f"{name} other than 0", got="a zero vector", do="a gate at 0 has no gradient")

    def weights(self, t: Any) -> Array:
        """W at times t: (T, ..., p)."""
        times = checked_times(t)
        if self.kind == "glmtron":
            decay = np.expand_dims(np.exp(-times / 2), tuple(range(1, self.start.ndim + 1)))
            return self._timed(t, self.target + decay * (self.start - self.target))
        size = np.linalg.norm(self.target)
        along = self.target / size
        first = self.start @ along
        rest = self.start - first[..., None] * along
        second = np.linalg.norm(rest, axis=-1)
        across = rest / np.where(second > 0, second, 1.0)[..., None]
        plane = integrate(lambda w: _population_rate(w, float(size)), np.stack([first, second]), times)
        return self._timed(t, plane[:, 0][..., None] * along + plane[:, 1][..., None] * across)

    def loss(self, t: Any) -> Array:
        """1/2 E (max(0, w.x) - max(0, w*.x))^2 = |w - w*|^2/4 + rho R (phi cos(phi) - sin(phi)) / (2 pi): (T, ...)."""
        w = self.weights(t)
        rho, size = np.linalg.norm(w, axis=-1), np.linalg.norm(self.target)
        angle = _angle(w, self.target)
        bend = rho * size * (angle * np.cos(angle) - np.sin(angle)) / (2 * np.pi)
        return np.maximum(((w - self.target) ** 2).sum(-1) / 4 + bend, 0.0)

    @staticmethod
    def isotropic_mean(angle: Any) -> Array:
        """E S_rel over directions of unit x, x' at this angle, where w.x > 0: |cos a| (1 - a/pi), for every w."""
        a = np.asarray(angle, dtype=np.float64)
        if ((a < 0) | (a > np.pi)).any():
            raise InputError(expected="angles in 0..pi", got=f"{a.min():g} to {a.max():g}", do="use radians")
        return np.abs(np.cos(a)) * (1 - a / np.pi)

    def movements(self, t: np.ndarray, x: Array, x_prime: Array, label: Array | None, lr: float | None) -> Movements:
        """Gated inner products, or the finite step's changes of f."""
        w = self.weights(t).reshape(len(t), -1, self.dim)
        at_x, at_target = w @ x.T, w @ x_prime.T
        closed = {CLOSED: at_x <= 0}
        inner, square = (x * x_prime).sum(-1), (x * x).sum(-1)
        if lr is None:
            return Movements((at_target > 0) * inner, (at_x > 0) * square, closed)
        label = np.maximum(x @ self.target, 0.0) if label is None else label
        residual = np.maximum(at_x, 0.0) - label
        if self.kind == "population":
            residual = residual * (at_x > 0)
        else:
            closed = {CLOSED: (at_x <= 0) & (at_x - lr * residual * square <= 0)}
        step = -lr * residual
        return Movements(_gate_change(at_target, step * inner), _gate_change(at_x, step * square), closed)


def _gate_change(before: Array, step: Array) -> Array:
    """max(0, before + step) - max(0, before), without cancellation where the gate stays open."""
    after = before + step
    both = (before > 0) & (after > 0)
    return np.where(both, step, np.maximum(after, 0.0) - np.maximum(before, 0.0))


def _population_rate(w: Array, size: float) -> Array:
    """dw/dt in the plane spanned by w* (first coordinate) and the rest of w0 (second), for all starts at once."""
    first, second = w.reshape(2, -1)
    rho = np.hypot(first, second)
    angle = np.arctan2(second, first)
    shrink = 0.5 - size * second / (np.where(rho > 0, rho, 1.0) ** 2 * 2 * np.pi)
    pull = size * (0.5 - angle / (2 * np.pi))
    return np.concatenate([pull - shrink * first, -shrink * second])


def _angle(w: Array, other: Array) -> Array:
    """The angle of vectors, exact for small ones too."""
    along = w @ other / np.linalg.norm(other)
    across = w - along[..., None] * other / np.linalg.norm(other)
    return np.arctan2(np.linalg.norm(across, axis=-1), along)
