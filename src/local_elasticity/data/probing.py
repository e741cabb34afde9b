"""Probes: the few images of each class whose influence on each other is followed through training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from local_elasticity.base.checks import in_words
from local_elasticity.base.errors import InputError
from local_elasticity.data.images import LabelledImages, draw_per_class

_PROBES = 2  # the random stream; `LabelledImages.take` has 1

Pair = tuple[Float[Tensor, "samples ..."], Shaped[Tensor, " samples"]]


@dataclass(frozen=True, eq=False)
class Probes:
    """Chosen samples, sorted by class. Unpacks as ``xs, ys = probes``.

    Args:
        xs: the inputs, as the network takes them.
        ys: their classes.
        indices: positions in the data set that they were chosen from (two of its rows are one sample if these agree).
        origin_indices: positions in the set's original files; the same as ``indices`` where there are no files.
        class_names: one name a class.
        seed: of the choice.
    """

    xs: Float[Tensor, "probes ..."]
    ys: Int64[Tensor, " probes"]
    indices: Int64[Tensor, " probes"]
    origin_indices: Int64[Tensor, " probes"]
    class_names: tuple[str, ...]
    seed: int

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.xs, self.ys))

    def __len__(self) -> int:
        return len(self.ys)

    def __repr__(self) -> str:
        return (
            f"Probes({len(self)} of {len(self.class_names)} classes: {', '.join(self.class_names)}; seed {self.seed})"
        )


def probes(
    dataset: LabelledImages | Pair, per_class: int = 20, seed: int = 0, *, tensors: Pair | None = None
) -> Probes:
    """Choose the same number of samples of each class, without replacement, by a generator of their own.

    The published protocol fixes 20 a class for all of its runs (arXiv:2111.01166, notebooks).

    Args:
        dataset: labelled images, or a pair (x, y) of tensors (classes are then 0 ... max(y)).
        per_class: how many of each class.
        seed: the same seed chooses the same samples; the global random streams are not touched.
        tensors: what ``dataset.tensors(...)`` gave for training (normalised, augmented): the probes are cut from it, so
            that they are the very pixels that the network trains on. Without it: ``dataset.tensors()``.

    Raises:
        InputError: when a class has too few samples, or labels are no whole numbers from 0.
    """
    if isinstance(dataset, LabelledImages):
        labels, class_names, origin = dataset.labels, dataset.class_names, dataset.indices
    else:
        tensors = _check_pair(dataset)
        labels = tensors[1]
        if int(labels.max()) >= len(labels):
            raise InputError(
                expected=f"classes 0, 1, ..., at most {len(labels)} of them in as many samples",
                got=f"a label {int(labels.max())}",
                do="relabel the classes 0, 1, ...",
            )
        class_names = tuple(str(label) for label in range(int(labels.max()) + 1))
        origin = torch.arange(len(labels))
    chosen = draw_per_class(labels, class_names, per_class, seed, _PROBES)
    if tensors is None:
        xs, ys = _images(dataset).at(chosen).tensors()
    else:
        x, y = _check_pair(tensors)
        if not torch.equal(y, labels):
            raise InputError(
                expected="tensors built from this data set, in its order",
                got=f"{len(y)} labels that differ from its {len(labels)}",
                do="give dataset.tensors(...) of the same data set",
            )
        # On the samples' own device; the choice itself is made on the CPU.
        xs, ys = x[chosen.to(x.device)], y[chosen]
        ys = ys.to(x.device)
    if xs.is_floating_point() and not bool(torch.isfinite(xs).all()):
        raise InputError(
            expected="finite inputs", got="infinite ones, or NaN, among the probes", do="correct the data first"
        )
    return Probes(xs, ys, chosen, origin[chosen], tuple(class_names), seed)


def _images(dataset: LabelledImages | Pair) -> LabelledImages:
    assert isinstance(dataset, LabelledImages)
    return dataset


def _check_pair(pair: Pair) -> Pair:
    """Check that it is (inputs, classes), and give the classes as int64 on the CPU."""
    try:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError
        x, y = (torch.as_tensor(part) for part in pair)
        n, whole = len(x), not (y.dtype.is_floating_point or y.dtype.is_complex or y.dtype == torch.bool)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            expected="labelled images, or a pair (x, y) of tensors", got=in_words(pair), do="give one of these"
        ) from error
    if not whole or y.shape != (n,) or not n:
        raise InputError(
            expected=f"labels: one whole number for each of {n} samples (at least one)",
            got=f"{y.dtype} of shape {tuple(y.shape)}",
            do="give class labels; for values to be regressed, choose the probes yourself",
        )
    if int(y.min()) < 0:
        raise InputError(expected="labels from 0", got=f"{int(y.min())}", do="relabel the classes 0, 1, ...")
    return x, y.to("cpu", torch.int64)
