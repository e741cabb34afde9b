"""The reading of a run: the choosing, the bands and the words that the figures and the page share."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from local_elasticity.base.checks import in_words
from local_elasticity.base.errors import InputError, nearest

CELL_DIMS = ("step", "update", "definition", "source_class", "target_class")
SUMMARY_DIMS = CELL_DIMS[:3]
STATISTICS = {
    "mean": "mean of the ratios",
    "median": "median of the ratios",
    "ratio_of_means": "ratio of the mean movements",
}
SUMMARIES = ("intra", "inter", "ratio")
COUNTS = ("n_pairs", "n_undefined", "heavy_tailed")
READABLE_CLASSES = 12  # with more, one curve per class pair can no longer be told from the next
NOT_SCALARS = {"epoch", "seconds"}

# What each definition divides by what. A run may bring its own wording in ``attrs["definitions"]`` (JSON).
DEFINITIONS_IN_WORDS = {
    "kl": "How far the class probabilities at x' moved, as the Kullback-Leibler divergence from before to after the "
    "step, KL(after ‖ before), divided by the same at x.",
    "kl_after_before": "KL(after ‖ before) of the class probabilities at x', divided by the same at x.",
    "kl_before_after": "KL(before ‖ after) of the class probabilities at x', divided by the same at x.",
    "kl_reverse": "KL(before ‖ after) of the class probabilities at x', divided by the same at x.",
    "bernoulli_kl": "KL(after ‖ before) of each output by itself, yes or no, summed over the outputs at x', divided by "
    "the same at x: for several labels a sample.",
    "kl_published": "What the published code computed: [H(p') + p'·q'] / [H(p) + p·q], with p the class probabilities "
    "before and q after the step. It is not a divergence: it stays near 1 when nothing moves, and falls when the step "
    "pulls x' away from its present prediction.",
    "he_su": "The size of the change of the prediction at x', divided by the size of the change at x "
    "(He and Su's relative similarity).",
    "suhe_published": "What the published code computed: the mean absolute change at x', divided by the "
    "root-mean-square change at x. The norms differ, so x measured against itself is not 1.",
    "l1": "The sum of the absolute changes at x', divided by the same at x.",
    "l2": "The Euclidean length of the change at x', divided by the same at x.",
}
NO_MOVEMENT = {"kl_published"}  # definitions whose ratio is not "how far x' moved over how far x moved"


@dataclass(frozen=True)
class Scale:
    """How values become colours: the limits, whether the steps are ratios, and which map."""

    low: float
    high: float
    log: bool
    diverging: bool


@dataclass(frozen=True)
class Reading:
    """A run made ready for the eye.

    Attributes:
        data: for every statistic s the variables s, s_low, s_high; the same for intra, inter, ratio and every
            scalar; counts; no ``replica`` dimension.
        band: what low and high are.
        replicas: how many runs were averaged; 0 when the run has no replicas.
        scalars: names of the (step,) variables worth a curve.
    """

    data: xr.Dataset
    band: str
    replicas: int
    scalars: tuple[str, ...]

    @property
    def classes(self) -> list[str]:
        """Names of the classes stepped on."""
        return _names(self.data, "source_class")

    @property
    def targets(self) -> list[str]:
        """Names of the classes looked at."""
        return _names(self.data, "target_class")

    @property
    def definitions(self) -> list[str]:
        """Names of the definitions."""
        return _names(self.data, "definition")

    @property
    def updates(self) -> list[str]:
        """Names of the probe updates."""
        return _names(self.data, "update")

    @property
    def steps(self) -> np.ndarray:
        """Optimiser updates made at each snapshot, (steps,)."""
        return self.data["step"].values

    @property
    def x(self) -> tuple[str, np.ndarray]:
        """Label and values of the time axis: epochs when every snapshot knows its own, else steps."""
        if "epoch" in self.data and np.isfinite(self.data["epoch"].values).all():
            return "epoch", self.data["epoch"].values
        return "training step", self.steps

    @property
    def configuration(self) -> dict[str, Any]:
        """The run's configuration, empty when it has none."""
        return decoded(self.data.attrs.get("configuration"))

    def select(self, definition: str | None, update: str | None) -> xr.Dataset:
        """The tables of one definition and one update (default: the first of each)."""
        chosen = {
            "definition": position("definition", definition, self.definitions),
            "update": position("update", update, self.updates),
        }
        return self.data.isel(chosen)

    def diagonal(self) -> np.ndarray:
        """True where the class stepped on is the class looked at, (source_class, target_class)."""
        return np.array(self.classes)[:, None] == np.array(self.targets)[None, :]

    def averages(self, chosen: xr.Dataset, statistic: str) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Centre, low and high of intra and inter, each (steps,); only the mean statistic has a stored band."""
        if statistic == "mean":
            return {name: band_of(chosen, name) for name in ("intra", "inter")}
        cells, same = chosen[statistic].values, self.diagonal()
        none = np.full(len(self.steps), np.nan)
        return {name: (_mean(cells[:, mask]), none, none) for name, mask in (("intra", same), ("inter", ~same))}

    def panels(self) -> list[tuple[str, list[str]]]:
        """Scalars grouped into the panels under the curves: the losses, the accuracies, then one each."""
        losses = [name for name in self.scalars if "loss" in name]
        accuracies = [name for name in self.scalars if "acc" in name and name not in losses]
        others = [name for name in self.scalars if name not in losses + accuracies]
        groups = [("loss", losses), ("accuracy", accuracies), *((name, [name]) for name in others)]
        return [(label, names) for label, names in groups if names]


def read(run: Any) -> Reading:
    """Make a run (or its dataset) ready for the eye.

    Args:
        run: an ``xarray.Dataset`` of the tracker, or an object whose ``dataset`` is one.

    Returns:
        The reading; the dataset is not changed.

    Raises:
        InputError: when this is no dataset of S_rel tables, or one without a snapshot.
    """
    dataset = getattr(run, "dataset", run)
    _check(dataset)
    wanted = [*STATISTICS, "interval_low", "interval_high", *COUNTS]
    wanted += [f"{name}{end}" for name in SUMMARIES for end in ("", "_low", "_high")]
    scalars = tuple(name for name in map(str, dataset.data_vars) if _is_scalar(dataset[name], name))
    extra = [name for name in ("epoch", "seconds", "below_noise_fraction") if name in dataset.variables]
    data = dataset[[name for name in wanted if name in dataset] + list(scalars)]
    data = data.reset_coords(drop=True)  # an epoch kept as a coordinate comes back as a variable
    data = data.assign({name: (dataset[name].dims, dataset[name].values) for name in extra})
    data = data.load().transpose(*CELL_DIMS, ...)
    replicas = data.sizes.get("replica", 0)
    data = _over_replicas(data) if replicas else _with_intervals(data)
    data.attrs = dict(dataset.attrs)
    shown = tuple(name for name in scalars if np.isfinite(data[name].values.astype(float)).any())
    return Reading(data, _band_name(data, replicas), replicas, shown)


def position(kind: str, name: str | None, names: Sequence[str]) -> int:
    """Where ``name`` stands among ``names``; 0 for None.

    Raises:
        InputError: for an unknown name, with the nearest one.
    """
    if name is None:
        return 0
    if not isinstance(name, str) or name not in names:
        raise InputError(expected=f"a {kind} of this run", got=in_words(name), do=nearest(str(name), names))
    return names.index(name)


def band_of(data: xr.Dataset, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centre, low and high of a variable; NaN where it has no band or is absent."""
    none = np.full(data.sizes["step"], np.nan)
    centre = data[name].values.astype(float) if name in data else none
    low, high = (data[name + end].values if name + end in data else np.full_like(centre, np.nan) for end in ENDS)
    return centre, low, high


