"""The run on disk: an ``xarray.Dataset`` in zarr, appended so that whatever was announced survives a kill.

A snapshot is committed by one atomic replacement of the group's metadata: until then readers see the run without it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from local_elasticity.base.checks import check_path
from local_elasticity.base.locks import StoreLock, lock_name
from local_elasticity.errors import InputError
from local_elasticity.similarity import s_rel_of

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

    from local_elasticity.phases import Phases

FORMAT = "local-elasticity run"
FORMAT_VERSION = 1
MADE_BY = "local-elasticity"  # marks a config.json as ours: folders without it are never emptied
STUDY_NOTE = "study.json"  # what `reproduce` writes into a study's folder
OUTPUTS = {
    "before": ("step", "target", "output"),
    "after": ("step", "update", "source", "target", "output"),
    "source_before": ("step", "source", "output"),
    "source_after": ("step", "update", "source", "output"),
}
SMALL_CHUNK = 64  # snapshots in one chunk of the small variables

Snapshot = dict[str, tuple[tuple[str, ...], Any]]


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
            raise InputError(
                expected="a run that kept its outputs",
                got=f"a run without them, definitions {list(data['definition'].values)}",
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
        """The elastic and the inelastic phase of S_rel, or "none": see ``local_elasticity.phases``.

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
        from local_elasticity.phases import phases_of

        return phases_of(self, definition, update, over, time, options)

    def plot(self, definition: str | None = None, update: str | None = None) -> Figure:
        """S_rel over training for each class pair, as in the first paper's figures."""
        from local_elasticity.report.figures import class_pair_curves

        return class_pair_curves(self.dataset, definition=definition, update=update)


def open_run(path: str | Path) -> Run:
    """Open a run: its ``run.zarr`` or the folder that holds it.

    Raises:
        InputError: when there is nothing, or something that is not a run.
    """
    import xarray as xr

    path = check_path("path", path)
    place = locate(path)
    if place is None:
        what = "nothing" if not Path(path).exists() else "something that is not a run"
        raise InputError(
            expected="a run: a folder with run.zarr in it, or run.zarr itself",
            got=f"{what} at {path}",
            do="pass the --out of 'local-elasticity track' or the store of a Tracker",
        )
    with quiet():
        dataset = xr.open_zarr(place, consolidated=True)
    return Run(dataset, place)


