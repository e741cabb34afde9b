"""Figures of a run: S_rel by class pair, intra against inter, and the class-by-class matrix (matplotlib)."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from local_elasticity.errors import InputError
from local_elasticity.report.reading import (
    READABLE_CLASSES,
    STATISTICS,
    Reading,
    band_of,
    caption,
    colours,
    position,
    read,
    scale_of,
)

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


def class_pair_curves(
    run: Any,
    *,
    definition: str | None = None,
    update: str | None = None,
    classes: Sequence[str] | None = None,
    width: float = 6.9,
) -> Figure:
    """One panel per class stepped on: how far it moved itself (blue) and each other class, through training.

    Where pairs are heavy-tailed a second panel shows the medians on a logarithmic axis.

    Args:
        run: a run or its dataset.
        definition: name of the definition; the first by default.
        update: name of the probe update; the first by default.
        classes: the classes to show (default: all, at most 12).
        width: inches; 3.3 fits one column of a two-column paper.

    Returns:
        The figure.

    Raises:
        InputError: for an unknown name, or for more than 12 classes.
    """
    reading = read(run)
    chosen, shown = reading.select(definition, update), _shown(reading, classes)
    statistics = ("mean", "median") if _heavy(chosen) else ("mean",)
    columns = min(len(shown), max(1, int(width / (1.65 if len(statistics) == 1 else 2.2))), 3)
    blocks = -(-len(shown) // columns)
    rows = blocks * len(statistics)
    figure = _figure(width, 1.55 * rows + 0.95 + 0.14 * (len(shown) // 4))
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True)
    for at, anchor in enumerate(shown):
        block, column = divmod(at, columns)
        for offset, statistic in enumerate(statistics):
            axis = axes[block * len(statistics) + offset, column]
            _anchor_panel(axis, reading, chosen, anchor, shown, statistic)
            axis.set_title(f"step on {_brief(anchor)}" if offset == 0 else "", fontsize=NORMAL, parse_math=False)
            axis.set_ylabel(Y_LABELS[statistic] if column == 0 else "", fontsize=SMALL, parse_math=True)
    for at in range(len(shown), blocks * columns):
        for offset in range(len(statistics)):
            axes[(at // columns) * len(statistics) + offset, at % columns].set_axis_off()
    _label_lowest(axes, reading.x[0])
    _class_legend(figure, reading, shown)
    _title(figure, reading, "How much a step on one class moved each class", caption(reading, definition, update))
    return figure


def intra_inter(run: Any, *, definition: str | None = None, update: str | None = None, width: float = 3.3) -> Figure:
    """Intra against inter through training, with the losses and accuracies beneath on the same axis.

    Where pairs are heavy-tailed another panel shows the averages of the medians on a logarithmic axis.

    Args:
        run: a run or its dataset.
        definition: name of the definition; the first by default.
        update: name of the probe update; the first by default.
        width: inches.

    Returns:
        The figure.

    Raises:
        InputError: for an unknown name.
    """
    reading = read(run)
    chosen, panels = reading.select(definition, update), reading.panels()
    statistics = ("mean", "median") if _heavy(chosen) else ("mean",)
    heights = [1.5] * len(statistics) + [1.05] * len(panels)
    figure = _figure(width, sum(heights) + 0.35 * len(heights) + 0.7)
    axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    x = reading.x[1]
    for axis, statistic in zip(axes, statistics, strict=False):
        for (name, values), style in zip(
            reading.averages(chosen, statistic).items(), (_intra(), _other(0)), strict=True
        ):
            label = "own class (intra)" if name == "intra" else "others (inter)"
            _curve(axis, x, values, label, style)
        _finish(axis, Y_LABELS[statistic], statistic == "median" or _log(chosen, "mean"))
    for axis, (label, names) in zip(axes[len(statistics) :], panels, strict=True):
        for at, name in enumerate(names):
            _curve(axis, x, band_of(reading.data, name), name, _intra() if at == 0 else _other(at - 1))
        _finish(axis, label, log=False)
    for axis in axes:
        _legend_above(axis, width)
    axes[-1].set_xlabel(reading.x[0], fontsize=SMALL)
    _title(figure, reading, "Own class against other classes", caption(reading, definition, update))
    return figure


def heat_map(
    run: Any,
    *,
    definition: str | None = None,
    update: str | None = None,
    step: int | None = None,
    width: float | None = None,
) -> Figure:
    """The class-by-class matrix at one snapshot: rows are stepped on, columns moved.

    Where pairs are heavy-tailed the medians stand beside the means, both in logarithmic colours.

    Args:
        run: a run or its dataset.
        definition: name of the definition; the first by default.
        update: name of the probe update; the first by default.
        step: optimiser updates made at the snapshot; the last by default.
        width: inches; chosen from the number of classes by default.

    Returns:
        The figure.

    Raises:
        InputError: for an unknown name or a step that was not measured.
    """
    reading = read(run)
    at = _step_position(reading, step)
    look = reading.select(definition, update).isel(step=at)
    heavy = bool(look["heavy_tailed"].any()) if "heavy_tailed" in look else False
    statistics = ("mean", "median") if heavy else ("mean",)
    count = len(reading.classes)
    each = width / len(statistics) if width else float(np.clip(1.6 + 0.45 * count, 3.3, 6.9))
    figure = _figure(each * len(statistics), each * 0.86 + 0.55)
    for axis, statistic in zip(figure.subplots(1, len(statistics), squeeze=False)[0], statistics, strict=True):
        _matrix(figure, axis, reading, look[statistic].values, statistic, heavy, each)
    when = f"{caption(reading, definition, update, band=False)} · step {int(reading.steps[at])}"
    _title(figure, reading, "How much a step on a class moved a class", when)
    return figure


def save(figure: Figure, folder: str | Path, name: str, dpi: int = 200) -> list[Path]:
    """Write a figure as PNG and PDF, without a date, so that the same figure gives the same bytes.

    Args:
        figure: the figure.
        folder: made when it is not there.
        name: file name without its ending.
        dpi: pixels per inch of the PNG.

    Returns:
        The two paths.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    png, pdf = folder / f"{name}.png", folder / f"{name}.pdf"
    figure.savefig(png, dpi=dpi, metadata={"Software": None})
    figure.savefig(pdf, metadata={"CreationDate": None})
    return [png, pdf]


