"""GeoMNIST: as published, bit by bit where that can be stored, and the varied variant's independence."""

import numpy as np
import pytest
import torch

from local_elasticity import data
from local_elasticity.base.errors import InputError
from local_elasticity.data.geomnist import CENTRE, PUBLISHED, SHAPES, _base, polygon


@pytest.fixture(scope="module")
def published():
    return data.geomnist(500, 500, seed=0)


def sums(part, label):
    x, y = part
    return x[y == label].sum(dim=(1, 2, 3)).numpy()


def test_statistics_as_published(published):
    """The reference: the published code after numpy.random.seed(0), 500 + 500 images a class."""
    x, y = published.train
    assert x.shape == (1500, 1, 32, 32)
    assert x.dtype == torch.float64
    assert published.class_names == ("triangle", "rectangle", "ellipse")
    assert y.bincount().tolist() == published.validation[1].bincount().tolist() == [500] * 3
    for label, (mean, deviation) in enumerate(((218.808, 5.708), (152.998, 0.0198), (228.552, 42.642))):
        found = sums(published.train, label)
        assert found.mean() == pytest.approx(mean, abs=1e-3)
        assert found.std() == pytest.approx(deviation, abs=1e-3)
    assert float(x.mean()) == pytest.approx(0.19543, abs=1e-5)
    assert float(x.std(correction=0)) == pytest.approx(0.35538, abs=1e-5)
    assert -0.002 < float(x.min()) < 0
    assert 1 < float(x.max()) < 1.002


def test_base_images_equal_those_of_scikit_image():
    """Areas at places of the grid of 1,000, and the pixels of all images as one number; from scikit-image 0.26."""
    areas = {name: np.array([image.sum() for image in _base(name, 1000)[0]]) for name in PUBLISHED}
    assert (areas["ellipse"].min(), areas["ellipse"].max()) == (147, 299)
    assert set(areas["rectangle"]) == {153}
    assert areas["triangle"][[0, 499, 500, 999]].tolist() == [230, 209, 229, 230]
    weights = np.arange(1, 32 * 32 + 1).reshape(32, 32)
    marks = {name: sum(int((image * weights).sum()) for image in _base(name, 1000)[0]) for name in PUBLISHED}
    assert marks == MARKS


MARKS = {"triangle": 115840595, "rectangle": 80937000, "ellipse": 120851108}


def test_angle_and_size_are_tied_and_blur_is_not(published):
    factors = {name: values.reshape(2, 3, 500) for name, values in published.factors.items()}
    # One straight line through all images of a class: 176 degrees over the grid of the parameter.
    for label, (low, high) in enumerate(((-1, 1), (-1, 1), (5, 7))):
        parameter = factors["parameter"][:, label]
        line = 176 * 0.999 * (parameter - low) / (high - low)
        assert np.allclose(factors["angle"][:, label], line, atol=1e-9)
    assert 0.9 <= factors["blur"].min() < 0.901
    assert 1.099 < factors["blur"].max() < 1.1
    assert abs(np.corrcoef(factors["blur"].ravel(), factors["angle"].ravel())[0, 1]) < 0.06
    # Wide ellipses are large ones: the parameter belongs to the image beside it.
    areas = sums(published.train, 2)
    assert np.corrcoef(areas, factors["parameter"][0, 2])[0, 1] > 0.99


def test_training_and_validation_share_no_image(published):
    parameter = published.factors["parameter"].reshape(2, 3, 500)
    for label in range(3):
        assert len(np.unique(parameter[:, label])) == 1000


def test_seeds_and_the_global_stream():
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    one, same, other = (data.geomnist(5, 5, seed=seed) for seed in (3, 3, 4))
    assert np.array_equal(before, np.random.get_state()[1])  # noqa: NPY002
    assert torch.equal(one.train[0], same.train[0])
    assert not torch.equal(one.train[0], other.train[0])
    two = data.geomnist(5, 5, n_classes=2, seed=3)
    assert torch.equal(two.train[0], one.train[0][:10])  # a class is the same whatever the others


def test_polygon_has_its_border():
    square = polygon(np.array([1.0, 1, 4, 4]), np.array([2.0, 5, 5, 2]))
    assert square.sum() == 16
    assert np.array_equal(square, polygon(np.array([4.0, 4, 1, 1]), np.array([2.0, 5, 5, 2])))


# --- varied --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def varied():
    return data.geomnist(150, 50, variant="varied", n_classes=6, seed=1)


