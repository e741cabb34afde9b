"""Softmax regression on fixed features, f(h) = V h: S_rel in probabilities, L2 and KL (spec srel 2.6)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from local_elasticity.base.errors import InputError
from local_elasticity.flows.base import Array, Flow, Movements, checked_array, checked_times, integrate, needed
from local_elasticity.similarity.definitions import get_definition

SMALL_STEP = ("kl", "kl_reverse", "l2")


class SoftmaxLayerFlow(Flow):
    """Cross-entropy of p = softmax(V h) on features that do not move.

    With F = diag(p) - p p^T at h, F' at h', e the one-hot label of h, in the limit of small steps

        l2:              S_rel = |h.h'| |F'(p - e)| / (|h|^2 |F(p - e)|)
        kl, kl_reverse:  S_rel = (h.h')^2/|h|^4 (p - e)^T F' (p - e) / (p - e)^T F (p - e)   (eps = 0)

    As x gets fitted (1 - p_y -> 0) the denominators vanish like its square (l2) and cube (kl): means of ratios become
    heavy tailed. With ``lr`` the finite step V+ = V - lr (p - e) h^T is looked at by the library's definition of that
    name. V(t) has no closed form: it is integrated to 1e-9, from the features and labels, if they are given, and stays
    at V if not. Source: spec srel 2.6; our derivation.

    Args:
        V: (..., K, p) initial weights.
        features: (N, p) training features; none for V at one moment.
        labels: (N,) their classes 0..K-1.
        definition: "kl", "kl_reverse" or "l2"; with ``lr`` any registered definition of probabilities.
    """

    def __init__(self, V: Any, features: Any = None, labels: Any = None, definition: str = "kl") -> None:
        self.start = checked_array("V", V)
        if self.start.ndim < 2 or self.start.shape[-2] < 2:
            raise InputError(
                expected="V of shape (..., K, p) with K >= 2 classes",
                got=f"shape {self.start.shape}",
                do="one row of weights a class",
            )
        self.n_classes, self.dim = self.start.shape[-2:]
        self.definition = get_definition(definition)
        if (features is None) != (labels is None):
            raise InputError(expected="features and labels, or neither", got="one of them", do="pass both to train V")
        self.features = None if features is None else checked_array("features", features, self.dim, ndim=2)
        self.one_hot = None if self.features is None else self._one_hot(checked_array("labels", labels, ndim=1))
        if self.features is not None and self.one_hot is not None and len(self.one_hot) != len(self.features):
            raise InputError(
                expected=f"{len(self.features)} labels", got=f"{len(self.one_hot)}", do="one for each row of features"
            )

    @property
    def _starts(self) -> tuple[int, ...]:
        return self.start.shape[:-2]

    def _one_hot(self, labels: Array) -> Array:
        if (labels != np.round(labels)).any() or labels.min() < 0 or labels.max() >= self.n_classes:
            raise InputError(
                expected=f"labels in 0..{self.n_classes - 1}",
                got=f"{labels.min():g} to {labels.max():g}",
                do="pass class indices",
            )
        return np.eye(self.n_classes)[labels.astype(np.int64)]

    def weights(self, t: Any) -> Array:
        """V at times t: (T, ..., K, p)."""
        times = checked_times(t)
        features, one_hot = self.features, self.one_hot
        if features is None or one_hot is None:
            return self._timed(t, np.broadcast_to(self.start, (len(times), *self.start.shape)).copy())

        def rate(flat: Array) -> Array:
            p = _softmax(flat.reshape(self.start.shape) @ features.T)  # (..., K, N)
            return ((one_hot.T - p) @ features / len(features)).reshape(-1)

        return self._timed(t, integrate(rate, self.start, times))

    def loss(self, t: Any) -> Array:
        """Mean cross-entropy of the training features: (T, ...).

        Raises:
            InputError: when there are none.
        """
        if self.features is None or self.one_hot is None:
            raise InputError(
                expected="training features and labels", got="none", do="pass features= and labels= to have a loss"
            )
        return -(_log_softmax(self.weights(t) @ self.features.T) * self.one_hot.T).sum(-2).mean(-1)

    def movements(self, t: np.ndarray, x: Array, x_prime: Array, label: Array | None, lr: float | None) -> Movements:
        """Small-step forms of the definition, or its own two movements for the finite step."""
        one_hot = self._one_hot(needed(label, "the class of each x"))
        v = self.weights(t).reshape(len(t), -1, self.n_classes, self.dim)
        at_x, at_target = (np.swapaxes(v @ h.T, -1, -2) for h in (x, x_prime))  # (T, W, n, K)
        inner, square = (x * x_prime).sum(-1), (x * x).sum(-1)
        pull = one_hot - _softmax(at_x, -1)  # e - p
        if lr is None:
            return Movements(self._small(at_target, pull, inner), self._small(at_x, pull, square))
        rule = self.definition
        target, source = (
            self._finite(rule.numerator, at_target, lr * inner[:, None] * pull),
            self._finite(rule.denominator, at_x, lr * square[:, None] * pull) + rule.eps,
        )
        return Movements(target, source)

    def _small(self, logits: Array, pull: Array, inner: Array) -> Array:
        """The leading order of the definition for logits that move by inner * pull."""
        name = self.definition.name
        if name not in SMALL_STEP:
            raise InputError(
                expected=f"one of {', '.join(SMALL_STEP)} in the limit of small steps",
                got=repr(name),
                do="pass lr= for the finite step",
            )
        p = _softmax(logits, -1)
        tilted = p * (pull - (p * pull).sum(-1, keepdims=True))  # F pull
        if name == "l2":
            return np.abs(inner) * np.sqrt((tilted**2).sum(-1))
        centred = pull - (p * pull).sum(-1, keepdims=True)
        return inner**2 * (p * centred**2).sum(-1)  # pull^T F pull, every term at least 0

    def _finite(self, movement: Any, logits: Array, change: Array) -> Array:
        before, after = _log_softmax(logits, -1), _log_softmax(logits + change, -1)
        if self.definition.on == "log_probabilities":
            return movement(torch.from_numpy(before), torch.from_numpy(after)).numpy()
        if self.definition.on == "probabilities":
            return movement(torch.from_numpy(np.exp(before)), torch.from_numpy(np.exp(after))).numpy()
        raise InputError(
            expected="a definition of probabilities", got=repr(self.definition.name), do="use kl, kl_reverse, l2 or l1"
        )


def _log_softmax(z: Array, axis: int = -2) -> Array:
    shifted = z - z.max(axis, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis, keepdims=True))


def _softmax(z: Array, axis: int = -2) -> Array:
    return np.exp(_log_softmax(z, axis))
