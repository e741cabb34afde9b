"""The verdict: are the classes going to be separable, in words (spec lesde 2.4, 2.5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from local_elasticity.lesde.estimation.tail import TailExponent

if TYPE_CHECKING:
    from local_elasticity.lesde.estimation.fit import Estimates

DIED_OUT = 0.05  # share of the variance added over the last half, below which noise has died out
Word = Literal["separable", "not separable", "undecided"]


@dataclass(frozen=True, eq=False)
class Verdict:
    """What the estimates say about separability.

    Attributes:
        word: "separable", "not separable" or "undecided".
        why: in sentences.
        exponent: the tail exponent it rests on.
    """

    word: Word
    why: str
    exponent: TailExponent

    def __str__(self) -> str:
        return f"{self.word}: {self.why}"


def judge(fit: Estimates) -> Verdict:
    """Compare the decay of alpha - beta with 1/t, and say what it rests on.

    Slower than 1/t separates, faster does not, as long as the noise within classes does not vanish. In the L-model the
    larger of A - B and A + B/(K-1) separates, so that where B > 0 at the end alpha + beta/(K-1) stands in its place. On
    a record of finite length only an interval that lies on one side of 1 decides.
    """
    across = fit.model == "logits" and fit.B[-1] > 0
    exponent = fit.tail("dyadic", "across" if across else "gap")
    rate = "alpha + beta/(K-1)" if across else "alpha - beta"
    low, high, r = exponent.low, exponent.high, exponent.value
    seen = f"{rate} goes like t^{-r:.2f}" + ("" if np.isnan(low) else f" [{-high:.2f}, {-low:.2f}]")
    grown, decayed = _growth(fit)
    word: Word = "undecided"
    if decayed and not across:
        word, why = "not separable", "over the last octave A - B falls: classes are impelled towards each other"
    elif np.isnan(r):
        why = f"the decay of {rate} cannot be told ({exponent.reason})"
    elif np.isnan(low):
        why = f"{seen}, but without an interval this cannot be told from 1/t ({exponent.reason or fit.no_interval})"
    elif high < 1:
        word, why = "separable", f"{seen}, slower than 1/t: the distance of the classes outgrows any lasting noise"
    elif low > 1:
        word, why = "not separable", f"{seen}, faster than 1/t: noise that lasts will overtake the classes in the end"
    else:
        why = f"{seen}, which at this length cannot be told from 1/t"
    return Verdict(word, ". ".join([why, grown, _noise(fit)]).replace("..", ".") + ".", exponent)


def _growth(fit: Estimates) -> tuple[str, bool]:
    """How far the gap has grown, in words, and whether it surely falls over the last octave."""
    gap = fit.A - fit.B
    last = fit.draws("gap")
    grown = np.exp(gap[-1] / fit.n_classes)
    text = f"So far the distance of class means has grown by exp((A - B)/K) = {grown:.3g}"
    if np.isnan(grown):
        text = "How far the distance of class means has grown so far cannot be told"
    if last is None:
        return text, False
    half = fit.t[-1] / 2 if fit.t[0] < fit.t[-1] / 2 else (fit.t[0] + fit.t[-1]) / 2
    average = fit.average("gap", float(half), float(fit.t[-1]))
    return text, bool(average.high < 0)


def _noise(fit: Estimates) -> str:
    """How far classes stand apart now, and what becomes of the noise."""
    known = np.isfinite(fit.within_variance).any(axis=1)
    if not known.any():
        return "The spread within classes is unknown; if it dies out, the 1/t boundary does not apply"
    X = fit.class_means[known][-1]
    spread = np.nanmean(fit.within_variance[known][-1])
    pairs = np.triu_indices(fit.n_classes, 1)
    nearest = np.linalg.norm(X[:, None] - X[None], axis=-1)[pairs].min()
    if not spread > 0:
        return "Now samples of a class do not spread at all"
    distances = nearest / np.sqrt(spread)
    apart = f"Now the nearest class means stand {distances:.3g} within-class standard deviations apart"
    times, sigma2 = fit.t[len(fit.t) // 2 :], fit.sigma2[len(fit.t) // 2 :]
    late = float(np.trapezoid(sigma2, times)) / spread
    share = f"{max(late, 0):.0%} of the variance" if late < 10 else f"{late:.3g} times the variance of now"
    if late < DIED_OUT:
        return f"{apart}, and no more noise is added (the last half of the time added {share})"
    return f"{apart}, and noise goes on (the last half of the time added {share})"
