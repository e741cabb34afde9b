"""Study wang2021-size: do the dynamics depend on how many images a class has? (arXiv:2110.05960, early notebooks; C10).

GeoMNIST with 50 to 6,000 images a class, four fifths of them for training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from local_elasticity.report.charts import Chart, Curve, charts
from local_elasticity.studies.engine.claims import Claim, judged
from local_elasticity.studies.wang2021.corruption import FAR
from local_elasticity.studies.wang2021.dynamics import describe
from local_elasticity.studies.wang2021.reading import band_of, fit, mean_of, of_draws, own_logit, resampled_means
from local_elasticity.studies.wang2021.trainings import EnsembleStudy, Record, Size, Training, sized

RANGE = (8.0, 9.0)


def at_the_end(record: Record) -> np.ndarray:
    """Mean logit of the own class of every network on the whole validation set after the last step."""
    return own_logit(record.final["means"])


def judged_at_end(records: Sequence[Record], claim: Claim) -> Claim:
    """The claim, judged only where training went as far as published."""
    short = any(record.configuration["steps"] < FAR for record in records)
    return replace(claim, verdict="not judged") if short else claim


def mean_logit(record: Record, images: str) -> Claim:
    """C10: xbar ends between 8 and 9."""
    seen = mean_of(at_the_end(record))
    low, high = RANGE
    claim = Claim(
        f"C10, {images} images a class: mean logit of the own class at the end",
        f"{low:g} to {high:g}",
        *seen.words(),
        judged(low <= seen.value <= high),
    )
    return judged_at_end([record], claim)


def independent_of_size(records: Sequence[Record]) -> Claim:
    """C10: the sizes agree as closely as the published range says."""
    draws = resampled_means([at_the_end(record) for record in records])
    ratio = draws.max(axis=1) / draws.min(axis=1)
    seen, most = of_draws(float(ratio[0]), ratio[1:]), RANGE[1] / RANGE[0]
    claim = Claim(
        "C10: it does not depend on the number of images",
        f"largest over smallest at most {most:.3f}, as in 8 to 9",
        *seen.words(4),
        judged(seen.value <= most),
    )
    return judged_at_end(records, claim)


def accurate(records: Sequence[Record]) -> Claim:
    """Validation accuracy is above .98 for all sizes from t about 6,000 on."""
    worst = min((mean_of(record.final["accuracy"]) for record in records), key=lambda seen: seen.value)
    claim = Claim(
        "all sizes: validation accuracy at the end", "above .98 (published from t = 6,000 on)", *worst.words(),
        judged(worst.value > 0.98),
    )  # fmt: skip
    return judged_at_end(records, claim)


class SizeStudy(EnsembleStudy):
    """Seven sizes of GeoMNIST, and the standard one."""

    title = "wang2021-size: GeoMNIST with 50 to 6,000 images a class"
    cost: Mapping[str, str] = {"small": "2 min on 1 core", "paper": "70 min on 1 core"}

    def needs(self, size: Size) -> list[Training]:
        """One training a size, and the standard one."""
        trainings = [sized(size, *pair) for pair in size.sizes]
        trainings.append(size.geomnist)
        return sorted(trainings, key=lambda training: training.n_train)

    def report(self, records: list[Record], size: Size, scale: str, out: Path) -> int:
        """Analyse, judge, draw; 1 when a claim fails."""
        trainings = self.needs(size)
        images = [f"{training.n_train} + {training.n_validation}" for training in trainings]
        claims = [mean_logit(record, m) for record, m in zip(records, images, strict=True)]
        claims += [independent_of_size(records), accurate(records)]
        standard = f"{size.geomnist.n_train} + {size.geomnist.n_validation}"
        notes = [f"images a class: training + validation, 4 : 1 (the standard training: {standard})"]
        for record, m in zip(records, images, strict=True):
            found = fit(record, "isotropic")
            notes.append(
                f"{m} images a class: A {found.A[-1]:.3g}, B {found.B[-1]:.3g} (I-model, probes); {describe(record)}"
            )
        return self.finish(claims, notes, {"size": self._figure(records, images, scale)}, scale, out)

    def _figure(self, records: list[Record], images: list[str], scale: str) -> Any:
        pairs = list(zip(images, records, strict=True))
        logits = [Curve(name, r.probe_times, band_of(own_logit(r.probe_means))) for name, r in pairs]
        accuracy = [
            Curve(name, r.dataset["validation_step"].values, band_of(r.array("validation_accuracy").T))
            for name, r in pairs
        ]
        step = "training step"
        content = [
            Chart("mean logit of the own class, probes", "logit", step, logits, gradual=True),
            Chart("validation accuracy", "accuracy", step, accuracy, [(1 / 3, "chance")], gradual=True),
        ]
        return charts(content, f"GeoMNIST, images a class; scale {scale}, bands: 95 % over networks", height=2.6)


SIZE = SizeStudy()
