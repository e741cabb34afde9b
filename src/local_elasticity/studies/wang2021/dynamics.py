"""Study wang2021-dynamics: class means, A, B, alpha and beta in clean training, and the impact measured directly.

GeoMNIST and CIFAR-10 with three classes (arXiv:2110.05960, figures 1 and 3; spec lesde 6, C4, C7, C8, C12).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from local_elasticity.lesde.estimation.estimate import Fit
from local_elasticity.lesde.published import WINDOWS
from local_elasticity.report.charts import Chart, Curve, Dynamics, charts, class_means_in_the_plane, rate_panels
from local_elasticity.studies.engine.claims import Claim, judged
from local_elasticity.studies.wang2021.direct import DIRECT_FORMS, DirectMatrix, direct_matrix
from local_elasticity.studies.wang2021.reading import (
    RISE,
    Seen,
    end_of,
    fit,
    gap_in,
    late_share,
    mean_of,
    peak_of,
    tail_draws,
    value_at,
)
from local_elasticity.studies.wang2021.trainings import EnsembleStudy, Record, Size, Training

NAMES = {"isotropic": "I", "logits": "L"}
START = {"accuracy": (0.70, 0.97), "A": (11.0, 22.0)}
"""Bounds of C4 after 3,000 steps, set from a first run (.859 and 15.6) with margin."""


def validation_at(record: Record, step: int) -> np.ndarray:
    """Accuracy of each network at the look that is nearest to a step."""
    times = record.dataset["validation_step"].values
    return record.array("validation_accuracy")[int(np.abs(times - step).argmin())]


def not_at_end(record: Record, claim: Claim) -> Claim:
    """The claim, judged only where training went as far as published."""
    far = {"geomnist": 10_000, "cifar10": 30_000}[record.configuration["data"]]
    return claim if record.configuration["steps"] >= far else replace(claim, verdict="not judged")


# --- claims --------------------------------------------------------------------------------------------------------


def starts_as_published(record: Record, published: Fit) -> list[Claim]:
    """C4 as far as 3,000 steps tell."""
    accuracy, A = mean_of(validation_at(record, 3000)), value_at(published, "A", 2999)
    seen = {"accuracy": accuracy, "A": A}
    names = {"accuracy": "validation accuracy", "A": "A of the I-model, as published"}
    return [
        Claim(
            f"C4, clean GeoMNIST, start: {names[key]} after 3,000 steps",
            f"{low:g} to {high:g} (a first run with margin)",
            *seen[key].words(),
            judged(low <= seen[key].value <= high) if record.configuration["steps"] >= 3000 else "not judged",
        )
        for key, (low, high) in START.items()
    ]


def ends_as_published(record: Record, published: Fit) -> list[Claim]:
    """C4 at 10,000 steps."""
    accuracy, loss = mean_of(record.final["accuracy"]), mean_of(record.final["loss"])
    A, B = end_of(published, "A"), end_of(published, "B")
    tail = published.tail("official")
    r = Seen(tail.value, tail.low, tail.high)
    rows = [
        ("validation accuracy", "1.00", accuracy, round(accuracy.value, 2) >= 1.0),
        ("validation loss", "below .01", loss, loss.value < 0.01),
        ("A of the I-model, as published", "16 to 21", A, 16 <= A.value <= 21),
        ("B of the I-model, as published", "between -3 and 3", B, abs(B.value) < 3),
        ("published tail index of alpha", ".66 to .71", r, 0.66 <= r.value <= 0.71),
    ]
    return [
        not_at_end(record, Claim(f"C4, clean GeoMNIST, end: {name}", expected, *seen.words(), judged(good)))
        for name, expected, seen, good in rows
    ]


def elastic_in_the_rise(record: Record, found: Fit) -> Claim:
    """C7: alpha exceeds beta while classes separate."""
    stretch = RISE[record.configuration["data"]]
    seen = gap_in(found, stretch)
    return Claim(
        f"C7, {name_of(record)}, {NAMES[found.model]}-model: alpha exceeds beta in the rise",
        f"alpha - beta above 0, t = {stretch[0]:g} to {stretch[1]:g}",
        *seen.words(),
        judged(seen.low > 0) if np.isfinite(seen.low) else "not judged",
    )


def elastic_when_measured(record: Record, measured: DirectMatrix) -> Claim:
    """C7 by real steps instead of growth rates."""
    stretch = RISE[record.configuration["data"]]
    seen = measured.average("gap", stretch)
    return Claim(
        f"C7 measured by real steps, {name_of(record)}, drift of the {NAMES[measured.drift]}-model: alpha exceeds beta",
        f"alpha - beta above 0, t = {stretch[0]:g} to {stretch[1]:g}",
        *seen.words(),
        judged(seen.low > 0) if np.isfinite(seen.low) else "not judged",
    )


def dies_out(record: Record, found: Fit) -> Claim:
    """C8: alpha tends to 0 after the rise."""
    seen = late_share(found)
    claim = Claim(
        f"C8, {name_of(record)}, {NAMES[found.model]}-model: alpha tends to 0 after the rise",
        "over the last tenth of the record below a third of its largest tenth",
        *seen.words(),
        judged(seen.value < 1 / 3) if np.isfinite(seen.value) else "not judged",
    )
    # On CIFAR-10 a short run ends within the rise.
    return not_at_end(record, claim) if record.configuration["data"] == "cifar10" else claim


def slower_on_cifar(geomnist: Fit | None, record: Record, found: Fit, published: Fit) -> list[Claim]:
    """C12: CIFAR-10 rises later, and ends at a smaller A."""
    peak, A = peak_of(found, RISE["geomnist"][0]), end_of(published, "A")
    expected = "alpha is largest at t = 3,500 to 10,000"
    if geomnist is not None:
        expected += f"; on GeoMNIST at t = {peak_of(geomnist, 300).words()[0]}"
    inside = 3500 <= peak.value <= 10_000
    return [
        not_at_end(
            record, Claim("C12, CIFAR-10 of 3 classes: it rises later", expected, *peak.words(), judged(inside))
        ),
        not_at_end(
            record,
            Claim(
                "C12, CIFAR-10 of 3 classes: A of the I-model at the end, as published",
                "13 to 14",
                *A.words(),
                judged(13 <= A.value <= 14),
            ),
        ),
    ]


def published_window(record: Record) -> str | None:
    """The authors' window for this data; the one chosen from the data where the record is too short for it."""
    name = {"geomnist": "geomnist", "cifar10": "cifar"}[record.configuration["data"]]
    return name if len(record.logits) >= 2 * WINDOWS[name] else None


