"""The local elasticity matrix E, straight from a probe measurement (spec lesde 8, last entry; 1.1 for its meaning).

A step on a sample of class l moves a sample of class k by E_kl H_kl f(x_l): E_kl is the least-squares slope of the
observed movements on v = H_kl f(x_l), the source's own output before the step, over all pairs of the two classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float, Int

from local_elasticity.base.checks import check_choice, check_fraction, check_labels, check_seed, check_whole, in_words
from local_elasticity.base.errors import InputError
from local_elasticity.lesde.drift import simplex
from local_elasticity.similarity.tables import _classes

if TYPE_CHECKING:
    import xarray as xr

    from local_elasticity.impact import Impact

Cells = Float[np.ndarray, "k k"]
Interval = tuple[float, float]
CLEAR = 10  # times the noise floor that a regressor must exceed, as movements must


@dataclass(frozen=True, eq=False)
class ImpactMatrix:
    """E as it was measured: rows are the classes that move, columns the classes stepped on.

    Attributes:
        classes: the labels, ascending.
        values: E[k, l], per step of the optimiser, without the 1/K of the LE-SDE; NaN where it cannot be told.
        standard_error: over the resamples.
        interval_low: lower end of the bootstrap intervals, over sources and targets.
        interval_high: their upper end.
        reasons: why a cell, or its interval, is NaN, by (k, l).
        n_pairs: pairs of each cell.
        alpha: mean of the diagonal.
        beta: mean of the other cells.
        alpha_interval: its interval.
        beta_interval: its interval.
        gap_interval: of alpha - beta.
        departure: ‖E - (alpha - beta) I - beta J‖ / ‖E‖: how much of E two numbers leave unsaid.
        departure_interval: its interval; a departure is positive by its nature, compare it with the next.
        departure_by_chance: the departure that sampling alone would make.
        drift: "isotropic" or "logits".
        update: the step that was taken.
        confidence: coverage of the intervals.
        n_boot: resamples.
        seed: of the resampling.
    """

    classes: Int[np.ndarray, " k"]
    values: Cells
    standard_error: Cells
    interval_low: Cells
    interval_high: Cells
    reasons: dict[tuple[int, int], str]
    n_pairs: Int[np.ndarray, "k k"]
    alpha: float
    beta: float
    alpha_interval: Interval
    beta_interval: Interval
    gap_interval: Interval
    departure: float
    departure_interval: Interval
    departure_by_chance: float
    drift: str
    update: str
    confidence: float
    n_boot: int
    seed: int

    def to_xarray(self) -> xr.Dataset:
        """The cells as a dataset with dimensions ``target_class`` (moved) and ``source_class`` (stepped on)."""
        import xarray as xr

        dims = ("target_class", "source_class")
        names = ("values", "standard_error", "interval_low", "interval_high", "n_pairs")
        scalars = {"alpha": self.alpha, "beta": self.beta, "departure": self.departure}
        labels = self.classes.tolist()
        return xr.Dataset(
            {name: (dims, getattr(self, name)) for name in names} | scalars,
            coords={dim: labels for dim in dims},
            attrs={"drift": self.drift, "update": self.update, "confidence": self.confidence, "seed": self.seed},
        )


def impact_matrix(
    impact: Impact,
    ys: Any,
    yt: Any,
    drift: Literal["isotropic", "logits"] = "isotropic",
    *,
    n_boot: int = 200,
    confidence: float = 0.95,
    seed: int = 0,
) -> ImpactMatrix:
    """Estimate the matrix E from the movements that single steps made.

    E_kl = Σ ⟨change, v⟩ / Σ ⟨v, v⟩ over the pairs of class l (source) and class k (target), with v = H_kl f(x_source)
    before the step. It is per step of the optimiser; the LE-SDE, in which each class is drawn every K-th time, divides
    it by K.

    Args:
        impact: what ``le.measure`` found.
        ys: (n_s,) classes of the sources.
        yt: (n_t,) classes of the targets.
        drift: "isotropic": v is the source's output. "logits": its part along u_l, the label's corner of the simplex.
        n_boot: resamples of sources and targets; 0 for no intervals.
        confidence: coverage of the intervals.
        seed: of the resampling.

    Returns:
        The matrix, its summary by alpha and beta, and how far it departs from that summary.

    Raises:
        InputError: for labels that do not fit, or a drift that the outputs do not have.
    """
    _check_impact(impact)
    n_boot, seed = check_whole("n_boot", n_boot, 0), check_seed("seed", seed)
    confidence = check_fraction("confidence", confidence)
    check_choice("drift", drift, ("isotropic", "logits"))
    sources, targets = check_labels("ys", ys), check_labels("yt", yt)
    change = impact.change.detach().cpu().double().numpy()
    before = impact.source_before.detach().cpu().double().numpy()
    noise = float(impact.noise_floor.detach().cpu().double().median())
    if sources.shape != change.shape[:1] or targets.shape != change.shape[1:2]:
        raise InputError(
            expected=f"{change.shape[0]} source labels and {change.shape[1]} target labels",
            got=f"{sources.size} and {targets.size}",
            do="pass the labels of what was measured, in its order",
        )
    classes = _classes(sources, targets)
    if len(classes) < 2:
        raise InputError(expected="at least 2 classes", got=f"K = {len(classes)}", do="measure probes of more classes")
    v = _regressors(before, sources, drift, impact.outputs)
    moved = np.einsum("stj,sj->st", change, v)
    size = np.einsum("sj,sj->s", v, v)
    rows = [np.flatnonzero(sources == c) for c in classes]
    columns = [np.flatnonzero(targets == c) for c in classes]
    ones = ([np.ones((1, r.size)) for r in rows], [np.ones((1, c.size)) for c in columns])
    weak = {at for at, r in enumerate(rows) if np.sqrt(size[r].mean()) < CLEAR * noise or not size[r].any()}
    values = _matrices(moved, size, rows, columns, *ones, weak)[0]
    drawn = _draws(rows, columns, n_boot, seed)
    boot = _matrices(moved, size, rows, columns, *drawn, weak) if n_boot else np.empty((0, *values.shape))
    single = np.array([[r.size == 1 or c.size == 1 for r in rows] for c in columns])
    boot[:, single] = np.nan
    low, high, error = _spread(boot, confidence)
    alpha, beta, departure = (float(x[0]) for x in _summary(values[None]))
    a, b, d = _summary(boot)
    with np.errstate(invalid="ignore", divide="ignore"):
        chance = float(np.sqrt(np.mean(_residual(boot - values) ** 2)) / np.linalg.norm(values)) if n_boot else np.nan
    return ImpactMatrix(
        classes=classes,
        values=values,
        standard_error=error,
        interval_low=low,
        interval_high=high,
        reasons=_reasons(classes, weak, single, noise, n_boot),
        n_pairs=np.array([[r.size * c.size for r in rows] for c in columns]),
        alpha=alpha,
        beta=beta,
        alpha_interval=_ends(a, confidence),
        beta_interval=_ends(b, confidence),
        gap_interval=_ends(a - b, confidence),
        departure=departure,
        departure_interval=_ends(d, confidence),
        departure_by_chance=chance,
        drift=drift,
        update=impact.update,
        confidence=confidence,
        n_boot=n_boot,
        seed=seed,
    )


def _check_impact(impact: Any) -> None:
    if not all(hasattr(impact, name) for name in ("change", "source_before", "noise_floor", "outputs", "update")):
        raise InputError(
            expected="impact: what le.measure returns", got=in_words(impact), do="write impact = le.measure(...)"
        )


def _regressors(before: np.ndarray, labels: np.ndarray, drift: str, outputs: str) -> Float[np.ndarray, "s j"]:
    """V = H f(x) of each source."""
    if drift == "isotropic":
        return before
    K = before.shape[1]
    if outputs != "logits" or K < 2 or labels.max() >= K:
        raise InputError(
            expected="logits, one for each class (drift 'logits')",
            got=f"{outputs} of width {K}, labels up to {labels.max()}",
            do="use drift='isotropic'",
        )
    u = simplex(K)[labels]
    return np.einsum("sj,sj->s", before, u)[:, None] * u


def _draws(rows: list[np.ndarray], columns: list[np.ndarray], n_boot: int, seed: int) -> tuple[list, list]:
    """How often every resample draws each source and each target, by class."""
    rng = np.random.default_rng(seed)
    both = [
        [rng.multinomial(m.size, np.full(m.size, 1 / m.size), size=n_boot).astype(float) for m in members]
        for members in (rows, columns)
    ]
    return both[0], both[1]


def _matrices(
    moved: np.ndarray,
    size: np.ndarray,
    rows: list[np.ndarray],
    columns: list[np.ndarray],
    source_weights: list[np.ndarray],
    target_weights: list[np.ndarray],
    weak: set[int],
) -> Float[np.ndarray, "b k k"]:
    """E of every resample, [moved class, class stepped on]."""
    out = np.full((len(source_weights[0]), len(columns), len(rows)), np.nan)
    for source, (r, w) in enumerate(zip(rows, source_weights, strict=True)):
        if source in weak:
            continue
        sums, squares = w @ moved[r], w @ size[r]
        for k, (c, u) in enumerate(zip(columns, target_weights, strict=True)):
            with np.errstate(invalid="ignore", divide="ignore"):
                out[:, k, source] = np.einsum("bt,bt->b", sums[:, c], u) / (squares * u.sum(axis=1))
    return out


def _summary(E: Float[np.ndarray, "b k k"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Alpha, beta and the departure from them."""
    own = np.eye(E.shape[-1], dtype=bool)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (
            E[:, own].mean(axis=1),
            E[:, ~own].mean(axis=1),
            _residual(E) / np.sqrt(np.einsum("bkl,bkl->b", E, E)),
        )


