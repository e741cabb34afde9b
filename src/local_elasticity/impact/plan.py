"""What a measurement is going to do and what it cost: engine, route, chunks, seconds, bytes."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from local_elasticity.base.errors import InputError

FEWER = (
    "take fewer sources or targets at once, measure_tiles for a matrix on disk, or a smaller max_memory or chunk_size"
)
OUT_OF_MEMORY = ("can't allocate memory", "cannot allocate memory", "not enough memory", "out of memory", "bad_alloc")
_estimates: ContextVar[list[int] | None] = ContextVar("estimates", default=None)


_ALWAYS_THERE = 2**24  # asking the system what is left costs more than measurements of so few bytes


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


def check_memory(needed: int, limit: int | None, device: torch.device | None = None) -> None:
    """Refuse what would take more bytes than the user allows or, without a limit, than there are.

    Args:
        needed: the estimate.
        limit: ``max_memory`` of the user.
        device: where the bytes are needed; the processor's memory by default.

    Raises:
        InputError: with the estimate; nothing has been allocated.
    """
    estimates = _estimates.get()
    if estimates is not None:
        estimates.append(needed)
    if limit is not None:
        if needed > limit:
            raise InputError(
                expected=f"max_memory of at least {needed:,} bytes for these sources, targets and weights",
                got=f"{limit:,} bytes",
                do="raise max_memory, or measure fewer sources or targets at once",
            )
        return
    if needed < _ALWAYS_THERE:
        return
    available = available_memory(device)
    if available is not None and needed > available:
        where = "memory" if device is None or device.type == "cpu" else f"memory of {device}"
        raise InputError(
            expected=f"at least {needed:,} bytes of free {where} for these sources, targets and weights (an estimate)",
            got=f"{available:,} bytes",
            do=FEWER,
        )


@contextmanager
def told_of_memory(needed: int | None = None) -> Iterator[None]:
    """Tell of an allocation that fails inside with an estimate, not in the allocator's words.

    Args:
        needed: the estimate; by default the largest that `check_memory` let pass inside.

    Raises:
        InputError: memory ran out inside.
    """
    estimates = [] if needed is None else [needed]
    token = _estimates.set(estimates)
    try:
        yield
    except Exception as error:
        if not any(map(is_out_of_memory, _causes(error))):
            raise
        about = f"about {max(estimates):,} bytes of free memory" if estimates else "enough free memory"
        raise InputError(expected=f"{about} for this work", got="an allocation that failed", do=FEWER) from None
    finally:
        _estimates.reset(token)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The exception and what it came from: a forward pass that ran out of memory is no matter of its inputs."""
    while error is not None:
        yield error
        error = error.__cause__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that an allocation failed."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in OUT_OF_MEMORY)


def available_memory(device: torch.device | None = None) -> int | None:
    """Bytes that can still be allocated: what the machine, its control groups and the limits of the process leave.

    Args:
        device: a CUDA device; the processor's memory by default.

    Returns:
        The bytes, or None where the system does not tell.
    """
    if device is not None and device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device is not None and device.type != "cpu":
        return None
    known = [room for room in (_machine_room(), *_group_rooms(), _process_room()) if room is not None]
    return max(0, min(known)) if known else None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _field(text: str, name: str) -> int | None:
    """The number behind a name at the start of a line."""
    line = next((line.split() for line in text.splitlines() if line.startswith(name)), None)
    return int(line[1]) if line else None


def _machine_room() -> int | None:
    free = _field(_read(Path("/proc/meminfo")), "MemAvailable:")
    return None if free is None else free * 1024


def _process_room() -> int | None:
    try:
        import resource
    except ImportError:
        return None
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    size = _field(_read(Path("/proc/self/status")), "VmSize:")
    return None if limit == resource.RLIM_INFINITY or size is None else limit - size * 1024


def _group_rooms(root: Path = Path("/sys/fs/cgroup"), groups: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """What is left in each control group around this process, of both versions."""
    for line in _read(groups).splitlines():
        _, controllers, inside = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        v2 = not controllers
        top = root if v2 else root / "memory"
        names = ("memory.max", "memory.current") if v2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        folder = top / inside.lstrip("/")
        for group in (folder, *folder.parents):
            limit, usage = (_read(group / name).strip() for name in names)
            if limit.isdigit() and usage.isdigit():
                # Pages of files count as usage, but give way.
                cache = _field(_read(group / "memory.stat"), "inactive_file " if v2 else "total_inactive_file ")
                yield int(limit) - int(usage) + (cache or 0)
            if group == top:
                break


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
