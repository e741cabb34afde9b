"""An ensemble on disk: its log as zarr arrays, its state as a checkpoint, what is committed as one small file.

The log is written first, then the checkpoint, then ``progress.json``; each is replaced whole. A kill leaves the state
of the last checkpoint, from which training goes on to the same numbers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from local_elasticity.base.checkpoints import read_checkpoint, write_checkpoint
from local_elasticity.base.checks import check_path
from local_elasticity.base.files import discard, leftover_of, told_of_disk, write_whole
from local_elasticity.base.locks import Lock
from local_elasticity.errors import InputError
from local_elasticity.runs import (
    ENSEMBLE,
    ENSEMBLE_FORMAT,
    ENSEMBLE_NOTE,
    FORMAT_VERSION,
    NOTES,
    clear_folder,
    git_revision,
    open_checked,
    quiet,
    versions,
)

if TYPE_CHECKING:
    import xarray as xr

    from local_elasticity.training.ensemble import Ensemble
    from local_elasticity.training.lockstep import Route

FORMAT, ARRAYS, NOTE, PROGRESS = ENSEMBLE_FORMAT, ENSEMBLE, ENSEMBLE_NOTE, "progress.json"
CHECKPOINT = "checkpoint/state.pt"  # where progress.json does not name another
BLOCK = 256  # steps between writes, and in a chunk on disk
LOOKS = ("validation_step", "probe_step")
PER_STEP = ("logits", "losses", "samples", "labels")


class EnsembleStore:
    """Writes an ensemble's folder.

    Args:
        folder: where.
        resumed: whether it continues an earlier part.
    """

    def __init__(self, folder: Path, resumed: bool) -> None:
        self.folder, self.resumed = folder, resumed
        self.written = 0
        self.lock = Lock(folder / ARRAYS)

    @classmethod
    def open(
        cls,
        store: str | Path | None,
        resume: bool,
        settings: dict[str, Any],
        ensemble: Ensemble,
        routes: Sequence[Route],
    ) -> EnsembleStore | None:
        """Create a folder, or fill the ensemble with what is in it.

        Raises:
            InputError: when the place holds something else, a run where none was expected, or another configuration.
        """
        if store is None:
            if resume:
                raise InputError(expected="a store to resume", got="store=None", do="pass the folder of the run")
            return None
        folder = Path(store)
        with told_of_disk(folder):
            recording = cls(folder, is_ensemble(folder))
            if not recording.resumed and folder.exists() and not _is_free(folder):
                raise InputError(
                    expected="an empty folder or an ensemble", got=f"something else at {folder}", do="choose another"
                )
            if recording.resumed and not resume:
                raise InputError(
                    expected="a new folder", got=f"an ensemble at {folder}", do="pass resume=True, or another folder"
                )
            recording.lock.acquire()
            try:
                recording._begin(settings, ensemble, routes)
            except BaseException:
                recording.close()
                raise
        return recording

    def close(self) -> None:
        """Let others write."""
        self.lock.release()

    def _begin(self, settings: dict[str, Any], ensemble: Ensemble, routes: Sequence[Route]) -> None:
        if not self.resumed:
            self._create(settings, ensemble)
            return
        _compare(_note(self.folder)["settings"], json.loads(json.dumps(settings, default=str)), self.folder)
        self._restore(ensemble, routes)

    def _create(self, settings: dict[str, Any], ensemble: Ensemble) -> None:
        import zarr

        from local_elasticity.base import chunks

        # Built beside its place and moved there whole; it is an ensemble once the note is there.
        discard(self.folder / ARRAYS)
        building = leftover_of(self.folder / ARRAYS)
        dataset = as_dataset(ensemble.log, ensemble.times, ensemble.replicas, ensemble.layers, ensemble.diverged, 0)
        with quiet():
            group = zarr.open_group(building, mode="w", zarr_format=3)
            group.update_attributes({**dataset.attrs, "format_version": FORMAT_VERSION, **chunks.SEALED})
            for name, variable in dataset.variables.items():
                values, dims = np.asarray(variable.values), [str(dim) for dim in variable.dims]
                if name in ensemble.log:  # rows that were not reached take no room
                    chunks.create_array(
                        group,
                        str(name),
                        shape=values.shape,
                        chunks=(min(BLOCK, len(values)), *values.shape[1:]),
                        dtype=values.dtype,
                        fill_value=np.nan if values.dtype.kind == "f" else -1,
                        dimension_names=dims,
                    )
                else:
                    dtype: Any = str if values.dtype.kind in "UO" else values.dtype
                    array = chunks.create_array(group, str(name), shape=values.shape, dtype=dtype, dimension_names=dims)
                    array[...] = values
            zarr.consolidate_metadata(group.store)
        building.rename(self.folder / ARRAYS)
        note = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "settings": settings,
            "threads": ensemble.plan.threads,
            "versions": versions(),
            "git_revision": git_revision(),
        }
        write_whole(self.folder / NOTE, json.dumps(note, indent=1, default=str))

    def _restore(self, ensemble: Ensemble, routes: Sequence[Route]) -> None:
        progress = _progress(self.folder)
        path = self.folder / progress.get("checkpoint", CHECKPOINT)
        if not path.exists() and not progress["step"]:
            return
        again = "train again with --overwrite, or in another folder"
        device = next(iter(ensemble.weights.values())).device
        state = read_checkpoint(path, progress.get("sha256"), device=device, do=again)
        try:
            step = int(state["step"])
            for kind in ("weights", "buffers"):
                for name, value in getattr(ensemble, kind).items():
                    value.copy_(state[kind][name])
            ensemble.diverged[:] = state["diverged"].cpu().numpy()
            for route, part in zip(routes, state["routes"], strict=True):
                route.load(part, step)
        except (KeyError, ValueError, TypeError, RuntimeError, AttributeError) as error:
            raise InputError(
                expected="the checkpoint of this ensemble",
                got=f"{path}, which holds something else ({type(error).__name__})",
                do=again,
            ) from error
        ensemble.step = self.written = step
        stored = open_checked(self.folder / ARRAYS, lambda arrays: self._written(arrays, ensemble))
        with stored:
            for name, values in ensemble.log.items():
                rows = self._rows(name, ensemble, ensemble.step)
                values[rows] = stored[name][rows].values

    def _written(self, arrays: Mapping[str, Any], ensemble: Ensemble) -> dict[str, int]:
        return {name: self._rows(name, ensemble, ensemble.step).stop for name in arrays if name in ensemble.log}

    def save(self, ensemble: Ensemble, routes: Sequence[Route]) -> None:
        """Write what is new of the log, then the state, then that they are there.

        Raises:
            InputError: for a disk that is full, or a folder that cannot be written or is gone.
        """
        from local_elasticity.base import chunks

        with told_of_disk(self.folder), quiet():
            arrays = chunks.open_arrays(self.folder / ARRAYS, [*ensemble.log, "diverged"])
            for name, values in ensemble.log.items():
                rows = self._rows(name, ensemble, ensemble.step)
                if name in PER_STEP:
                    rows = slice(self.written, ensemble.step)
                arrays[name][rows] = values[rows]
            arrays["diverged"][:] = ensemble.diverged
        state = {
            "step": ensemble.step,
            "weights": ensemble.weights,
            "buffers": ensemble.buffers,
            "diverged": torch.from_numpy(ensemble.diverged),
            "routes": [route.state() for route in routes],
        }
        # A name of its own: until the progress is written, the state before is the one that counts.
        name = f"checkpoint/state-{ensemble.step:09d}.pt"
        digest = write_checkpoint(self.folder / name, state)
        progress = {"step": ensemble.step, "steps": ensemble.steps, "checkpoint": name, "sha256": digest}
        write_whole(self.folder / PROGRESS, json.dumps(progress))
        self.written = ensemble.step
        for old in (self.folder / name).parent.glob("state*.pt"):
            if old.name != Path(name).name:
                discard(old)

    @staticmethod
    def _rows(name: str, ensemble: Ensemble, step: int) -> slice:
        if name in PER_STEP:
            return slice(0, step)
        times = ensemble.times["validation" if name.startswith("validation") else "probe"]
        return slice(0, int((times <= step).sum()))


def is_ensemble(path: str | Path) -> bool:
    """Whether the folder of an ensemble is at this path."""
    stored = _read(Path(path) / NOTE)
    return stored is not None and stored.get("format") == FORMAT


def overwrite_ensemble(path: str | Path) -> None:
    """Empty the folder of an ensemble; anything else stays.

    Raises:
        InputError: when something is writing there.
    """
    if is_ensemble(path):
        clear_folder(Path(path))


def open_ensemble(path: str | Path) -> xr.Dataset:
    """The log of an ensemble on disk, as far as it is committed.

    Returns:
        logits (step, replica, output), labels, samples, losses (step, replica); what was asked for of
        validation_loss (validation_step, replica), probe_mean, probe_variance (probe_step, replica, class, output) and
        the collapse metrics (probe_step, replica, layer). ``step`` counts the updates made before each row.

    Raises:
        InputError: when it is not an ensemble, or one of a newer format, or with chunks that are missing. A chunk that
            is damaged is refused when it is read.
    """
    folder = check_path("path", path)
    with told_of_disk(folder):
        if not is_ensemble(folder):
            what = "something else" if folder.exists() else "nothing"
            raise InputError(
                expected="the folder of an ensemble",
                got=f"{what} at {path}",
                do="pass the --out of local-elasticity train",
            )
        note, done = _note(folder), _progress(folder)["step"]
    data = open_checked(folder / ARRAYS, lambda arrays: _committed(folder, arrays, done))
    keep = {"step": slice(0, done)} if "step" in data.dims else {}
    for name in LOOKS:
        if name in data.dims:
            keep[name] = slice(0, int((data[name].values <= done).sum()) if done else 0)
    return data.isel(keep).assign_attrs(settings=json.dumps(note.get("settings")), updates=done)


def _committed(folder: Path, arrays: Mapping[str, Mapping[str, Any]], done: int) -> dict[str, int]:
    """How many rows of each array were written."""
    import zarr

    from local_elasticity.base import chunks

    group, rows = zarr.open_group(chunks.CheckedStore(folder / ARRAYS), mode="r"), {}
    for name, meta in arrays.items():
        first = (meta.get("dimension_names") or [""])[0] if name not in ("step", *LOOKS) else ""
        if first in LOOKS:
            times: Any = group[first]
            rows[name] = int((times[:] <= done).sum()) if done else 0
        elif first == "step":
            rows[name] = done
    return rows


def _note(folder: Path) -> dict[str, Any]:
    """What an ensemble is.

    Raises:
        InputError: for one of a newer format, or a note that is damaged.
    """
    from local_elasticity.base import chunks

    note = _read(folder / NOTE) or {}
    chunks.check_version(note.get("format_version", 1), FORMAT_VERSION, str(folder))
    if not isinstance(note.get("settings"), dict):
        raise _damaged(folder / NOTE)
    return note


def _progress(folder: Path) -> dict[str, Any]:
    """How far an ensemble is.

    Raises:
        InputError: when the file is there, but damaged.
    """
    path = folder / PROGRESS
    progress = _read(path)
    if progress is None and not path.exists():
        return {"step": 0}
    step = (progress or {}).get("step")
    if progress is None or not isinstance(step, int) or step < 0:
        raise _damaged(path)
    return progress


def _damaged(path: Path) -> InputError:
    return InputError(
        expected=f"{path} as it was written", got="a damaged file", do="restore it from a copy, or train again"
    )


def _is_free(folder: Path) -> bool:
    """Whether a folder holds nothing, or only what a kill in the making of an ensemble leaves."""
    if not folder.is_dir():
        return False
    begun = {ARRAYS, Path(NOTE).with_suffix(".partial").name} | NOTES
    attributes = (_read(folder / ARRAYS / "zarr.json") or {}).get("attributes", {})
    return attributes.get("format", FORMAT) == FORMAT and all(
        path.name in begun or path.suffix == ".lock" for path in folder.iterdir()
    )


def as_dataset(
    log: Mapping[str, np.ndarray],
    times: Mapping[str, np.ndarray],
    replicas: Sequence[int],
    layers: Sequence[str],
    diverged: np.ndarray,
    step: int,
) -> xr.Dataset:
    """A log with its dimensions named."""
    import xarray as xr

    variables: dict[str, Any] = {"diverged": (("replica",), diverged)}
    for name, values in log.items():
        variables[name] = (_dims(name, values, _batched(log)), values)
    coords: dict[str, Any] = {"replica": np.array(replicas)}
    if "logits" in log:
        coords["step"] = np.arange(len(log["logits"]))
    for kind, looks in times.items():
        if len(looks):
            coords[f"{kind}_step"] = looks
    if "nc1" in log:
        coords["layer"] = np.array(layers, dtype=object)
    return xr.Dataset(variables, coords=coords, attrs={"format": FORMAT, "updates": step})


def _batched(log: Mapping[str, np.ndarray]) -> bool:
    return "samples" in log and log["samples"].ndim == 3


def _dims(name: str, values: np.ndarray, batched: bool) -> tuple[str, ...]:
    if name in PER_STEP:
        batch = ("sample",) if batched and name != "losses" else ()
        rest = values.ndim - 2 - len(batch)
        last = ("output",) if name == "logits" or rest == 1 else tuple(f"target_{i}" for i in range(rest))
        return ("step", "replica", *batch, *last[:rest])
    if name.startswith("validation"):
        return ("validation_step", "replica")
    return ("probe_step", "replica", *(("class", "output") if values.ndim == 4 else ("layer",)))


def _compare(stored: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    different = [key for key in {**stored, **now} if stored.get(key) != now.get(key)]
    if different:

        def short(value: Any) -> str:
            text = str(value)
            return text if len(text) < 60 else text[:57] + "..."

        raise InputError(
            expected=f"the settings of the ensemble in {folder}",
            got="others for "
            + ", ".join(f"{key} ({short(stored.get(key))} there, {short(now.get(key))} now)" for key in different),
            do="resume with the same settings, or store elsewhere",
        )


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
