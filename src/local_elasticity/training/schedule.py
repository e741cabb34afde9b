"""When to look: schedules count ``tracker.step()`` calls from 0; ``every(9)`` looks after update 1, 10 and so on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from local_elasticity.errors import InputError


@dataclass(frozen=True)
class Moment:
    """What a schedule may know when it is asked.

    Attributes:
        call: number of this ``tracker.step()`` call, from 0.
        call_in_epoch: the same since the epoch last changed.
        elapsed: seconds since the tracker was made.
        measuring: seconds of these spent on measuring.
        estimate: gives the seconds that a snapshot is expected to take.
    """

    call: int
    call_in_epoch: int
    elapsed: float
    measuring: float
    estimate: Callable[[], float]


class Schedule(ABC):
    """Says whether it is time to look; ``a | b`` is the union of two."""

    @abstractmethod
    def due(self, moment: Moment) -> bool:
        """Whether to look now."""

    def __or__(self, other: Schedule) -> Schedule:
        return _Union(self, other)


@dataclass(frozen=True)
class _Union(Schedule):
    one: Schedule
    other: Schedule

    def due(self, moment: Moment) -> bool:
        # Both are asked, because a schedule may keep count.
        return any([self.one.due(moment), self.other.due(moment)])


@dataclass(frozen=True)
class _Every(Schedule):
    n: int
    per: str | None

    def due(self, moment: Moment) -> bool:
        return (moment.call_in_epoch if self.per == "epoch" else moment.call) % self.n == 0


@dataclass(frozen=True)
class _At(Schedule):
    calls: frozenset[int]

    def due(self, moment: Moment) -> bool:
        return moment.call in self.calls


@dataclass(frozen=True)
class Budget(Schedule):
    """Looks as often as the fraction of wall time allows."""

    fraction: float

    def due(self, moment: Moment) -> bool:
        """Whether one more snapshot, at its expected cost, keeps measuring within the fraction of all time."""
        if moment.measuring > self.fraction * moment.elapsed and moment.measuring > 0:
            return False
        cost = moment.estimate()
        return moment.measuring + cost <= self.fraction * (moment.elapsed + cost)


def every(n: int, per: Literal["epoch"] | None = None) -> Schedule:
    """Look at calls 0, n, 2n, …; with ``per="epoch"`` the count restarts when ``tracker.step(epoch=)`` changes.

    Raises:
        InputError: for n < 1 or another ``per``.
    """
    if n < 1 or int(n) != n:
        raise InputError(expected="n >= 1", got=f"every({n})", do="pass a whole number of updates")
    if per not in (None, "epoch"):
        raise InputError(expected="per=None or 'epoch'", got=repr(per), do="leave it out to count through epochs")
    return _Every(int(n), per)


def log_spaced(n: int, total: int) -> Schedule:
    """Look n times in a run of ``total`` updates, evenly on a logarithmic axis, first and last included.

    Raises:
        InputError: for n < 1 or fewer updates than looks.
    """
    if n < 1 or total < n:
        raise InputError(
            expected="1 <= n <= total", got=f"n={n}, total={total}", do="pass the run's number of updates as total"
        )
    updates: set[int] = set()
    points = n
    while len(updates) < n:  # rounding merges the early points: ask for more until n are distinct
        updates = set(np.unique(np.round(np.geomspace(1, total, points)).astype(int)).tolist())
        points += 1
    ordered = sorted(updates)
    return _At(frozenset(update - 1 for update in (*ordered[: n - 1], ordered[-1])))


def at(calls: Iterable[int]) -> Schedule:
    """Look at exactly these calls, counted from 0 (``run.looked_at`` of an earlier run replays it).

    Raises:
        InputError: for a negative call.
    """
    chosen = frozenset(int(call) for call in calls)
    if any(call < 0 for call in chosen):
        raise InputError(expected="calls >= 0", got=str(sorted(chosen)), do="count tracker.step() calls from 0")
    return _At(chosen)


def budget(fraction: float) -> Schedule:
    """Spend at most this fraction of wall time on looking; the first look waits until its estimate fits.

    Raises:
        InputError: for a fraction outside (0, 1).
    """
    if not 0 < fraction < 1:
        raise InputError(expected="0 < fraction < 1", got=str(fraction), do="for example budget(0.05)")
    return Budget(float(fraction))
