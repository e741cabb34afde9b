"""What the library says when it cannot go on: one clear error, with what was expected, what came and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MOST_LISTED, FEW_LISTED = 40, 10  # names in an error
USER_ERRORS = (
    RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError, ArithmeticError,
)  # fmt: skip
"""What a user's model, loss or optimiser raises that does not work."""


class InputError(ValueError):
    """Bad input, refused early.

    Args:
        expected: what would have been right.
        got: what came instead.
        do: what the user can do about it.
    """

    def __init__(self, *, expected: str, got: str, do: str) -> None:
        self.expected, self.got, self.do = expected, got, do
        super().__init__(f"expected {expected}; got {got}; {do}")


class NoiseWarning(UserWarning):
    """Differences so small that float rounding could have made them."""


class IdentifiabilityWarning(UserWarning):
    """Data from which a quantity of the model cannot be told, or only badly."""


def nearest(name: str, names: Iterable[str]) -> str:
    """Say which of ``names`` comes nearest to ``name``, and list them all; of very many, the nearest ones."""
    names = sorted(names)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}? " if close else ""
    if len(names) > MOST_LISTED:
        some = difflib.get_close_matches(name, names, n=FEW_LISTED, cutoff=0.0)
        return f"{hint}known: {', '.join(some)} and {len(names) - len(some)} more"
    return f"{hint}known: {', '.join(names)}"


def first_line(error: BaseException) -> str:
    """The first line of what an error says; its name where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def missing_extra(package: str, extra: str, purpose: str) -> InputError:
    """The error for an import that an extra would have satisfied."""
    return InputError(
        expected=f"the package {package!r} ({purpose})",
        got="an environment without it",
        do=f'install the extra: pip install "local-elasticity[{extra}]"',
    )
