"""The matrix E measured by real steps during training, class mean by class mean (spec lesde 1.2; 8, last entry).

A step on a sample of class l moves the mean of class k by E_kl H_kl Xbar^l on average: E_kl is the least-squares slope
of the mean movement, over the tried samples of class l, on v = H_kl Xbar^l, pooled over networks, which are resampled
for the intervals. Regressing on every
sample's own output instead, as ``le.impact_matrix`` does, answers another question: within a class the samples that
move the network most are those it gets wrong, whose outputs point the other way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float

from local_elasticity.lesde.drift import simplex
from local_elasticity.lesde.estimation.estimate import Fit
from local_elasticity.studies.wang2021.reading import BOOTSTRAPS, Seen, of_draws
from local_elasticity.studies.wang2021.trainings import Record

Drift = Literal["isotropic", "logits"]
DIRECT_FORMS: tuple[Drift, ...] = get_args(Drift)
Quantity = Literal["alpha", "beta", "gap"]


@dataclass(frozen=True, eq=False)
class DirectMatrix:
    """E at each look, with resamples over networks.

    Attributes:
        drift: "isotropic" or "logits".
        t: updates made.
        values: E (looks, K moved, K stepped on), per optimiser step, without the 1/K of the LE-SDE.
        draws: the same of resampled networks (b, looks, K, K).
        single: mean over networks of ``le.impact_matrix``, sample by sample (looks, K, K).
        networks: how many were measured.
    """

    drift: Drift
    t: Float[np.ndarray, " looks"]
    values: Float[np.ndarray, "looks K K"]
    draws: Float[np.ndarray, "b looks K K"]
    single: Float[np.ndarray, "looks K K"]
    networks: int

    def series(self) -> dict[str, np.ndarray | tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """The times "t", and "alpha", "beta", "gap" with the ends of their intervals."""
        found: dict = {"t": self.t}
        for quantity in ("alpha", "beta", "gap"):
            mean = summary(self.values, quantity)
            low, high = np.quantile(summary(self.draws, quantity), [0.025, 0.975], axis=0)
            found[quantity] = (mean, low, high)
        return found

    def average(self, quantity: Quantity, stretch: tuple[float, float]) -> Seen:
        """Mean over the looks in a stretch of time."""
        inside = (self.t >= stretch[0]) & (self.t <= stretch[1])
        if not inside.any():
            return Seen(float("nan"), float("nan"), float("nan"))
        value = summary(self.values[inside], quantity).mean()
        return of_draws(float(value), summary(self.draws[:, inside], quantity).mean(axis=1))

    def beside(self, fit: Fit, data: str, model: str) -> str:
        """Integrals over the record, measured and estimated, in words."""
        words = []
        for quantity in ("alpha", "beta", "gap"):
            own = of_draws(
                float(np.trapezoid(summary(self.values, quantity), self.t)),
                np.trapezoid(summary(self.draws, quantity), self.t, axis=1),
            ).words()
            hat = {"alpha": fit.A, "beta": fit.B, "gap": fit.A - fit.B}[quantity][-1]
            words.append(f"{'alpha - beta' if quantity == 'gap' else quantity} {own[0]} {own[1]} (estimated {hat:.3g})")
        return (
            f"{data}, {model}-model, integrals by real steps of {self.networks} networks, {len(self.t)} looks: "
            f"{', '.join(words)}"
        )


def summary(E: Float[np.ndarray, "... K K"], quantity: Quantity) -> Float[np.ndarray, ...]:
    """Mean of the diagonal, of the rest, or their difference."""
    K = E.shape[-1]
    alpha = np.einsum("...kk->...", E) / K
    beta = (E.sum(axis=(-2, -1)) - K * alpha) / (K * (K - 1))
    return {"alpha": alpha, "beta": beta, "gap": alpha - beta}[quantity]


def direct_matrix(record: Record, drift: Drift, n_boot: int = BOOTSTRAPS, seed: int = 0) -> DirectMatrix | None:
    """E of a training whose impact was measured; None where it was not."""
    found = record.direct
    if found is None:
        return None
    moved, size = _products(found["change"], found["before"], found["labels"], drift)
    networks = moved.shape[1]
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(networks, np.full(networks, 1 / networks), size=n_boot).astype(float)
    if networks < 3:
        weights[:] = np.nan  # two networks say nothing about how sure

    def pooled(w: Float[np.ndarray, "b networks"]) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.einsum("br,trkl->btkl", w, moved) / np.einsum("br,trl->btl", w, size)[:, :, None]

    return DirectMatrix(
        drift, found["times"], pooled(np.ones((1, networks)))[0], pooled(weights), found[drift].mean(axis=1), networks
    )


def _products(
    change: Float[np.ndarray, "looks networks sources K p"],
    before: Float[np.ndarray, "looks networks sources p"],
    labels: np.ndarray,
    drift: Drift,
) -> tuple[Float[np.ndarray, "looks networks K K"], Float[np.ndarray, "looks networks K"]]:
    """<mean movement, v> and <v, v> of each network."""
    K = change.shape[3]
    C = mean_movements({"change": change, "labels": labels})
    v = np.stack([before[:, :, labels == c].mean(axis=2) for c in range(K)], axis=2)
    if drift == "logits":
        u = simplex(K)
        v = np.einsum("trlp,lp->trl", v, u)[..., None] * u
    return np.einsum("trklp,trlp->trkl", C, v), np.einsum("trlp,trlp->trl", v, v)


def mean_movements(found: dict[str, np.ndarray]) -> Float[np.ndarray, "looks networks K K p"]:
    """Mean movement of each class [k] by a step on each class [l]."""
    change, labels = found["change"], found["labels"]
    return np.stack([change[:, :, labels == c].mean(axis=2) for c in range(change.shape[3])], axis=3)
