"""The locally elastic stochastic differential equation (LE-SDE) as an object.

    dX_i^k = sum_l pi_l E_kl(t) H_kl Xbar^l dt + Sigma_k(t)^(1/2) dW_i^k

with E_kk = alpha(t), E_kl = beta(t), and pi_l = 1/K unless weights are given (Zhang, Wang and Su 2021,
arXiv:2110.05960). Xbar^l is the mean of class l; the noise is independent from sample to sample.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float

from local_elasticity.base.checks import check_choice, check_flag, check_probability, check_real, check_whole
from local_elasticity.errors import InputError
from local_elasticity.lesde import exact
from local_elasticity.lesde.arrays import Array, Like, is_tensor, to_numpy
from local_elasticity.lesde.drift import Modes, as_drift
from local_elasticity.lesde.noise import as_covariances, as_noise
from local_elasticity.lesde.rates import Kind, as_rate, combined

if TYPE_CHECKING:
    from local_elasticity.lesde.collapse import Collapse
    from local_elasticity.lesde.sample import Keep, Method
    from local_elasticity.lesde.separability import Gamma, Separability

ActsOn = Literal["class_mean", "own"]


class LESDE:
    """The LE-SDE of K classes and p features.

    Args:
        alpha: impact within a class: a number, a function of time, or (times, values).
        beta: impact between classes, likewise. Locally elastic means alpha > beta.
        n_classes: K, at least 2.
        drift: "isotropic" (H = I, any p), "logits" (H_kl = u_l u_l^T, p = K), or blocks H[k, l] of shape (K, K, p, p).
        sigma: standard deviation of the noise per coordinate and unit of time: a number, a function of time,
            (times, values), one a class (K,), or covariances (K, p, p). 0 is allowed.
        initial: class means (K, p) at the start, or (means, variance) for samples spread about them with this variance
            (a number, (K,), (K, p) or (K, p, p)).
        class_weights: probability of each class in an update; 1/K each by default.
        kind: how samples of alpha, beta and sigma are joined: "linear", or "step" (values[i] holds over
            (times[i-1], times[i]], as in the authors' Euler recursion).
        acts_on: "class_mean": the drift is that of the class means. "own": of each sample's own vector, the i-th
            samples of all classes stacked; then noise within classes grows like the signal, and classes need not
            separate.
        start: the time of ``initial``.

    Attributes:
        alpha, beta: the rates, callable.
        n_classes, n_features: K and p.
        means: (K, p) initial class means, as float64.

    Arrays are returned in the kind of ``initial``: NumPy, or torch on its device and in its dtype. Computations are in
    float64.

    Raises:
        InputError: for K = 1, p ≠ K with the logits drift, negative variances, or numbers that are not finite.
    """

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

    def with_label_noise(self, p: float) -> LESDE:
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

    def _changed(self, **changes: Any) -> LESDE:
        other = object.__new__(LESDE)
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

    # --- the exact law -------------------------------------------------------------------------------------------

    def mean(self, t: Any, *, log: bool = False) -> Any:
        """Expected class means at any times, (T, K, p): the solution of the LE-ODE.

        Closed forms for "isotropic" and "logits"; the moment equation is integrated (relative error 1e-10) for other
        drifts.

        Args:
            t: times, in any order.
            log: return (sign, log of the magnitude), which cannot overflow.

        Raises:
            InputError: for times before the start or beyond the samples of alpha and beta, or numbers beyond float64.
        """
        check_flag("log", log)
        times, like = self._times(t)
        found = exact.mean(self, times)
        if log:
            sign, magnitude = found.logarithmic()
            return like(sign), like(magnitude)
        return like(found.plain("class means"))

    def covariance(self, t: Any, n: int, *, log: bool = False) -> Any:
        """Covariance of the means of n samples a class, (T, K p, K p), class-major.

        C' = M C + C M^T + Sigma / n from the initial variance over n.

        Args:
            t: times, in any order.
            n: samples a class.
            log: return (sign, log of the magnitude).

        Raises:
            InputError: as `mean` does.
        """
        check_flag("log", log)
        times, like = self._times(t)
        check_whole("n", n)
        found = exact.covariance(self, times, n)
        if log:
            sign, magnitude = found.logarithmic()
            return like(sign), like(magnitude)
        return like(found.plain("covariances"))

    def within_variance(self, t: Any) -> Array:
        """Variance of a sample about the mean of infinitely many of its class, (T, K, p).

        v0 + integral of sigma^2 where the drift is that of the class means; about the mean of n samples it is
        (1 - 1/n) times this.

        Args:
            t: times, in any order.
        """
        times, like = self._times(t)
        if self.acts_on == "own":
            found = exact.covariance(self, times, 1).plain("variances")
            return like(np.einsum("tii->ti", found).reshape(times.size, *self.means.shape))
        spent = exact.spent_noise(self, times)
        diagonal = [np.einsum("kpp->kp", part) for part in (self.initial_covariance, self.noise.shape)]
        return like(diagonal[0] + spent[:, None, None] * diagonal[1])

    # --- paths ---------------------------------------------------------------------------------------------------

    def sample(
        self,
        t: Any,
        n_per_class: int,
        n_paths: int,
        seed: Any,
        *,
        method: Method = "exact",
        keep: Keep | None = None,
        step: float | None = None,
        velocity: Any = None,
        starts: Any = None,
        dtype: str | None = None,
        device: Any = None,
        out: Any = None,
        progress: bool = False,
    ) -> Any:
        """Draw paths of n samples a class: clouds (paths, T, K, n, p), class means (paths, T, K, p), or statistics.

        Args:
            t: save points, increasing.
            n_per_class: samples a class, n.
            n_paths: independent paths.
            seed: a seed, a torch generator, or a NumPy generator.
            method: "exact" (from the exact law, no step size), "discrete" (class and sample drawn at every step, as
                the model is defined), "euler-maruyama", or "published" (the authors' recursion of class means with
                h = 1 and no noise but that of the starts; ``n_per_class`` is not used, and each path starts from
                ``initial`` with its whole variance).
            keep: "clouds", "means" or "statistics" (class means and covariances within, see `Statistics`).
            step: step size of "discrete" (1 by default) and "euler-maruyama" (a thousandth of the span).
            velocity: for "euler-maruyama", a function of (t, class means (paths, K, p) as a tensor) that replaces the
                drift.
            starts: for "published", the starts (paths, K, p).
            dtype: "float32" or "float64"; that of ``initial`` by default.
            device: where to draw; results are then torch tensors.
            out: for "published", an array to write into.
            progress: show a bar, with an estimate first.

        Returns:
            An array of the kind of ``initial``, or `Statistics`.

        Raises:
            InputError: for save points that do not increase, or options that do not go together.
        """
        from local_elasticity.lesde.sample import sample

        return sample(
            self,
            t,
            n_per_class,
            n_paths,
            seed,
            method=method,
            keep=keep,
            step=step,
            velocity=velocity,
            starts=starts,
            dtype=dtype,
            device=device,
            out=out,
            progress=progress,
        )

    def published_moments(self, t: Any) -> tuple[Array, Array]:
        """Mean and standard deviation (T, K, K) of method "published" over its starts, exactly and without trials.

        Args:
            t: every step, start + arange(T).
        """
        from local_elasticity.lesde.sample import published_moments

        return published_moments(self, t)

    # --- what follows from it --------------------------------------------------------------------------------------

    def separability(
        self,
        t: Any,
        n_per_class: int = 50,
        n_paths: int = 100,
        seed: Any = 0,
        *,
        gamma: Gamma = "gap",
        confidence: float = 0.95,
        progress: bool = False,
    ) -> Separability:
        """Probability over paths that classes are linearly separable at ``t``, with the theory beside it.

        Args:
            t: times, in any order; clouds are drawn from their law at each, so any time costs the same.
            n_per_class: samples a class.
            n_paths: independent clouds at each time.
            seed: a seed or a NumPy generator.
            gamma: which gap the theory uses: "gap" or "lambda_min".
            confidence: of the binomial (Clopper–Pearson) interval.
            progress: show a bar.

        Raises:
            InputError: for blocks H that are not positive semi-definite, which the theorem needs.
        """
        from local_elasticity.lesde.separability import separability

        return separability(self, t, n_per_class, n_paths, seed, gamma=gamma, confidence=confidence, progress=progress)

    def collapse(self, t: Any) -> Collapse:
        """Neural collapse of the expected class means at ``t``, the predicted rate, and whether it can happen at all.

        Args:
            t: times, in any order.
        """
        from local_elasticity.lesde.collapse import collapse

        return collapse(self, t)


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


def _at_least(what: str, value: int, least: int) -> None:
    if int(value) != value or value < least:
        raise InputError(expected=f"{what}: a whole number >= {least}", got=f"{value}", do="raise it")
