"""The page over several studies: every claim in one table, as published and as defined, with the verdict and figure."""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from local_elasticity.base.files import write_whole
from local_elasticity.base.markdown import table

COLUMNS = ("study", "claim", "expected", "as published", "as defined", "verdict", "figure")
STUDY_COLUMNS = ("study", "about", "hold", "fail", "not judged")
LARGEST_FIGURE = 2**20  # bytes of a figure that goes into the page


@dataclass
class Row:
    """One statement of a study.

    Attributes:
        study: its name.
        statement: the claim without the words that say how it was measured.
        expected: what was expected.
        seen: kind ("as published", "as defined") -> (seen, interval, verdict).
        figure: the study's figure that shows it; "" where there is none.
    """

    study: str
    statement: str
    expected: dict[str, str] = field(default_factory=dict)
    seen: dict[str, tuple[str, str, str]] = field(default_factory=dict)
    figure: str = ""


def write_overview(
    folders: Sequence[Path],
    names: Sequence[str],
    refused: Mapping[str, str],
    scale: str,
    out: Path,
    about: Mapping[str, str] | None = None,
) -> tuple[Path, int]:
    """Write ``claims-SCALE.html`` and ``claims-SCALE.md``.

    Args:
        folders: of the studies.
        names: of the studies, in the same order.
        refused: study -> why it was not run.
        scale: name of the scale.
        out: where to.
        about: study -> what it is about, in a few words.

    Returns:
        The page, and how many claims fail.
    """
    rows = [row for name, folder in zip(names, folders, strict=True) for row in rows_of(name, folder)]
    verdicts = [verdict for row in rows for _, _, verdict in row.seen.values()]
    counts = {word: verdicts.count(word) for word in ("holds", "fails", "not judged")}
    summary = (
        f"{len(names) - len(refused)} of {len(names)} studies, scale {scale}: {counts['holds']} claims hold, "
        f"{counts['fails']} fail, {counts['not judged']} are not judged at this scale"
    )
    out.mkdir(parents=True, exist_ok=True)
    lines = [_study_cells(name, rows, (about or {}).get(name, ""), refused.get(name)) for name in names]
    write_whole(out / f"claims-{scale}.md", _markdown(rows, lines, summary, refused, scale))
    page = out / f"claims-{scale}.html"
    write_whole(page, _page(rows, lines, summary, refused, dict(zip(names, folders, strict=True)), scale))
    print(summary)
    return page, counts["fails"]


def rows_of(name: str, folder: Path) -> list[Row]:
    """The claims of a study; one that was measured both ways is one row."""
    try:
        claims = json.loads((folder / "claims.json").read_text())["claims"]
    except (OSError, ValueError, KeyError):
        return []
    figures = sorted(path.relative_to(folder).as_posix() for path in (folder / "figures").glob("*.png"))
    rows: dict[str, Row] = {}
    for number, claim in enumerate(claims):
        kind = kind_of(claim)
        statement = re.sub(r"(, )?as (published|defined):? ?", " ", claim["name"]).strip(" :,")
        statement = re.sub(r"\s+", " ", statement)
        key = statement if kind not in getattr(rows.get(statement), "seen", {}) else f"{statement} {number}"
        row = rows.setdefault(key, Row(name, statement))
        row.expected[kind] = claim["expected"]
        row.seen[kind] = (claim["seen"], claim["interval"], claim["verdict"])
        row.figure = row.figure or claim.get("figure") or (figures[0] if figures else "")
    return list(rows.values())


def kind_of(claim: Mapping[str, str]) -> str:
    """Which column a claim belongs to; what says nothing was computed as defined."""
    published = claim.get("kind") == "as published" or (not claim.get("kind") and "as published" in claim["name"])
    return "as published" if published else "as defined"


def _cells(row: Row) -> dict[str, str]:
    seen = {kind: f"{said} ({interval})" if interval else said for kind, (said, interval, _) in row.seen.items()}
    expected = list(dict.fromkeys(row.expected.values()))
    verdicts = {kind: verdict for kind, (_, _, verdict) in row.seen.items()}
    alone = len(verdicts) == 1
    return {
        "study": row.study,
        "claim": row.statement,
        "expected": "; ".join(expected),
        "as published": seen.get("as published", ""),
        "as defined": seen.get("as defined", ""),
        "verdict": "; ".join(verdict if alone else f"{kind}: {verdict}" for kind, verdict in verdicts.items()),
        "figure": row.figure,
    }


def _study_cells(name: str, rows: Sequence[Row], about: str, refused: str | None) -> dict[str, str]:
    verdicts = [verdict for row in rows if row.study == name for _, _, verdict in row.seen.values()]
    counts = {"hold": "holds", "fail": "fails", "not judged": "not judged"}
    found = {column: str(verdicts.count(word)) for column, word in counts.items()}
    return {"study": name, "about": about + (" (not run)" if refused else ""), **found}


def _markdown(
    rows: Sequence[Row],
    studies: Sequence[Mapping[str, str]],
    summary: str,
    refused: Mapping[str, str],
    scale: str,
) -> str:
    lines = [f"# Claims of the papers, scale {scale}", "", summary + ".", ""]
    lines += [f"- {name}: not run: {why}" for name, why in refused.items()] + [""] * bool(refused)
    lines += table(STUDY_COLUMNS, [[cells[column] for column in STUDY_COLUMNS] for cells in studies], STUDY_COLUMNS[2:])
    claims = []
    for row in rows:
        cells = _cells(row)
        name = Path(cells["figure"]).name
        cells["figure"] = f"[{name}]({row.study}/{name})" if name else ""
        claims.append([cells[column] for column in COLUMNS])
    lines += ["", *table(COLUMNS, claims)]
    return "\n".join(lines) + "\n"


