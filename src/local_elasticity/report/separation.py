"""The figure of the image studies: definitions by probe steps, how often and how clearly intra exceeds inter."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from local_elasticity.report.style import NORMAL, SMALL, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def separation(
    panels: Mapping[str, tuple[Any, float]],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    groups: Sequence[int] = (),
    width: float = 6.9,
    caption: str = "",
) -> Figure:
    """Draw one matrix a panel: blue above chance, orange below, the number in every cell.

    Args:
        panels: title -> (values of (rows, columns) from 0 to 1, what chance gives).
        rows: names of the rows.
        columns: names of the columns.
        title: over all: the answer in a line.
        groups: a white gap before each of these rows.
        width: inches.
        caption: what the numbers are, beneath.
    """
    from matplotlib.colors import TwoSlopeNorm

    figure = new_figure(width, 0.27 * len(rows) + 1.55 + 0.12 * caption.count("\n"))
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, (name, (values, chance)) in zip(axes, panels.items(), strict=True):
        values = np.asarray(values, dtype=float)
        norm = TwoSlopeNorm(chance, 0.0, 1.0)
        axis.imshow(values, cmap=_map(), norm=norm, aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            words = "–" if np.isnan(value) else f"{100 * value:.0f}"
            dark = not np.isnan(value) and abs(norm(value) - 0.5) > 0.33
            axis.text(column, row, words, ha="center", va="center", fontsize=SMALL, color="white" if dark else "black")
        for row in groups:
            axis.axhline(row - 0.5, color="white", linewidth=4)
        axis.set_title("\n".join(textwrap.wrap(name, 30)), fontsize=NORMAL)
        axis.set_xticks(range(len(columns)), columns, fontsize=SMALL, rotation=40, ha="right", rotation_mode="anchor")
        axis.set_yticks(range(len(rows)), rows, fontsize=SMALL)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    lines = [line for part in title.split("\n") for line in textwrap.wrap(part, int(width * 17.5))]
    figure.suptitle("\n".join(lines), fontsize=NORMAL)
    if caption:
        figure.supxlabel(caption, fontsize=SMALL)
    return figure


def _map() -> Any:
    """Orange, white, blue: told apart by colour-blind readers."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("preference", ["#B45F06", "#F3C78E", "#FFFFFF", "#8FC1E3", "#00568A"])
