"""Every definition at every look of the image studies, from the outputs that the runs kept (spec srel 1.3-1.8).

All definitions, probes, averages and both treatments of self pairs are evaluated on the same trajectories.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray

from local_elasticity.base.parallel import read_record
from local_elasticity.runs.folders import locate
from local_elasticity.runs.run import open_run
from local_elasticity.similarity.definitions import at_limit, get_definition, movements, outputs_of, s_rel_of
from local_elasticity.studies.dan2023.settings import DEFINITIONS, PROBE, PROBES, Condition
from local_elasticity.studies.engine.pieces import read_arrays

if TYPE_CHECKING:
    import xarray as xr

STATISTICS = ("mean", "median", "ratio_of_means")
SELF = ("in", "out")
RESAMPLES = 200


@dataclass
class Series:
    """All runs of one condition.

    Attributes:
        condition: what was trained on what.
        datasets: the runs as they were tracked.
        folders: of the runs.
        records: of the runs.
        seed: of resampling.
    """

    condition: Condition
    datasets: list[xr.Dataset]
    folders: list[Path]
    records: list[dict[str, Any]]
    seed: int
    _pairs: dict[tuple[str, str], ndarray] = field(default_factory=dict, repr=False)

    @property
    def classes(self) -> list[str]:
        """Their names."""
        return [str(name) for name in self.datasets[0]["source_class"].values]

    @property
    def epochs(self) -> Float[ndarray, " looks"]:
        """When the looks were, in epochs from 0."""
        return self.datasets[0]["epoch"].values

    @property
    def last_epoch(self) -> Bool[ndarray, " looks"]:
        """Which looks were in the last epoch."""
        return np.floor(self.epochs) == np.floor(self.epochs[-1])

    def pairs(self, update: str = PROBE, definition: str = "kl_published") -> Float[ndarray, "runs looks s t"]:
        """S_rel of every pair at every look of every run; NaN where it is undefined."""
        key = (update, definition)
        if key not in self._pairs:
            self._pairs[key] = np.stack([_s_rel(data, update, definition) for data in self.datasets])
        return self._pairs[key]

    @cached_property
    def tables(self) -> xr.DataArray:
        """Class tables: (run, look, update, definition, self_pairs, statistic, source_class, target_class)."""
        import xarray as xr

        n = len(self.classes)
        shape = (len(self.datasets), len(self.epochs), len(PROBES), len(DEFINITIONS), len(SELF), len(STATISTICS), n, n)
        values = np.full(shape, np.nan)
        for u, update in enumerate(PROBES):
            for d, definition in enumerate(DEFINITIONS):
                s = self.pairs(update, definition)
                weights = np.stack([_denominators(data, update, definition) for data in self.datasets])
                for k, kind in enumerate(SELF):
                    values[:, :, u, d, k] = class_tables(s, weights, n, exclude_self=kind == "out")
        dims = ("run", "look", "update", "definition", "self_pairs", "statistic", "source_class", "target_class")
        coords = {
            "update": list(PROBES),
            "definition": list(DEFINITIONS),
            "self_pairs": list(SELF),
            "statistic": list(STATISTICS),
            "source_class": self.classes,
            "target_class": self.classes,
        }
        return xr.DataArray(values, dims=dims, coords=coords)

    def curves(
        self, update: str, definition: str, statistic: str = "mean", self_pairs: str = "in"
    ) -> Float[ndarray, "runs looks c c"]:
        """Class tables of one measure."""
        return self.tables.sel(update=update, definition=definition, statistic=statistic, self_pairs=self_pairs).values

    def auc(self, update: str, definition: str) -> Float[ndarray, "runs looks s"]:
        """For every source: the probability that a target of its class has a larger S_rel than one of another class.

        Self pairs are out; ties count half. It does not depend on how pairs are averaged: 0.5 is no preference.
        """
        return own_against_others(self.pairs(update, definition), len(self.classes))

    def below_noise(self) -> dict[str, float]:
        """Share of pairs whose movement is lost in rounding, by probe step."""
        shares = [data["below_noise_fraction"] for data in self.datasets]
        return {u: float(np.mean([share.sel(update=u).values.mean() for share in shares])) for u in PROBES}

    def below_eps(self, definition: str) -> dict[str, float]:
        """Share of (run, look, source) whose movement, without it, is smaller than the eps beside it, by probe step."""
        eps, shares = get_definition(definition).eps, {}
        for update in PROBES:
            moved = np.stack([_denominators(data, update, definition) for data in self.datasets])
            shares[update] = float((moved - eps < eps).mean())
        return shares

    def controls(self, name: str) -> dict[int, dict[str, Float[ndarray, "runs ..."]]]:
        """Outputs of a control by step, runs stacked; steps that not all runs have are left out."""
        found: dict[int, list[dict[str, ndarray]]] = {}
        for folder in self.folders:
            for path in sorted(folder.glob("control-*.npz")):
                stored = read_arrays(path)
                parts = {k.removeprefix(f"{name}_"): v for k, v in stored.items() if k.startswith(f"{name}_")}
                if parts:
                    found.setdefault(int(path.stem.rpartition("-")[2]), []).append(parts)
        whole = {step: some for step, some in found.items() if len(some) == len(self.folders)}
        return {step: {k: np.stack([one[k] for one in some]) for k in some[0]} for step, some in whole.items()}


def tables_of(places: Sequence[tuple[Condition, Path]], records: Sequence[dict[str, Any]], seed: int) -> list[Series]:
    """The runs in these folders, by condition; of unfinished ones the looks that all runs of a condition have."""
    found: dict[Condition, Series] = {}
    for (condition, folder), record in zip(places, records, strict=True):
        series = found.setdefault(condition, Series(condition, [], [], [], seed))
        series.datasets.append(open_run(folder).dataset.load())
        series.folders.append(folder)
        series.records.append(record)
    for series in found.values():
        looks = min(data.sizes["step"] for data in series.datasets)
        series.datasets[:] = [data.isel(step=slice(looks)) for data in series.datasets]
    return list(found.values())


def record_so_far(condition: Condition, index: int, seed: int, folder: Path) -> dict[str, Any] | None:
    """The record of a run, or what can be said of an unfinished one; None where there is no snapshot."""
    if (folder / "record.json").exists():
        return read_record(folder / "record.json")
    if locate(folder) is None:
        return None
    data = open_run(folder).dataset
    if not data.sizes.get("step"):
        return None
    last = data.isel(step=-1)
    metrics = {name: float(last[name]) for name in ("train_accuracy", "train_loss", "test_accuracy", "test_loss")}
    looks = int(data.sizes["step"])
    return {
        "condition": condition.name,
        "run": index,
        "seed": seed,
        "updates": int(last["step"]),
        "looks": looks,
        **metrics,
        "test_images": 0,
        "seconds": {"looks": float(data["seconds"].sum())},
    }


def _outputs(data: xr.Dataset, update: str, look: int) -> tuple[ndarray, ndarray, ndarray, ndarray]:
    at = data.isel(step=look)
    mine = at.sel(update=update)
    return at["before"].values, mine["after"].values, at["source_before"].values, mine["source_after"].values


def _s_rel(data: xr.Dataset, update: str, definition: str) -> Float[ndarray, "looks s t"]:
    limit = update in data.attrs.get("limits", ())
    looks = range(data.sizes["step"])
    return np.stack([s_rel_of(*_outputs(data, update, k), definition, limit=limit).numpy() for k in looks])


def _denominators(data: xr.Dataset, update: str, definition: str) -> Float[ndarray, "looks s"]:
    """How far every source moved, for the ratio of means; at the limit on one scale for all sources."""
    found = []
    limit = update in data.attrs.get("limits", ())
    for look in range(data.sizes["step"]):
        moved = outputs_of(*_outputs(data, update, look))
        moved, eps = (at_limit(moved, together=True), 0.0) if limit else (moved, None)
        found.append(movements(moved, definition, eps)[1].numpy())
    return np.stack(found)


def class_tables(
    s: Float[ndarray, "... s t"], weights: Float[ndarray, "... s"], n_classes: int, exclude_self: bool
) -> Float[ndarray, "... statistic c c"]:
    """Mean, median and ratio of means of every class pair; probes are sorted by class, as many of each.

    Undefined pairs are left out; the twin of ``classes.by_class`` over many looks at once.
    """
    s = np.where(np.eye(s.shape[-1], dtype=bool), np.nan, s) if exclude_self else s
    each = s.shape[-1] // n_classes
    cells = s.reshape(*s.shape[:-2], n_classes, each, n_classes, each).swapaxes(-2, -3)
    flat = cells.reshape(*cells.shape[:-2], each * each)
    moved = np.where(np.isfinite(cells), weights.reshape(*weights.shape[:-1], n_classes, 1, each, 1), np.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a cell without a defined pair is NaN
        ratio = np.nansum(moved * cells, axis=(-1, -2)) / np.nansum(moved, axis=(-1, -2))
        return np.stack([np.nanmean(flat, -1), np.nanmedian(flat, -1), ratio], axis=-3)


def own_against_others(s: Float[ndarray, "... s t"], n_classes: int) -> Float[ndarray, "... s"]:
    """For every source the share of (own-class target, other target) pairs with the larger S_rel in the own class."""
    n = s.shape[-1]
    each = n // n_classes
    shares = np.full(s.shape[:-1], np.nan)
    for source in range(n):
        label = source // each
        own = [t for t in range(label * each, (label + 1) * each) if t != source]
        others = [t for t in range(n) if t // each != label]
        if not own:
            continue
        mine, theirs = s[..., source, own][..., :, None], s[..., source, others][..., None, :]
        share = (mine > theirs) + 0.5 * (mine == theirs)
        defined = np.isfinite(mine) & np.isfinite(theirs)
        count = defined.sum((-1, -2))
        with np.errstate(invalid="ignore"):
            shares[..., source] = np.where(defined, share, 0.0).sum((-1, -2)) / np.where(count, count, np.nan)
    return shares


def above_both(curves: Float[ndarray, "... looks c c"]) -> Bool[ndarray, "... looks c"]:
    """Whether the intra value of every class stepped on exceeds each of its inter values (NaN: no)."""
    c = curves.shape[-1]
    intra = np.diagonal(curves, axis1=-2, axis2=-1)
    others = np.where(np.eye(c, dtype=bool), -np.inf, curves)
    with np.errstate(invalid="ignore"):
        return intra > others.max(-1)


def intra_inter(curves: Float[ndarray, "... c c"]) -> tuple[ndarray, ndarray]:
    """Unweighted means of the diagonal and of the other cells."""
    c = curves.shape[-1]
    own = np.eye(c, dtype=bool)
    return curves[..., own].mean(-1), curves[..., ~own].mean(-1)


def resampled_means(
    s: Float[ndarray, "runs looks s t"], n_classes: int, seed: int, repeats: int = RESAMPLES
) -> Float[ndarray, "repeats looks c c"]:
    """Run-mean class means over resampled probes (sources and targets alike, at all looks) and resampled runs."""
    stream = np.random.default_rng(seed)
    runs, _, n, _ = s.shape
    each = n // n_classes

    def draw() -> ndarray:
        """How often every probe of every class is drawn: (classes, probes)."""
        counts = [np.bincount(stream.integers(0, each, each), minlength=each) for _ in range(n_classes)]
        return np.stack(counts).astype(float)

    used = np.isfinite(s)
    filled = np.where(used, s, 0.0).reshape(*s.shape[:2], n_classes, each, n_classes, each)
    used = used.reshape(filled.shape).astype(float)
    out = np.empty((repeats, s.shape[1], n_classes, n_classes))
    for repeat in range(repeats):
        chosen = stream.integers(0, runs, runs)
        sources, targets = draw(), draw()
        with np.errstate(invalid="ignore", divide="ignore"):
            total = np.einsum("ai,rkaibj,bj->rkab", sources, filled, targets, optimize=True)
            count = np.einsum("ai,rkaibj,bj->rkab", sources, used, targets, optimize=True)
            out[repeat] = (total / count)[chosen].mean(0)
    return out


def interval(values: Any, axis: int = 0) -> tuple[Any, Any]:
    """The 95 % interval of resampled values."""
    low, high = np.nanpercentile(values, [2.5, 97.5], axis=axis)
    return low, high
