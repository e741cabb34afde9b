"""Estimation of the LE-SDE from real training: A, B, alpha and beta of both models, with intervals (spec lesde 3).

A(t) and B(t) are the integrals of alpha and beta since the baseline. They are read off how much the modes of the class
means have grown, alpha and beta are their local slopes, and whole trials are resampled for the intervals.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float

from local_elasticity.base.checks import (
    as_numbers,
    check_choice,
    check_fraction,
    check_seed,
    check_whole,
)
from local_elasticity.base.drawing import drawn
from local_elasticity.base.errors import IdentifiabilityWarning, InputError
from local_elasticity.lesde import published
from local_elasticity.lesde.estimation.comparison import Comparison, HeldOut, compare, held_out
from local_elasticity.lesde.estimation.estimators import Estimator, get_estimator
from local_elasticity.lesde.estimation.fit import QUANTITIES, Estimates, Kind, Model, Series, filled
from local_elasticity.lesde.estimation.observations import Missing, Observations, observe
from local_elasticity.lesde.estimation.resampling import percentiles
from local_elasticity.lesde.estimation.smoothing import LocalQuadratic, check_window, choose_window
from local_elasticity.lesde.estimation.verdict import Verdict, judge

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLEAR, DRIFTING = 50.0, 3.0  # signal to noise at which one step is baseline enough; drift in standard errors
WEAK, FLOOR = 5.0, 3.0  # signal to noise under which a baseline, and a mode, are called weak
_AT_ONCE = 1 << 17  # numbers of resampled features at a time: they stay in the cache
_KEPT = 1 << 25  # of which so many are kept, so that they are drawn once only
_PILOT = 12  # draws by which windows are chosen and noise is judged


@dataclass(frozen=True, eq=False)
class Fit(Estimates):
    """What training says of the LE-SDE.

    Attributes:
        model: "logits" or "isotropic".
        estimator: "defined", or "published" (the authors' code).
        t: times (T,).
        A: integral of alpha since the baseline, never smoothed.
        B: the same of beta.
        alpha: impact within a class per unit of time (with the 1/K of the equation left out, as the paper writes it).
        beta: impact between classes.
        intervals: (low, high) of "A", "B", "alpha", "beta" and "gap" (alpha - beta).
        no_interval: why the intervals are NaN; empty when they are not.
        confidence: their coverage.
        window: points of the local quadratic fits that give alpha and beta.
        baseline_window: steps of which the baseline is the mean.
        baseline_time: the mean of their times, at which A = B = 0.
        signal_to_noise: of the baseline of each mode.
        signs: of each mode (T,): against the wrong label (-1) for the gap of the L-model, against the baseline else.
        within_variance: (T, K) variance of samples about their class mean, per coordinate; NaN where it is unknown.
        sigma2: (T,) its slope, the noise of the LE-SDE per unit of time; NaN where it is unknown.
        warnings: what cannot be told from these data, in words.
        observations: the data.
        n_boot: resamples.
        seed: of the resampling.
    """

    def verdict(self) -> Verdict:
        """Whether the classes are going to be separable, in words: yes, no, or undecided at this length, and why."""
        return judge(self)

    def compare(
        self, observed: Any = None, *, rates: Literal["exact", "smooth"] = "smooth", **options: Any
    ) -> Comparison:
        """How the model that was estimated agrees with class means (T, K, p) at the same times; see ``comparison``.

        Args:
            observed: class means; those of the fit by default.
            rates: as in ``to_sde``.
            options: ``sd``, ``n``, ``coordinate``, ``last``, as ``comparison.compare`` takes them.
        """
        values = self.class_means if observed is None else as_numbers("observed", observed)
        error = self.observations.standard_error() if observed is None else None
        return compare(self.to_sde(rates=rates), self.t, values, self.observations, error, **options)

    def held_out(self, folds: int = 5, seed: int = 0) -> dict[str, HeldOut]:
        """Error of each model on trials (or, without trials, on times) that it was not estimated from."""
        return held_out(self, estimate, folds=folds, seed=seed)

    def plot(self) -> Figure:
        """A and B, alpha and beta, with their bands."""
        return drawn("estimation.rate_curves", self)


def estimate(
    class_means: Any = None,
    t: Any = None,
    model: Model = "logits",
    *,
    logits: Any = None,
    labels: Any = None,
    trial: Any = None,
    estimator: Kind = "defined",
    baseline_window: int | None = None,
    window: int | str | None = None,
    missing: Missing = "raise",
    within_variance: Any = None,
    n_boot: int = 200,
    confidence: float = 0.95,
    seed: int = 0,
) -> Fit:
    """Estimate alpha(t), beta(t) and their integrals from the class means of training.

    Args:
        class_means: (T, K, p) one path, or (trials, T, K, p); a cell that was not seen is NaN.
        t: times (T,), increasing, 0, 1, 2, … unless given.
        model: "logits" (the features are the K logits) or "isotropic".
        logits: instead of class means, (T, trials, K) logits of the sample that each trial trained on.
        labels: (T, trials) their labels.
        trial: (N,) trial of each row, when logits (N, K), labels (N,) and t (N,) are the rows of a log.
        estimator: "defined", or "published": the authors' formulas number for number (K = 3 for "logits").
        baseline_window: steps of which the baseline is the mean. By default as many as show no drift; one where one
            step stands clear of its noise; always one as published.
        window: odd number of points of the local slopes, or "geomnist" (151), "cifar" (551), "simulation" (21) as
            published; chosen from the data by default.
        missing: "raise" or "interpolate" (in time) when no trial saw a class at a step.
        within_variance: (T,) or (T, K) variance of samples about their class mean, where the data do not tell it.
        n_boot: resamples of the trials; 0 for no intervals.
        confidence: coverage of the intervals.
        seed: of the resampling.

    Returns:
        The fit.

    Raises:
        InputError: for shapes that do not fit, NaN in the log, times that do not increase, or K = 1.
    """
    check_choice("model", model, Model)
    check_choice("estimator", estimator, Kind)
    n_boot, seed = check_whole("n_boot", n_boot, 0), check_seed("seed", seed)
    confidence = check_fraction("confidence", confidence)
    check_whole("baseline_window", baseline_window, or_none=True)
    data = observe(class_means, t, logits=logits, labels=labels, trial=trial, missing=missing)
    K, T = data.n_classes, len(data.t)
    rule = get_estimator(model, estimator, K, data.class_means.shape[2])
    width = _given_window(window, T)
    no_interval = _no_interval(data, n_boot)
    features = rule.of_cells(data.class_means)
    drawn = pilot = None
    if data.n_trials > 1:
        whole = n_boot * features.size <= _KEPT
        drawn = _resampled(data, rule, _weights(data.n_trials, max(int(n_boot), _PILOT) if whole else _PILOT, seed))
        pilot, drawn = drawn[:_PILOT], drawn if whole and not no_interval else None
    if baseline_window is None:
        base = 1 if estimator == "published" else _baseline_window(rule, features, pilot)
    else:
        base = _given_baseline(baseline_window, T)
    start = features[:base].mean(axis=0, keepdims=True)
    A, B = (_finite(x) for x in rule.rates(features, start))
    draws = None
    if any(_absent(v, start) for v in rule.modes(start)):
        A, B = np.full(T, np.nan), np.full(T, np.nan)
        no_interval = no_interval or "a mode is 0 at the baseline"
    if not no_interval:
        draws = _bootstrap(data, rule, base, int(n_boot), seed, start, drawn)
    if width is None:
        width = choose_window(
            data.t, filled(np.stack([A, B]), data.t), () if draws is None else [x[:_PILOT] for x in draws]
        )
    smooth = LocalQuadratic(data.t, width)
    alpha, beta = smooth.slope(filled(np.stack([A, B]), data.t))
    found = {"A": A, "B": B, "alpha": alpha, "beta": beta, "gap": alpha - beta}
    variance = _within_variance(data, within_variance)
    notes, signs, clarity = _identifiability(rule, features, start, base, pilot, data, model)
    for note in notes:
        warnings.warn(note, IdentifiabilityWarning, stacklevel=2)
    return Fit(
        model=model,
        estimator=estimator,
        t=data.t,
        A=A,
        B=B,
        alpha=alpha,
        beta=beta,
        intervals=_intervals(found, draws, smooth, confidence, data.n_trials),
        no_interval=no_interval,
        confidence=confidence,
        window=width,
        baseline_window=base,
        baseline_time=float(data.t[:base].mean()),
        signal_to_noise=clarity,
        signs=signs,
        within_variance=variance,
        sigma2=_noise(data.t, variance, smooth),
        warnings=tuple(notes),
        observations=data,
        n_boot=int(n_boot),
        seed=seed,
        _draws=draws,
    )


# --- resampling --------------------------------------------------------------------------------------------------


def _no_interval(data: Observations, n_boot: int) -> str:
    if data.n_trials == 0:
        return "intervals need trials: pass (trials, T, K, p), or logits and labels"
    if data.n_trials == 1:
        return "intervals need at least two trials"
    return "" if n_boot >= 2 else "intervals need resamples: n_boot of at least 2"


def _weights(trials: int, n_boot: int, seed: int) -> Float[np.ndarray, "n_boot trials"]:
    """How often every resample draws each trial."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(trials, np.full(trials, 1 / trials), size=n_boot).astype(float)


def _stretches(data: Observations, n_boot: int, per_step: int, stop: int) -> list[tuple[int, int]]:
    size = max(1, _AT_ONCE // ((n_boot + data.n_trials) * per_step))
    return [(begin, min(begin + size, stop)) for begin in range(0, stop, size)]


def _means_of(data: Observations, rule: Estimator, weights: np.ndarray, begin: int, end: int) -> np.ndarray:
    """Features of the resampled class means from step begin to end, NaN where a resample saw none."""
    values, seen = data.contributions(rule.of_cells, rule.of_samples, begin, end)
    sums = (weights @ values.reshape(len(values), -1)).reshape(len(weights), *values.shape[1:])
    if seen is None:
        return sums / data.n_trials
    counts = weights.astype(np.float32) @ seen.reshape(len(seen), -1)  # whole numbers: single precision is exact
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.repeat(1 / counts.astype(np.float64), sums.shape[-1], axis=-1)
        np.multiply(sums, share.reshape(sums.shape), out=sums)
    return sums


def _resampled(data: Observations, rule: Estimator, weights: np.ndarray, stop: int | None = None) -> np.ndarray:
    """Features of the resampled class means at the first ``stop`` steps."""
    stop = len(data.t) if stop is None else stop
    per_step = data.class_means.shape[1] * data.class_means.shape[2]
    parts = _stretches(data, len(weights), per_step, stop)
    first = _means_of(data, rule, weights, *parts[0])
    if len(parts) == 1:
        return first
    out = np.empty((len(weights), stop, *first.shape[2:]))
    out[:, : parts[0][1]] = first
    for begin, end in parts[1:]:
        out[:, begin:end] = _means_of(data, rule, weights, begin, end)
    return out


def _bootstrap(
    data: Observations,
    rule: Estimator,
    base: int,
    n_boot: int,
    seed: int,
    otherwise: np.ndarray,
    drawn: np.ndarray | None = None,
) -> tuple[Float[np.ndarray, "n_boot T"], Float[np.ndarray, "n_boot T"]]:
    """A and B of every resample of the trials; steps that a resample left empty are filled in time.

    A class that a resample does not have in the baseline keeps that of all trials (``otherwise``). ``drawn`` are the
    features of the resamples, where they were kept.
    """
    weights = _weights(data.n_trials, n_boot, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        first = _resampled(data, rule, weights, base) if drawn is None else drawn[:n_boot, :base]
        start = np.nanmean(first, axis=1, keepdims=True)
    start = np.where(np.isnan(start), otherwise, start)
    draws = np.empty((2, n_boot, len(data.t)))
    per_step = data.class_means.shape[1] * data.class_means.shape[2]
    for begin, end in _stretches(data, n_boot, per_step, len(data.t)):
        part = _means_of(data, rule, weights, begin, end) if drawn is None else drawn[:n_boot, begin:end]
        draws[:, :, begin:end] = rule.rates(part, start)
    draws = _finite(draws)
    draws = draws[:, ~np.isnan(draws).all(axis=(0, 2))]  # a resample of one trial only never has all classes
    if draws.shape[1] < 2:
        draws = np.full((2, 2, len(data.t)), np.nan)
    A, B = (filled(x, data.t) for x in draws)
    return A, B


def _intervals(
    found: dict[str, Series], draws: tuple[np.ndarray, np.ndarray] | None, smooth: LocalQuadratic, *how: Any
) -> dict[str, tuple[Series, Series]]:
    """Intervals of A, B, alpha, beta and the gap, from the draws of A and B."""
    if draws is None:
        nothing = np.full(smooth.n, np.nan)
        return dict.fromkeys(QUANTITIES, (nothing, nothing))
    alpha, beta = (smooth.slope(x) for x in draws)
    drawn = (*draws, alpha, beta, alpha - beta)
    return {name: percentiles(x, found[name], *how) for name, x in zip(QUANTITIES, drawn, strict=True)}


# --- windows -----------------------------------------------------------------------------------------------------


def _given_window(window: int | str | None, T: int) -> int | None:
    if window is None:
        return None
    if isinstance(window, str):
        if window not in published.WINDOWS:
            raise InputError(
                expected=f"a window: a number of points or {sorted(published.WINDOWS)}",
                got=repr(window),
                do="choose one of them",
            )
        window = published.WINDOWS[window]
    return check_window(window, T, "window")


def _given_baseline(width: int, T: int) -> int:
    if width != int(width) or not 1 <= width <= T // 2:
        raise InputError(
            expected=f"baseline_window: from 1 to half of the {T} times",
            got=str(width),
            do="choose another, or leave it out: it is then chosen from the data",
        )
    return int(width)


def _baseline_window(rule: Estimator, features: np.ndarray, pilot: np.ndarray | None) -> int:
    """Steps to average for a baseline: an eighth of the longest beginning whose halves show no drift.

    Over an eighth the drift that went unnoticed is small beside the noise. Where one step stands clear of its noise
    there is nothing to average.
    """
    T = len(features)
    modes = rule.modes(features)
    drawn = None if pilot is None else rule.modes(pilot)
    if all(_clarity(v, None if drawn is None else drawn[i], 1) >= CLEAR for i, v in enumerate(modes)):
        return 1
    longest = 1
    while 2 * longest <= T:
        half = longest
        for i, v in enumerate(modes):
            drift = _halves(v, half)
            if drawn is None:
                size = float(np.linalg.norm(v[:half].mean(axis=0)))
                noise = _serial_noise(v[: max(16, 2 * half)], size) * np.sqrt(2 / half)
            else:
                noise = np.sqrt(np.nanvar(_halves(drawn[i], half), axis=0, ddof=1).sum())
            if np.linalg.norm(drift) > DRIFTING * noise:
                return max(1, longest // 8)
        longest *= 2
    return max(1, min(longest // 8, T // 2))


def _halves(v: np.ndarray, half: int) -> np.ndarray:
    """Second half minus first half of the beginning; NaN where a resample lacks one of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.nanmean(v[..., half : 2 * half, :], axis=-2) - np.nanmean(v[..., :half, :], axis=-2)


def _serial_noise(v: Float[np.ndarray, "n d"], size: float) -> float:
    """Size of the noise of one step where the path has this size, from third differences, which a smooth path lacks.

    They are taken relative to the length of the path there: one that grows fast is not noisy.
    """
    third = np.diff(v, n=3, axis=0)
    if not len(third):
        return 0.0
    local = np.linalg.norm(v, axis=1)[1:-2, None]
    third = np.divide(size * third, local, out=np.zeros_like(third), where=local > 0)
    return float(np.sqrt(((np.median(np.abs(third), axis=0) / 0.6745) ** 2 / 20).sum()))


def _clarity(v: Float[np.ndarray, "T d"], drawn: Float[np.ndarray, "b T d"] | None, base: int) -> float:
    """Signal to noise of a mode's baseline: its length over the length of its standard error."""
    scale = np.abs(v[:base]).max()
    if scale == 0:
        return 0.0
    signal = float(np.linalg.norm(v[:base].mean(axis=0) / scale))
    if drawn is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            noise = np.sqrt(np.nanvar(np.nanmean(drawn[:, :base], axis=1) / scale, axis=0, ddof=1).sum())
    else:
        noise = _serial_noise(v[: max(16, base)] / scale, signal) / np.sqrt(base)
    if signal == 0:
        return 0.0
    return float(signal / noise) if noise > 0 else float("inf")


def _absent(v: np.ndarray, features: np.ndarray) -> bool:
    """Whether a mode is nothing but rounding."""
    return bool(np.abs(v).max() <= 1e-14 * np.abs(features).max())


# --- what cannot be told -----------------------------------------------------------------------------------------


def _identifiability(
    rule: Estimator,
    features: np.ndarray,
    start: np.ndarray,
    base: int,
    pilot: np.ndarray | None,
    data: Observations,
    model: str,
) -> tuple[list[str], dict[str, Series], dict[str, float]]:
    """Warnings in words, the sign of each mode through time, and the clarity of its baseline."""
    notes, signs, clarity = [], {}, {}
    drawn = (None, None) if pilot is None else rule.modes(pilot)
    for name, v, v0, d in zip(rule.mode_names, rule.modes(features), rule.modes(start), drawn, strict=True):
        clear = clarity[name] = 0.0 if _absent(v0, start) else _clarity(v, d, base)
        own = model == "logits" and name == "A - B"
        sign = signs[name] = np.sign(v[:, 0] if own else v @ (v0[0] / max(np.abs(v0).max(), 1e-300)))
        if clear == 0:
            notes.append(f"the mode of {name} is 0 at the baseline: its growth, and with it A and B, cannot be told")
            continue
        if clear < WEAK:
            notes.append(
                f"the mode of {name} starts near zero ({clear:.1f} times its noise over {base} steps): "
                "A and B carry an unknown constant offset"
            )
        if own and v0[0, 0] < 0:
            notes.append("class means start on the side of the wrong labels (the mode of A - B is negative)")
        first = np.sign(v0[0, 0]) if own else 1.0
        tail = sign[-max(1, len(sign) // 10) :]
        if (tail * first < 0).mean() > 0.5:
            notes.append(f"the mode of {name} has changed its sign by the end: the model cannot, and |·| hides it")
        if d is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                noise = np.sqrt(np.nanvar(d, axis=0, ddof=1).sum(axis=1))
            lost = np.linalg.norm(v, axis=1) < FLOOR * noise
            lost[:base] = False
            if lost.mean() > 0.05:
                where = data.t[np.flatnonzero(lost)[-1]]
                notes.append(
                    f"the mode of {name} is lost in noise at {lost.mean():.0%} of the times (last at t = {where:g}): "
                    "A and B are not to be trusted there"
                )
    notes += _centring(data, model)
    if len(data.filled):
        total = data.class_means.shape[0] * data.class_means.shape[1]
        notes.append(f"{len(data.filled)} of {total} (step, class) cells were empty and are interpolated in time")
    return notes, signs, clarity


def _centring(data: Observations, model: str) -> list[str]:
    """A note where rows of the class means are not centred, which the L-model neither needs nor moves."""
    if model != "logits":
        return []
    rows = data.class_means.mean(axis=2)
    size = np.sqrt((data.class_means**2).mean())
    if size == 0 or np.sqrt((rows**2).mean()) < 0.02 * size:
        return []
    moved = np.sqrt(((rows - rows[0]) ** 2).mean()) / size
    return [
        f"rows of the class means are not centred (their mean is {np.sqrt((rows**2).mean()) / size:.0%} of their size"
        + (f", and moves by {moved:.0%}, which the L-model cannot" if moved > 0.02 else "")
        + "): they were centred; the published estimator would err"
    ]


# --- small things ------------------------------------------------------------------------------------------------


def _finite(x: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(x), x, np.nan)


def _within_variance(data: Observations, given: Any) -> Float[np.ndarray, "T K"]:
    shape = data.class_means.shape[:2]
    if given is None:
        return data.within_variance()
    variance = as_numbers("within_variance", given)
    if variance.shape == shape[:1]:
        variance = np.broadcast_to(variance[:, None], shape)
    if variance.shape != shape or not np.isfinite(variance).all() or (variance < 0).any():
        raise InputError(
            expected=f"within_variance of shape {shape[:1]} or {shape}, finite and at least 0",
            got=f"shape {variance.shape}" if variance.shape != shape else "negative numbers or NaN",
            do="pass the variance of samples about their class mean, per coordinate",
        )
    return variance


def _noise(t: Series, variance: Float[np.ndarray, "T K"], smooth: LocalQuadratic) -> Series:
    """sigma^2: slope of the within-class variance, which noise can only raise: of its closest increasing series."""
    known = np.isfinite(variance).any(axis=1)
    if known.sum() < 2:
        return np.full(len(t), np.nan)
    from scipy.optimize import isotonic_regression

    pooled = np.full(len(t), np.nan)
    pooled[known] = np.nanmean(variance[known], axis=1)
    return smooth.slope(np.asarray(isotonic_regression(filled(pooled[None], t)[0])["x"]))
