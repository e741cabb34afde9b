"""The modes of the two models, by which A and B are read off the class means (spec lesde 2.1, 3.3).

Each model has two modes that grow as e^(L/K): the one of the gap, with L = A - B, and another. Their amplitudes are
linear in the class means, so that noise averages out before any logarithm is taken. Both estimators of a model, as
defined and as published, stand here in one registry.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from local_elasticity.base.errors import InputError, nearest
from local_elasticity.lesde import published

Features = Float[np.ndarray, "*b T K F"]
Series = Float[np.ndarray, "*b T"]
Vectors = Float[np.ndarray, "*b T d"]
_SMALL = 64  # numbers of a step's class means


@dataclass(frozen=True)
class Estimator:
    """How A and B of a model are read off class means.

    Attributes:
        of_cells: features (..., K, F) of class means (..., K, p), linear in them.
        of_samples: the same of outputs (..., p) of samples of the classes (...).
        modes: from features the vectors of the gap's mode and of the other.
        mode_names: what the two are.
        rates: from features, and those at the baseline, A and B.
        combine: from the two modes' exponents L and K, A and B.
        split: from A, B and K, the two exponents.
    """

    of_cells: Callable[[np.ndarray], np.ndarray]
    of_samples: Callable[[np.ndarray, np.ndarray], np.ndarray]
    modes: Callable[[Features], tuple[Vectors, Vectors]]
    mode_names: tuple[str, str]
    rates: Callable[[Features, Features], tuple[Series, Series]]
    combine: Callable[[Series, Series, int], tuple[Series, Series]]
    split: Callable[[Series, Series, int], tuple[Series, Series]]


def log_norm(v: Vectors) -> Series:
    """Logarithm of the length of vectors of any magnitude."""
    if v.shape[-1] == 1:
        with np.errstate(divide="ignore"):
            return np.log(np.abs(v[..., 0]))
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        squares = np.einsum("...d,...d->...", v, v)
        if squares.min(initial=1) > 1e-280 and squares.max(initial=0) < 1e280:
            return 0.5 * np.log(squares)
        largest = np.abs(v).max(axis=-1)
        scaled = v / np.where(largest > 0, largest, 1)[..., None]
        return np.log(largest) + 0.5 * np.log(np.einsum("...d,...d->...", scaled, scaled))


def _mean(x: np.ndarray, axis: int) -> np.ndarray:
    """Mean over a short axis, one slice after another: several times faster than ``mean`` for a handful of them."""
    parts = np.moveaxis(x, axis, 0)
    total = parts[0].copy()
    for part in parts[1:]:
        total += part
    return total / len(parts)


def _own_logit_of_cells(X: np.ndarray) -> np.ndarray:
    """s: the logit of the own class over the mean of the row (‖d‖ u_k · X^k)."""
    return (np.einsum("...kk->...k", X) - _mean(X, -1))[..., None]


def _own_logit_of_samples(z: np.ndarray, classes: np.ndarray) -> np.ndarray:
    return np.take_along_axis(z, classes[..., None], axis=-1) - _mean(z, -1)[..., None]


_WHOLE = (lambda X: X, lambda z, classes: z)
_OWN_LOGIT = (_own_logit_of_cells, _own_logit_of_samples)


def _isotropic_modes(X: Features) -> tuple[Vectors, Vectors]:
    """Deviations from the mean of the classes, in an orthonormal basis of K - 1 contrasts, and that mean."""
    K, p = X.shape[-2:]
    if K * p <= _SMALL:  # one matrix product for all steps is faster than one each
        rotated = (X.reshape(-1, K * p) @ _basis(K, p)).reshape(*X.shape[:-2], K * p)
    else:
        rotated = np.matmul(_basis(K, 1).T, X).reshape(*X.shape[:-2], K * p)
    return rotated[..., p:], rotated[..., :p] / np.sqrt(K)


@functools.cache
def _basis(K: int, p: int) -> Float[np.ndarray, "Kp Kp"]:
    """Orthonormal columns, for each of p coordinates: the mean of K classes, then K - 1 contrasts between them."""
    from scipy.linalg import helmert

    return np.kron(helmert(K, full=True), np.eye(p)).T.copy()


def _logit_modes(s: Features) -> tuple[Vectors, Vectors]:
    mean = _mean(s, -2)
    return mean, s[..., 0] - mean


def _published_logit_modes(X: Features) -> tuple[Vectors, Vectors]:
    return _logit_modes(_own_logit_of_cells(X))


def _from_isotropic(gap: Series, other: Series, K: int) -> tuple[Series, Series]:
    return (other + (K - 1) * gap) / K, (other - gap) / K


def _to_isotropic(A: Series, B: Series, K: int) -> tuple[Series, Series]:
    return A - B, A + (K - 1) * B


def _from_logits(gap: Series, other: Series, K: int) -> tuple[Series, Series]:
    return (gap + (K - 1) * other) / K, (other - gap) * (K - 1) / K


def _to_logits(A: Series, B: Series, K: int) -> tuple[Series, Series]:
    return A - B, A + B / (K - 1)


def _by_length(modes: Callable, combine: Callable) -> Callable[[Features, Features], tuple[Series, Series]]:
    """A and B from how much the modes' vectors have grown since the baseline."""

    def rates(features: Features, base: Features) -> tuple[Series, Series]:
        K = features.shape[-2]
        with np.errstate(invalid="ignore"):
            exponents = [K * (log_norm(v) - log_norm(v0)) for v, v0 in zip(modes(features), modes(base), strict=True)]
        return combine(*exponents, K)

    return rates


_ISOTROPIC = (("A - B", "A + (K-1) B"), _from_isotropic, _to_isotropic)
_LOGITS = (("A - B", "A + B/(K-1)"), _from_logits, _to_logits)


def _estimator(
    features: tuple[Callable, Callable], modes: Callable, model: tuple, rates: Callable | None = None
) -> Estimator:
    names, combine, split = model
    return Estimator(*features, modes, names, rates or _by_length(modes, combine), combine, split)


ESTIMATORS: dict[tuple[str, str], Estimator] = {
    ("isotropic", "defined"): _estimator(_WHOLE, _isotropic_modes, _ISOTROPIC),
    ("logits", "defined"): _estimator(_OWN_LOGIT, _logit_modes, _LOGITS),
    ("isotropic", "published"): _estimator(_WHOLE, _isotropic_modes, _ISOTROPIC, published.estimate_isotropic),
    ("logits", "published"): _estimator(_WHOLE, _published_logit_modes, _LOGITS, published.estimate_logits),
}
MODELS = tuple(dict.fromkeys(model for model, _ in ESTIMATORS))


def get_estimator(model: str, estimator: str, n_classes: int, dim: int) -> Estimator:
    """The estimator of a model, for class means (T, n_classes, dim).

    Raises:
        InputError: for an unknown name, or a shape that the model does not have.
    """
    if model not in MODELS:
        raise InputError(expected="a model", got=repr(model), do=nearest(str(model), MODELS))
    known = [name for m, name in ESTIMATORS if m == model]
    if estimator not in known:
        raise InputError(expected="an estimator", got=repr(estimator), do=nearest(str(estimator), known))
    if model == "logits" and n_classes != dim:
        raise InputError(
            expected="as many coordinates as classes (model 'logits': the features are the K logits)",
            got=f"K = {n_classes}, p = {dim}",
            do="use model='isotropic', or pass the logits",
        )
    if (model, estimator) == ("logits", "published") and n_classes != 3:
        published.estimate_logits(np.empty((1, n_classes, dim)))
    return ESTIMATORS[model, estimator]
