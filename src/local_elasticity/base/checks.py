"""Checks of arguments: each hands back the value in its plain type, or refuses it in one line before any work.

The first argument is always the argument's name as the caller wrote it; ``do`` says something that can be done. Nothing
here imports torch: what is about tensors, models and callables stands in ``base.tensors``.
"""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard, get_args, overload

import numpy as np

from local_elasticity.base.errors import InputError, nearest

SHOWN = 100  # characters of a value that an error shows
UNITS = {"": 1, "b": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def in_words(value: object) -> str:
    """Show a value on one short line.

    Args:
        value: what came.

    Returns:
        Arrays by dtype and shape, classes and functions by name, anything else by its repr where that is short.
    """
    if isinstance(value, type):
        return f"the class {value.__name__}"
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple) and hasattr(value, "dtype") and len(shape):
        return f"{type(value).__name__} of {getattr(value, 'dtype', '?')} and shape {tuple(shape)}"
    try:
        text = _printable(repr(value))
    except Exception:  # an object whose repr fails is still to be refused in our words
        text = f"an object of type {type(value).__name__}"
    limit = SHOWN if isinstance(value, Collection) and not isinstance(value, str) else 4 * SHOWN
    if " at 0x" in text or len(text) > limit:  # where an object lies says nothing to anyone
        text = _by_kind(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def _by_kind(value: object) -> str:
    name = getattr(value, "__name__", None)
    if callable(value) and isinstance(name, str):
        return "a lambda" if name == "<lambda>" else f"the function {name}"
    size = f" of {len(value)}" if isinstance(value, Collection) else ""
    return f"an object of type {type(value).__name__}{size}"


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " if c == "\n" else c.encode("unicode_escape").decode() for c in text)


def in_short(error: BaseException) -> str:
    """An error of the operating system in a few words; of another its kind.

    Args:
        error: what was raised.

    Returns:
        For example "No space left on device".
    """
    return (isinstance(error, OSError) and error.strerror) or type(error).__name__


def as_code(name: str) -> str:
    """A name that stands in a line of code: itself where it is one, else x.

    Args:
        name: of an argument, possibly in words.

    Returns:
        An identifier.
    """
    return name if name.isidentifier() else "x"


def written(name: str, value: object) -> str:
    """How an argument is given a value: in words where its name is no identifier and no option.

    Args:
        name: of the argument; "--name" for an option of the command line.
        value: as Python, or the command line, writes it.

    Returns:
        For example "write n=3", "write --every 3".
    """
    if name.startswith("--"):
        return f"write {name} {value}"
    return f"write {name}={value}" if name.isidentifier() else f"use {value}"


def is_whole(value: Any) -> TypeGuard[int]:
    """Whether it is a whole number by its type: True and 3.0 are not."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool | np.bool_)


def is_real(value: Any) -> TypeGuard[float]:
    """Whether it is a real number by its type: True and "3" are not."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool | np.bool_)


def check_whole(name: str, value: Any, least: int = 1, most: int | None = None, *, or_none: bool = False) -> Any:
    """Check a whole number.

    Args:
        name: of the argument.
        value: what came.
        least: the smallest that may be.
        most: the largest that may be.
        or_none: whether None may be, too.

    Returns:
        An int, or None.

    Raises:
        InputError: for anything else (True, 3.0, "3"), saying which number is nearest.
    """
    if value is None and or_none:
        return None
    if is_whole(value) and value >= least and (most is None or value <= most):
        return int(value)
    span = f">= {least}" if most is None else f"in {least}..{most}"
    raise InputError(
        expected=f"{name}: a whole number {span}" + (", or None" if or_none else ""),
        got=in_words(value),
        do=written(name, _nearest_whole(value, least, most)) + (", or leave it out" if or_none else ""),
    )


def _nearest_whole(value: Any, least: int, most: int | None) -> int:
    try:
        number = round(float(value)) if not isinstance(value, bool | np.bool_) else least
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = least
    return max(least, number if most is None else min(most, number))


def check_seed(name: str, value: Any, *, or_none: bool = False) -> Any:
    """Check the seed of a random stream: a whole number from 0 to 2**63 - 1.

    Args:
        name: of the argument.
        value: what came.
        or_none: whether None may be, too.

    Returns:
        An int, or None.

    Raises:
        InputError: for anything else.
    """
    return check_whole(name, value, 0, 2**63 - 1, or_none=or_none)


def check_real(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    above: bool = False,
    below: bool = False,
    or_none: bool = False,
) -> Any:
    """Check a finite number within bounds.

    Args:
        name: of the argument.
        value: what came.
        low: the lower bound.
        high: the upper bound.
        above: whether the number must be above ``low``, not equal to it.
        below: whether the number must be below ``high``, not equal to it.
        or_none: whether None may be, too.

    Returns:
        A float, or None.

    Raises:
        InputError: for anything else: NaN, infinity, a text, a tensor, True.
    """
    if value is None and or_none:
        return None
    try:
        number = float(value) if is_real(value) else math.nan
    except OverflowError:  # a whole number beyond all floats
        number = math.nan
    enough = number > low if above else number >= low
    if math.isfinite(number) and enough and (number < high if below else number <= high):
        return number
    raise InputError(
        expected=f"{name}: a finite number{_bounds(low, high, above, below)}" + (", or None" if or_none else ""),
        got=in_words(value),
        do=_advice_for_number(name, value, low, high, above or below),
    )


def _bounds(low: float, high: float, above: bool, below: bool) -> str:
    lower = f"{'>' if above else '>='} {low:g}" if math.isfinite(low) else ""
    upper = f"{'<' if below else '<='} {high:g}" if math.isfinite(high) else ""
    return f" {' and '.join(filter(None, (lower, upper)))}" if lower or upper else ""


def _advice_for_number(name: str, value: Any, low: float, high: float, is_open: bool) -> str:
    if hasattr(value, "item") and not isinstance(value, np.generic) and getattr(value, "ndim", 1) == 0:
        return f"pass {as_code(name)}.item()"
    if isinstance(value, str):
        try:
            return f"{written(name, f'{float(value):g}')}, without quotes"
        except ValueError:
            pass
    if math.isfinite(low) and math.isfinite(high) and is_open:
        return f"for example {name}{' ' if name.startswith('--') else '='}{(low + high) / 2:g}"
    return f"pass such a number as {name}"


def check_fraction(name: str, value: Any) -> float:
    """Check a number strictly between 0 and 1.

    Args:
        name: of the argument.
        value: what came.

    Returns:
        A float.

    Raises:
        InputError: for anything else.
    """
    return check_real(name, value, 0.0, 1.0, above=True, below=True)


def check_probability(name: str, value: Any) -> float:
    """Check a number from 0 to 1, both included.

    Args:
        name: of the argument.
        value: what came.

    Returns:
        A float.

    Raises:
        InputError: for anything else.
    """
    return check_real(name, value, 0.0, 1.0)


def check_rate(name: str, value: Any, *, zero: bool = True) -> float:
    """Check a finite number of at least 0.

    Args:
        name: of the argument.
        value: what came.
        zero: whether 0 may be.

    Returns:
        A float.

    Raises:
        InputError: for anything else.
    """
    return check_real(name, value, 0.0, above=not zero)


def check_bytes(name: str, value: Any) -> int | None:
    """Check a number of bytes, or None for no limit.

    Args:
        name: of the argument.
        value: what came.

    Returns:
        An int, or None.

    Raises:
        InputError: for anything else; a text such as "1GB" is told how it is written as a number.
    """
    if value is None or (is_whole(value) and value >= 1):
        return None if value is None else int(value)
    raise InputError(
        expected=f"{name}: a whole number of bytes >= 1, or None",
        got=in_words(value),
        do=f"write {name}={_bytes_of(value)}, or leave it out",
    )


def _bytes_of(value: Any) -> str:
    """What was probably meant, as Python writes it."""
    if isinstance(value, str):
        text = value.strip().lower().replace(" ", "").removesuffix("ib").removesuffix("b")
        number, unit = text.rstrip("kmgt"), text[len(text.rstrip("kmgt")) :]
        try:
            count = float(number) * UNITS.get(unit, 1)
            if not math.isfinite(count) or count < 1:
                return "10**9"
        except ValueError:
            return "10**9"
        power = UNITS.get(unit, 1)
        whole = float(number) == int(float(number)) and power > 1
        factor = f"{int(float(number))} * " if float(number) != 1 else ""
        return f"{factor}10**{round(math.log10(power))}" if whole else str(int(count))
    return str(round(value)) if is_real(value) and math.isfinite(value) and value >= 1 else "10**9"


def check_flag(name: str, value: Any) -> bool:
    """Check a True or False.

    Args:
        name: of the argument.
        value: what came.

    Returns:
        A bool.

    Raises:
        InputError: for anything else: a text that says "no" would count as True.
    """
    if isinstance(value, bool | np.bool_):
        return bool(value)
    raise InputError(expected=f"{name}: True or False", got=in_words(value), do=f"write {name}=True or {name}=False")


def check_choice(name: str, value: Any, known: Any, *, or_none: bool = False) -> Any:
    """Check one of a few names.

    Args:
        name: of the argument.
        value: what came.
        known: the names that there are: a ``Literal``, a mapping or any iterable of texts.
        or_none: whether None may be, too.

    Returns:
        The name.

    Raises:
        InputError: for another, saying which comes nearest.
    """
    names = [str(choice) for choice in (get_args(known) or known)]
    if (value is None and or_none) or (isinstance(value, str) and value in names):
        return value
    raise InputError(
        expected=f"{name}: one of {', '.join(map(repr, names))}" + (", or None" if or_none else ""),
        got=in_words(value),
        do=nearest(value[:SHOWN] if isinstance(value, str) else "", names),
    )


def check_text(name: str, value: Any, *, or_none: bool = False) -> Any:
    """Check a text that is not empty.

    Args:
        name: of the argument.
        value: what came.
        or_none: whether None may be, too.

    Returns:
        The text, or None.

    Raises:
        InputError: for anything else.
    """
    if (value is None and or_none) or (isinstance(value, str) and value.strip()):
        return value
    raise InputError(expected=f"{name}: a text", got=in_words(value), do=f'write it in quotes: {name}="..."')


def check_names(name: str, value: Any, *, least: int = 1, distinct: bool = False) -> tuple[str, ...]:
    """Check a sequence of texts; a single text stands for itself.

    Args:
        name: of the argument.
        value: what came.
        least: how many there must be.
        distinct: whether none may come twice.

    Returns:
        The texts.

    Raises:
        InputError: for a set (it has no order), an iterator (it is empty afterwards), numbers, or too few.
    """
    if isinstance(value, str):
        value = (value,)
    if not isinstance(value, Sequence | np.ndarray) or not all(isinstance(entry, str) for entry in value):
        raise InputError(
            expected=f"{name}: a list of texts", got=in_words(value), do=f"write {name}=[...] with each text in quotes"
        )
    names = tuple(str(entry) for entry in value)
    if len(names) < least:
        raise InputError(expected=f"{name}: at least {least}", got=str(len(names)), do=f"name {least} or more")
    if distinct and len(set(names)) < len(names):
        raise InputError(expected=f"{name}: each once", got=in_words(list(names)), do="leave the doubles out")
    return names


def check_class_names(name: str, value: Any) -> tuple[str, ...]:
    """Check the names of classes, in the order of their labels: different texts or whole numbers.

    Args:
        name: of the argument.
        value: what came.

    Returns:
        The names as texts.

    Raises:
        InputError: for a single text, a set or dict (they have no order of labels), or a name that comes twice.
    """
    is_list = isinstance(value, Sequence | np.ndarray) and not isinstance(value, str | bytes)
    entries = list(value) if is_list else []
    if not entries or not all(isinstance(entry, str) or is_whole(entry) for entry in entries):
        raise InputError(
            expected=f"{name}: a list with a name for each label",
            got=in_words(value),
            do=f'write {name}=["first", "second", ...]',
        )
    names = tuple(str(entry) for entry in entries)
    if len(set(names)) < len(names):
        twice = next(entry for entry in names if names.count(entry) > 1)
        raise InputError(expected=f"{name}: each once", got=f"{twice!r} more than once", do="give classes other names")
    return names


def check_whole_list(name: str, value: Any, least: int = 0, *, at_least: int = 0) -> tuple[int, ...]:
    """Check a sequence of whole numbers.

    Args:
        name: of the argument.
        value: what came: a list, a tuple, a range, a set, or a one-dimensional array or tensor.
        least: the smallest that may be.
        at_least: how many there must be.

    Returns:
        The numbers.

    Raises:
        InputError: for anything else, a single number and a text among it.
    """
    array: Any = value
    is_vector = getattr(value, "ndim", 1) == 1 and not isinstance(value, str | bytes | Mapping)
    entries = array.tolist() if hasattr(value, "tolist") and is_vector else value
    if not is_vector or not isinstance(entries, Iterable):
        raise InputError(
            expected=f"{name}: a list of whole numbers", got=in_words(value), do=f"write {name}=[...] or range(...)"
        )
    numbers_in = tuple(entries)
    for entry in numbers_in:
        if not (is_whole(entry) and entry >= least):
            raise InputError(
                expected=f"{name}: whole numbers >= {least}",
                got=f"{in_words(entry)} among them",
                do=f"write {_nearest_whole(entry, least, None)} in its place",
            )
    if len(numbers_in) < at_least:
        raise InputError(
            expected=f"{name}: at least {at_least} numbers",
            got=f"{len(numbers_in)} (an iterator is empty once it was read)",
            do=f"write {name}=[...] or range(...)",
        )
    return tuple(int(entry) for entry in numbers_in)


def check_mapping(name: str, value: Any, *, or_none: bool = False, least: int = 0) -> dict[str, Any]:
    """Check a mapping with texts as keys.

    Args:
        name: of the argument.
        value: what came.
        or_none: whether None may be, too, for an empty one.
        least: how many entries there must be.

    Returns:
        A dict.

    Raises:
        InputError: for anything else.
    """
    if value is None and or_none:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value) or len(value) < least:
        raise InputError(
            expected=f"{name}: a dict with texts as keys" + (f", at least {least}" if least else ""),
            got=in_words(value),
            do=f'write {name}={{"name": ...}}',
        )
    return dict(value)


