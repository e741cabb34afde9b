"""Training and validation samples of any data set, by its name, as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from local_elasticity.data.geomnist import PUBLISHED, SHAPES, TensorData, geomnist
from local_elasticity.data.sets import load
from local_elasticity.errors import InputError, nearest

_GEOMNIST = {"geomnist": "published", "geomnist-varied": "varied"}
_PER_CLASS = 500  # of GeoMNIST: as published


def load_split(
    name: str, classes: Sequence[str] | None = None, per_class: int | None = None, seed: int = 0
) -> TensorData:
    """Training and validation samples.

    Args:
        name: geomnist (as published), geomnist-varied, or anything that `load` reads; its test images validate.
        classes: which, by name or label; all by default (of geomnist-varied the first three).
        per_class: training samples a class; all by default, 500 of GeoMNIST, with as many for validation.
        seed: of what is drawn.

    Raises:
        InputError: for classes or samples that there are not.
    """
    if name.lower() in _GEOMNIST:
        return _shapes(name.lower(), classes, per_class or _PER_CLASS, seed)
    train = load(name, "train")
    options: dict[str, Any] = {"source": train.source} if train.source and name.lower().startswith("cifar") else {}
    test = load(name, "test", **options)
    if classes:
        train, test = train.subset(classes), test.subset(classes)
    if per_class is not None:
        train = train.take(per_class, seed)
    return TensorData(train.tensors(), test.tensors(), train.class_names, train.origin, {})


def _shapes(name: str, classes: Sequence[str] | None, per_class: int, seed: int) -> TensorData:
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


def _position(name: str, known: Sequence[str]) -> int:
    if str(name).isdigit() and int(name) < len(known):
        return int(name)
    if name not in known:
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
