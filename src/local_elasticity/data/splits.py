"""Training and validation samples of any data set, by its name, as tensors."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from local_elasticity.base.checks import check_path, check_whole
from local_elasticity.base.errors import InputError, nearest
from local_elasticity.data.checks import check_classes
from local_elasticity.data.decoding import Size
from local_elasticity.data.geomnist import PUBLISHED, SHAPES, TensorData, geomnist
from local_elasticity.data.sets import load, other_split

_GEOMNIST = {"geomnist": "published", "geomnist-varied": "varied"}
_PER_CLASS = 500  # of GeoMNIST: as published


def load_split(
    name: str | os.PathLike[str],
    classes: Sequence[str | int] | None = None,
    per_class: int | None = None,
    seed: int = 0,
    *,
    size: Size = None,
) -> TensorData:
    """Training and validation samples.

    Args:
        name: geomnist (as published), geomnist-varied, or anything that `load` reads; its test images validate (of an
            image folder without them those of "val").
        classes: which, by name or label; all by default (of geomnist-varied the first three).
        per_class: training samples a class; all by default, 500 of GeoMNIST, with as many for validation.
        seed: of what is drawn.
        size: of the images of a folder: see `image_folder`.

    Raises:
        InputError: for classes or samples that there are not.
    """
    check_path("name", name)
    check_whole("seed", seed, 0)
    if per_class is not None:
        check_whole("per_class", per_class, 1)
    classes = None if classes is None else check_classes(classes)
    options: dict[str, Any] = {} if size is None else {"size": size}
    if str(name).lower() in _GEOMNIST:
        if options:
            raise InputError(expected=f"options that {name} has", got="'size'", do="leave it out: images are 32 x 32")
        return _shapes(str(name).lower(), classes, per_class or _PER_CLASS, seed)
    train = load(name, "train", **options)
    split, of_the_same = other_split(train, name)
    validation = load(name, split or "test", **options, **of_the_same)
    if classes:
        train, validation = train.subset(classes), validation.subset(classes)
    if per_class is not None:
        train = train.take(per_class, seed)
    return TensorData(train.tensors(), validation.tensors(), train.class_names, train.origin, {})


def _shapes(name: str, classes: Sequence[str | int] | None, per_class: int, seed: int) -> TensorData:
    varied = name == "geomnist-varied"
    known = SHAPES if varied else PUBLISHED
    chosen = [_position(one, known) for one in classes] if classes else list(range(3))
    if len(set(chosen)) != len(chosen) or len(chosen) < 2:
        raise InputError(expected="at least 2 different classes", got=str(list(classes or ())), do="name each once")
    variant = _GEOMNIST[name]
    data = geomnist(per_class, per_class, variant=variant, n_classes=max(3, max(chosen) + 1), seed=seed)  # pyright: ignore[reportArgumentType]
    if chosen == list(range(data.n_classes)):
        return data
    parts = [_subset(part, chosen) for part in (data.train, data.validation)]
    names = tuple(data.class_names[label] for label in chosen)
    kept = np.concatenate(
        [
            offset + np.flatnonzero(np.isin(labels, chosen))
            for offset, labels in (
                (0, data.train[1].numpy()),
                (len(data.train[1]), data.validation[1].numpy()),
            )
        ]
    )
    factors = {key: values[kept] for key, values in data.factors.items()}
    return TensorData(parts[0], parts[1], names, data.origin, factors)


def _position(name: str | int, known: Sequence[str]) -> int:
    if str(name).isdecimal() and int(name) < len(known):
        return int(name)
    if not isinstance(name, str) or name not in known:
        raise InputError(
            expected=f"classes of {', '.join(known)}, or labels 0 to {len(known) - 1}",
            got=repr(name),
            do=nearest(str(name), known),
        )
    return known.index(name)


def _subset(part: tuple[Tensor, Tensor], chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The samples of some classes, relabelled in their order; in the order that they had."""
    x, y = part
    kept = torch.isin(y, torch.tensor(chosen))
    new = torch.full((int(y.max()) + 1,), -1)
    new[torch.tensor(chosen)] = torch.arange(len(chosen))
    return x[kept], new[y[kept]]
