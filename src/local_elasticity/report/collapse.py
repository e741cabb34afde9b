"""The figure of neural collapse: S_rel, the estimated alpha and beta, and NC1 to NC4 of layers on one time axis."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from local_elasticity.base.errors import InputError
from local_elasticity.report.reading import Reading, caption, read
from local_elasticity.report.style import (
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
    write_title,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS = {
    "nc1": "NC1\ntr(Σ$_W$Σ$_B^+$)/K",
    "nc1_cdnv": "CDNV",
    "nc2_equiangle": "NC2 angles\n|cos + 1/(K−1)|",
    "nc2_equinorm": "NC2 norms\nsd / mean",
    "nc3": "NC3\nclassifier − means",
    "nc4": "NC4\ndisagreement",
}
"""What is shown of each layer, where the run has it: metric -> label. Collapse is the way to 0."""
LOGARITHMIC = ("nc1", "nc1_cdnv")
Rates = dict[str, np.ndarray]


def collapse_curves(
    run: Any, *, definition: str | None = None, update: str | None = None, rates: Any = None, width: float = 4.6
) -> Figure:
    """S_rel, alpha and beta where they were estimated, and neural collapse of every layer, one panel beneath the other.

    Args:
        run: a run (or its dataset) that was tracked with ``collapse_layers``.
        definition: name of the definition of S_rel; the first by default.
        update: name of the probe update; the first by default.
        rates: a ``Fit``, or arrays t, alpha, beta; by default what ``local-elasticity estimate`` left in the run.
        width: inches.

    Returns:
        The figure.

    Raises:
        InputError: for an unknown name, or a run without neural collapse.
    """
    reading, data = read(run), getattr(run, "dataset", run)
    shown = [name for name in PANELS if name in data and np.isfinite(data[name].values.astype(float)).any()]
    if "layer" not in data.coords or not shown:
        raise InputError(
            expected="a run with neural collapse", got="one without", do="track with collapse_layers or --collapse"
        )
    found = _rates(rates) if rates is not None else stored_rates(run)
    heights = [1.2] + [0.95] * (found is not None) + [0.8] * len(shown)
    figure = new_figure(width, sum(heights) + 0.22 * len(heights) + 0.9)
    axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    _similarity(axes[0], reading, definition, update, width)
    if found is not None:
        _impacts(axes[1], reading, found, width)
    for axis, name in zip(axes[-len(shown) :], shown, strict=True):
        _layers(axis, reading, data, name)
    legend_above(axes[-len(shown)], width)
    axes[-1].set_xlabel(reading.x[0], fontsize=SMALL)
    figure.align_ylabels(axes)
    write_title(
        figure, reading, "Local elasticity and neural collapse of the probes", caption(reading, definition, update)
    )
    return figure


def stored_rates(run: Any) -> Rates | None:
    """The alpha and beta that ``local-elasticity estimate`` left beside the run; None where there are none."""
    place = getattr(run, "path", None)
    path = Path(place).parent / "estimate" / "estimate.json" if place is not None else None
    if path is None or not path.is_file():
        return None
    try:
        return _rates(json.loads(path.read_text())["series"])
    except (ValueError, KeyError, TypeError):
        return None


def _rates(given: Any) -> Rates | None:
    """Arrays t, alpha and beta; None where there are no finite ones, as for an estimate without slopes."""
    get = given.__getitem__ if isinstance(given, dict) else lambda name: getattr(given, name)
    found = {name: np.array(get(name), dtype=float) for name in ("t", "alpha", "beta")}
    return found if np.isfinite(found["alpha"]).any() else None


def _similarity(axis: Any, reading: Reading, definition: str | None, update: str | None, width: float) -> None:
    chosen = reading.select(definition, update)
    statistic = "median" if heavy_tailed(chosen) else "mean"
    names = {"intra": "own class (intra)", "inter": "others (inter)"}
    averages = reading.averages(chosen, statistic)
    for (name, values), style in zip(averages.items(), (own_style(), other_style(0)), strict=True):
        draw_curve(axis, reading.x[1], values, names[name], style)
    finish_axis(axis, Y_LABELS[statistic], statistic == "median" or needs_log(chosen, "mean"))
    legend_above(axis, width)


def _impacts(axis: Any, reading: Reading, rates: Rates, width: float) -> None:
    label, x = reading.x
    times = rates["t"] if label != "epoch" else np.interp(rates["t"], reading.steps, x, left=math.nan, right=math.nan)
    none = np.full(len(times), math.nan)
    for name, style in (("alpha", own_style()), ("beta", other_style(0))):
        words = {"alpha": "alpha (within classes)", "beta": "beta (between classes)"}[name]
        draw_curve(axis, times, (rates[name], none, none), words, style)
    axis.axhline(0, color="0.6", linewidth=0.6, zorder=0)
    values = np.concatenate([rates[name][np.isfinite(rates[name])] for name in ("alpha", "beta")])
    low, high = np.quantile(values, [0.01, 0.99])  # the first slopes are known badly, and would flatten the others
    room = 0.2 * max(high - low, 1e-12)
    axis.set_ylim(low - room, high + room)
    finish_axis(axis, "impact per step", log=False)
    handles = [line for line in axis.lines if not str(line.get_label()).startswith("_")]
    axis.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(0, 0.97),
        ncols=2,
        fontsize=SMALL - 0.5,
        frameon=False,
        handlelength=2.6,
        columnspacing=1.0,
        borderaxespad=0.1,
    )


def _layers(axis: Any, reading: Reading, data: Any, name: str) -> None:
    values = data[name]
    replicas = "replica" in values.dims
    centre = values.mean("replica") if replicas else values
    spread = values.std("replica", ddof=0) if replicas else centre * math.nan
    for at, layer in enumerate(map(str, data["layer"].values)):
        y, sd = (one.sel(layer=layer).transpose("step").values.astype(float) for one in (centre, spread))
        if np.isfinite(y).any():
            draw_curve(
                axis, reading.x[1], (y, y - sd, y + sd), brief(layer), own_style() if at == 0 else other_style(at - 1)
            )
    log = name in LOGARITHMIC and bool((centre.values[np.isfinite(centre.values)] > 0).any())
    finish_axis(axis, "", log)
    axis.set_ylabel(PANELS[name], fontsize=SMALL, parse_math=True)
    if not log:
        axis.set_ylim(bottom=0)
