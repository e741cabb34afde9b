"""A run as it is read: an ``xarray.Dataset`` in memory or in a zarr store."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from local_elasticity.base import chunks
from local_elasticity.base.checks import check_path
from local_elasticity.base.drawing import drawn
from local_elasticity.base.errors import InputError
from local_elasticity.base.files import told_of_disk
from local_elasticity.runs.folders import locate
from local_elasticity.similarity.definitions import s_rel_of
from local_elasticity.similarity.phases import phases_of

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

    from local_elasticity.similarity.phases import Phases

FORMAT_VERSION = 1


class Run:
    """A finished or unfinished run.

    Attributes:
        dataset: everything that was measured; dims as in the design: step, update, definition, classes, sources, …
        path: where it lies on disk, None for a run in memory.
    """

    def __init__(self, dataset: xr.Dataset, path: Path | None = None) -> None:
        self.dataset, self.path = dataset, path

    def __repr__(self) -> str:
        sizes = self.dataset.sizes
        return f"Run({sizes.get('step', 0)} snapshots, {sizes.get('update', 0)} updates, path={self.path})"

    @property
    def configuration(self) -> dict[str, Any]:
        """What the run was made with."""
        return json.loads(self.dataset.attrs.get("configuration", "{}"))

    @property
    def looked_at(self) -> list[int]:
        """The ``tracker.step()`` calls, from 0, after which it looked: ``le.at(run.looked_at)`` repeats them."""
        return [int(step) - 1 for step in self.dataset["step"].values if step > 0]

    def s_rel(self, definition: str = "kl", update: str | None = None, eps: float | None = None) -> xr.DataArray:
        """S_rel of every pair at every snapshot, evaluated now from the outputs that the run kept.

        Returns:
            (step, source, target), or (step, update, source, target) when there are several updates and none is named.

        Raises:
            InputError: for an unknown update or definition, or a run that did not keep its outputs or pairs.
        """
        import xarray as xr

        data = self._chosen(update)
        if "after" not in data:
            if "pairs" in data and definition in data["definition"].values and eps is None:
                return data["pairs"].sel(definition=definition)
            if not data.sizes.get("step", 0):
                raise InputError(
                    expected="a run with snapshots",
                    got="one without any",
                    do="look more often: schedule=le.every(n) with n at most the number of updates",
                )
            raise InputError(
                expected="a run that kept its outputs",
                got=f"a run without them, definitions {[str(name) for name in data['definition'].values]}",
                do="track with keep='outputs', or read the tables in run.dataset",
            )
        outputs: Any = data.attrs.get("outputs", "logits")
        several = "update" in data["after"].dims
        limits = [str(name) in data.attrs.get("limits", ()) for name in np.atleast_1d(data["update"].values)]
        steps = []
        for index in range(data.sizes["step"]):
            at = data.isel(step=index)
            after = at["after"].values if several else at["after"].values[None]
            own = at["source_after"].values if several else at["source_after"].values[None]
            ratios = [
                s_rel_of(
                    *(at["before"].values, a, at["source_before"].values, o, definition),
                    outputs=outputs,
                    eps=eps,
                    limit=limit,
                    independent=bool(data.attrs.get("independent", False)),
                )
                for a, o, limit in zip(after, own, limits, strict=True)
            ]
            steps.append(np.stack([np.asarray(ratio) for ratio in ratios])[slice(None) if several else 0])
        dims = ("step", "update", "source", "target") if several else ("step", "source", "target")
        coords = {name: data[name] for name in data.coords if set(data[name].dims) <= set(dims)}
        shape = tuple(data.sizes[dim] for dim in dims)
        values = np.stack(steps) if steps else np.empty(shape)
        return xr.DataArray(values, dims=dims, coords=coords, name="s_rel", attrs={"definition": definition})

    def _chosen(self, update: str | None) -> xr.Dataset:
        known = [str(name) for name in self.dataset["update"].values]
        if update is None:
            return self.dataset.isel(update=0) if len(known) == 1 else self.dataset
        if update not in known:
            raise InputError(expected=f"an update of this run: {known}", got=repr(update), do="name one of them")
        return self.dataset.sel(update=update)

    @property
    def collapse(self) -> xr.Dataset:
        """Neural collapse at every snapshot: nc1, nc2_equinorm, ... (step, layer); see ``local_elasticity.collapse``.

        Raises:
            InputError: for a run that was tracked without it.
        """
        names = [str(name) for name in self.dataset.data_vars if str(name).startswith(("nc1", "nc2", "nc3", "nc4"))]
        names = [name for name in names if "layer" in self.dataset[name].dims]
        if not names:
            raise InputError(
                expected="a run with neural collapse",
                got="one without",
                do="track with collapse_layers=(...) or --collapse LAYER",
            )
        return self.dataset[names].reset_coords(drop=True)

    def phases(
        self,
        definition: str = "he_su",
        update: str | None = None,
        *,
        over: str | None = None,
        time: str = "step",
        **options: Any,
    ) -> Phases:
        """The elastic and the inelastic phase of S_rel, or "none": see ``local_elasticity.similarity.phases``.

        Args:
            definition: name of the definition.
            update: name of the probe update; needed where there are several.
            over: "pairs", resampling sources and targets of one run, or "seeds", resampling the replicas of a run that
                has them; by default seeds where there are at least 5.
            time: coordinate of the snapshots to use as time: "step" (updates made), or "epoch".
            options: of ``find_phases``: ``flat``, ``confidence``, ``n_boot``, ``seed``.

        Raises:
            InputError: for a name the run does not have, or too few snapshots, pairs or replicas.
        """
        return phases_of(self, definition, update, over, time, options)

    def plot(self, definition: str | None = None, update: str | None = None) -> Figure:
        """S_rel over training for each class pair, as in the first paper's figures."""
        return drawn("figures.class_pair_curves", self.dataset, definition=definition, update=update)


