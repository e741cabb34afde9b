"""Separability over the tail exponent and scale of alpha - beta, sampled."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from local_elasticity.base.checks import check_array, check_flag, check_seed, check_whole
from local_elasticity.base.drawing import drawn
from local_elasticity.base.errors import InputError
from local_elasticity.base.progress import Progress
from local_elasticity.lesde.model import LESDE
from local_elasticity.lesde.separability import Times, separability

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class PhaseDiagram:
    """Probability that a pair is separable, over the tail exponent and scale of alpha - beta = c (1 + t)^-r.

    Attributes:
        exponents: r, (R,).
        scales: c, (C,).
        t: times, (T,).
        probability: share of pairs, (R, C, T).
        all_pairs: share of paths in which all pairs are separable, (R, C, T).
        low: lower end of the interval of ``all_pairs``.
        high: its upper end.
        n_classes: K.
        n_per_class: n.
        n_paths: paths a cell.
    """

    exponents: Times
    scales: Times
    t: Times
    probability: Float[np.ndarray, "r c t"]
    all_pairs: Float[np.ndarray, "r c t"]
    low: Float[np.ndarray, "r c t"]
    high: Float[np.ndarray, "r c t"]
    n_classes: int
    n_per_class: int
    n_paths: int

    def plot(self, **options: Any) -> Figure:
        """The diagram at the last time (``at=`` another index)."""
        return drawn("sde.phase_figure", self, **options)


def _grid(name: str, values: Any) -> Times:
    grid = np.atleast_1d(check_array(name, values))
    if grid.ndim != 1:
        raise InputError(expected=f"{name}: a list of numbers", got=f"shape {grid.shape}", do="pass one dimension")
    return grid


def phase_diagram(
    exponents: Any,
    scales: Any,
    t: Any,
    *,
    initial: Any = None,
    n_classes: int = 3,
    drift: Any = "isotropic",
    sigma: Any = 0.1,
    n_per_class: int = 50,
    n_paths: int = 50,
    seed: int = 0,
    progress: bool = False,
) -> PhaseDiagram:
    """Sample separability over (r, c), with alpha = c (1 + t)^-r and beta = 0.

    Args:
        exponents: r.
        scales: c.
        t: times.
        initial: class means; the unit vectors by default.
        n_classes: K.
        drift: as in `LESDE`.
        sigma: as in `LESDE`.
        n_per_class: samples a class.
        n_paths: paths a cell.
        seed: one generator runs through the whole diagram.
        progress: show a bar.

    Returns:
        The diagram.

    Raises:
        InputError: for grids, counts or a model that are none.
    """
    n_classes = check_whole("n_classes", n_classes, 2)
    n_per_class, n_paths = check_whole("n_per_class", n_per_class), check_whole("n_paths", n_paths)
    check_flag("progress", progress)
    seed = check_seed("seed", seed)
    r, c, times = (_grid(name, x) for name, x in (("exponents", exponents), ("scales", scales), ("t", t)))
    start = np.eye(n_classes) if initial is None else initial
    generator = np.random.default_rng(seed)
    cells = np.empty((4, r.size, c.size, times.size))
    with Progress(progress, r.size * c.size, "phase diagram") as bar:
        for (i, exponent), (j, scale) in itertools.product(enumerate(r), enumerate(c)):
            model = LESDE(lambda s, e=exponent, x=scale: x * (1 + s) ** -e, 0.0, n_classes, drift, sigma, start)
            found = separability(model, times, n_per_class, n_paths, generator)
            cells[:, i, j] = found.pair_probability, found.probability, found.low, found.high
            bar.advance()
    one, all_pairs, low, high = cells
    return PhaseDiagram(r, c, times, one, all_pairs, low, high, n_classes, n_per_class, n_paths)