ENDS = ("_low", "_high")


def scale_of(values: np.ndarray, heavy: bool) -> Scale:
    """Choose the colours of a matrix: ratios for values over decades, two-sided around 1 when they straddle it."""
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        return Scale(0.0, 2.0, False, True)
    low, high = float(finite.min()), float(finite.max())
    positive = finite[finite > 0]
    log = bool(positive.size > 0 and low >= 0 and (heavy or high > 100 * positive.min()))
    if log:
        low = float(positive.min())
    if log and low < 1 < high and 1 / 4 < math.log(high) / -math.log(low) < 4:
        reach = max(high, 1 / low)  # a lopsided scale would spend half of its colours on values that do not occur
        return Scale(1 / reach, reach, True, True)
    if not log and low < 1 < high:
        reach = max(high - 1, 1 - low)
        return Scale(1 - reach, 1 + reach, False, True)
    if low == high:
        return Scale(low * 0.9, high * 1.1, log, False) if low > 0 else Scale(low - 0.1, high + 0.1, False, False)
    return Scale(low, high, log, False)


def colours(diverging: bool, count: int = 256) -> list[str]:
    """Hex colours of the maps: blue, white, vermilion in equal CIELAB steps; or cividis."""
    if not diverging:
        from matplotlib import colormaps
        from matplotlib.colors import to_hex

        return [to_hex(colormaps["cividis"](i / (count - 1))) for i in range(count)]
    ends = np.array([[43.0, -8.0, -42.0], [96.0, 0.0, 0.0], [50.0, 48.0, 52.0]])
    at = np.linspace(0, 2, count)
    lab = np.stack([np.interp(at, [0, 1, 2], ends[:, i]) for i in range(3)], axis=-1)
    return ["#" + "".join(f"{c:02x}" for c in row) for row in _srgb(lab)]


