import numpy as np
import pytest
import torch
from torch.nn import functional as F

import local_elasticity as le
from local_elasticity import cli
from local_elasticity.base.errors import InputError
from local_elasticity.data import load_split
from local_elasticity.lesde.estimation.recordings import read_recording
from local_elasticity.networks import MLP
from local_elasticity.report.ensemble import fit_ensemble, read_ensemble

SMALL = ("--network", "mlp:depth=1,width=8", "--per-class", 12, "--replicas", 6, "--steps", 60, "--lr", 0.02)


def call(*words):
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(word) for word in words])
    return stopped.value.code


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("ensemble") / "run"
    words = (*SMALL, "--corruption", 0.25, "--probe", 20, "--probes-per-class", 4, "--collapse-layer", "hidden.0")
    assert call("train", *words, "--out", out) == 0
    return out


def test_train_writes_what_it_was_asked_for(folder, capsys):
    data = le.open_ensemble(folder)
    assert dict(data.sizes) | {"step": 60, "replica": 6, "output": 3, "layer": 2} == dict(data.sizes)
    shapes = le.data.geomnist(12, 12)
    labels = le.data.corrupt_labels(shapes.train[1], 0.25)
    assert int((labels != shapes.train[1]).sum()) == 9
    np.testing.assert_array_equal(data["labels"].values, labels.numpy()[data["samples"].values])
    assert data["logits"].dtype == np.float32
    ensemble = le.train_ensemble(
        lambda: MLP(1024, 3, depth=1, width=8),
        (shapes.train[0], labels),
        F.cross_entropy,
        lr=0.02,
        steps=60,
        replicas=6,
        dtype=torch.float32,
        validation=shapes.validation,
    )
    np.testing.assert_array_equal(data["logits"].values, ensemble.logits)
    np.testing.assert_array_equal(data["validation_accuracy"].values[-1], ensemble.validation_accuracy[-1])


def test_the_same_command_continues_and_another_is_refused(tmp_path, capsys):
    out = tmp_path / "run"
    words = (*SMALL, "--seed", 3)
    assert call("train", *words, "--out", out) == 0
    before = le.open_ensemble(out)["logits"].values
    assert call("train", *words, "--out", out) == 0
    said = capsys.readouterr()
    assert "continuing" in said.out
    np.testing.assert_array_equal(le.open_ensemble(out)["logits"].values, before)
    assert call("train", *words, "--weight-decay", 0.1, "--out", out) == 2
    assert "others for weight_decay" in capsys.readouterr().err
    assert call("train", *words, "--weight-decay", 0.1, "--out", out, "--overwrite") == 0
    assert np.abs(le.open_ensemble(out)["logits"].values - before).max() > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--corruption", 1.5), "--corruption: a finite number >= 0 and <= 1"),
        (("--batch-size", 37), "at most the 36 samples"),
        (("--classes", "ellipse", "elipse"), "did you mean 'ellipse'"),
        (("--data", "geomnist-varied", "--classes", "0", "9"), "classes of triangle"),
        (("--network", "simple-con"), "simple-conv"),
        (("--collapse-layer", "hidden.7"), "a layer of the network"),
    ],
)
def test_bad_words_end_with_one_line(tmp_path, capsys, words, said):
    small = SMALL[2:] if "--network" in words else SMALL
    assert call("train", *small, *words, "--out", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


def test_a_folder_of_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "letters.txt").write_text("mine")
    assert call("train", *SMALL, "--out", tmp_path, "--overwrite") == 2
    assert (tmp_path / "letters.txt").read_text() == "mine"


def test_estimate_reads_the_folder(folder, tmp_path, capsys):
    found = read_recording(folder)
    data = le.open_ensemble(folder)
    np.testing.assert_array_equal(found.data["logits"], data["logits"].values)
    np.testing.assert_array_equal(found.data["labels"], data["labels"].values)
    assert found.square
    assert found.class_names == ("triangle", "rectangle", "ellipse")
    words = ("--missing", "interpolate", "--n-boot", 5, "--out", tmp_path / "estimate")
    assert call("estimate", folder, *words) == 0
    assert (tmp_path / "estimate" / "estimate.json").exists()
    fit = le.estimate(logits=data["logits"].values, labels=data["labels"].values, missing="interpolate", n_boot=0)
    same = fit_ensemble(folder, n_boot=0)
    assert not isinstance(same, str)
    np.testing.assert_array_equal(same.A, fit.A)


def test_estimate_leaves_out_what_diverged_and_takes_probes_without_a_log(tmp_path):
    shapes = le.data.geomnist(8, 4)
    made = []

    def make():
        made.append(MLP(1024, 3, depth=1, width=8))
        if len(made) == 2:
            with torch.no_grad():
                made[-1].out.weight.fill_(torch.inf)
        return made[-1]

    le.train_ensemble(
        make,
        shapes.train,
        F.cross_entropy,
        lr=0.02,
        steps=12,
        replicas=4,
        dtype=torch.float32,
        log=False,
        probes=shapes.validation,
        store=tmp_path / "run",
    )
    found = read_recording(tmp_path / "run")
    assert found.data["class_means"].shape == (3, 13, 3, 3)
    assert "1 that diverged left out" in found.what
    assert read_ensemble(tmp_path / "run").diverged == 1


@pytest.mark.exhaustive
def test_report_writes_the_page_and_the_figures(folder, capsys):
    assert call("report", folder) == 0
    names = {path.name for path in (folder / "figures").glob("*.png")}
    assert names == {"class-means.png", "validation.png", "rates.png", "collapse.png"}
    page = (folder / "report.html").read_text()
    data = le.open_ensemble(folder)
    assert f"{float(data['validation_accuracy'].values[-1].mean()):.4g}" in page
    assert page.count("<img") == 4
    assert "http" not in page.replace("http-equiv", "")
    for word in ("hidden.0", "corruption", "0.25", "weight decay"):
        assert word in page


def test_splits_of_shapes_and_of_images():
    some = load_split("geomnist", ["ellipse", "0"], per_class=5)
    whole = le.data.geomnist(5, 5)
    assert some.class_names == ("ellipse", "triangle")
    for part, all_of_it in ((some.train, whole.train), (some.validation, whole.validation)):
        kept = all_of_it[1] != 1
        assert torch.equal(part[0], all_of_it[0][kept])
        assert torch.equal(part[1], (all_of_it[1][kept] == 0).long())
    assert len(some.factors["angle"]) == len(some.train[0]) + len(some.validation[0])
    varied = load_split("geomnist-varied", ["star", "ring"], per_class=3)
    assert varied.class_names == ("star", "ring")
    with pytest.raises(InputError, match="at least 2 different"):
        load_split("geomnist", ["ellipse", "ellipse"])
    pytest.importorskip("sklearn")
    digits = load_split("digits", ["3", "5"], per_class=4)
    assert digits.class_names == ("3", "5")
    assert len(digits.train[0]) == 8
