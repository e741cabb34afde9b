"""Bootstrap intervals over trials."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

MOST_BIAS = 1.0  # standard deviations of bias beyond which it is no small correction any more


def percentiles(
    draws: Float[np.ndarray, "b T"], estimate: Float[np.ndarray, " T"], confidence: float, trials: int
) -> tuple[Float[np.ndarray, " T"], Float[np.ndarray, " T"]]:
    """Bias-corrected, expanded percentile interval of each column.

    The length of a noisy vector is too long, and that of its resamples twice so: percentiles are shifted by twice the
    median bias of the resamples about the estimate (Efron 1981, Canadian Journal of Statistics 9:139). Resamples of n
    trials also spread less than samples of n do, by sqrt((n - 1) / n), and normal tails are thinner than Student's: the
    percentiles are moved out by both (Hesterberg 2015, The American Statistician 69:371).

    Args:
        draws: resampled values.
        estimate: the estimates.
        confidence: coverage.
        trials: how many were resampled.

    Returns:
        Lower and upper ends, NaN in columns that hold a NaN.
    """
    from scipy.special import ndtr, ndtri, stdtrit

    ordered = np.array(draws.T, order="C")
    ordered.sort(axis=1)
    n = len(draws)
    less = np.count_nonzero(ordered < estimate[:, None], axis=1)
    shift = 2 * ndtri(np.clip(less / n, 0.5 / n, 1 - 0.5 / n)).clip(-MOST_BIAS, MOST_BIAS)
    reach = np.sqrt(trials / (trials - 1)) * stdtrit(trials - 1, (1 - confidence) / 2) if trials > 1 else -np.inf
    ends = []
    for side in (reach, -reach):
        place = np.clip(ndtr(shift + side) * (n + 1) - 1, 0, n - 1)  # the i-th of n lies at i / (n + 1) on average
        below = np.minimum(place.astype(int), n - 2)[:, None]
        low, high = (np.take_along_axis(ordered, below + step, axis=1)[:, 0] for step in (0, 1))
        ends.append(low + (place - below[:, 0]) * (high - low))
    broken = np.isnan(ordered[:, -1]) | np.isnan(estimate)
    low, high = (np.where(broken, np.nan, end) for end in ends)
    return low, high
