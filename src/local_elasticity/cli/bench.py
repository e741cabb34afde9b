"""``local-elasticity bench``."""

from __future__ import annotations

import sys
from pathlib import Path

from local_elasticity.base.errors import InputError, nearest
from local_elasticity.cli.app import app
from local_elasticity.cli.options import check_file


@app.command
def bench(name: str = "snapshot", *, quick: bool = False, out: Path | None = None) -> int:
    """Run a benchmark: the plain reference, ours and the floor side by side; needs the source tree.

    Example: local-elasticity bench snapshot

    Args:
        name: which benchmark.
        quick: fewer repeats.
        out: write the table to this file too.
    """
    import runpy

    check_file(out)
    folder = Path(__file__).resolve().parents[3] / "benchmarks"
    known = sorted(path.stem for path in folder.glob("*.py")) if folder.is_dir() else []
    if not known:
        raise InputError(
            expected="the source tree with its benchmarks/ folder",
            got="an installed package",
            do='clone the repository and install it with pip install -e "."',
        )
    if name not in known:
        raise InputError(expected="a benchmark", got=repr(name), do=nearest(name, known))
    sys.path.insert(0, str(folder))  # as when the file is run by itself: they share the table
    module = runpy.run_path(str(folder / f"{name}.py"))
    return int(module["main"](quick=quick, out=out))