def _page(
    rows: Sequence[Row],
    studies: Sequence[Mapping[str, str]],
    summary: str,
    refused: Mapping[str, str],
    folders: Mapping[str, Path],
    scale: str,
) -> str:
    body, shown, begun = [], {}, set()
    for row in rows:
        cells = _cells(row)
        figure = folders[row.study] / row.figure if row.figure else None
        link = ""
        if figure is not None and figure.is_file() and figure.stat().st_size <= LARGEST_FIGURE:
            anchor = f"{row.study}-{figure.stem}"
            shown[anchor] = (row.study, figure)
            link = f'<a href="#{html.escape(anchor)}">{html.escape(figure.stem)}</a>'
        worst = "fails" if "fails" in cells["verdict"] else "holds" if "holds" in cells["verdict"] else "open"
        tds = "".join(f"<td>{html.escape(cells[column])}</td>" for column in COLUMNS[:5])
        mark = {"fails": "✗", "holds": "✓", "open": "–"}[worst]
        first = "" if row.study in begun else f' id="{html.escape(row.study)}"'
        begun.add(row.study)
        body.append(
            f'<tr class="{worst}"{first}>{tds}<td class="verdict">{mark} {html.escape(cells["verdict"])}</td>'
            f"<td>{link}</td></tr>"
        )
    studies_body = "\n".join(_study_row(cells, cells["study"] in begun) for cells in studies)
    head = "".join(f"<th scope=col>{html.escape(column)}</th>" for column in COLUMNS)
    notes = "".join(f"<li>{html.escape(name)}: not run: {html.escape(why)}</li>" for name, why in refused.items())
    pictures = "".join(
        f'<figure id="{html.escape(anchor)}"><img alt="{html.escape(anchor)}" src="data:image/png;base64,'
        f'{base64.b64encode(path.read_bytes()).decode()}"><figcaption>{html.escape(study)}: {html.escape(path.name)}'
        "</figcaption></figure>"
        for anchor, (study, path) in shown.items()
    )
    return _TEMPLATE.format(
        title=f"Claims of the papers, scale {html.escape(scale)}",
        summary=html.escape(summary),
        notes=f"<ul>{notes}</ul>" if notes else "",
        studies_head="".join(f"<th scope=col>{column}</th>" for column in STUDY_COLUMNS),
        studies=studies_body,
        head=head,
        body="\n".join(body),
        pictures=pictures,
    )


def _study_row(cells: Mapping[str, str], linked: bool) -> str:
    name = html.escape(cells["study"])
    tds = f'<td><a href="#{name}">{name}</a></td>' if linked else f"<td>{name}</td>"
    tds += f"<td>{html.escape(cells['about'])}</td>"
    for column, kind in (("hold", "holds"), ("fail", "fails"), ("not judged", "open")):
        shown = cells[column] if cells[column] != "0" else "–"
        tds += f'<td class="count {kind if shown != "–" else ""}">{shown}</td>'
    return f"<tr>{tds}</tr>"


_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>
:root {{ --ink: #1b1f24; --soft: #5a636e; --line: #d5dae0; --blue: #0072B2; --red: #B45F06; }}
body {{ margin: 0 auto; max-width: 1500px; padding: 1rem 1.25rem 3rem; color: var(--ink);
  font: 15px/1.4 system-ui, -apple-system, "Segoe UI", "Liberation Sans", Arial, sans-serif; }}
h1 {{ font-size: 1.5rem; margin: .2rem 0 .5rem; }} h2 {{ font-size: 1.1rem; margin: 1.5rem 0 .3rem; }}
#answer {{ font-size: 1.1rem; padding: .55rem .8rem; border-left: 4px solid var(--blue); background: #f1f6fa; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; min-width: 1000px; }}
th, td {{ padding: .3rem .6rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top;
  overflow-wrap: break-word; }}
td {{ max-width: 20rem; }}
th {{ position: sticky; top: 0; background: #fff; }}
td:nth-child(1) {{ white-space: nowrap; color: var(--soft); }} td:nth-child(3) {{ color: var(--soft); }}
.verdict, .count {{ white-space: nowrap; font-weight: 600; }}
.studies {{ min-width: 0; }} .studies td:nth-child(2) {{ max-width: 44rem; }}
.count {{ text-align: right; }} td.count:nth-child(3) {{ color: var(--soft); }}
.holds .verdict, td.count.holds {{ color: var(--blue); }} .fails .verdict, td.count.fails {{ color: var(--red); }}
.open .verdict {{ color: var(--soft); }}
figure {{ margin: 1rem 0; }} figure img {{ max-width: min(100%, 900px); height: auto; }}
figcaption {{ color: var(--soft); font-size: .85rem; }}
a {{ color: var(--blue); }} :focus-visible {{ outline: 3px solid #E69F00; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p id="answer">{summary}</p>
{notes}
<p>As published: the quantity that the papers' code computed. As defined: the papers' formula. A claim fails when what
was expected was not seen; it is not judged where the scale is too small for it.</p>
<h2>Studies</h2>
<div class="scroll"><table class="studies">
<thead><tr>{studies_head}</tr></thead>
<tbody>
{studies}
</tbody></table></div>
<h2>Claims</h2>
<div class="scroll"><table>
<thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody></table></div>
<h2>Figures</h2>
{pictures}
</body>
</html>
"""
