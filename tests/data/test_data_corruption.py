"""Wrong labels: exact counts as published, chance by sample, every kind of data; and the second paper's subsets."""

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from local_elasticity import data
from local_elasticity.base.errors import InputError
from local_elasticity.data import LabelledImages, corrupt_labels

LABELS = torch.arange(3).repeat_interleave(500)[torch.randperm(1500, generator=torch.Generator().manual_seed(0))]


def confusion(old, new, k=3):
    return torch.bincount(k * old + new, minlength=k * k).reshape(k, k)


@pytest.mark.parametrize("rate", [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 2 / 3, 0.7, 0.8, 1])
def test_exact_counts_as_published(rate):
    new = corrupt_labels(LABELS, rate, seed=1)
    wrong = int(rate * 500)  # the published int(p * n_tr)
    half = wrong // 2
    rest = wrong - half
    right = 500 - wrong
    assert confusion(LABELS, new).tolist() == [[right, half, rest], [half, right, rest], [half, rest, right]]


def test_exact_counts_do_not_lose_a_sample_to_rounding():
    labels = torch.arange(2).repeat_interleave(100)
    assert int((corrupt_labels(labels, 0.29) != labels).sum()) == 58  # 0.29 * 100 is 28.999... in floating point


def test_exact_parts_for_more_classes_and_unequal_ones():
    labels = torch.arange(4).repeat_interleave(torch.tensor([10, 40, 7, 100]))
    found = confusion(labels, corrupt_labels(labels, 0.5), 4)
    # 5 = 1 + 1 + 3, 20 = 6 + 6 + 8, 3 = 1 + 1 + 1, 50 = 16 + 16 + 18
    assert found.tolist() == [[5, 1, 1, 3], [6, 20, 6, 8], [1, 1, 4, 1], [16, 16, 18, 50]]


def test_symmetric_is_by_chance_uniform_and_never_right():
    labels = torch.arange(5).repeat_interleave(4000)
    table = confusion(labels, corrupt_labels(labels, 0.4, kind="symmetric", seed=3), 5).double()
    right, wrong = table.diagonal(), table[~torch.eye(5, dtype=torch.bool)]
    assert (right - 2400).abs().max() < 4 * (4000 * 0.4 * 0.6) ** 0.5
    assert (wrong - 400).abs().max() < 4 * (4000 * 0.1 * 0.9) ** 0.5
    assert len(set(right.tolist())) > 1  # by chance: not exact
    chi2 = float(((wrong - wrong.mean()) ** 2 / wrong.mean()).sum())
    assert chi2 < 45  # 19 degrees of freedom: 0.07 % above
    assert int((corrupt_labels(labels, 1.0, kind="symmetric") == labels).sum()) == 0


