"""Separability of classes under the LE-SDE: measured on sampled clouds, with the theory beside it.

Two classes are separable at t when a hyperplane has all samples of one on one side and all of the other on the other
(Zhang, Wang and Su 2021). Whether it happens as t grows is decided by R(t) = e^{2 G/K} / V(t): the squared gap of the
class means over the variance within, with G the integral of alpha - beta.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from local_elasticity.base.checks import (
    check_choice,
    check_flag,
    check_fraction,
    check_seed,
    check_whole,
)
from local_elasticity.base.drawing import drawn
from local_elasticity.base.errors import InputError
from local_elasticity.base.progress import Progress
from local_elasticity.lesde import exact
from local_elasticity.lesde.arrays import to_numpy
from local_elasticity.lesde.noise import root

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from local_elasticity.lesde.equation import Equation

Gamma = Literal["gap", "lambda_min"]
Times = Float[np.ndarray, " times"]
_WINDOW = 0.05  # of the tail exponent about 1, within which the critical scale decides


@dataclass(frozen=True, eq=False)
class Theory:
    """What the theory says, at the times asked for and in the limit.

    Attributes:
        t: times.
        gamma: which impact gap: "gap" (alpha - beta) or "lambda_min" (min of alpha - beta and alpha + (K-1) beta).
        gap: gamma(t).
        log_ratio: log R(t), signal over noise.
        tail_exponent: r of gamma ~ c t^-r over the last decade of t; NaN when gamma is not positive there.
        tail_scale: t · gamma at the last time: c where r = 1.
        critical_scale: K/2 times the growth exponent of the noise; c = K/2 for constant sigma.
        noise_exponent: of the variance within, V ~ t^this, over the last decade of t.
        random_labelling: C(2n, p): Cover's chance that 2n points of one cloud are split as labelled at random, which
            bounds the limit (b) from above.
        limit: "separable", "not separable" or "undecided".
        reason: why, in words.
    """

    t: Times
    gamma: Gamma
    gap: Times
    log_ratio: Times
    tail_exponent: float
    tail_scale: float
    critical_scale: float
    noise_exponent: float
    random_labelling: float
    limit: Literal["separable", "not separable", "undecided"]
    reason: str


@dataclass(frozen=True, eq=False)
class Separability:
    """Probability that classes are separable, over independent paths.

    Attributes:
        t: times.
        probability: that all pairs are, (T,).
        low: lower end of its binomial interval.
        high: its upper end.
        pairwise: share of paths in which a pair is separable, (T, K, K), NaN on the diagonal.
        pair_probability: mean of ``pairwise`` over pairs, (T,).
        n_paths: paths looked at.
        n_per_class: samples a class.
        confidence: of the interval.
        n_fast: pairs that the projection decided, out of ``n_pairs``.
        n_pairs: pairs looked at.
        theory: the theory beside it.
    """

    t: Times
    probability: Times
    low: Times
    high: Times
    pairwise: Float[np.ndarray, "times k k"]
    pair_probability: Times
    n_paths: int
    n_per_class: int
    confidence: float
    n_fast: int
    n_pairs: int
    theory: Theory

    def plot(self, **options: Any) -> Figure:
        """Probability over time, with log R beneath."""
        return drawn("sde.separability_figure", self, **options)


# --- two clouds --------------------------------------------------------------------------------------------------


def fast_separable(a: Float[np.ndarray, "n p"], b: Float[np.ndarray, "m p"]) -> bool:
    """Sufficient test: the clouds do not overlap along the difference of their means, plain or whitened."""
    gap = a.mean(axis=0) - b.mean(axis=0)
    if _splits(gap, a, b):
        return True
    within = np.cov(np.concatenate([a - a.mean(axis=0), b - b.mean(axis=0)]).T).reshape(a.shape[1], -1)
    whitened = np.linalg.lstsq(within, gap, rcond=None)[0] if np.isfinite(within).all() else gap
    return _splits(whitened, a, b)


def _splits(normal: np.ndarray, a: np.ndarray, b: np.ndarray) -> bool:
    return bool((a @ normal).min() > (b @ normal).max())


def separable(a: Any, b: Any) -> bool:
    """Is there a hyperplane between two clouds, (n, p) and (m, p)?

    The projections decide when they can; else the widest margin is found by linear programming (HiGHS) in coordinates
    that are centred and scaled, and its hyperplane is checked on the clouds.

    Args:
        a: points of one class.
        b: points of the other.

    Raises:
        InputError: for clouds of different dimensions, empty ones, or numbers that are not finite.
    """
    a, b = to_numpy(a, "a").astype(np.float64), to_numpy(b, "b").astype(np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or not a.size or not b.size:
        raise InputError(
            expected="two clouds (n, p) and (m, p)", got=f"shapes {a.shape} and {b.shape}", do="pass points as rows"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise InputError(expected="finite points", got="NaN or infinity", do="leave them out")
    return fast_separable(a, b) or programmed_separable(a, b)


def programmed_separable(a: Float[np.ndarray, "n p"], b: Float[np.ndarray, "m p"]) -> bool:
    """Linear programming: maximise d such that ν·a_i - c >= d, ν·b_j - c <= -d, |ν| <= 1 in rescaled coordinates."""
    from scipy.optimize import linprog

    points = np.concatenate([a, b])
    centre, spread = points.mean(axis=0), points.std(axis=0)
    a, b = ((x - centre) / np.where(spread > 0, spread, 1.0) for x in (a, b))
    p = a.shape[1]
    ones = [np.ones((len(x), 1)) for x in (a, b)]
    rows = np.concatenate(
        [np.concatenate([-a, ones[0], ones[0]], axis=1), np.concatenate([b, -ones[1], ones[1]], axis=1)]
    )
    bounds = [(-1, 1)] * p + [(None, None)] * 2
    found = linprog(
        np.append(np.zeros(p + 1), -1.0), A_ub=rows, b_ub=np.zeros(len(rows)), bounds=bounds, method="highs"
    )
    return bool(found.success) and _splits(found.x[:p], a, b)


def cover_probability(n_per_class: int, n_features: int) -> float:
    """Cover's count: the chance that 2n points in general position, each labelled by a coin, are linearly separable.

    C(2n, p) = 2^(1-2n) sum_{j<=p} binom(2n-1, j); it is 1 for 2n <= p + 1 and exponentially small in n for n > p.
    With exactly n labels of each kind, as in two clouds of n samples, fewer labellings are separable: this is an upper
    bound there (for p = 1 the chance is 2 / binom(2n, n)), and both tend to 0 alike.

    Args:
        n_per_class: n.
        n_features: p.

    Returns:
        The probability.

    Raises:
        InputError: for what are no whole numbers of at least 1.
    """
    from scipy.stats import binom

    n_per_class, n_features = check_whole("n_per_class", n_per_class), check_whole("n_features", n_features)
    return float(binom.cdf(n_features, 2 * n_per_class - 1, 0.5))


def binomial_interval(
    successes: Int[np.ndarray, " times"], trials: int, confidence: float = 0.95
) -> tuple[Times, Times]:
    """Clopper and Pearson's interval of a share."""
    from scipy.stats import beta

    tail = (1 - confidence) / 2
    low = np.where(successes > 0, beta.ppf(tail, np.maximum(successes, 1), trials - successes + 1), 0.0)
    high = np.where(successes < trials, beta.ppf(1 - tail, successes + 1, np.maximum(trials - successes, 1)), 1.0)
    return low, high


