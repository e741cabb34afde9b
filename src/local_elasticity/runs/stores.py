"""The run as it is written: an ``xarray.Dataset`` in zarr, appended so that whatever was announced survives a kill.

A snapshot is committed by one atomic replacement of the group's metadata: until then readers see the run without it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from local_elasticity.base import chunks
from local_elasticity.base.errors import InputError
from local_elasticity.base.files import discard, leftover_of, told_of_disk, write_whole
from local_elasticity.base.locks import Lock
from local_elasticity.runs.folders import FORMAT
from local_elasticity.runs.run import FORMAT_VERSION, Run, open_run, quiet

OUTPUTS = {
    "before": ("step", "target", "output"),
    "after": ("step", "update", "source", "target", "output"),
    "source_before": ("step", "source", "output"),
    "source_after": ("step", "update", "source", "output"),
}
SMALL_CHUNK = 64  # snapshots in one chunk of the small variables

Snapshot = dict[str, tuple[tuple[str, ...], Any]]


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

        steps: Any = zarr.open_group(chunks.CheckedStore(self.path), mode="r", use_consolidated=True)["step"]
        return [int(step) for step in steps[:]]

    def _attach(self) -> None:
        """Open the arrays as they were committed, whatever an interrupted write made of them."""
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
