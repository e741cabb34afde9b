"""Options that several commands share, and their checks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter, Token

from local_elasticity.base.checks import (
    check_place,
    check_rate,
    check_whole,
)
from local_elasticity.base.errors import InputError

Words = Annotated[list[str] | None, Parameter(consume_multiple=True)]


def _whole_numbers(kind: Any, tokens: Sequence[Token]) -> Any:
    """Whole numbers as they were written: 1.5 is none, and is not rounded."""
    numbers = []
    for token in tokens:
        try:
            numbers.append(int(token.value))
        except ValueError:
            name = token.keyword or "the argument"
            raise InputError(
                expected=f"{name}: a whole number", got=repr(token.value), do=f"write for example {name} 3"
            ) from None
    return numbers if kind == list[int] else numbers[0]


Whole = Annotated[int, Parameter(converter=_whole_numbers)]
WholeOrNone = Annotated[int | None, Parameter(converter=_whole_numbers)]
Sizes = Annotated[list[int] | None, Parameter(consume_multiple=True, converter=_whole_numbers)]


def check_counts(**counts: int | None) -> None:
    """Refuse options that count something and are given as less than one."""
    for name, count in counts.items():
        check_whole(f"--{name.replace('_', '-')}", count, or_none=True)


def check_file(out: Path | None) -> None:
    """Refuse an --out that cannot be a file."""
    if out is not None and check_place("--out", out).is_dir():
        raise InputError(expected="--out: a file", got=f"a folder, {out}", do="write for example --out table.json")


def check_folder(option: str, place: Path | None) -> None:
    """Refuse an option that cannot be a folder."""
    if place is not None and check_place(option, place).is_file():
        raise InputError(expected=f"{option}: a folder", got=f"a file, {place}", do=f"choose another {option}")


def check_rates(**rates: float) -> None:
    """Refuse learning rates that are none."""
    for name, rate in rates.items():
        check_rate(f"--{name.replace('_', '-')}", rate)


def size_option(size: list[int] | None) -> dict[str, Any]:
    """The size of images as an option of `load`; none where it was not given."""
    if not size:
        return {}
    if len(size) > 2:
        given = " ".join(map(str, size))
        raise InputError(expected="--size: pixels, or height and width", got=given, do="give one or two numbers")
    return {"size": size[0] if len(size) == 1 else tuple(size)}


def images_option(
    data: str, classes: list[str] | None, per_class: int | None, seed: int, options: dict[str, Any]
) -> tuple[Any, Any, str]:
    """Training and test images of the chosen classes, and what the test images are."""
    import local_elasticity as le
    from local_elasticity.data.sets import other_split

    train = le.data.load(data, "train", **options)
    split, of_the_same = other_split(train, data)
    try:
        test = None if split is None else le.data.load(data, split, **options, **of_the_same)
    except InputError:
        if train.source == "folder":  # its split is there, and damaged
            raise
        test = None
    if classes:
        train = train.subset(classes)
        test = None if test is None else test.subset(classes)
    if per_class is not None:
        train = train.take(per_class, seed)
    return train, test, "none at hand" if test is None else f"{len(test)} images, {test.origin}"


def schedule_words(every: int, log_spaced: int | None, budget: float | None) -> str:
    """A schedule as it stands in the configuration."""
    if budget is not None:
        return f"budget({budget})"
    return f"log_spaced({log_spaced})" if log_spaced is not None else f"every({every})"


def schedule_option(every: int, log_spaced: int | None, budget: float | None, total: int) -> Any:
    """The schedule of ``--every``, ``--log-spaced`` or ``--budget``."""
    import local_elasticity as le

    if log_spaced is not None and budget is not None:
        raise InputError(expected="one schedule", got="--log-spaced and --budget", do="leave one of them out")
    if budget is not None:
        return le.budget(budget)
    return le.log_spaced(log_spaced, total) if log_spaced is not None else le.every(every)
