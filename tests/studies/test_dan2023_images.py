"""The image studies: tiny versions on files made here, their resumption, their tables, and claims that can fail."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr
from image_data import write_cifar10, write_cifar100, write_svhn

import local_elasticity as le
from local_elasticity.data import files
from local_elasticity.studies import STUDIES
from local_elasticity.studies.dan2023 import claims as judge
from local_elasticity.studies.dan2023 import images as study
from local_elasticity.studies.dan2023 import modern, tables
from local_elasticity.studies.engine.claims import status

pytestmark = pytest.mark.exhaustive

TINY = study.Scale(per_class=6, batch_size=6, epochs=2, runs=1, probes_per_class=2, every=2, test_per_class=2)


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder of data sets, and nothing else to be found."""
    folder = tmp_path / "data"
    monkeypatch.setenv(files.ENVIRONMENT, str(folder))
    monkeypatch.setattr(files, "__file__", str(tmp_path / "p/src/package/data/files.py"))  # no neighbouring data
    monkeypatch.setattr(files, "cache_folder", lambda: tmp_path / "cache")
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def small(name, scale="small"):
    """The study with a network that costs nothing."""
    whole = STUDIES[name]
    conditions = tuple(replace(c, network="simple-conv") for c in whole.conditions[scale])
    return replace(whole, conditions={scale: conditions})


class Killed(BaseException):
    pass


def test_it_runs_judges_and_draws(data, tmp_path, capsys):
    write_cifar10(data)
    out = tmp_path / "study"
    result = small("dan2023-cifar10").run_at(replace(TINY, runs=2, every=3), "small", out)
    said = capsys.readouterr().out
    claims = json.loads((out / "claims.json").read_text())["claims"]
    assert result == int(any(claim["verdict"] == "fails" for claim in claims))
    assert {claim["verdict"] for claim in claims} <= {"holds", "fails", "not judged"}
    assert {claim["source"] for claim in claims} == {"C1", "C2", "C3", "C4", "C5"}
    assert "per_class 6" in said
    assert "cifar-10-batches-bin" in (out / "claims.md").read_text()
    assert all(definition in said for definition in study.DEFINITIONS)
    assert (out / "report.html").exists()
    assert {path.name for path in (out / "figures").glob("*.png")} == {"separation.png", "curves.png", "training.png"}
    assert all((out / claim["figure"]).is_file() for claim in claims)
    rows = (out / "separation.csv").read_text().splitlines()
    assert len(rows) == 1 + len(study.PROBES) * len(study.DEFINITIONS) * 3 * 2
    runs = [le.open_run(out / f"run-{index}").dataset for index in range(2)]
    # batch 0 of 3 in each of two epochs, counted after the update
    assert [one["step"].values.tolist() for one in runs] == [[1, 4]] * 2
    assert not np.array_equal(runs[0]["after"].values, runs[1]["after"].values)
    assert np.array_equal(runs[0]["source_index"].values, runs[1]["source_index"].values)
    assert not list(out.glob("run-*/checkpoint"))  # finished: nothing is left to continue from
    record = json.loads((out / "run-1/record.json").read_text())
    assert record["looks"] == 2
    assert set(record["seconds"]) == {"training", "tracking", "testing", "saving", "controls"}


def series_of(out, runs=1):
    found = [le.open_run(out / f"run-{index}").dataset.load() for index in range(runs)]
    folders = [out / f"run-{index}" for index in range(runs)]
    return tables.Series(STUDIES["dan2023-cifar10"].conditions["small"][0], found, folders, [], 0)


