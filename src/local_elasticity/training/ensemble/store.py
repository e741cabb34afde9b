"""An ensemble as it is written: its log as zarr arrays, its state as a checkpoint, what is committed as one small file.

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
from local_elasticity.base.errors import InputError
from local_elasticity.base.files import discard, leftover_of, told_of_disk, write_whole
from local_elasticity.base.locks import Lock
from local_elasticity.runs.provenance import git_revision, versions
from local_elasticity.runs.run import FORMAT_VERSION, open_checked, quiet

if TYPE_CHECKING:
    from local_elasticity.training.ensemble.log import Ensemble
    from local_elasticity.training.lockstep import Route
from local_elasticity.runs.ensembles import (
    ARRAYS,
    CHECKPOINT,
    FORMAT,
    NOTE,
    PER_STEP,
    PROGRESS,
    as_dataset,
    compare_settings,
    is_ensemble,
    is_free,
    read_note,
    read_progress,
)

BLOCK = 256  # steps between writes, and in a chunk on disk


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
            if not recording.resumed and folder.exists() and not is_free(folder):
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
        compare_settings(read_note(self.folder)["settings"], json.loads(json.dumps(settings, default=str)), self.folder)
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
        progress = read_progress(self.folder)
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
