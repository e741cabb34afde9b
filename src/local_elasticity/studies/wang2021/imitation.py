"""Study wang2021-imitation: does the LE-ODE imitate training? (arXiv:2110.05960, figure 5; spec lesde 3.5, C9).

Networks are divided in halves: everything is estimated from one, judged on class means of the other.

As published: rates of the published estimator through the L-drift whatever the model, 500 starts of mean 0, their mean
multiplied by one scalar that takes scale and sign from the data. Honestly: the model's own drift, a start that was
measured, nothing rescaled, and bands from the noise that was estimated.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from local_elasticity.base.errors import InputError
from local_elasticity.lesde.estimation.comparison import agreement
from local_elasticity.lesde.model import LESDE
from local_elasticity.lesde.published import WINDOWS, derivative
from local_elasticity.report.charts import Imitation, imitation
from local_elasticity.studies.engine.claims import Claim, judged
from local_elasticity.studies.wang2021.direct import direct_matrix, mean_movements, summary
from local_elasticity.studies.wang2021.dynamics import NAMES, describe, name_of
from local_elasticity.studies.wang2021.reading import Seen, fit, of_draws
from local_elasticity.studies.wang2021.trainings import EnsembleStudy, Record, Size, Training

Model = Literal["isotropic", "logits"]
Path3 = Float[np.ndarray, "looks K K"]
TRIALS = 500  # starts, as published
TAIL = 1000  # iterations at the end by which the published scalar is fitted
DIVERGED = 1e3  # relative error beyond which numbers say nothing
WINDOW = 0.1  # share of the record whose class means are the start "window"
LARGEST = 1e150  # beyond it a path is cut: its error says all there is to say
METRICS = ("relative_rmse", "r2", "tail_cosine", "coverage", "coverage_network", "class_0")
WORDS = {
    "relative_rmse": "relative RMSE",
    "r2": "R²",
    "tail_cosine": "tail cosine",
    "coverage": "share of ensemble means within 2 standard errors",
    "coverage_network": "share of single networks within 2 sd of the model",
    "class_0": "relative RMSE of class 0",
}
PUBLISHED = {model: f"published, {NAMES[model]}" for model in ("isotropic", "logits")}
HONEST = {model: f"{NAMES[model]}-model, window start" for model in ("isotropic", "logits")}


@dataclass(frozen=True, eq=False)
class Half:
    """A division of the networks.

    Attributes:
        record: the training.
        fitted: positions of the networks that are estimated from; those measured directly are among them.
        judged: the others.
        seed: of the division and of the starts.
    """

    record: Record
    fitted: np.ndarray
    judged: np.ndarray
    seed: int

    @property
    def times(self) -> np.ndarray:
        """Updates made at each look at the probes."""
        return self.record.probe_times

    def observed(self) -> Path3:
        """Class means of the judged networks."""
        return self.record.probe_means[self.judged].mean(axis=0)

    def standard_error(self) -> Path3:
        """Of the difference between an estimate from one half and what the other half did."""
        error = 0.0
        for half in (self.fitted, self.judged):
            values = self.record.probe_means[half]
            error = error + values.var(axis=0, ddof=1) / len(half)
        return np.sqrt(np.asarray(error))


def halves(record: Record, seed: int) -> Half:
    """Divide the networks; those whose impact was measured are on the side that is estimated from."""
    n = len(record.sound)
    if n < 4:
        raise InputError(expected="at least 4 networks", got=str(n), do="train more")
    measured = 0 if record.direct is None else record.direct["change"].shape[1]
    measured = min(measured, n // 2)
    rest = np.random.default_rng(seed).permutation(np.arange(measured, n))
    fitted = np.sort(np.concatenate([np.arange(measured), rest[: n // 2 - measured]]))
    return Half(record, fitted, np.sort(rest[n // 2 - measured :]), seed)


@dataclass(frozen=True, eq=False)
class Simulated:
    """Class means of a model at the times of the probes.

    Attributes:
        mean: its class means.
        sd: standard deviation of one network's class means of the probes; NaN where the model has no noise.
    """

    mean: Path3
    sd: Path3


# --- models --------------------------------------------------------------------------------------------------------


def published(half: Half, model: Model) -> Simulated:
    """The authors' simulation, scaled by their scalar, which is fitted to the class means of the fitted half."""
    record = half.record
    K, steps = record.n_classes, len(record.logits)
    found = fit(record, model, "log", estimator="published", replicas=half.fitted, n_boot=0)
    width = min(WINDOWS["simulation"], (steps // 2 - 1) | 1)
    t = np.arange(steps, dtype=float)
    rates = [np.nan_to_num(derivative(_interpolated(x), width)) for x in (found.A, found.B)]
    spread = (np.linalg.norm(found.class_means[0], axis=1) / np.sqrt(K)) ** 2
    start = (np.zeros((K, K)), spread)
    sde = LESDE((t, rates[0]), (t, rates[1]), K, "logits", 0.0, start, kind="step")
    looked = np.minimum(half.times.astype(int), steps - 1)
    parts = []
    last = min(TAIL, max(1, steps // 10))
    with np.errstate(over="ignore", invalid="ignore"):
        for batch in range(5):
            drawn = sde.sample(t, 1, TRIALS // 5, half.seed * 5 + batch, method="published")
            parts.append((drawn[:, looked], drawn[:, -last:, 0].mean(axis=1)))
        paths = np.clip(np.nan_to_num(np.concatenate([p for p, _ in parts])), -LARGEST, LARGEST)
        tails = np.clip(np.nan_to_num(np.concatenate([p for _, p in parts])), -LARGEST, LARGEST).mean(axis=0)
        logit = 1 if record.configuration["data"] == "geomnist" and model == "isotropic" else 0
        data = found.class_means[-last:, 0, logit].mean()
        scalar = data / tails[logit] if tails[logit] else 0.0
    return Simulated(scalar * paths.mean(axis=0), paths.std(axis=0))  # the published bars are not rescaled


def estimated(half: Half, model: Model, start: Literal["measured", "window"]) -> Simulated:
    """The estimated model from the class means at the first look, or their mean over the first looks."""
    looks = 1 if start == "measured" else max(2, int((half.times <= WINDOW * half.times[-1]).sum()))
    found = fit(half.record, model, "probes", replicas=half.fitted, n_boot=0, baseline_window=looks)
    if np.isnan(found.A).all() or np.isnan(found.B).all():
        nothing = np.full(found.class_means.shape, np.nan)
        return Simulated(nothing, nothing)
    sde = found.to_sde()
    return _law(sde, half)


def _law(sde: LESDE, half: Half) -> Simulated:
    t = half.times
    shape = (len(t), half.record.n_classes, half.record.n_classes)
    probes = int(half.record.configuration["probes"])
    spread = np.einsum("tii->ti", np.asarray(sde.covariance(t, probes))).clip(min=0)
    return Simulated(_mean(sde, t), np.sqrt(spread).reshape(shape))


def _mean(sde: LESDE, t: np.ndarray) -> Path3:
    """The expected class means, cut where they leave all bounds."""
    sign, magnitude = sde.mean(t, log=True)
    return np.asarray(sign) * np.exp(np.minimum(np.asarray(magnitude), np.log(LARGEST)))


def by_measured_rates(half: Half, drift: Model) -> Simulated | None:
    """The LE-ODE with alpha and beta of the matrix E that real steps showed."""
    matrix = direct_matrix(half.record, drift, n_boot=0)
    if matrix is None:
        return None
    pair = [(matrix.t, np.nan_to_num(summary(matrix.values, name))) for name in ("alpha", "beta")]
    start = half.record.probe_means[half.fitted, :1].mean(axis=(0, 1))
    sde = LESDE(pair[0], pair[1], half.record.n_classes, drift, 0.0, start)
    mean = _mean(sde, half.times.clip(max=matrix.t[-1]))
    return Simulated(mean, np.full(mean.shape, np.nan))


def by_adding_up(half: Half, drift: Model = "logits") -> Simulated | None:
    """The movements of real steps added up, without any model: what the measurement itself is worth."""
    found = half.record.direct
    if found is None:
        return None
    drift_of_means = mean_movements(found).mean(axis=1).mean(axis=2)  # looks, k, p: over networks, then over l
    t = found["times"]
    summed = np.concatenate(
        [
            np.zeros((1, *drift_of_means.shape[1:])),
            np.cumsum(np.diff(t)[:, None, None] * (drift_of_means[1:] + drift_of_means[:-1]) / 2, axis=0),
        ]
    )
    start = half.record.probe_means[half.fitted, :1].mean(axis=(0, 1))
    flat = summed.reshape(len(t), -1)
    at = np.stack([np.interp(half.times, t, column) for column in flat.T], axis=1)
    mean = start + at.reshape(len(half.times), *start.shape)
    return Simulated(mean, np.full(mean.shape, np.nan))


WAYS: dict[str, Callable[[Half], Simulated | None]] = {
    PUBLISHED["isotropic"]: lambda half: published(half, "isotropic"),
    PUBLISHED["logits"]: lambda half: published(half, "logits"),
    "I-model, measured start": lambda half: estimated(half, "isotropic", "measured"),
    "L-model, measured start": lambda half: estimated(half, "logits", "measured"),
    HONEST["isotropic"]: lambda half: estimated(half, "isotropic", "window"),
    HONEST["logits"]: lambda half: estimated(half, "logits", "window"),
    "direct matrix, I-drift": lambda half: by_measured_rates(half, "isotropic"),
    "direct matrix, L-drift": lambda half: by_measured_rates(half, "logits"),
    "real steps added up": by_adding_up,
}
"""Name -> how class means are simulated from the fitted half."""


def _interpolated(series: np.ndarray) -> np.ndarray:
    """Logarithms of 0 and cells that no network saw, filled in time."""
    known = np.isfinite(series)
    at = np.arange(len(series))
    return np.interp(at, at[known], series[known]) if known.any() else np.zeros(len(series))


# --- judging -------------------------------------------------------------------------------------------------------


def measures(half: Half, simulated: Simulated) -> dict[str, float]:
    """How the simulation agrees with the networks that it was not estimated from."""
    observed = half.observed()
    tail = max(1, len(observed) // 10)
    with warnings.catch_warnings(), np.errstate(over="ignore", invalid="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)
        whole = agreement(observed, simulated.mean, half.standard_error(), tail)
        own = agreement(observed[:, :1], simulated.mean[:, :1], half.standard_error()[:, :1], tail)
    single = half.record.probe_means[half.judged]
    inside = np.abs(single - simulated.mean) <= 2 * simulated.sd
    known = np.isfinite(simulated.sd)
    return {
        "relative_rmse": whole.relative_rmse,
        "r2": whole.r2,
        "tail_cosine": whole.tail_cosine,
        "coverage": whole.coverage,
        "coverage_network": float(inside[:, known].mean()) if known.any() else float("nan"),
        "class_0": own.relative_rmse,
    }


def judge(record: Record, divisions: int) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, Simulated], Half]:
    """Every way on every division of the networks: name -> measure -> values; and the paths of the first division."""
    found: dict[str, dict[str, list[float]]] = {}
    first: dict[str, Simulated] = {}
    for seed in range(divisions):
        half = halves(record, seed)
        for name, way in WAYS.items():
            if name in PUBLISHED.values() and record.n_classes != 3:
                continue
            simulated = way(half)
            if simulated is None:
                continue
            first.setdefault(name, simulated)
            for key, value in measures(half, simulated).items():
                found.setdefault(name, {}).setdefault(key, []).append(value)
    arrays = {name: {key: np.array(v) for key, v in rows.items()} for name, rows in found.items()}
    return arrays, first, halves(record, 0)


def over_divisions(values: Float[np.ndarray, " divisions"]) -> Seen:
    """Median over the divisions, and the range of 95 % of them."""
    if np.isnan(values).all():
        return Seen(float("nan"), float("nan"), float("nan"))
    return of_draws(float(np.nanmedian(values)), values)


# --- claims --------------------------------------------------------------------------------------------------------


def logits_better(
    name: str, found: dict[str, dict[str, np.ndarray]], pair: dict[str, str], words: str, key: str
) -> Claim:
    """C9: the L-estimate imitates better than the I-estimate."""
    one, other = found[pair["logits"]][key], found[pair["isotropic"]][key]
    with np.errstate(invalid="ignore"):
        seen = over_divisions(one - other)
    a, b = over_divisions(one).words()[0], over_divisions(other).words()[0]
    return Claim(
        f"C9, {name}, {words}: L imitates better than I",
        f"{WORDS[key]} of L below that of I",
        f"{a} against {b}",
        f"difference {seen.words()[1]} over divisions",
        judged(seen.value < 0),
    )


def imitates(name: str, found: dict[str, dict[str, np.ndarray]], model: Model) -> Claim:
    """The paper's main statement, with a number: most of what class means do is explained on other networks."""
    seen = over_divisions(found[HONEST[model]]["r2"])
    return Claim(
        f"{name}: the {NAMES[model]}-model imitates class means, nothing rescaled",
        "R² on networks that it was not estimated from above .9",
        *seen.words(),
        judged(seen.value > 0.9),
    )


# --- the study -----------------------------------------------------------------------------------------------------


class ImitationStudy(EnsembleStudy):
    """Simulated class means against those of held-out networks."""

    title = "wang2021-imitation: the LE-SDE simulated from its estimates against held-out networks"
    cost: Mapping[str, str] = {"small": "3 min on 1 core", "paper": "40 min on 1 core"}

    def needs(self, size: Size) -> list[Training]:
        """GeoMNIST and CIFAR-10 of three classes."""
        return [size.geomnist, size.cifar]

    def report(self, records: list[Record], size: Size, scale: str, out: Path) -> int:
        """Analyse, judge, draw; 1 when a claim fails."""
        divisions = {"paper": 20, "small": 8}.get(scale, 3)
        claims: list[Claim] = []
        notes = [
            f"medians over {divisions} divisions of the networks in halves, [95 % of the divisions]; class means of "
            "the probes; networks measured directly are always on the fitted side",
            f"published: {TRIALS} starts of mean 0, L-drift, window 21, one scalar of either sign from the last "
            f"iterations of class 0; the others: nothing rescaled, start: the first look, or the mean over the first "
            f"{WINDOW:.0%} of the record",
        ]
        figures, numbers = {}, {}
        for record in records:
            found, first, half = judge(record, divisions)
            name = name_of(record)
            claims += [
                logits_better(name, found, PUBLISHED, "as published, class 0", "class_0"),
                logits_better(name, found, HONEST, "honestly", "relative_rmse"),
                imitates(name, found, "isotropic"),
                imitates(name, found, "logits"),
            ]
            notes.append(describe(record))
            notes += [f"{name}: {way}: {_row(rows)}" for way, rows in found.items()]
            best = min(found, key=lambda way: _or_inf(found[way]["relative_rmse"]))
            honest = [way for way in found if way not in PUBLISHED.values()]
            honest_best = min(honest, key=lambda way: _or_inf(found[way]["relative_rmse"]))
            notes.append(f"{name}: best of all: {best}; best with nothing rescaled: {honest_best}")
            numbers[name] = {way: {key: v.tolist() for key, v in rows.items()} for way, rows in found.items()}
            key = record.configuration["data"]
            figures[f"imitation-{key}"] = self._figure(name, half, first, found, scale)
        (out / "imitation.json").write_text(json.dumps(numbers))
        if scale != "paper":
            claims = [
                replace(claim, verdict="not judged") if "CIFAR" in claim.name else claim for claim in claims
            ]  # fmt: skip
        return self.finish(claims, notes, figures, scale, out)

    def _figure(
        self, name: str, half: Half, first: dict[str, Simulated], found: dict[str, dict[str, np.ndarray]], scale: str
    ) -> Any:
        observed = half.observed()
        content = [
            Imitation(
                f"{way}: {_short(found[way]['class_0'])}",
                half.times,
                observed[:, 0],
                simulated.mean[:, 0],
                simulated.sd[:, 0],
            )
            for way, simulated in first.items()
        ]
        title = f"{name}, scale {scale}: class 0 of held-out networks (marks) and simulated (lines, 2 sd)"
        return imitation(content, title)


def _row(rows: dict[str, np.ndarray]) -> str:
    if not np.nanmedian(rows["relative_rmse"]) < DIVERGED:
        return f"diverges; tail cosine {' '.join(over_divisions(rows['tail_cosine']).words())}"
    return "; ".join(
        f"{WORDS[key]} {' '.join(over_divisions(rows[key]).words())}" for key in METRICS if np.isfinite(rows[key]).any()
    )


def _short(errors: np.ndarray) -> str:
    seen = over_divisions(errors)
    return f"error {seen.value:.2g}" if seen.value < DIVERGED else "diverges"


def _or_inf(values: Sequence[float] | np.ndarray) -> float:
    value = float(np.nanmedian(values)) if np.isfinite(values).any() else float("nan")
    return value if np.isfinite(value) else float("inf")


IMITATION = ImitationStudy()