def name_of(record: Record) -> str:
    """What it was trained on, in words."""
    c = record.configuration
    if c["data"] == "geomnist":
        return "GeoMNIST" if c["corruption"] == 0 else f"GeoMNIST, {c['corruption']:.0%} wrong labels"
    return f"CIFAR-10 of {c['n_classes']} classes"


# --- the study -----------------------------------------------------------------------------------------------------


class DynamicsStudy(EnsembleStudy):
    """Clean training on both data sets."""

    title = "wang2021-dynamics: class means, A, B, alpha, beta of clean training, and the impact measured directly"
    cost: Mapping[str, str] = {"small": "3 min on 1 core", "paper": "35 min on 1 core"}

    def needs(self, size: Size) -> list[Training]:
        """GeoMNIST and CIFAR-10 of three classes."""
        return [size.geomnist, size.cifar]

    def report(self, records: list[Record], size: Size, scale: str, out: Path) -> int:
        """Analyse, judge, draw; 1 when a claim fails."""
        claims: list[Claim] = []
        rows: list[tuple[str, Fit, Fit | None]] = []
        notes, measured, direct = [*map(describe, records)], {}, {}
        fits: dict[tuple[int, str], Fit] = {}
        for at, record in enumerate(records):
            for model in ("isotropic", "logits"):
                found = fits[at, model] = fit(record, model)
                published = fit(record, model, "log", estimator="published", window=published_window(record))
                rows.append((f"{name_of(record)}, {NAMES[model]}-model", found, published))
                claims += [elastic_in_the_rise(record, found), dies_out(record, found)]
                data = record.configuration["data"]
                if model == "isotropic" and data == "geomnist":
                    claims += starts_as_published(record, published) + ends_as_published(record, published)
                if model == "isotropic" and data == "cifar10":
                    claims += slower_on_cifar(fits[0, "isotropic"] if at else None, record, found, published)
                notes += self._estimates(record, found, published)
            for drift in DIRECT_FORMS:
                matrix = direct_matrix(record, drift)
                if matrix is None:
                    continue
                measured[at, drift] = matrix
                claims.append(elastic_when_measured(record, matrix))
                direct[f"{name_of(record)}, {NAMES[drift]}-model"] = matrix.series()
                notes.append(matrix.beside(fits[at, drift], name_of(record), NAMES[drift]))
        figures = {
            "class-means": class_means_in_the_plane([self._drawn(record) for record in records], self._head(scale)),
            "rates": rate_panels(
                rows,
                f"{self._head(scale)}: lines are estimates from the probes with 95 % bands, dots those of the "
                "published code",
            ),
            "loop": loop_figure(records, fits, measured, scale),
        }
        return self.finish(claims, notes, figures, scale, out)

    def _head(self, scale: str) -> str:
        return f"Clean training, scale {scale}"

    def _estimates(self, record: Record, found: Fit, published: Fit) -> list[str]:
        A, B = end_of(found, "A").words(), end_of(found, "B").words()
        a, b = end_of(published, "A").words(), end_of(published, "B").words()
        r = tail_draws(found, "dyadic")[0]
        return [
            f"{name_of(record)}, {NAMES[found.model]}-model from the probes: A = {A[0]} {A[1]}, B = {B[0]} {B[1]}, "
            f"dyadic exponent of alpha {r:.2f}; as published from the log: A = {a[0]} {a[1]}, B = {b[0]} {b[1]}"
            + (f" (note: {'; '.join(found.warnings)})" if found.warnings else "")
        ]

    def _drawn(self, record: Record) -> Any:
        steps = len(record.logits)
        shown = np.unique(np.linspace(0, steps - 1, 50).astype(int))
        geomnist = record.configuration["data"] == "geomnist"
        names = ("triangle", "rectangle", "ellipse") if geomnist else ("airplane", "automobile", "bird")
        return Dynamics(
            name_of(record),
            names,
            record.probe_times,
            record.probe_means.mean(axis=0),
            (0, 1) if geomnist else (1, 2),
            shown,
            record.logits[shown],
            record.labels[shown],
        )