def number(value: float) -> str:
    """A number as the page prints it: three decimals, or three digits and an exponent; a dash when undefined."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == 0 or 0.01 <= abs(value) < 1000:
        return f"{value:.3f}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa}e{int(exponent):+d}"


def words_for(reading: Reading, definition: str) -> str:
    """The formula of a definition in words; the run's own words come first."""
    own = decoded(reading.data.attrs.get("definitions"))
    return str(own.get(definition) or DEFINITIONS_IN_WORDS.get(definition) or f"The definition named {definition!r}.")


def answer(reading: Reading, definition: str, update: str) -> str:
    """The sentence that the run gives to the library's question, at its last snapshot."""
    last = reading.select(definition, update).isel(step=-1)
    names = ("intra", "inter", "ratio", "ratio_low", "ratio_high")
    intra, inter, ratio, low, high = (float(last[name]) if name in last else math.nan for name in names)
    replicas = f", mean of {reading.replicas} replicas" if reading.replicas else ""
    start = f"At the last look ({_moment(last)}{replicas})"
    if math.isnan(intra) or math.isnan(inter):
        return f"{start} the averages over classes are undefined: see the cells of the matrix."
    if definition in NO_MOVEMENT:
        found = f"the published ratio was {number(intra)} for the own class and {number(inter)} for other classes"
    else:
        found = (
            f"a step on one example moved its own class {number(intra)} times as much as itself "
            f"and other classes {number(inter)} times"
        )
    band = _band(low, high, reading.replicas)
    verdict = _medians(reading, last) or _verdict(low, high, reading.replicas, definition in NO_MOVEMENT)
    return f"{start} {found}: inter/intra {number(ratio)}{band}. {verdict}"


def warnings_for(reading: Reading, definition: str, update: str) -> list[str]:
    """What a reader must know before believing the numbers of one definition and update."""
    chosen, found = reading.select(definition, update), []
    looks = chosen.sizes["step"]
    if "heavy_tailed" in chosen and (heavy := chosen["heavy_tailed"].values.astype(bool)).any():
        found.append(
            f"Heavy tails: in {heavy.sum()} of {heavy.size} cells ({heavy[-1].sum()} at the last look) the largest 1 % "
            "of the pairs carry over half of the mean. Read the median there."
        )
    if "n_undefined" in chosen and (undefined := chosen["n_undefined"].values).sum() > 0:
        where = (undefined.reshape(looks, -1).sum(1) > 0).sum()
        found.append(f"{int(undefined.sum())} pairs were undefined (0/0) at {where} of {looks} looks; means skip them.")
    noise = chosen["below_noise_fraction"].values if "below_noise_fraction" in chosen else np.zeros(1)
    if np.nanmax(noise, initial=0.0) > 0:
        found.append(f"Below the noise floor: up to {100 * np.nanmax(noise):.1f} % of the pairs of one look.")
    if str(reading.data.attrs.get("self_pairs", "")) == "in":
        found.append("The same-class cells include each example measured against itself, as the papers do.")
    return found


def caption(reading: Reading, definition: str | None, update: str | None, band: bool = True) -> str:
    """Definition, update, pairs, band and seed, in one line."""
    chosen = reading.select(definition, update)
    parts = [str(chosen["definition"].values), str(chosen["update"].values)]
    if "n_pairs" in chosen:
        pairs = np.unique(chosen["n_pairs"].values.astype(int))
        parts.append(f"{pairs[0]}–{pairs[-1]} pairs a cell" if pairs.size > 1 else f"{pairs[0]} pairs a cell")
    if band:
        parts.append(reading.band)
    elif reading.replicas:
        parts.append(f"mean of {reading.replicas} replicas")
    seed = reading.configuration.get("seed", reading.data.attrs.get("seed"))
    parts.append("seed not recorded" if seed is None else f"seed {seed}")
    return " · ".join(parts)


def decoded(text: Any) -> dict[str, Any]:
    """A dict from a JSON attribute; {} when there is none, {"text": ...} when it is no JSON object."""
    if not text:
        return {}
    if isinstance(text, dict):
        return text
    try:
        value = json.loads(text)
    except (TypeError, ValueError):
        return {"text": str(text)}
    return value if isinstance(value, dict) else {"text": str(text)}


def _names(data: xr.Dataset, dim: str) -> list[str]:
    return [str(name) for name in data[dim].values]


