"""The table of a benchmark: its rows, and how they are printed, written and judged."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

VERDICTS = {None: "", True: "holds", False: "FAILS"}
Cells = Sequence[str]


@dataclass
class Row:
    """One line of a table.

    Attributes:
        what: what was timed or compared.
        value: what was found, where it is no time.
        seconds: of each round.
        ratio: in words.
        bound: in words.
        holds: whether it holds; None where nothing was asked.
        digits: how seconds are written.
    """

    what: str
    value: str = ""
    seconds: list[float] = field(default_factory=list)
    ratio: str = ""
    bound: str = ""
    holds: bool | None = None
    digits: str = ".4g"

    def cells(self) -> tuple[str, ...]:
        """What, median and smallest seconds (or what was found), ratio, bound, verdict."""
        middle, least = self.value, ""
        if self.seconds:
            middle, least = (f"{f(self.seconds):{self.digits}}" for f in (statistics.median, min))
        return self.what, middle, least, self.ratio, self.bound, VERDICTS[self.holds]


def machine(*more: str) -> str:
    """What it ran on."""
    return ", ".join(
        [
            f"torch {torch.__version__}",
            f"{torch.get_num_threads()} threads of {os.cpu_count()} processors",
            *more,
            f"{platform.system()} {platform.machine()}",
            f"Python {platform.python_version()}",
        ]
    )


def show(console: Console, title: str, headings: Cells, rows: Sequence[Cells]) -> None:
    """Print a table, verdicts in colour."""
    table = Table(*headings, title=title or None, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for *cells, verdict in rows:
        colour = {"holds": "green", "FAILS": "bold red"}.get(verdict, "")
        table.add_row(*(cell.replace("[", r"\[") for cell in cells), f"[{colour}]{verdict}[/]" if colour else verdict)
    console.print(table)


def report(
    console: Console, tables: Sequence[tuple[str, Cells, Sequence[Cells]]], notes: Sequence[str], out: Path | None
) -> int:
    """Print tables and notes, write them as markdown, and judge.

    Args:
        console: where to print.
        tables: (title, headings, rows of cells, the verdict last).
        notes: sentences below.
        out: file to write, too.

    Returns:
        0 where every bound holds, 1 where one does not.
    """
    written = []
    for title, headings, rows in tables:
        show(console, title, headings, rows)
        lines = [headings, ["---"] * len(headings), *rows]
        written += [title, "\n".join("| " + " | ".join(cells) + " |" for cells in lines)]
    notes = [note for note in notes if note]
    for note in notes:
        console.print(note, highlight=False, markup=False)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("\n\n".join(part for part in [*written, *notes] if part) + "\n", encoding="utf-8")
        console.print(f"written to {out}", highlight=False)
    return int(any(cells[-1] == VERDICTS[False] for _, _, rows in tables for cells in rows))
