"""What was estimated: rates, their integrals and intervals, and the model that they make."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from local_elasticity.base.checks import check_real
from local_elasticity.base.errors import InputError
from local_elasticity.lesde.estimation.observations import Observations
from local_elasticity.lesde.estimation.resampling import percentiles
from local_elasticity.lesde.estimation.smoothing import LocalQuadratic
from local_elasticity.lesde.estimation.tail import TailExponent, TailMethod, reading, tail_exponent
from local_elasticity.lesde.model import LESDE

if TYPE_CHECKING:
    import xarray as xr

Model = Literal["logits", "isotropic"]
Kind = Literal["defined", "published"]
Quantity = Literal["A", "B", "alpha", "beta", "gap"]
Series = Float[np.ndarray, " T"]

QUANTITIES = ("A", "B", "alpha", "beta", "gap")


class Average(NamedTuple):
    """An average over a stretch of time, and its interval (NaN where there is none)."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Estimates:
    """What training says of the LE-SDE, as numbers; `Fit` says what each is, and judges them."""

    model: Model
    estimator: Kind
    t: Series
    A: Series
    B: Series
    alpha: Series
    beta: Series
    intervals: dict[str, tuple[Series, Series]] = field(repr=False)
    no_interval: str
    confidence: float
    window: int
    baseline_window: int
    baseline_time: float
    signal_to_noise: dict[str, float]
    signs: dict[str, Series] = field(repr=False)
    within_variance: Float[np.ndarray, "T K"] = field(repr=False)
    sigma2: Series = field(repr=False)
    warnings: tuple[str, ...]
    observations: Observations = field(repr=False)
    n_boot: int
    seed: int
    _draws: tuple[np.ndarray, np.ndarray] | None = field(repr=False)

    @property
    def n_classes(self) -> int:
        """K."""
        return self.observations.n_classes

    @property
    def n_trials(self) -> int:
        """Trials behind the class means; 0 when only their mean is known."""
        return self.observations.n_trials

    @property
    def class_means(self) -> Float[np.ndarray, "T K p"]:
        """The observed class means, empty cells filled."""
        return self.observations.class_means

    @property
    def gap(self) -> Series:
        """Alpha - beta: positive where training is locally elastic."""
        return self.alpha - self.beta

    def draws(self, quantity: Quantity) -> Float[np.ndarray, "n_boot T"] | None:
        """Bootstrap draws of a quantity; None without trials."""
        if quantity not in QUANTITIES:
            raise InputError(expected=f"one of {QUANTITIES}", got=repr(quantity), do="choose one of them")
        if self._draws is None:
            return None
        A, B = self._draws
        if quantity in ("A", "B"):
            return A if quantity == "A" else B
        source = {"alpha": lambda: A, "beta": lambda: B, "gap": lambda: A - B}[quantity]()
        return LocalQuadratic(self.t, self.window).slope(source)

    def average(self, quantity: Literal["alpha", "beta", "gap"], start: float, stop: float) -> Average:
        """Average of a rate over a stretch of time, with its interval: the growth of its integral over the duration.

        Args:
            quantity: "alpha", "beta" or "gap".
            start: its begin.
            stop: its end.

        Raises:
            InputError: when the stretch is not inside the times.
        """
        start, stop = check_real("start", start), check_real("stop", stop)
        if not self.t[0] <= start < stop <= self.t[-1] or quantity not in ("alpha", "beta", "gap"):
            raise InputError(
                expected=f"alpha, beta or gap, and {self.t[0]:g} <= start < stop <= {self.t[-1]:g}",
                got=f"{quantity!r} from {start} to {stop}",
                do="choose a stretch inside the record",
            )
        width = min(self.window, len(self.t))
        weights = (reading(self.t, stop, width) - reading(self.t, start, width)) / (stop - start)
        A, B = filled(np.stack([self.A, self.B]), self.t)
        pick = {"alpha": lambda a, b: a, "beta": lambda a, b: b, "gap": lambda a, b: a - b}[quantity]
        value = float(pick(A, B) @ weights)
        if self._draws is None:
            return Average(value, np.nan, np.nan)
        low, high = percentiles(
            (pick(*self._draws) @ weights)[:, None], np.array([value]), self.confidence, self.n_trials
        )
        return Average(value, float(low[0]), float(high[0]))

    def tail(
        self, method: TailMethod = "dyadic", quantity: Literal["alpha", "beta", "gap", "across"] = "alpha"
    ) -> TailExponent:
        """Exponent r of a decay like t^-r, with its interval.

        Args:
            method: "dyadic" (slope of block averages; recommended), "loglog" (from the slope of log A; for r < 1
                only) or "official" (the published index, which is a level and not an exponent).
            quantity: "alpha", "beta", "gap" (alpha - beta), or "across" (alpha + beta/(K-1), by which the L-model
                separates when beta > 0), through its integral.

        Raises:
            InputError: for an unknown method or quantity.
        """
        weights = {"alpha": (1, 0), "beta": (0, 1), "gap": (1, -1), "across": (1, 1 / (self.n_classes - 1))}
        if quantity not in weights:
            raise InputError(expected=f"one of {list(weights)}", got=repr(quantity), do="choose one of them")
        a, b = weights[quantity]
        draws = None if self._draws is None else a * self._draws[0] + b * self._draws[1]
        return tail_exponent(
            self.t,
            a * self.A + b * self.B,
            draws,
            method=method,
            window=self.window,
            confidence=self.confidence,
            trials=self.n_trials,
        )

    def to_sde(self, *, rates: Literal["exact", "smooth"] = "exact", sigma: Any = None, initial: Any = None) -> LESDE:
        """The model that was estimated.

        Args:
            rates: "exact": alpha and beta are the increments of A and B from step to step, so that their integrals are
                the estimates; "smooth": they are the local slopes, joined linearly.
            sigma: noise; by default what the growth of the within-class variance says, and 0 where that is unknown.
            initial: (K, p) means, or (means, variance), at the first time; by default the baseline's class means.

        Raises:
            InputError: when A or B could not be estimated.
        """
        if np.isnan(self.A).all() or np.isnan(self.B).all():
            raise InputError(
                expected="A and B",
                got="; ".join(self.warnings) or "NaN",
                do="use other data, or another model or baseline",
            )
        if rates not in ("exact", "smooth"):
            raise InputError(expected="rates='exact' or 'smooth'", got=repr(rates), do="choose one of them")
        if rates == "smooth":
            slopes = filled(np.stack([self.alpha, self.beta]), self.t)
            if self.baseline_window > 1:
                slopes[:, self.t < self.baseline_time] = 0.0  # as below
            pair = [(self.t, slope) for slope in slopes]
        else:
            integrals = filled(np.stack([self.A, self.B]), self.t)
            if self.baseline_window > 1:
                integrals[:, self.t <= self.baseline_time] = 0.0  # the baseline is the start: no growth before it
            steps = np.diff(integrals, axis=1) / np.diff(self.t)
            pair = [(self.t, np.concatenate([step[:1], step])) for step in steps]
        if initial is None:
            variance = self._start_variance()
            means = self.class_means[: self.baseline_window].mean(axis=0)
            initial = means if np.isnan(variance) else (means, variance)
        if sigma is None:
            known = np.isfinite(self.sigma2)
            sigma = (self.t, np.sqrt(self.sigma2.clip(min=0))) if known.all() else 0.0
        return LESDE(
            pair[0],
            pair[1],
            self.n_classes,
            self.model,
            sigma,
            initial,
            kind="step" if rates == "exact" else "linear",
            start=float(self.t[0]),
        )

    def _start_variance(self) -> float:
        rows = self.within_variance[: self.baseline_window]
        return float(np.nanmean(rows)) if np.isfinite(rows).any() else float("nan")

    def to_xarray(self) -> xr.Dataset:
        """The series and their intervals along ``t``."""
        import xarray as xr

        series: dict[str, Any] = {name: getattr(self, name) for name in (*QUANTITIES, "sigma2")}
        for name, (low, high) in self.intervals.items():
            series |= {f"{name}_low": low, f"{name}_high": high}
        attributes = {
            name: getattr(self, name) for name in ("model", "estimator", "window", "baseline_window", "baseline_time")
        }
        attributes |= {"confidence": self.confidence, "n_trials": self.n_trials, "seed": self.seed}
        return xr.Dataset({k: ("t", v) for k, v in series.items()}, coords={"t": self.t}, attrs=attributes)


def filled(series: Float[np.ndarray, "m T"], t: Series) -> Float[np.ndarray, "m T"]:
    """Gaps interpolated in time."""
    gaps = np.isnan(series)
    if not gaps.any():
        return series
    out = series.copy()
    for row in np.flatnonzero(gaps.any(axis=1)):
        gone = gaps[row]
        if not gone.all():
            out[row, gone] = np.interp(t[gone], t[~gone], series[row, ~gone])
    return out
