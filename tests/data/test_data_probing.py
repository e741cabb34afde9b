"""Probes: chosen by a seed alone, sorted by class, with their sample indices."""

import numpy as np
import pytest
import torch
from test_data_images import assert_untouched, make, random_state

from local_elasticity.base.errors import InputError
from local_elasticity.data import Probes, probes


def test_probes_of_images():
    images = make((30, 40, 50), size=8)
    before = random_state()
    chosen = probes(images, per_class=20, seed=3)
    assert_untouched(before)
    xs, ys = chosen
    assert ys.tolist() == [0] * 20 + [1] * 20 + [2] * 20
    assert torch.equal(images.labels[chosen.indices], ys)
    assert torch.equal(chosen.origin_indices, images.indices[chosen.indices])
    assert torch.equal(xs, images.tensors()[0][chosen.indices])
    assert len(set(chosen.indices.tolist())) == len(chosen) == 60
    assert (chosen.class_names, chosen.seed) == (images.class_names, 3)
    assert torch.equal(probes(images, 20, 3).indices, chosen.indices)
    assert not torch.equal(probes(images, 20, 4).indices, chosen.indices)


def test_probes_of_the_training_tensors_are_the_same_samples():
    images = make((30, 40, 50), size=8)
    x, y = images.tensors(augment=9)
    chosen = probes(images, per_class=5, tensors=(x, y))
    assert torch.equal(chosen.xs, x[chosen.indices])
    assert torch.equal(chosen.origin_indices, images.indices[chosen.indices])
    bare = probes((x, y), per_class=5)
    assert isinstance(bare, Probes)
    assert torch.equal(bare.indices, chosen.indices)
    assert torch.equal(bare.origin_indices, bare.indices)
    assert bare.class_names == ("0", "1", "2")
    with pytest.raises(InputError, match="built from this data set"):
        probes(images, per_class=5, tensors=(x.flip(0), y.flip(0)))


def test_probes_do_not_repeat_the_draw_of_take():
    images = make((300, 300, 300), size=2)
    taken = {index - 100 for index in images.take(20, seed=0).indices.tolist()}
    assert len(taken & set(probes(images, 20, seed=0).indices.tolist())) < 15


def test_one_class_or_one_probe_will_do():
    xs, ys = probes((torch.randn(7, 3), torch.zeros(7, dtype=torch.int32)), per_class=1)
    assert (xs.shape, ys.tolist(), ys.dtype) == ((1, 3), [0], torch.int64)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(4), "whole number"),
        (torch.zeros(4, dtype=torch.bool), "whole number"),
        (torch.zeros(4, 1, dtype=torch.long), "whole number"),
        (torch.zeros(3, dtype=torch.long), "each of 4 samples"),
        (torch.tensor([0, -1, 0, 1]), "labels from 0; got -1"),
        (torch.tensor([0, 2, 0, 2]), "at least 2 images of class '1'; got 0"),
        (torch.tensor([0, 0, 0, 1]), "at least 2 images of class '1'; got 1"),
    ],
)
def test_probes_refuse(labels, message):
    with pytest.raises(InputError, match=message):
        probes((torch.randn(4, 3), labels), per_class=2)


@pytest.mark.parametrize("dataset", [None, 3, torch.zeros(4), (torch.zeros(4),), (1, 2, 3)])
def test_probes_refuse_what_is_no_data(dataset):
    with pytest.raises(InputError):
        probes(dataset)
    with pytest.raises(InputError, match="per_class"):
        probes((np.zeros((4, 2)), torch.zeros(4, dtype=torch.long)), per_class=0)