def test_varied_factors_are_independent_and_in_range(varied):
    factors = varied.factors
    ranges = {
        "row": (-3, 3),
        "column": (-3, 3),
        "angle": (0, 360),
        "size": (0.85, 1.15),
        "intensity": (0.6, 1),
        "blur": (0.9, 1.1),
    }
    assert set(factors) == set(ranges)
    for name, (low, high) in ranges.items():
        reach = high - low
        assert low <= factors[name].min() < low + 0.02 * reach
        assert high - 0.02 * reach < factors[name].max() <= high
        assert factors[name].std() == pytest.approx(reach / np.sqrt(12), rel=0.06)  # uniform
    label = np.concatenate([np.repeat(np.arange(6), 150), np.repeat(np.arange(6), 50)])
    together = np.corrcoef([*factors.values(), label])
    bound = 4 / np.sqrt(len(label))
    assert np.abs(together - np.eye(len(together))).max() < bound


def test_varied_images_show_their_factors(varied):
    """Place, size and intensity measured from the pixels of noiseless images."""
    clean = data.geomnist(60, 1, variant="varied", n_classes=6, seed=1, noise=0)
    x, y = clean.train[0][:, 0].numpy(), clean.train[1].numpy()
    drawn = {name: values[: len(x)] for name, values in clean.factors.items()}
    rows, columns = np.mgrid[:32, :32]
    mass = x.sum((1, 2))
    centre = CENTRE + drawn["row"], CENTRE + drawn["column"]
    assert np.abs((x * rows).sum((1, 2)) / mass - centre[0]).max() < 0.35
    assert np.abs((x * columns).sum((1, 2)) / mass - centre[1]).max() < 0.35
    area = mass / (drawn["intensity"] * drawn["size"] ** 2)
    for label in range(6):  # all shapes have the same area: no class can be told by its sum
        assert area[y == label].mean() == pytest.approx(120, rel=0.01)
    assert np.abs(x[:, [0, -1]]).max() < 0.02  # nothing is cut off
    assert np.abs(x[:, :, [0, -1]]).max() < 0.02


def test_varied_rotation_turns_the_shape():
    clean = data.geomnist(40, 1, variant="varied", n_classes=2, seed=0, noise=0, place=0)
    x = clean.train[0][clean.train[1] == 1][:, 0].numpy()  # rectangles have a long axis
    angle = clean.factors["angle"][40:80]
    rows, columns = np.mgrid[:32, :32] - CENTRE
    second = [(x * a * b).sum((1, 2)) for a, b in ((rows, rows), (columns, columns), (rows, columns))]
    axis = np.rad2deg(0.5 * np.arctan2(2 * second[2], second[1] - second[0]))  # from the column axis, in (-90, 90]
    off = (axis - angle + 90) % 180 - 90
    assert np.abs(off).max() < 1.5


def test_varied_noise_is_of_every_pixel():
    with_noise, without = (data.geomnist(4, 1, variant="varied", n_classes=6, noise=noise) for noise in (0.05, 0))
    noise = (with_noise.train[0] - without.train[0]).flatten(1).numpy()
    assert noise.std() == pytest.approx(0.05, rel=0.02)
    assert np.abs(np.corrcoef(noise) - np.eye(24)).max() < 0.15


def test_varied_classes_do_not_depend_on_each_other(varied):
    three = data.geomnist(150, 50, variant="varied", n_classes=3, seed=1)
    assert three.class_names == SHAPES[:3]
    assert torch.equal(three.train[0], varied.train[0][: 3 * 150])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_classes": 4}, "2 to 3 classes"),
        ({"n_classes": 1}, "n_classes"),
        ({"variant": "varied", "n_classes": 7}, "2 to 6 classes"),
        ({"variant": "puplished"}, "did you mean 'published'"),
        ({"n_train": 0}, "n_train"),
        ({"seed": -1}, "seed"),
        ({"variant": "varied", "place": 20}, "place"),
        ({"variant": "varied", "noise": float("nan")}, "noise"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(InputError, match=message):
        data.geomnist(**{"n_train": 2, "n_validation": 2, **options})


# --- by name -------------------------------------------------------------------------------------------------------


def test_by_name(published):
    train, test = data.load("GeoMNIST"), data.load("geomnist", "test")
    assert torch.equal(train.images, published.train[0])
    assert torch.equal(test.images, published.validation[0])
    x, y = train.tensors()  # in [0, 1] as published: no normalisation
    assert torch.equal(x, published.train[0].float())
    assert torch.equal(y, published.train[1])
    chosen = data.probes(train.subset(["ellipse", "triangle"]), per_class=3)
    assert torch.equal(chosen.xs, published.train[0].float()[chosen.origin_indices])
    assert data.load("geomnist-varied", per_class=2).counts.tolist() == [2] * 6
    with pytest.raises(InputError, match="split of geomnist"):
        data.load("geomnist", "validation")


def test_catalogue_lists_it():
    entries = {entry.name: entry for entry in data.catalogue()}
    assert entries["geomnist"].where.startswith("made here: triangle, rectangle, ellipse")
    assert entries["geomnist-varied"].classes == 6
