"""An ensemble on disk: its log as zarr arrays, its state as a checkpoint, what is committed as one small file.

The log is written first, then the checkpoint, then ``progress.json``; each is replaced whole. A kill leaves the state
of the last checkpoint, from which training goes on to the same numbers.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from local_elasticity.base.checks import check_path
from local_elasticity.base.locks import StoreLock, lock_name
from local_elasticity.errors import InputError
from local_elasticity.runs import git_revision, quiet, versions

if TYPE_CHECKING:
    import xarray as xr

    from local_elasticity.training.ensemble import Ensemble
    from local_elasticity.training.lockstep import Route

FORMAT = "local-elasticity ensemble"
ARRAYS, NOTE, PROGRESS, CHECKPOINT = "ensemble.zarr", "ensemble.json", "progress.json", "checkpoint/state.pt"
BLOCK = 256  # steps between writes, and in a chunk on disk
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
        self._lock = StoreLock(folder / ARRAYS)

    def release(self) -> None:
        """Let others write."""
        self._lock.release()

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
        stored = _read(folder / NOTE)
        if stored is None:
            if folder.exists() and not _is_free(folder):
                raise InputError(
                    expected="an empty folder or an ensemble", got=f"something else at {folder}", do="choose another"
                )
            made = cls(folder, False)
            made._create(settings, ensemble)
            return made
        if not resume:
            raise InputError(
                expected="a new folder", got=f"an ensemble at {folder}", do="pass resume=True, or another folder"
            )
        _compare(stored["settings"], json.loads(json.dumps(settings, default=str)), folder)
        made = cls(folder, True)
        made._restore(ensemble, routes)
        return made

    def _create(self, settings: dict[str, Any], ensemble: Ensemble) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.folder / ARRAYS, ignore_errors=True)
        import zarr

        dataset = as_dataset(ensemble.log, ensemble.times, ensemble.replicas, ensemble.layers, ensemble.diverged, 0)
        with quiet():
            dataset.drop_vars(ensemble.log).to_zarr(self.folder / ARRAYS, mode="w", consolidated=False)
            group = zarr.open_group(self.folder / ARRAYS, mode="r+")
            for name, values in ensemble.log.items():  # rows that were not reached take no room
                group.create_array(
                    name,
                    shape=values.shape,
                    chunks=(min(BLOCK, len(values)), *values.shape[1:]),
                    dtype=values.dtype,
                    fill_value=np.nan if values.dtype.kind == "f" else -1,
                    dimension_names=_dims(name, values, _batched(ensemble.log)),
                )
            zarr.consolidate_metadata(group.store)
        note = {
            "format": FORMAT,
            "settings": settings,
            "threads": ensemble.plan.threads,
            "versions": versions(),
            "git_revision": git_revision(),
        }
        _replace(self.folder / NOTE, json.dumps(note, indent=1, default=str).encode())

    def _restore(self, ensemble: Ensemble, routes: Sequence[Route]) -> None:
        path = self.folder / CHECKPOINT
        if not path.exists():
            return
        state = torch.load(path, weights_only=True, map_location=next(iter(ensemble.weights.values())).device)
        ensemble.step = self.written = int(state["step"])
        for kind in ("weights", "buffers"):
            for name, value in getattr(ensemble, kind).items():
                value.copy_(state[kind][name])
        ensemble.diverged[:] = state["diverged"].cpu().numpy()
        for route, part in zip(routes, state["routes"], strict=True):
            route.load(part, ensemble.step)
        import zarr

        group = zarr.open_group(self.folder / ARRAYS, mode="r")
        for name, values in ensemble.log.items():
            stored: Any = group[name]
            rows = self._rows(name, ensemble, ensemble.step)
            values[rows] = stored[rows]

    def save(self, ensemble: Ensemble, routes: Sequence[Route]) -> None:
        """Write what is new of the log, then the state, then that they are there."""
        self._lock.check()
        import zarr

        group = zarr.open_group(self.folder / ARRAYS, mode="r+")
        for name, values in ensemble.log.items():
            array: Any = group[name]
            rows = self._rows(name, ensemble, ensemble.step)
            if name in PER_STEP:
                rows = slice(self.written, ensemble.step)
            array[rows] = values[rows]
        diverged: Any = group["diverged"]
        diverged[:] = ensemble.diverged
        state = {
            "step": ensemble.step,
            "weights": ensemble.weights,
            "buffers": ensemble.buffers,
            "diverged": torch.from_numpy(ensemble.diverged),
            "routes": [route.state() for route in routes],
        }
        path = self.folder / CHECKPOINT
        path.parent.mkdir(exist_ok=True)
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, path)
        _replace(self.folder / PROGRESS, json.dumps({"step": ensemble.step, "steps": ensemble.steps}).encode())
        self.written = ensemble.step

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
    """Remove the folder of an ensemble; anything else stays."""
    if is_ensemble(path):
        shutil.rmtree(path)


def open_ensemble(path: str | Path) -> xr.Dataset:
    """The log of an ensemble on disk, as far as it is committed.

    Returns:
        logits (step, replica, output), labels, samples, losses (step, replica); what was asked for of
        validation_loss (validation_step, replica), probe_mean, probe_variance (probe_step, replica, class, output) and
        the collapse metrics (probe_step, replica, layer). ``step`` counts the updates made before each row.

    Raises:
        InputError: when it is not an ensemble.
    """
    import xarray as xr

    folder = check_path("path", path)
    if not is_ensemble(folder):
        what = "something else" if folder.exists() else "nothing"
        raise InputError(
            expected="the folder of an ensemble", got=f"{what} at {path}", do="pass the --out of local-elasticity train"
        )
    done = (_read(folder / PROGRESS) or {"step": 0})["step"]
    with quiet():
        data = xr.open_zarr(folder / ARRAYS, consolidated=True)
    keep = {"step": slice(0, done)} if "step" in data.dims else {}
    for name in ("validation_step", "probe_step"):
        if name in data.dims:
            keep[name] = slice(0, int((data[name].values <= done).sum()) if done else 0)
    note = _read(folder / NOTE) or {}
    return data.isel(keep).assign_attrs(settings=json.dumps(note.get("settings")), updates=done)


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


def _is_free(folder: Path) -> bool:
    """Whether a folder is empty, or holds but the beginning of an ensemble whose making was cut short."""
    names = ("config.json", "config.partial", ARRAYS, Path(NOTE).with_suffix(".partial").name, lock_name(Path(ARRAYS)))
    return folder.is_dir() and all(path.name in names for path in folder.iterdir())


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_suffix(".partial")
    partial.write_bytes(content)
    os.replace(partial, path)
