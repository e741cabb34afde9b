"""Checkpoints: tensors and plain values in one file, written whole, tied to what they belong to by a hash."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import torch

from local_elasticity.base.errors import InputError
from local_elasticity.base.files import told_of_disk, write_whole


def write_checkpoint(path: Path, state: dict[str, Any]) -> str:
    """Write a checkpoint, whole or not at all.

    Args:
        path: the file; its folder is made.
        state: tensors and plain values.

    Returns:
        The SHA-256 of the file.

    Raises:
        InputError: for a disk that is full, or a place that cannot be written.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    with told_of_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content)
    return hashlib.sha256(content).hexdigest()


def read_checkpoint(
    path: Path, sha256: str | None = None, *, device: torch.device | str | None = None, do: str = "start again"
) -> dict[str, Any]:
    """Read a checkpoint; nothing in it is executed.

    Args:
        path: the file.
        sha256: of the file that is meant; anything will do without.
        device: where its tensors go; where they were by default.
        do: what can be done when this is not the checkpoint.

    Returns:
        What was written.

    Raises:
        InputError: when it is not there, is another one, is damaged, or holds more than tensors and plain values.
    """
    with told_of_disk(path):
        if not path.is_file():
            raise InputError(expected=f"the checkpoint {path.name}", got=f"none in {path.parent}", do=do)
        content = path.read_bytes()
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise InputError(
            expected=f"the checkpoint {path.name} as it was written with its snapshot",
            got=f"a truncated, changed or foreign file in {path.parent} (its SHA-256 is another)",
            do=do,
        )
    try:
        state = torch.load(io.BytesIO(content), weights_only=True, map_location=device)
    except Exception as error:  # whatever a damaged or malicious file makes the reader say
        raise InputError(
            expected="a whole checkpoint with nothing but tensors and plain values",
            got=f"{path}, which is damaged or holds something else ({type(error).__name__})",
            do=do,
        ) from error
    if not isinstance(state, dict):
        raise InputError(expected="a checkpoint of ours", got=f"{path}, which holds a {type(state).__name__}", do=do)
    return state
