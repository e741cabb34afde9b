"""How figures look: colours, lines, sizes, and the parts that every figure is drawn with (matplotlib)."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np

from local_elasticity.report.reading import Reading, scale_of

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by colour-blind readers; yellow is left out, it vanishes on white.
BLUE = "#0072B2"
OTHERS = ("#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
LINES = ("--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
MARKERS = ("s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*", "d")
SMALL, NORMAL = 7.0, 8.0  # points
Y_LABELS = {"mean": "$S_{rel}$, mean", "median": "$S_{rel}$, median", "ratio_of_means": "$S_{rel}$, ratio of means"}


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def new_panels(count: int, columns: int, width: float, row: float, head: float) -> tuple[Figure, list[Axes]]:
    """A figure with so many panels in rows of ``columns``; inches of a row, and of what stands above all of them."""
    rows = -(-count // columns)
    figure = new_figure(width, row * rows + head)
    axes = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for axis in axes[count:]:
        axis.set_axis_off()
    return figure, axes[:count]


def own_style() -> dict[str, Any]:
    """The style of the own class."""
    return {"color": BLUE, "linestyle": "-", "marker": "o", "linewidth": 1.6, "zorder": 3}


def other_style(at: int) -> dict[str, Any]:
    """The style of the at-th other class: colours, line styles and markers all turn, at different periods."""
    return {
        "color": OTHERS[at % len(OTHERS)],
        "linestyle": LINES[at % len(LINES)],
        "marker": MARKERS[at % len(MARKERS)],
        "linewidth": 1.1,
        "zorder": 2,
    }


def draw_curve(
    axis: Axes, x: np.ndarray, values: tuple[np.ndarray, ...], label: str, style: dict[str, Any], alpha: float = 0.18
) -> None:
    """A line and its band; where there is one point only, a bar."""
    centre, low, high = values
    every = max(1, len(x) // 8)
    axis.plot(x, centre, label=label, markersize=3, markevery=every, **style)
    if len(x) == 1 and np.isfinite([low, high]).all():
        axis.vlines(x, low, high, color=style["color"], linewidth=1.0)
    elif np.isfinite(low).any():
        axis.fill_between(x, low, high, color=style["color"], alpha=alpha, linewidth=0, zorder=1)
    if len(x) == 1:
        axis.set_xticks(x, labels=[f"{x[0]:.4g}"])


def finish_axis(axis: Axes, label: str, log: bool) -> None:
    """Scale, label, ticks and grid of a panel."""
    if log:
        axis.set_yscale("log", nonpositive="mask")
        _fit_to_lines(axis)
    axis.set_ylabel(label, fontsize=SMALL, parse_math=label in Y_LABELS.values())
    axis.tick_params(which="both", labelsize=SMALL, length=2.5)
    axis.grid(color="0.9", linewidth=0.5)
    axis.spines[["top", "right"]].set_visible(False)


def _fit_to_lines(axis: Axes) -> None:
    """Keep a log axis to the curves: a band that reaches 0 would stretch it over empty decades."""
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axis.lines])
    values = values[np.isfinite(values) & (values > 0)]
    if values.size:
        axis.set_ylim(values.min() / 2, values.max() * 2)


def legend_above(axis: Axes, width: float) -> None:
    """A legend over the panel, so that it covers no data."""
    handles, labels = axis.lines, [str(line.get_label()) for line in axis.lines]
    columns = max(1, int(width / (0.5 + 0.058 * max(map(len, labels)))))
    legend = axis.legend(
        handles,
        [printable(label) for label in labels],
        loc="lower left",
        bbox_to_anchor=(0, 0.97),
        ncols=columns,
        fontsize=SMALL - 0.5,
        frameon=False,
        handlelength=2.6,
        columnspacing=1.0,
        borderaxespad=0.1,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def printable(label: str) -> str:
    """Matplotlib leaves labels that begin with an underscore out of a legend."""
    return f" {label}" if label.startswith("_") else label


def brief(name: str, most: int = 18) -> str:
    """A class name short enough for a tick."""
    return name if len(name) <= most else name[: most - 1] + "…"


def write_title(figure: Figure, reading: Reading, what: str, detail: str) -> None:
    """What a figure of a run shows, and by which definition, step and engine."""
    name = str(reading.data.attrs.get("title", ""))
    width = int(figure.get_figwidth() * 17.5)
    detail = detail.replace(" ", "\u00a0").replace("\u00a0·\u00a0", "\u00a0· ")  # break between the parts only
    lines = textwrap.wrap(f"{what}: {name}" if name else what, width) + textwrap.wrap(detail, width)
    figure.suptitle("\n".join(lines), fontsize=NORMAL, parse_math=False)


def heavy_tailed(chosen: xr.Dataset) -> bool:
    """Whether a few pairs carry most of a mean."""
    return "heavy_tailed" in chosen and bool(chosen["heavy_tailed"].any())


def needs_log(chosen: xr.Dataset, statistic: str) -> bool:
    """Means that span decades need a logarithmic axis as much as the medians do."""
    values = chosen[statistic].values
    return heavy_tailed(chosen) and scale_of(values, heavy=True).log


def write_head(figure: Figure, lines: list[str]) -> None:
    """Lines over a figure, wrapped to its width."""
    width = int(figure.get_figwidth() * 17.5)
    wrapped = [part for line in lines for part in textwrap.wrap(line, width)]
    figure.suptitle("\n".join(wrapped), fontsize=NORMAL, parse_math=False)
