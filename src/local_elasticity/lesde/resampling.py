"""Bootstrap intervals over trials."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float


def percentiles(
    draws: Float[np.ndarray, "b T"], confidence: float, trials: int
) -> tuple[Float[np.ndarray, " T"], Float[np.ndarray, " T"]]:
    """Expanded percentile interval of each column: wider than the plain one by what few trials leave out.

    Resamples of n trials spread less than samples of n do, by sqrt((n - 1) / n), and normal tails are thinner than
    Student's; the percentiles are moved out by both (Hesterberg 2015, The American Statistician 69:371).

    Args:
        draws: resampled values.
        confidence: coverage.
        trials: how many were resampled.

    Returns:
        Lower and upper ends, NaN in columns that hold a NaN.
    """
    from scipy.special import ndtr, stdtrit

    tail = (1 - confidence) / 2
    expanded = float(ndtr(np.sqrt(trials / (trials - 1)) * stdtrit(trials - 1, tail))) if trials > 1 else tail
    ordered = np.array(draws.T, order="C")
    ordered.sort(axis=1)
    ends = []
    for share in (expanded, 1 - expanded):
        place = share * (len(draws) - 1)
        below = min(int(place), len(draws) - 2)
        ends.append(ordered[:, below] + (place - below) * (ordered[:, below + 1] - ordered[:, below]))
    broken = np.isnan(ordered[:, -1])
    low, high = (np.where(broken, np.nan, end) for end in ends)
    return low, high
