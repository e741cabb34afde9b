"""Figures of the LE-SDE: paths with bands, separability over time, phase diagrams (matplotlib)."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np

from local_elasticity.report.reading import colours
from local_elasticity.report.style import (
    NORMAL,
    SMALL,
    draw_curve,
    finish_axis,
    legend_above,
    new_figure,
    other_style,
    own_style,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from local_elasticity.lesde.phase_diagram import PhaseDiagram
    from local_elasticity.lesde.separability import Separability


def paths_figure(
    t: np.ndarray,
    class_means: np.ndarray,
    mean: np.ndarray,
    spread: np.ndarray,
    *,
    detail: str = "",
    most_classes: int = 6,
    width: float = 6.9,
) -> Figure:
    """One panel a class: the exact mean of each feature with its ±2 sd band, and a few sampled class means.

    Args:
        t: save points.
        class_means: sampled class means, (paths, T, K, p).
        mean: their exact mean, (T, K, p).
        spread: their exact standard deviation, (T, K, p).
        detail: second line of the title.
        most_classes: show this many at most.
        width: inches.
    """
    _, _, k, p = class_means.shape
    shown, features = min(k, most_classes), min(p, 6)
    columns = min(shown, 3)
    rows = -(-shown // columns)
    figure = new_figure(width, 1.9 * rows + 0.95)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for c, axis in enumerate(axes.flat):
        if c >= shown:
            axis.set_axis_off()
            continue
        for j in range(features):
            style = _style(j, c, k == p)
            for path in class_means[:5, :, c, j]:
                axis.plot(t, path, color=style["color"], linewidth=0.4, alpha=0.5, zorder=1)
            centre, band = mean[:, c, j], 2 * spread[:, c, j]
            draw_curve(axis, t, (centre, centre - band, centre + band), f"feature {j}", style)
        axis.set_title(f"class {c}", fontsize=NORMAL)
        finish_axis(axis, "class mean" if c % columns == 0 else "", log=False)
        axis.yaxis.get_offset_text().set_fontsize(SMALL)
        if c + columns >= shown:
            axis.set_xlabel("time t", fontsize=SMALL)
            axis.tick_params(labelbottom=True)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    if k == p:  # the own logit has the style of "own" in every panel
        handles, labels = [], []
        from matplotlib.lines import Line2D

        for label, style in [("own logit", own_style()), *((f"logit {j}", other_style(j)) for j in range(features))]:
            handles.append(Line2D([], [], markersize=3, **style))
            labels.append(label)
    figure.legend(handles, labels, loc="outside lower center", ncols=7, fontsize=SMALL, frameon=False, handlelength=3.2)
    _headline(figure, "Class means of the LE-SDE: exact mean and ±2 sd, with five paths", detail)
    return figure


def _style(feature: int, c: int, logits: bool) -> dict[str, Any]:
    return own_style() if logits and feature == c else other_style(feature)


def separability_figure(found: Separability, *, detail: str = "", width: float = 3.5) -> Figure:
    """Probability that classes are separable, with its interval, over log R(t).

    Args:
        found: what `LESDE.separability` gave.
        detail: second line of the title.
        width: inches.
    """
    figure = new_figure(width, 3.7)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[1.3, 1])
    order = np.argsort(found.t)
    t = found.t[order]
    band = (found.probability[order], found.low[order], found.high[order])
    draw_curve(top, t, band, f"all pairs ({100 * found.confidence:g} % interval)", own_style())
    pairs = found.pair_probability[order]
    draw_curve(top, t, (pairs, np.full_like(pairs, np.nan), np.full_like(pairs, np.nan)), "one pair", other_style(0))
    if found.theory.random_labelling > 1e-3:
        top.axhline(found.theory.random_labelling, color="0.5", linestyle=":", linewidth=1)
    top.set_ylim(-0.04, 1.04)
    finish_axis(top, "P(separable)", log=False)
    top.margins(x=0.04)
    legend_above(top, width)
    ratio = found.theory.log_ratio[order] / np.log(10)
    bottom.plot(t, ratio, color="k", linewidth=1.2)
    bottom.axhline(0, color="0.6", linewidth=0.7)
    finish_axis(bottom, "", log=False)
    bottom.set_ylabel("$\\log_{10}$ R(t)", fontsize=SMALL, parse_math=True)
    bottom.set_xlabel("time t", fontsize=SMALL)
    if t.size > 2 and t.min() > 0 and t.max() / t.min() > 300:
        bottom.set_xscale("log")
    words = f"{found.n_per_class} samples a class · {found.n_paths} paths · limit: {found.theory.limit}"
    _headline(figure, "Are the classes separable?", f"{detail} · {words}" if detail else words)
    return figure


def phase_figure(diagram: PhaseDiagram, *, at: int = -1, width: float = 3.8) -> Figure:
    """Probability that a pair is separable at one time, over tail exponent and scale, with the predicted boundary.

    Args:
        diagram: what `phase_diagram` gave.
        at: which of its times.
        width: inches.
    """
    from matplotlib.colors import ListedColormap

    figure = new_figure(width, width * 0.86)
    axis = figure.subplots()
    r, c = diagram.exponents, diagram.scales
    mesh = axis.pcolormesh(
        _edges(r), _edges(c), diagram.probability[:, :, at].T, cmap=ListedColormap(colours(False)), vmin=0, vmax=1
    )
    bar = figure.colorbar(mesh, ax=axis, fraction=0.046, pad=0.03)
    bar.set_label("P(a pair is separable)", fontsize=SMALL)
    bar.ax.tick_params(labelsize=SMALL)
    critical = diagram.n_classes / 2
    white = {"color": "white", "linewidth": 3.2, "zorder": 3, "clip_on": False}
    axis.plot([1, 1], [_edges(c)[0], _edges(c)[-1]], **{**white, "clip_on": True})
    axis.plot([1, 1], [_edges(c)[0], _edges(c)[-1]], color="#D55E00", linewidth=1.4, zorder=4, label="r = 1")
    axis.plot(
        [1], [critical], "o", color="#D55E00", markeredgecolor="white", markersize=7, zorder=5, label="r = 1, c = K/2"
    )
    axis.set_xlim(_edges(r)[0], _edges(r)[-1])
    axis.set_ylim(_edges(c)[0], _edges(c)[-1])
    axis.set_xlabel("tail exponent r", fontsize=SMALL)
    axis.set_ylabel("scale c", fontsize=SMALL)
    axis.tick_params(labelsize=SMALL)
    figure.legend(loc="outside lower center", ncols=2, fontsize=SMALL, frameon=False)
    words = f"K = {diagram.n_classes} · n = {diagram.n_per_class} · {diagram.n_paths} paths a cell"
    _headline(figure, f"Separable? alpha − beta = c (1 + t)^(−r), at t = {diagram.t[at]:g}", words)
    return figure


def _edges(centres: np.ndarray) -> np.ndarray:
    if centres.size == 1:
        return centres[0] + np.array([-0.5, 0.5])
    middle = (centres[1:] + centres[:-1]) / 2
    return np.concatenate([[2 * centres[0] - middle[0]], middle, [2 * centres[-1] - middle[-1]]])


def _headline(figure: Figure, what: str, detail: str) -> None:
    width = int(figure.get_figwidth() * 17.5)
    detail = detail.replace(" ", "\u00a0").replace("\u00a0·\u00a0", "\u00a0· ")
    lines = textwrap.wrap(what, width) + textwrap.wrap(detail, width)
    figure.suptitle("\n".join(lines), fontsize=NORMAL, parse_math=False)
