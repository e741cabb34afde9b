"""Neural collapse under the LE-SDE: how the class means turn into a simplex, at which rate, and when they cannot.

In the L-model the mode along the simplex grows as e^{(A-B)/K} and the deviations as e^{(A+B/(K-1))/K}; their ratio is
e^{B/(K-1)}. In the I-model the centred class means only rescale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from local_elasticity.lesde import exact
from local_elasticity.lesde.drift import simplex

if TYPE_CHECKING:
    from local_elasticity.lesde.equation import Equation

_FALLING = 0.01  # share of B that must be gained over the second half of the time, for B to count as falling
Times = Float[np.ndarray, " times"]


@dataclass(frozen=True, eq=False)
class Collapse:
    """Neural collapse of the expected class means.

    Attributes:
        t: times.
        nc1: tr(Sigma_W Sigma_B^+) / K, variance within over that between.
        cosine: cosine between centred class means, (T, K, K); -1/(K-1) between classes once collapsed.
        cosine_deviation: largest distance of a cosine between classes from -1/(K-1).
        equinorm: standard deviation over mean of the norms of the centred class means.
        simplex_distance: distance of the normalised centred means' Gram matrix from that of the simplex (Frobenius).
        alignment: cosine between the class means and the simplex of the labels: 1 collapsed, -1 to the wrong side; NaN
            unless p = K.
        predicted_rate: e^{B/(K-1)} + e^{-(A-B)/K}: what ``cosine_deviation`` is proportional to; NaN where no rate is
            known.
        possible: can the model collapse?
        side: "right" or "wrong" (a negative start runs to minus the simplex).
        reason: in words.
    """

    t: Times
    nc1: Times
    cosine: Float[np.ndarray, "times k k"]
    cosine_deviation: Times
    equinorm: Times
    simplex_distance: Times
    alignment: Times
    predicted_rate: Times
    possible: bool
    side: str
    reason: str


def collapse(sde: Equation, t: Any) -> Collapse:
    """Metrics at ``t`` and the prediction; see `LESDE.collapse`."""
    times, _ = sde._times(t)
    k, p = sde.means.shape
    mean = exact.mean(sde, times)
    centred = mean.values - mean.values.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(centred, axis=2)
    unit = centred / np.where(norms > 0, norms, np.nan)[..., None]
    cosine = unit @ unit.transpose(0, 2, 1)
    off = ~np.eye(k, dtype=bool)
    gram = centred @ centred.transpose(0, 2, 1)
    gram = gram / np.linalg.norm(gram, axis=(1, 2), keepdims=True)
    ideal = (np.eye(k) - 1 / k) / np.sqrt(k - 1)
    u = simplex(k)
    size = np.linalg.norm(mean.values, axis=(1, 2))
    aligned = np.einsum("tkp,kp->t", mean.values, u) / (size * np.sqrt(k)) if p == k else np.full(times.size, np.nan)
    a, b, _ = exact.integral(sde, times)
    rate = np.exp(b / (k - 1)) + np.exp(-(a - b) / k) if _has_rate(sde) else np.full(times.size, np.nan)
    possible, side, reason = _verdict(sde, times, a, b)
    return Collapse(
        times,
        _nc1(sde, times, centred, mean.log_scale),
        cosine,
        np.abs(cosine[:, off] + 1 / (k - 1)).max(axis=1),
        norms.std(axis=1) / norms.mean(axis=1),
        np.linalg.norm(gram - ideal, axis=(1, 2)),
        aligned,
        rate,
        possible,
        side,
        reason,
    )


def _has_rate(sde: Equation) -> bool:
    return sde.drift.name == "logits" and sde.modes is not None


def _nc1(sde: Equation, t: Times, centred: np.ndarray, log_scale: Times) -> Times:
    spent = exact.spent_noise(sde, t)
    k = sde.n_classes
    if sde.acts_on == "own":
        size = sde.means.size
        found = exact.covariance(sde, t, 1)
        blocks = found.values.reshape(t.size, k, size // k, k, size // k)
        within, scale = np.einsum("tkakb->tab", blocks) / k, found.log_scale
    else:
        start, noise = sde.initial_covariance.mean(axis=0), sde.noise.shape.mean(axis=0)
        within, scale = start + spent[:, None, None] * noise, np.zeros(t.size)
    between = centred.transpose(0, 2, 1) @ centred / k
    inverse = np.linalg.pinv(between, rcond=1e-10, hermitian=True)
    return np.einsum("tab,tba->t", within, inverse) / k * np.exp(scale - 2 * log_scale)


def _verdict(sde: Equation, t: Times, a: Times, b: Times) -> tuple[bool, str, str]:
    k = sde.n_classes
    if sde.drift.name == "isotropic":
        return False, "right", "the isotropic drift rescales the centred class means by one factor: angles never change"
    if not _has_rate(sde):
        return False, "right", "no rate is known for this drift: read the metrics"
    s = float(np.einsum("kp,kp->k", sde.means, simplex(k)).mean())
    side = "right" if s > 0 else "wrong"
    last = int(np.argmax(t))
    if s == 0:
        return False, side, "the start has no component along the simplex (mean of u_k · X^k(0) is 0): nothing to grow"
    earlier = exact.integral(sde, np.array([sde.start + (t[last] - sde.start) / 2]))[1][0]
    if b[last] >= 0 or earlier - b[last] < _FALLING * abs(b[last]):
        return (
            False,
            side,
            f"B is bounded below (B = {b[last]:.3g} at t = {t[last]:g}, {earlier:.3g} half way): without a negative "
            "impact between classes the deviations do not fade",
        )
    toward = "the simplex" if s > 0 else "minus the simplex, the wrong side: the start points away from the labels"
    return True, side, f"B falls (B = {b[last]:.3g}): class means turn to {toward}, at the rate e^(B/(K-1))"
