"""Checks of arguments, made before any work: each refuses in one line what cannot be right."""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from local_elasticity.errors import InputError, nearest


def in_words(value: object) -> str:
    """Show a value on one short line: arrays by their dtype and shape, anything else by its repr.

    Args:
        value: what came.
    """
    if isinstance(value, Tensor | np.ndarray) and value.ndim:
        return f"{type(value).__name__} of {value.dtype} and shape {tuple(value.shape)}"
    try:
        text = printable(repr(value))
    except Exception:  # an object whose repr fails is still to be refused in our words
        text = f"an object of type {type(value).__name__}"
    if " at 0x" in text:  # where an object lies says nothing to anyone
        text = f"an object of type {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:97]}..."


def printable(text: str) -> str:
    """Escape what cannot be printed: line ends, control characters, and bytes of a file name that are not UTF-8.

    Args:
        text: a name from outside.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def check_whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    """Check a whole number.

    Args:
        name: of the argument.
        value: what came.
        least: the smallest that may be.
        most: the largest that may be.

    Raises:
        InputError: for anything else.
    """
    number = int(value) if isinstance(value, numbers.Integral) and not isinstance(value, bool) else None
    if number is None or number < least or (most is not None and number > most):
        span = f">= {least}" if most is None else f"from {least} to {most}"
        raise InputError(expected=f"{name}: a whole number {span}", got=in_words(value), do=f"correct {name}")
    return number


def check_real(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """Check a finite number in [low, high].

    Args:
        name: of the argument.
        value: what came.
        low: the smallest that may be.
        high: the largest that may be.

    Raises:
        InputError: for anything else.
    """
    try:
        number = float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else math.nan
    except OverflowError:  # a whole number beyond all floats
        number = math.nan
    if not math.isfinite(number) or not low <= number <= high:
        bounds = f" in [{low:g}, {high:g}]" if math.isfinite(high) else f" >= {low:g}" if math.isfinite(low) else ""
        raise InputError(expected=f"{name}: a finite number{bounds}", got=in_words(value), do=f"correct {name}")
    return number


def check_flag(name: str, value: Any) -> bool:
    """Check a True or False.

    Args:
        name: of the argument.
        value: what came.

    Raises:
        InputError: for anything else, a text that says "no" among it.
    """
    if not isinstance(value, bool | np.bool_):
        raise InputError(expected=f"{name}: True or False", got=in_words(value), do=f"correct {name}")
    return bool(value)


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


def check_path(name: str, value: Any) -> Path:
    """Check a path and expand its ~.

    Args:
        name: of the argument.
        value: what came.

    Raises:
        InputError: for what is no path, an empty one, or the home of nobody.
    """
    if not isinstance(value, str | os.PathLike) or not isinstance(os.fspath(value), str):
        raise InputError(expected=f"{name}: a path", got=in_words(value), do="give a text or a pathlib.Path")
    text = os.fspath(value)
    if not text or "\0" in text:
        got = "an empty text" if not text else "a path with a NUL character"
        raise InputError(expected=f"{name}: a path", got=got, do=f"correct {name}")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise InputError(
            expected=f"{name}: a path in a home folder that there is", got=in_words(text), do="write the path out"
        ) from error


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


def in_short(error: BaseException) -> str:
    """An error's kind, and its message where that fits in the line.

    Args:
        error: of another library or the operating system.
    """
    kind = type(error).__name__
    message = (error.strerror if isinstance(error, OSError) else "") or str(error)
    message = message.strip()
    return f"{kind}: {message}" if message and len(message) < 120 and "\n" not in message else kind
