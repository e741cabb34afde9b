"""Which samples each replica takes at each step, and the random streams of replicas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int64

if TYPE_CHECKING:
    pass


WEIGHTS, ORDER, STREAM = 0, 1, 2  # what a random stream is for
_DRAWN = 1024  # steps of one draw of samples; any step can be reached without the ones before


class Order:
    """Which samples each replica takes at each step, reachable at any step."""

    def __init__(self, n: int, batch: int, replacement: bool, seed: int, replicas: Sequence[int]) -> None:
        self.n, self.batch, self.replacement, self.seed, self.replicas = n, batch, replacement, seed, replicas
        self.each = _DRAWN if replacement else n // batch  # steps in a part of a stream
        self._part: tuple[int, np.ndarray] | None = None

    def part(self, number: int) -> Int64[np.ndarray, "steps replicas batch"]:
        """The samples of one part of the streams."""
        if self._part is None or self._part[0] != number:
            self._part = (number, np.stack([self._one(replica, number) for replica in self.replicas], axis=1))
        return self._part[1]

    def _one(self, replica: int, number: int) -> np.ndarray:
        generator = np.random.default_rng([self.seed, ORDER, replica, number])
        if self.replacement:
            return generator.integers(self.n, size=(self.each, self.batch))
        return generator.permutation(self.n)[: self.each * self.batch].reshape(self.each, self.batch)

    def between(self, start: int, stop: int) -> Int64[np.ndarray, "steps replicas batch"]:
        """The samples of the steps from ``start`` to before ``stop``."""
        parts = []
        while start < stop:
            number, first = divmod(start, self.each)
            upto = min(self.each, first + stop - start)
            parts.append(self.part(number)[first:upto])
            start += upto - first
        return np.concatenate(parts) if len(parts) != 1 else np.ascontiguousarray(parts[0])


def stream_seed(seed: int, purpose: int, replica: int) -> int:
    """The seed of a replica's stream for one purpose."""
    return int(np.random.SeedSequence([seed, purpose, replica]).generate_state(1, np.uint64)[0] >> 1)
