"""Figures of ensembles and of what is estimated from them: class means in the plane, rates, corruption, imitation.

They follow figures 1, 3, 4 and 5 of the second paper (arXiv:2110.05960).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from local_elasticity.lesde.published import displayed
from local_elasticity.report.estimation import ORANGE, _thinned, _without_spikes
from local_elasticity.report.style import (
    BLUE,
    LINES,
    MARKERS,
    NORMAL,
    OTHERS,
    SMALL,
    finish_axis,
    new_figure,
    new_panels,
    write_head,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from local_elasticity.lesde.estimation.estimate import Fit

CLASS_COLOURS = (BLUE, *OTHERS)
CLASS_LINES = ("-", *LINES)
Band = tuple[np.ndarray, np.ndarray, np.ndarray]
Means = Float[np.ndarray, "looks K p"]


@dataclass(frozen=True)
class Dynamics:
    """Class means of one training, for `class_means_in_the_plane`.

    Attributes:
        name: of the data.
        class_names: K names.
        times: updates made.
        means: ensemble class means at these times.
        pair: the two classes whose difference at the end is the direction of the projections.
        sample_times: times at which single samples are shown.
        samples: their logits (times, networks, K).
        labels: their classes (times, networks).
    """

    name: str
    class_names: Sequence[str]
    times: Float[np.ndarray, " looks"]
    means: Means
    pair: tuple[int, int]
    sample_times: np.ndarray
    samples: np.ndarray
    labels: np.ndarray


def class_means_in_the_plane(content: Sequence[Dynamics], title: str, *, width: float = 6.9) -> Figure:
    """Figure 1: triangles of the class means in the plane of centred logits, and projections through time.

    Args:
        content: one training a row; K = 3.
        title: over the figure.
        width: inches.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    figure = new_figure(width, 2.75 * len(content) + 0.3)
    axes = figure.subplots(len(content), 2, squeeze=False)
    for (left, right), one in zip(axes, content, strict=True):
        colours = ScalarMappable(Normalize(one.times[0], one.times[-1]), "viridis")
        _triangles(left, one, colours)
        bar = figure.colorbar(colours, ax=left, pad=0.02)
        bar.set_label("training step", fontsize=SMALL)
        bar.ax.tick_params(labelsize=SMALL - 1, length=2)
        _projections(right, one)
    write_head(figure, [title])
    return figure


def _plane() -> Float[np.ndarray, "3 2"]:
    """Columns span the logits of mean 0; the corner of class 0 points up."""
    up = np.array([2, -1, -1]) / np.sqrt(6)
    return np.stack([np.array([0, -1, 1]) / np.sqrt(2), up], axis=1)


def _triangles(axis: Axes, one: Dynamics, colours: Any) -> None:
    points = one.means @ _plane()
    for at in _thinned(len(one.times), 20):
        corners = points[at][[0, 1, 2, 0]]
        axis.plot(*corners.T, color=colours.to_rgba(one.times[at]), linewidth=0.8)
    for k, name in enumerate(one.class_names):
        axis.plot(*points[:, k].T, color=CLASS_COLOURS[k], linestyle=CLASS_LINES[k], linewidth=1.4, label=name)
        axis.plot(*points[-1, k], marker=MARKERS[k], color=CLASS_COLOURS[k], markersize=5)
    axis.set_aspect("equal", adjustable="datalim")
    axis.legend(fontsize=SMALL - 0.5, frameon=False, loc="best", handlelength=2.4)
    axis.set_title(f"{one.name}: class means, logits of mean 0", fontsize=NORMAL)
    finish_axis(axis, "towards the logit of class 0", log=False)
    axis.set_xlabel("towards class 2, away from class 1", fontsize=SMALL)


