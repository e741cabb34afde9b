"""The flow: weights, loss and S_rel(t) = |movement at x'| / |movement at x| along a gradient flow (spec srel 2.0)."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from local_elasticity.base.checks import as_numbers, check_real
from local_elasticity.base.errors import InputError

Array = Float[np.ndarray, "..."]

RTOL, ATOL = 1e-11, 1e-13  # of the integrators, which must hold 1e-9


class UndefinedWarning(UserWarning):
    """S_rel is undefined at some pairs, where NaN stands; the message says why."""


@dataclass(frozen=True)
class Movements:
    """How far the predictions move by one update at x, up to a factor that the two share.

    Attributes:
        target: movement at x', (times, initial weights, pairs).
        source: movement at x itself, the same shape.
        undefined: reason -> where it makes S_rel undefined.
    """

    target: Float[np.ndarray, "times starts pairs"]
    source: Float[np.ndarray, "times starts pairs"]
    undefined: dict[str, Bool[np.ndarray, "times starts pairs"]] = field(default_factory=dict)


class Flow(ABC):
    """A gradient flow dw/dt = -grad L(w), with the S_rel of one small update at x along it.

    Shapes, for every flow: ``t`` is a number or strictly increasing times (T,); initial weights may have leading
    dimensions (..., p); ``x``, ``x_prime`` (..., p) and ``label`` (...) are broadcast against each other to the pairs.
    Results are (T, initial weights, pairs), without T for a number ``t``. So ``x[:, None]`` and ``x_prime[None]`` give
    all pairs of two sets. All of it is float64.

    Attributes:
        start: (..., p) the initial weights.
        dim: p, the size of x.
    """

    start: Array
    dim: int

    @abstractmethod
    def weights(self, t: Any) -> Array:
        """The weights at times t."""

    @abstractmethod
    def loss(self, t: Any) -> Array:
        """The loss whose gradient drives the flow, at times t: (T, initial weights)."""

    @abstractmethod
    def movements(
        self, t: Float[np.ndarray, " T"], x: Array, x_prime: Array, label: Array | None, lr: float | None
    ) -> Movements:
        """Movements at x' and x for checked times (T,) and pairs in a row: x, x_prime (n, p), label (n,)."""

    def s_rel(self, t: Any, x: Any, x_prime: Any, label: Any = None, *, lr: float | None = None) -> Array:
        """S_rel(x, x') at times t.

        Args:
            t: a number, or increasing times (T,), at least 0.
            x: (..., p) where the update is taken.
            x_prime: (..., p) where we look.
            label: (...) what the update at x fits it to; needed where S_rel depends on it.
            lr: size of the update; None for its limit at 0. They are the same where the prediction is linear in the
                weights.

        Returns:
            (T, initial weights, pairs). NaN where it is undefined, with an ``UndefinedWarning`` that says why.

        Raises:
            InputError: for times that do not increase, shapes that do not fit, or numbers that are not finite.
        """
        moved, shape = self._moved(t, x, x_prime, label, lr)
        undefined = _why(moved)
        for reason, where in undefined.items():
            if where.any():
                warnings.warn(
                    f"S_rel is undefined (NaN) at {int(where.sum())} of {where.size}: {reason}",
                    UndefinedWarning,
                    stacklevel=2,
                )
        bad = np.logical_or.reduce(list(undefined.values()))
        source = np.where(bad, np.nan, np.abs(moved.source))
        return (np.abs(moved.target) / source).reshape(shape)

    def why_undefined(self, t: Any, x: Any, x_prime: Any, label: Any = None, *, lr: float | None = None) -> np.ndarray:
        """The reason for which S_rel is undefined, in words, "" where it is defined; arguments as in ``s_rel``."""
        moved, shape = self._moved(t, x, x_prime, label, lr)
        undefined = _why(moved)
        return np.select(list(undefined.values()), list(undefined), default="").reshape(shape)

    def _moved(self, t: Any, x: Any, x_prime: Any, label: Any, lr: float | None) -> tuple[Movements, tuple[int, ...]]:
        times = checked_times(t)
        lr = check_real("lr", lr, 0.0, above=True, or_none=True)
        x, x_prime = (checked_array(name, v, self.dim) for name, v in (("x", x), ("x_prime", x_prime)))
        label = None if label is None else checked_array("label", label)
        try:
            pairs = np.broadcast_shapes(x.shape[:-1], x_prime.shape[:-1], () if label is None else label.shape)
        except ValueError:
            raise InputError(
                expected="x, x_prime and label that broadcast against each other",
                got=f"pairs {x.shape[:-1]}, {x_prime.shape[:-1]}, {() if label is None else label.shape}",
                do="use x[:, None] and x_prime[None] for all pairs of two sets",
            ) from None
        x, x_prime = (np.broadcast_to(v, (*pairs, self.dim)).reshape(-1, self.dim) for v in (x, x_prime))
        label = None if label is None else np.broadcast_to(label, pairs).reshape(-1)
        moved = self.movements(times, x, x_prime, label, lr)
        return moved, (*np.shape(t), *self._starts, *pairs)

    @property
    def _starts(self) -> tuple[int, ...]:
        """The leading dimensions of the initial weights."""
        return self.start.shape[:-1]

    def _timed(self, t: Any, values: Array) -> Array:
        """Without the dimension of time where t is a number."""
        return values if np.ndim(t) else values[0]


