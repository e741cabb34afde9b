import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from local_elasticity.base.errors import IdentifiabilityWarning, InputError
from local_elasticity.data import TensorData, geomnist
from local_elasticity.lesde.model import LESDE
from local_elasticity.studies import STUDIES
from local_elasticity.studies.own.collapse_prediction import PREDICTION, Course
from local_elasticity.studies.wang2021 import trainings as wang2021
from local_elasticity.studies.wang2021.classes import CLASSES
from local_elasticity.studies.wang2021.corruption import CORRUPTION
from local_elasticity.studies.wang2021.direct import direct_matrix, summary
from local_elasticity.studies.wang2021.dynamics import DYNAMICS
from local_elasticity.studies.wang2021.imitation import IMITATION, halves, measures, published
from local_elasticity.studies.wang2021.reading import (
    crossing,
    fit,
    lowest,
    mean_of,
    own_logit,
    separation,
    simplex_mode,
)
from local_elasticity.studies.wang2021.size import SIZE
from local_elasticity.studies.wang2021.trainings import (
    PAPER_RATES,
    SIZES,
    Record,
    Size,
    Training,
    complete,
    train,
    trained,
)

pytestmark = pytest.mark.exhaustive

GEOMNIST = Training(
    n_train=30, n_validation=12, replicas=8, steps=96, lr=0.03, probes=4, checked=4, measured=3, sources=2
)
TINY = Size(
    geomnist=GEOMNIST,
    corrupted=4,
    rates=(0.0, 0.4, 0.8),
    sized=4,
    sizes=((12, 6),),
    cifar=Training(
        "cifar10", n_train=0, n_validation=0, replicas=6, steps=60, lr=0.01, probes=4, checked=4, measured=3, sources=2
    ),
    classes=(2, 3),
)


def fake_images(training):
    """Colour images in place of CIFAR-10, whose files a machine may lack."""
    if training.data == "geomnist":
        return geomnist_images(training)
    rng = torch.Generator().manual_seed(training.seed)
    k, parts = training.n_classes, []
    for count in (20, 8):
        y = torch.arange(k).repeat_interleave(count)
        x = torch.randn(len(y), 3, 32, 32, generator=rng) + 0.5 * y[:, None, None, None]
        parts.append((x, y))
    return TensorData(parts[0], parts[1], tuple("abcde"[:k]), "made up", {})


geomnist_images = wang2021.images


@pytest.fixture(scope="module")
def trainings(tmp_path_factory):
    """Every tiny training, made once for all tests of this file."""
    folder = tmp_path_factory.mktemp("trainings")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wang2021, "images", fake_images)
        for study in (DYNAMICS, CORRUPTION, SIZE, CLASSES):
            for training in study.needs(TINY):
                train(training, folder)
    return folder


@pytest.fixture
def clean(trainings):
    return Record(trainings / GEOMNIST.name)


# --- trainings -----------------------------------------------------------------------------------------------------


def test_paper_scale_is_as_published():
    paper = SIZES["paper"]
    assert paper.rates == PAPER_RATES
    assert len(paper.rates) == 10
    clean = paper.geomnist
    assert (clean.replicas, clean.steps, clean.lr, clean.n_train, clean.n_validation) == (100, 10_000, 0.005, 500, 500)
    assert (paper.cifar.steps, paper.cifar.lr, paper.cifar.n_train) == (30_000, 0.001, 2000)
    assert [a + b for a, b in paper.sizes] == [50, 100, 300, 600, 1000, 3000, 6000]
    assert paper.classes == (2, 3, 4, 5)
    small = SIZES["small"]
    assert (small.geomnist.replicas, small.geomnist.steps) == (60, 3000)


def test_studies_share_their_trainings():
    for scale in ("small", "paper"):
        size = SIZES[scale]
        for study in (DYNAMICS, CORRUPTION, SIZE, IMITATION, PREDICTION):
            assert size.geomnist in study.needs(size)
        assert size.cifar in CLASSES.needs(size)
        names = [t.name for study in (DYNAMICS, CORRUPTION, SIZE, CLASSES) for t in study.needs(size)]
        kinds = {t for study in (DYNAMICS, CORRUPTION, SIZE, CLASSES) for t in study.needs(size)}
        assert len(set(names)) == len(kinds), "two different trainings in one folder"


