"""Study wang2021-corruption: wrong labels, tail exponents, and where separation ends (arXiv:2110.05960, figure 4).

GeoMNIST with an exact fraction p of wrong labels. Above p = (K-1)/K = 2/3 labels point away from their class; there
alpha - beta is predicted to vanish (spec lesde 2.5; C5, C6).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from local_elasticity.lesde.estimation.estimate import Fit
from local_elasticity.report.charts import Chart, Curve, charts, located
from local_elasticity.studies.engine.claims import Claim, judged
from local_elasticity.studies.wang2021.reading import (
    METHODS,
    Seen,
    band_of,
    crossing,
    fit,
    lowest,
    mean_of,
    of_draws,
    resampled_means,
    separation,
    simplex_mode,
    tail_draws,
)
from local_elasticity.studies.wang2021.trainings import EnsembleStudy, Record, Size, Training, corrupted

CRITICAL = 2 / 3
PROBED = "dyadic on probes"
FAR = 10_000  # steps for which the claims are made


@dataclass(frozen=True, eq=False)
class Rate:
    """What was read off the training at one corruption rate.

    Attributes:
        rate: p.
        record: the training.
        published: the I-model by the published estimator, from the log.
        defined: the I-model as defined, from the log.
        tails: (method, quantity) -> the exponent, then those of the resamples. "official" is of the published fit,
            `PROBED` of the class means of the clean probes.
    """

    rate: float
    record: Record
    published: Fit
    defined: Fit
    tails: dict[tuple[str, str], Float[np.ndarray, " b"]]

    def exponent(self, method: str, quantity: str = "alpha") -> Seen:
        """With its interval."""
        draws = self.tails[method, quantity]
        return of_draws(float(draws[0]), draws[1:] if len(draws) > 1 else np.array([np.nan]))


def read(rate: float, record: Record) -> Rate:
    """Estimate from the log of one training."""
    published, defined = fit(record, "isotropic", "log", estimator="published"), fit(record, "isotropic", "log")
    probed = fit(record, "isotropic")
    tails: dict[tuple[str, str], np.ndarray] = {}
    for quantity in ("alpha", "beta", "gap"):
        for method in METHODS:
            source = published if method == "official" else defined
            tails[method, quantity] = tail_draws(source, method, quantity)  # pyright: ignore[reportArgumentType]
        tails[PROBED, quantity] = tail_draws(probed, "dyadic", quantity)  # pyright: ignore[reportArgumentType]
    return Rate(rate, record, published, defined, tails)


# --- claims --------------------------------------------------------------------------------------------------------


def _at_the_end(rates: Sequence[Rate], claim: Claim) -> Claim:
    """The claim, judged only where training went as far as published."""
    short = any(one.record.configuration["steps"] < FAR for one in rates)
    return replace(claim, verdict="not judged") if short else claim


def index_rises(rates: Sequence[Rate]) -> Claim:
    """C5: the published tail index of alpha does not fall from rate to rate up to .6."""
    chosen = [one for one in rates if one.rate <= 0.6 + 1e-9]
    draws = _together([one.tails["official", "alpha"] for one in chosen])
    steps = np.diff(draws, axis=1).min(axis=1) if len(chosen) > 1 else np.full(len(draws), np.nan)
    smallest = of_draws(float(steps[0]), steps[1:])
    values = ", ".join(f"{one.exponent('official').value:.3f}" for one in chosen)
    claim = Claim(
        "C5: the published index of alpha does not fall with p, up to .6",
        "smallest step from rate to rate at least 0",
        f"{values} (smallest step {smallest.words()[0]})",
        smallest.words()[1],
        judged(smallest.value >= 0),
    )
    return _at_the_end(rates, claim)


def index_crosses(rates: Sequence[Rate]) -> Claim:
    """C5: it crosses 1 between .5 and .67."""
    found = located_by(rates)["published index of alpha = 1"]
    return _at_the_end(
        rates,
        Claim(
            "C5: the published index of alpha crosses 1 between p = .5 and .67",
            ".5 to .67",
            *found.words(),
            judged(0.5 <= found.value <= 0.67),
        ),
    )


def nothing_learnt(rates: Sequence[Rate]) -> list[Claim]:
    """C5: from 2/3 on validation is no better than chance."""
    claims = []
    for one in rates:
        if one.rate < CRITICAL - 1e-9:
            continue
        loss, accuracy = mean_of(one.record.final["loss"]), mean_of(one.record.final["accuracy"])
        for name, seen, expected, good in (
            ("validation loss", loss, "at least 1.098", loss.value >= 1.098),
            ("accuracy", accuracy, "at most .34", accuracy.value <= 0.34),
        ):
            claim = Claim(f"C5, p = {one.rate:.2f}: {name} at the end", expected, *seen.words(4), judged(good))
            claims.append(_at_the_end(rates, claim))
    return claims


def below_chance(rates: Sequence[Rate]) -> list[Claim]:
    """C6: at .8 accuracy lies below chance."""
    claims = []
    for one in rates:
        if abs(one.rate - 0.8) < 1e-9:
            seen = mean_of(one.record.final["accuracy"])
            claim = Claim(
                "C6, p = .8: accuracy at the end lies below chance",
                "below 1/3, interval and all (published about .22)",
                *seen.words(),
                judged(seen.high < 1 / 3),
            )
            claims.append(_at_the_end(rates, claim))
    return claims


def transition_at_two_thirds(rates: Sequence[Rate]) -> list[Claim]:
    """Spec 2.5: separation ends at (K-1)/K."""
    found = located_by(rates)
    rows = [
        ("class means of clean images change sides", "clean class means on the side of their labels"),
        ("separation is lowest", "separation S at the end, lowest"),
    ]
    claims = []
    for words, key in rows:
        seen = found[key]
        inside = bool(seen.low <= CRITICAL <= seen.high) if np.isfinite(seen.low) else False
        close = abs(seen.value - CRITICAL) < 0.05
        claim = Claim(
            f"transition: {words} at p = 2/3",
            "2/3 inside the interval, or within .05 of it",
            *seen.words(),
            judged(inside or close),
        )
        claims.append(_at_the_end(rates, claim))
    return claims


def located_by(rates: Sequence[Rate], seed: int = 0) -> dict[str, Seen]:
    """Where each way puts the transition, with 95 % intervals over networks."""
    p = [one.rate for one in rates]
    found: dict[str, Seen] = {}

    def add(name: str, draws: Float[np.ndarray, " b"]) -> None:
        found[name] = of_draws(float(draws[0]), draws[1:])

    for method, words in (
        ("official", "published index"),
        ("loglog", "loglog exponent"),
        ("dyadic", "dyadic exponent"),
        (PROBED, "dyadic exponent (probes)"),
    ):
        for quantity in ("alpha", "gap"):
            name = "alpha" if quantity == "alpha" else "alpha - beta"
            draws = _together([one.tails[method, quantity] for one in rates])
            add(f"{words} of {name} = 1", crossing(p, draws, 1.0))
    final = [one.record.final for one in rates]
    add("validation accuracy = 1/3", crossing(p, resampled_means([f["accuracy"] for f in final], seed), 1 / 3))
    start = np.mean([one.record.array("validation_loss")[0].mean() for one in rates])
    add("validation loss as at the start", crossing(p, resampled_means([f["loss"] for f in final], seed), float(start)))
    sides = resampled_means([simplex_mode(f["means"]) for f in final], seed)
    add("clean class means on the side of their labels", crossing(p, sides, 0.0))
    apart = resampled_means([separation(f["means"], f["variances"]) for f in final], seed)
    add("separation S at the end, lowest", lowest(p, apart))
    return found


def _together(columns: Sequence[Float[np.ndarray, " b"]]) -> Float[np.ndarray, "b rates"]:
    """Side by side; a rate with fewer resamples, since some of them lacked a class, shortens all."""
    length = min(map(len, columns))
    return np.stack([column[:length] for column in columns], axis=1)


# --- the study -----------------------------------------------------------------------------------------------------


class CorruptionStudy(EnsembleStudy):
    """Ten rates of wrong labels on GeoMNIST."""

    title = "wang2021-corruption: wrong labels on GeoMNIST, tail exponents and where separation ends"
    cost: Mapping[str, str] = {"small": "3 min on 1 core", "paper": "80 min on 1 core"}

    def needs(self, size: Size) -> list[Training]:
        """One training a rate."""
        return [corrupted(size, rate) for rate in size.rates]

    def report(self, records: list[Record], size: Size, scale: str, out: Path) -> int:
        """Analyse, judge, draw; 1 when a claim fails."""
        rates = [read(rate, record) for rate, record in zip(size.rates, records, strict=True)]
        places = located_by(rates)
        claims = [
            index_rises(rates),
            index_crosses(rates),
            *nothing_learnt(rates),
            *below_chance(rates),
            *transition_at_two_thirds(rates),
        ]
        c = records[0].configuration
        notes = [
            f"{c['origin']}; {c['steps']} steps, rate {c['lr']:g}, batch 1; networks at each rate: "
            f"{', '.join(str(len(record.sound)) for record in records)}; probes and validation have clean labels",
            "published index: published estimator of the I-model on class means of the log by the label trained on; "
            "loglog and dyadic: estimator as defined on the same class means, dyadic also on those of clean probes; "
            "95 % intervals over networks",
            *(self._row(one) for one in rates),
            "transition, predicted at p = 2/3: "
            + "; ".join(f"{name}: {' '.join(seen.words())}" for name, seen in places.items()),
        ]
        figures = {
            "corruption": self._figure(rates, scale),
            "transition": located(
                [(name, seen.value, seen.low, seen.high) for name, seen in places.items()],
                CRITICAL,
                f"Where separation ends, scale {scale}: line at the predicted 2/3, 95 % intervals",
                "corruption rate p",
            ),
        }
        return self.finish(claims, notes, figures, scale, out)

    def _row(self, one: Rate) -> str:
        final = one.record.final
        loss, accuracy = mean_of(final["loss"]), mean_of(final["accuracy"])
        apart = mean_of(separation(final["means"], final["variances"]))
        exponents = "; ".join(
            f"{method} {name} {' '.join(one.exponent(method, quantity).words())}"
            for method in (*METHODS, PROBED)
            for quantity, name in (("alpha", "alpha"), ("beta", "beta"), ("gap", "alpha - beta"))
        )
        return (
            f"p = {one.rate:.3g}: validation loss {' '.join(loss.words())}, accuracy {' '.join(accuracy.words())}, "
            f"S {' '.join(apart.words())}; A {one.published.A[-1]:.3g}, B {one.published.B[-1]:.3g} as published; "
            f"{exponents}"
        )

    def _figure(self, rates: list[Rate], scale: str) -> Any:
        names = [f"p = {one.rate:.2g}" for one in rates]
        times = [one.record.dataset["validation_step"].values for one in rates]
        curves = {
            key: [
                Curve(name, t, band_of(one.record.array(key).T))
                for name, t, one in zip(names, times, rates, strict=True)
            ]
            for key in ("validation_loss", "validation_accuracy")
        }
        apart = [
            Curve(
                name,
                one.record.probe_times,
                band_of(
                    separation(
                        one.record.probe_means, np.ascontiguousarray(one.record.array("probe_variance").swapaxes(0, 1))
                    )
                ),
            )
            for name, one in zip(names, rates, strict=True)
        ]
        start = float(np.mean([one.record.array("validation_loss")[0].mean() for one in rates]))
        p = np.array([one.rate for one in rates])
        tails = []
        for method, words in (
            ("official", "published index"),
            ("loglog", "loglog"),
            ("dyadic", "dyadic"),
            (PROBED, PROBED),
        ):
            seen = np.array([one.exponent(method) for one in rates]).T
            tails.append(Curve(words, p, (seen[0], seen[1], seen[2]), points=True))
        beta = np.array([one.exponent("official", "beta") for one in rates]).T
        ours = tails[0]
        published = [replace(ours, name="alpha"), Curve("beta", p, (beta[0], beta[1], beta[2]), points=True)]
        ends = np.array([mean_of(separation(f["means"], f["variances"])) for f in (o.record.final for o in rates)]).T
        sides = np.array([mean_of(simplex_mode(one.record.final["means"])) for one in rates]).T
        probes, K = int(rates[0].record.configuration["probes"]), rates[0].record.n_classes
        mark = [(CRITICAL, "2/3")]
        shaded = [(0.0, 1.0, "good"), (1.0, 2.0, "bad")]
        step, rate = "training step", "corruption rate p"
        loss = curves["validation_loss"]
        content = [
            Chart("a  validation loss", "loss", step, loss, [(start, "at the start")], gradual=True),
            Chart("b  validation accuracy", "accuracy", step, curves["validation_accuracy"], [(1 / 3, "chance")],
                  gradual=True),
            Chart("c  published tail index", "index (a level)", rate, published, marks=mark, shaded=shaded,
                  limits=(0.5, 1.5)),
            Chart("d  exponent of alpha, three estimators", "r", rate, tails, [(1.0, "1/t")], mark,
                  limits=(-0.5, 2.5)),
            Chart("e  separation S(t) of clean probes", "log(gap² / variance)", step, apart,
                  [(float(np.log(2 * K / probes)), f"chance with {probes} probes")], gradual=True),
            Chart("f  at the end, whole validation set", "S, and u·X", rate,
                  [Curve("S", p, (ends[0], ends[1], ends[2]), points=True),
                   Curve("class means towards their labels", p, (sides[0], sides[1], sides[2]), points=True)],
                  [(0.0, "")], mark),
        ]  # fmt: skip
        return charts(content, f"Wrong labels on GeoMNIST, scale {scale}; bands and bars: 95 % over networks")


CORRUPTION = CorruptionStudy()
