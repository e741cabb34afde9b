"""The phases of an S_rel curve: change points of log S_rel against log t, with a bootstrap over pairs or seeds.

Elastic: S_rel changes; inelastic: it has settled (arXiv 2111.01166, hypothesis 1.2; spec srel 2.0, 3.3). A broken line
with one to three knots is fitted to the log of the median curve; the last knot is where the inelastic phase begins.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from local_elasticity.base.checks import (
    as_numbers,
    check_choice,
    check_fraction,
    check_real,
    check_seed,
    check_text,
    check_whole,
)
from local_elasticity.base.errors import InputError
from local_elasticity.similarity.tables import weighted_medians

FLAT = 0.1  # |d log S_rel / d log t| below which S_rel counts as settled (spec srel 3.3)
LEVEL = 0.01  # of each of the two tests of a bend
POINTS, CANDIDATES, KNOTS = 60, 24, 3
LEAST_POINTS, LEAST_UNITS = 8, 5
SIMULATIONS = 1000
HALVINGS = 6
NO_STRUCTURE = 1e-3  # misfits of S_rel by 0.1 % are no reason for another knot

Curve = Float[np.ndarray, " T"]
Curves = Float[np.ndarray, "b T"]


@dataclass(frozen=True, eq=False)
class Phases:
    """What was found in a curve.

    Attributes:
        verdict: "two phases" (elastic, then inelastic) or "none".
        reason: why, in words.
        change_point: time at which the inelastic phase begins; NaN without phases.
        interval: its bootstrap interval; NaN without phases.
        onset: time at which the elastic phase begins: the first look, or the knot before the first segment that moves.
        slopes: d log S_rel / d log t of each segment of the broken line.
        knots: times between the segments; none where a straight line will do.
        final_slope_interval: bootstrap interval of the last slope.
        agreement: share of the resamples with the same verdict.
        change: S_rel at the end over S_rel at the onset.
        bend: (size of the largest bend, its critical value) over its standard error.
        over: what was resampled: "pairs" or "seeds".
        n_units: how many of them.
        times: where the curve was looked at.
        curve: median S_rel there.
        fitted: the broken line there.
    """

    verdict: Literal["two phases", "none"]
    reason: str
    change_point: float
    interval: tuple[float, float]
    onset: float
    slopes: tuple[float, ...]
    knots: tuple[float, ...]
    final_slope_interval: tuple[float, float]
    agreement: float
    change: float
    bend: tuple[float, float]
    over: str
    n_units: int
    times: Curve
    curve: Curve
    fitted: Curve

    def __str__(self) -> str:
        if self.verdict == "none":
            return f"no phases: {self.reason}"
        low, high = self.interval
        return f"elastic until t = {self.change_point:.4g} [{low:.4g}, {high:.4g}], then inelastic: {self.reason}"


def find_phases(
    times: Any,
    values: Any,
    *,
    over: str = "pairs",
    flat: float = FLAT,
    confidence: float = 0.95,
    n_boot: int = 300,
    seed: int = 0,
) -> Phases:
    """Find the elastic and the inelastic phase of S_rel.

    Two phases need a bend that neither the choice of units nor the roughness of the curve explains (each tested at
    1 %), an earlier slope above ``flat`` in size and a last slope below it, the latter two in the share ``confidence``
    of the resamples. Everything else is "none". An interval over pairs knows nothing of other seeds.

    Args:
        times: (T,) increasing; t = 0 is left out, it has no place on a logarithmic axis.
        values: (T, units) S_rel, or (T, sources, targets), whose two sides are then resampled independently. NaN is
            skipped.
        over: what the units are, in words: "pairs" or "seeds".
        flat: slope below which S_rel counts as settled.
        confidence: of the intervals, and the share of resamples that must agree.
        n_boot: resamples.
        seed: of the resamples.

    Raises:
        InputError: for fewer than 8 times, fewer than 5 units, times that do not increase, or no positive values.
    """
    flat, confidence = check_real("flat", flat, 0.0, above=True), check_fraction("confidence", confidence)
    n_boot, seed = check_whole("n_boot", n_boot, 2), check_seed("seed", seed)
    check_text("over", over)
    t, s = _checked(times, values)
    rng = np.random.default_rng(seed)
    u, bins = _bins(np.log(t))
    curve = _median_curves(s, np.ones((1, *s.shape[1:])), bins)[0]
    resampled = _median_curves(s, _resamples(s.shape[1:], n_boot, rng), bins)
    kept = np.isfinite(curve)
    if kept.sum() < LEAST_POINTS:
        raise InputError(
            expected=f"a positive median at {LEAST_POINTS} times or more",
            got=f"{int(kept.sum())}",
            do="S_rel is 0 or undefined for half of the pairs: choose other pairs",
        )
    u, curve, resampled = u[kept], curve[kept], resampled[:, kept]
    resampled = resampled[np.isfinite(resampled).all(1)]
    units = min(s.shape[1:])
    grid = np.linspace(u[0], u[-1], CANDIDATES + 2)[1:-1]
    statistic, critical, rough = _bend_tests(u, curve, resampled, grid, units, rng)
    straight = np.polyfit(u, curve, 1)
    tail = 50 * (1 - confidence)
    if statistic <= critical or rough:
        line = _resampled_slopes(u, resampled)
        knots, slopes, fitted = np.empty(0), straight[:1], np.polyval(straight, u)
        last, agreement, ends = np.percentile(line, [tail, 100 - tail]), 1.0, np.full(2, np.nan)
    else:
        knots, slopes, fitted = (v[0] for v in _broken_line(u, curve[None], grid))
        refit_knots, refit_slopes, _ = _broken_line(u, resampled, grid, len(knots))
        elastic = np.abs(refit_slopes[:, :-1]).max(1) > flat
        agreement = float((elastic & (np.abs(refit_slopes[:, -1]) < flat)).mean())
        last = np.percentile(refit_slopes[:, -1], [tail, 100 - tail])
        ends = np.percentile(refit_knots[:, -1], [tail, 100 - tail])
    reason, found = _judge(statistic, critical, slopes, agreement, flat, confidence)
    half = 0.5 * (grid[1] - grid[0])  # two knots closer than the grid cannot be told apart
    ends = ends + np.array([-half, half])
    moving = int(np.argmax(np.abs(slopes) > flat))
    onset = u[0] if moving == 0 else knots[moving - 1]
    nan = float("nan")
    return Phases(
        verdict="two phases" if found else "none",
        reason=reason,
        change_point=float(np.exp(knots[-1])) if found else nan,
        interval=(float(np.exp(ends[0])), float(np.exp(ends[1]))) if found else (nan, nan),
        onset=float(np.exp(onset)) if found else nan,
        slopes=tuple(float(v) for v in slopes),
        knots=tuple(float(np.exp(k)) for k in knots),
        final_slope_interval=(float(last[0]), float(last[1])),
        agreement=agreement,
        change=float(np.exp(fitted[-1] - np.interp(onset, u, fitted))),
        bend=(statistic, critical),
        over=over,
        n_units=int(np.prod(s.shape[1:])),
        times=np.exp(u),
        curve=np.exp(curve),
        fitted=np.exp(fitted),
    )


def _judge(
    statistic: float,
    critical: float,
    slopes: np.ndarray,
    agreement: float,
    flat: float,
    confidence: float,
) -> tuple[str, bool]:
    """The reason in words, and whether there are two phases."""
    words = ", ".join(f"{v:+.2f}" for v in slopes)
    if len(slopes) == 1:
        why = "the roughness of the curve" if statistic > critical else "the choice of units"
        kind = "flat" if abs(slopes[0]) < flat else "straight"
        return f"{kind}: slope {words} throughout, no bend that {why} does not explain", False
    if abs(slopes[-1]) >= flat:
        return f"it has not settled: slope {slopes[-1]:+.2f} at the end (slopes {words})", False
    if np.abs(slopes[:-1]).max() <= flat:
        return f"flat: no slope above {flat:g} (slopes {words})", False
    if agreement < confidence:
        return f"only {agreement:.0%} of the resamples agree on two phases (slopes {words})", False
    return f"slopes {words} of log S_rel against log t", True


def _checked(times: Any, values: Any) -> tuple[Curve, np.ndarray]:
    t, s = as_numbers("times", times), as_numbers("values", values)
    if t.ndim != 1 or s.ndim not in (2, 3) or len(s) != len(t):
        raise InputError(
            expected="times (T,) and values (T, units) or (T, sources, targets)",
            got=f"{t.shape} and {s.shape}",
            do="keep the times first",
        )
    if not np.isfinite(t).all() or (np.diff(t) <= 0).any() or t[0] < 0:
        raise InputError(expected="strictly increasing times of at least 0", got="others", do="sort them")
    if min(s.shape[1:]) < LEAST_UNITS:
        raise InputError(
            expected=f"at least {LEAST_UNITS} pairs (sources and targets each) or seeds to resample",
            got=f"{s.shape[1:]}",
            do="measure more probes, or repeat the training",
        )
    later = t > 0
    if later.sum() < LEAST_POINTS:
        raise InputError(
            expected=f"at least {LEAST_POINTS} times after 0",
            got=f"{int(later.sum())}",
            do="look more often: le.log_spaced(40, total=STEPS)",
        )
    if (s < 0).any():
        raise InputError(expected="S_rel of at least 0", got=f"{np.nanmin(s):g}", do="pass ratios, not logarithms")
    return t[later], s[later]


def _bins(u: Curve) -> tuple[Curve, list[np.ndarray]]:
    """Positions on the logarithmic axis, and which times are averaged there: at most 60, evenly spaced."""
    if len(u) <= POINTS:
        return u, [np.array([i]) for i in range(len(u))]
    edges = np.linspace(u[0], u[-1], POINTS + 1)
    where = np.clip(np.searchsorted(edges, u, side="right") - 1, 0, POINTS - 1)
    bins = [np.flatnonzero(where == i) for i in range(POINTS)]
    bins = [b for b in bins if len(b)]
    # 8,001 times need not all be looked at: at most 5 in each place
    bins = [b[np.linspace(0, len(b) - 1, min(len(b), 5)).astype(int)] for b in bins]
    return np.array([u[b].mean() for b in bins]), bins


def _resamples(shape: tuple[int, ...], n_boot: int, rng: np.random.Generator) -> np.ndarray:
    """How often every resample draws each unit; two sides are drawn independently."""
    sides = [rng.multinomial(n, np.full(n, 1 / n), size=n_boot).astype(float) for n in shape]
    return sides[0] if len(sides) == 1 else sides[0][:, :, None] * sides[1][:, None, :]


def _median_curves(s: np.ndarray, weights: np.ndarray, bins: list[np.ndarray]) -> Curves:
    """Log of the weighted median of every resample, averaged over the times of each place."""
    rows = weights.reshape(len(weights), -1)
    out = np.empty((len(rows), len(bins)))
    for i, times in enumerate(bins):
        logs = []
        for x in s[times].reshape(len(times), -1):
            used = np.isfinite(x)
            with np.errstate(divide="ignore"):
                logs.append(np.log(weighted_medians(x[used], rows[:, used])))
        out[:, i] = np.where(np.isfinite(logs), logs, np.nan).mean(0)
    return out


def _hinges(u: Curve, grid: np.ndarray) -> Float[np.ndarray, "g T"]:
    """Rows that turn a curve into the least-squares bend (change of slope) at each candidate."""
    rows = []
    line = np.stack([np.ones_like(u), u], 1)
    q, _ = np.linalg.qr(line)
    for knot in grid:
        h = np.maximum(u - knot, 0.0)
        h = h - q @ (q.T @ h)
        rows.append(h / (h @ h))
    return np.array(rows)


def _bend_tests(
    u: Curve, curve: Curve, resampled: Curves, grid: np.ndarray, units: int, rng: np.random.Generator
) -> tuple[float, float, bool]:
    """The largest bend over its standard error and its critical value over units; whether roughness explains it."""
    from scipy.stats import norm, t

    rows = _hinges(u, grid)
    bends, boot = rows @ curve, resampled @ rows.T
    error = boot.std(0, ddof=1)
    error = np.maximum(error, 1e-9 * np.abs(rows).sum(1))  # rounding, where all units are the same
    largest = np.abs((boot - bends) / error).max(1)
    # few units have fatter tails than a bootstrap of them shows
    fat = t.ppf(1 - LEVEL / 2, units - 1) / norm.ppf(1 - LEVEL / 2)
    critical = float(np.quantile(largest, 1 - LEVEL) * fat)
    # The curve's own roughness: noise that all units share. F of the best bend against independent noise.
    noise = rng.standard_normal((SIMULATIONS, len(u)))
    rough = _best_share(u, curve[None], rows)[0] <= np.quantile(_best_share(u, noise, rows), 1 - LEVEL)
    return float(np.abs(bends / error).max()), critical, bool(rough)


def _best_share(u: Curve, curves: Curves, rows: np.ndarray) -> np.ndarray:
    """Share of a straight line's squared residuals that the best bend explains."""
    q, _ = np.linalg.qr(np.stack([np.ones_like(u), u], 1))
    residuals = curves - (curves @ q) @ q.T
    explained = (residuals @ rows.T) ** 2 / (rows**2).sum(1)
    total = np.maximum((residuals**2).sum(1), 1e-24)
    return explained.max(1) / total


