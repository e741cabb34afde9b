"""The command line follows neural collapse, and continues with it."""

import pytest

import local_elasticity as le
from local_elasticity.cli import main

COMMAND = [
    *("track", "--data", "geomnist", "--classes", "ellipse", "triangle", "--per-class", "12", "--network", "mlp"),
    *("--epochs", "1", "--batch-size", "8", "--probes-per-class", "3", "--every", "2", "--update", "sgd:0.01"),
    *("--definition", "he_su", "--collapse", "penultimate", "outputs"),
]


def run(*arguments):
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    return stopped.value.code


@pytest.mark.exhaustive
def test_track_follows_collapse_and_shows_it(tmp_path, capsys):
    out = tmp_path / "run"
    assert run(*COMMAND, "--out", str(out)) == 0
    collapse = le.open_run(out).collapse.load()
    assert collapse["layer"].values.tolist() == ["penultimate", "outputs"]
    assert collapse["nc1"].shape == (2, 2)
    assert collapse["nc3"].notnull().any("step").values.tolist() == [True, False]
    assert (out / "figures" / "collapse_curves-he_su-sgd_0.01.png").stat().st_size > 10_000
    assert "collapse curves" in (out / "report.html").read_text()
    assert run(*COMMAND[:-1], "--out", str(out)) == 2
    assert "others for collapse" in capsys.readouterr().err
    assert run(*COMMAND[:-1], "fc", "--out", str(tmp_path / "other")) == 2
    error = capsys.readouterr().err
    assert "a layer of the network" in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "other" / "run.zarr").exists()