# --- over paths --------------------------------------------------------------------------------------------------


def clouds_at(
    sde: Equation, t: Times, n_per_class: int, n_paths: int, generator: np.random.Generator
) -> list[Float[np.ndarray, "paths k n p"]]:
    """Clouds at each time, from their law at that time, each divided by its own common factor against overflow."""
    k, p = sde.means.shape
    own = sde.acts_on == "own"
    mean, spread = exact.mean(sde, t), exact.covariance(sde, t, 1 if own else n_per_class)
    spent = exact.spent_noise(sde, t)
    scale = np.maximum(mean.log_scale, spread.log_scale / 2)
    found = []
    for at in range(t.size):
        shrink = np.exp(-2 * scale[at])
        centre = mean.values[at] * np.exp(mean.log_scale[at] - scale[at])
        r = root(spread.values[at]) * np.exp(spread.log_scale[at] / 2 - scale[at])
        if own:
            x = generator.standard_normal((n_paths, n_per_class, k * p)) @ r.T
            found.append(centre[:, None] + x.reshape(n_paths, n_per_class, k, p).transpose(0, 2, 1, 3))
            continue
        means = centre + (generator.standard_normal((n_paths, k * p)) @ r.T).reshape(n_paths, k, p)
        within = root((sde.initial_covariance + spent[at] * sde.noise.shape) * shrink)
        noise = generator.standard_normal((n_paths, k, n_per_class, p)) @ within.transpose(0, 2, 1)
        found.append(means[:, :, None] + noise - noise.mean(axis=2, keepdims=True))
    return found


