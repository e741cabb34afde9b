"""The studies of the theory, at a size for tests."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import local_elasticity as le
from local_elasticity.data.regression import regression
from local_elasticity.similarity.phases import find_phases
from local_elasticity.studies import STUDIES
from local_elasticity.studies.dan2023.flows import FLOWS, exact, nine_tenths, problems
from local_elasticity.studies.dan2023.regression import (
    BASE,
    REGRESSION,
    SCALES,
    LockStep,
    Scale,
    Setting,
    dataset,
    follow,
    look_times,
    squared,
)
from local_elasticity.studies.dan2023.ridge import PUBLISHED_LOSSES, RIDGE


def verdicts(folder):
    return {c["name"]: c["verdict"] for c in json.loads((folder / "claims.json").read_text())["claims"]}


@pytest.mark.exhaustive
def test_ridge_reproduces_the_stored_losses_and_finds_no_phases_as_defined(tmp_path, capsys, request):
    study = replace(RIDGE, draws=50)
    assert study.run_at(400, "test", tmp_path) == 1  # as defined there are no two phases: the paper's claim fails
    found = verdicts(tmp_path)
    for p in (10, 100):
        assert found[f"p={p}, as published: the stored losses (needs the broadcast)"] == "holds"
        assert found[f"p={p}, as published: the drawn curve"] == "holds"
        assert found[f"p={p}, as published: S_rel rises by 2 decades or more"] == "holds"
        assert found[f"p={p}, as defined: elastic, then inelastic phase (the paper's claim)"] == "fails"
        assert found[f"p={p}, as defined: S_rel is flat (derived)"] == "holds"
        assert found[f"p={p}: S_rel(h, h) = 1"] == "holds"
    assert found["p=10, as published: mean loss path"] == "holds"
    assert (tmp_path / "figures" / "ridge.png").stat().st_size > 10_000
    assert "1/N" in capsys.readouterr().out

    written = (tmp_path / "p10.npz").stat().st_mtime_ns
    (tmp_path / "p100.npz").write_bytes(b"cut off")  # made again, and p10 is kept
    before = (tmp_path / "claims.json").read_text()
    request.getfixturevalue("undrawn")
    study.run_at(400, "test", tmp_path)
    assert (tmp_path / "p10.npz").stat().st_mtime_ns == written
    assert (tmp_path / "claims.json").read_text() == before
    with pytest.raises(le.InputError, match="draws"):
        replace(study, draws=51).run_at(400, "test", tmp_path)


def test_another_seed_gives_other_losses():
    for seed, same in ((5, True), (6, False)):
        features, starts = RIDGE._draw(10, np.random.RandomState(seed))
        loss = RIDGE._flow(features, published=True).restarted(starts).loss(0.0).ravel()[:3]
        assert np.allclose(loss, PUBLISHED_LOSSES[10], rtol=1e-8) == same


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are built, and not rendered."""
    for study in ("flows", "regression", "ridge"):
        target = f"local_elasticity.studies.dan2023.{study}.save"
        monkeypatch.setattr(target, lambda figure, folder, name: [folder / name])


@pytest.mark.usefixtures("undrawn")
def test_flows_hold_at_a_small_size(tmp_path):
    FLOWS.run_at(10, np.geomspace(0.05, 100, 15), (0.04, 0.02), "test", tmp_path)
    found = verdicts(tmp_path)
    late = [name for name in found if name.startswith("diagonal, d = 2")]
    assert len(late) == 2
    assert {v for name, v in found.items() if name not in late} == {"holds"}
    assert {found[name] for name in late} == {"fails"}  # 10 sources and 15 looks are too few to see phases


def test_the_inelastic_phase_begins_when_the_last_coordinate_has_grown():
    problem = problems(20)["diagonal, d = 2"]
    t = np.geomspace(0.01, 1000, 60)
    phases = find_phases(t, exact(problem, t))
    assert phases.verdict == "two phases"
    half = problem.flow.transition_times().max()
    assert half < phases.change_point < 2 * half
    assert phases.interval[0] <= nine_tenths(problem.flow) <= phases.interval[1]


TINY = Scale((BASE, Setting(data="linear")), seeds=5, updates=60, looks=9, sources=5, targets=12, samples=40)


@pytest.mark.exhaustive
@pytest.mark.usefixtures("undrawn")
def test_regression_runs_resumes_and_repeats(tmp_path, capsys):
    status = REGRESSION.run_at(TINY, "test", tmp_path / "a")
    found = verdicts(tmp_path / "a")
    assert status == int("fails" in found.values())
    assert set(found.values()) <= {"holds", "fails"}
    assert len(found) == 2 * 2 + 1
    assert "data d" in capsys.readouterr().out  # decides, or does not decide
    kept = dict(np.load(tmp_path / "a" / f"{BASE.name}.npz"))
    assert kept["near"].shape == (len(look_times(60, 9)), 5, 5, 3)
    again = follow(BASE, TINY)
    for name, values in kept.items():
        np.testing.assert_array_equal(again[name], values, err_msg=name)
    assert np.median(kept["near"]) > np.median(kept["far"])


def test_lock_step_equals_training_one_by_one():
    x, y, _ = dataset("sine-10", 30)
    together = LockStep(BASE, x, y, 3, 4)
    for _ in range(20):
        together.update()
    for seed in range(3):
        torch.manual_seed(seed)
        model = le.networks.MLP(10, 1, depth=2, width=50).double()
        stream = torch.Generator().manual_seed(1000 + seed)
        opt = torch.optim.SGD(model.parameters(), lr=BASE.lr)
        for _ in range(20):
            rows = torch.randint(30, (4,), generator=stream)
            opt.zero_grad()
            squared(model(x[rows]), y[rows]).backward()
            opt.step()
        for name, w in together.replica(seed).named_parameters():
            torch.testing.assert_close(w, dict(model.named_parameters())[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("name", "rows", "columns"), [("diabetes", 442, 10), ("fair", 6366, 8)])
def test_regression_sets_are_standardised(name, rows, columns):
    package = {"diabetes": "sklearn", "fair": "statsmodels"}[name]
    pytest.importorskip(package, reason=f"{name} is inside {package}, which is not installed")
    x, y, origin = regression(name)
    assert x.shape == (rows, columns)
    assert str(rows) in origin
    torch.testing.assert_close(x.mean(0), torch.zeros(columns).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(y.std(correction=0), torch.tensor(1.0).double())


def test_what_is_missing_or_unknown_is_named(tmp_path, monkeypatch):
    import sys

    with pytest.raises(le.InputError, match="did you mean 'diabetes'"):
        regression("diabetis")
    with pytest.raises(le.InputError, match="one of"):
        dataset("cosine", 10)
    monkeypatch.setitem(sys.modules, "statsmodels", None)
    monkeypatch.setitem(sys.modules, "statsmodels.datasets", None)
    scale = replace(TINY, settings=(BASE, Setting(data="fair")))
    with pytest.raises(le.InputError, match=r"local-elasticity\[regression\]"):
        REGRESSION.run_at(scale, "test", tmp_path / "b")
    assert not (tmp_path / "b").exists()  # said before the work


def test_the_studies_are_listed_with_their_cost():
    for name in ("dan2023-ridge", "dan2023-flows", "dan2023-regression"):
        assert set(STUDIES[name].cost) >= {"small", "paper"}
    assert len({s.data for s in SCALES["paper"].settings}) == 7
    assert SCALES["paper"].seeds == 20
