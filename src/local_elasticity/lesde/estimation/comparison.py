"""Model against data: agreement of the estimated model with class means, and held-out error of each model (spec 3.5).

The published comparison multiplies the simulated mean by one scalar fitted to the data, sign included. Every measure
is therefore given without it, as it is, and with it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from local_elasticity.base.checks import as_numbers, check_seed, check_whole, check_whole_list
from local_elasticity.base.errors import IdentifiabilityWarning, InputError
from local_elasticity.lesde.estimation.observations import Observations
from local_elasticity.lesde.model import LESDE

if TYPE_CHECKING:
    from local_elasticity.lesde.estimation.fit import Estimates

Path = Float[np.ndarray, "T K p"]


@dataclass(frozen=True)
class Agreement:
    """How class means of a model agree with those observed.

    Attributes:
        relative_rmse: ‖observed - model‖ / ‖observed‖ over all times, classes and coordinates.
        r2: share of the variance over time explained, for all coordinates together.
        r2_by_coordinate: (K, p) the same for each.
        tail_cosine: cosine between the two over the last times.
        coverage: share of the observed numbers within ±2 sd of the model; NaN without bands.
        sign_agreement: share of them with the same sign.
    """

    relative_rmse: float
    r2: float
    r2_by_coordinate: Float[np.ndarray, "K p"] = field(repr=False)
    tail_cosine: float
    coverage: float
    sign_agreement: float


@dataclass(frozen=True, eq=False)
class Comparison:
    """The model beside the data.

    Attributes:
        plain: as the model says.
        rescaled: after the published multiplication by one scalar.
        best: after the scalar that fits best.
        scalar: the published scalar.
        best_scalar: that of least squares.
        band: what the bands are.
        predicted: class means of the model.
        observed: those observed.
        sd: half-width of the bands over 2; NaN without.
    """

    plain: Agreement
    rescaled: Agreement
    best: Agreement
    scalar: float
    best_scalar: float
    band: str
    predicted: Path = field(repr=False)
    observed: Path = field(repr=False)
    sd: Path = field(repr=False)


@dataclass(frozen=True)
class HeldOut:
    """Error of a model on data that it was not estimated from.

    Attributes:
        relative_rmse: mean over the folds.
        standard_error: of that mean; NaN with one fold.
        folds: the errors.
        of: what was held out.
    """

    relative_rmse: float
    standard_error: float
    folds: tuple[float, ...]
    of: str


def compare(
    sde: LESDE,
    t: Float[np.ndarray, " T"],
    observed: Path,
    data: Observations,
    error: Path | None,
    *,
    sd: Any = None,
    n: int | None = None,
    last: int | None = None,
    coordinate: tuple[int, int] = (0, 0),
) -> Comparison:
    """Set class means beside those of a model.

    Args:
        sde: the model.
        t: times.
        observed: class means at these times.
        data: what the model was estimated from.
        error: standard error of the observed means, the default band.
        sd: (T, K, p) standard deviations for the bands instead.
        n: samples a class: bands are the model's own for class means of so many samples.
        last: how many times are the tail; 1000 as published, at most a tenth of them.
        coordinate: (class, coordinate) by whose tail the published scalar is fitted.

    Raises:
        InputError: for another shape, or numbers that are not finite.
    """
    if observed.shape != data.class_means.shape or not np.isfinite(observed).all():
        raise InputError(
            expected=f"finite class means of shape {data.class_means.shape}, at the times of the fit",
            got=f"shape {observed.shape}" if observed.shape != data.class_means.shape else "NaN or infinity",
            do="interpolate them to fit.t",
        )
    K, p = observed.shape[1:]
    check_whole("n", n, or_none=True)
    check_whole("last", last, or_none=True)
    place = check_whole_list("coordinate", coordinate)
    if len(place) != 2 or not (0 <= place[0] < K and 0 <= place[1] < p):
        raise InputError(expected=f"a class below {K} and a coordinate below {p}", got=f"{coordinate}", do="choose one")
    predicted = np.asarray(sde.mean(t))
    band, widths = _bands(sde, t, observed.shape, error, sd, n)
    tail = min(last or 1000, max(1, len(t) // 10)) if last is None else min(last, len(t))
    k, j = place
    with np.errstate(divide="ignore", invalid="ignore"):
        scalar = float(observed[-tail:, k, j].mean() / predicted[-tail:, k, j].mean())
        best = float((observed * predicted).sum() / (predicted**2).sum())
    plain, rescaled, fitted = (agreement(observed, c * predicted, widths, tail) for c in (1.0, scalar, best))
    return Comparison(plain, rescaled, fitted, scalar, best, band, predicted, observed, widths)


def _bands(
    sde: LESDE, t: np.ndarray, shape: tuple[int, ...], error: Path | None, sd: Any, n: int | None
) -> tuple[str, Path]:
    if sd is not None:
        given = as_numbers("sd", sd)
        if given.shape != shape or not (given >= 0).all():
            raise InputError(
                expected=f"sd of shape {shape}, at least 0", got=f"shape {given.shape}", do="pass standard deviations"
            )
        return "given", given
    if n is not None:
        spread = np.sqrt(np.einsum("tii->ti", np.asarray(sde.covariance(t, n))).clip(min=0))
        return f"class means of {n} samples, by the model", spread.reshape(shape)
    if error is not None and np.isfinite(error).any():
        return "standard error of the observed means over the trials", error
    return "none: pass sd= or n=", np.full(shape, np.nan)


def agreement(observed: Path, predicted: Path, sd: Path, tail: int) -> Agreement:
    """Measures of agreement of two paths of class means.

    Args:
        observed: class means.
        predicted: those of a model at the same times.
        sd: half-width of the bands over 2; NaN for none.
        tail: how many of the last times the cosine is of.
    """
    residual = observed - predicted
    spread = observed - observed.mean(axis=0)
    known = np.isfinite(sd)
    with np.errstate(divide="ignore", invalid="ignore"):
        cosine = (observed[-tail:] * predicted[-tail:]).sum() / (
            np.linalg.norm(observed[-tail:]) * np.linalg.norm(predicted[-tail:])
        )
        return Agreement(
            relative_rmse=float(np.linalg.norm(residual) / np.linalg.norm(observed)),
            r2=float(1 - (residual**2).sum() / (spread**2).sum()),
            r2_by_coordinate=1 - (residual**2).sum(axis=0) / (spread**2).sum(axis=0),
            tail_cosine=float(cosine),
            coverage=float((np.abs(residual) <= 2 * sd)[known].mean()) if known.any() else float("nan"),
            sign_agreement=float((np.sign(observed) == np.sign(predicted)).mean()),
        )


def held_out(fit: Estimates, estimate: Callable[..., Any], folds: int = 5, seed: int = 0) -> dict[str, HeldOut]:
    """Relative error of each model's class means on held-out trials; without trials, on every second time.

    Args:
        fit: a fit of either model; both are estimated anew.
        estimate: how; see ``estimate``.
        folds: parts that the trials are divided into.
        seed: of the division.

    Raises:
        InputError: for more folds than trials, or fewer than 2.
    """
    folds, seed = check_whole("folds", folds, 2), check_seed("seed", seed)
    data = fit.observations
    if data.n_trials >= 4:
        if not 2 <= folds <= data.n_trials // 2:
            raise InputError(
                expected=f"2 to {data.n_trials // 2} folds of the {data.n_trials} trials",
                got=str(folds),
                do="choose fewer",
            )
        parts = np.array_split(np.random.default_rng(seed).permutation(data.n_trials), folds)
        pairs = [(data.subset(np.setdiff1d(np.arange(data.n_trials), part)), data.subset(part)) for part in parts]
        of = f"{folds} folds of {data.n_trials} trials"
        known = slice(None)
    else:
        if len(data.t) < 12:
            raise InputError(expected="trials, or at least 12 times", got=f"{len(data.t)} times", do="look more often")
        seen = np.unique(np.append(np.arange(0, len(data.t), 2), len(data.t) - 1))
        known = np.setdiff1d(np.arange(len(data.t)), seen)
        part = Observations(data.t[seen], data.class_means[seen], np.empty((0, 2), dtype=np.int64))
        pairs, of = [(part, data)], "every second time"
    K, p = data.class_means.shape[1:]
    models = ("isotropic", "logits") if p == K else ("isotropic",)
    return {model: _held_out(model, estimate, pairs, known, of, fit) for model in models}


def _held_out(model: Any, estimate: Callable[..., Any], pairs: list, known: Any, of: str, fit: Estimates) -> HeldOut:
    errors = []
    for part, rest in pairs:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", IdentifiabilityWarning)
            own = estimate(part.class_means, part.t, model, n_boot=0, baseline_window=_capped(fit, part), seed=fit.seed)
        if np.isnan(own.A).all() or np.isnan(own.B).all():
            errors.append(float("nan"))
            continue
        predicted = np.asarray(own.to_sde(rates="smooth").mean(rest.t))[known]
        observed = rest.class_means[known]
        errors.append(float(np.linalg.norm(observed - predicted) / np.linalg.norm(observed)))
    spread = float(np.std(errors, ddof=1) / np.sqrt(len(errors))) if len(errors) > 1 else float("nan")
    return HeldOut(float(np.mean(errors)), spread, tuple(errors), of)


def _capped(fit: Estimates, part: Observations) -> int:
    return max(1, min(fit.baseline_window, len(part.t) // 2))
