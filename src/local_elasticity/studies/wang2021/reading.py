"""What the second paper's studies read off a record: estimates, class means, separation, crossings of a level."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int64

from local_elasticity.base.errors import IdentifiabilityWarning
from local_elasticity.lesde.estimation.estimate import Fit, estimate
from local_elasticity.lesde.estimation.tail import TailMethod, exponents
from local_elasticity.studies.wang2021.trainings import Record

Source = Literal["probes", "log"]
METHODS: tuple[TailMethod, ...] = ("official", "loglog", "dyadic")
BOOTSTRAPS = 200
RISE = {"geomnist": (1000.0, 3000.0), "cifar10": (3500.0, 8000.0)}
"""Where the published curves of alpha are large."""


class Seen(NamedTuple):
    """A number and its 95 % interval."""

    value: float
    low: float
    high: float

    def words(self, digits: int = 3) -> tuple[str, str]:
        """The number, and the interval."""
        return f"{self.value:.{digits}g}", f"[{self.low:.{digits}g}, {self.high:.{digits}g}]"


def mean_of(values: Float[np.ndarray, " replicas"]) -> Seen:
    """Mean over replicas with Student's interval."""
    from scipy.special import stdtrit

    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return Seen(mean, float("nan"), float("nan"))
    reach = float(-stdtrit(n - 1, 0.025) * np.std(values, ddof=1) / np.sqrt(n))
    return Seen(mean, mean - reach, mean + reach)


