"""The page and the figures of an ensemble: class means, validation, impact within and between classes, collapse."""

from __future__ import annotations

import html
import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from local_elasticity.base.errors import IdentifiabilityWarning, InputError
from local_elasticity.lesde.estimation.estimate import estimate
from local_elasticity.lesde.estimation.recordings import read_recording
from local_elasticity.report.curves import Line, Panel, panels
from local_elasticity.report.estimation import rate_curves
from local_elasticity.report.figures import save
from local_elasticity.report.markup import embedded_figures, plain_words, read_part, template, write_page_text
from local_elasticity.report.reading import READABLE_CLASSES
from local_elasticity.runs.ensembles import open_ensemble

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

    from local_elasticity.lesde.estimation.estimate import Fit

LOW, HIGH = 0.1, 0.9  # quantiles over replicas that bound a band
BAND = "line: median over replicas; band: the middle 80 % of them"
STRETCHES = 100  # into which the log of single steps is averaged for a figure
COLLAPSE = {
    "nc1": ("NC1: tr($\\Sigma_W \\Sigma_B^+$)/K", True),
    "nc1_cdnv": ("NC1: distance-normalised variance", True),
    "nc2_equinorm": ("NC2: norms of means, sd/mean", False),
    "nc2_equiangle": ("NC2: angles, |cos + 1/(K-1)|", False),
    "nc2_simplex": ("NC2: distance to the simplex", False),
}
MEANING = (
    "Many networks of one architecture were trained on the same samples, each from its own initial weights and in its "
    "own order. Alpha is how much a step on a sample moves the outputs of its own class, beta those of other classes; "
    "classes separate when alpha stays larger."
)


@dataclass(frozen=True)
class EnsembleReading:
    """What the figures and the page need.

    Attributes:
        data: the log, without the replicas that diverged.
        settings: how it was trained.
        replicas: replicas in all.
        diverged: replicas left out.
        class_names: one a class.
    """

    data: xr.Dataset = field(repr=False)
    settings: dict[str, Any] = field(repr=False)
    replicas: int
    diverged: int
    class_names: tuple[str, ...]

    @property
    def updates(self) -> int:
        """Updates made."""
        return int(self.data.attrs["updates"])


def read_ensemble(path: str | Path) -> EnsembleReading:
    """Open an ensemble's folder for a report.

    Raises:
        InputError: when it is none.
    """
    data = open_ensemble(path)
    kept = data["diverged"].values < 0
    settings = json.loads(data.attrs["settings"])
    chosen = data.isel(replica=np.flatnonzero(kept))
    names = (settings.get("configuration") or {}).get("class_names")
    count = data.sizes.get("class") or data.sizes.get("output", 0)
    if not names or len(names) != count:
        names = [str(k) for k in range(count)]
    return EnsembleReading(chosen, settings, len(kept), int((~kept).sum()), tuple(map(str, names)))


def class_means(reading: EnsembleReading) -> Figure | None:
    """Class means of the logits through training, a panel a class; of the probes, else of the log."""
    found = _class_means(reading)
    if found is None:
        return None
    t, middle, low, high, words = found
    names = reading.class_names
    logits = list(names) if middle.shape[2] == len(names) else [f"output {j}" for j in range(middle.shape[2])]
    content = []
    for k, name in enumerate(names[:READABLE_CLASSES]):
        lines = [
            Line(f"logit of {logits[j]}", t, middle[:, k, j], None if low is None else (low[:, k, j], high[:, k, j]))
            for j in range(min(middle.shape[2], READABLE_CLASSES))
        ]
        content.append(
            Panel(
                f"samples of {name}",
                lines,
                y_label="logit" if k % 3 == 0 else "",
                x_label="training step",
                x_scale="linear",
                y_scale="linear",
            )
        )
    figure = panels(content, min(3, len(content)), f"Mean logits of each class ({words})")
    _share(figure)
    return figure


