"""``local-elasticity report``."""

from __future__ import annotations

from pathlib import Path

from local_elasticity.cli.app import app, console
from local_elasticity.cli.track import finish


@app.command
def report(run: Path) -> int:
    """Write the page and the figures of a run.

    Example: local-elasticity report runs/digits

    Args:
        run: the run's folder, or its run.zarr; or the folder of an ensemble.
    """
    import local_elasticity as le
    from local_elasticity.runs.ensembles import is_ensemble

    if is_ensemble(run):
        from local_elasticity.report.ensemble import write_ensemble

        figures, page = write_ensemble(run)
        for figure in figures:
            if figure.suffix == ".png":
                console.print(f"figure: {figure}", markup=False)
        console.print(f"page:   {page}", markup=False)
        return 0
    opened = le.open_run(run)
    assert opened.path is not None
    return finish(opened, opened.path.parent)
