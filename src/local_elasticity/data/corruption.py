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

from local_elasticity.base.checks import check_whole, in_words
from local_elasticity.base.errors import InputError
from local_elasticity.data.checks import check_name
from local_elasticity.data.geomnist import TensorData
from local_elasticity.data.images import LabelledImages

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
    if not (isinstance(rate, numbers.Real) and not isinstance(rate, bool) and 0 <= rate <= 1):
        raise InputError(expected="a corruption rate in [0, 1]", got=in_words(rate), do="pass a fraction")
    check_name("kind 'exact' or 'symmetric'", kind, ("exact", "symmetric"))
    check_whole("seed", seed, 0)
    if n_classes is not None:
        check_whole("n_classes", n_classes, 2)
    if isinstance(data, LabelledImages):
        return replace(data, labels=_corrupt(data.labels, rate, kind, n_classes or data.n_classes, seed))
    if isinstance(data, TensorData):
        x, labels = data.train
        return replace(data, train=(x, _corrupt(labels, rate, kind, n_classes or data.n_classes, seed)))
    if isinstance(data, TensorDataset):
        *xs, labels = data.tensors
        return TensorDataset(*xs, _corrupt(labels, rate, kind, n_classes, seed))
    if isinstance(data, tuple | list) and len(data) == 2 and _is_array(data[1]):
        x, labels = data
        if not hasattr(x, "__len__") or len(x) != len(labels):
            samples = f"{len(x)} samples" if hasattr(x, "__len__") else in_words(x)
            raise InputError(
                expected="one label a sample", got=f"{samples}, {len(labels)} labels", do="pass them together"
            )
        return x, _like(labels, rate, kind, n_classes, seed)
    return _like(data, rate, kind, n_classes, seed)


def _is_array(labels: Any) -> bool:
    """Whether it may be the labels of a pair: one label by itself is not."""
    return isinstance(labels, list | tuple) or getattr(labels, "ndim", 0) > 0


def _like(labels: Any, rate: float, kind: Kind, n_classes: int | None, seed: int) -> Any:
    try:
        tensor = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InputError(
            expected="whole labels, one a sample, in a tensor, array or list",
            got=in_words(labels),
            do="give classes 0 ... K - 1",
        ) from error
    new = _corrupt(tensor, rate, kind, n_classes, seed)
    return new.numpy() if isinstance(labels, np.ndarray) else new


def _corrupt(
    labels: Int64[Tensor, " samples"], rate: float, kind: Kind, n_classes: int | None, seed: int
) -> Int64[Tensor, " samples"]:
    whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if labels.dim() != 1 or not whole or not len(labels):
        raise InputError(
            expected="whole labels, one a sample",
            got=f"{labels.dtype} of shape {tuple(labels.shape)}",
            do="give classes 0 ... K - 1",
        )
    old = labels.cpu().numpy()
    k = n_classes or int(old.max()) + 1
    if k < 2 or not 0 <= int(old.min()) <= int(old.max()) < k:
        raise InputError(
            expected=f"at least 2 classes, labels in 0 ... {k - 1}",
            got=f"labels from {int(old.min())} to {int(old.max())}",
            do="correct n_classes or the labels",
        )
    stream = np.random.default_rng(seed)
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
