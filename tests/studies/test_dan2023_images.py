"""The first image study: a tiny version on files made here, its resumption, and claims that can fail."""

import json

import numpy as np
import pytest
import torch
import xarray as xr

import local_elasticity as le
from local_elasticity.data import files
from local_elasticity.studies import STUDIES
from local_elasticity.studies import dan2023_images as study
from local_elasticity.studies.claims import status

TINY = study.Scale(per_class=12, batch_size=6, epochs=2, runs=2)


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """A lossless subset in the binary layout: classes that differ in brightness, and noise."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "data" / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    for name, count in (("data_batch_1.bin", 14), ("test_batch.bin", 4)):
        labels = np.repeat(np.arange(10), count).astype(np.uint8)
        pixels = np.clip(rng.normal(40 + 20 * labels[:, None], 30, (len(labels), 3072)), 0, 255).astype(np.uint8)
        (folder / name).write_bytes(np.column_stack([labels, pixels]).tobytes())
    monkeypatch.setenv(files.ENVIRONMENT, str(tmp_path / "data"))
    monkeypatch.setattr(files, "__file__", str(tmp_path / "p/src/package/data/files.py"))  # no neighbouring data
    monkeypatch.chdir(folder)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(study, "DEFINITIONS", ("kl_published", "kl"))  # fewer figures
    return study.smaller(STUDIES["dan2023-cifar10"], probes_per_class=2, every=2, network="simple-conv")


class Killed(BaseException):
    pass


def test_it_runs_judges_and_draws(cifar, tiny, tmp_path, capsys):
    out = tmp_path / "study"
    result = tiny.run_at(TINY, "small", out)
    said = capsys.readouterr().out
    claims = json.loads((out / "claims.json").read_text())["claims"]
    assert result == int(any(claim["verdict"] == "fails" for claim in claims))
    assert {claim["verdict"] for claim in claims} <= {"holds", "fails", "not judged"}
    assert len(claims) == 5
    assert "cifar-10-batches-bin" in (out / "claims.md").read_text()
    assert all(definition in said for definition in study.DEFINITIONS)
    assert (out / "report.html").exists()
    assert list((out / "figures").glob("*.png"))
    runs = [le.open_run(out / f"run-{index}").dataset for index in range(2)]
    # batches 0, 2, 4 of 6 in each of two epochs, counted after the update
    assert [data["step"].values.tolist() for data in runs] == [[1, 3, 5, 7, 9, 11]] * 2
    assert not np.array_equal(runs[0]["after"].values, runs[1]["after"].values)
    assert np.array_equal(runs[0]["source_index"].values, runs[1]["source_index"].values)
    at = le.by_class(
        le.open_run(out / "run-0").s_rel("kl_published").values[-1],
        runs[0]["source_label"].values,
        runs[0]["target_label"].values,
    )
    stored = runs[0].sel(update=study.PROBE, definition="kl_published").isel(step=-1)
    assert float(stored["intra"]) == pytest.approx(at.intra, rel=1e-12)


def test_an_interrupted_study_continues_to_the_same_numbers(cifar, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("local_elasticity.report.write_all", lambda *_: [None])  # drawn above
    tiny.run_at(TINY, "small", tmp_path / "whole")
    update, done = study.Session._update, []

    def dies(session, positions):
        done.append(1)
        if len(done) == 16:  # in the second run
            raise Killed
        return update(session, positions)

    monkeypatch.setattr(study.Session, "_update", dies)
    with pytest.raises(Killed):
        tiny.run_at(TINY, "small", tmp_path / "broken")
    monkeypatch.setattr(study.Session, "_update", update)
    torch.manual_seed(999)
    tiny.run_at(TINY, "small", tmp_path / "broken")
    assert json.loads((tmp_path / "broken/claims.json").read_text()) == json.loads(
        (tmp_path / "whole/claims.json").read_text()
    )
    for index in range(2):
        one, other = (le.open_run(tmp_path / name / f"run-{index}").dataset for name in ("whole", "broken"))
        np.testing.assert_array_equal(one["after"].values, other["after"].values)
    with pytest.raises(le.InputError, match="others for seed"):
        study.smaller(tiny, seed=5).run_at(TINY, "small", tmp_path / "broken")


def curves(intra, inter):
    """A run that saw these curves by the published measure."""
    data = {"intra": intra, "inter": inter, "ratio": np.divide(inter, intra)}
    variables = {}
    for name, values in data.items():
        for suffix, shift in (("", 0.0), ("_low", -0.01), ("_high", 0.01)):
            variables[name + suffix] = (("step", "update", "definition"), np.asarray(values)[:, None, None] + shift)
    return xr.Dataset(variables, coords={"update": [study.PROBE], "definition": [study.MEASURE]})


def verdicts(intra, inter, paper_scale=True):
    return [claim.verdict for claim in study.check_claims([curves(intra, inter)], paper_scale)]


def test_every_claim_can_hold_and_fail():
    assert verdicts([1.0, 1.02, 1.05], [0.99, 0.9, 0.8]) == ["holds"] * 5
    assert verdicts([1.0, 1.02, 1.05], [0.99, 0.9, 0.8], paper_scale=False)[-1] == "not judged"
    assert verdicts([1.1, 1.02, 1.05], [0.99, 0.9, 0.8])[0] == "fails"
    assert verdicts([1.0, 0.97, 1.05], [0.99, 0.9, 0.8])[1] == "fails"
    assert verdicts([1.0, 1.0, 1.05], [1.01, 1.01, 0.8])[2:4] == ["fails", "holds"]
    assert verdicts([1.0, 1.02, 1.05], [0.99, 0.9, 1.2])[2:] == ["fails", "fails", "fails"]
    assert status(study.check_claims([curves([1.0, 0.9], [0.99, 0.8])], False)) == 1
    assert status(study.check_claims([curves([1.0, 1.01], [0.99, 0.8])], True)) == 0


def test_several_runs_are_judged_by_their_mean():
    runs = [curves([1.0, 1.0], [0.99, 0.9]), curves([1.0, 1.0], [0.99, 0.7])]
    claim = study.check_claims(runs, True)[-1]
    assert "to 0.8000" in claim.seen
    assert claim.interval == "at the end [0.7000, 0.9000]"
