"""Recordings on disk that the LE-SDE can be estimated from: runs of a tracker, and .npz files."""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from local_elasticity.base.errors import InputError
from local_elasticity.runs.ensembles import is_ensemble, open_ensemble
from local_elasticity.runs.folders import locate
from local_elasticity.runs.run import open_run

SIMULATION = "simulation.npz"
FORMS = (
    "a run (its class means over the steps), the folder of an ensemble or of a simulation, or a .npz file with "
    "class_means (T, K, p) or (trials, T, K, p), "
    "or with logits (T, trials, K) and labels (T, trials); t (T,) beside them is optional"
)


@dataclass(frozen=True)
class Recording:
    """Class means as they were recorded, ready for ``estimate(**recording.data)``.

    Attributes:
        what: what it is, in words.
        data: class_means, or logits and labels; t; within_variance where it is known.
        class_names: of the classes.
        square: as many coordinates as classes.
    """

    what: str
    data: dict[str, Any] = field(repr=False)
    class_names: tuple[str, ...]
    square: bool


def read_recording(path: str | Path) -> Recording:
    """Read a run or a .npz file.

    Raises:
        InputError: for anything else.
    """
    path = Path(path)
    if path.suffix == ".npz":
        return _npz(path)
    if (path / SIMULATION).is_file():
        return _npz(path / SIMULATION)
    if is_ensemble(path):
        return _ensemble(path)
    if locate(path) is None:
        what = "something else" if path.exists() else "nothing"
        raise InputError(expected=FORMS, got=f"{what} at {path}", do="check the path")
    return _run(path)


def _ensemble(path: Path) -> Recording:
    """The log of an ensemble: at every step the logits of one sample a replica (spec lesde 3.2).

    Of a batch the mean over its samples of a class would weigh replicas unequally: every sample counts by itself.
    Replicas that diverged are left out. Without a log there are the class means of the probes.
    """
    data = open_ensemble(path)
    settings = json.loads(data.attrs["settings"])
    kept = data["diverged"].values < 0
    gone = f", {int((~kept).sum())} that diverged left out" if not kept.all() else ""
    names = (settings.get("configuration") or {}).get("class_names")
    if "logits" in data and data.sizes["step"]:
        labels = data["labels"].values[:, kept]
        if labels.dtype.kind not in "iu":
            raise InputError(expected=FORMS, got=f"an ensemble without classes at {path}", do="train on classes")
        logits = data["logits"].values[:, kept].reshape(len(labels), -1, data.sizes["output"])
        found: dict[str, Any] = {"logits": logits, "labels": labels.reshape(len(labels), -1)}
        found["t"] = data["step"].values.astype(float)
        K, square = int(labels.max()) + 1, True
        each = f", {labels.shape[2]} samples a step" if labels.ndim == 3 else ""
        words = f"{int(kept.sum())} replicas{gone}, {len(labels)} steps{each}"
        K = max(K, logits.shape[-1]) if logits.shape[-1] > 1 else K
        square = logits.shape[-1] == K
    elif "probe_mean" in data and data.sizes["probe_step"] > 1:
        means = data["probe_mean"].transpose("replica", "probe_step", "class", "output").values[kept]
        found = {"class_means": means, "t": data["probe_step"].values.astype(float)}
        found["within_variance"] = data["probe_variance"].values[:, kept].mean(axis=(1, 3))
        K, square = means.shape[2], means.shape[2] == means.shape[3]
        words = f"{int(kept.sum())} replicas{gone}, class means of the probes at {means.shape[1]} times"
    else:
        raise InputError(expected=FORMS, got=f"an ensemble without a log at {path}", do="train with a log or probes")
    named = tuple(str(name) for name in names) if names and len(names) == K else tuple(str(k) for k in range(K))
    return Recording(f"ensemble {path}: {words}", found, named, square)


def _run(path: Path) -> Recording:
    data = open_run(path).dataset
    if "class_mean_output" not in data or not data.sizes.get("step", 0):
        raise InputError(expected=FORMS, got=f"a run without class means at {path}", do="track with this version")
    first = ("replica",) if "replica" in data["class_mean_output"].dims else ()
    means = data["class_mean_output"].transpose(*first, "step", "class", "output").values
    found: dict[str, Any] = {"class_means": means, "t": data["step"].values.astype(float)}
    if "before" in data and "target_label" in data and not first:
        found["within_variance"] = _within(data["before"].values, data["target_label"].values)
    names = tuple(str(name) for name in data["class"].values)
    trials = f"{means.shape[0]} replicas, " if first else ""
    return Recording(f"run {path}: {trials}{means.shape[-3]} snapshots", found, names, means.shape[-1] == len(names))


def _within(outputs: np.ndarray, labels: np.ndarray) -> np.ndarray | None:
    """Variance of the probes about their class mean, per coordinate (T, K); None with one probe in a class."""
    classes, counts = np.unique(labels, return_counts=True)
    if counts.min() < 2:
        return None
    outputs = outputs.astype(np.float64)
    return np.stack([outputs[:, labels == c].var(axis=1, ddof=1).mean(axis=-1) for c in classes], axis=1)


def _npz(path: Path) -> Recording:
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files if name in ("class_means", "logits", "labels", "t")}
            names = file.files
            variance = file["within_variance"] if "within_variance" in names else np.empty(0)
    except FileNotFoundError:
        raise InputError(expected=FORMS, got=f"nothing at {path}", do="check the path") from None
    except (OSError, ValueError, zipfile.BadZipFile, KeyError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            expected=FORMS, got=f"a file that cannot be read, {path}: {said}", do="write it again"
        ) from None
    forms = ({"class_means"}, {"logits", "labels"})
    kept = next((form for form in forms if form <= set(found)), None)
    if kept is None:
        raise InputError(expected=FORMS, got=f"{path} with {sorted(names)}", do="rename its arrays")
    data = {name: value for name, value in found.items() if name in kept | {"t"}}
    main = data["class_means" if "class_means" in kept else "logits"]
    if main.ndim not in (3, 4):
        raise InputError(expected=FORMS, got=f"an array of shape {main.shape} in {path}", do="reshape it")
    if "class_means" in kept and variance.shape == main.shape:
        data["within_variance"] = variance.reshape(-1, *variance.shape[-3:]).mean(axis=(0, -1))
    K = main.shape[-2] if "class_means" in kept else main.shape[-1]
    shape = " x ".join(map(str, main.shape))
    words = f"{path}: {'class means' if 'class_means' in kept else 'logits and labels'}, {shape}"
    return Recording(words, data, tuple(str(k) for k in range(K)), main.shape[-1] == K)
