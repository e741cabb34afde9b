"""The folders of runs and studies: whose they are, what is in them, how they are emptied."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from local_elasticity.base.errors import InputError
from local_elasticity.base.files import discard, told_of_disk, write_whole
from local_elasticity.base.locks import Lock

FORMAT = "local-elasticity run"
MADE_BY = "local-elasticity"  # marks a config.json as ours: folders without it are never emptied
STUDY_NOTE = "study.json"  # what `reproduce` writes into a study's folder
RUN, ENSEMBLE = "run.zarr", "ensemble.zarr"
ENSEMBLE_NOTE, ENSEMBLE_FORMAT = "ensemble.json", "local-elasticity ensemble"
NOTES = {  # in a folder in which nothing was run yet
    *("config.json", "config.partial", ".config.json.partial"),
    *(STUDY_NOTE, f"{STUDY_NOTE}.partial", f".{STUDY_NOTE}.partial"),
    *(f".{RUN}.partial", f".{ENSEMBLE}.partial", f".{ENSEMBLE_NOTE}.partial"),
}


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


def prepare_folder(out: Path, configuration: dict[str, Any], overwrite: bool) -> bool:
    """Make the folder of a run or a study and note its configuration; True when it holds a part of the same run.

    Raises:
        InputError: when the folder holds something else, or a run with another configuration.
    """
    note = out / "config.json"
    with told_of_disk(out):
        if out.exists() and not out.is_dir():
            raise InputError(expected="a folder for the run", got=f"a file, {out}", do="choose another --out")
        stored = read_object(note)
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
        if (read_object(note) or {}).get("made_by") != MADE_BY:
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
    stored = read_object(out / "config.json")
    made = (stored is not None and stored.get("made_by") == MADE_BY) or locate(out) is not None
    return made or (read_object(out / ENSEMBLE_NOTE) or {}).get("format") == ENSEMBLE_FORMAT


def read_object(note: Path) -> dict[str, Any] | None:
    """What a small file of ours holds; None for no file, and for anything but a JSON object."""
    try:
        stored = json.loads(note.read_text())
    except (OSError, ValueError):
        return None
    return stored if isinstance(stored, dict) else None
