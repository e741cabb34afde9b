"""The figure with S_rel, alpha and beta, and neural collapse on one time axis."""

import json

import numpy as np
import pytest
import xarray as xr
from synthetic_runs import synthetic

from local_elasticity.base.errors import InputError
from local_elasticity.collapse import GEOMETRY
from local_elasticity.report import figures, write_all
from local_elasticity.report.collapse import collapse_curves, stored_rates
from local_elasticity.runs.run import Run

LAYERS = ["conv1", "penultimate"]


def with_collapse(snapshots=12, **options):
    run = synthetic(snapshots=snapshots, **options)
    fall = np.exp(-np.linspace(0, 6, snapshots))[:, None] * np.array([1.0, 0.3])
    nowhere = np.array([np.nan, 1.0])  # only one layer stands before the classifier
    for name in GEOMETRY:
        run[name] = (("step", "layer"), fall)
    for name in ("nc3", "nc4"):
        run[name] = (("step", "layer"), fall * nowhere)
    return run.assign_coords(layer=LAYERS)


def labels(figure):
    return [axis.get_ylabel().split("\n")[0] for axis in figure.axes]


def test_panels_share_the_time_axis_and_draw_the_numbers():
    run = with_collapse()
    t = run["step"].values.astype(float)
    rates = {"t": t, "alpha": np.linspace(0.02, 0, len(t)), "beta": np.full(len(t), -0.001)}
    figure = collapse_curves(run, rates=rates)
    assert labels(figure) == [
        "$S_{rel}$, mean",
        "impact per step",
        "NC1",
        "CDNV",
        "NC2 angles",
        "NC2 norms",
        "NC3",
        "NC4",
    ]
    figure.draw_without_rendering()
    limits = {axis.get_xlim() for axis in figure.axes}
    assert len(limits) == 1
    epoch = run["epoch"].values
    drawn = {axis.get_ylabel().split("\n")[0]: axis.lines for axis in figure.axes}
    assert np.array_equal(drawn["NC1"][1].get_ydata(), run["nc1"].sel(layer="penultimate"))
    assert np.allclose(drawn["impact per step"][0].get_xdata(), epoch)  # steps became epochs
    assert np.array_equal(drawn["impact per step"][0].get_ydata(), rates["alpha"])
    assert [line.get_label() for line in drawn["NC1"]] == LAYERS
    assert len(drawn["NC3"]) == 1
    assert figure.axes[2].get_yscale() == "log"


def test_without_an_estimate_there_is_no_panel_of_it(tmp_path):
    run = with_collapse()
    assert "impact per step" not in labels(collapse_curves(run))
    stored = Run(run, tmp_path / "run.zarr")
    assert stored_rates(stored) is None
    place = tmp_path / "estimate" / "estimate.json"
    place.parent.mkdir()
    for text in ("{", json.dumps({"series": {"t": [1, 2], "alpha": [None, None], "beta": [None, None]}})):
        place.write_text(text)  # damaged, or nothing estimated
        assert stored_rates(stored) is None
    place.write_text(json.dumps({"series": {"t": [1, 2, 50], "alpha": [None, 0.1, 0.0], "beta": [None, 0.0, 0.0]}}))
    found = stored_rates(stored)
    assert found is not None
    assert found["alpha"][1:].tolist() == [0.1, 0.0]
    assert "impact per step" in labels(collapse_curves(stored))


def test_replicas_have_a_band():
    run = with_collapse()
    other = run.copy(deep=True)
    other["nc1"] = 3 * run["nc1"]
    both = xr.concat([run, other], dim="replica", combine_attrs="override", data_vars="all")
    axis = collapse_curves(both).axes[1]
    assert np.allclose(axis.lines[0].get_ydata(), 2 * run["nc1"].sel(layer="conv1"))
    assert len(axis.collections) == 2


def test_it_is_written_with_the_others_where_there_is_collapse(tmp_path, monkeypatch):
    def save(figure, folder, name):
        return [folder / f"{name}.png"] if figure.axes else []

    monkeypatch.setattr(figures, "save", save)  # drawn, but not rendered
    written = [path.stem for path in write_all(with_collapse(4), tmp_path)]
    assert written[-1] == "collapse_curves-kl_published-adam_0.0001"
    assert [path.stem for path in write_all(synthetic(snapshots=4), tmp_path)] == written[:-1]
    with pytest.raises(InputError, match="neural collapse"):
        collapse_curves(synthetic(snapshots=2))
