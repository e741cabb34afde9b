"""Figures of a run: S_rel by class pair, intra against inter, and the class-by-class matrix (matplotlib)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from local_elasticity.base.checks import (
    check_instance,
    check_place,
    check_real,
    check_text,
    check_whole,
    in_words,
    make_folder,
)
from local_elasticity.base.errors import InputError
from local_elasticity.report.collapse import collapse_curves
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
from local_elasticity.report.style import (
    NORMAL,
    SMALL,
    Y_LABELS,
    brief,
    draw_curve,
    finish_axis,
    heavy_tailed,
    legend_above,
    needs_log,
    new_figure,
    other_style,
    own_style,
    printable,
    write_title,
)

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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
    check_real("width", width, 1.0)
    reading = read(run)
    chosen, shown = reading.select(definition, update), _shown(reading, classes)
    statistics = ("mean", "median") if heavy_tailed(chosen) else ("mean",)
    columns = min(len(shown), max(1, int(width / (1.65 if len(statistics) == 1 else 2.2))), 3)
    blocks = -(-len(shown) // columns)
    rows = blocks * len(statistics)
    figure = new_figure(width, 1.55 * rows + 0.95 + 0.14 * (len(shown) // 4))
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True)
    for at, anchor in enumerate(shown):
        block, column = divmod(at, columns)
        for offset, statistic in enumerate(statistics):
            axis = axes[block * len(statistics) + offset, column]
            _anchor_panel(axis, reading, chosen, anchor, shown, statistic)
            axis.set_title(f"step on {brief(anchor)}" if offset == 0 else "", fontsize=NORMAL, parse_math=False)
            axis.set_ylabel(Y_LABELS[statistic] if column == 0 else "", fontsize=SMALL, parse_math=True)
    for at in range(len(shown), blocks * columns):
        for offset in range(len(statistics)):
            axes[(at // columns) * len(statistics) + offset, at % columns].set_axis_off()
    _label_lowest(axes, reading.x[0])
    _class_legend(figure, reading, shown)
    write_title(figure, reading, "How much a step on one class moved each class", caption(reading, definition, update))
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
    check_real("width", width, 1.0)
    reading = read(run)
    chosen, panels = reading.select(definition, update), reading.panels()
    statistics = ("mean", "median") if heavy_tailed(chosen) else ("mean",)
    heights = [1.5] * len(statistics) + [1.05] * len(panels)
    figure = new_figure(width, sum(heights) + 0.35 * len(heights) + 0.7)
    axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    x = reading.x[1]
    for axis, statistic in zip(axes, statistics, strict=False):
        for (name, values), style in zip(
            reading.averages(chosen, statistic).items(), (own_style(), other_style(0)), strict=True
        ):
            label = "own class (intra)" if name == "intra" else "others (inter)"
            draw_curve(axis, x, values, label, style)
        finish_axis(axis, Y_LABELS[statistic], statistic == "median" or needs_log(chosen, "mean"))
    for axis, (label, names) in zip(axes[len(statistics) :], panels, strict=True):
        for at, name in enumerate(names):
            draw_curve(axis, x, band_of(reading.data, name), name, own_style() if at == 0 else other_style(at - 1))
        finish_axis(axis, label, log=False)
    for axis in axes:
        legend_above(axis, width)
    axes[-1].set_xlabel(reading.x[0], fontsize=SMALL)
    write_title(figure, reading, "Own class against other classes", caption(reading, definition, update))
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
    check_real("width", width, 1.0, or_none=True)
    check_whole("step", step, 0, or_none=True)
    reading = read(run)
    at = _step_position(reading, step)
    look = reading.select(definition, update).isel(step=at)
    heavy = bool(look["heavy_tailed"].any()) if "heavy_tailed" in look else False
    statistics = ("mean", "median") if heavy else ("mean",)
    count = len(reading.classes)
    each = width / len(statistics) if width else float(np.clip(1.6 + 0.45 * count, 3.3, 6.9))
    figure = new_figure(each * len(statistics), each * 0.86 + 0.55)
    for axis, statistic in zip(figure.subplots(1, len(statistics), squeeze=False)[0], statistics, strict=True):
        _matrix(figure, axis, reading, look[statistic].values, statistic, heavy, each)
    when = f"{caption(reading, definition, update, band=False)} · step {int(reading.steps[at])}"
    write_title(figure, reading, "How much a step on a class moved a class", when)
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

    Raises:
        InputError: for what is no figure, no name of a file, no folder, or cannot be written.
    """
    from matplotlib.figure import Figure as AnyFigure

    check_instance("figure", figure, AnyFigure, "run.plot()")
    check_real("dpi", dpi, 1.0)
    if check_text("name", name) != Path(name).name:
        raise InputError(
            expected="name: of a file, without a folder", got=in_words(name), do="name the folder in folder="
        )
    folder = make_folder("folder", folder)
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
    check_place("folder", folder)
    reading = read(run)
    kinds = [intra_inter, heat_map]
    if len(reading.classes) <= READABLE_CLASSES:
        kinds.insert(0, class_pair_curves)
    if "layer" in getattr(run, "dataset", run).coords:
        kinds.append(collapse_curves)
    paths: list[Path] = []
    for definition in reading.definitions:
        for update in reading.updates:
            for kind in kinds:
                name = _file_name(f"{kind.__name__}-{definition}-{update}", {path.stem for path in paths})
                paths += save(kind(run, definition=definition, update=update), folder, name)
    return paths


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


def _anchor_panel(
    axis: Axes, reading: Reading, chosen: xr.Dataset, anchor: str, shown: Sequence[str], statistic: str
) -> None:
    row = chosen.isel(source_class=reading.classes.index(anchor))
    for target in shown:
        if target not in reading.targets:
            continue
        cell = row.isel(target_class=reading.targets.index(target))
        style = own_style() if target == anchor else other_style(shown.index(target))
        faint = target != anchor and len(shown) > 5
        draw_curve(axis, reading.x[1], band_of(cell, statistic), target, style, 0.07 if faint else 0.18)
    finish_axis(axis, "", statistic == "median" or needs_log(chosen, statistic))


def _label_lowest(axes: np.ndarray, label: str) -> None:
    """Name the x axis under the lowest panel of each column, and show its ticks there."""
    for column in axes.T:
        lowest = [axis for axis in column if axis.axison][-1]
        lowest.set_xlabel(label, fontsize=SMALL)
        lowest.tick_params(labelbottom=True)


def _class_legend(figure: Figure, reading: Reading, shown: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], markersize=3, **own_style())]
    handles += [Line2D([], [], markersize=3, **other_style(at)) for at in range(len(shown))]
    labels = ["own class (intra)", *(printable(f"moved: {brief(name)}") for name in shown)]
    columns = max(1, int(figure.get_figwidth() / (0.55 + 0.058 * max(map(len, labels)))))
    legend = figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, fontsize=SMALL, frameon=False, handlelength=3.2
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


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
        labels = [brief(name) for name in names[::every]]
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
