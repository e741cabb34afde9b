"""Local quadratic fits of a series over a moving window (Savitzky-Golay filters, also for uneven times).

In the interior each window lies around its point; the first and last half window take the fit of the first and last
whole window, as ``scipy.signal.savgol_filter`` does by default.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from local_elasticity.base.errors import InputError

if TYPE_CHECKING:
    from scipy.sparse import csr_array

SMALLEST = 5  # a quadratic through three points leaves no residual to judge a window by


class LocalQuadratic:
    """Values and slopes of the quadratics fitted over a moving window.

    Args:
        t: increasing times (T,).
        window: odd number of points, from 3 to T.
    """

    def __init__(self, t: Float[np.ndarray, " T"], window: int) -> None:
        self.window, self.n = window, len(t)
        self.uniform = is_uniform(t)
        if self.uniform:
            half, step = window // 2, (t[-1] - t[0]) / (self.n - 1)
            at = (np.arange(window) - half) / half
            powers = np.stack([at**0, at, at**2], axis=1)
            self._coefficients = np.linalg.pinv(powers)  # of the quadratic, from the points of a window
            rise = np.stack([0 * at, at**0, 2 * at], axis=1)
            self._readout = (powers, rise / (half * step))
        else:
            start = np.clip(np.arange(self.n) - window // 2, 0, self.n - window)
            index = start[:, None] + np.arange(window)
            offset = t[index] - t[:, None]
            scale = np.abs(offset).max(axis=1, keepdims=True)
            fits = np.linalg.pinv((offset / scale)[..., None] ** np.arange(3))
            self._sparse = [_banded(fits[:, 0], index), _banded(fits[:, 1] / scale, index)]

    def value(self, y: Float[np.ndarray, "*b T"]) -> Float[np.ndarray, "*b T"]:
        """The fitted values at every time."""
        return self._apply(y, 0)

    def slope(self, y: Float[np.ndarray, "*b T"]) -> Float[np.ndarray, "*b T"]:
        """The slopes of the fits at every time."""
        return self._apply(y, 1)

    def leverage(self) -> Float[np.ndarray, " T"]:
        """The weight of each point in its own fitted value."""
        if not self.uniform:
            return self._sparse[0].diagonal()
        half = self.window // 2
        own = np.einsum("wc,cw->w", self._readout[0], self._coefficients)
        out = np.full(self.n, own[half])
        out[:half], out[self.n - half :] = own[:half], own[half + 1 :]
        return out

    def _apply(self, y: np.ndarray, kind: int) -> np.ndarray:
        if not self.uniform:
            flat = y.reshape(-1, self.n)
            return np.ascontiguousarray((self._sparse[kind] @ flat.T).T).reshape(y.shape)
        from scipy.fft import irfft, next_fast_len, rfft

        readout = self._readout[kind]
        half, size = self.window // 2, next_fast_len(self.n + self.window - 1, real=True)
        origin = y[..., :1]  # slopes do not see a constant, and the transform rounds relative to the largest value
        product = np.asarray(rfft(y - origin, size)) * np.asarray(
            rfft((readout[half] @ self._coefficients)[::-1], size)
        )
        out = np.asarray(irfft(product, size))[..., half : half + self.n]
        if kind == 0:
            out = out + origin
        out[..., :half] = y[..., : self.window] @ self._coefficients.T @ readout[:half].T
        out[..., self.n - half :] = y[..., self.n - self.window :] @ self._coefficients.T @ readout[half + 1 :].T
        return out


def is_uniform(t: Float[np.ndarray, " T"]) -> bool:
    """Whether the times are evenly spaced, up to rounding."""
    steps = np.diff(t)
    return bool(np.ptp(steps) <= 1e-6 * steps.mean() + 4 * np.spacing(np.abs(t).max()))


def _banded(weights: Float[np.ndarray, "T w"], index: np.ndarray) -> csr_array:
    from scipy.sparse import csr_array

    n, width = weights.shape
    return csr_array((weights.ravel(), index.ravel(), np.arange(0, n * width + 1, width)), shape=(n, n))


def candidates(n: int) -> list[int]:
    """Odd windows from 5 to half of n points, about 1.5 times apart; 3 where 5 would be more than half."""
    windows, width = [], float(SMALLEST)
    while round(width) <= n // 2:
        windows.append(2 * (round(width) // 2) + 1)
        width *= 1.5
    return sorted({w for w in windows if w <= n // 2}) or [3]


def choose_window(
    t: Float[np.ndarray, " T"], series: Float[np.ndarray, "m T"], draws: Sequence[Float[np.ndarray, "b T"]] = ()
) -> int:
    """The window for slopes of these series, from the data (the method of Lepski).

    It is the largest whose slopes differ from those of every smaller window by no more than the smaller one's own
    noise. That noise is the spread over bootstrap draws of the same series, right for noise of any memory in time;
    without draws it is judged by how unevenly the slopes of neighbouring windows follow each other.

    Args:
        t: times.
        series: the series.
        draws: for each series, resampled versions of it.

    Returns:
        An odd number of points, at most half of them.
    """
    windows = candidates(len(t))
    if windows == [3]:
        return 3
    fits = [LocalQuadratic(t, w) for w in windows]
    slopes = [fit.slope(series) for fit in fits]
    if len(draws):
        stacked = np.stack(draws)  # (m, b, T)
        noises = [fit.slope(stacked).var(axis=1, ddof=1) for fit in fits]
    else:
        noises = _slope_noise(slopes, windows)
    chosen = 0
    for larger in range(1, len(windows)):
        margin = windows[larger] // 2  # before and after, the windows are cut short by the ends
        inside = slice(margin, len(t) - margin)
        if any(
            _differs(
                slopes[larger][:, inside], slopes[v][:, inside], np.broadcast_to(noises[v], series.shape)[:, inside]
            )
            for v in range(larger)
        ):
            break
        chosen = larger
    return windows[chosen]


def _differs(one: np.ndarray, other: np.ndarray, noise: np.ndarray) -> bool:
    """Whether two slopes differ by more than the noise of the second, on average over time."""
    floor = (1e-9 * np.abs(other).max(axis=1, keepdims=True)) ** 2 + np.finfo(float).tiny
    return bool((((one - other) ** 2) / (noise + floor)).mean(axis=1).max() > 1.5)


def _slope_noise(slopes: list[np.ndarray], windows: list[int]) -> list[np.ndarray]:
    """Variance of the slopes of each window, from fourth differences between windows that do not overlap.

    Fourth differences of a smooth slope vanish, and windows beside each other carry noise of any memory. Windows too
    wide for five of them in the series continue the trend of the narrower ones.
    """
    noises: list[np.ndarray] = []
    for slope, window in zip(slopes, windows, strict=True):
        n = slope.shape[1] - 4 * window
        if n > 0:
            parts = [slope[:, i * window : i * window + n] for i in range(5)]
            fourth = parts[0] - 4 * parts[1] + 6 * parts[2] - 4 * parts[3] + parts[4]
            noises.append((np.median(np.abs(fourth), axis=1, keepdims=True) / 0.6745) ** 2 / 70)
        elif len(noises) > 1:
            noises.append(noises[-1] * np.minimum(1, noises[-1] / np.maximum(noises[-2], np.finfo(float).tiny)))
        else:
            noises.append(noises[-1] if noises else np.zeros((len(slope), 1)))
    return noises


def check_window(window: int, n: int, name: str) -> int:
    """A window given by the user.

    Raises:
        InputError: when it is even, below 3 or more than half of the series.
    """
    if window != int(window) or window < 3 or window % 2 == 0 or window > n // 2:
        raise InputError(
            expected=f"{name}: an odd number of points, from 3 to half of the {n} times",
            got=str(window),
            do="choose another, or leave it out: it is then chosen from the data",
        )
    return int(window)
