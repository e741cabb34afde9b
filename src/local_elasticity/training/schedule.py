"""When to look: schedules count ``tracker.step()`` calls from 0; ``every(9)`` looks after update 1, 10 and so on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from local_elasticity.base.checks import (
    check_choice,
    check_fraction,
    check_instance,
    check_whole,
    check_whole_list,
    is_whole,
)
from local_elasticity.base.errors import InputError


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
        check_schedule("other", other)
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
    return _Every(check_whole("n", n), check_choice("per", per, ("epoch",), or_none=True))


def log_spaced(n: int, total: int) -> Schedule:
    """Look n times in a run of ``total`` updates, evenly on a logarithmic axis, first and last included.

    Raises:
        InputError: for n < 1 or fewer updates than looks.
    """
    n, total = check_whole("n", n), check_whole("total", total)
    if total < n:
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
        InputError: for a negative call, what are none, or an iterator that was read before.
    """
    least = 0 if isinstance(calls, Sized) else 1  # a list without calls is meant so
    return _At(frozenset(check_whole_list("calls", calls, at_least=least)))


def budget(fraction: float) -> Schedule:
    """Spend at most this fraction of wall time on looking; the first look waits until its estimate fits.

    Raises:
        InputError: for a fraction outside (0, 1).
    """
    return Budget(check_fraction("fraction", fraction))


def check_schedule(name: str, value: Any, *, or_none: bool = False) -> Any:
    """Check a schedule.

    Args:
        name: of the argument.
        value: what came.
        or_none: whether None may be, too.

    Returns:
        The schedule, or None.

    Raises:
        InputError: for a number, a function, or anything else.
    """
    number = value if is_whole(value) and value > 0 else 9
    return check_instance(name, value, Schedule, f"le.every({number})", or_none=or_none)
