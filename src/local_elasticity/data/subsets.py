"""The second paper's CIFAR-10 subsets: the first K classes, 2,000 + 500 images each (spec lesde 4)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from local_elasticity.base.checks import check_flag, check_whole
from local_elasticity.base.errors import InputError
from local_elasticity.data.checks import check_name
from local_elasticity.data.cifar import cifar10
from local_elasticity.data.geomnist import TensorData
from local_elasticity.data.images import LabelledImages

_STREAM = 3  # `LabelledImages.take` has 1, probes have 2


def cifar10_subset(
    n_classes: int = 3,
    n_train: int = 2000,
    n_validation: int = 500,
    *,
    replacement: bool = False,
    seed: int = 0,
    **options: Any,
) -> TensorData:
    """Draw images of CIFAR-10's classes 0 ... K - 1, in [-1, 1], float32, no augmentation.

    Args:
        n_classes: K, 2 to 10.
        n_train: images a class from the training split.
        n_validation: images a class from the test split.
        replacement: draw with replacement, so that images repeat: as published.
        seed: of the draw; the global random streams are not touched.
        **options: of `cifar10` (``folders``, ``source``, ``download``, ``progress``).

    Raises:
        InputError: for more classes than 10, or classes with too few images.
    """
    if check_whole("n_classes", n_classes, 2) > 10:
        raise InputError(expected="2 to 10 classes of CIFAR-10", got=str(n_classes), do="ask for as many as there are")
    for name, value, least in (("n_train", n_train, 1), ("n_validation", n_validation, 1), ("seed", seed, 0)):
        check_whole(name, value, least)
    check_flag("replacement", replacement)
    for name in options:
        check_name("an option of cifar10_subset", name, ("folders", "source", "download", "progress"))
    train = cifar10("train", **options)
    test = cifar10("test", **{**options, "source": train.source})  # pyright: ignore[reportArgumentType]
    parts = []
    for number, (images, count) in enumerate(((train, n_train), (test, n_validation))):
        chosen = images.subset(images.class_names[:n_classes])
        if replacement:
            chosen = chosen.at(_with_replacement(chosen, count, [seed, _STREAM, number]))
        else:
            chosen = chosen.take(count, seed)
        parts.append(chosen)
    words = (
        f"CIFAR-10, classes 0 to {n_classes - 1}, {n_train} + {n_validation} images a class "
        f"with{'' if replacement else 'out'} replacement, seed {seed}; {train.origin}"
    )
    tensors = [part.tensors(normalise=(0.5, 0.5)) for part in parts]
    return TensorData(tensors[0], tensors[1], parts[0].class_names, words, {})


def _with_replacement(images: LabelledImages, count: int, seed: list[int]) -> torch.Tensor:
    stream = np.random.default_rng(seed)
    drawn = []
    for label in range(images.n_classes):
        members = torch.nonzero(images.labels == label).squeeze(1)
        if not len(members):
            raise InputError(
                expected=f"images of class {images.class_names[label]!r}",
                got=f"none in {images.origin}",
                do="use another source",
            )
        drawn.append(members[torch.from_numpy(stream.integers(len(members), size=count))])
    return torch.cat(drawn)
