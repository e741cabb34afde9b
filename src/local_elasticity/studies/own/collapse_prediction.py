"""Study collapse-prediction: from the first part of training, what the LE-SDE says of the rest.

Rates are estimated from half of the networks up to a time; the state of each network of the other half at that time is
then carried on by the LE-ODE. Class means, separability and neural collapse (NC1, NC2) are compared with what these
networks did. How rates go on after the time is an assumption: three are tried, and named.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float

from local_elasticity.lesde.estimation.estimate import Fit
from local_elasticity.lesde.model import LESDE
from local_elasticity.lesde.separability import separable
from local_elasticity.report.charts import Chart, Curve, charts
from local_elasticity.studies.engine.claims import Claim, judged
from local_elasticity.studies.wang2021.dynamics import NAMES, describe, name_of
from local_elasticity.studies.wang2021.imitation import Half, halves
from local_elasticity.studies.wang2021.reading import Seen, band_of, fit, mean_of, own_logit, separation
from local_elasticity.studies.wang2021.trainings import EnsembleStudy, Record, Size, Training

Going = Literal["stop", "hold", "decay"]
Model = Literal["isotropic", "logits"]
GOING: tuple[Going, ...] = get_args(Going)
GOING_WORDS = {
    "stop": "nothing changes any more",
    "hold": "alpha and beta stay as over the last fifth",
    "decay": "alpha and beta fall like t^-r from there, r by the dyadic estimator, 1 where it cannot tell",
}
FRACTIONS = (0.2, 0.3, 0.5)
JUDGED = ("logits", "decay")
CLOUD = 30  # samples a class in the test of separability
MEASURES = ("means", "S", "nc1", "nc2_equinorm", "nc2_equiangle", "accuracy")
MEASURE_WORDS = {
    "means": "relative error of class means",
    "S": "error of S",
    "nc1": "error of log10 NC1",
    "nc2_equinorm": "error of NC2, equal norms",
    "nc2_equiangle": "error of NC2, equal angles",
    "accuracy": "error of validation accuracy",
}


@dataclass(frozen=True, eq=False)
class Course:
    """Networks from a time on; all arrays (networks, looks, ...).

    Attributes:
        t: updates made at each look.
        means: class means of the probes.
        variance: within classes, per coordinate, mean over classes.
        accuracy: on validation images; NaN at looks without.
    """

    t: Float[np.ndarray, " looks"]
    means: Float[np.ndarray, "networks looks K p"]
    variance: Float[np.ndarray, "networks looks"]
    accuracy: Float[np.ndarray, "networks looks"]

    def metrics(self) -> dict[str, Float[np.ndarray, "networks looks"]]:
        """S, log10 NC1, NC2 and accuracy; NC1 of an isotropic spread within classes."""
        K = self.means.shape[-2]
        centred = self.means - self.means.mean(axis=-2, keepdims=True)
        gram = centred @ centred.swapaxes(-1, -2)
        values = np.linalg.eigvalsh(gram)[..., 1:] / K  # of Sigma_B; the centred means span K - 1 dimensions
        norms = np.sqrt(np.einsum("...kk->...k", gram))
        i, j = np.triu_indices(K, 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            cosine = gram[..., i, j] / (norms[..., i] * norms[..., j])
            nc1 = np.log10(self.variance * (1 / values).sum(axis=-1) / K)
            spread = self.variance[..., None, None]
            return {
                "S": separation(self.means, np.broadcast_to(spread, (*self.variance.shape, 1, 1))),
                "nc1": nc1,
                "nc2_equinorm": norms.std(axis=-1) / norms.mean(axis=-1),
                "nc2_equiangle": np.abs(cosine + 1 / (K - 1)).mean(axis=-1),
                "accuracy": self.accuracy,
            }


def what_happened(record: Record, networks: np.ndarray, after: float) -> tuple[Course, dict[str, np.ndarray]]:
    """The course of these networks after a time, and their metrics as they were logged."""
    late = record.probe_times > after
    means = record.probe_means[networks][:, late]
    variance = record.array("probe_variance")[late][:, networks].mean(axis=(2, 3)).T
    times = record.probe_times[late]
    accuracy = np.full(variance.shape, np.nan)
    checked = record.dataset["validation_step"].values
    for at, t in enumerate(times):
        found = np.flatnonzero(checked == t)
        if len(found):
            accuracy[:, at] = record.array("validation_accuracy")[found[0], networks]
    course = Course(times, means, variance, accuracy)
    logged = {name: record.array(name)[late][:, networks, 0].T for name in ("nc1", "nc2_equinorm", "nc2_equiangle")}
    logged["nc1"] = np.log10(logged["nc1"])
    return course, course.metrics() | logged


# --- predictions ---------------------------------------------------------------------------------------------------


def rates_after(found: Fit, after: float, t: np.ndarray, going: Going) -> tuple[np.ndarray, np.ndarray]:
    """Alpha and beta at times from ``after`` on."""
    if going == "stop":
        return np.zeros(len(t)), np.zeros(len(t))
    start = after - 0.2 * (after - found.t[0])
    alpha, beta = (found.average(name, start, found.t[-1]).value for name in ("alpha", "beta"))
    if going == "hold":
        return np.full(len(t), alpha), np.full(len(t), beta)
    r = found.tail("dyadic", "gap").value
    r = float(r) if 0 <= r <= 3 else 1.0
    middle = (start + after) / 2
    fall = (middle / t) ** r
    return alpha * fall, beta * fall


def predict(half: Half, model: Model, after: float, going: Going, seed: int = 0) -> Course:
    """Carry the judged networks on from their state at a time."""
    record = half.record
    found = fit(record, model, "probes", replicas=half.fitted, until=after, n_boot=0)
    now = int(np.flatnonzero(record.probe_times <= after)[-1])
    begin = float(record.probe_times[now])
    t = record.probe_times[now + 1 :]
    grid = np.unique(np.concatenate([np.linspace(begin, t[-1], 400), t]))
    alpha, beta = rates_after(found, begin, grid, going)
    few = slice(max(0, now - 1), now + 1)  # the state: mean of two looks, which are noisy
    means = record.probe_means[half.judged][:, few].mean(axis=1)
    paths = np.stack(
        [
            np.asarray(LESDE((grid, alpha), (grid, beta), record.n_classes, model, 0.0, X, start=begin).mean(t))
            for X in means
        ]
    )
    spreads = record.array("probe_variance")[: now + 1][:, half.judged].mean(axis=(2, 3))  # looks, networks
    growth = 0.0 if going == "stop" else _noise_of(record.probe_times[: now + 1], spreads)
    spread = spreads[few].mean(axis=0)[:, None] + np.outer(np.broadcast_to(growth, len(half.judged)), t - begin)
    checked = np.isin(t, record.dataset["validation_step"].values)
    accuracy = np.full(spread.shape, np.nan)
    accuracy[:, checked] = _accuracy(paths[:, checked], spread[:, checked], seed)
    return Course(t, paths, spread, accuracy)


def _noise_of(t: np.ndarray, spreads: Float[np.ndarray, "looks networks"]) -> Float[np.ndarray, " networks"]:
    """sigma^2 of each network: growth of its own variance over the last fifth of what was seen, at least 0."""
    late = t >= t[-1] - 0.2 * (t[-1] - t[0])
    late[-3:] = True
    away = t[late] - t[late].mean()
    return (away @ spreads[late] / (away @ away)).clip(min=0)


def _accuracy(means: np.ndarray, variance: np.ndarray, seed: int, n: int = 300) -> np.ndarray:
    """Share of normal samples about class means whose largest coordinate is that of their class."""
    rng = np.random.default_rng(seed)
    K = means.shape[-2]
    noise = rng.standard_normal((n, K, K))
    right = np.empty(variance.shape)
    for place in np.ndindex(*variance.shape):
        clouds = means[place] + np.sqrt(variance[place]) * noise
        right[place] = (clouds.argmax(axis=2) == np.arange(K)).mean()
    return right


def all_separable(clouds: Float[np.ndarray, "K n p"]) -> bool:
    """Whether every two classes can be separated linearly."""
    K = len(clouds)
    return all(bool(separable(clouds[a], clouds[b])) for a in range(K) for b in range(a + 1, K))


def separable_shares(half: Half, predicted: Course, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """At the end, for each judged network: are its validation images separable, are clouds of the prediction."""
    rng = np.random.default_rng(seed)
    final = half.record.final
    seen, said = [], []
    for place, network in enumerate(half.judged):
        logits, labels = final["logits"][network].astype(np.float64), final["labels"][network]
        K = logits.shape[1]
        n = min(CLOUD, *(int((labels == k).sum()) for k in range(K)))
        seen.append(all_separable(np.stack([logits[labels == k][:n] for k in range(K)])))
        noise = rng.standard_normal((K, n, K))
        mean, spread = predicted.means[place, -1], predicted.variance[place, -1]
        said.append(all_separable(mean[:, None] + np.sqrt(spread) * noise))
    return np.array(seen), np.array(said)


def errors(course: Course, happened: dict[str, np.ndarray], predicted: Course) -> dict[str, np.ndarray]:
    """Error of each network over the looks after the time."""
    said = predicted.metrics()
    gone = course.means - predicted.means
    gone, size = (np.sqrt((x**2).sum(axis=(1, 2, 3))) for x in (gone, course.means))
    found = {"means": gone / size}
    for name in MEASURES[1:]:
        found[name] = np.sqrt(np.nanmean((happened[name] - said[name]) ** 2, axis=1))
    return found


# --- claims --------------------------------------------------------------------------------------------------------


def better_than_nothing(name: str, after: float, key: str, errs: dict[tuple[str, str], dict[str, np.ndarray]]) -> Claim:
    """The prediction has a smaller error than the statement that nothing changes any more."""
    ours, idle = errs[JUDGED][key], errs["logits", "stop"][key]
    known = np.isfinite(ours) & np.isfinite(idle)
    seen = mean_of((ours - idle)[known]) if known.sum() > 1 else Seen(float("nan"), float("nan"), float("nan"))
    return Claim(
        f"{name}, estimated up to t = {after:g}: the L-model foretells {MEASURE_WORDS[key].split(' of ')[1]} "
        "better than no change",
        "difference of the errors below 0, interval and all",
        f"{np.nanmean(ours):.3g} against {np.nanmean(idle):.3g}",
        seen.words()[1],
        judged(seen.high < 0) if np.isfinite(seen.high) else "not judged",
    )


def separability_foretold(name: str, after: float, seen: np.ndarray, said: np.ndarray) -> Claim:
    """The predicted share of separable networks agrees with what was seen."""
    difference = mean_of(said.astype(float) - seen.astype(float))
    return Claim(
        f"{name}, estimated up to t = {after:g}: how many networks separate all classes at the end ({CLOUD} images a "
        "class)",
        "predicted minus seen share: 0 inside the interval, or within .1 of it",
        f"{said.mean():.2f} predicted, {seen.mean():.2f} seen",
        difference.words()[1],
        judged(bool(difference.low <= 0 <= difference.high) or abs(difference.value) <= 0.1),
    )


def plainly(table: dict[float, dict[tuple[str, str], dict[str, np.ndarray]]]) -> list[str]:
    """Which ways foretell each measure best, and where none is better than no change."""
    notes = []
    for key in MEASURES:
        words = []
        for after, rows in table.items():
            errs = {way: float(np.nanmean(e[key])) for way, e in rows.items()}
            best = min(errs, key=lambda way: errs[way])
            name = "none better than no change" if best[1] == "stop" else f"{NAMES[best[0]]}-model, {best[1]}"
            words.append(f"t = {after:g}: {name} ({errs[best]:.3g}, no change {errs['logits', 'stop']:.3g})")
        notes.append(f"{MEASURE_WORDS[key]}, smallest of all ways: {'; '.join(words)}")
    return notes


# --- the study -----------------------------------------------------------------------------------------------------


class CollapseStudy(EnsembleStudy):
    """The rest of training foretold from its first part."""

    title = "collapse-prediction: class means, separability, NC1 and NC2 foretold from the first part of training"
    cost: Mapping[str, str] = {"small": "2 min on 1 core", "paper": "12 min on 1 core"}

    def needs(self, size: Size) -> list[Training]:
        """Clean GeoMNIST."""
        return [size.geomnist]

    def report(self, records: list[Record], size: Size, scale: str, out: Path) -> int:
        """Analyse, judge, draw; 1 when a claim fails."""
        record = records[0]
        name, half = name_of(record), halves(record, 0)
        claims: list[Claim] = []
        notes = [
            describe(record),
            f"{len(half.fitted)} networks give the rates, {len(half.judged)} others are foretold, each from its state",
            *(f"{going}: {words}" for going, words in GOING_WORDS.items()),
            "noise within classes goes on as each network's own variance grew over the last fifth",
        ]
        table: dict[float, dict[tuple[str, str], dict[str, np.ndarray]]] = {}
        shown: dict[float, Any] = {}
        last = float(record.probe_times[-1])
        for fraction in FRACTIONS:
            after = float(record.probe_times[record.probe_times <= max(fraction * last, record.probe_times[5])][-1])
            course, happened = what_happened(record, half.judged, after)
            ways = {(m, g): predict(half, m, after, g) for m in ("isotropic", "logits") for g in GOING}
            table[after] = {way: errors(course, happened, predicted) for way, predicted in ways.items()}
            shown[after] = (course, happened, ways)
            claims += [better_than_nothing(name, after, key, table[after]) for key in MEASURES]
            seen, said = separable_shares(half, ways[JUDGED])
            claims.append(separability_foretold(name, after, seen, said))
            notes += [
                f"up to t = {after:g}, {NAMES[m]}-model, {g}: "
                + ", ".join(f"{MEASURE_WORDS[k]} {' '.join(mean_of(e[k]).words())}" for k in MEASURES)
                for (m, g), e in table[after].items()
            ]
        notes += plainly(table)
        (out / "errors.json").write_text(
            json.dumps(
                {
                    f"{after:g}": {f"{m}, {g}": {k: v.tolist() for k, v in e.items()} for (m, g), e in rows.items()}
                    for after, rows in table.items()
                }
            )
        )
        figures = {"collapse": self._figure(record, half, shown, scale), "errors": self._errors(table, scale)}
        return self.finish(claims, notes, figures, scale, out)

    def _figure(self, record: Record, half: Half, shown: dict[float, Any], scale: str) -> Any:
        whole, metrics = what_happened(record, half.judged, -1.0)
        titles = {
            "S": ("separation S", "log(gap² / variance)"),
            "nc1": ("NC1", "log10"),
            "nc2_equiangle": ("NC2, equal angles", "mean |cos + 1/(K-1)|"),
            "nc2_equinorm": ("NC2, equal norms", "sd / mean"),
            "accuracy": ("validation accuracy", "accuracy"),
        }
        content = []
        curves = [Curve("the networks", whole.t, band_of(own_logit(whole.means)))]
        for after, (_, _, ways) in shown.items():
            predicted = ways[JUDGED]
            mean = own_logit(predicted.means).mean(axis=0)
            curves.append(Curve(f"from t = {after:g}", predicted.t, (mean, mean * np.nan, mean * np.nan)))
        content.append(Chart("logit of the own class", "logit", "training step", curves, log=True))
        for key, (title, label) in titles.items():
            known = np.isfinite(metrics[key]).all(axis=0)
            curves = [Curve("the networks", whole.t[known], band_of(metrics[key][:, known]))]
            for after, (_, _, ways) in shown.items():
                said = ways[JUDGED].metrics()[key]
                ok = np.isfinite(said).all(axis=0)
                mean = said[:, ok].mean(axis=0)
                curves.append(Curve(f"from t = {after:g}", ways[JUDGED].t[ok], (mean, mean * np.nan, mean * np.nan)))
            content.append(Chart(title, label, "training step", curves))
        title = f"The L-model, rates falling like a power of t, from three times on; scale {scale}"
        return charts(content, title, columns=3, height=2.2)

    def _errors(self, table: dict[float, dict[tuple[str, str], dict[str, np.ndarray]]], scale: str) -> Any:
        after = np.array(list(table))
        content = []
        for key in MEASURES:
            curves = []
            for way in (("logits", "stop"), ("logits", "hold"), ("logits", "decay"), ("isotropic", "decay")):
                seen = np.array([mean_of(rows[way][key]) for rows in table.values()]).T
                label = "no change" if way[1] == "stop" else f"{NAMES[way[0]]}, {way[1]}"
                curves.append(Curve(label, after, (seen[0], seen[1], seen[2]), points=True))
            positive = all((curve.band[0] > 0).all() for curve in curves)
            content.append(
                Chart(MEASURE_WORDS[key], "root mean square", "estimated up to step", curves, log=positive)
            )  # fmt: skip
        return charts(content, f"Errors of the predictions, 95 % over networks; scale {scale}", columns=3, height=2.2)


PREDICTION = CollapseStudy()