@pytest.mark.parametrize("kind", ["exact", "symmetric"])
def test_seeded_and_the_global_streams_stay(kind):
    before = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    one, same, other = (corrupt_labels(LABELS, 0.3, kind=kind, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert np.array_equal(before[0], np.random.get_state()[1])  # noqa: NPY002
    assert torch.equal(before[1], torch.get_rng_state())


def test_every_kind_of_data():
    expected = corrupt_labels(LABELS, 0.3, seed=2)
    x = torch.randn(1500, 4)
    kept = LABELS.clone()
    pair = corrupt_labels((x, LABELS), 0.3, seed=2)
    assert pair[0] is x
    assert torch.equal(pair[1], expected)
    flat = corrupt_labels((x[:, 0], LABELS), 0.3, seed=2)  # inputs with one number each
    assert torch.equal(flat[1], expected)
    assert torch.equal(corrupt_labels(TensorDataset(x, LABELS), 0.3, seed=2).tensors[1], expected)
    array = corrupt_labels(LABELS.numpy(), 0.3, seed=2)
    assert isinstance(array, np.ndarray)
    assert np.array_equal(array, expected.numpy())
    assert torch.equal(corrupt_labels(LABELS.tolist(), 0.3, seed=2), expected)
    assert corrupt_labels([0, 1], 0.5).tolist() == [0, 1]  # two labels are no pair
    images = LabelledImages(
        torch.zeros(1500, 1, 2, 2, dtype=torch.uint8), LABELS, ("a", "b", "c"), "x", "here", "train", torch.arange(1500)
    )
    changed = corrupt_labels(images, 0.3, seed=2)
    assert torch.equal(changed.labels, expected)
    assert changed.images is images.images
    assert torch.equal(LABELS, kept)
    assert torch.equal(images.labels, kept)


def test_of_geomnist_only_the_training_labels_change():
    clean = data.geomnist(20, 10)
    noisy = corrupt_labels(clean, 0.5)
    assert int((noisy.train[1] != clean.train[1]).sum()) == 30
    assert noisy.train[0] is clean.train[0]
    assert torch.equal(noisy.validation[1], clean.validation[1])


def test_classes_without_samples_can_be_given_too():
    labels = torch.zeros(10, dtype=torch.int64)
    assert corrupt_labels(labels, 1.0, n_classes=3).bincount().tolist() == [0, 5, 5]


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (LABELS, {"rate": 1.01}, "rate in"),
        (LABELS, {"rate": -0.1}, "rate in"),
        (LABELS, {"rate": float("nan")}, "rate in"),
        (LABELS, {"rate": "0.1"}, "rate in"),
        (LABELS, {"kind": "symetric"}, "did you mean 'symmetric'"),
        (LABELS, {"n_classes": 2}, "labels in 0 ... 1"),
        (LABELS, {"seed": -1}, "seed"),
        (LABELS.float(), {}, "whole labels"),
        (LABELS[None], {}, "whole labels"),
        (torch.zeros(4, dtype=torch.int64), {}, "at least 2 classes"),
        ((torch.zeros(3, 2), LABELS), {}, "one label a sample"),
    ],
)
def test_bad_input(labels, options, message):
    with pytest.raises(InputError, match=message):
        corrupt_labels(labels, **{"rate": 0.5, **options})


# --- CIFAR-10 subsets ----------------------------------------------------------------------------------------------


@pytest.fixture
def official(tmp_path):
    """Ten training and four test images a class in the binary layout; every image has one grey of its own."""
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for split, per_class, first in (("data_batch_1", 10, 0), ("test_batch", 4, 200)):
        labels = np.arange(10, dtype=np.uint8).repeat(per_class)
        greys = (first + np.arange(len(labels))).astype(np.uint8)
        blob = np.concatenate([labels[:, None], np.repeat(greys[:, None], 3072, axis=1)], axis=1)
        (folder / f"{split}.bin").write_bytes(blob.tobytes())
    return tmp_path


def greys(x):
    assert torch.equal(x, x[:, :1, :1, :1].expand_as(x))
    return (x[:, 0, 0, 0] * 127.5 + 127.5).round().long()


def subset(folder, **options):
    return data.cifar10_subset(3, **{"n_train": 6, "n_validation": 2, "folders": folder, "download": False, **options})


def test_subset_without_replacement(official):
    made = subset(official)
    x, y = made.train
    assert x.dtype == torch.float32
    assert (x.shape, made.validation[0].shape) == ((18, 3, 32, 32), (6, 3, 32, 32))
    assert y.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert made.class_names == ("airplane", "automobile", "bird")
    found = greys(x)
    assert len(found.unique()) == 18
    assert torch.equal(found // 10, y)  # the label is that of the image
    assert torch.equal((greys(made.validation[0]) - 200) // 4, made.validation[1])
    assert "without replacement" in made.origin


def test_subset_with_replacement_as_published(official):
    made = subset(official, n_train=200, n_validation=50, replacement=True)
    found = greys(made.train[0])
    assert torch.equal(found // 10, made.train[1])
    counts = found.bincount(minlength=30)
    assert len(counts) == 30
    assert (counts - 20).abs().max() < 4 * 20**0.5 + 2  # uniform over the ten of each class
    assert torch.equal((greys(made.validation[0]) - 200) // 4, made.validation[1])
    assert " with replacement" in made.origin


def test_subset_is_seeded(official):
    for replacement in (False, True):
        one, same, other = (subset(official, replacement=replacement, seed=seed) for seed in (1, 1, 2))
        assert torch.equal(one.train[0], same.train[0])
        assert not torch.equal(one.train[0], other.train[0])


def test_subset_bad_input(official):
    with pytest.raises(InputError, match="at least 11 images of class 'airplane'"):
        subset(official, n_train=11)
    with pytest.raises(InputError, match="2 to 10 classes"):
        data.cifar10_subset(11)
    with pytest.raises(InputError, match="n_train"):
        subset(official, n_train=0, replacement=True)
