"""Figures of an estimated LE-SDE: its rates with bands, the model beside the data, and the decay of the rates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from local_elasticity.report.figures import save
from local_elasticity.report.reading import READABLE_CLASSES
from local_elasticity.report.style import (
    BLUE,
    NORMAL,
    OTHERS,
    SMALL,
    brief,
    finish_axis,
    legend_above,
    new_figure,
    other_style,
    write_head,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from local_elasticity.lesde.estimation.estimate import Fit

ORANGE = OTHERS[2]
SHOWN = 2000  # points of a curve that a figure can show


def rate_curves(fit: Fit, *, width: float = 3.6) -> Figure:
    """A and B above, alpha and beta beneath, with their intervals.

    Args:
        fit: the estimates.
        width: inches.
    """
    figure = new_figure(width, 4.6)
    above, beneath = figure.subplots(2, 1, sharex=True)
    at = _thinned(len(fit.t))
    for axis, pair, label in (
        (above, ("A", "B"), "integral since the baseline"),
        (beneath, ("alpha", "beta"), "impact per step"),
    ):
        names = {"A": "A = ∫ alpha", "B": "B = ∫ beta"}
        for name, colour, line in zip(pair, (BLUE, ORANGE), ("-", "--"), strict=True):
            low, high = fit.intervals[name]
            curve = getattr(fit, name)
            axis.plot(fit.t[at], curve[at], color=colour, linestyle=line, linewidth=1.2, label=names.get(name, name))
            if np.isfinite(low).any():
                axis.fill_between(fit.t[at], low[at], high[at], color=colour, alpha=0.25, linewidth=0)
        finish_axis(axis, label, log=False)
        legend_above(axis, width)
        axis.axhline(0, color="0.6", linewidth=0.6, zorder=0)
    if np.isfinite(fit.alpha).any():
        _without_spikes(beneath, [fit.alpha, fit.beta])
    beneath.set_xlabel("training step", fontsize=SMALL)
    band = f"{fit.confidence:.0%} bands from {fit.n_trials} trials" if not fit.no_interval else "no bands: no trials"
    write_head(
        figure, [f"Impact within (alpha) and between (beta) classes: {_model(fit)}", f"window {fit.window}, {band}"]
    )
    return figure


def model_and_data(fit: Fit, *, class_names: Sequence[str] | None = None, width: float = 6.9) -> Figure:
    """The class means that were observed (dots) and those of the estimated model (lines), a panel a class.

    Args:
        fit: the estimates.
        class_names: names of the classes.
        width: inches.
    """
    comparison = fit.compare()
    K, p = fit.class_means.shape[1:]
    names = [str(k) for k in range(K)] if class_names is None else [str(name) for name in class_names]
    shown, columns = min(K, READABLE_CLASSES), min(K, 3)
    rows = -(-shown // columns)
    figure = new_figure(width, 1.75 * rows + 0.95)
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    at, dots = _thinned(len(fit.t)), _thinned(len(fit.t), 40)
    square = p == K
    for k, axis in enumerate(axes.flat):
        if k >= shown:
            axis.set_axis_off()
            continue
        for j in range(min(p, READABLE_CLASSES)):
            own = square and j == k
            style = {"color": BLUE, "linewidth": 1.7} if own else {**other_style(j), "marker": "", "linewidth": 1.1}
            line = axis.plot(fit.t[at], comparison.predicted[at, k, j], **style)[0]
            sd = comparison.sd[dots, k, j]
            bars = 2 * sd if np.isfinite(sd).all() else None
            axis.errorbar(
                fit.t[dots], comparison.observed[dots, k, j], yerr=bars, fmt="o", ms=2.0, lw=0.5, color=line.get_color()
            )
        axis.set_title(f"mean of class {brief(names[k])}", fontsize=NORMAL, parse_math=False)
        finish_axis(axis, ("logit" if square else "feature") if k % columns == 0 else "", log=False)
        if k + columns >= shown:
            axis.set_xlabel("training step", fontsize=SMALL)
            axis.tick_params(labelbottom=True)
    _coordinates_legend(figure, names if square else [f"coordinate {j}" for j in range(p)], square)
    good = comparison.plain
    bars_words = ", ±2 sd" if np.isfinite(comparison.sd).any() else ""
    write_head(
        figure,
        [
            f"Class means: observed (dots{bars_words}) and {_model(fit)} (lines)",
            f"relative error {good.relative_rmse:.2g}, R² {good.r2:.3f}, nothing rescaled",
        ],
    )
    return figure


def tail_decay(fit: Fit, *, width: float = 3.6) -> Figure:
    """Averages of alpha and of alpha - beta over doubling stretches of time, on logarithmic axes, with their slopes.

    Args:
        fit: the estimates.
        width: inches.
    """
    figure = new_figure(width, 3.1)
    axis = figure.subplots()
    drawn = False
    for quantity, colour, mark in (("alpha", BLUE, "o"), ("gap", ORANGE, "s")):
        tail = fit.tail("dyadic", quantity)  # pyright: ignore[reportArgumentType]
        if not len(tail.times):
            continue
        size = np.abs(tail.averages)
        name = "alpha" if quantity == "alpha" else "alpha - beta"
        slope = f"$t^{{{-tail.value:.2f}}}$" if np.isfinite(tail.value) else "no exponent"
        middle = tail.times / np.sqrt(2)
        axis.plot(middle, size, mark, color=colour, ms=4, mfc="none", label=f"{name}: {slope}")
        axis.plot(middle[tail.used], size[tail.used], mark, color=colour, ms=4)
        if np.isfinite(tail.value):
            x, y = np.log(middle[tail.used]), np.log(size[tail.used])
            axis.plot(np.exp(x), np.exp(y.mean() - tail.value * (x - x.mean())), color=colour, linewidth=1)
        if not drawn:
            axis.plot(middle, size.max() * middle[0] / middle, ":", color="0.45", linewidth=1, label="1/t")
        drawn = True
    if drawn:
        axis.set_xscale("log")
        axis.set_yscale("log")
        ticks = 10.0 ** np.arange(-9, 10)[:, None] * np.array([1, 2, 5])
        low, high = axis.get_xlim()
        shown = ticks[(ticks >= low) & (ticks <= high)]
        axis.set_xticks(shown, labels=[f"{x:g}" for x in shown])
        axis.set_xticks([], minor=True)
        axis.legend(fontsize=SMALL, frameon=False)
    else:
        axis.text(0.5, 0.5, fit.tail("dyadic").reason, transform=axis.transAxes, ha="center", fontsize=SMALL, wrap=True)
    finish_axis(axis, "average over [t/2, t]", log=False)
    axis.set_xlabel("training step", fontsize=SMALL)
    write_head(figure, [f"How fast impact decays: {_model(fit)}", "slower than 1/t separates; filled: in the fit"])
    return figure


def write_estimation(fit: Fit, folder: str | Path, class_names: Sequence[str] | None = None) -> list[Path]:
    """Write every figure of an estimate; the one of the model only where there is one.

    Args:
        fit: the estimates.
        folder: made when it is not there.
        class_names: names of the classes.

    Returns:
        The paths written, PNG and PDF.
    """
    paths = save(rate_curves(fit), folder, "rates")
    if np.isfinite(fit.A).any() and np.isfinite(fit.B).any():
        paths += save(model_and_data(fit, class_names=class_names), folder, "model-and-data")
    return paths + save(tail_decay(fit), folder, "tail")


def _model(fit: Fit) -> str:
    published = ", published estimator" if fit.estimator == "published" else ""
    return f"the {'L' if fit.model == 'logits' else 'I'}-model{published}"


def _thinned(n: int, most: int = SHOWN) -> np.ndarray:
    return np.unique(np.linspace(0, n - 1, min(n, most)).astype(int))


def _without_spikes(axis: Axes, curves: list[np.ndarray]) -> None:
    """Keep the axis to the curves: bands of the first steps, where little is known, would flatten them."""
    values = np.concatenate([c[np.isfinite(c)] for c in curves])
    if values.size:
        low, high = np.quantile(values, [0.002, 0.998])
        room = 0.25 * max(high - low, 1e-12)
        axis.set_ylim(low - room, high + room)


def _coordinates_legend(figure: Figure, names: Sequence[str], square: bool) -> None:
    from matplotlib.lines import Line2D

    shown = list(names)[:READABLE_CLASSES]
    handles: list[Any] = [Line2D([], [], color=BLUE, linewidth=1.7)] if square else []
    labels = ["logit of its own class"] if square else []
    for j, name in enumerate(shown):
        handles.append(Line2D([], [], **{**other_style(j), "marker": "", "linewidth": 1.1}))
        labels.append(f"of class {brief(name)}" if square else name)
    legend = figure.legend(
        handles, labels, loc="outside lower center", ncols=4, fontsize=SMALL, frameon=False, handlelength=3.0
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