def band_of(values: Float[np.ndarray, "replicas ..."]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over replicas with Student's interval, at every time."""
    from scipy.special import stdtrit

    n, mean = len(values), values.mean(axis=0)
    if n < 2:
        return mean, np.full(mean.shape, np.nan), np.full(mean.shape, np.nan)
    reach = -stdtrit(n - 1, 0.025) * values.std(axis=0, ddof=1) / np.sqrt(n)
    return mean, mean - reach, mean + reach


def of_draws(value: float, draws: Float[np.ndarray, " b"]) -> Seen:
    """A number with the percentiles of its resamples; no interval where a tenth of them are undefined."""
    known = draws[np.isfinite(draws)]
    if len(known) < 0.9 * len(draws) or len(known) < 2:
        return Seen(value, float("nan"), float("nan"))
    low, high = np.quantile(known, [0.025, 0.975])
    return Seen(value, float(low), float(high))


# --- estimates -----------------------------------------------------------------------------------------------------


def fit(
    record: Record,
    model: Literal["isotropic", "logits"],
    source: Source = "probes",
    *,
    estimator: Literal["defined", "published"] = "defined",
    replicas: Int64[np.ndarray, " n"] | None = None,
    until: float | None = None,
    **options: Any,
) -> Fit:
    """Estimate alpha and beta from a record; its notes stand in ``fit.warnings``.

    Args:
        record: of a training.
        model: "isotropic" or "logits".
        source: "probes": class means of the fixed probe set in every network; "log": as published, the mean at each
            step over the networks whose sample has the class.
        estimator: "defined" or "published".
        replicas: positions among the sound replicas; all by default.
        until: leave out later times.
        options: of ``estimate``.
    """
    chosen = slice(None) if replicas is None else replicas
    if source == "probes":
        keep = record.probe_times <= (np.inf if until is None else until)
        variance = record.array("probe_variance")[keep][:, chosen].mean(axis=(1, 3))
        data: dict[str, Any] = {
            "class_means": record.probe_means[chosen][:, keep],
            "t": record.probe_times[keep],
            "within_variance": variance,
        }
    else:
        end = None if until is None else int(until) + 1
        data = {"logits": record.logits[:end, chosen], "labels": record.labels[:end, chosen], "missing": "interpolate"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", IdentifiabilityWarning)
        warnings.simplefilter("ignore", RuntimeWarning)
        data |= {"n_boot": BOOTSTRAPS} | options
        return estimate(model=model, estimator=estimator, **data)


def end_of(found: Fit, name: Literal["A", "B"]) -> Seen:
    """A or B at the last time."""
    low, high = found.intervals[name]
    return Seen(float(getattr(found, name)[-1]), float(low[-1]), float(high[-1]))


def value_at(found: Fit, name: Literal["A", "B"], t: float) -> Seen:
    """A or B at the time that is nearest."""
    at = int(np.abs(found.t - t).argmin())
    low, high = found.intervals[name]
    return Seen(float(getattr(found, name)[at]), float(low[at]), float(high[at]))


def gap_in(found: Fit, stretch: tuple[float, float]) -> Seen:
    """Average of alpha - beta over a stretch of time, as far as the record goes."""
    start, stop = max(stretch[0], found.t[0]), min(stretch[1], found.t[-1])
    if start >= stop:
        return Seen(float("nan"), float("nan"), float("nan"))
    return Seen(*found.average("gap", start, stop))


def late_share(found: Fit) -> Seen:
    """Average of alpha over the last tenth of the record, over its largest in a tenth, the first left out."""
    edges = np.abs(found.t[:, None] - np.linspace(found.t[0], found.t[-1], 11)).argmin(axis=0)
    draws = found.draws("A")
    rows = found.A[None] if draws is None else np.concatenate([found.A[None], draws])
    tenths = np.diff(rows[:, edges], axis=1) / np.diff(found.t[edges])
    shares = tenths[:, -1] / tenths[:, 1:].max(axis=1)
    return of_draws(float(shares[0]), shares[1:] if len(shares) > 1 else np.array([np.nan]))


def peak_of(found: Fit, start: float = 0.0) -> Seen:
    """Time at which alpha is largest after a time, with the quantiles over resamples."""
    late = found.t >= (start if start < found.t[-1] else found.t[0])
    inside = np.flatnonzero(late)[: max(1, late.sum() - found.window // 2)]
    draws = found.draws("alpha")
    peak = float(found.t[inside][np.argmax(found.alpha[inside])])
    if draws is None:
        return Seen(peak, float("nan"), float("nan"))
    return of_draws(peak, found.t[inside][np.argmax(draws[:, inside], axis=1)])


def tail_draws(
    found: Fit, method: TailMethod, quantity: Literal["alpha", "beta", "gap"] = "alpha"
) -> Float[np.ndarray, " b"]:
    """The exponent first, then those of the resamples."""
    A, B = found.draws("A"), found.draws("B")
    a, b = {"alpha": (1, 0), "beta": (0, 1), "gap": (1, -1)}[quantity]
    row = (a * found.A + b * found.B)[None]
    rows = row if A is None or B is None else np.concatenate([row, a * A + b * B])
    return exponents(found.t, rows, method=method, window=found.window)


# --- class means ---------------------------------------------------------------------------------------------------


def own_logit(means: Float[np.ndarray, "... K K"]) -> np.ndarray:
    """xbar: mean over classes of the logit of the own class."""
    return np.einsum("...kk->...", means) / means.shape[-1]


def simplex_mode(means: Float[np.ndarray, "... K K"]) -> np.ndarray:
    """Mean over classes of u_k . X^k: positive where class means lie on the side of their labels."""
    K = means.shape[-1]
    own = np.einsum("...kk->...k", means) - means.mean(axis=-1)
    return own.mean(axis=-1) / np.sqrt((K - 1) / K)


def separation(means: Float[np.ndarray, "... K p"], variance: Float[np.ndarray, "... K p"]) -> np.ndarray:
    """S: mean over pairs of log(squared distance of class means / variance within, per coordinate); spec lesde 3.5."""
    K = means.shape[-2]
    i, j = np.triu_indices(K, 1)
    gap = ((means[..., i, :] - means[..., j, :]) ** 2).sum(axis=-1)
    with np.errstate(divide="ignore"):
        return (np.log(gap) - np.log(variance.mean(axis=(-2, -1)))[..., None]).mean(axis=-1)


# --- crossings -----------------------------------------------------------------------------------------------------


def crossing(x: Sequence[float], y: Float[np.ndarray, "b x"], level: float) -> Float[np.ndarray, " b"]:
    """Where each row first crosses a level, linearly between points; NaN where it does not."""
    at = np.asarray(x, dtype=float)
    away = np.atleast_2d(y) - level
    found = np.full(len(away), np.nan)
    for row, values in enumerate(away):
        changed = np.flatnonzero(np.sign(values[:-1]) * np.sign(values[1:]) < 0)
        if len(changed):
            i = changed[0]
            found[row] = at[i] + (at[i + 1] - at[i]) * values[i] / (values[i] - values[i + 1])
    return found


def lowest(x: Sequence[float], y: Float[np.ndarray, "b x"]) -> Float[np.ndarray, " b"]:
    """Where each row is lowest: the vertex of the parabola through its lowest point and the two beside it."""
    at, rows = np.asarray(x, dtype=float), np.atleast_2d(y)
    found = np.full(len(rows), np.nan)
    for row, values in enumerate(rows):
        i = int(np.argmin(values))
        if 0 < i < len(at) - 1:
            a, b, _ = np.polyfit(at[i - 1 : i + 2], values[i - 1 : i + 2], 2)
            found[row] = float(np.clip(-b / (2 * a), at[i - 1], at[i + 1])) if a > 0 else at[i]
        else:
            found[row] = at[i]
    return found


def resampled_means(
    per_rate: Sequence[Float[np.ndarray, " replicas"]], seed: int = 0, repeats: int = BOOTSTRAPS
) -> Float[np.ndarray, "b rates"]:
    """Means over replicas: first those seen, then those of resampled replicas, each rate by itself."""
    rng = np.random.default_rng(seed)
    columns = []
    for values in per_rate:
        drawn = values[rng.integers(0, len(values), (repeats, len(values)))].mean(axis=1)
        columns.append(np.concatenate([[values.mean()], drawn]))
    return np.stack(columns, axis=1)
