"""Rates of time: alpha(t), beta(t) and sigma(t) as numbers, functions or samples on a time grid."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from local_elasticity.base.checks import in_words, plain_array
from local_elasticity.base.errors import InputError
from local_elasticity.lesde.arrays import to_numpy

Kind = Literal["linear", "step"]
Numbers = Float[np.ndarray, "..."]

_NO_TIMES = np.empty(0)


@dataclass(frozen=True, eq=False)
class Rate:
    """One rate: its value at any times, and where it has kinks.

    Attributes:
        name: what errors call it.
        function: values at an array of times, of the same shape.
        knots: times between which the rate is smooth.
        begin: first time at which it is known.
        end: last time at which it is known.
        polynomial: a polynomial of low degree between knots, so that quadrature is exact there.
    """

    name: str
    function: Callable[[Numbers], Numbers]
    knots: Float[np.ndarray, " knots"] = field(default_factory=lambda: _NO_TIMES)
    begin: float = -np.inf
    end: float = np.inf
    polynomial: bool = False

    def __call__(self, t: Numbers) -> Numbers:
        """Values at ``t``; times outside of a grid, and values that are no numbers, are refused."""
        t = np.asarray(t, dtype=np.float64)
        self.covers(t)
        values = self.function(t)
        bad = ~np.isfinite(values)
        if bad.any():
            at = t[bad].flat[0]
            raise InputError(
                expected=f"a finite {self.name} at every time",
                got=f"{self.name}({at:g}) = {values[bad].flat[0]}",
                do="check the function, or start later",
            )
        return values

    def covers(self, t: Numbers) -> None:
        """Refuse times at which the rate is not known."""
        if t.size and (t.min() < self.begin or t.max() > self.end):
            raise InputError(
                expected=f"{self.name} on the whole time grid, {t.min():g} to {t.max():g}",
                got=f"samples of {self.name} from {self.begin:g} to {self.end:g}",
                do="give samples that reach as far as the times asked for, or ask for fewer times",
            )

    def __mul__(self, factor: float) -> Rate:
        return combined(self.name, (factor, self))


def combined(name: str, *terms: tuple[float, Rate]) -> Rate:
    """A weighted sum of rates."""

    def function(t: Numbers) -> Numbers:
        return sum((weight * rate(t) for weight, rate in terms), np.zeros(np.shape(t)))

    rates = [rate for _, rate in terms]
    return Rate(
        name,
        function,
        np.unique(np.concatenate([rate.knots for rate in rates])),
        max(rate.begin for rate in rates),
        min(rate.end for rate in rates),
        all(rate.polynomial for rate in rates),
    )


def as_rate(value: Any, name: str, kind: Kind = "linear") -> Rate:
    """Read a number, a function of time, or ``(times, values)``.

    Args:
        value: what the user gave; functions may take a scalar or an array (which is tried, not assumed).
        name: what errors call it.
        kind: how samples are joined: "linear", or "step" (values[i] holds over (times[i-1], times[i]], as in the
            authors' Euler recursion, whose step into m uses alpha[m]).

    Raises:
        InputError: for anything else, samples that are not finite, or times that do not increase.
    """
    if isinstance(value, Rate):
        return value
    if callable(value):
        check_function_of_time(name, value)
        return Rate(name, vectorised(value, name))
    if isinstance(value, str):
        raise InputError(
            expected=f"{name} as a number, a function of time, or (times, values)",
            got=in_words(value),
            do=f"write {name}=lambda t: ..., or a number without quotes",
        )
    if isinstance(value, tuple) and len(value) == 2:
        return _sampled(value, name, kind)
    array = to_numpy(value, name)
    if array.ndim:
        raise InputError(
            expected=f"{name} as a number, a function of time, or (times, values)",
            got=f"an array of shape {array.shape} without its times",
            do=f"pass {name}=(times, values)",
        )
    constant = float(array)
    if not np.isfinite(constant):
        raise InputError(expected=f"a finite {name}", got=str(constant), do="pass a number")
    return Rate(name, lambda t: np.full(np.shape(t), constant), polynomial=True)


def vectorised(function: Callable[[Any], Any], name: str) -> Callable[[Numbers], Numbers]:
    """A function of arrays that calls ``function`` once where that gives what calls one by one give."""

    def one_by_one(t: Numbers) -> Numbers:
        return np.array([_scalar(function, x, name) for x in t.ravel()], dtype=np.float64).reshape(t.shape)

    def whole(t: Numbers) -> Numbers:
        few = min(t.size, 3)
        if t.size < 2:
            return one_by_one(t)
        try:
            with np.errstate(all="ignore"):
                values = np.asarray(function(t), dtype=np.float64)
        except Exception:  # whatever a function of scalars does with an array, calls one by one decide
            return one_by_one(t)
        if values.shape != t.shape:
            return one_by_one(t)
        probe = np.linspace(0, t.size - 1, few).astype(int)
        if np.allclose(values.flat[probe], one_by_one(t.ravel()[probe]), rtol=1e-9, atol=0, equal_nan=True):
            return values
        return one_by_one(t)

    return whole


def _scalar(function: Callable[[Any], Any], t: np.float64, name: str) -> float:
    try:
        with np.errstate(all="ignore"):  # what is not finite is refused with its time
            given = function(t)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            expected=f"{name} as a function of time that returns one number",
            got=f"{type(error).__name__} at t = {t:g}",
            do=f"make {name}({t:g}) work by itself first",
        ) from error
    value = plain_array(given)
    if value is None or value.dtype.kind not in "biuf" or value.size != 1:
        raise InputError(
            expected=f"{name} as a function of time that returns one number",
            got=f"{in_words(given)} at t = {t:g}",
            do="return a number",
        )
    value = value.astype(np.float64)
    return float(value.reshape(()))


def check_function_of_time(name: str, function: Any) -> None:
    """Refuse a function that cannot be called with a time alone."""
    try:
        inspect.signature(function).bind(0.0)
    except TypeError as error:
        raise InputError(
            expected=f"{name} as a function of one time",
            got=in_words(function),
            do=f"write for example {name}=lambda t: 0.02 * math.exp(-t / 2000)",
        ) from error
    except ValueError:  # some compiled functions have no signature
        return


def _sampled(samples: tuple[Any, Any], name: str, kind: Kind) -> Rate:
    if kind not in ("linear", "step"):
        raise InputError(expected='kind "linear" or "step"', got=repr(kind), do="choose one")
    times, values = (to_numpy(part, name).astype(np.float64) for part in samples)
    if times.ndim != 1 or times.shape != values.shape or times.size == 0:
        raise InputError(
            expected=f"{name} as (times, values), two series of the same length",
            got=f"shapes {times.shape} and {values.shape}",
            do="pass one value a time",
        )
    if not (np.isfinite(times).all() and np.isfinite(values).all()):
        raise InputError(expected=f"finite samples of {name}", got="NaN or infinity", do="leave those times out")
    if (np.diff(times) <= 0).any():
        raise InputError(expected=f"times of {name} that increase", got="times that do not", do="sort them, each once")

    def linear(t: Numbers) -> Numbers:
        return np.interp(t, times, values)

    def step(t: Numbers) -> Numbers:
        return values[np.searchsorted(times, t, side="left").clip(max=times.size - 1)]

    return Rate(name, linear if kind == "linear" else step, times, times[0], times[-1], polynomial=True)
