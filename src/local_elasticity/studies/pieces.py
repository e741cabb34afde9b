"""The pieces of a study: named arrays kept on disk whole or not at all, so that an interrupted study goes on."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]


def kept(path: Path, compute: Callable[[], Arrays]) -> Arrays:
    """The arrays of this piece: read if they are there, else computed and written.

    Args:
        path: an .npz file.
        compute: what makes the arrays.
    """
    if path.exists():
        try:
            with np.load(path, allow_pickle=False) as stored:
                return {name: stored[name] for name in stored.files}
        except (OSError, ValueError, zipfile.BadZipFile):
            path.unlink()  # not ours to trust: it is made again
    arrays = compute()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial.npz")
    save: Any = np.savez_compressed
    save(partial, **arrays)
    os.replace(partial, path)
    return arrays
