"""The progress bar of long work, with the estimate first."""

from __future__ import annotations

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