def describe(record: Record) -> str:
    """One line on a training."""
    c, loss, accuracy = record.configuration, mean_of(record.final["loss"]), mean_of(record.final["accuracy"])
    where = "" if record.device == "cpu" else f", on {record.device}"
    return (
        f"{name_of(record)}: {len(record.sound)} of {c['replicas']} networks, {c['steps']} steps, rate {c['lr']:g}, "
        f"batch 1{where}; {c['origin']}; at the end validation loss {loss.words()[0]} {loss.words()[1]}, accuracy "
        f"{accuracy.words()[0]} {accuracy.words()[1]}"
    )


def loop_figure(records: list[Record], fits: dict, measured: dict, scale: str) -> Any:
    """The loop closed: rates measured by real steps beside those estimated from growth."""
    content = []
    for at, record in enumerate(records):
        for drift in DIRECT_FORMS:
            if (at, drift) not in measured:
                continue
            series, found = measured[at, drift].series(), fits[at, drift]
            label = f"{name_of(record)}, {NAMES[drift]}-model"
            gap = Curve("estimated from growth", found.t, (found.gap, *found.intervals["gap"]))
            dots = Curve("measured by real steps", series["t"], series["gap"], points=True)
            level = [(0.0, "")]
            size = float(np.nanquantile(np.abs([*series["gap"][0], *found.gap]), 0.9))
            content.append(
                Chart(f"{label}: alpha - beta", "per step", "training step", [gap, dots], level,
                      limits=(-2.5 * size, 2.5 * size))
            )  # fmt: skip
            content.append(
                Chart(
                    f"{label}: measured",
                    "per step",
                    "training step",
                    [Curve(name, series["t"], series[name], points=True) for name in ("alpha", "beta")],
                    level,
                )
            )
    title = f"The impact of real steps beside the rates of the fitted LE-SDE, scale {scale}"
    return charts(content, title) if content else charts([], title, height=0.3)


DYNAMICS = DynamicsStudy()