def separability(
    sde: Equation,
    t: Any,
    n_per_class: int = 50,
    n_paths: int = 100,
    seed: int | np.random.Generator = 0,
    *,
    gamma: Gamma = "gap",
    confidence: float = 0.95,
    progress: bool = False,
) -> Separability:
    """Probability of separability at each time; see `LESDE.separability`."""
    times, _ = sde._times(t)
    n_per_class, n_paths = check_whole("n_per_class", n_per_class), check_whole("n_paths", n_paths)
    check_choice("gamma", gamma, Gamma)
    confidence = check_fraction("confidence", confidence)
    check_flag("progress", progress)
    says = theory(sde, times, n_per_class, gamma)
    generator = seed if isinstance(seed, np.random.Generator) else np.random.default_rng(check_seed("seed", seed))
    k = sde.n_classes
    pairs = list(itertools.combinations(range(k), 2))
    shares = np.full((times.size, k, k), np.nan)
    every = np.zeros(times.size, dtype=int)
    fast = 0
    with Progress(progress, times.size, "separability") as bar:
        for at in range(times.size):
            clouds = clouds_at(sde, times[at : at + 1], n_per_class, n_paths, generator)[0]
            split: Bool[np.ndarray, "paths pairs"] = np.zeros((n_paths, len(pairs)), dtype=bool)
            for path, (pair, (a, b)) in itertools.product(range(n_paths), enumerate(pairs)):
                quick = fast_separable(clouds[path, a], clouds[path, b])
                fast += quick
                split[path, pair] = quick or programmed_separable(clouds[path, a], clouds[path, b])
            for pair, (a, b) in enumerate(pairs):
                shares[at, a, b] = shares[at, b, a] = split[:, pair].mean()
            every[at] = split.all(axis=1).sum()
            bar.advance()
    low, high = binomial_interval(every, n_paths, confidence)
    return Separability(
        times,
        every / n_paths,
        low,
        high,
        shares,
        np.nanmean(shares, axis=(1, 2)),
        n_paths,
        n_per_class,
        confidence,
        fast,
        times.size * n_paths * len(pairs),
        says,
    )


# --- theory ------------------------------------------------------------------------------------------------------


def theory(sde: Equation, t: Any, n_per_class: int, gamma: Gamma = "gap") -> Theory:
    """R(t) and its limit, read from the last decade of the times.

    Args:
        sde: the model.
        t: times; the limit is read off between a tenth of the last and the last.
        n_per_class: n, for Cover's count.
        gamma: "gap" (alpha - beta, the default) or "lambda_min" (smallest eigenvalue of E, the reading of the paper for
            which positive semi-definite H bounds the growth from below).

    Raises:
        InputError: for blocks H of the user's own that are not positive semi-definite.
    """
    if gamma not in ("gap", "lambda_min"):
        raise InputError(expected='gamma "gap" or "lambda_min"', got=repr(gamma), do="choose one")
    if sde.drift.modes is None:
        _check_definite(sde)
    times, _ = sde._times(t)
    last = times.max()
    decade = sde.start + np.geomspace(max((last - sde.start) / 10, 1e-12), max(last - sde.start, 1e-11), 33)
    decade = decade.clip(max=max(last, sde.start))
    k = sde.n_classes
    log_ratio = _log_ratio(sde, times, gamma)
    gap, tail = _gap(sde, times, gamma), _gap(sde, decade, gamma)
    elapsed = np.log(decade - sde.start) if last > sde.start else np.zeros(33)
    noise_exponent = _slope(elapsed, np.log(_variance(sde, decade)))
    exponent = -_slope(elapsed, np.log(tail)) if (tail > 0).all() else np.nan
    scale = float(tail[-1] * (decade[-1] - sde.start))
    slope = _slope(elapsed, _log_ratio(sde, decade, gamma))
    limit, reason = _limit(exponent, scale, noise_exponent, slope, k)
    return Theory(
        times,
        gamma,
        gap,
        log_ratio,
        exponent,
        scale,
        k / 2 * noise_exponent,
        noise_exponent,
        cover_probability(n_per_class, sde.n_features),
        limit,
        reason,
    )


