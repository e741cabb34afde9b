"""The progress bar of long work, with the estimate first."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType


def duration(seconds: float) -> str:
    """Seconds in words that people read: "0.4 s", "12 s", "3 min 20 s", "1 h 5 min"."""
    if not seconds >= 0:
        return "unknown time"
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


@contextmanager
def told_aside(told: Callable[[], str], seconds: float = 10.0) -> Iterator[None]:
    """Print now and then how far work is that reports nothing itself, such as that of other processes.

    Args:
        told: how far it is, in a line; printed when it is another one.
        seconds: between two questions.

    Yields:
        Nothing.
    """
    done = threading.Event()

    def watch() -> None:
        last = ""
        while not done.wait(seconds):
            now = told()
            if now != last:
                print(now, flush=True)
            last = now

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


class Pace:
    """What is left of a training that looks now and then, by what updates and looks took so far."""

    def __init__(self) -> None:
        self.updates = 0
        self.elapsed = self.looking = 0.0
        self.looks: list[tuple[int, float]] = []

    def add(self, elapsed: float, looked: float = 0.0) -> None:
        """Count an update: seconds since the beginning, and those of its look, 0 for none."""
        self.updates, self.elapsed, self.looking = self.updates + 1, elapsed, self.looking + looked
        if looked:
            self.looks.append((self.updates, looked))

    def left(self, updates: int, looks: int | None = None) -> float | None:
        """Seconds that more updates take, with so many looks, or with looks as often as up to now.

        None while it is not known what a look takes; the first warms up.
        """
        if len(self.looks) < 2 and self.updates < 50:
            return None
        update, look = (self.elapsed - self.looking) / self.updates, 0.0
        if len(self.looks) >= 2:
            (first, _), *later = self.looks
            each = sum(seconds for _, seconds in later) / len(later)
            look = each * (updates * len(later) / (later[-1][0] - first) if looks is None else looks)
        return updates * update + look


class Progress:
    """A rich progress bar that does nothing when it is not wanted."""

    def __init__(self, wanted: bool, total: int, title: str) -> None:
        self.wanted, self.total, self.title = wanted, total, title

    def __enter__(self) -> Progress:
        if self.wanted:
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.bar = Bar(*columns)
            self.bar.start()
            self.task = self.bar.add_task(self.title, total=self.total)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.wanted:
            self.bar.stop()

    def estimate(self, seconds: float) -> None:
        """Say what it is going to take."""
        if self.wanted:
            self.bar.console.print(f"{self.title}: about {duration(seconds)}")

    def advance(self, amount: int = 1) -> None:
        """Count what is done."""
        if self.wanted:
            self.bar.advance(self.task, amount)
