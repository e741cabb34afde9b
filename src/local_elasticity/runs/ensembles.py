"""Ensembles on disk, as they are read; ``training.ensemble.store`` writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from local_elasticity.base.checks import check_path
from local_elasticity.base.errors import InputError
from local_elasticity.base.files import told_of_disk
from local_elasticity.runs.folders import ENSEMBLE, ENSEMBLE_FORMAT, ENSEMBLE_NOTE, NOTES, clear_folder, read_object
from local_elasticity.runs.run import FORMAT_VERSION, open_checked

if TYPE_CHECKING:
    import xarray as xr


FORMAT, ARRAYS, NOTE, PROGRESS = ENSEMBLE_FORMAT, ENSEMBLE, ENSEMBLE_NOTE, "progress.json"
CHECKPOINT = "checkpoint/state.pt"  # where progress.json does not name another
LOOKS = ("validation_step", "probe_step")
PER_STEP = ("logits", "losses", "samples", "labels")


def is_ensemble(path: str | Path) -> bool:
    """Whether the folder of an ensemble is at this path."""
    stored = read_object(Path(path) / NOTE)
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
        note, done = read_note(folder), read_progress(folder)["step"]
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


def read_note(folder: Path) -> dict[str, Any]:
    """What an ensemble is.

    Raises:
        InputError: for one of a newer format, or a note that is damaged.
    """
    from local_elasticity.base import chunks

    note = read_object(folder / NOTE) or {}
    chunks.check_version(note.get("format_version", 1), FORMAT_VERSION, str(folder))
    if not isinstance(note.get("settings"), dict):
        raise damaged(folder / NOTE)
    return note


def read_progress(folder: Path) -> dict[str, Any]:
    """How far an ensemble is.

    Raises:
        InputError: when the file is there, but damaged.
    """
    path = folder / PROGRESS
    progress = read_object(path)
    if progress is None and not path.exists():
        return {"step": 0}
    step = (progress or {}).get("step")
    if progress is None or not isinstance(step, int) or step < 0:
        raise damaged(path)
    return progress


def damaged(path: Path) -> InputError:
    """What is said of a file that is there and cannot be read."""
    return InputError(
        expected=f"{path} as it was written", got="a damaged file", do="restore it from a copy, or train again"
    )


def is_free(folder: Path) -> bool:
    """Whether a folder holds nothing, or only what a kill in the making of an ensemble leaves."""
    if not folder.is_dir():
        return False
    begun = {ARRAYS, Path(NOTE).with_suffix(".partial").name} | NOTES
    attributes = (read_object(folder / ARRAYS / "zarr.json") or {}).get("attributes", {})
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
        variables[name] = (dims_of(name, values, is_batched(log)), values)
    coords: dict[str, Any] = {"replica": np.array(replicas)}
    if "logits" in log:
        coords["step"] = np.arange(len(log["logits"]))
    for kind, looks in times.items():
        if len(looks):
            coords[f"{kind}_step"] = looks
    if "nc1" in log:
        coords["layer"] = np.array(layers, dtype=object)
    return xr.Dataset(variables, coords=coords, attrs={"format": FORMAT, "updates": step})


def is_batched(log: Mapping[str, np.ndarray]) -> bool:
    """Whether each step took several samples."""
    return "samples" in log and log["samples"].ndim == 3


def dims_of(name: str, values: np.ndarray, batched: bool) -> tuple[str, ...]:
    """The names of the dimensions of an array of the log."""
    if name in PER_STEP:
        batch = ("sample",) if batched and name != "losses" else ()
        rest = values.ndim - 2 - len(batch)
        last = ("output",) if name == "logits" or rest == 1 else tuple(f"target_{i}" for i in range(rest))
        return ("step", "replica", *batch, *last[:rest])
    if name.startswith("validation"):
        return ("validation_step", "replica")
    return ("probe_step", "replica", *(("class", "output") if values.ndim == 4 else ("layer",)))


def compare_settings(stored: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    """Refuse to continue an ensemble with other settings.

    Raises:
        InputError: naming them.
    """
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