@overload
def check_path(name: str, value: Any) -> Path: ...


@overload
def check_path(name: str, value: Any, *, or_none: bool) -> Path | None: ...


def check_path(name: str, value: Any, *, or_none: bool = False) -> Path | None:
    """Check a path and expand its ~.

    Args:
        name: of the argument.
        value: what came.
        or_none: whether None may be, too.

    Returns:
        A ``Path``, or None.

    Raises:
        InputError: for what is no path, an empty one, one with an over-long name, or the home of nobody.
    """
    if value is None and or_none:
        return None
    if not isinstance(value, str | os.PathLike) or not isinstance(os.fspath(value), str):
        raise InputError(
            expected=f"{name}: a path" + (", or None" if or_none else ""),
            got=in_words(value),
            do="give a text or a pathlib.Path",
        )
    text = os.fspath(value)
    if not text.strip() or "\0" in text:
        got = "an empty text" if not text.strip() else "a path with a NUL character"
        raise InputError(expected=f"{name}: a path", got=got, do=f"write the name of a file or folder as {name}")
    if any(len(os.fsencode(part)) > 255 for part in Path(text).parts) or len(os.fsencode(text)) > 4095:
        raise InputError(
            expected=f"{name}: a path whose parts have at most 255 bytes", got=in_words(text), do="use a shorter name"
        )
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise InputError(
            expected=f"{name}: a path in a home folder that there is", got=in_words(text), do="write the path out"
        ) from error


