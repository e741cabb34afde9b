"""The readers on real files, where these are at hand."""

import pytest
import torch

from local_elasticity import data
from local_elasticity.base.errors import InputError


def at_hand(name, split="train", **options):
    try:
        return data.load(name, split, download=False, progress=False, **options)
    except InputError as error:
        if "none of them in" not in str(error):
            raise
        pytest.skip(f"{name} is not at hand: put its files into a folder named in {data.ENVIRONMENT}")


def test_cifar10_subset():
    train, test = at_hand("cifar10", source="subset"), at_hand("cifar10", "test", source="subset")
    assert 500 <= int(train.counts.min()) <= int(train.counts.max()) <= 5000
    assert int(test.counts.min()) > 0
    assert "lossless" in train.origin
    x, _ = train.tensors()
    assert x.mean((0, 2, 3)).abs().max() < 0.1  # the published constants fit the pixels
    assert (x.std((0, 2, 3)) - 1.23).abs().max() < 0.1  # ... but for the deviation, which is one an image, not overall
    three = train.subset(["plane", "car", "ship"]).take(500, seed=0)
    assert three.counts.tolist() == [500] * 3
    chosen = data.probes(three, per_class=20)
    assert torch.equal(train.labels[chosen.origin_indices], torch.tensor([0, 1, 8]).repeat_interleave(20))
    assert torch.equal(train.tensors()[0][chosen.origin_indices], chosen.xs)


def test_the_second_papers_subset():
    at_hand("cifar10", source="subset")
    options = {"source": "subset", "download": False, "progress": False}
    for replacement in (False, True):
        made = data.cifar10_subset(3, 400, 90, replacement=replacement, **options)
        x, y = made.train
        assert y.bincount().tolist() == [400] * 3
        assert made.validation[1].bincount().tolist() == [90] * 3
        assert (float(x.min()), float(x.max())) == (-1, 1)
        # Some images of the set itself are twins; a draw with replacement has hundreds more.
        assert (len(x) - len(x.unique(dim=0)) > 50) == replacement
        assert "lossless" in made.origin


def test_cifar100_subset():
    fine = at_hand("cifar100", source="subset")
    coarse = at_hand("cifar100", source="subset", labels="coarse")
    assert fine.subset(["motorcycle", "orange", "wardrobe"]).n_classes == 3
    # Every class lies in one superclass, five in each: the two columns are not mixed up.
    pairs = set(zip(fine.labels.tolist(), coarse.labels.tolist(), strict=True))
    assert len(pairs) == len({label for label, _ in pairs})
    orange = fine.class_names.index("orange")
    assert (orange, coarse.class_names.index("fruit_and_vegetables")) in pairs
    folder = next(entry.found for entry in data.catalogue() if (entry.name, entry.source) == ("cifar100", "subset"))
    if folder and (folder / "fine_label_names.txt").is_file():
        assert (folder / "fine_label_names.txt").read_text().split() == list(fine.class_names)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_idx_sets(name):
    train, test = at_hand(name), at_hand(name, "test")
    assert (len(train), len(test)) == (60_000, 10_000)
    assert "complete, lossless" in train.origin
    x, _ = train.tensors()
    assert x.mean().item() == pytest.approx(0, abs=1e-3)
    assert x.std().item() == pytest.approx(1, abs=1e-3)
