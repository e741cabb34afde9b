"""What a measurement is going to do and what it cost: engine, route, chunks, seconds, bytes."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from local_elasticity.errors import InputError


@dataclass
class Plan:
    """How a measurement was done.

    Attributes:
        engine: "replay" (finite step) or "linear" (first order).
        route: "step" (one source after the other, the weights pointed at a stepped buffer) or "vmap" (several sources
            at once by ``torch.func``); for the linear engine "contract" (all pairs, layer by layer) or "jvp" (one
            Jacobian-vector product a source).
        chunk_size: sources taken at once.
        target_chunk_size: targets in one forward pass.
        threads: intra-op threads of torch.
        estimated_seconds: told before the work or after its first source, from counts and the passes made so far.
        measured_seconds: what it took, checks included.
        estimated_bytes: weights' copies, gradients and the results.
        ways: route "contract": for each parameter the rule's form, or why it fell back to per-sample gradients.
        peak_bytes: rise of resident memory seen between sources (on CUDA: of allocated memory); None where unknown.
        notes: what decided, what was ruled out, and why.
    """

    engine: str
    route: str
    chunk_size: int
    target_chunk_size: int
    threads: int = field(default_factory=torch.get_num_threads)
    estimated_seconds: float = float("nan")
    measured_seconds: float = float("nan")
    estimated_bytes: int = 0
    peak_bytes: int | None = None
    notes: list[str] = field(default_factory=list)
    ways: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for a run's attributes."""
        return asdict(self)


def check_memory(needed: int, limit: int | None) -> None:
    """Refuse what would take more bytes than the user allows."""
    if limit is not None and needed > limit:
        raise InputError(
            expected=f"max_memory of at least {needed:,} bytes for these sources, targets and weights",
            got=f"{limit:,} bytes",
            do="raise max_memory, or measure fewer sources or targets at once",
        )


class MemoryMeter:
    """Watches how far memory rises while a measurement runs."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(device)
        self.device = device
        self.start = self._now()
        self.highest = self.start

    def _now(self) -> int | None:
        if self.cuda:
            return torch.cuda.max_memory_allocated(self.device)
        if not sys.platform.startswith("linux"):
            return None
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def look(self) -> None:
        """Take one reading."""
        now = self._now()
        if now is not None and self.highest is not None:
            self.highest = max(self.highest, now)

    @property
    def rise(self) -> int | None:
        """Bytes above the start, or None where the system does not tell."""
        if self.highest is None or self.start is None:
            return None
        return self.highest - self.start