def _check_definite(sde: Equation) -> None:
    k, p = sde.means.shape
    h = sde.drift.blocks.transpose(0, 2, 1, 3).reshape(k * p, k * p)
    lowest, diagonal = float(np.linalg.eigvalsh((h + h.T) / 2).min()), float(np.diag(h).min())
    if lowest < -1e-9 * np.abs(h).max() or diagonal <= 0:
        raise InputError(
            expected="H positive semi-definite with a positive diagonal, which the separation theorem needs (Schur's "
            "product theorem then bounds the growth of E o H from below)",
            got=f"smallest eigenvalue of its symmetric part {lowest:.3g}, smallest diagonal entry {diagonal:.3g}",
            do="sample paths instead (sample and mean take any H), or change H",
        )


def _gap(sde: Equation, t: Times, gamma: Gamma) -> Times:
    a, b = sde.alpha(t), sde.beta(t)
    return a - b if gamma == "gap" else np.minimum(a - b, a + (sde.n_classes - 1) * b)


def _variance(sde: Equation, t: Times) -> Times:
    parts = [np.einsum("kpp->", c) / sde.means.size for c in (sde.initial_covariance, sde.noise.shape)]
    spent = exact.spent_noise(sde, t)
    return np.maximum(parts[0] + spent * parts[1], np.finfo(float).tiny)


def _log_ratio(sde: Equation, t: Times, gamma: Gamma) -> Times:
    """Log R(t): twice the growth exponent of the gap of class means, less the log of the variance within."""
    a, b, _ = exact.integral(sde, t)
    k = sde.n_classes
    if gamma == "lambda_min":
        growth = exact.gap_integral(sde, t)
    elif sde.drift.name == "logits":
        growth = np.maximum(a - b, a + b / (k - 1))
    else:
        growth = a - b
    if sde.acts_on == "own":  # noise is amplified like the signal: compare with the variance that this makes
        found = exact.covariance(sde, t, 1)
        amplified = np.log(np.einsum("tii->t", found.values) / sde.means.size) + found.log_scale
        return 2 * growth / k - amplified
    return 2 * growth / k - np.log(_variance(sde, t))


def _slope(x: Times, y: Times) -> float:
    if not np.isfinite(y).all() or np.ptp(x) == 0:
        return float("nan")
    return float(np.polyfit(x, y, 1)[0])


def _limit(
    exponent: float, scale: float, noise: float, slope: float, n_classes: int
) -> tuple[Literal["separable", "not separable", "undecided"], str]:
    critical = n_classes / 2
    dying = noise < _WINDOW
    if np.isnan(exponent):
        return "undecided", "gamma is not positive throughout the last decade of t: classes are not being pulled apart"
    tail = f"gamma ~ t^-{exponent:.2f} over the last decade of t"
    if dying:
        words = f"{tail}; the noise dies out (V ~ t^{noise:.2f}), so the 1/t threshold does not apply"
        return ("separable", words) if exponent < 1 - _WINDOW else ("undecided", words)
    if exponent < 1 - _WINDOW:
        return "separable", f"{tail}: slower than 1/t, R grows without bound (a)"
    if exponent > 1 + _WINDOW:
        return "not separable", f"{tail}: faster than 1/t, R tends to 0 (b)"
    words = f"gamma ~ c/t with c = {scale:.3g}, critical c = K/2 = {critical:g} (c)"
    if abs(slope) < _WINDOW:
        return "undecided", words
    return ("separable" if slope > 0 else "not separable"), words