def test_an_interrupted_study_continues_to_the_same_numbers(data, tmp_path, monkeypatch):
    write_cifar10(data)
    rare = replace(TINY, every=3)
    tiny = replace(small("dan2023-cifar10"), report=lambda *_: 0)  # judged above
    tiny.run_at(rare, "small", tmp_path / "whole")
    update, done = study.Session._update, []

    def dies(session, positions):
        done.append(1)
        if len(done) == 2:  # between two snapshots
            raise Killed
        return update(session, positions)

    monkeypatch.setattr(study.Session, "_update", dies)
    with pytest.raises(Killed):
        tiny.run_at(rare, "small", tmp_path / "broken")
    monkeypatch.setattr(study.Session, "_update", update)
    # and once more between a snapshot and its control
    control = study._Run._measure_controls
    monkeypatch.setattr(study._Run, "_measure_controls", lambda *_: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        tiny.run_at(rare, "small", tmp_path / "broken")
    monkeypatch.setattr(study._Run, "_measure_controls", control)
    torch.manual_seed(999)
    tiny.run_at(rare, "small", tmp_path / "broken")
    one, other = series_of(tmp_path / "whole"), series_of(tmp_path / "broken")
    for mine, theirs in zip(one.datasets, other.datasets, strict=True):
        np.testing.assert_array_equal(mine["after"].values, theirs["after"].values)
    np.testing.assert_array_equal(one.tables.values, other.tables.values)
    for name in ("permuted", "none"):
        mine, theirs = one.controls(name), other.controls(name)
        assert sorted(mine) == sorted(theirs)
        assert mine
        assert all(np.array_equal(mine[k]["after"], theirs[k]["after"]) for k in mine)
    with pytest.raises(le.InputError, match="others for seed"):
        replace(tiny, seed=5).run_at(rare, "small", tmp_path / "broken")
    # more runs may join, and those that are there stay as they are
    tiny.run_at(replace(rare, runs=2), "small", tmp_path / "broken")
    assert len(list((tmp_path / "broken").glob("run-*/record.json"))) == 2

    # The slow twins of the tables, on the same run.
    data0 = one.datasets[0]
    labels, ids = data0["source_label"].values, data0["source_index"].values
    run = le.open_run(tmp_path / "whole/run-0")
    for update, definition in ((study.PROBE, "kl"), ("sgd:0.01", "suhe_published"), (study.LIMIT, "l1")):
        s = run.s_rel(definition, update).values[-1]
        np.testing.assert_array_equal(one.pairs(update, definition)[0, -1], s)
        weights = tables._denominators(data0, update, definition)[-1]
        for self_pairs in tables.SELF:
            plain = le.by_class(
                s,
                labels,
                labels,
                exclude_self=self_pairs == "out",
                source_ids=ids,
                target_ids=ids,
                denominators=weights,
                n_boot=0,
            )
            for statistic, wanted in (
                ("mean", plain.values),
                ("median", plain.median),
                ("ratio_of_means", plain.ratio_of_means),
            ):
                found = one.curves(update, definition, statistic, self_pairs)[0, -1]
                np.testing.assert_allclose(found, wanted, rtol=1e-12)
    stored = data0.sel(update=study.PROBE, definition="kl_published").isel(step=-1)
    assert float(stored["intra"]) == pytest.approx(
        tables.intra_inter(one.curves(study.PROBE, "kl_published"))[0][0, -1], rel=1e-6
    )
    # The limit is what ever smaller steps come to.
    for definition in ("kl", "kl_reverse", "l2", "he_su"):  # without eps, which such small divergences do not exceed
        small_step = run.s_rel(definition, "sgd:0.0001", eps=0.0).values[0]
        assert np.median(np.abs(small_step / one.pairs(study.LIMIT, definition)[0, 0] - 1)) < 0.05
    # No step at all: the published measure equals its formula.
    assert judge.no_step_error(one) <= 1e-12
    assert not np.allclose(judge.stillness(data0["before"].values[-1]), 1.0, atol=1e-3)


def test_cifar100_and_svhn_are_read_from_their_official_files(data, tmp_path):
    write_cifar100(data)
    write_svhn(data)
    seen = {}

    def report(this, found, size, scale, out, waiting):
        seen[this.name] = (found[0].classes, found[0].records[0]["test_images"])
        return 0

    for name, scale in (("dan2023-cifar100", "paper"), ("dan2023-svhn", "small")):
        tiny = replace(small(name, scale), report=report)
        size = replace(TINY, epochs=1, every=3)
        assert tiny.run_at(size, scale, tmp_path / name) == 0
    assert seen == {
        "dan2023-cifar100": (["motorcycle", "orange", "wardrobe"], 12),
        "dan2023-svhn": (["0", "2", "4"], 12),
    }
    # the small scale of CIFAR-100 takes superclasses: enough images even in a subset
    images, _ = study.load(STUDIES["dan2023-cifar100"].conditions["small"][0], replace(TINY, per_class=60), 0)
    assert images.counts.tolist() == [60, 60, 60]


@pytest.mark.parametrize("name", ["dan2023-svhn", "dan2023-cifar10", "dan2023-cifar100"])
def test_data_that_are_not_at_hand_are_one_clear_message(name, data, tmp_path, monkeypatch):
    def offline(official, folder, progress=True):
        raise le.InputError(expected=official[0].file, got="a failed download", do=f"put it into {folder}")

    for module in ("matlab", "cifar"):
        monkeypatch.setattr(f"local_elasticity.data.{module}.fetch", offline)
    with pytest.raises(le.InputError, match="failed download"):
        STUDIES[name].run("paper", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_modern_networks_are_judged_together(data, tmp_path, monkeypatch, capsys):
    write_cifar10(data)
    conditions = tuple(
        study.Condition(
            "cifar10", ("airplane", "automobile", "ship"), network, optimizer, **modern.OPTIMIZERS[optimizer]
        )
        for network, optimizer in (
            ("resnet18-batchnorm:width=4", "sgd"),
            ("vit-small:patch=16,width=8,depth=1", "adamw"),
        )
    )
    tiny = replace(STUDIES["dan2023-modern"], conditions={"small": conditions})
    tiny.run_at(replace(TINY, epochs=1, every=3), "small", tmp_path / "study")
    claims = json.loads((tmp_path / "study/claims.json").read_text())["claims"]
    assert len(claims) == 2 + 2 * len(conditions) + 2
    assert [claim["verdict"] for claim in claims if claim["name"].startswith("control: without")] == ["holds"]
    assert (tmp_path / "study/figures/separation.png").exists()
    said = capsys.readouterr().out
    assert "BatchNorm, SGD" in said
    assert "ViT, AdamW" in said


# --- claims that hold and fail --------------------------------------------------------------------------------------


def made(intra, inter, definition_values=None, classes=3, probes=4, looks=None):
    """A series whose S_rel is given: own-class pairs ``intra``, others ``inter``, at every look."""
    intra, inter = np.asarray(intra, dtype=float), np.asarray(inter, dtype=float)
    looks = len(intra)
    names = ["airplane", "automobile", "ship"]
    own = np.arange(classes * probes) // probes
    same = own[:, None] == own[None, :]
    rng = np.random.default_rng(0)
    noise = 1 + 1e-3 * rng.standard_normal((looks, classes * probes, classes * probes))
    s = np.where(same, intra[:, None, None], inter[:, None, None]) * noise
    dataset = xr.Dataset(coords={"source_class": names, "epoch": ("step", np.arange(looks) * 0.5)})
    condition = STUDIES["dan2023-cifar10"].conditions["small"][0]
    series = tables.Series(condition, [dataset], [], [{"seed": 0}], 0)
    values = definition_values or {}
    for update in study.PROBES:
        for definition in study.DEFINITIONS:
            given = values.get(definition, s)
            series._pairs[update, definition] = given[None]
    found = np.stack(
        [
            np.stack(
                [
                    [
                        tables.class_tables(
                            series.pairs(u, d), np.ones((1, looks, classes * probes)), classes, k == "out"
                        )
                        for k in tables.SELF
                    ]
                    for d in study.DEFINITIONS
                ]
            )
            for u in study.PROBES
        ]
    )
    found = found.transpose(3, 4, 0, 1, 2, 5, 6, 7)
    series.__dict__["tables"] = xr.DataArray(
        found,
        dims=("run", "look", "update", "definition", "self_pairs", "statistic", "source_class", "target_class"),
        coords={
            "update": list(study.PROBES),
            "definition": list(study.DEFINITIONS),
            "self_pairs": list(tables.SELF),
            "statistic": list(tables.STATISTICS),
        },
    )
    return series


def verdicts(series, whole=True):
    claims = judge.check_claims(judge.Judging(series, whole))
    return {claim.name: claim.verdict for claim in claims}


def test_every_published_claim_can_hold_and_fail():
    good = verdicts(made([1.0065, 1.02, 1.03, 1.05], [1.0015, 0.95, 0.85, 0.78]))
    starts = "as published: kl_published starts where the authors' curves do"
    above = "as published: the pseudo-KL's intra curve lies above both inter curves"
    late, below, ends = (
        "as published: … and at every look of the last epoch",
        "as published: … its inter mean lies below its intra mean",
        "as published: … its inter mean ends below its intra mean",
    )
    stays, falls = (
        "as published: the pseudo-KL's intra mean stays near 1",
        "as published: its inter mean falls with training",
    )
    mixed = "as published: the mixed-norm measure does not separate"
    apart = "as published: … and ends with inter far above intra"
    for name in (starts, above, late, below, ends, stays, falls):
        assert good[name] == "holds", name
    assert good[mixed] == "fails"  # here all definitions separate
    early = verdicts(made([1.0065, 1.02], [1.0015, 0.95]), whole=False)
    assert [early[name] for name in (above, late, falls, mixed, apart)] == ["not judged"] * 5
    assert early[ends] == "holds"
    bad = verdicts(made([1.1, 0.9, 0.95, 0.9], [1.0, 0.92, 0.99, 1.05]))
    for name in (starts, above, late, below, ends, stays, falls):
        assert bad[name] == "fails", name
    flipped = verdicts(made([1.0, 2.0, 3.0, 4.0], [1.1, 4.0, 9.0, 20.0]))
    assert flipped[mixed] == "holds"
    assert flipped[apart] == "holds"
    assert status(judge.check_claims(judge.Judging(made([1.0, 0.9], [0.99, 0.95]), False))) == 1


def test_sharper_needs_more_looks_and_better_ranks():
    names = [f"as defined: KL against one norm (L1), {words}: sharper" for words in judge.STEPS.values()]
    weak, strong = made([1.0] * 4, [1.0] * 4), made([2.0] * 4, [1.0] * 4)
    pairs = {d: strong.pairs(study.PROBE, d)[0] for d in study.DEFINITIONS}
    sharp = made([1.0] * 4, [1.0] * 4, {**pairs, "l1": weak.pairs(study.PROBE, "l1")[0]})
    blunt = made([1.0] * 4, [1.0] * 4, {**pairs, "kl": weak.pairs(study.PROBE, "kl")[0]})
    assert [verdicts(sharp)[name] for name in names] == ["holds"] * len(study.PROBES)
    assert [verdicts(blunt)[name] for name in names] == ["fails"] * len(study.PROBES)


def test_ranks_are_the_share_of_target_pairs():
    rng = np.random.default_rng(3)
    s = np.round(rng.random((2, 9, 9)), 1)
    s[0, 0, 5] = np.nan
    found = tables.own_against_others(s, 3)
    for look in range(2):
        for source in range(9):
            wins = []
            for own in (t for t in range(9) if t // 3 == source // 3 and t != source):
                for other in (t for t in range(9) if t // 3 != source // 3):
                    a, b = s[look, source, own], s[look, source, other]
                    if np.isfinite(a) and np.isfinite(b):
                        wins.append(1.0 if a > b else 0.5 if a == b else 0.0)
            assert found[look, source] == pytest.approx(np.mean(wins), rel=1e-12)
    assert np.isnan(tables.own_against_others(s[:, :3, :3], 3)).all()  # one probe a class: no own target but itself


def test_resampled_means_are_of_resampled_probes():
    rng = np.random.default_rng(4)
    s = rng.random((2, 3, 6, 6))
    means = tables.resampled_means(s, 2, seed=0, repeats=400)
    assert means.shape == (400, 3, 2, 2)
    cells = s.reshape(2, 3, 2, 3, 2, 3).mean((0, 3, 5))
    np.testing.assert_allclose(means.mean(0), cells, atol=0.05)
    assert np.ptp(means[:, 0, 0, 0]) > 0
    same = tables.resampled_means(np.ones((1, 2, 6, 6)), 2, seed=0, repeats=3)
    np.testing.assert_allclose(same, 1.0)
