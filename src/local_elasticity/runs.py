"""The run on disk: an ``xarray.Dataset`` in zarr, appended so that whatever was announced survives a kill.

A snapshot is committed by one atomic replacement of the group's metadata: until then readers see the run without it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from local_elasticity.base.checks import check_path
from local_elasticity.base.files import discard, leftover_of, told_of_disk, write_whole
from local_elasticity.base.locks import Lock
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
RUN, ENSEMBLE = "run.zarr", "ensemble.zarr"
ENSEMBLE_NOTE, ENSEMBLE_FORMAT = "ensemble.json", "local-elasticity ensemble"
NOTES = {  # in a folder in which nothing was run yet
    *("config.json", "config.partial", ".config.json.partial"),
    *(STUDY_NOTE, f"{STUDY_NOTE}.partial", f".{STUDY_NOTE}.partial"),
    *(f".{RUN}.partial", f".{ENSEMBLE}.partial", f".{ENSEMBLE_NOTE}.partial"),
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
    from local_elasticity.base import chunks

    document = chunks.read_document(place)
    chunks.check_version(document["attributes"].get("format_version", 1), FORMAT_VERSION, str(place))
    written = rows(chunks.arrays_of(place, document)) if rows is not None else None
    chunks.check_chunks(place, document, written)
    with quiet():
        return chunks.open_dataset(place, consolidated=True)


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

    def close(self) -> None:
        """As of ``ZarrStore``; there is nothing to let go."""

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
    """Appends snapshots to a zarr group; see the module's first lines for why a kill cannot hurt.

    One store writes at a time: it has the lock from ``hold``, or its first write, to ``close``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = Lock(path, takes_over=True)
        self.columns: dict[str, Any] | None = None  # None also after a write that failed: they are then read again
        self._steps: list[int] = []
        self._text = ""  # of the metadata, as committed

    def hold(self) -> None:
        """Keep other writers away.

        Raises:
            InputError: when there is one.
        """
        self.lock.acquire()

    def close(self) -> None:
        """Let others write; a later write of this store asks for the lock again."""
        self.lock.release()

    def create(self, static: Snapshot, attributes: Mapping[str, Any]) -> None:
        """Start a run in an empty place, or in one that holds a run whose making was interrupted."""
        import zarr

        from local_elasticity.base import chunks

        self.hold()
        with quiet(), told_of_disk(self.path):
            # Built beside its place and moved there whole, so that a kill leaves either nothing or a run.
            discard(self.path)
            building = leftover_of(self.path)
            building.parent.mkdir(parents=True, exist_ok=True)
            group = zarr.open_group(building, mode="w", zarr_format=3)
            for name, (dims, values) in static.items():
                dtype = str if values.dtype.kind in "UO" else values.dtype
                array = chunks.create_array(group, name, shape=values.shape, dtype=dtype, dimension_names=dims)
                array[...] = values.astype(object) if dtype is str else values
            chunks.Column.create(building, "step", np.zeros((), np.int64), (), 0, SMALL_CHUNK)
            group.update_attributes(
                {"format": FORMAT, "format_version": FORMAT_VERSION, **chunks.SEALED, **_plain(attributes)}
            )
            zarr.consolidate_metadata(group.store)
            building.rename(self.path)
            self._steps = []
            self._attach()

    def resume(self, until: int | None = None) -> None:
        """Open what is there, and drop what was being written when the last process was killed.

        Snapshots after step ``until`` go too, once there is one that replaces them or the run is finished.
        """
        from local_elasticity.base import chunks

        self.hold()
        with quiet(), told_of_disk(self.path):
            document = chunks.read_document(self.path)
            chunks.check_version(document["attributes"].get("format_version", 1), FORMAT_VERSION, str(self.path))
            chunks.check_chunks(self.path, document)
            self._attach()
            committed = self._committed_steps()
        self._steps = [step for step in committed if until is None or step <= until]

    def _committed_steps(self) -> list[int]:
        import zarr

        from local_elasticity.base import chunks

        steps: Any = zarr.open_group(chunks.CheckedStore(self.path), mode="r", use_consolidated=True)["step"]
        return [int(step) for step in steps[:]]

    def _attach(self) -> None:
        """Open the arrays as they were committed, whatever an interrupted write made of them."""
        from local_elasticity.base import chunks

        self._text = (self.path / "zarr.json").read_text()
        document = json.loads(self._text)
        arrays = chunks.arrays_of(self.path, document)
        for place in [place for place in self.path.iterdir() if place.is_dir() and place.name not in arrays]:
            discard(place)
        chunks.mend_metadata(self.path, document)
        self.columns = {
            name: chunks.Column(self.path, name, meta)
            for name, meta in arrays.items()
            if (meta.get("dimension_names") or ("",))[0] == "step"
        }

    @property
    def steps(self) -> list[int]:
        """Updates made at each snapshot."""
        return self._steps

    def append(self, step: int, snapshot: Snapshot, attributes: Mapping[str, Any]) -> None:
        """Add a snapshot and commit it; those at this step or later are replaced."""
        with self._writing() as columns:
            kept = [s for s in self._steps if s < step]
            self._shorten_to(kept)
            rows: Snapshot = {"step": ((), np.asarray(step, dtype=np.int64)), **snapshot}
            for name, (dims, values) in rows.items():
                self._write(name, dims, np.asarray(values), len(kept))
            for name in columns.keys() - rows.keys():
                columns[name].write(len(kept), None)
            self._commit(len(kept) + 1, attributes)
            self._steps = [*kept, step]

    def drop_replaced(self) -> None:
        """Drop what lies on disk beyond the snapshots that count."""
        with self._writing():
            self._shorten_to(self._steps)

    def _shorten_to(self, steps: list[int]) -> None:
        if self._length > len(steps):
            self._commit(len(steps))  # first for readers: chunks of what they see are never removed
            self._steps = steps
            for column in (self.columns or {}).values():
                column.shorten(len(steps))

    @property
    def _length(self) -> int:
        """Snapshots that readers see."""
        return json.loads(self._text)["consolidated_metadata"]["metadata"]["step"]["shape"][0]

    @contextmanager
    def _writing(self) -> Iterator[dict[str, Any]]:
        """A write that, when it fails, leaves what was committed, and the store ready for the next."""
        self.hold()
        with quiet(), told_of_disk(self.path):
            place = self.path / "zarr.json"
            if not place.is_file() or place.read_text() != self._text:
                raise InputError(
                    expected=f"{self.path} as this Tracker left it",
                    got="one that was written, moved or removed by something else meanwhile",
                    do="start again: a new Tracker with resume=True continues what is there",
                )
            if self.columns is None:
                self._attach()
                committed = set(self._committed_steps())
                self._steps = [step for step in self._steps if step in committed]
            assert self.columns is not None
            try:
                yield self.columns
            except BaseException:
                self.columns = None
                raise

    def _write(self, name: str, dims: tuple[str, ...], values: np.ndarray, index: int) -> None:
        from local_elasticity.base import chunks

        assert self.columns is not None
        if name not in self.columns:
            # Outputs lie one snapshot a chunk; small variables share one, rewritten whole and atomically.
            chunk = 1 if name in OUTPUTS or name == "pairs" else SMALL_CHUNK
            self.columns[name] = chunks.Column.create(self.path, name, values, dims, index, chunk)
        self.columns[name].write(index, values)

    def _commit(self, length: int, attributes: Mapping[str, Any] | None = None) -> None:
        """One replacement of one file: so many snapshots, and the attributes that go with them."""
        document = json.loads(self._text)
        arrays = document["consolidated_metadata"]["metadata"]
        for name in self.columns or {}:
            meta = arrays[name] if name in arrays else _read_json(self.path / name / "zarr.json")
            arrays[name] = {**meta, "shape": [length, *meta["shape"][1:]]}
        document["attributes"] |= _plain(attributes or {})
        text = json.dumps(document)
        write_whole(self.path / "zarr.json", text)
        self._text = text

    def set_attributes(self, attributes: Mapping[str, Any]) -> None:
        """Change attributes of the run."""
        with self._writing():
            self._commit(self._length, attributes)
            self._attach()  # also for readers of each array's own metadata

    def open(self) -> Run:
        """The run as it is on disk."""
        return open_run(self.path)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError:
        return None


