"""What every page is made of: its templates, pictures inside of it, and a file that is put in place whole."""

from __future__ import annotations

import base64
import html
import io
import os
import string
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

from local_elasticity.base.checks import check_path, in_short, in_words, make_folder
from local_elasticity.base.errors import InputError


def write_page_text(path: Path, text: str) -> Path:
    """Put the whole file in place at once, so that a reader never sees half a page.

    Raises:
        InputError: for a place that is a folder, or where nothing can be written.
    """
    make_folder("the folder of the page", path.parent)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        got = "a folder" if path.is_dir() else in_short(error)
        partial.unlink(missing_ok=True)
        raise InputError(
            expected="a file that can be written", got=f"{got}: {in_words(str(path))}", do="choose another path"
        ) from error
    return path


def read_part(name: str) -> str:
    """A file that pages are made of, from beside this one."""
    return resources.files("local_elasticity.report").joinpath(name).read_text(encoding="utf-8")


def template(name: str) -> string.Template:
    """The same, with places to fill."""
    return string.Template(read_part(name))


def plain_words(value: Any) -> str:
    """A setting as a person would write it."""
    if isinstance(value, dict):
        return ", ".join(f"{name}: {plain_words(v)}" for name, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(plain_words, value))
    return "not recorded" if value is None else str(value)


def embedded_figures(figures: Iterable[Any]) -> str:
    """The pictures, inside the page."""
    shown = [one for one in map(_embedded, figures) if one]
    if not shown:
        return ""
    return (
        '<section aria-labelledby="figures-title">\n<h2 id="figures-title">Figures</h2>\n'
        + "\n".join(shown)
        + "</section>"
    )


def _embedded(figure: Any) -> str:
    if hasattr(figure, "savefig"):
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=150)
        name, data = "figure", buffer.getvalue()
    else:
        path = check_path("each of figures", figure)
        if path.suffix.lower() != ".png":
            return ""
        if not path.is_file():
            raise InputError(
                expected="a PNG file", got=str(path), do="write it first: report.save(figure, folder, name)"
            )
        name, data = path.stem.replace("_", " "), path.read_bytes()
    source = base64.b64encode(data).decode("ascii")
    label = html.escape(name)
    return f'<figure><img alt="{label}" src="data:image/png;base64,{source}"><figcaption>{label}</figcaption></figure>'
