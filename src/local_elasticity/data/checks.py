"""Checks of arguments, made before any work: each refuses in one line what cannot be right."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from local_elasticity.base.checks import in_words
from local_elasticity.base.errors import InputError, nearest


def printable(text: str) -> str:
    """Escape what cannot be printed: line ends, control characters, and bytes of a file name that are not UTF-8.

    Args:
        text: a name from outside.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def check_name(what: str, value: Any, known: Iterable[str]) -> str:
    """Check one of some names.

    Args:
        what: that it names, with its article.
        value: what came.
        known: the names that there are.

    Raises:
        InputError: for another, saying which comes nearest.
    """
    known = list(known)
    if not isinstance(value, str) or value not in known:
        raise InputError(expected=what, got=in_words(value), do=nearest(str(value)[:100], known))
    return value


def check_classes(classes: Any) -> list[str | int]:
    """Check a choice of classes: names or labels, one of them, several, or a text with commas.

    Args:
        classes: what came.

    Raises:
        InputError: when it is neither, or empty.
    """
    if isinstance(classes, str):
        classes = [part.strip() for part in classes.split(",") if part.strip()]
    plain = isinstance(classes, Sequence | Tensor | np.ndarray) and getattr(classes, "ndim", 1) == 1
    listed: list[Any] = [c.item() if isinstance(c, Tensor | np.generic) else c for c in classes] if plain else []
    if not listed:
        got = "none" if plain else in_words(classes)
        raise InputError(expected="at least one class, in a list", got=got, do="name the classes to keep")
    for wanted in listed:
        if isinstance(wanted, bool) or not isinstance(wanted, str | numbers.Integral):
            raise InputError(expected="classes by name or label", got=in_words(wanted), do="correct classes")
    return listed


def is_folder(path: Path) -> bool:
    """Whether it is a folder that may be looked into; without an error where it is not."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def is_file(path: Path) -> bool:
    """Whether it is a regular file; without an error where it cannot be told."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def kind_and_message(error: BaseException) -> str:
    """An error's kind, and its message where that fits in the line.

    Args:
        error: of another library or the operating system.
    """
    kind = type(error).__name__
    message = (error.strerror if isinstance(error, OSError) else "") or str(error)
    message = message.strip()
    return f"{kind}: {message}" if message and len(message) < 120 and "\n" not in message else kind