def _plain(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(dict(attributes), default=lambda number: number.item()))


def prepare_folder(out: Path, configuration: dict[str, Any], overwrite: bool) -> bool:
    """Make the folder of a run or a study and note its configuration; True when it holds a part of the same run.

    Raises:
        InputError: when the folder holds something else, or a run with another configuration.
    """
    note = out / "config.json"
    with told_of_disk(out):
        if out.exists() and not out.is_dir():
            raise InputError(expected="a folder for the run", got=f"a file, {out}", do="choose another --out")
        stored = _stored_configuration(note)
        ours = is_ours(out)
        if out.exists() and not ours and not holds_notes_only(out):
            raise InputError(
                expected="an empty folder, or one that a run or a study made",
                got=f"something else in {out}",
                do="choose another --out, or empty it yourself",
            )
        if overwrite and ours:
            clear_folder(out)
            stored = None
        elif ours and holds_notes_only(out):
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
    write_whole(note, json.dumps(now, indent=2))
    return locate(out) is not None


def clear_folder(out: Path) -> None:
    """Empty a folder of a run or a study of ours; killed in the middle, it is still known as ours.

    Raises:
        InputError: when something is writing there.
    """
    note = out / "config.json"
    with Lock(out / RUN), Lock(out / ENSEMBLE), told_of_disk(out):
        if (_stored_configuration(note) or {}).get("made_by") != MADE_BY:
            write_whole(note, json.dumps({"made_by": MADE_BY}))
        first = (RUN, ENSEMBLE_NOTE)  # without these it is no run any more
        for path in sorted(out.iterdir(), key=lambda path: path.name not in first):
            if path != note and path.suffix != ".lock":
                discard(path)


def holds_notes_only(out: Path) -> bool:
    """Whether a folder has nothing but what is written before a run, and what a kill in its making leaves."""
    names = {path.name for path in out.iterdir()} - NOTES
    return all(name.endswith(".lock") and name.startswith(".") for name in names)


def is_ours(out: Path) -> bool:
    """Whether this folder was made by a run or a study of ours."""
    stored = _stored_configuration(out / "config.json")
    made = (stored is not None and stored.get("made_by") == MADE_BY) or locate(out) is not None
    return made or (_stored_configuration(out / ENSEMBLE_NOTE) or {}).get("format") == ENSEMBLE_FORMAT


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
