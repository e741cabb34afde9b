"""Figures of studies: panels of named curves over time, with bands and marks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from local_elasticity.report.style import BLUE, LINES, MARKERS, NORMAL, OTHERS, SMALL, new_panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Line:
    """One curve: x, y and, if it has one, the band (low, high); with ``points`` it is drawn as marks only."""

    name: str
    x: Any
    y: Any
    band: tuple[Any, Any] | None = None
    points: bool = False


@dataclass(frozen=True)
class Panel:
    """One panel: its curves, its words, its axes ("linear", "log"), and vertical marks (x, words), the first solid."""

    title: str
    lines: Sequence[Line]
    y_label: str = "$S_{rel}$"
    x_label: str = "time"
    x_scale: str = "log"
    y_scale: str = "log"
    marks: Sequence[tuple[float, str]] = field(default_factory=tuple)
    y_limits: tuple[float, float] | None = None


def panels(content: Sequence[Panel], columns: int, title: str, width: float = 6.9, height: float = 2.3) -> Figure:
    """Draw panels in rows of ``columns``; a legend that would repeat an earlier one is left out.

    Args:
        content: the panels, row after row.
        columns: panels a row.
        title: over the figure.
        width: inches of the figure.
        height: inches of a row.
    """
    figure, axes = new_panels(len(content), columns, width, height, 0.3)
    explained: set[tuple[str, ...]] = set()
    for axis, panel in zip(axes, content, strict=True):
        for at, line in enumerate(panel.lines):
            _draw(axis, line, at)
        for at, (x, words) in enumerate(panel.marks):
            axis.axvline(x, color="0.35", linestyle="-" if at == 0 else ":", linewidth=1)
            side, shift = ("left", 2) if at == 0 else ("right", -1)
            axis.annotate(
                words,
                (x, 0.02),
                xycoords=("data", "axes fraction"),
                xytext=(shift, 0),
                textcoords="offset points",
                rotation=90,
                fontsize=SMALL - 1,
                ha=side,
            )
        axis.set_xscale(panel.x_scale)
        axis.set_yscale(panel.y_scale)
        if panel.y_limits:
            axis.set_ylim(*panel.y_limits)
        axis.set_title(panel.title, fontsize=NORMAL, loc="left")
        axis.set_xlabel(panel.x_label, fontsize=SMALL)
        axis.set_ylabel(panel.y_label, fontsize=SMALL)
        axis.tick_params(which="both", labelsize=SMALL, length=2.5)
        axis.grid(color="0.9", linewidth=0.5)
        axis.spines[["top", "right"]].set_visible(False)
        names = tuple(line.name for line in panel.lines)
        if len(names) > 1 and names not in explained:
            axis.legend(fontsize=SMALL - 1, frameon=False, handlelength=2.2)
            explained.add(names)
    figure.suptitle(title, fontsize=NORMAL)
    return figure


def _draw(axis: Any, line: Line, at: int) -> None:
    colour = BLUE if at == 0 else OTHERS[(at - 1) % len(OTHERS)]
    style = "-" if at == 0 else LINES[(at - 1) % len(LINES)]
    x, y = np.asarray(line.x, dtype=float), np.asarray(line.y, dtype=float)
    if line.points:
        marker = MARKERS[at % len(MARKERS)]
        axis.plot(x, y, linestyle="none", marker=marker, markersize=3.5, color=colour, label=line.name)
        return
    axis.plot(x, y, color=colour, linestyle=style, linewidth=1.4, label=line.name)
    if line.band is not None:
        axis.fill_between(x, *line.band, color=colour, alpha=0.18, linewidth=0)