def _check(dataset: Any) -> None:
    do = "give the dataset of a run: le.open_run(path).dataset, or what Tracker.finish() returned"
    if not isinstance(dataset, xr.Dataset):
        raise InputError(expected="an xarray.Dataset of S_rel tables", got=type(dataset).__name__, do=do)
    missing = [name for name in STATISTICS if name not in dataset or not set(CELL_DIMS) <= set(dataset[name].dims)]
    if missing:
        wanted = f"the variables {', '.join(STATISTICS)} over ({', '.join(CELL_DIMS)})"
        raise InputError(expected=wanted, got=f"a dataset without {', '.join(missing)}", do=do)
    empty = [dim for dim in CELL_DIMS if dataset.sizes[dim] == 0]
    if empty:
        do = "look at least once: tracker.snapshot()"
        raise InputError(expected="a run with a snapshot", got=f"a run whose {empty[0]} is empty", do=do)


def _is_scalar(variable: xr.DataArray, name: str) -> bool:
    numeric = np.issubdtype(variable.dtype, np.number) or variable.dtype == bool
    return numeric and set(variable.dims) - {"replica"} == {"step"} and name not in NOT_SCALARS


def _over_replicas(data: xr.Dataset) -> xr.Dataset:
    """Mean over replicas, and one standard deviation (ddof 0, as the papers) on either side as low and high."""
    kept = [name for name in map(str, data.data_vars) if not name.startswith("interval_") and not name.endswith(ENDS)]
    out = {}
    for name in kept:
        values = data[name]
        if "replica" not in values.dims:
            out[name] = values
        elif name in COUNTS:
            out[name] = values.any("replica") if name == "heavy_tailed" else values.sum("replica")
        else:
            out[name], spread = values.mean("replica"), values.std("replica", ddof=0)
            if name not in NOT_SCALARS:
                out[name + "_low"], out[name + "_high"] = out[name] - spread, out[name] + spread
    return xr.Dataset(out)


def _with_intervals(data: xr.Dataset) -> xr.Dataset:
    return data.rename({f"interval{end}": f"mean{end}" for end in ENDS if f"interval{end}" in data})


def _band_name(data: xr.Dataset, replicas: int) -> str:
    if replicas:
        return f"mean and ±1 SD over {replicas} replicas"
    has = any(name in data and np.isfinite(data[name].values).any() for name in ("mean_low", "intra_low"))
    return "band: 95 % bootstrap interval" if has else "no interval"


def _mean(cells: np.ndarray) -> np.ndarray:
    """Mean of the defined cells at each step; NaN where there is none. (steps, cells) -> (steps,)."""
    defined = np.isfinite(cells)
    total, count = np.where(defined, cells, 0.0).sum(1), defined.sum(1)
    return np.divide(total, count, out=np.full(len(cells), np.nan), where=count > 0)


def _srgb(lab: np.ndarray) -> np.ndarray:
    """CIELAB (D65) to 8-bit sRGB, (..., 3) -> (..., 3) int."""
    y = (lab[..., 0] + 16) / 116
    f = np.stack([y + lab[..., 1] / 500, y, y - lab[..., 2] / 200], axis=-1)
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * [0.95047, 1.0, 1.08883]
    to_rgb = np.array([[3.2406, -1.5372, -0.4986], [-0.9689, 1.8758, 0.0415], [0.0557, -0.2040, 1.0570]])
    linear = np.clip(xyz @ to_rgb.T, 0, 1)
    rgb = np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)
    return np.rint(255 * rgb).astype(int)


def _moment(last: xr.Dataset) -> str:
    epoch = float(last["epoch"]) if "epoch" in last else math.nan
    return f"step {int(last['step'])}" + ("" if math.isnan(epoch) else f", epoch {epoch:.2f}")


def _medians(reading: Reading, last: xr.Dataset) -> str:
    """Where a few pairs carry the means, what the medians say instead of a verdict."""
    if "heavy_tailed" not in last or not last["heavy_tailed"].any():
        return ""
    cells, same = last["median"].values[None], reading.diagonal()
    own, others = (number(_mean(cells[:, mask])[0]) for mask in (same, ~same))
    return f"A few pairs carry these means; by the medians it is {own} for the own class and {others} for the others."


def _band(low: float, high: float, replicas: int) -> str:
    if math.isnan(low) or math.isnan(high):
        return ""
    return f" (±1 SD: {number(low)} to {number(high)})" if replicas else f" [{number(low)}, {number(high)}]"


def _verdict(low: float, high: float, replicas: int, no_movement: bool) -> str:
    """What the interval of inter/intra allows to say."""
    if math.isnan(low) or math.isnan(high):
        return "There is no interval, so no verdict."
    if low <= 1 <= high:
        return f"The {'band' if replicas else 'interval'} includes 1: no preference for the own class is shown."
    if no_movement:
        which = "lower for other classes" if high < 1 else "higher for other classes"
        return f"It is {which}; this ratio is signed and does not tell how far a prediction moved."
    return "The own class moved more." if high < 1 else "Other classes moved more than the own class."