def test_killed_training_goes_on_to_the_same_numbers(tmp_path, clean, monkeypatch):
    """Stopped in the middle, by an exception as if killed, it continues from its checkpoint."""
    from local_elasticity.training.ensemble import train as ensemble

    monkeypatch.setattr(ensemble, "_CHECKPOINT_SECONDS", 0.0)
    real = wang2021._measuring

    def stops(*arguments):
        look = real(*arguments)

        def until(step, made):
            if step >= 63:
                raise KeyboardInterrupt
            look(step, made)

        return until

    monkeypatch.setattr(wang2021, "_measuring", stops)
    with pytest.raises(KeyboardInterrupt):
        train(GEOMNIST, tmp_path)
    place = tmp_path / GEOMNIST.name
    assert not complete(place)
    assert 0 < json.loads((place / "progress.json").read_text())["step"] < GEOMNIST.steps
    monkeypatch.setattr(wang2021, "_measuring", real)
    monkeypatch.setattr(ensemble, "_CHECKPOINT_SECONDS", 30.0)
    record = train(GEOMNIST, tmp_path)
    assert complete(place)
    np.testing.assert_array_equal(record.logits, clean.logits)
    np.testing.assert_array_equal(record.final["logits"], clean.final["logits"])
    assert record.direct is not None
    assert clean.direct is not None
    np.testing.assert_array_equal(record.direct["change"], clean.direct["change"])


