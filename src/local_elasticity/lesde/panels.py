"""Integrals along time: Gauss–Legendre panels fine enough for the rates, and scans that cannot overflow.

Every closed form of the model is a chain of integrals of rates times exponentials of integrals of rates. Time is cut
into panels on which the rates are polynomials to rounding and no exponent moves by more than 1.5; on each, 8 Gauss
points give integrals to rounding.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float, Int

from local_elasticity.base.errors import InputError
from local_elasticity.lesde.rates import Rate

N_NODES = 8
MOST_PANELS = 1 << 19
_GROWTH = 1.5  # of an exponent over one panel
_RESOLUTION = 1e-13  # what the highest Legendre coefficients of a rate may contribute, per panel
_SPLITS = 60
_RANGE = 300.0  # of the exponents within one block of a scan

_X, _W = np.polynomial.legendre.leggauss(N_NODES)
_VANDER = np.polynomial.legendre.legvander(_X, N_NODES - 1)
_COEFFICIENTS = np.linalg.inv(_VANDER)  # node values -> Legendre coefficients
_PARTIAL = (  # node values -> integrals from the panel's left end to each node, on [-1, 1]
    np.stack(
        [np.polynomial.legendre.legval(_X, np.polynomial.legendre.legint(basis, lbnd=-1)) for basis in np.eye(N_NODES)],
        axis=1,
    )
    @ _COEFFICIENTS
)


@dataclass(frozen=True, eq=False)
class Panels:
    """Time cut into panels, with the rates at the Gauss points of each.

    Attributes:
        edges: (P + 1,) ends of the panels, increasing.
        nodes: (P, 8) times of the Gauss points.
        rates: values of each rate at the nodes, (R, P, 8).
        at: (T,) for each time asked for, the edge that it is.
    """

    edges: Float[np.ndarray, " edges"]
    nodes: Float[np.ndarray, "panels nodes"]
    rates: Float[np.ndarray, "rates panels nodes"]
    at: Int[np.ndarray, " times"]

    @cached_property
    def half(self) -> Float[np.ndarray, " panels"]:
        """Half the length of each panel."""
        return np.diff(self.edges) / 2

    def whole(self, values: Float[np.ndarray, "... panels nodes"]) -> Float[np.ndarray, "... panels"]:
        """Integral of ``values`` over each panel."""
        return values @ _W * self.half

    def partial(self, values: Float[np.ndarray, "... panels nodes"]) -> Float[np.ndarray, "... panels nodes"]:
        """Integral of ``values`` from each panel's beginning to its nodes."""
        return values @ _PARTIAL.T * self.half[:, None]

    def cumulative(self, values: Float[np.ndarray, "... panels nodes"]) -> Float[np.ndarray, "... edges"]:
        """Integral of ``values`` from the first edge to every edge."""
        sums = np.cumsum(self.whole(values), axis=-1)
        return np.concatenate([np.zeros((*sums.shape[:-1], 1)), sums], axis=-1)


