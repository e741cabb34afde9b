"""What every study is to the engine: its title and cost, the options it takes, how it runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from local_elasticity.base.errors import InputError

Option = Literal["workers", "device", "trainings", "so_far"]
DISK = 200 * 2**20  # bytes of a study that does not say how many it needs


class Study(ABC):
    """A question to be answered by computation.

    Attributes:
        title: one line for lists.
        cost: time to expect at each scale.
        options: what it takes beside scale and folder. "workers": it has independent tasks; "device": its networks may
            lie elsewhere than in main memory; "trainings": it shares ensembles with other studies; "so_far": it can be
            judged while it is unfinished.

    A study whose size can be changed has ``sizes``, a dataclass for each scale, and ``run_at``.
    """

    title: str
    cost: Mapping[str, str]
    options: ClassVar[frozenset[Option]] = frozenset()

    @abstractmethod
    def run(self, scale: str, out: Path, overwrite: bool = False) -> int:
        """Compute what is not there yet, judge and draw.

        Args:
            scale: "small" or "paper".
            out: the study's folder; an interrupted study continues there.
            overwrite: throw away what is there.

        Returns:
            1 when a claim fails, else 0.
        """

    def run_at(self, size: Any, scale: str, out: Path, *options: Any, **named: Any) -> int:
        """As ``run``, with a size of its own.

        Raises:
            InputError: for a study of fixed sizes.
        """
        raise InputError(
            expected="a study whose size can be changed", got=self.title, do="choose the scale small or paper"
        )

    def size(self, scale: str) -> Any:
        """The size at a scale; None where it is fixed."""
        return getattr(self, "sizes", {}).get(scale)

    def estimated_bytes(self, scale: str, size: Any, jobs: int) -> int:
        """Disk that the study takes."""
        return DISK

    def so_far(self, size: Any, scale: str, out: Path) -> int:
        """Judge and draw what an unfinished study has; 1 when a claim fails.

        Raises:
            InputError: for a study that is judged only when it is finished.
        """
        raise InputError(expected="a study that is judged while it is unfinished", got=self.title, do="let it finish")
