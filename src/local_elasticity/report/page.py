"""The page of a run: one HTML file that opens without a network and answers "how much did a step here move that?"."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from local_elasticity.base.checks import check_place, in_words
from local_elasticity.base.errors import InputError, missing_extra
from local_elasticity.report.markup import embedded_figures, plain_words, read_part, template, write_page_text
from local_elasticity.report.reading import (
    COUNTS,
    ENDS,
    READABLE_CLASSES,
    STATISTICS,
    SUMMARIES,
    Reading,
    answer,
    colours,
    decoded,
    read,
    scale_of,
    warnings_for,
    words_for,
)

MOST_CELLS = 250_000  # cells (over all snapshots) that a browser still reads in a moment: about 15 MB
MEANING = (
    "S_rel(x, x') is how much the prediction at x' moved when one training step was taken on the example x, divided by "
    "how much the prediction at x itself moved: 1 means as much as x, 0 not at all. Each cell averages it over pairs, "
    "from the class stepped on (row) to the class looked at (column)."
)


def write_page(run: Any, path: str | Path, figures: Iterable[Any] | None = None) -> Path:
    """Write the page of a run.

    Args:
        run: a run or its dataset.
        path: the HTML file; its folder is made when it is not there.
        figures: pictures to show beneath: matplotlib figures or paths of PNG files (other files, such as the
            PDFs beside them, are passed over).

    Returns:
        The path written.

    Raises:
        InputError: when ``run`` holds no S_rel tables, when a PNG is not there, or without plotly.
    """
    place = check_place("path", path)
    if figures is not None and (isinstance(figures, str | Path) or not isinstance(figures, Iterable)):
        raise InputError(
            expected="figures: a list of figures or of paths of PNG files",
            got=in_words(figures),
            do="write figures=[...]",
        )
    whole = read(run)
    reading = _thinned(whole)
    general = _general_notes(reading, len(whole.steps))
    page = template("page.html").substitute(
        title=html.escape(str(reading.data.attrs.get("title") or "Local elasticity through training")),
        answer=html.escape(answer(reading, reading.definitions[0], reading.updates[0])),
        meaning=html.escape(MEANING),
        last=len(reading.steps) - 1,
        definitions=_options(reading.definitions, reading.definitions),
        updates=_options(reading.updates, reading.updates),
        statistics=_options(STATISTICS, STATISTICS.values()),
        figures=embedded_figures(figures or ()),
        configuration=_configuration(reading),
        run=_json(_payload(reading, general)),
        style=read_part("page.css"),
        script=read_part("page.js"),
        plotly=_plotly(),
    )
    return write_page_text(place, page)


def _plotly() -> str:
    """The source of plotly.js, made safe inside a script element."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise missing_extra("plotly", "report", "the curves of the page") from error
    return get_plotlyjs().replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _thinned(reading: Reading) -> Reading:
    """Fewer snapshots, evenly spread with the first and the last, when all would be too many for a browser."""
    cells = reading.data["mean"]
    most = max(2, MOST_CELLS // max(1, cells.size // len(reading.steps)))
    if len(reading.steps) <= most:
        return reading
    kept = np.unique(np.linspace(0, len(reading.steps) - 1, most).round().astype(int))
    return Reading(reading.data.isel(step=kept), reading.band, reading.replicas, reading.scalars)


def _general_notes(reading: Reading, snapshots: int) -> list[str]:
    """What is left out of this page."""
    notes = []
    if len(reading.steps) < snapshots:
        notes.append(f"This page holds {len(reading.steps)} of the run's {snapshots} snapshots, evenly spread.")
    if max(len(reading.classes), len(reading.targets)) > READABLE_CLASSES:
        notes.append(
            f"With {len(reading.classes)} classes one curve per class pair cannot be read: the curves show the own "
            "class against the others, and the cell picked in the matrix."
        )
    return notes


def _payload(reading: Reading, general: list[str]) -> dict[str, Any]:
    """Everything the page's script needs."""
    data = reading.data
    ends = ("", *ENDS)
    epochs = reading.x[1].tolist() if reading.x[0] == "epoch" else None
    scalar_names = [name + end for name in reading.scalars for end in ends]
    pairs = [[(u, d) for d in reading.definitions] for u in reading.updates]
    return {
        "steps": reading.steps.tolist(),
        "epochs": epochs,
        "updates": reading.updates,
        "definitions": reading.definitions,
        "sources": reading.classes,
        "targets": reading.targets,
        "statistics": STATISTICS,
        "readable": READABLE_CLASSES,
        "replicas": reading.replicas,
        "band": reading.band,
        "cells": _packed(data, [name + end for name in STATISTICS for end in ends] + list(COUNTS)),
        "averages": _packed(data, [name + end for name in SUMMARIES for end in ends]),
        "scalars": _packed(data, [*scalar_names, "seconds"]),
        "scalar_names": reading.scalars,
        "panels": [{"label": label, "names": names} for label, names in reading.panels()],
        "scales": {name: _scales(reading, name) for name in STATISTICS},
        "diverging": colours(True),
        "sequential": colours(False),
        "words": [words_for(reading, name) for name in reading.definitions],
        "notes": [
            [{"answer": answer(reading, d, u), "warnings": warnings_for(reading, d, u)} for u, d in row]
            for row in pairs
        ],
        "general": general,
    }


def _scales(reading: Reading, statistic: str) -> list[list[dict[str, Any]]]:
    """The colours of each update and definition: one scale for all snapshots, so that the slider compares them."""
    data = reading.data
    heavy = data["heavy_tailed"].any(("step", "source_class", "target_class")) if "heavy_tailed" in data else None
    rows = []
    for u in range(len(reading.updates)):
        row = []
        for d in range(len(reading.definitions)):
            at = {"update": u, "definition": d}
            tailed = heavy is not None and bool(heavy.isel(at))
            row.append({**vars(scale_of(data[statistic].isel(at).values, tailed)), "heavy": tailed})
        rows.append(row)
    return rows


def _packed(data: Any, names: Iterable[str]) -> dict[str, Any]:
    return {name: _pack(data[name].values, exact=not name.endswith(ENDS)) for name in names if name in data}


def _pack(values: np.ndarray, exact: bool) -> dict[str, Any]:
    """An array as base64 of little-endian numbers; a constant one as its value. Bounds need single precision only."""
    if values.dtype == bool:
        kind, values = "u1", values.astype("<u1")
    elif np.issubdtype(values.dtype, np.integer) and np.abs(values).max(initial=0) < 2**31:
        kind, values = "i4", values.astype("<i4")
    else:
        kind = "f8" if exact else "f4"
        with np.errstate(over="ignore"):
            values = values.astype("<" + kind)
    flat = np.ascontiguousarray(values).ravel()
    if kind.startswith("f") and np.isnan(flat).all():
        return {"constant": None}
    if flat.size and np.isfinite(flat[0]) and (flat == flat[0]).all():
        return {"constant": flat[0].item()}
    return {"type": kind, "base64": base64.b64encode(flat.tobytes()).decode("ascii")}


def _json(value: Any) -> str:
    """JSON that cannot end the script element it stands in, whatever a class is called."""
    text = json.dumps(value, allow_nan=False, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _options(values: Iterable[str], texts: Iterable[str]) -> str:
    pairs = zip(values, texts, strict=True)
    return "".join(f'<option value="{html.escape(value)}">{html.escape(text)}</option>' for value, text in pairs)


def _configuration(reading: Reading) -> str:
    """The rows of the table that says how the run was made."""
    attrs = reading.data.attrs
    rows = list(reading.configuration.items())
    rows += [(f"version of {name}", value) for name, value in decoded(attrs.get("versions")).items()]
    told = {"title", "configuration", "versions", "definitions"}
    rows += [(name, value) for name, value in attrs.items() if name not in told and not str(name).startswith("_")]
    cell = '<tr><th scope="row">{}</th><td>{}</td></tr>'
    return "\n".join(
        cell.format(html.escape(str(name).replace("_", " ")), html.escape(plain_words(v))) for name, v in rows
    )
