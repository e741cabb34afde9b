"""Tail exponents: how fast a rate of the LE-SDE decays, as t^-r, from its integral (spec lesde 2.5, 3.4).

r < 1 is slower than 1/t, the boundary of separability. The slope of dyadic block averages is right on either side of
1; the slope of log A is right below 1 only; the published index is no exponent at all but the level of A at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float

from local_elasticity.base.errors import InputError, nearest
from local_elasticity.lesde import published
from local_elasticity.lesde.estimation.resampling import percentiles

TailMethod = Literal["dyadic", "loglog", "official"]
Draws = Float[np.ndarray, "b T"]

OCTAVES, FEWEST, POINTS = 6, 3, 4  # blocks looked at, needed, and points in each of them
MOST_UNDEFINED = 0.1  # share of draws without an exponent beyond which there is no interval


@dataclass(frozen=True, eq=False)
class TailExponent:
    """A decay like t^-r.

    Attributes:
        method: how it was found.
        value: r; NaN where it cannot be told.
        low: lower end of its bootstrap interval.
        high: its upper end.
        reason: why value or interval are NaN, or what to know about them; empty otherwise.
        times: ends of the blocks, ascending ("dyadic" only).
        averages: average of the rate over each block, from half its end to its end.
        used: which blocks the slope was fitted to.
    """

    method: str
    value: float
    low: float = float("nan")
    high: float = float("nan")
    reason: str = ""
    times: np.ndarray = field(default_factory=lambda: np.empty(0), repr=False)
    averages: np.ndarray = field(default_factory=lambda: np.empty(0), repr=False)
    used: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=bool), repr=False)

    def __str__(self) -> str:
        if np.isnan(self.value):
            return f"undefined ({self.reason})"
        interval = "" if np.isnan(self.low) else f" [{self.low:.3g}, {self.high:.3g}]"
        return f"{self.value:.3g}{interval}" + (f" ({self.reason})" if self.reason else "")


def tail_exponent(
    t: Float[np.ndarray, " T"],
    integral: Float[np.ndarray, " T"],
    draws: Draws | None = None,
    *,
    method: TailMethod = "dyadic",
    window: int = 5,
    confidence: float = 0.95,
    trials: int = 0,
) -> TailExponent:
    """The exponent r of a rate that decays like t^-r, from its integral.

    Args:
        t: times, counted from the start of training.
        integral: of the rate.
        draws: resampled versions of the integral, for the interval.
        method: "dyadic", "loglog" or "official".
        window: points over which the integral may be smoothed at the ends of blocks.
        confidence: coverage of the interval.
        trials: how many trials were resampled.

    Raises:
        InputError: for an unknown method.
    """
    if method not in get_args(TailMethod):
        raise InputError(expected="a method", got=repr(method), do=nearest(str(method), get_args(TailMethod)))
    rows = np.concatenate([integral[None], np.empty((0, len(t))) if draws is None else draws])
    found = _rule(method)(t, rows, window)
    values, reason, *blocks = found
    value, resampled = float(values[0]), values[1:]
    low = high = float("nan")
    if draws is not None and np.isfinite(value):
        known = np.isfinite(resampled)
        if (~known).mean() > MOST_UNDEFINED:
            undefined = f"no interval: undefined in {(~known).mean():.0%} of the resamples"
            reason = f"{reason}; {undefined}" if reason else undefined
        else:
            low, high = (
                float(end[0]) for end in percentiles(resampled[known][:, None], values[:1], confidence, trials)
            )
    return TailExponent(method, value, low, high, reason, *blocks)


def exponents(
    t: Float[np.ndarray, " T"], integrals: Draws, *, method: TailMethod = "dyadic", window: int = 5
) -> Float[np.ndarray, " b"]:
    """The exponents of several integrals by the blocks that the first of them chooses; see `tail_exponent`."""
    return np.asarray(_rule(method)(t, integrals, window)[0])


def _rule(method: TailMethod) -> Callable[[np.ndarray, np.ndarray, int], tuple]:
    return {"dyadic": _dyadic, "loglog": _loglog, "official": _official}[method]


def _dyadic(t: np.ndarray, rows: np.ndarray, window: int) -> tuple:
    """Minus the slope of log block average against log t, over blocks [t/2, t] from the last back to the peak."""
    ends = t[-1] / 2.0 ** np.arange(OCTAVES + 1)
    inside = np.array([((t > e / 2) & (t <= e)).sum() for e in ends[:-1]])
    short = (inside < POINTS) | (ends[1:] < t[0]) | (ends[:-1] <= 0)
    count = int(np.argmax(short)) if short.any() else OCTAVES
    nothing = np.full(len(rows), np.nan)
    if count < 2 or np.isnan(rows[0]).any():
        return nothing, "fewer than two octaves with four times each" if count < 2 else "its integral is unknown"
    edges = np.stack(
        [rows @ reading(t, ends[j], min(window, inside[min(j, count - 1)] // 2)) for j in range(count + 1)], axis=1
    )
    averages = (edges[:, :-1] - edges[:, 1:]) / (ends[:-1] - ends[1:])[:count]
    count = _clear(averages)
    averages, ends = averages[:, :count], ends[:count]
    used, reason = _decaying(np.abs(averages[0]))
    signs = np.sign(averages[:, used])
    same = (signs == signs[:, :1]).all(axis=1) & (signs[:, 0] != 0)
    blocks = (ends[::-1], averages[0, ::-1], used[::-1])
    if not same[0]:
        where = ends[used][signs[0] != signs[0, -1]]
        return (
            nothing,
            f"its average changes sign by t = {where[-1]:g}" if len(where) else "its average is 0",
            *blocks,
        )
    with np.errstate(divide="ignore", invalid="ignore"):
        slopes = _slope(np.log(ends[used]), np.log(np.abs(averages[:, used])))
    return np.where(same, -slopes, np.nan), reason, *blocks


def _clear(averages: np.ndarray) -> int:
    """How many blocks to look at: early ones that are lost in noise, beyond the fewest needed, are left out."""
    if len(averages) < 3:
        return averages.shape[1]
    lost = np.abs(averages[0]) < 3 * np.nanstd(averages[1:], axis=0, ddof=1)
    lost[:FEWEST] = False
    return int(np.argmax(lost)) if lost.any() else averages.shape[1]


def _decaying(size: np.ndarray) -> tuple[np.ndarray, str]:
    """The blocks after the peak (the peak's own is left out where enough remain), and what to know about them."""
    peak = int(np.argmax(size))  # blocks are counted from the last
    used = np.zeros(len(size), dtype=bool)
    if peak == len(size) - 1:
        used[:] = True
    elif peak >= FEWEST:
        used[:peak] = True
    else:
        used[: min(len(size), max(peak + 1, FEWEST))] = True
    if peak == 0 and len(size) > 1:
        return used, "it has not begun to decay"
    return used, "" if used.sum() >= FEWEST else f"from {used.sum()} octaves only"


def reading(t: np.ndarray, at: float, width: int) -> np.ndarray:
    """Weights that read a series off at a time between its points, by a quadratic through those around it."""
    width = max(3, width | 1)
    middle = int(np.argmin(np.abs(t - at)))
    start = int(np.clip(middle - width // 2, 0, max(0, len(t) - width)))
    near = slice(start, start + width)
    offset = t[near] - at
    scale = np.abs(offset).max()
    weights = np.zeros(len(t))
    weights[near] = np.linalg.pinv((offset / scale)[:, None] ** np.arange(3))[0]
    return weights


def _loglog(t: np.ndarray, rows: np.ndarray, window: int) -> tuple:
    """1 minus the slope of log A against log t over the last half of the times."""
    half = len(t) // 2
    nothing = np.full(len(rows), np.nan)
    if t[half] <= 0:
        return nothing, "times of the last half are not positive"
    tail = rows[:, half:]
    signs = np.sign(tail)
    same = (signs == signs[:, :1]).all(axis=1) & (signs[:, 0] != 0)
    if not same[0]:
        return nothing, "the integral is unknown or changes sign in the last half"
    with np.errstate(divide="ignore", invalid="ignore"):
        slopes = _slope(np.log(t[half:]), np.log(np.abs(tail)))
    return np.where(same, 1 - slopes, np.nan), "meaningful below 1 only"


def _official(t: np.ndarray, rows: np.ndarray, window: int) -> tuple:
    """The published index, by iteration number."""
    reason = "a level, not an exponent"
    if len(t) <= published.TAIL:
        reason += f"; of {len(t)} iterations where the authors take the last {published.TAIL}"
    if not np.array_equal(t, np.arange(len(t))):
        reason += "; counts iterations by position, and these times are others"
    return published.tail_index(rows), reason


def _slope(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Slopes of the rows of y against x by least squares."""
    x = x - x.mean()
    return (y @ x) / (x @ x)