def check_place(name: str, value: Any, *, or_none: bool = False) -> Any:
    """Check a path at which something can be made: none of the folders that lead there is a file.

    Args:
        name: of the argument.
        value: what came.
        or_none: whether None may be, too.

    Returns:
        A ``Path``, or None.

    Raises:
        InputError: as `check_path`, and for a path through a file.
    """
    path = check_path(name, value, or_none=or_none)
    for folder in () if path is None else path.parents:
        try:
            if folder.is_dir():
                break
            is_other = folder.exists()
        except OSError as error:
            raise InputError(
                expected=f"{name}: a path in folders that can be read",
                got=in_words(str(path)),
                do="choose another path",
            ) from error
        if is_other:
            raise InputError(
                expected=f"{name}: a path in a folder",
                got=f"{str(folder)!r}, which is a file",
                do="choose another path",
            )
    return path


def make_folder(name: str, folder: Any) -> Path:
    """Make a folder where there is none.

    Args:
        name: of the argument.
        folder: where.

    Returns:
        The folder.

    Raises:
        InputError: for what is no path, a file, or a place where nothing can be made.
    """
    place = check_place(name, folder)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        got = f"a file, {str(place)!r}" if place.exists() else f"{type(error).__name__} at {str(place)!r}"
        raise InputError(expected=f"{name}: a folder that can be written", got=got, do="choose another") from error
    return place