def _projections(axis: Axes, one: Dynamics) -> None:
    a, b = one.pair
    nu = (one.means[-2:, a] - one.means[-2:, b]).mean(axis=0)
    nu = nu / np.linalg.norm(nu)
    for k, name in enumerate(one.class_names):
        style = {"color": CLASS_COLOURS[k], "linestyle": CLASS_LINES[k]}
        own = one.labels == k
        times = np.broadcast_to(one.sample_times[:, None], own.shape)[own]
        axis.plot(times, one.samples[own] @ nu, ".", color=CLASS_COLOURS[k], markersize=1.2, alpha=0.35)
        axis.plot(one.times, one.means[:, k] @ nu, **style, linewidth=1.5, label=name)
    axis.set_title(f"along class {a} - class {b}", fontsize=NORMAL)
    finish_axis(axis, "projection of logits", log=False)
    axis.set_xlabel("training step", fontsize=SMALL)


def rate_panels(
    rows: Sequence[tuple[str, Fit, Fit | None]],
    title: str,
    *,
    direct: Mapping[str, Mapping[str, Any]] | None = None,
    width: float = 6.9,
) -> Figure:
    """Figure 3: A and B on the left, alpha and beta on the right, a row for each data set and model.

    Args:
        rows: name, estimates as defined (lines and bands), and as published (thin dots), which may be missing.
        title: over the figure.
        direct: name of a row -> "t", and Bands "alpha", "beta" measured directly, drawn as points.
        width: inches.
    """
    figure = new_figure(width, 1.75 * len(rows) + 0.6)
    axes = figure.subplots(len(rows), 2, squeeze=False, sharex="row")
    for (left, right), (name, fit, published) in zip(axes, rows, strict=True):
        for axis, pair in ((left, ("A", "B")), (right, ("alpha", "beta"))):
            for quantity, colour, line in zip(pair, (BLUE, ORANGE), ("-", "--"), strict=True):
                _estimated(axis, fit, published, quantity, colour, line)
            axis.axhline(0, color="0.6", linewidth=0.6, zorder=0)
        curves = [fit.alpha, fit.beta]
        if direct and name in direct:
            _measured_points(right, direct[name])
        _without_spikes(right, curves)
        left.set_title(name, fontsize=NORMAL, loc="left")
        finish_axis(left, "integral", log=False)
        finish_axis(right, "impact per step", log=False)
    for axis in axes[-1]:
        axis.set_xlabel("training step", fontsize=SMALL)
    handles = [*axes[0, 0].lines, *axes[0, 1].lines]
    handles = [line for line in handles if not str(line.get_label()).startswith("_")]
    figure.legend(
        handles,
        [str(line.get_label()) for line in handles],
        loc="outside lower center",
        ncols=4,
        fontsize=SMALL,
        frameon=False,
    )
    write_head(figure, [title])
    return figure


def _estimated(axis: Axes, fit: Fit, published: Fit | None, quantity: str, colour: str, line: str) -> None:
    at = _thinned(len(fit.t))
    low, high = fit.intervals[quantity]
    axis.plot(fit.t[at], getattr(fit, quantity)[at], color=colour, linestyle=line, linewidth=1.4, label=quantity)
    if np.isfinite(low).any():
        axis.fill_between(fit.t[at], low[at], high[at], color=colour, alpha=0.22, linewidth=0)
    if published is not None:
        shown, values = displayed(getattr(published, quantity))
        at = _thinned(len(shown), 400)
        label = f"{quantity}, as published"
        axis.plot(published.t[shown][at], values[at], ":", color=colour, linewidth=0.9, alpha=0.8, label=label)


def _measured_points(axis: Axes, found: Mapping[str, Any]) -> None:
    for quantity, colour, marker in (("alpha", BLUE, "o"), ("beta", ORANGE, "s")):
        _points(axis, found["t"], found[quantity], colour, marker, f"{quantity}, measured")


def _points(axis: Axes, t: Any, band: Band, colour: str, marker: str, label: str) -> None:
    mean, low, high = band
    known = np.isfinite(low) & np.isfinite(high)
    axis.plot(t, mean, linestyle="none", marker=marker, color=colour, markersize=3, mfc="none", label=label)
    axis.vlines(np.asarray(t)[known], low[known], high[known], color=colour, linewidth=0.7, alpha=0.7)


