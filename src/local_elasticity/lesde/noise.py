"""The noise of the LE-SDE: Sigma_k(t) = q(t) S_k, a variance in time and a covariance per class."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float

from local_elasticity.base.errors import InputError
from local_elasticity.lesde.arrays import to_numpy
from local_elasticity.lesde.rates import Kind, Rate, as_rate

Blocks = Float[np.ndarray, "k p p"]


@dataclass(frozen=True, eq=False)
class Noise:
    """Sigma_k(t) = variance(t) · shape[k].

    Attributes:
        variance: q(t).
        shape: S_k, (K, p, p).
        common: every S_k is the identity.
    """

    variance: Rate
    shape: Blocks
    common: bool

    @cached_property
    def root(self) -> Blocks:
        """A matrix square root of each S_k."""
        return root(self.shape)


def as_noise(sigma: Any, n_classes: int, n_features: int, kind: Kind = "linear") -> Noise:
    """Read sigma: a number, a function of time, (times, values), (K,) standard deviations or (K, p, p) covariances.

    Raises:
        InputError: for a negative standard deviation, or covariances that are none.
    """
    identity = np.broadcast_to(np.eye(n_features), (n_classes, n_features, n_features))
    one = as_rate(1.0, "sigma")
    if not (callable(sigma) or isinstance(sigma, tuple | Rate)):
        array = to_numpy(sigma, "sigma").astype(np.float64)
        if array.ndim:
            what = "sigma as a number, a function of time, (K,) standard deviations or (K, p, p) covariances"
            return Noise(one, as_covariances(array, n_classes, n_features, what, squared=array.ndim == 1), False)
    rate = as_rate(sigma, "sigma", kind)

    def variance(t: np.ndarray) -> np.ndarray:
        values = rate(t)
        if (values < 0).any():
            raise InputError(
                expected="sigma (a standard deviation) of at least 0",
                got=f"{values.min():g} at t = {t[values < 0].flat[0]:g}",
                do="pass its absolute value",
            )
        return values**2

    variance(np.array([max(rate.begin, 0.0) if np.isfinite(rate.begin) else 0.0]))
    if rate.knots.size:
        variance(rate.knots)
    return Noise(Rate("sigma", variance, rate.knots, rate.begin, rate.end, rate.polynomial), identity, True)


def as_covariances(values: np.ndarray, n_classes: int, n_features: int, what: str, *, squared: bool = False) -> Blocks:
    """Read a variance, one a class, one a class and feature, or full covariances, as (K, p, p).

    Args:
        values: (), (K,), (K, p) or (K, p, p).
        n_classes: K.
        n_features: p.
        what: what errors say was expected.
        squared: the values are standard deviations.

    Raises:
        InputError: for another shape, a negative variance, or a matrix that is no covariance.
    """
    k, p = n_classes, n_features
    if values.shape not in ((), (k,), (k, p), (k, p, p)):
        raise InputError(
            expected=what, got=f"shape {values.shape} with K = {k}, p = {p}", do="pass one of these shapes"
        )
    if not np.isfinite(values).all():
        raise InputError(expected=what, got="NaN or infinity", do="pass finite numbers")
    if values.ndim < 3:
        if (values < 0).any():
            raise InputError(
                expected=f"{what}, none negative", got=f"{values.min():g}", do="pass numbers of at least 0"
            )
        values = values**2 if squared else values
        rows = np.broadcast_to(values if values.ndim == 2 else np.atleast_1d(values)[:, None], (k, p))
        return rows[:, :, None] * np.eye(p)
    symmetric = np.abs(values - values.transpose(0, 2, 1)).max() <= 1e-9 * max(np.abs(values).max(), 1e-300)
    lowest = np.linalg.eigvalsh(values).min() if symmetric else np.nan
    if not (symmetric and lowest >= -1e-9 * np.abs(values).max()):
        raise InputError(
            expected=f"{what}: symmetric and positive semi-definite",
            got=f"smallest eigenvalue {lowest:g}" if symmetric else "matrices that are not symmetric",
            do="pass covariances (variances, not standard deviations, on the diagonal)",
        )
    return values


def root(covariances: Float[np.ndarray, "... d d"]) -> Float[np.ndarray, "... d d"]:
    """A matrix R with R R^T = C for each covariance, also a singular one: Cholesky's where it exists."""
    try:
        return np.linalg.cholesky(covariances)
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(covariances)
        return vectors * np.sqrt(values.clip(min=0))[..., None, :]
