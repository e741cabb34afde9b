"""Runs on disk: their folders, their stores, and how they are read."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from local_elasticity.runs.run import Run, open_run

__all__ = ["Run", "open_run"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.run"), name)  # with zarr, which folders do not need