@dataclass(frozen=True)
class Curve:
    """One curve with its band.

    Attributes:
        name: in the legend.
        x: positions.
        band: values, lower and upper end (NaN for none).
        points: marks with bars instead of a line.
    """

    name: str
    x: np.ndarray
    band: Band
    points: bool = False


@dataclass(frozen=True)
class Chart:
    """One panel of curves.

    Attributes:
        title: over it.
        y_label: of its axis.
        x_label: of its axis.
        curves: what it shows.
        levels: horizontal marks (y, words).
        marks: vertical marks (x, words).
        log: logarithmic y axis.
        shaded: (from, to, "good" or "bad") horizontal bands.
        limits: of the y axis.
        gradual: the curves are ordered: colours go from dark to light.
    """

    title: str
    y_label: str
    x_label: str
    curves: Sequence[Curve]
    levels: Sequence[tuple[float, str]] = field(default_factory=tuple)
    marks: Sequence[tuple[float, str]] = field(default_factory=tuple)
    log: bool = False
    shaded: Sequence[tuple[float, float, str]] = field(default_factory=tuple)
    limits: tuple[float, float] | None = None
    gradual: bool = False


def charts(
    content: Sequence[Chart], title: str, *, columns: int = 2, width: float = 6.9, height: float = 2.3
) -> Figure:
    """Panels of curves in rows.

    Args:
        content: the panels.
        title: over the figure.
        columns: panels a row.
        width: inches.
        height: inches of a row.
    """
    figure, axes = new_panels(len(content), columns, width, height, 0.35)
    explained: set[tuple[str, ...]] = set()
    for axis, chart in zip(axes, content, strict=True):
        _chart(axis, chart)
        names = tuple(curve.name for curve in chart.curves if curve.name)
        if names and names not in explained:
            many = len(names) > 5  # then curves run behind it
            axis.legend(
                fontsize=SMALL - 1,
                handlelength=2.2,
                ncols=1 + many,
                frameon=many,
                framealpha=0.85,
                edgecolor="none",
            )
            explained.add(names)
    write_head(figure, [title])
    return figure


def _chart(axis: Axes, chart: Chart) -> None:
    import matplotlib as mpl
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    shades = {"good": "#009E73", "bad": "#D55E00"}
    for low, high, kind in chart.shaded:
        axis.axhspan(low, high, color=shades[kind], alpha=0.08, linewidth=0)
    palette = mpl.colormaps["viridis"](np.linspace(0, 0.8, max(2, len(chart.curves))))
    for at, curve in enumerate(chart.curves):
        colour = palette[at] if chart.gradual else CLASS_COLOURS[at % len(CLASS_COLOURS)]
        line = CLASS_LINES[at % len(CLASS_LINES)]
        mean, low, high = (np.asarray(part, dtype=float) for part in curve.band)
        if curve.points:
            _points(axis, curve.x, (mean, low, high), colour, MARKERS[at % len(MARKERS)], curve.name)
            axis.plot(curve.x, mean, color=colour, linestyle=line, linewidth=0.8, alpha=0.6)
            continue
        axis.plot(curve.x, mean, color=colour, linestyle=line, linewidth=1.3, label=curve.name)
        if np.isfinite(low).any():
            axis.fill_between(curve.x, low, high, color=colour, alpha=0.18, linewidth=0)
    for y, words in chart.levels:
        axis.axhline(y, color="0.4", linestyle=":", linewidth=0.9)
        axis.annotate(
            words,
            (1, y),
            xycoords=("axes fraction", "data"),
            xytext=(-2, 1.5),
            textcoords="offset points",
            fontsize=SMALL - 1,
            ha="right",
        )
    for x, words in chart.marks:
        axis.axvline(x, color="0.35", linewidth=0.9)
        axis.annotate(
            words,
            (x, 0.98),
            xycoords=("data", "axes fraction"),
            xytext=(-2, 0),
            textcoords="offset points",
            rotation=90,
            fontsize=SMALL - 1,
            ha="right",
            va="top",
        )
    axis.set_title(chart.title, fontsize=NORMAL, loc="left")
    finish_axis(axis, chart.y_label, log=chart.log)
    if chart.log:
        low, high = axis.get_ylim()
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 2000 * low else (1,)))
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
    if chart.limits:
        axis.set_ylim(*chart.limits)
    axis.set_xlabel(chart.x_label, fontsize=SMALL)


