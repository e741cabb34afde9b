"""Figures of similarities: against geodesic distance, and as clusterings beside their baselines (matplotlib)."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from local_elasticity.report.style import BLUE, MARKERS, NORMAL, OTHERS, SMALL

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BINS = 12


def similarity_against_distance(panels: Sequence[Mapping[str, Any]], title: str, width: float = 6.9) -> Figure:
    """One row a geometry: its points, then S_rel against geodesic distance for the network and for its linear twin.

    Args:
        panels: of each network: ``name``, ``kind`` ("network" or "linear"), ``points``, ``labels``, ``s_rel``,
            ``distance`` and ``r``, the correlation.
        title: over all.
        width: inches.

    Returns:
        The figure.
    """
    names = list(dict.fromkeys(str(panel["name"]) for panel in panels))
    figure = _figure(width, 2.15 * len(names) + 0.55)
    axes = figure.subplots(len(names), 3, squeeze=False, width_ratios=(0.9, 1, 1))
    for row, name in enumerate(names):
        chosen = {str(panel["kind"]): panel for panel in panels if panel["name"] == name}
        _points(axes[row, 0], next(iter(chosen.values())), name, legend=row == 0)
        top = max(float(np.quantile(panel["s_rel"], 0.995)) for panel in chosen.values()) * 1.12
        for column, (kind, colour) in enumerate((("network", BLUE), ("linear", OTHERS[2])), start=1):
            axis, panel = axes[row, column], chosen[kind]
            _cloud(axis, panel, colour, max(1.1, top))
            words = "network" if kind == "network" else "linear twin"
            axis.set_title(f"{words}: r = {panel['r']:.2f}", fontsize=NORMAL)
            axis.set_xlabel("geodesic distance", fontsize=SMALL)
            axis.set_ylabel("$S_{rel}$" if column == 1 else "", fontsize=SMALL)
    figure.suptitle("\n".join(textwrap.wrap(title, int(width * 17.5))), fontsize=NORMAL)
    return figure


def _points(axis: Axes, panel: Mapping[str, Any], name: str, legend: bool) -> None:
    points, labels = panel["points"], panel["labels"]
    for label, colour, marker in ((1, BLUE, "o"), (0, OTHERS[0], "^")):
        some = points[labels == label]
        axis.scatter(some[:, 0], some[:, 1], s=9, color=colour, marker=marker, linewidths=0, label=f"class {label}")
    axis.set_title(f"{name}, from above", fontsize=NORMAL)
    axis.set_aspect("equal", adjustable="datalim")
    axis.set_xlabel("x", fontsize=SMALL)
    axis.set_ylabel("y", fontsize=SMALL)
    _finish(axis)
    if legend:
        axis.legend(fontsize=SMALL, frameon=False, loc="center", handletextpad=0.1)


def _cloud(axis: Axes, panel: Mapping[str, Any], colour: str, top: float) -> None:
    s, d = np.ravel(panel["s_rel"]), np.ravel(panel["distance"])
    defined = np.isfinite(s)
    s, d = s[defined], d[defined]
    axis.scatter(d, s, s=2.5, color=colour, alpha=0.25, linewidths=0, rasterized=True)
    edges = np.linspace(0, d.max() * (1 + 1e-9), BINS + 1)
    where = np.digitize(d, edges) - 1
    centres = [(edges[i] + edges[i + 1]) / 2 for i in range(BINS) if (where == i).any()]
    medians = [np.median(s[where == i]) for i in range(BINS) if (where == i).any()]
    axis.plot(centres, medians, color="black", linewidth=1.3, marker="o", markersize=2.5, label="median")
    axis.legend(fontsize=SMALL, frameon=False, loc="upper right", handlelength=1.6)
    axis.set_ylim(0, top)
    _finish(axis)


def _finish(axis: Axes) -> None:
    axis.tick_params(labelsize=SMALL, length=2.5)
    axis.grid(color="0.92", linewidth=0.5)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def clustering_accuracy(table: Mapping[str, Mapping[str, Sequence[float]]], title: str, width: float = 6.9) -> Figure:
    """Accuracy of every method on every pair: the mean over seeds, and one standard deviation.

    Networks are filled marks and their linear twins, below, open ones; the line is the better of both K-means.

    Args:
        table: pair -> method -> accuracies in per cent over seeds; methods "LOSS SIMILARITY KIND" and the baselines.
        title: over all.
        width: inches.

    Returns:
        The figure.
    """
    pairs = list(table)
    methods = list(dict.fromkeys(m for row in table.values() for m in row))
    baselines = [m for m in methods if "K-means" in m]
    figure = _figure(width, 4.3)
    axes = figure.subplots(2, 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axis, kind, words in zip(axes, ("network", "linear"), ("ReLU network", "linear twin"), strict=True):
        chosen = [m for m in methods if m.endswith(kind)]
        step = 0.8 / (len(chosen) + 1)
        for at, pair in enumerate(pairs):
            best = max(float(np.mean(table[pair][m])) for m in baselines)
            axis.hlines(best, at - 0.42, at + 0.42, color="black", linewidth=1.2, label="K-means, the better of two")
        for place, method in enumerate(chosen):
            colour = (BLUE, OTHERS[0], OTHERS[1], OTHERS[3])[place % 4]
            values = [np.asarray(table[pair][method]) for pair in pairs]
            axis.errorbar(
                np.arange(len(pairs)) + (place - (len(chosen) - 1) / 2) * step,
                [v.mean() for v in values],
                yerr=[v.std() for v in values],
                fmt=("o", *MARKERS)[place],
                color=colour,
                markerfacecolor=colour if kind == "network" else "white",
                markersize=4,
                linewidth=1,
                capsize=1.5,
                label=method.removesuffix(f" {kind}").replace("mse", "MSE").replace("bce", "BCE").replace(" ", ", "),
            )
        axis.set_title(words, fontsize=NORMAL, loc="left")
        axis.set_ylabel("accuracy, %", fontsize=SMALL)
        axis.set_xlim(-0.5, len(pairs) - 0.5)
        _finish(axis)
    axes[1].set_xticks(range(len(pairs)), labels=pairs, fontsize=SMALL)
    handles, labels = axes[0].get_legend_handles_labels()
    single = dict(zip(labels, handles, strict=True))
    figure.legend(single.values(), single.keys(), loc="outside lower center", ncols=3, fontsize=SMALL, frameon=False)
    figure.suptitle("\n".join(textwrap.wrap(title, int(width * 17.5))), fontsize=NORMAL)
    return figure