def write_all(run: Any, folder: str | Path) -> list[Path]:
    """Write every figure of every definition and update.

    With more than 12 classes the curves per class pair are left out: no reader could tell them apart.

    Args:
        run: a run or its dataset.
        folder: where to; made when it is not there.

    Returns:
        The paths written, PNG and PDF.

    Raises:
        InputError: when ``run`` holds no S_rel tables.
    """
    reading = read(run)
    kinds = [intra_inter, heat_map]
    if len(reading.classes) <= READABLE_CLASSES:
        kinds.insert(0, class_pair_curves)
    if "layer" in getattr(run, "dataset", run).coords:
        from local_elasticity.report.collapse import collapse_curves

        kinds.append(collapse_curves)
    paths: list[Path] = []
    for definition in reading.definitions:
        for update in reading.updates:
            for kind in kinds:
                name = _file_name(f"{kind.__name__}-{definition}-{update}", {path.stem for path in paths})
                paths += save(kind(run, definition=definition, update=update), folder, name)
    return paths


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def _intra() -> dict[str, Any]:
    return {"color": BLUE, "linestyle": "-", "marker": "o", "linewidth": 1.6, "zorder": 3}


def _other(at: int) -> dict[str, Any]:
    """The style of the at-th other class: colours, line styles and markers all turn, at different periods."""
    return {
        "color": OTHERS[at % len(OTHERS)],
        "linestyle": LINES[at % len(LINES)],
        "marker": MARKERS[at % len(MARKERS)],
        "linewidth": 1.1,
        "zorder": 2,
    }