def check_instance(name: str, value: Any, kind: type | tuple[type, ...], example: str, *, or_none: bool = False) -> Any:
    """Check that a value is of a class of ours, or None.

    Args:
        name: of the argument.
        value: what came.
        kind: the class, or classes.
        example: how such a value is written.
        or_none: whether None may be, too.

    Returns:
        The value.

    Raises:
        InputError: for anything else; a class in place of an instance is told so.
    """
    if isinstance(value, kind) or (value is None and or_none):
        return value
    kinds = kind if isinstance(kind, tuple) else (kind,)
    words = " or ".join(_with_article(each.__name__) for each in kinds)
    is_class = isinstance(value, type) and issubclass(value, kinds)
    raise InputError(
        expected=f"{name}: {words}" + (", or None" if or_none else ""),
        got=in_words(value),
        do=f"make one: {getattr(value, '__name__', '')}(...)" if is_class else f"write for example {name}={example}",
    )


def _with_article(name: str) -> str:
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name.lstrip('_')}"


def check_array(
    name: str,
    value: Any,
    shape: Sequence[int | None] | None = None,
    *,
    finite: bool = True,
    least: float = -math.inf,
    empty: bool = False,
) -> np.ndarray:
    """Check an array of numbers of a shape.

    Args:
        name: of the argument.
        value: what came: an array, a tensor on any device, or nested lists.
        shape: the size of each dimension, None where any will do; any shape unless given.
        finite: whether NaN and infinity are refused.
        least: the smallest number that may be.
        empty: whether it may have no numbers.

    Returns:
        A float64 array.

    Raises:
        InputError: for anything else.
    """
    array = as_numbers(name, value)
    fits = shape is None or (
        array.ndim == len(shape) and all(n in (None, m) for n, m in zip(shape, array.shape, strict=True))
    )
    if not fits or (array.size == 0 and not empty):
        asked = "any shape" if shape is None else f"shape ({', '.join('any' if n is None else str(n) for n in shape)})"
        raise InputError(
            expected=f"{name}: numbers of {asked}" + ("" if empty else ", not empty"),
            got=f"shape {array.shape}",
            do=f"pass {name} with these dimensions in this order",
        )
    if finite and not np.isfinite(array).all():
        raise InputError(
            expected=f"{name}: finite numbers",
            got=f"{int((~np.isfinite(array)).sum())} of {array.size} NaN or infinite",
            do="leave them out, or find where they come from",
        )
    if array.size and bool((array < least).any()):
        raise InputError(
            expected=f"{name}: numbers >= {least:g}", got=f"{np.nanmin(array):g}", do=f"correct {name} where it is less"
        )
    return array