def cut(
    rates: Sequence[Rate],
    exponents: Float[np.ndarray, "exponents rates"],
    start: float,
    t: Float[np.ndarray, " times"],
) -> Panels:
    """Cut the time from ``start`` through all of ``t`` into panels.

    Args:
        rates: the rates to resolve.
        exponents: each exponent's own rate as a weighted sum of ``rates``.
        start: where the integrals begin.
        t: times asked for, in any order, none before ``start``.

    Raises:
        InputError: when a rate is not known on the whole span, or exponents are too large to follow.
    """
    asked = np.unique(np.append(t, start))
    for rate in rates:
        rate.covers(asked)
    inner = [rate.knots[(rate.knots > start) & (rate.knots < asked[-1])] for rate in rates]
    edges = np.unique(np.concatenate([asked, *inner]))
    smooth = [at for at, rate in enumerate(rates) if not rate.polynomial]
    if smooth and edges.size > 1:
        edges = _subdivide(edges, np.full(edges.size - 1, max(1, -(-32 // (edges.size - 1)))))
    left, right = edges[:-1], edges[1:]
    done: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    count = 0
    for split in range(_SPLITS + 1):
        nodes = (left + right)[:, None] / 2 + (right - left)[:, None] / 2 * _X
        values = np.stack([rate(nodes) for rate in rates])
        parts = _parts(values, exponents, right - left, smooth)
        if split == _SPLITS or count + parts.sum() > MOST_PANELS:
            if (parts > 1).any():
                _complain(rates, exponents, values, right - left)
            parts = np.ones_like(parts)
        good = parts == 1
        done.append((left[good], right[good], values[:, good]))
        count += int(good.sum())
        if good.all():
            break
        left, right, parts = left[~good], right[~good], parts[~good]
        finer = _subdivide(np.append(left, 0.0), parts, right)
        left, right = finer[0], finer[1]
    return _assemble(done, t, start)


def _assemble(done: list[tuple[np.ndarray, np.ndarray, np.ndarray]], t: np.ndarray, start: float) -> Panels:
    left = np.concatenate([part[0] for part in done])
    order = np.argsort(left, kind="stable")
    left, right = left[order], np.concatenate([part[1] for part in done])[order]
    values = np.concatenate([part[2] for part in done], axis=1)[:, order]
    edges = np.append(left, right[-1:]) if left.size else np.array([start])
    nodes = (left + right)[:, None] / 2 + (right - left)[:, None] / 2 * _X
    return Panels(edges, nodes, values, np.searchsorted(edges, t))


def _parts(values: np.ndarray, exponents: np.ndarray, length: np.ndarray, smooth: list[int]) -> np.ndarray:
    """Into how many parts each panel must still be cut."""
    growth = np.abs(np.tensordot(exponents, values, 1)) @ _W * length / 2
    parts = np.ceil(growth.max(axis=0, initial=0.0) / _GROWTH).clip(1).astype(int)
    if smooth:
        tail = np.abs(values[smooth] @ _COEFFICIENTS[-2:].T).sum(axis=-1) * length
        size = np.abs(values[smooth]) @ _W * length / 2
        coarse = (tail > _RESOLUTION * np.maximum(1.0, size)).any(axis=0)
        parts = np.where(coarse, np.maximum(parts, 2), parts)
    return parts


def _subdivide(left: np.ndarray, parts: np.ndarray, right: np.ndarray | None = None) -> np.ndarray:
    """Cut each panel into equal parts: as edges of adjoining panels, or as (left, right) of separate ones."""
    low, high = (left[:-1], left[1:]) if right is None else (left[:-1], right)
    which = np.repeat(np.arange(parts.size), parts)
    step = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)
    share = (high - low) / parts
    starts = low[which] + step * share[which]
    if right is None:
        return np.append(starts, high[-1])
    last = step == parts[which] - 1
    ends = np.where(last, high[which], low[which] + (step + 1) * share[which])
    return np.stack([starts, ends])


def _complain(rates: Sequence[Rate], exponents: np.ndarray, values: np.ndarray, length: np.ndarray) -> None:
    growth = float((np.abs(np.tensordot(exponents, values, 1)) @ _W * length / 2).sum(axis=-1).max(initial=0.0))
    if growth > _GROWTH * MOST_PANELS / 2:
        raise InputError(
            expected=f"exponents below about {_GROWTH * MOST_PANELS / 2:.0e}",
            got=f"exponents that move by {growth:.1e}",
            do="shorten the time span, or make alpha and beta smaller",
        )
    names = ", ".join(rate.name for rate in rates if not rate.polynomial)
    warnings.warn(
        f"{names} not resolved to {_RESOLUTION:g} by {MOST_PANELS} panels or {_SPLITS} halvings: "
        "a function with jumps or noise is better given as (times, values)",
        stacklevel=2,
    )


def scan(
    log_ratio: Float[np.ndarray, "series panels"],
    increment: Float[np.ndarray, "series panels"],
    first: Float[np.ndarray, " series"],
    resets: Int[np.ndarray, " resets"] | None = None,
) -> tuple[Float[np.ndarray, "series panels"], Float[np.ndarray, "series panels"]]:
    """Run x ← exp(log_ratio) x + increment along the panels, in blocks whose exponents stay in range.

    Args:
        log_ratio: logarithm of the factor of each panel.
        increment: what each panel adds.
        first: where x begins, and begins again.
        resets: panels before which x is set back to ``first``; only before the very first by default.

    Returns:
        x at the beginning (after a reset) and at the end of each panel.
    """
    series, panels = log_ratio.shape
    begin, end = np.empty((series, panels)), np.empty((series, panels))
    if panels == 0:
        return begin, end
    travelled = np.cumsum(np.abs(log_ratio).max(axis=0, initial=0.0))
    block = np.floor(travelled / _RANGE).astype(np.int64)
    starts = np.append(0, np.flatnonzero(np.diff(block)) + 1)
    restarts = np.zeros(1, dtype=np.int64) if resets is None else np.asarray(resets)
    starts = np.union1d(starts, restarts)
    restarting = np.isin(starts, restarts)
    x = first
    for low, high, restart in zip(starts, np.append(starts[1:], panels), restarting, strict=True):
        x = first if restart else x
        level = np.cumsum(log_ratio[:, low:high], axis=1)
        factor = np.exp(level)
        end[:, low:high] = factor * (x[:, None] + np.cumsum(increment[:, low:high] / factor, axis=1))
        begin[:, low] = x
        begin[:, low + 1 : high] = end[:, low : high - 1]
        x = end[:, high - 1]
    return begin, end
