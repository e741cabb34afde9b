"""Labelled images: subsets, counts, tensors, the frozen augmentation."""

import random

import numpy as np
import pytest
import torch

from local_elasticity.base.errors import InputError
from local_elasticity.data import NORMALISATION, AugmentOnce, LabelledImages

NAMES = ("airplane", "automobile", "bird")


def make(n_per_class=(4, 5, 6), name="cifar10", channels=3, size=32, **more):
    labels = torch.repeat_interleave(torch.arange(len(n_per_class)), torch.tensor(n_per_class))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]
    pixels = np.random.default_rng(0).integers(0, 256, (len(labels), channels, size, size), np.uint8)
    return LabelledImages(
        torch.from_numpy(pixels),
        labels,
        NAMES[: len(n_per_class)],
        name,
        "made here",
        "train",
        100 + torch.arange(len(labels)),
        aliases={"plane": "airplane"},
        **more,
    )


def random_state():
    return torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002


def assert_untouched(before):
    after = random_state()
    assert torch.equal(before[0], after[0])
    assert np.array_equal(before[1], after[1])
    assert before[2] == after[2]


def test_subset_relabels_in_the_order_given_and_keeps_indices():
    images = make()
    part = images.subset(["bird", "PLANE"])
    assert part.class_names == ("bird", "airplane")
    assert part.counts.tolist() == [6, 4]
    assert torch.equal(part.indices, images.indices[images.labels != 1])
    for image, label, index in zip(part.images, part.labels, part.indices, strict=True):
        assert torch.equal(image, images.images[index - 100])
        assert images.labels[index - 100] == (2, 0)[label]
    assert part.origin == images.origin
    assert part.subset(["airplane"]).indices.tolist() == images.indices[images.labels == 0].tolist()


@pytest.mark.parametrize("classes", [[2, 0], ["2", "0"], ["Bird", 0], "bird, plane", [np.int64(2), "airplane"]])
def test_subset_by_names_numbers_and_text(classes):
    assert make().subset(classes).class_names == ("bird", "airplane")


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["brid"], "did you mean 'bird'"),
        ([3], r"0 \.\.\. 2; got 3"),
        (["7"], r"0 \.\.\. 2; got 7"),
        (["plane", 0], "'airplane' twice"),
        ([], "at least one class"),
        (["bird"], "none in cifar10 train"),
    ],
)
def test_subset_refuses(classes, message):
    images = make((4, 5, 0)) if message.startswith("none") else make()
    with pytest.raises(InputError, match=message):
        images.subset(classes)


def test_take_draws_by_its_seed_alone():
    images = make()
    before = random_state()
    part = images.take(3, seed=5)
    assert_untouched(before)
    assert part.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert len(set(part.indices.tolist())) == 9
    assert torch.equal(part.indices, images.take(3, seed=5).indices)
    assert not torch.equal(part.indices, images.take(3, seed=6).indices)
    assert set(images.take(2, seed=5).indices.tolist()) < set(part.indices.tolist())
    assert torch.equal(part.images, images.images[part.indices - 100])


def test_take_says_which_class_is_too_small():
    with pytest.raises(InputError, match="at least 5 images of class 'airplane'; got 4"):
        make().take(5, seed=0)
    for wrong in (0, 1.5, True):
        with pytest.raises(InputError, match="per_class"):
            make().take(wrong, seed=0)
    with pytest.raises(InputError, match="seed"):
        make().take(1, seed=-1)


def test_tensors_normalise_as_published():
    images = make()
    x, y = images.tensors()
    assert x.dtype == torch.float32
    assert y.dtype == torch.int64
    mean = torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)
    deviation = torch.tensor([0.2023, 0.1994, 0.2010]).view(3, 1, 1)
    torch.testing.assert_close(x, (images.images / 255 - mean) / deviation)
    torch.testing.assert_close(images.tensors(None)[0], images.images / 255)
    torch.testing.assert_close(images.tensors((0.5, 0.25))[0], (images.images / 255 - 0.5) / 0.25)
    other = make(name="something").tensors()[0]  # an unlisted set: [-1, 1]
    torch.testing.assert_close(other, images.images / 127.5 - 1)
    assert NORMALISATION["svhn"] == NORMALISATION["cifar100"] == NORMALISATION["cifar10"]
    assert make(white=16).tensors(None)[0].max() == 255 / 16
    for wrong in ((0.5, 0.0), ((0.1, 0.2), 1.0)):
        with pytest.raises(InputError, match="positive standard deviation"):
            images.tensors(wrong)


def test_augmentation_is_frozen_by_its_seed():
    images = make()
    before = random_state()
    x, _ = images.tensors(augment=3)
    assert_untouched(before)
    assert torch.equal(x, images.tensors(augment=AugmentOnce(3))[0])
    assert not torch.equal(x, images.tensors(augment=4)[0])
    assert torch.equal(images.tensors()[0], images.tensors(augment=AugmentOnce(0, padding=0, flip=0))[0])


def test_augmentation_is_one_of_81_crops_and_a_flip():
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(1, 256, (4000, 1, 8, 8), np.uint8))
    out = AugmentOnce(7, padding=4)(images)
    padded = np.zeros((4000, 16, 16), np.uint8)
    padded[:, 4:12, 4:12] = images[:, 0]
    crops = np.lib.stride_tricks.sliding_window_view(padded, (8, 8), (1, 2)).reshape(4000, 81, 8, 8)
    plain = (crops == out.numpy()).all((2, 3))
    flipped = (crops[..., ::-1] == out.numpy()).all((2, 3))
    moved = plain.sum(1) + flipped.sum(1) > 0
    assert moved.all()
    clear = plain.sum(1) + flipped.sum(1) == 1  # an all but black corner may be its own mirror image
    assert clear.mean() > 0.9
    assert flipped[clear].any(1).mean() == pytest.approx(0.5, abs=4 * 0.5 / np.sqrt(clear.sum()))
    counts = (plain | flipped)[clear].sum(0)
    expected = clear.sum() / 81
    assert ((counts - expected) ** 2 / expected).sum() < 80 + 5 * np.sqrt(2 * 80)


def test_augmentation_flips_always_or_never():
    images = make().images
    assert torch.equal(AugmentOnce(0, padding=0, flip=1)(images), images.flip(3))
    assert torch.equal(AugmentOnce(0, padding=0, flip=0)(images), images)
    for wrong in ({"padding": -1}, {"flip": 1.5}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            AugmentOnce(0, **wrong)


def test_nonsense_is_refused():
    images = make()
    good = {"class_names": NAMES, "name": "x", "origin": "", "split": "train"}
    with pytest.raises(InputError, match="uint8 images"):
        LabelledImages(images.images.float(), images.labels, indices=images.indices, **good)
    with pytest.raises(InputError, match="int64 labels"):
        LabelledImages(images.images, images.labels.int(), indices=images.indices, **good)
    with pytest.raises(InputError, match="int64 indices"):
        LabelledImages(images.images, images.labels, indices=images.indices[1:], **good)
    with pytest.raises(InputError, match="labels from 1 to 3"):
        LabelledImages(images.images, images.labels + 1, indices=images.indices, **good)


def test_it_shows_what_it_is():
    images = make()
    assert repr(images) == "LabelledImages(cifar10 train: 15 of 3x32x32, 3 classes; made here)"
    assert (len(images), images.shape, images.n_classes) == (15, (3, 32, 32), 3)