def located(rows: Sequence[tuple[str, float, float, float]], predicted: float, title: str, label: str) -> Figure:
    """Where several ways put a transition: a point with its interval a row, and the predicted place.

    Args:
        rows: name, place, lower and upper end (NaN where there is none).
        predicted: the predicted place.
        title: over the figure.
        label: of the x axis.
    """
    figure = new_figure(5.2, 0.28 * len(rows) + 1.1)
    axis = figure.subplots()
    axis.axvline(predicted, color="0.35", linewidth=1)
    for at, (_, value, low, high) in enumerate(rows):
        y = len(rows) - 1 - at
        if np.isfinite(low):
            axis.plot([low, high], [y, y], color=BLUE, linewidth=1.4)
        if np.isfinite(value):
            axis.plot(value, y, "o", color=BLUE, markersize=4)
        else:
            axis.annotate("nowhere", (0.02, y), xycoords=("axes fraction", "data"), fontsize=SMALL - 1, va="center")
    axis.set_yticks(range(len(rows)), labels=[name for name, *_ in rows][::-1])
    finish_axis(axis, "", log=False)
    axis.set_ylim(-0.6, len(rows) - 0.4)
    axis.set_xlim(-0.02, 1.0)
    axis.set_xlabel(label, fontsize=SMALL)
    write_head(figure, [title])
    return figure


@dataclass(frozen=True)
class Imitation:
    """One panel of `imitation`.

    Attributes:
        title: over it.
        t: times.
        observed: class means of one class (T, K).
        predicted: those of the model.
        sd: spread of the model, (T, K); NaN for none.
    """

    title: str
    t: np.ndarray
    observed: np.ndarray
    predicted: np.ndarray
    sd: np.ndarray


def imitation(content: Sequence[Imitation], title: str, *, columns: int = 3, width: float = 6.9) -> Figure:
    """Figure 5: logits of one class's mean, the network (dots) and the model (lines, bands of 2 standard deviations).

    Args:
        content: the panels.
        title: over the figure.
        columns: panels a row.
        width: inches.
    """
    rows = -(-len(content) // columns)
    figure = new_figure(width, 2.0 * rows + 0.6)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, one in zip(axes.flat, content, strict=False):
        line, dots = _thinned(len(one.t), 600), _thinned(len(one.t), 30)
        for j in range(one.observed.shape[1]):
            colour = CLASS_COLOURS[j]
            axis.plot(
                one.t[line], one.predicted[line, j], color=colour, linestyle=CLASS_LINES[j], linewidth=1.3,
                label=f"logit {j}",
            )  # fmt: skip
            axis.plot(one.t[dots], one.observed[dots, j], MARKERS[j], color=colour, markersize=2.2)
            low, high = (one.predicted[line, j] + c * one.sd[line, j] for c in (-2, 2))
            if np.isfinite(low).any():
                axis.fill_between(one.t[line], low, high, color=colour, alpha=0.15, linewidth=0)
        axis.set_title(one.title, fontsize=SMALL + 0.5, loc="left")
        finish_axis(axis, "logit", log=False)
        seen = np.abs(one.observed).max()
        axis.set_ylim(-2.2 * seen, 2.2 * seen)
    axes.flat[0].legend(fontsize=SMALL - 1, frameon=False, loc="best", handlelength=2.2)
    for axis in axes.flat[len(content) :]:
        axis.set_axis_off()
    for column in axes.T:
        [axis for axis in column if axis.axison][-1].set_xlabel("training step", fontsize=SMALL)
    write_head(figure, [title])
    return figure