def _shown(reading: Reading, classes: Sequence[str] | None) -> list[str]:
    shown = reading.classes if classes is None else [str(name) for name in classes]
    for name in shown:
        position("class", name, reading.classes)
    if not 0 < len(shown) <= READABLE_CLASSES:
        raise InputError(
            expected=f"1 to {READABLE_CLASSES} classes (more curves cannot be told apart)",
            got=f"{len(shown)} classes",
            do="use intra_inter() and heat_map(), or name the classes to show with classes=[...]",
        )
    return shown


def _heavy(chosen: xr.Dataset) -> bool:
    return "heavy_tailed" in chosen and bool(chosen["heavy_tailed"].any())


def _log(chosen: xr.Dataset, statistic: str) -> bool:
    """Means that span decades need a logarithmic axis as much as the medians do."""
    values = chosen[statistic].values
    return _heavy(chosen) and scale_of(values, heavy=True).log


def _anchor_panel(
    axis: Axes, reading: Reading, chosen: xr.Dataset, anchor: str, shown: Sequence[str], statistic: str
) -> None:
    row = chosen.isel(source_class=reading.classes.index(anchor))
    for target in shown:
        if target not in reading.targets:
            continue
        cell = row.isel(target_class=reading.targets.index(target))
        style = _intra() if target == anchor else _other(shown.index(target))
        faint = target != anchor and len(shown) > 5
        _curve(axis, reading.x[1], band_of(cell, statistic), target, style, 0.07 if faint else 0.18)
    _finish(axis, "", statistic == "median" or _log(chosen, statistic))


