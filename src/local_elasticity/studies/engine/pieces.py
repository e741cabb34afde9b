"""The pieces of a study: named arrays kept on disk whole or not at all, so that an interrupted study goes on."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np

from local_elasticity.base.errors import InputError
from local_elasticity.base.files import discard, put_whole, told_of_disk

Arrays = dict[str, np.ndarray]


def kept(path: Path, compute: Callable[[], Arrays]) -> Arrays:
    """The arrays of this piece: read if they are there, else computed and written.

    Args:
        path: an .npz file.
        compute: what makes the arrays.

    Returns:
        The arrays by name.

    Raises:
        InputError: for a disk that is full, or a place that cannot be written.
    """
    if path.exists():
        try:
            return read_arrays(path)
        except InputError:
            discard(path)  # not ours to trust: it is made again
    arrays = compute()
    write_arrays(path, arrays)
    return arrays


def read_arrays(path: Path) -> Arrays:
    """The arrays of a piece.

    Args:
        path: an .npz file.

    Returns:
        The arrays by name.

    Raises:
        InputError: when it is not there, damaged, or holds anything but arrays of numbers and text.
    """
    with told_of_disk(path):
        if not path.is_file():
            raise InputError(expected=f"{path}", got="nothing there", do="run the study again, which makes it")
        content = io.BytesIO(path.read_bytes())
    try:
        with np.load(content, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except Exception as error:  # whatever a damaged archive makes its readers say
        raise InputError(
            expected=f"{path} as it was written",
            got=f"a damaged file ({type(error).__name__})",
            do="remove it and run the study again, which makes it anew",
        ) from error


def write_arrays(path: Path, arrays: Arrays) -> None:
    """Write a piece, whole or not at all.

    Args:
        path: an .npz file; its folder is made.
        arrays: by name.

    Raises:
        InputError: for a disk that is full, or a place that cannot be written.
    """
    save = cast(Any, np.savez_compressed)
    with told_of_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with put_whole(path) as partial, partial.open("wb") as file:
        save(file, **arrays)
