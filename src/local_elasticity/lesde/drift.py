"""Drifts: in which direction an example of class l pushes the features of class k, the blocks H[k, l].

The class means follow dX/dt = M(t) X with block (k, l) of M equal to pi_l E_kl(t) H[k, l] (LE-SDE, Zhang, Wang and Su
2021, section 1.2 of the model's description in docs/lesde.md). A drift is its blocks; one that also has modes has
closed forms:

    X(t) = sum_a f_a(t) D_a X(0),    f_a either exp of an integral, or the integral of a rate times such an exponential.

A new drift is one function that returns a `Drift`, and one registration.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from local_elasticity.base.checks import check_instance, check_text, check_whole, in_words
from local_elasticity.base.errors import InputError, nearest
from local_elasticity.lesde.arrays import to_numpy

Pair = tuple[float, float]  # multiples of alpha and of beta
Means = Float[np.ndarray, "... k p"]


@dataclass(frozen=True)
class Modes:
    """The scalar functions f_a of a closed form, and the matrices D_a that go with them.

    Attributes:
        exponents: the rate of each exponential, as multiples of alpha and beta.
        driven: (which exponential, rate) of each integral of a rate times an exponential.
        apply: D_a applied to class means; the exponentials come first, then the integrals. None where D_a is 0.
    """

    exponents: tuple[Pair, ...]
    driven: tuple[tuple[int, Pair], ...]
    apply: tuple[Callable[[Means], Means] | None, ...]


@dataclass(frozen=True, eq=False)
class Drift:
    """One drift for K classes and p features.

    Attributes:
        name: its name.
        blocks: H[k, l], (K, K, p, p).
        modes: its closed form, for classes drawn alike.
    """

    name: str
    blocks: Float[np.ndarray, "k k p p"]
    modes: Modes | None = None


DRIFTS: dict[str, Callable[[int, int], Drift]] = {}


def register(name: str) -> Callable[[Callable[[int, int], Drift]], Callable[[int, int], Drift]]:
    """Make a drift known by ``name``.

    Args:
        name: what it is asked for by; one that there is already is refused.

    Returns:
        A decorator that registers the function and hands it back unchanged.

    Raises:
        InputError: for what is no name, or one that is taken.
    """
    if check_text("name", name) in DRIFTS:
        raise InputError(expected="a new name", got=f"the drift {name!r}, which is there", do="choose another name")

    def note(build: Callable[[int, int], Drift]) -> Callable[[int, int], Drift]:
        if not callable(build):
            raise InputError(
                expected="a function (n_classes, n_features) -> Drift",
                got=in_words(build),
                do="decorate such a function",
            )
        DRIFTS[name] = build
        return build

    return note


def as_drift(drift: Any, n_classes: int, n_features: int) -> Drift:
    """Read the name of a drift, or the user's own blocks.

    Raises:
        InputError: for an unknown name, or blocks of the wrong shape.
    """
    if isinstance(drift, Drift):
        return drift
    if isinstance(drift, str):
        if drift not in DRIFTS:
            raise InputError(expected="a drift", got=repr(drift), do=nearest(drift, DRIFTS))
        made = DRIFTS[drift](n_classes, n_features)
        return check_instance(f"what the drift {drift!r} makes", made, Drift, "Drift(name, blocks)")
    blocks = to_numpy(drift, "drift").astype(np.float64)
    wanted = (n_classes, n_classes, n_features, n_features)
    if blocks.shape != wanted:
        raise InputError(
            expected=f"blocks H[k, l] of shape {wanted}", got=f"shape {blocks.shape}", do="pass one p × p block a pair"
        )
    if not np.isfinite(blocks).all():
        raise InputError(expected="finite blocks H[k, l]", got="NaN or infinity", do="check the blocks")
    return Drift("own blocks", blocks)


@register("isotropic")
def isotropic(n_classes: int, n_features: int) -> Drift:
    """The I-model: H[k, l] = I. The global mean and the deviations from it scale by one exponential each."""
    k = n_classes
    blocks = np.broadcast_to(np.eye(n_features), (k, k, n_features, n_features))
    modes = Modes(
        exponents=((1 / k, (k - 1) / k), (1 / k, -1 / k)),
        driven=(),
        apply=(
            lambda x: np.broadcast_to(x.mean(axis=-2, keepdims=True), x.shape),
            lambda x: x - x.mean(axis=-2, keepdims=True),
        ),
    )
    return Drift("isotropic", blocks, modes)


def simplex(n_classes: int) -> Float[np.ndarray, "k k"]:
    """The unit vectors u_l = (e_l - 1/K) / ‖e_l - 1/K‖, one a row: a simplex equiangular tight frame.

    Args:
        n_classes: K, at least 2.

    Returns:
        (K, K).

    Raises:
        InputError: for another K.
    """
    n_classes = check_whole("n_classes", n_classes, 2)
    return (np.eye(n_classes) - 1 / n_classes) / np.sqrt(1 - 1 / n_classes)


@register("logits")
def logits(n_classes: int, n_features: int) -> Drift:
    """The L-model: H[k, l] = u_l u_l^T, the features are the logits.

    With s_l = u_l · X^l, the mean of s follows exp of the integral of (alpha - beta)/K, its deviations exp of the
    integral of (alpha + beta/(K-1))/K, and everything else are integrals over these.

    Raises:
        InputError: unless there are as many features as classes.
    """
    k = n_classes
    if n_features != k:
        raise InputError(
            expected=f"p = K = {k} features with the logits drift (the features are the logits)",
            got=f"p = {n_features}",
            do='pass initial means of shape (K, K), or drift="isotropic"',
        )
    u = simplex(k)
    blocks = np.broadcast_to(u[None, :, :, None] * u[None, :, None, :], (k, k, k, k))

    def own(x: Means) -> Float[np.ndarray, "... k"]:
        return np.einsum("...kp,kp->...k", x, u)

    def common(x: Means) -> Means:
        return own(x).mean(axis=-1)[..., None, None] * u

    def deviation(x: Means) -> Float[np.ndarray, "... k"]:
        s = own(x)
        return s - s.mean(axis=-1, keepdims=True)

    def along_own(x: Means) -> Means:
        return deviation(x)[..., None] * u

    def along_all(x: Means) -> Means:
        return np.broadcast_to((deviation(x) @ u)[..., None, :], x.shape)

    modes = Modes(
        exponents=((0.0, 0.0), (1 / k, -1 / k), (1 / k, 1 / (k * (k - 1)))),
        driven=((2, (1 / k, -1 / k)), (2, (0.0, 1 / k))),
        apply=(lambda x: x - common(x), common, None, along_own, along_all),
    )
    return Drift("logits", blocks, modes)
