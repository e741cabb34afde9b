"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[str] = ()) -> list[str]:
    """The lines of a table; a bar or a line break within a cell stays within it.

    Args:
        columns: their names.
        rows: cells, one a column.
        right: columns whose cells stand at the right.
    """
    marks = ["--:" if column in right else "---" for column in columns]
    return [_line(columns), f"|{'|'.join(marks)}|", *map(_line, rows)]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