def as_numbers(name: str, value: Any) -> np.ndarray:
    """A float64 array of whatever holds numbers.

    Args:
        name: of the argument.
        value: what came.

    Returns:
        The array; tensors are detached and brought to the CPU.

    Raises:
        InputError: for texts, sets, dicts, generators, models, ragged lists and complex numbers.
    """
    array = plain_array(value)
    if array is None or array.dtype.kind not in "biuf":
        raise InputError(
            expected=f"{name}: an array of real numbers",
            got=in_words(value) if array is None else f"an array of {_kind_in_words(array)}",
            do="pass an array, a tensor, or lists of numbers of equal length",
        )
    return array.astype(np.float64)


def plain_array(value: Any) -> np.ndarray | None:
    """A numpy array of an array-like, without a copy where that can be; None where there is none."""
    if value is None or isinstance(value, str | bytes | Mapping | set | frozenset | type) or callable(value):
        return None
    if isinstance(value, Iterable) and not isinstance(value, Collection):
        return None  # a generator
    try:
        if hasattr(value, "detach"):
            tensor: Any = value
            value = tensor.detach().cpu()
            value = value.float() if str(value.dtype) in ("torch.bfloat16", "torch.float16") else value
        elif isinstance(value, list | tuple) and any(hasattr(entry, "detach") for entry in value):
            value = [entry.detach().cpu().tolist() if hasattr(entry, "detach") else entry for entry in value]
        array = np.asarray(value)
    except Exception:  # whatever an array-like may raise, it is no array
        return None
    return array


