"""The locally elastic stochastic differential equation (LE-SDE) as an object: the equation, and what follows."""

from __future__ import annotations

from typing import Any

import numpy as np

from local_elasticity.base.checks import check_flag, check_whole
from local_elasticity.lesde import exact
from local_elasticity.lesde.arrays import Array
from local_elasticity.lesde.collapse import Collapse, collapse
from local_elasticity.lesde.equation import Equation
from local_elasticity.lesde.sample import Keep, Method, published_moments, sample
from local_elasticity.lesde.separability import Gamma, Separability, separability


class LESDE(Equation):
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
        return separability(self, t, n_per_class, n_paths, seed, gamma=gamma, confidence=confidence, progress=progress)

    def collapse(self, t: Any) -> Collapse:
        """Neural collapse of the expected class means at ``t``, the predicted rate, and whether it can happen at all.

        Args:
            t: times, in any order.
        """
        return collapse(self, t)