def open_run(path: str | Path) -> Run:
    """Open a run: its ``run.zarr`` or the folder that holds it.

    Raises:
        InputError: when there is nothing, or something that is not a run; for a run of a newer format, or one with
            damaged metadata or missing chunks. A chunk that is damaged is refused when it is read.
    """
    there = check_path("path", path)
    with told_of_disk(there):
        place = locate(there)
        if place is None:
            raise InputError(
                expected="a run: a folder with run.zarr in it, or run.zarr itself",
                got=f"{_what_is_at(there)} at {path}",
                do="pass the --out of 'local-elasticity track' or the store of a Tracker",
            )
    return Run(open_checked(place), place)


def open_checked(place: Path, rows: Callable[[dict[str, Any]], Mapping[str, int]] | None = None) -> xr.Dataset:
    """A store of ours as a dataset that is read when it is asked for, every chunk checked.

    Args:
        place: a zarr store with consolidated metadata.
        rows: metadata of the arrays -> how many rows of each were written; all by default.

    Raises:
        InputError: for a newer format, damaged metadata, a missing or damaged chunk.
    """
    document = chunks.read_document(place)
    chunks.check_version(document["attributes"].get("format_version", 1), FORMAT_VERSION, str(place))
    written = rows(chunks.arrays_of(place, document)) if rows is not None else None
    chunks.check_chunks(place, document, written)
    with quiet():
        return chunks.open_dataset(place, consolidated=True)


def _what_is_at(path: Path) -> str:
    for place in (path, path / "run.zarr"):
        try:
            json.loads((place / "zarr.json").read_text())
        except OSError:
            continue
        except ValueError:
            return "something that is not a run, or one whose zarr.json is damaged,"
    return "something that is not a run" if path.exists() else "nothing"


@contextmanager
def quiet() -> Iterator[None]:
    """Silence zarr's notes on text arrays and consolidated metadata: both are deliberate here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Cc]onsolidated metadata.*")
        warnings.filterwarnings("ignore", message=".*does not have a Zarr V3 specification.*")
        yield