def _kind_in_words(array: np.ndarray) -> str:
    kinds = {"U": "texts", "S": "bytes", "O": "objects", "c": "complex numbers", "M": "dates", "m": "durations"}
    return kinds.get(array.dtype.kind, str(array.dtype))


def check_labels(name: str, value: Any, n: int | None = None, n_classes: int | None = None) -> np.ndarray:
    """Check a vector of class labels, as numpy.

    Args:
        name: of the argument.
        value: what came: an array, a tensor or a list.
        n: how many there must be.
        n_classes: labels must be below it.

    Returns:
        An int64 array.

    Raises:
        InputError: for names, floats, one-hot rows, negative labels, labels out of range, or another number of them.
    """
    array = plain_array(value)
    if array is None or array.ndim != 1 or array.dtype.kind not in "iu":
        raise InputError(
            expected=f"{name}: a vector of integer class labels",
            got=in_words(value) if array is None else f"{_kind_in_words(array)} of shape {array.shape}",
            do=advice_for_labels(name, array),
        )
    if n is not None and len(array) != n:
        raise InputError(expected=f"{name}: {n} labels", got=str(len(array)), do="give one label for each sample")
    high = n_classes - 1 if n_classes is not None else None
    if len(array) and (array.min() < 0 or (high is not None and array.max() > high)):
        raise InputError(
            expected=f"{name}: labels " + (">= 0" if high is None else f"in 0..{high}"),
            got=f"labels from {array.min()} to {array.max()}",
            do="relabel the classes 0, 1, 2, ..., and leave out samples without a class",
        )
    return array.astype(np.int64)


def advice_for_labels(name: str, array: np.ndarray | None) -> str:
    """What to do about labels that are none.

    Args:
        name: of the argument.
        array: them, as far as they are an array.
    """
    name = as_code(name)
    if array is not None and array.dtype.kind in "US":
        return f"number the classes: numpy.unique({name}, return_inverse=True)[1]"
    if array is not None and array.ndim == 2:
        return f"of one-hot rows take {name}.argmax(1)"
    if array is not None and array.dtype.kind in "fb":
        return f"if they are whole, pass {name}.astype(int); of a tensor, {name}.long()"
    return "pass a list, array or tensor of whole numbers, one a sample"