def locate(path: str | Path) -> Path | None:
    """The zarr store of a run at this path, or None."""
    path = Path(path)
    for place in (path, path / "run.zarr"):
        try:
            attributes = json.loads((place / "zarr.json").read_text())["attributes"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if isinstance(attributes, dict) and attributes.get("format") == FORMAT:
            return place
    return None


@contextmanager
def quiet() -> Iterator[None]:
    """Silence zarr's notes on text arrays and consolidated metadata: both are deliberate here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Cc]onsolidated metadata.*")
        warnings.filterwarnings("ignore", message=".*does not have a Zarr V3 specification.*")
        yield


class MemoryStore:
    """Keeps snapshots in memory; the twin of ``ZarrStore`` for runs without a path."""

    def __init__(self) -> None:
        self.snapshots: list[tuple[int, Snapshot]] = []
        self.static: Snapshot = {}
        self.attributes: dict[str, Any] = {}

    def create(self, static: Snapshot, attributes: Mapping[str, Any]) -> None:
        """Start a run with its coordinates and attributes."""
        self.static, self.attributes = dict(static), dict(attributes)

    @property
    def steps(self) -> list[int]:
        """Updates made at each snapshot."""
        return [step for step, _ in self.snapshots]

    def append(self, step: int, snapshot: Snapshot, attributes: Mapping[str, Any]) -> None:
        """Add a snapshot; those at this step or later are replaced."""
        self.snapshots = [(s, kept) for s, kept in self.snapshots if s < step]
        self.snapshots.append((step, snapshot))
        self.attributes.update(attributes)

    def set_attributes(self, attributes: Mapping[str, Any]) -> None:
        """Change attributes of the run."""
        self.attributes.update(attributes)

    def open(self) -> Run:
        """The run as a dataset."""
        import xarray as xr

        names = dict.fromkeys(name for _, snapshot in self.snapshots for name in snapshot)
        variables: dict[str, Any] = {}
        for name in names:
            dims, example = next(snapshot[name] for _, snapshot in self.snapshots if name in snapshot)
            missing = np.full(example.shape, np.nan if example.dtype.kind == "f" else 0, dtype=example.dtype)
            rows = [snapshot[name][1] if name in snapshot else missing for _, snapshot in self.snapshots]
            variables[name] = (("step", *dims), np.stack(rows))
        coords = {name: value for name, value in self.static.items()}
        coords["step"] = (("step",), np.array(self.steps, dtype=np.int64))
        return Run(xr.Dataset(variables, coords=coords, attrs=self.attributes))


class ZarrStore:
    """Appends snapshots to a zarr group; see the module's first lines for why a kill cannot hurt."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.group: Any = None
        self.arrays: dict[str, Any] = {}
        self._steps: list[int] = []
        self._lock: StoreLock | None = None

    def lock(self) -> None:
        """Be the one that writes here, from now on.

        Raises:
            InputError: when another process is.
        """
        self._lock = StoreLock(self.path)

    def release(self) -> None:
        """Let others write."""
        if self._lock is not None:
            self._lock.release()

    def _check_lock(self) -> None:
        if self._lock is not None:
            self._lock.check()

    def create(self, static: Snapshot, attributes: Mapping[str, Any]) -> None:
        """Start a run in an empty place."""
        import zarr

        self._check_lock()
        with quiet():
            # Built beside its place and moved there whole, so that a kill leaves either nothing or a run.
            building = self.path.with_name(f".{self.path.name}.partial")
            shutil.rmtree(building, ignore_errors=True)
            building.parent.mkdir(parents=True, exist_ok=True)
            group = zarr.open_group(building, mode="w", zarr_format=3)
            for name, (dims, values) in static.items():
                dtype = str if values.dtype.kind in "UO" else values.dtype
                array = group.create_array(name, shape=values.shape, dtype=dtype, dimension_names=dims)
                array[...] = values.astype(object) if dtype is str else values
            steps = group.create_array(
                "step", shape=(0,), chunks=(SMALL_CHUNK,), dtype=np.int64, dimension_names=("step",)
            )
            del steps
            group.update_attributes({"format": FORMAT, "format_version": FORMAT_VERSION, **attributes})
            zarr.consolidate_metadata(group.store)
            building.rename(self.path)
        self._attach()

    def resume(self, until: int | None = None) -> None:
        """Open what is there, and drop what was being written when the last process was killed.

        Snapshots after step ``until`` go too, once there is one that replaces them or the run is finished.
        """
        import xarray as xr

        with quiet():
            committed = xr.open_zarr(self.path, consolidated=True)
            kept = [int(step) for step in committed["step"].values]
            names = set(committed.variables)
            committed.close()
        self._attach()
        for name in set(self.arrays) - names:
            del self.group[name], self.arrays[name]
        self._shorten(len(kept))
        self._steps = [step for step in kept if until is None or step <= until]

    def _attach(self) -> None:
        import zarr

        with quiet():
            self.group = zarr.open_group(self.path, mode="r+", use_consolidated=False)
            self.arrays = {
                name: array
                for name, array in self.group.arrays()
                if (array.metadata.dimension_names or ("",))[0] == "step"
            }

    def _shorten(self, length: int) -> None:
        for array in self.arrays.values():
            if array.shape[0] > length:
                array.resize((length, *array.shape[1:]))

    @property
    def steps(self) -> list[int]:
        """Updates made at each snapshot."""
        return self._steps

    def append(self, step: int, snapshot: Snapshot, attributes: Mapping[str, Any]) -> None:
        """Add a snapshot and commit it; those at this step or later are replaced."""
        self._check_lock()
        with quiet():
            kept = self._steps = [s for s in self._steps if s < step]
            self.drop_replaced()
            index = len(kept)
            self._write("step", (), np.asarray(step, dtype=np.int64), index)
            for name, (dims, values) in snapshot.items():
                self._write(name, dims, np.asarray(values), index)
            for array in self.arrays.values():
                if array.shape[0] < index + 1:
                    array.resize((index + 1, *array.shape[1:]))
                    array[index] = array.fill_value  # a chunk may still hold what lay here before it was shortened
            if any(self.group.attrs.get(key) != value for key, value in attributes.items()):
                self._update_attributes(attributes)
            self._commit()
            self._steps = [*kept, step]

    def drop_replaced(self) -> None:
        """Drop what lies on disk beyond the snapshots that count."""
        with quiet():
            if self.arrays["step"].shape[0] > len(self._steps):
                self._shorten(len(self._steps))
                self._commit()

    def _write(self, name: str, dims: tuple[str, ...], values: np.ndarray, index: int) -> None:
        array = self.arrays.get(name)
        if array is None:
            # Outputs lie one snapshot a chunk; small variables share one, rewritten whole and atomically.
            chunk = 1 if name in OUTPUTS or name == "pairs" else SMALL_CHUNK
            fill = np.nan if values.dtype.kind == "f" else values.dtype.type(0)
            array = self.arrays[name] = self.group.create_array(
                name,
                shape=(index, *values.shape),
                chunks=(chunk, *(max(1, size) for size in values.shape)),
                dtype=values.dtype,
                fill_value=fill,
                dimension_names=("step", *dims),
            )
        array.resize((index + 1, *array.shape[1:]))
        array[index] = values

    def _update_attributes(self, attributes: Mapping[str, Any]) -> None:
        # Attributes go into the same file as the consolidated metadata, which must never be seen without it.
        import zarr

        current = zarr.open_group(self.path, mode="r+", use_consolidated=True)
        current.update_attributes(dict(attributes))

    def _commit(self) -> None:
        import zarr

        zarr.consolidate_metadata(self.group.store)

    def set_attributes(self, attributes: Mapping[str, Any]) -> None:
        """Change attributes of the run."""
        self._check_lock()
        with quiet():
            self._update_attributes(attributes)
            self._commit()

    def open(self) -> Run:
        """The run as it is on disk."""
        return open_run(self.path)


def prepare_folder(out: Path, configuration: dict[str, Any], overwrite: bool) -> bool:
    """Make the folder of a run or a study and note its configuration; True when it holds a part of the same run.

    Raises:
        InputError: when the folder holds something else, or a run with another configuration.
    """
    note = out / "config.json"
    if out.exists() and not out.is_dir():
        raise InputError(expected="a folder for the run", got=f"a file, {out}", do="choose another --out")
    partial = note.with_suffix(".partial")
    stored = _stored_configuration(note)
    ours = locate(out) is not None or (stored is not None and stored.get("made_by") == MADE_BY)
    made_first = ("run.zarr", "ensemble.zarr")
    notes = (note, partial, out / STUDY_NOTE, out / f"{STUDY_NOTE}.partial")
    notes += tuple(out / lock_name(Path(name)) for name in made_first)
    notes += tuple(out / f".{name}.partial" for name in made_first)  # what was being made when a run was killed
    if out.exists() and not ours and any(path not in notes for path in out.iterdir()):
        raise InputError(
            expected="an empty folder, or one that a run or a study made",
            got=f"something else in {out}",
            do="choose another --out, or empty it yourself",
        )
    if overwrite and ours:
        shutil.rmtree(out)
        stored = None
    elif ours and all(path in notes for path in out.iterdir()):
        stored = None  # a run that failed before it wrote anything may be tried again with other settings
    out.mkdir(parents=True, exist_ok=True)
    now = json.loads(json.dumps({"made_by": MADE_BY, **configuration}, default=str))
    if stored is not None and stored != now:
        differing = [key for key in {**stored, **now} if stored.get(key) != now.get(key)]
        raise InputError(
            expected=f"the settings of the run in {out}",
            got="others for " + ", ".join(f"{k} ({stored.get(k)} there, {now.get(k)} now)" for k in differing),
            do="choose another --out, or --overwrite",
        )
    partial.write_text(json.dumps(now, indent=2))
    partial.replace(note)
    return locate(out) is not None


def is_ours(out: Path) -> bool:
    """Whether this folder was made by a run or a study of ours."""
    stored = _stored_configuration(out / "config.json")
    return locate(out) is not None or (stored is not None and stored.get("made_by") == MADE_BY)


def _stored_configuration(note: Path) -> dict[str, Any] | None:
    try:
        stored = json.loads(note.read_text())
    except (OSError, ValueError):
        return None
    return stored if isinstance(stored, dict) else None


def versions() -> dict[str, str]:
    """Versions that decide numbers."""
    found = {"python": sys.version.split()[0]}
    for package in ("local-elasticity", "torch", "numpy", "xarray", "zarr"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def git_revision() -> str:
    """The revision of the working directory, with "+changes" when it is not clean; empty outside a repository."""
    try:
        revision = subprocess.run(
            ["git", "describe", "--always", "--dirty=+changes", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return revision.stdout.strip()