def validation(reading: EnsembleReading) -> Figure | None:
    """Validation loss and accuracy through training."""
    data = reading.data
    if "validation_loss" not in data:
        return None
    t, content = data["validation_step"].values, []
    for name in ("validation_loss", "validation_accuracy"):
        if name in data:
            middle, low, high = _spread(data[name].values)
            word = name.removeprefix("validation_")
            line = Line(word, t, middle, (low, high))
            content.append(
                Panel(word, [line], y_label=word, x_label="training step", x_scale="linear", y_scale="linear")
            )
    return panels(content, len(content), f"Validation ({BAND})", width=3.45 * len(content))


def collapse(reading: EnsembleReading) -> Figure | None:
    """Neural collapse of the probes through training, a line a layer."""
    data = reading.data
    if "nc1" not in data:
        return None
    t, layers, content = data["probe_step"].values, [str(x) for x in data["layer"].values], []
    for name, (title, log) in COLLAPSE.items():
        lines = []
        for at, layer in enumerate(layers[: READABLE_CLASSES // 2]):
            middle, low, high = _spread(data[name].values[:, :, at])
            lines.append(Line(layer, t, middle, (low, high)))
        content.append(
            Panel(
                title, lines, y_label="", x_label="training step", x_scale="linear", y_scale="log" if log else "linear"
            )
        )
    return panels(content, 3, f"Neural collapse of the probes ({BAND})")


def fit_ensemble(path: str | Path, n_boot: int = 200) -> Fit | str:
    """The LE-SDE estimated from the log, or why it could not be."""
    try:
        found = read_recording(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", IdentifiabilityWarning)
            model = "logits" if found.square else "isotropic"
            return estimate(**found.data, model=model, missing="interpolate", n_boot=n_boot)
    except InputError as error:
        return str(error)


def write_ensemble(path: str | Path) -> tuple[list[Path], Path]:
    """Write figures/ and report.html into an ensemble's folder.

    Returns:
        The figures (PNG and PDF) and the page.

    Raises:
        InputError: when it is not the folder of an ensemble.
    """
    folder = Path(path)
    reading, fit = read_ensemble(folder), fit_ensemble(folder)
    drawn = {
        "class-means": class_means(reading),
        "validation": validation(reading),
        "rates": None if isinstance(fit, str) else rate_curves(fit),
        "collapse": collapse(reading),
    }
    figures = [path for name, figure in drawn.items() if figure for path in save(figure, folder / "figures", name)]
    page = template("ensemble.html").substitute(
        title=html.escape(f"{reading.replicas} networks in lock step"),
        answer=html.escape(" ".join(_answer(reading, fit))),
        meaning=html.escape(MEANING),
        figures=embedded_figures(figures),
        numbers_note=html.escape(f"After {reading.updates} updates; over replicas: mean, sd, smallest, largest."),
        numbers=_numbers(reading, fit),
        configuration=_configuration(reading),
        style=read_part("page.css"),
    )
    return figures, write_page_text(folder / "report.html", page)


# --- what is shown -------------------------------------------------------------------------------------------------


def _spread(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Median and band over the replicas, axis 1."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a row of NaN stays NaN
        middle, low, high = np.nanquantile(values, [0.5, LOW, HIGH], axis=1)
    return middle, low, high


def _class_means(reading: EnsembleReading) -> Any:
    data = reading.data
    if "probe_mean" in data:
        middle, low, high = _spread(data["probe_mean"].values)
        return data["probe_step"].values, middle, low, high, f"fixed probes; {BAND}"
    if "logits" not in data or data["labels"].dtype.kind not in "iu" or not data.sizes["step"]:
        return None
    steps, K = data.sizes["step"], len(reading.class_names)
    logits = data["logits"].values.reshape(steps, -1, data.sizes["output"]).astype(float)
    labels = data["labels"].values.reshape(steps, -1)
    parts = np.array_split(np.arange(steps), min(STRETCHES, steps))
    middle = np.full((len(parts), K, logits.shape[2]), np.nan)
    for i, part in enumerate(parts):
        for k in range(K):
            own = logits[part][labels[part] == k]
            if len(own):
                middle[i, k] = own.mean(axis=0)
    t = np.array([part.mean() for part in parts])
    return t, middle, None, None, f"of the samples trained on, before their step; {len(parts)} stretches averaged"


def _share(figure: Figure) -> None:
    """One scale for all panels, so that classes compare."""
    limits = [axis.get_ylim() for axis in figure.axes if axis.axison]
    for axis in figure.axes:
        axis.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))


def _answer(reading: EnsembleReading, fit: Fit | str) -> list[str]:
    data, said = reading.data, []
    if "validation_accuracy" in data and data.sizes["validation_step"]:
        last = data["validation_accuracy"].values[-1]
        said.append(
            f"After {reading.updates} updates the networks are right on {last.mean():.1%} of the validation samples"
        )
        said[-1] += f" (the middle 80 %: {np.quantile(last, LOW):.1%} to {np.quantile(last, HIGH):.1%})."
    if not isinstance(fit, str) and np.isfinite(fit.A[-1]):
        said.append(
            f"Impact added up to A = {fit.A[-1]:.3g} within classes and B = {fit.B[-1]:.3g} between them "
            f"({'L' if fit.model == 'logits' else 'I'}-model, estimator as defined)."
        )
    if reading.diverged:
        said.append(f"{reading.diverged} of {reading.replicas} replicas diverged and are left out.")
    return said or [f"{reading.updates} updates were made."]


def _numbers(reading: EnsembleReading, fit: Fit | str) -> str:
    data, rows = reading.data, []

    def add(name: str, values: Any) -> None:
        values = np.asarray(values, dtype=float)
        values = values[np.isfinite(values)]
        if values.size:
            sd = f"{values.std(ddof=1):.3g}" if values.size > 1 else ""
            rows.append((name, f"{values.mean():.4g}", sd, f"{values.min():.4g}", f"{values.max():.4g}"))

    for name in ("validation_loss", "validation_accuracy"):
        if name in data and data.sizes["validation_step"]:
            add(name.replace("_", " "), data[name].values[-1])
    for name in COLLAPSE:
        if name in data and data.sizes["probe_step"]:
            for at, layer in enumerate(data["layer"].values):
                add(f"{name}, {layer}", data[name].values[-1, :, at])
    head = "<thead><tr><th></th><th>mean</th><th>sd</th><th>smallest</th><th>largest</th></tr></thead>"
    body = ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    if isinstance(fit, str):
        body.append(f'<tr><td colspan="5">no estimate of the rates: {html.escape(fit)}</td></tr>')
    else:
        for name in ("A", "B"):
            low, high = (bound[-1] for bound in fit.intervals[name])
            interval = f" [{low:.4g}, {high:.4g}] ({fit.confidence:.0%}, trials resampled)" if np.isfinite(low) else ""
            body.append(
                f'<tr><td>{name} at the end</td><td colspan="4">{getattr(fit, name)[-1]:.4g}{interval}</td></tr>'
            )
    return f"{head}<tbody>{''.join(body)}</tbody>"


def _configuration(reading: EnsembleReading) -> str:
    settings = {key: value for key, value in reading.settings.items() if key not in ("configuration", "parameters")}
    # What the caller said of the run may bear the same names as what the trainer did.
    settings = (reading.settings.get("configuration") or {}) | settings.pop("rule", {}) | settings
    settings["replicas"] = len(settings.get("replicas") or [])
    for name in ("validation", "probes"):
        looks = settings.get(name)
        settings[name] = f"{len(looks[1])} looks" if looks else "none"
    cell = '<tr><th scope="row">{}</th><td>{}</td></tr>'
    return "\n".join(
        cell.format(html.escape(k.replace("_", " ")), html.escape(plain_words(v))) for k, v in settings.items()
    )
