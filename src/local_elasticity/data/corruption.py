"""Wrong labels on purpose: an exact fraction of each class, or every sample by chance (spec lesde 4)."""

from __future__ import annotations

import math
import numbers
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils.data import TensorDataset

from local_elasticity.data.geomnist import TensorData
from local_elasticity.data.images import LabelledImages
from local_elasticity.errors import InputError, nearest

Kind = Literal["exact", "symmetric"]


def corrupt_labels(data: Any, rate: float, *, kind: Kind = "exact", n_classes: int | None = None, seed: int = 0) -> Any:
    """Give some samples a wrong label; a corrupted label is never the right one.

    Args:
        data: labels (samples,) as a tensor, array or list, a pair (X, labels), a ``TensorDataset`` whose last tensor
            holds the labels, `LabelledImages`, or `TensorData`, of which only the training labels change; left as it
            is.
        rate: fraction of wrong labels, in [0, 1].
        kind: "exact", as published (arXiv:2110.05960, notebooks): of the n samples of each class floor(rate n), drawn
            without replacement, get the other classes in turn, in equal parts, the last of them what does not divide.
            "symmetric": every sample by itself gets a wrong label with probability ``rate``, uniform over the others.
        n_classes: K; from the data by default.
        seed: of the choice; the global random streams are not touched.

    Returns:
        The same kind of thing with other labels; a list comes back as a tensor.

    Raises:
        InputError: for a rate outside of [0, 1], labels that are no classes, or one class only.
    """
    if not (isinstance(rate, numbers.Real) and 0 <= rate <= 1):
        raise InputError(expected="a corruption rate in [0, 1]", got=repr(rate), do="pass a fraction")
    if kind not in ("exact", "symmetric"):
        raise InputError(
            expected="kind 'exact' or 'symmetric'", got=repr(kind), do=nearest(str(kind), ("exact", "symmetric"))
        )
    if isinstance(data, LabelledImages):
        return replace(data, labels=_corrupt(data.labels, rate, kind, n_classes or data.n_classes, seed))
    if isinstance(data, TensorData):
        x, labels = data.train
        return replace(data, train=(x, _corrupt(labels, rate, kind, n_classes or data.n_classes, seed)))
    if isinstance(data, TensorDataset):
        *xs, labels = data.tensors
        return TensorDataset(*xs, _corrupt(labels, rate, kind, n_classes, seed))
    if isinstance(data, tuple | list) and len(data) == 2 and np.ndim(data[1]):
        x, labels = data
        if len(x) != len(labels):
            raise InputError(
                expected="one label a sample", got=f"{len(x)} samples, {len(labels)} labels", do="pass them together"
            )
        return x, _like(labels, rate, kind, n_classes, seed)
    return _like(data, rate, kind, n_classes, seed)


def _like(labels: Any, rate: float, kind: Kind, n_classes: int | None, seed: int) -> Any:
    new = _corrupt(torch.as_tensor(labels), rate, kind, n_classes, seed)
    return new.numpy() if isinstance(labels, np.ndarray) else new


def _corrupt(
    labels: Int64[Tensor, " samples"], rate: float, kind: Kind, n_classes: int | None, seed: int
) -> Int64[Tensor, " samples"]:
    if labels.dim() != 1 or labels.is_floating_point() or labels.dtype == torch.bool or not len(labels):
        raise InputError(
            expected="whole labels, one a sample",
            got=f"{labels.dtype} of shape {tuple(labels.shape)}",
            do="give classes 0 ... K - 1",
        )
    k = n_classes or int(labels.max()) + 1
    if k < 2 or not 0 <= int(labels.min()) <= int(labels.max()) < k:
        raise InputError(
            expected=f"at least 2 classes, labels in 0 ... {k - 1}",
            got=f"labels from {int(labels.min())} to {int(labels.max())}",
            do="correct n_classes or the labels",
        )
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral) or seed < 0:
        raise InputError(expected="seed: a whole number >= 0", got=repr(seed), do="correct seed")
    stream = np.random.default_rng(seed)
    old = labels.cpu().numpy()
    new = old.copy()
    if kind == "symmetric":
        chosen = stream.random(len(old)) < rate
        new[chosen] = (old[chosen] + stream.integers(1, k, size=int(chosen.sum()))) % k
        return torch.from_numpy(new).to(labels)
    for label in range(k):
        members = np.flatnonzero(old == label)
        # Rounding of the product must not lose a sample: 0.29 * 100 is 28.999...
        count = math.floor(rate * len(members) + 1e-9)
        chosen = stream.choice(members, count, replace=False)
        others = [other for other in range(k) if other != label]
        each = count // (k - 1)
        for i, other in enumerate(others):
            new[chosen[i * each : None if i == k - 2 else (i + 1) * each]] = other
    return torch.from_numpy(new).to(labels)
