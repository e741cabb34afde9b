"""How an object draws itself, although pictures are made in a room above it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOM = "local_elasticity.report"


def drawn(picture: str, *content: Any, **options: Any) -> Figure:
    """The picture that the room of pictures makes of something: the one way upwards, for ``plot`` methods alone.

    Args:
        picture: module and function there, for example "sde.phase_figure".
        content: what is drawn.
        options: of the picture.
    """
    module, _, name = picture.partition(".")
    return getattr(importlib.import_module(f"{ROOM}.{module}"), name)(*content, **options)
