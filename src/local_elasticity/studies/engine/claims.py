"""Claims of a paper, judged: what was expected, what was seen, how sure, and the verdict."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from local_elasticity.base.files import write_whole
from local_elasticity.base.markdown import table

Verdict = Literal["holds", "fails", "not judged"]


@dataclass(frozen=True)
class Claim:
    """One statement that a study checks.

    Attributes:
        name: the statement.
        expected: what the paper or its data lead one to expect.
        seen: what this run saw.
        interval: how sure: the interval, and of what.
        verdict: "holds", "fails", or "not judged" at this scale.
        kind: "as published" (the quantity that the code computed), "as defined" (the paper's formula), "control" or
            "derived"; read from the name where it is left out.
        source: which claim of the specification, for example "C1".
        figure: the figure that shows it, relative to the study's folder.
    """

    name: str
    expected: str
    seen: str
    interval: str
    verdict: Verdict
    kind: str = ""
    source: str = ""
    figure: str = ""


COLUMNS = ("name", "expected", "seen", "interval", "verdict")
HEADINGS = ("claim", *COLUMNS[1:])


def judged(condition: bool) -> Verdict:
    """The verdict of a condition."""
    return "holds" if condition else "fails"


def status(claims: Sequence[Claim]) -> int:
    """Exit status: 1 when a claim fails."""
    return int(any(claim.verdict == "fails" for claim in claims))


def write_claims(claims: Sequence[Claim], folder: Path, title: str, notes: Sequence[str]) -> Path:
    """Write the table as claims.json and claims.md; returns the latter."""
    content = {"title": title, "notes": list(notes), "claims": [asdict(claim) for claim in claims]}
    write_whole(folder / "claims.json", json.dumps(content, indent=2))
    lines = [f"# {title}", "", *(f"- {note}" for note in notes), ""]
    lines += table(HEADINGS, [[getattr(claim, column) for column in COLUMNS] for claim in claims])
    path = folder / "claims.md"
    write_whole(path, "\n".join(lines) + "\n")
    return path


def print_claims(claims: Sequence[Claim], title: str) -> None:
    """Show the table in the terminal."""
    from rich.console import Console
    from rich.table import Table

    shown = Table(title=title)
    for heading in HEADINGS:
        shown.add_column(heading)
    for claim in claims:
        shown.add_row(*(getattr(claim, column).replace("[", r"\[") for column in COLUMNS))
    Console().print(shown)
