"""The equation of the LE-SDE: rates, drift, noise, start; what is computed from it are functions on it.

    dX_i^k = sum_l pi_l E_kl(t) H_kl Xbar^l dt + Sigma_k(t)^(1/2) dW_i^k

with E_kk = alpha(t), E_kl = beta(t), and pi_l = 1/K unless weights are given (Zhang, Wang and Su 2021,
arXiv:2110.05960). Xbar^l is the mean of class l; the noise is independent from sample to sample.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, Literal, Self

import numpy as np
from jaxtyping import Float

from local_elasticity.base.checks import check_choice, check_probability, check_real, check_whole
from local_elasticity.base.errors import InputError
from local_elasticity.lesde.arrays import Array, Like, is_tensor, to_numpy
from local_elasticity.lesde.drift import Modes, as_drift
from local_elasticity.lesde.noise import as_covariances, as_noise
from local_elasticity.lesde.rates import Kind, as_rate, combined

ActsOn = Literal["class_mean", "own"]


class Equation:
    """Rates, drift, noise and start of K classes and p features; see `LESDE`."""

    def __init__(
        self,
        alpha: Any,
        beta: Any,
        n_classes: int,
        drift: Any,
        sigma: Any,
        initial: Any,
        class_weights: Any = None,
        *,
        kind: Kind = "linear",
        acts_on: ActsOn = "class_mean",
        start: float = 0.0,
    ) -> None:
        self.n_classes = k = check_whole("n_classes", n_classes, 2)
        self.kind: Kind = check_choice("kind", kind, Kind)
        self.acts_on: ActsOn = check_choice("acts_on", acts_on, ActsOn)
        self.start = check_real("start", start)
        self.alpha, self.beta = as_rate(alpha, "alpha", kind), as_rate(beta, "beta", kind)
        means, variance = _initial(initial)
        self.like = Like.of(means)
        self.means = to_numpy(means, "initial").astype(np.float64)
        if self.means.ndim != 2 or len(self.means) != k or self.means.shape[1] == 0:
            raise InputError(
                expected=f"initial class means of shape (K, p) = ({k}, p)",
                got=f"shape {self.means.shape}",
                do="pass one mean a class, or (means, variance)",
            )
        if not np.isfinite(self.means).all():
            raise InputError(expected="finite initial class means", got="NaN or infinity", do="check them")
        self.n_features = p = self.means.shape[1]
        self.initial_covariance = as_covariances(
            to_numpy(variance, "initial variance").astype(np.float64),
            k,
            p,
            "an initial variance: a number, (K,), (K, p) or (K, p, p)",
        )
        self.drift = as_drift(drift, k, p)
        self.noise = as_noise(sigma, k, p, kind)
        for rate in (self.alpha, self.beta):  # tried once: a function may raise, or give no number
            rate(np.array([max(self.start, rate.begin)]))
        self.weights = _weights(class_weights, k)

    # --- the equation --------------------------------------------------------------------------------------------

    @property
    def modes(self) -> Modes | None:
        """The closed form; None where there is none (own blocks, or classes drawn with different weights)."""
        return self.drift.modes if np.allclose(self.weights, 1 / self.n_classes, rtol=0, atol=1e-15) else None

    @cached_property
    def drift_matrices(self) -> tuple[Float[np.ndarray, "kp kp"], Float[np.ndarray, "kp kp"]]:
        """The two constant matrices of M(t) = alpha(t) M_a + beta(t) M_b."""
        k, p = self.means.shape
        weighted = self.drift.blocks * self.weights[None, :, None, None]
        same = np.eye(k)[:, :, None, None]
        dense = [(weighted * part).transpose(0, 2, 1, 3).reshape(k * p, k * p) for part in (same, 1 - same)]
        return dense[0], dense[1]

    def impact_matrix(self, t: Any) -> Array:
        """E(t), (T, K, K): alpha on the diagonal, beta elsewhere."""
        times, like = self._times(t)
        same = np.eye(self.n_classes)
        return like(self.alpha(times)[:, None, None] * same + self.beta(times)[:, None, None] * (1 - same))

    def with_label_noise(self, p: float) -> Self:
        """The model when each label is, with probability p, one of the other classes (uniformly): E → T E T^T.

        T = (1 - p - p/(K-1)) I + p/(K-1) J, so alpha - beta shrinks by (1 - p K/(K-1))^2 and alpha + (K-1) beta stays.
        At p = (K-1)/K labels carry no information and alpha = beta. Start and noise are kept.

        Raises:
            InputError: unless 0 <= p <= 1.
        """
        p = check_probability("p", p)
        k = self.n_classes
        shrink = (1 - p * k / (k - 1)) ** 2
        own, other = (1 + (k - 1) * shrink) / k, (k - 1) * (1 - shrink) / k
        return self._changed(
            alpha=combined("alpha", (own, self.alpha), (other, self.beta)),
            beta=combined("beta", ((1 - shrink) / k, self.alpha), ((k - 1 + shrink) / k, self.beta)),
        )

    def _changed(self, **changes: Any) -> Self:
        other = object.__new__(type(self))
        other.__dict__.update({name: value for name, value in self.__dict__.items() if name != "drift_matrices"})
        other.__dict__.update(changes)
        return other

    def _times(self, t: Any) -> tuple[Float[np.ndarray, " times"], Like]:
        """Times as an array, and the kind in which to answer."""
        times = np.atleast_1d(to_numpy(t, "t").astype(np.float64))
        if times.ndim != 1 or times.size == 0 or not np.isfinite(times).all() or times.min() < self.start:
            raise InputError(
                expected=f"a series of finite times from {self.start:g} on",
                got=f"shape {times.shape}, smallest {times.min() if times.size else 'none'}",
                do="pass a number or a one-dimensional array",
            )
        like = Like.of(t) if is_tensor(t) and self.like.device is None else self.like
        return times, like


def _initial(initial: Any) -> tuple[Any, Any]:
    if isinstance(initial, tuple) and len(initial) == 2 and np.ndim(initial[0]) == 2:
        return initial
    return initial, 0.0


def _weights(class_weights: Any, n_classes: int) -> Float[np.ndarray, " k"]:
    if class_weights is None:
        return np.full(n_classes, 1 / n_classes)
    weights = to_numpy(class_weights, "class_weights").astype(np.float64)
    if weights.shape != (n_classes,) or not (weights >= 0).all() or not np.isclose(weights.sum(), 1, atol=1e-6):
        raise InputError(
            expected=f"{n_classes} class probabilities that sum to 1", got=f"{weights}", do="divide counts by their sum"
        )
    return weights / weights.sum()
