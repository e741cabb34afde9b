import numpy as np
import pytest
import xarray as xr
from synthetic_runs import heavy, synthetic, with_gaps

from local_elasticity.base.errors import InputError
from local_elasticity.report.reading import answer, colours, number, read, scale_of, warnings_for, words_for


def test_replicas_become_mean_and_one_sd():
    dataset = synthetic(replicas=3, snapshots=5)
    reading = read(dataset)
    values = dataset["mean"].transpose("replica", ...).values
    np.testing.assert_allclose(reading.data["mean"].values, values.mean(0))
    np.testing.assert_allclose(reading.data["mean_low"].values, values.mean(0) - np.std(values, axis=0, ddof=0))
    np.testing.assert_allclose(
        reading.data["intra_high"].values, (dataset["intra"].mean("replica") + dataset["intra"].std("replica")).values
    )
    assert reading.band == "mean and ±1 SD over 3 replicas"
    assert int(reading.data["n_pairs"][0, 0, 0, 0, 0]) == 1200


def test_replicas_need_not_come_first():
    dataset = synthetic(replicas=2, snapshots=4)
    moved = dataset.transpose("target_class", "step", "replica", ...)
    xr.testing.assert_allclose(read(dataset).data, read(moved).data)


def test_the_given_dataset_is_left_alone():
    dataset = synthetic(snapshots=3)
    before = dataset.copy(deep=True)
    read(dataset)
    xr.testing.assert_identical(dataset, before)


def test_a_run_object_is_read_through_its_dataset():
    class Run:
        dataset = synthetic(snapshots=2)

    assert read(Run()).classes == ["airplane", "automobile", "ship"]


def test_time_is_in_epochs_only_when_every_snapshot_knows_its_own():
    dataset = synthetic(snapshots=4)
    assert read(dataset).x[0] == "epoch"
    dataset["epoch"][1] = np.nan
    label, x = read(dataset).x
    assert label == "training step"
    np.testing.assert_array_equal(x, dataset["step"])
    assert read(dataset.drop_vars("epoch")).x[0] == "training step"
    assert read(synthetic(snapshots=4).set_coords("epoch")).x[0] == "epoch"


def test_scalars_are_grouped_and_empty_ones_dropped():
    dataset = synthetic(snapshots=4)
    dataset["learning_rate"] = ("step", np.ones(4))
    dataset["loss"] = ("step", np.full(4, np.nan))
    assert read(dataset).panels() == [
        ("loss", ["probe_loss", "train_loss"]),
        ("accuracy", ["probe_accuracy", "train_accuracy"]),
        ("learning_rate", ["learning_rate"]),
    ]


def test_averages_of_medians_are_unweighted_over_defined_cells():
    dataset = with_gaps(synthetic(snapshots=4))
    reading = read(dataset)
    intra, inter = (v[0] for v in reading.averages(reading.select(None, None), "median").values())
    cells = dataset["median"].values[:, 0, 0]
    np.testing.assert_allclose(intra, [np.nanmean(np.diag(c)) for c in cells])
    np.testing.assert_allclose(inter, [np.nanmean(c[~np.eye(3, dtype=bool)]) for c in cells])


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.0349, "1.035"), (0.0, "0.000"), (0.004, "4.00e-3"), (123456.0, "1.23e+5"), (np.nan, "–"), (np.inf, "∞")],
)
def test_numbers(value, text):
    assert number(value) == text


def test_the_answer_is_the_last_snapshot():
    dataset = synthetic(definitions=("kl",))
    text = answer(read(dataset), "kl", "adam:0.0001")
    last = dataset.isel(step=-1, update=0, definition=0)
    assert "step 433" in text
    for name in ("intra", "inter", "ratio", "ratio_low", "ratio_high"):
        assert number(float(last[name])) in text
    assert "The own class moved more" in text


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.9, 1.1, "no preference"), (1.1, 1.2, "Other classes moved more"), (np.nan, np.nan, "no verdict")],
)
def test_the_verdict_follows_the_interval(low, high, verdict):
    dataset = synthetic(snapshots=1, definitions=("kl",))
    dataset["ratio_low"][:], dataset["ratio_high"][:] = low, high
    assert verdict in answer(read(dataset), "kl", "adam:0.0001")


def test_the_published_ratio_is_not_called_a_movement():
    text = answer(read(synthetic()), "kl_published", "adam:0.0001")
    assert "moved its own class" not in text
    assert "does not tell how far" in text


def test_an_undefined_answer_says_so():
    dataset = synthetic(snapshots=1)
    dataset["intra"][:] = np.nan
    assert "undefined" in answer(read(dataset), "kl_published", "adam:0.0001")


def test_heavy_tails_are_answered_by_medians_and_warned_of():
    reading = read(heavy(with_gaps(synthetic())))
    assert "by the medians" in answer(reading, "kl_published", "adam:0.0001")
    texts = " ".join(warnings_for(reading, "kl_published", "adam:0.0001"))
    assert "Heavy tails" in texts
    assert "undefined" in texts


def test_noise_is_warned_of():
    dataset = synthetic(snapshots=2)
    dataset["below_noise_fraction"] = (("step", "update"), np.array([[0.0], [0.25]]))
    assert any("25.0 %" in text for text in warnings_for(read(dataset), "kl_published", "adam:0.0001"))


def test_a_run_may_bring_the_words_of_its_definitions():
    dataset = synthetic(snapshots=1)
    dataset.attrs["definitions"] = '{"kl_published": "ours"}'
    assert words_for(read(dataset), "kl_published") == "ours"
    assert "'new'" in words_for(read(dataset), "new")


def test_scales():
    assert scale_of(np.array([0.7, 1.1]), heavy=False).diverging
    assert not scale_of(np.array([0.1, 0.4]), heavy=False).diverging
    assert scale_of(np.array([0.01, 40.0]), heavy=False).log
    assert scale_of(np.array([0.5, np.nan, 0.5]), heavy=False).low < 0.5
    assert scale_of(np.array([np.nan]), heavy=True).low == 0


def test_the_two_sided_map_is_uniform_and_symmetric_in_lightness():
    rgb = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in colours(True)]) / 255
    linear = np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    y = linear @ [0.2126, 0.7152, 0.0722]
    lightness = 116 * np.cbrt(y) - 16
    assert (np.diff(lightness[:128]) > 0).all()
    assert (np.diff(lightness[128:]) < 0).all()
    assert np.diff(lightness[:128]).std() < 0.35


@pytest.mark.parametrize("wrong", [None, 3, xr.Dataset({"a": 1})])
def test_what_is_no_run_is_refused(wrong):
    with pytest.raises(InputError, match="expected"):
        read(wrong)


def test_a_run_without_snapshots_is_refused():
    with pytest.raises(InputError, match="step is empty"):
        read(synthetic(snapshots=2).isel(step=slice(0)))
