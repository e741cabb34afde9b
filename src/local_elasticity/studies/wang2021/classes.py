"""Study wang2021-classes: CIFAR-10 with 2, 3, 4 and 5 classes (arXiv:2110.05960, code; C7, C8, C12)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from local_elasticity.lesde.estimation.estimate import Fit
from local_elasticity.report.charts import Chart, Curve, charts
from local_elasticity.studies.engine.claims import Claim
from local_elasticity.studies.wang2021.dynamics import (
    NAMES,
    describe,
    dies_out,
    elastic_in_the_rise,
    name_of,
    published_window,
    slower_on_cifar,
)
from local_elasticity.studies.wang2021.reading import band_of, end_of, fit
from local_elasticity.studies.wang2021.trainings import EnsembleStudy, Record, Size, Training, classed


class ClassesStudy(EnsembleStudy):
    """CIFAR-10 by number of classes."""

    title = "wang2021-classes: CIFAR-10 with 2 to 5 classes"
    cost: Mapping[str, str] = {"small": "2 min on 1 core", "paper": "100 min on 1 core"}

    def needs(self, size: Size) -> list[Training]:
        """One training a number of classes."""
        return [classed(size, k) for k in size.classes]

    def report(self, records: list[Record], size: Size, scale: str, out: Path) -> int:
        """Analyse, judge, draw; 1 when a claim fails."""
        claims: list[Claim] = []
        notes: list[str] = []
        fits: dict[tuple[int, str], Fit] = {}
        for record in records:
            notes.append(describe(record))
            for model in ("isotropic", "logits"):
                found = fits[record.n_classes, model] = fit(record, model)
                claims += [elastic_in_the_rise(record, found), dies_out(record, found)]
                A, B = end_of(found, "A").words(), end_of(found, "B").words()
                notes.append(
                    f"{name_of(record)}, {NAMES[model]}-model from the probes: A = {A[0]} {A[1]}, B = {B[0]} {B[1]}"
                )
                if record.n_classes == 3 and model == "isotropic":
                    window = published_window(record)
                    published = fit(record, model, "log", estimator="published", window=window)
                    claims += slower_on_cifar(None, record, found, published)
        return self.finish(claims, notes, {"classes": self._figure(records, fits, scale)}, scale, out)

    def _figure(self, records: list[Record], fits: dict[tuple[int, str], Fit], scale: str) -> Any:
        content = []
        step = "training step"
        for model in ("isotropic", "logits"):
            for quantity, words in (("A", "A"), ("gap", "alpha - beta")):
                curves = []
                for record in records:
                    found = fits[record.n_classes, model]
                    band = (getattr(found, quantity), *found.intervals[quantity])
                    curves.append(Curve(f"K = {record.n_classes}", found.t, band))
                label = "integral" if quantity == "A" else "per step"
                content.append(Chart(f"{words}, {NAMES[model]}-model", label, step, curves, [(0.0, "")], gradual=True))
        accuracy = [
            Curve(
                f"K = {record.n_classes}",
                record.dataset["validation_step"].values,
                band_of(record.array("validation_accuracy").T * record.n_classes),
            )
            for record in records
        ]
        content.append(
            Chart("validation accuracy over chance", "accuracy x K", step, accuracy, [(1.0, "chance")], gradual=True)
        )
        return charts(content, f"CIFAR-10 with K classes, scale {scale}; bands: 95 % over networks")


CLASSES = ClassesStudy()