def _residual(E: Float[np.ndarray, "b k k"]) -> Float[np.ndarray, " b"]:
    """Length of what two numbers leave of each matrix."""
    own = np.eye(E.shape[-1], dtype=bool)
    rest = E - np.where(own, E[:, own].mean(axis=1)[:, None, None], E[:, ~own].mean(axis=1)[:, None, None])
    return np.sqrt(np.einsum("bkl,bkl->b", rest, rest))


def _spread(boot: np.ndarray, confidence: float) -> tuple[Cells, Cells, Cells]:
    if len(boot) < 2:
        nothing = np.full(boot.shape[1:], np.nan)
        return nothing, nothing, nothing
    low, high = np.quantile(boot, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return low, high, boot.std(axis=0, ddof=1)


def _ends(draws: np.ndarray, confidence: float) -> Interval:
    if len(draws) < 2 or np.isnan(draws).any():
        return float("nan"), float("nan")
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _reasons(
    classes: np.ndarray, weak: set[int], single: np.ndarray, noise: float, n_boot: int
) -> dict[tuple[int, int], str]:
    reasons = {}
    for k in range(len(classes)):
        for source in range(len(classes)):
            cell = (int(classes[k]), int(classes[source]))
            if source in weak:
                reasons[cell] = (
                    f"outputs of the sources of class {classes[source]} along the drift are below {CLEAR} times the "
                    f"noise floor ({noise:.1e}): nothing to divide by"
                )
            elif n_boot < 2:
                reasons[cell] = "no interval: n_boot below 2"
            elif single[k, source]:
                reasons[cell] = "no interval: a class with one probe"
    return reasons