def _curve(
    axis: Axes, x: np.ndarray, values: tuple[np.ndarray, ...], label: str, style: dict[str, Any], alpha: float = 0.18
) -> None:
    centre, low, high = values
    every = max(1, len(x) // 8)
    axis.plot(x, centre, label=label, markersize=3, markevery=every, **style)
    if len(x) == 1 and np.isfinite([low, high]).all():
        axis.vlines(x, low, high, color=style["color"], linewidth=1.0)
    elif np.isfinite(low).any():
        axis.fill_between(x, low, high, color=style["color"], alpha=alpha, linewidth=0, zorder=1)
    if len(x) == 1:
        axis.set_xticks(x, labels=[f"{x[0]:.4g}"])


def _finish(axis: Axes, label: str, log: bool) -> None:
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


def _label_lowest(axes: np.ndarray, label: str) -> None:
    """Name the x axis under the lowest panel of each column, and show its ticks there."""
    for column in axes.T:
        lowest = [axis for axis in column if axis.axison][-1]
        lowest.set_xlabel(label, fontsize=SMALL)
        lowest.tick_params(labelbottom=True)


def _class_legend(figure: Figure, reading: Reading, shown: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], markersize=3, **_intra())]
    handles += [Line2D([], [], markersize=3, **_other(at)) for at in range(len(shown))]
    labels = ["own class (intra)", *(_printable(f"moved: {_brief(name)}") for name in shown)]
    columns = max(1, int(figure.get_figwidth() / (0.55 + 0.058 * max(map(len, labels)))))
    legend = figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, fontsize=SMALL, frameon=False, handlelength=3.2
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def _legend_above(axis: Axes, width: float) -> None:
    """A legend over the panel, so that it covers no data."""
    handles, labels = axis.lines, [str(line.get_label()) for line in axis.lines]
    columns = max(1, int(width / (0.5 + 0.058 * max(map(len, labels)))))
    legend = axis.legend(
        handles,
        [_printable(label) for label in labels],
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


def _printable(label: str) -> str:
    """Matplotlib leaves labels that begin with an underscore out of a legend."""
    return f" {label}" if label.startswith("_") else label


def _brief(name: str, most: int = 18) -> str:
    """A class name short enough for a tick."""
    return name if len(name) <= most else name[: most - 1] + "…"


def _title(figure: Figure, reading: Reading, what: str, detail: str) -> None:
    name = str(reading.data.attrs.get("title", ""))
    width = int(figure.get_figwidth() * 17.5)
    detail = detail.replace(" ", "\u00a0").replace("\u00a0·\u00a0", "\u00a0· ")  # break between the parts only
    lines = textwrap.wrap(f"{what}: {name}" if name else what, width) + textwrap.wrap(detail, width)
    figure.suptitle("\n".join(lines), fontsize=NORMAL, parse_math=False)


def _step_position(reading: Reading, step: int | None) -> int:
    if step is None:
        return len(reading.steps) - 1
    found = np.flatnonzero(reading.steps == step)
    if found.size == 0:
        closest = reading.steps[np.abs(reading.steps - step).argmin()]
        raise InputError(
            expected="a step at which the run looked", got=f"step {step}", do=f"the nearest is step={int(closest)}"
        )
    return int(found[0])


def _matrix(
    figure: Figure, axis: Axes, reading: Reading, values: np.ndarray, statistic: str, heavy: bool, inches: float
) -> None:
    from matplotlib.colors import ListedColormap, LogNorm, Normalize

    scale = scale_of(values, heavy)
    colour_map = ListedColormap(colours(scale.diverging)).with_extremes(bad="0.85")
    norm = (LogNorm if scale.log else Normalize)(scale.low, scale.high)
    drawn = np.where(values > 0, values, np.nan) if scale.log else values
    image = axis.imshow(drawn, cmap=colour_map, norm=norm, interpolation="nearest")
    bar = figure.colorbar(image, ax=axis, fraction=0.046, pad=0.03)
    bar.set_label(f"$S_{{rel}}$ ({STATISTICS[statistic]})", fontsize=SMALL)
    bar.ax.tick_params(labelsize=SMALL, which="both")
    _class_ticks(axis, reading, inches)
    if max(values.shape) <= READABLE_CLASSES:
        size = float(np.clip(15 * inches / max(values.shape), 4.0, NORMAL + 1))
        for (row, column), value in np.ndenumerate(values):
            shade = colour_map(norm(value)) if np.isfinite(drawn[row, column]) else (0.85,) * 3
            dark = (
                np.dot(np.power(shade[:3], 2.2), (0.2126, 0.7152, 0.0722)) < 0.18
            )  # where white reads better than black
            axis.text(column, row, _short(value), ha="center", va="center", fontsize=size, color="w" if dark else "k")


def _class_ticks(axis: Axes, reading: Reading, inches: float) -> None:
    for names, ticks, spin in ((reading.targets, axis.set_xticks, 45), (reading.classes, axis.set_yticks, 0)):
        every = -(-len(names) // int(8 * inches))
        size = SMALL if len(names) <= READABLE_CLASSES else 5.0
        labels = [_brief(name) for name in names[::every]]
        ticks(range(0, len(names), every), labels=labels, fontsize=size, parse_math=False)
        if spin and (len(names) > 4 or max(map(len, names)) > 8):
            axis.tick_params(axis="x", rotation=spin)
            for text in axis.get_xticklabels():
                text.set(ha="right", rotation_mode="anchor")
    axis.set_xlabel("class moved", fontsize=SMALL)
    axis.set_ylabel("step on class", fontsize=SMALL)
    axis.tick_params(length=2)


def _short(value: float) -> str:
    """Three digits for a cell of the matrix."""
    if np.isnan(value):
        return "–"
    return (
        f"{value:.2f}"
        if 0.1 <= abs(value) < 100 or value == 0
        else f"{value:.2g}".replace("e+0", "e").replace("e-0", "e-")
    )


def _file_name(name: str, taken: set[str]) -> str:
    """A name every file system takes, and no two figures share."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", name)
    numbered = (f"{plain}-{i}" for i in range(2, 10_000))
    return plain if plain not in taken else next(name for name in numbered if name not in taken)