def test_complete_trainings_are_found_beside_and_not_trained_again(tmp_path, trainings, monkeypatch):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "training").symlink_to(trainings)

    def never(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr(wang2021, "train_ensemble", never)
    records = trained([GEOMNIST], tmp_path / "study")
    assert records[0].logits.shape == (96, 8, 3)
    with pytest.raises(InputError, match="probes"):
        trained([replace(GEOMNIST, probes=5)], tmp_path / "study")


def test_a_record_holds_what_is_said_of_it(clean):
    data = geomnist(30, 12, seed=0)
    assert set(np.unique(clean.labels)) == {0, 1, 2}
    samples = clean.array("samples")
    np.testing.assert_array_equal(data.train[1].numpy()[samples], clean.labels)
    assert clean.probe_times[0] == 0
    assert clean.probe_times[-1] == GEOMNIST.steps
    logits, labels = clean.final["logits"].astype(float), clean.final["labels"]
    expected = np.stack([logits[:, labels[0] == k].mean(axis=1) for k in range(3)], axis=1)
    np.testing.assert_allclose(clean.final["means"], expected, atol=1e-5)
    np.testing.assert_allclose(clean.final["accuracy"], (logits.argmax(axis=2) == labels).mean(axis=1))
    assert not np.allclose(clean.final["means"], clean.probe_means[:, 0]), "the networks have not moved"


def test_corrupted_trainings_see_wrong_labels_and_clean_probes(trainings):
    record = Record(trainings / wang2021.corrupted(TINY, 0.4).name)
    data = geomnist(30, 12, seed=0)
    wrong = data.train[1].numpy()[record.array("samples")] != record.labels
    assert 0.3 < wrong.mean() < 0.5
    assert [int((record.final["labels"][0] == k).sum()) for k in range(3)] == [12, 12, 12]


# --- reading -------------------------------------------------------------------------------------------------------


def test_mean_of_is_students_interval():
    values = np.array([1.0, 2.0, 3.0, 4.0])
    seen = mean_of(values)
    reach = 3.182446 * values.std(ddof=1) / 2  # the quantile of 3 degrees of freedom
    np.testing.assert_allclose(seen, (2.5, 2.5 - reach, 2.5 + reach), rtol=1e-6)


def test_crossings_and_lowest_points():
    x = [0.0, 0.4, 0.6, 0.8]
    np.testing.assert_allclose(crossing(x, np.array([[0.0, 0.5, 1.5, 2.0]]), 1.0), [0.5])
    assert np.isnan(crossing(x, np.array([[0.0, 0.1, 0.2, 0.3]]), 1.0)).all()
    parabola = (np.array(x) - 0.55) ** 2
    np.testing.assert_allclose(lowest(x, parabola[None]), [0.55])
    assert lowest(x, np.array([[3.0, 2.0, 1.0, 0.5]])) == [0.8]


def test_separation_and_modes_of_known_configurations():
    means = 2 * (np.eye(3) - 1 / 3)
    assert own_logit(means) == pytest.approx(4 / 3)
    assert simplex_mode(means) == pytest.approx(np.linalg.norm(means[0]))
    assert simplex_mode(-means) == pytest.approx(-np.linalg.norm(means[0]))
    assert separation(means, np.full((3, 3), 0.5)) == pytest.approx(np.log(8 / 0.5))


def test_fit_of_a_record_is_estimate_of_its_arrays(clean):
    import local_elasticity as le

    some = np.array([0, 2, 4])
    ours = fit(clean, "isotropic", replicas=some, until=70, n_boot=0)
    keep = clean.probe_times <= 70
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", IdentifiabilityWarning)
        theirs = le.estimate(clean.probe_means[some][:, keep], clean.probe_times[keep], "isotropic", n_boot=0)
    np.testing.assert_array_equal(ours.A, theirs.A)
    logged = fit(clean, "isotropic", "log", n_boot=0)
    at = int(np.flatnonzero([set(row) >= {0, 1, 2} for row in clean.labels])[3])
    expected = np.stack([clean.logits[at][clean.labels[at] == k].mean(axis=0) for k in range(3)])
    np.testing.assert_allclose(logged.class_means[at], expected)


# --- the direct matrix ---------------------------------------------------------------------------------------------


class Invented:
    """A record whose movements follow E exactly."""

    def __init__(self, E, drift, networks=4):
        rng = np.random.default_rng(0)
        K = len(E)
        labels = np.repeat(np.arange(K), 5)
        before = rng.normal(size=(2, networks, len(labels), K)) + 2 * np.eye(K)[labels]
        mean = np.stack([before[:, :, labels == k].mean(axis=2) for k in range(K)], axis=2)
        u = (np.eye(K) - 1 / K) / np.sqrt((K - 1) / K)
        v = mean if drift == "isotropic" else np.einsum("trlp,lp->trl", mean, u)[..., None] * u
        change = np.einsum("kl,trlp->trlkp", E, v)[:, :, labels]  # looks, networks, sources, k, p
        change = change + 0.1 * (before - mean[:, :, labels])[:, :, :, None]  # no matter: mean 0 in each class
        self.direct = {"change": change, "before": before, "labels": labels, "times": np.array([0.0, 10.0])}
        self.direct |= {name: np.zeros((2, networks, K, K)) for name in ("isotropic", "logits")}


@pytest.mark.parametrize("drift", ["isotropic", "logits"])
def test_direct_matrix_finds_the_matrix(drift):
    E = np.array([[0.5, 0.1, 0.2], [0.0, 0.6, 0.1], [0.3, 0.1, 0.7]])
    found = direct_matrix(Invented(E, drift), drift)
    np.testing.assert_allclose(found.values, np.broadcast_to(E, (2, 3, 3)), atol=1e-10)
    np.testing.assert_allclose(found.draws, np.broadcast_to(E, found.draws.shape), atol=1e-10)
    assert found.average("gap", (0, 10)).value == pytest.approx(0.6 - 0.8 / 6)
    np.testing.assert_allclose(summary(E, "alpha"), 0.6)


def test_two_networks_give_no_interval():
    found = direct_matrix(Invented(np.eye(3), "isotropic", networks=2), "isotropic")
    assert np.isnan(found.average("gap", (0, 10)).low)
    assert np.isfinite(found.average("gap", (0, 10)).value)


# --- imitation and prediction --------------------------------------------------------------------------------------


def test_halves_divide_and_keep_the_measured_on_the_fitted_side(clean):
    for seed in range(5):
        half = halves(clean, seed)
        assert sorted([*half.fitted, *half.judged]) == list(range(8))
        assert set(half.fitted) >= {0, 1, 2}
        assert len(half.judged) == 4
    assert any(not np.array_equal(halves(clean, 0).judged, halves(clean, s).judged) for s in range(1, 5))


def test_published_imitation_takes_scale_and_sign_from_the_data(clean):
    """Its tail equals that of the fitted half in the coordinate of the scalar, whatever was simulated."""
    half = halves(clean, 0)
    simulated = published(half, "logits")
    data = fit(clean, "logits", "log", estimator="published", replicas=half.fitted, n_boot=0).class_means
    tail = data[-9:, 0, 0].mean()
    late = half.times >= clean.logits.shape[0] - 9
    assert np.sign(simulated.mean[late, 0, 0].mean()) == np.sign(tail)
    assert abs(simulated.mean[late, 0, 0].mean() / tail - 1) < 0.5


def test_measures_of_the_truth_are_perfect(clean):
    half = halves(clean, 1)
    truth = half.observed()
    from local_elasticity.studies.wang2021.imitation import Simulated

    found = measures(half, Simulated(truth, np.full(truth.shape, 1e6)))
    assert found["relative_rmse"] == 0
    assert found["r2"] == 1
    assert found["coverage"] == found["coverage_network"] == 1
    worse = measures(half, Simulated(-truth, np.zeros(truth.shape)))
    assert worse["relative_rmse"] == pytest.approx(2)
    assert worse["coverage_network"] == 0


def test_metrics_of_a_course_are_those_of_the_model():
    """NC1 and NC2 of exact class means and an isotropic spread, as `LESDE.collapse` has them."""
    X = np.array([[2.0, -0.5, 0.1], [-1.0, 1.5, -0.4], [-0.3, -0.6, 1.0]])
    sde = LESDE(0.3, -0.1, 3, "logits", 0.2, (X, 0.5))
    t = np.array([0.0, 1.0, 5.0])
    theirs = sde.collapse(t)
    variance = np.asarray(sde.within_variance(t)).mean(axis=(1, 2))
    course = Course(t, np.asarray(sde.mean(t))[None], variance[None], np.full((1, 3), np.nan))
    ours = course.metrics()
    np.testing.assert_allclose(10 ** ours["nc1"][0], theirs.nc1, rtol=1e-9)
    np.testing.assert_allclose(ours["nc2_equinorm"][0], theirs.equinorm, rtol=1e-9)
    off = ~np.eye(3, dtype=bool)
    np.testing.assert_allclose(ours["nc2_equiangle"][0], np.abs(theirs.cosine[:, off] + 0.5).mean(axis=1), rtol=1e-9)


# --- the studies, end to end ---------------------------------------------------------------------------------------

END_TO_END = {
    "wang2021-dynamics": (DYNAMICS, {"class-means", "rates", "loop"}),
    "wang2021-corruption": (CORRUPTION, {"corruption", "transition"}),
    "wang2021-size": (SIZE, {"size"}),
    "wang2021-classes": (CLASSES, {"classes"}),
    "wang2021-imitation": (IMITATION, {"imitation-geomnist", "imitation-cifar10"}),
    "collapse-prediction": (PREDICTION, {"collapse", "errors"}),
}


@pytest.fixture
def quick_figures(monkeypatch):
    """Every figure is drawn, small and without a layout, which takes most of the time."""
    from local_elasticity.report import figures

    def save(figure, folder, name):
        figure.set_layout_engine("none")
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / f"{name}.png", dpi=40)
        return [folder / f"{name}.png"]

    monkeypatch.setattr(figures, "save", save)


@pytest.mark.parametrize("name", END_TO_END)
def test_study_runs_end_to_end_on_shared_trainings(name, trainings, tmp_path, monkeypatch, quick_figures):
    study, figures = END_TO_END[name]
    assert STUDIES[name] is study

    def never(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr(wang2021, "train_ensemble", never)
    status = study.run_at(TINY, "tiny", tmp_path / name, trainings=trainings)
    written = json.loads((tmp_path / name / "claims.json").read_text())
    verdicts = {claim["verdict"] for claim in written["claims"]}
    assert written["claims"]
    assert verdicts <= {"holds", "fails", "not judged"}
    assert status == int("fails" in verdicts)
    assert {path.stem for path in (tmp_path / name / "figures").glob("*.png")} == figures
    with pytest.raises(InputError):
        study.run_at(TINY, "other", tmp_path / name, trainings=trainings)
