"""The estimators of the second paper's code, number for number (spec lesde 3.3, 3.4).

They take one iteration as their baseline, hide signs behind absolute values, and that of the L-model is written for
three classes and errs unless the rows of the class means are centred. They are kept to compare with what was published.
"""

from __future__ import annotations

import warnings

import numpy as np
from jaxtyping import Float

from local_elasticity.base.errors import InputError

WINDOWS = {"geomnist": 151, "cifar": 551, "simulation": 21}  # of the Savitzky-Golay derivatives
TAIL = 1000  # iterations of which the tail index is the mean
MODES = np.eye(3) - 1 / 3  # d_0, d_1, d_2

Series = Float[np.ndarray, "*b T"]


def estimate_isotropic(
    class_means: Float[np.ndarray, "*b T K p"], start: Float[np.ndarray, "*b 1 K p"] | None = None
) -> tuple[Series, Series]:
    """A and B of the I-model.

    Args:
        class_means: the class means.
        start: those of the first iteration; taken from ``class_means`` unless given.

    Returns:
        A and B.
    """
    first = class_means[..., :1, :, :] if start is None else start
    K = class_means.shape[-2]
    mean, mean_first = class_means.mean(axis=-2), first.mean(axis=-2)
    with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        P = np.log(np.abs((class_means - mean[..., None, :]) / (first - mean_first[..., None, :])))
        Q = np.log(np.abs(mean / mean_first))
        own, all_ = np.nanmean(np.nanmean(P, axis=-2), axis=-1), np.nanmean(Q, axis=-1)
    return all_ + (K - 1) * own, all_ - own


def estimate_logits(
    class_means: Float[np.ndarray, "*b T 3 3"], start: Float[np.ndarray, "*b 1 3 3"] | None = None
) -> tuple[Series, Series]:
    """A and B of the L-model, three classes.

    Args:
        class_means: the class means.
        start: those of the first iteration; taken from ``class_means`` unless given.

    Returns:
        A and B.

    Raises:
        InputError: for other than three classes.
    """
    if class_means.shape[-2:] != (3, 3):
        raise InputError(
            expected="3 classes and 3 logits (the published L-estimator is written for them)",
            got=f"K = {class_means.shape[-2]}, p = {class_means.shape[-1]}",
            do="use estimator='defined'",
        )
    first = class_means[..., :1, :, :] if start is None else start
    K = 3
    with np.errstate(divide="ignore", invalid="ignore"):
        (g, f), (g0, f0) = _logit_modes(class_means), _logit_modes(first)
        L1, L2 = K * np.log(np.abs(g / g0)), K * np.log(np.abs(f / f0))
    return (L1 + (K - 1) * L2) / K, (L2 - L1) * (K - 1) / K


def _logit_modes(X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x = X.reshape(*X.shape[:-2], 9)
    s1 = x[..., 0] + x[..., 4] - x[..., 6] - x[..., 7]
    s2 = -(x[..., 1] + x[..., 2] + x[..., 3] + x[..., 5] + x[..., 6] + x[..., 7])
    g = (s1 + s2) / 4
    rest = x - g[..., None] * MODES.ravel()
    return g, rest @ np.array([2, -1, -1, -1, 2, -1, 0, 0, 0]) / 3


def derivative(series: Series, window: int) -> Series:
    """Alpha or beta: the first derivative, an iteration being one unit of time."""
    from scipy.signal import savgol_filter

    return np.asarray(savgol_filter(series, window, 2, deriv=1, delta=1.0, axis=-1))


def tail_index(series: Series, last: int = TAIL) -> Float[np.ndarray, "*b"]:
    """The published tail index of A or B: 1 - mean of log(series) / log(m + 1) over the last iterations.

    It is a level, not a slope: it falls below 1 as soon as the series ends above 1. Iteration 0, whose log(m + 1) is 0,
    is left out of shorter series.
    """
    n = series.shape[-1]
    m = np.arange(max(1, n - last), n)
    tail = series[..., m]
    flipped = np.where(((tail < 0).sum(-1, keepdims=True) > tail.shape[-1] / 2), -tail, tail)
    with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return 1 - np.nanmean(np.log(flipped) / np.log(m + 1), axis=-1)


def displayed(series: Series, width: int = 10, every: int = 5) -> tuple[np.ndarray, Series]:
    """What the published figures draw: a centred moving average, every few iterations and the last.

    Returns:
        The iterations, and the averages at them.
    """
    n = series.shape[-1]
    sums = np.concatenate([np.zeros((*series.shape[:-1], 1)), np.cumsum(series, axis=-1)], axis=-1)
    high = np.minimum(np.arange(n) + (width - 1) // 2 + 1, n)
    low = np.maximum(np.arange(n) - width // 2, 0)
    average = (sums[..., high] - sums[..., low]) / (high - low)
    shown = np.unique(np.append(np.arange(0, n, every), n - 1))
    return shown, average[..., shown]