def _why(moved: Movements) -> dict[str, np.ndarray]:
    """Reasons of the flow, and the one that all share."""
    return {**moved.undefined, "the prediction at x does not move": moved.source == 0}


def needed(label: Array | None, what: str) -> Array:
    """The label, where S_rel depends on it."""
    if label is None:
        raise InputError(
            expected=f"label: {what}",
            got="none",
            do="pass label=, because the step at x depends on how far x is from fitted",
        )
    return label


def checked_times(t: Any) -> Float[np.ndarray, " T"]:
    """Times as a vector: finite, at least 0, strictly increasing."""
    times = as_numbers("t", t)
    if times.ndim > 1 or times.size == 0:
        raise InputError(expected="a time or a vector of times", got=f"shape {times.shape}", do="pass times (T,)")
    times = np.atleast_1d(times)
    if not np.isfinite(times).all() or times[0] < 0:
        raise InputError(expected="finite times of at least 0", got=_range(times), do="start at t = 0 or later")
    if (np.diff(times) <= 0).any():
        at = int(np.argmax(np.diff(times) <= 0))
        raise InputError(
            expected="strictly increasing times",
            got=f"{times[at + 1]:.6g} after {times[at]:.6g}",
            do="sort them and drop repeats: np.unique(t)",
        )
    return times


def checked_array(name: str, value: Any, last: int | None = None, ndim: int | None = None) -> Array:
    """A finite float64 array, of a given size along its last dimension."""
    array = as_numbers(name, value)
    if ndim is not None and array.ndim != ndim:
        raise InputError(
            expected=f"{name} with {ndim} dimensions", got=f"shape {array.shape}", do="see the docstring for shapes"
        )
    if last is not None and (array.ndim == 0 or array.shape[-1] != last):
        raise InputError(
            expected=f"{name} of shape (..., {last})", got=f"shape {array.shape}", do="keep the features last"
        )
    if array.size == 0 or not np.isfinite(array).all():
        raise InputError(
            expected=f"finite {name}, at least one number",
            got=f"shape {array.shape}" if array.size == 0 else "NaN or infinity",
            do="clean the data first",
        )
    return array


def _range(x: np.ndarray) -> str:
    return f"{x.min():.6g} to {x.max():.6g}"


def integrate(
    rate: Callable[[Float[np.ndarray, " m"]], Float[np.ndarray, " m"]], start: Array, t: Float[np.ndarray, " T"]
) -> Array:
    """Solve dw/dt = rate(w) from ``start`` at t = 0, to about 1e-9 (LSODA): (T, *start.shape).

    Args:
        rate: of the flattened weights; it does not depend on time.
        start: the weights at t = 0, any shape.
        t: checked times.
    """
    from scipy.integrate import solve_ivp

    out = np.broadcast_to(start, (len(t), *start.shape)).copy()
    later = t > 0
    if later.any():
        found = solve_ivp(
            lambda _, w: rate(w), (0.0, t[-1]), start.reshape(-1), method="LSODA", t_eval=t[later], rtol=RTOL, atol=ATOL
        )
        if not found.success:
            raise InputError(
                expected="a flow that can be integrated up to the last time",
                got=f"{found.message} at t = {found.t[-1] if len(found.t) else 0.0:.6g}",
                do="ask for earlier times, or check the data for a loss that diverges",
            )
        out[later] = found.y.T.reshape(-1, *start.shape)
    return out