def _resampled_slopes(u: Curve, curves: Curves) -> np.ndarray:
    centred = u - u.mean()
    return curves @ centred / (centred @ centred)


def _broken_line(
    u: Curve, curves: Curves, grid: np.ndarray, n_knots: int | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Knots (b, k), slopes (b, k + 1) and values (b, T) of the best broken lines; k by BIC unless given."""
    counts = range(1, KNOTS + 1) if n_knots is None else [n_knots]
    best, found = np.inf, None
    for k in counts:
        fit = _with_knots(u, curves, grid, k)
        squares = ((curves - fit[2]) ** 2).sum()
        score = len(u) * np.log(max(squares / len(u), NO_STRUCTURE**2)) + (2 + 2 * k) * np.log(len(u))
        if score < best:
            best, found = score, fit
    assert found is not None
    return found


def _with_knots(u: Curve, curves: Curves, grid: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The least-squares broken lines with k knots: every choice of knots is projected on, the best is kept."""
    choices = np.array(list(combinations(grid, k)))
    choices = choices[_apart(u, choices)]
    projections = np.linalg.qr(_bases(u, choices))[0]
    explained = ((curves @ projections) ** 2).sum(2)  # (choices, b)
    knots = _refined(u, curves, choices[explained.argmax(0)], grid[1] - grid[0])
    bases = _bases(u, knots)
    fits = (np.linalg.pinv(bases) @ curves[:, :, None])[..., 0]
    return knots, np.cumsum(fits[:, 1:], axis=1), (bases @ fits[:, :, None])[..., 0]


def _bases(u: Curve, knots: np.ndarray) -> np.ndarray:
    """Constant, line and hinges of each choice of knots (c, k): (c, T, 2 + k)."""
    ones = np.ones((len(knots), len(u), 1))
    return np.concatenate([ones, ones * u[:, None], np.maximum(u[:, None] - knots[:, None, :], 0.0)], axis=2)


def _refined(u: Curve, curves: Curves, knots: np.ndarray, spacing: float) -> np.ndarray:
    """Knots between the candidates: each curve's knots move by halving steps while that fits it better."""
    moves = np.array(list(product((0.0, -1.0, 1.0), repeat=knots.shape[1])))
    for halving in range(1, HALVINGS + 1):
        tried = knots[:, None, :] + moves * spacing * 0.5**halving  # (b, moves, k)
        tried = np.where(_apart(u, tried)[..., None], tried, knots[:, None, :])
        projections = np.linalg.qr(_bases(u, tried.reshape(-1, knots.shape[1])))[0]
        projections = projections.reshape(*tried.shape[:2], len(u), -1)
        explained = (np.einsum("bt,bmtj->bmj", curves, projections) ** 2).sum(2)
        knots = np.take_along_axis(tried, explained.argmax(1)[:, None, None], 1)[:, 0]
    return knots


def _apart(u: Curve, knots: np.ndarray) -> Any:
    """Whether every segment of knots (..., k) keeps two looks of its own."""
    below = (u <= knots[..., None]).sum(-1)  # looks up to each knot
    ends = np.concatenate([np.zeros_like(below[..., :1]), below, np.full_like(below[..., :1], len(u))], -1)
    return np.all(np.diff(ends, axis=-1) >= 2, axis=-1)


def phases_of(run: Any, definition: str, update: str | None, over: str | None, time: str, options: Any) -> Phases:
    """``Run.phases``: the S_rel of a run, brought into the shape that ``find_phases`` wants."""
    known = [name for name in inspect.signature(find_phases).parameters if name not in ("times", "values", "over")]
    for name in options:
        check_choice("an option of phases", name, known)
    s = run.s_rel(definition, update)
    if "update" in s.dims:
        raise InputError(
            expected=f"one update of {[str(name) for name in s['update'].values]}", got="none", do="name it: update="
        )
    stepwise = [str(name) for name, values in run.dataset.variables.items() if values.dims == ("step",)]
    check_choice("time", time, stepwise)
    times = np.asarray(run.dataset[time].values, dtype=np.float64)
    replicas = run.dataset.sizes.get("replica", 0) if "replica" in s.dims else 0
    over = over or ("seeds" if replicas >= LEAST_UNITS else "pairs")
    if over not in ("pairs", "seeds") or (over == "seeds" and not replicas):
        raise InputError(
            expected='over="pairs", or over="seeds" for a run with replicas',
            got=f"{over!r} for a run {'with' if replicas else 'without'} replicas",
            do="train replicas with le.train_ensemble, or use pairs",
        )
    if over == "seeds":
        curves = s.median(("source", "target")).transpose("step", "replica").values
        return find_phases(times, curves, over=over, **options)
    if replicas:
        s = s.median("replica")
    return find_phases(times, s.transpose("step", "source", "target").values, over=over, **options)
