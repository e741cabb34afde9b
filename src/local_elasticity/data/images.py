"""Labelled images in memory: class subsets, counts a class, and the tensors that a network trains on."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from local_elasticity.base.checks import check_real, check_whole, in_words
from local_elasticity.base.errors import InputError, nearest
from local_elasticity.data.checks import check_classes

PerChannel = float | Sequence[float]
Normalise = Literal["auto"] | tuple[PerChannel, PerChannel] | None

_CIFAR = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
NORMALISATION: dict[str, tuple[PerChannel, PerChannel]] = {
    # (mean, standard deviation) of pixels in [0, 1]. The published protocol uses CIFAR-10's on all three of its sets.
    "cifar10": _CIFAR,
    "cifar100": _CIFAR,
    "svhn": _CIFAR,
    # Of the training images, computed here.
    "mnist": (0.1307, 0.3081),
    "fashion-mnist": (0.2860, 0.3530),
    "digits": (0.3054, 0.3755),
    # Made in [0, 1], and published without normalisation.
    "geomnist": (0.0, 1.0),
}
"""What ``normalise="auto"`` subtracts and divides by. Sets that are not listed are mapped to [-1, 1]."""

_TAKE = 1  # the random stream of `LabelledImages.take`; probes draw from another, so the two never coincide


@dataclass(frozen=True)
class AugmentOnce:
    """The published augmentation, drawn once and frozen: a random crop after zero padding, then a random flip.

    Source: arXiv:2111.01166, published notebooks: ``RandomCrop(32, padding=4)`` and ``RandomHorizontalFlip(0.5)``,
    applied when the tensors are built, so that every epoch sees the same pixels.

    Args:
        seed: of the crops and flips; the same seed gives the same pixels.
        padding: black pixels added on each side before the crop, which gives back the original size.
        flip: probability of a left-right flip.
    """

    seed: int
    padding: int = 4
    flip: float = 0.5

    def __post_init__(self) -> None:
        check_whole("seed", self.seed, 0)
        check_whole("padding", self.padding, 0, 4096)
        check_real("flip", self.flip, 0, 1)

    def __call__(self, images: UInt8[Tensor, "samples channels height width"]) -> UInt8[Tensor, "samples c h w"]:
        """Crop and flip every image; the global random streams are not touched."""
        if not isinstance(images, Tensor) or images.ndim != 4:
            raise InputError(
                expected="images of shape (samples, channels, height, width)",
                got=in_words(images),
                do="give a tensor of these four dimensions",
            )
        n, channels, height, width = images.shape
        generator = np.random.default_rng(self.seed)
        corner = torch.from_numpy(generator.integers(0, 2 * self.padding + 1, size=(n, 2)))
        flipped = torch.from_numpy(generator.random(n) < self.flip)
        padded = torch.nn.functional.pad(images, (self.padding,) * 4)
        rows = corner[:, :1] + torch.arange(height)
        columns = corner[:, 1:] + torch.arange(width)
        columns = torch.where(flipped[:, None], columns.flip(1), columns)
        return padded[
            torch.arange(n)[:, None, None, None],
            torch.arange(channels)[None, :, None, None],
            rows[:, None, :, None],
            columns[:, None, None, :],
        ]


@dataclass(frozen=True, eq=False, repr=False)
class LabelledImages:
    """Images with a class each, and where they came from.

    Args:
        images: pixel levels 0 ... ``white``; floating images (``white=1``) where they were never levels.
        labels: classes 0 ... K-1.
        class_names: one name a class.
        name: of the data set (``"cifar10"``).
        origin: one line for people: which files, complete or partial, lossless or lossy. Runs and tables show it.
        split: ``"train"``, ``"test"`` or what the set calls it.
        indices: position of each image in the original files of its split (in their order); kept by every subset.
        source: which of several sources of the set this is (``"official"``, ``"subset"``, ``"jpeg"``), so that another
            split can be read from the same one.
        white: the pixel level that means 1.0: 255, or 16 for the small digits.
        aliases: other names of classes.

    Raises:
        InputError: when shapes, dtypes or labels do not fit together.
    """

    images: UInt8[Tensor, "samples channels height width"] | Float[Tensor, "samples channels height width"]
    labels: Int64[Tensor, " samples"]
    class_names: tuple[str, ...]
    name: str
    origin: str
    split: str
    indices: Int64[Tensor, " samples"]
    source: str = ""
    white: int = 255
    aliases: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check_kinds()
        n = len(self.images)
        floating = self.images.is_floating_point() and self.white == 1
        if self.images.ndim != 4 or not (floating or self.images.dtype == torch.uint8):
            raise InputError(
                expected="uint8 images of shape (samples, channels, height, width), or floating ones with white=1",
                got=f"{self.images.dtype} of shape {tuple(self.images.shape)}, white={self.white}",
                do="convert the images first",
            )
        for what, values in (("labels", self.labels), ("indices", self.indices)):
            if values.dtype != torch.int64 or values.shape != (n,):
                raise InputError(
                    expected=f"int64 {what}, one for each of {n} images",
                    got=f"{values.dtype} of shape {tuple(values.shape)}",
                    do=f"correct the {what}",
                )
        if n and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < len(self.class_names):
            raise InputError(
                expected=f"labels in 0 ... {len(self.class_names) - 1} ({len(self.class_names)} class names)",
                got=f"labels from {int(self.labels.min())} to {int(self.labels.max())}",
                do="correct the labels or the class names",
            )

    def _check_kinds(self) -> None:
        """Check what is no matter of shapes.

        Raises:
            InputError: naming the part.
        """
        check_whole("white", self.white, 1)
        for what in ("images", "labels", "indices"):
            value = getattr(self, what)
            if not isinstance(value, Tensor) or not value.ndim:
                raise InputError(expected=f"{what}: a tensor", got=in_words(value), do="use torch.from_numpy or tensor")
        if self.images.is_floating_point() and not bool(torch.isfinite(self.images).all()):
            raise InputError(expected="finite images", got="infinite pixels, or NaN", do="correct the images")
        names = self.class_names
        if not isinstance(names, tuple) or not names or not all(isinstance(name, str) for name in names):
            raise InputError(
                expected="class_names: a tuple of texts, one a class", got=in_words(names), do="correct class_names"
            )

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return (
            f"LabelledImages({self.name} {self.split}: {len(self)} of {shape}, {self.n_classes} classes; {self.origin})"
        )

    @property
    def n_classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    @property
    def counts(self) -> Int64[Tensor, " classes"]:
        """How many images each class has."""
        return torch.bincount(self.labels, minlength=self.n_classes)

    def at(self, positions: Int64[Tensor, " chosen"]) -> LabelledImages:
        """Keep the images at these positions, in this order; classes stay as they are.

        Args:
            positions: whole numbers from 0.

        Raises:
            InputError: for positions that there are not.
        """
        positions = self._check_positions(positions)
        return replace(
            self, images=self.images[positions], labels=self.labels[positions], indices=self.indices[positions]
        )

    def _check_positions(self, positions: object) -> Int64[Tensor, " chosen"]:
        try:
            chosen = torch.as_tensor(positions)
            whole = not (chosen.is_floating_point() or chosen.is_complex() or chosen.dtype == torch.bool)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                expected="positions: whole numbers", got=in_words(positions), do="correct positions"
            ) from error
        if chosen.ndim != 1 or not (whole or not len(chosen)):
            raise InputError(
                expected="positions: whole numbers in a row",
                got=in_words(chosen),
                do="give positions (for a mask: torch.nonzero(mask).squeeze(1))",
            )
        chosen = chosen.to("cpu", torch.int64)
        if len(chosen) and not 0 <= int(chosen.min()) <= int(chosen.max()) < len(self):
            raise InputError(
                expected=f"positions in 0 ... {len(self) - 1}",
                got=f"positions from {int(chosen.min())} to {int(chosen.max())}",
                do="correct positions",
            )
        return chosen

    def class_label(self, wanted: str | int) -> int:
        """Find the label of a class by its name, one of its aliases, or its number (also as text).

        Raises:
            InputError: for an unknown class, naming the nearest one.
        """
        if isinstance(wanted, numbers.Integral) and not isinstance(wanted, bool):
            label = int(wanted)
            if 0 <= label < self.n_classes:
                return label
            raise InputError(
                expected=f"a class of {self.name}: 0 ... {self.n_classes - 1}", got=str(label), do="correct the class"
            )
        if not isinstance(wanted, str):
            raise InputError(expected="a class by its name or label", got=in_words(wanted), do="correct the class")
        names = {_plain(alias): _plain(name) for alias, name in self.aliases.items()}
        labels = {_plain(name): label for label, name in enumerate(self.class_names)}
        key = _plain(wanted)
        key = key if key in labels else names.get(key, key)
        if key in labels:
            return labels[key]
        if key.isdecimal():
            return self.class_label(int(key))
        raise InputError(
            expected=f"a class of {self.name}", got=repr(wanted), do=nearest(str(wanted), self.class_names)
        )

    def subset(self, classes: Sequence[str | int]) -> LabelledImages:
        """Keep these classes only, relabelled 0, 1, ... in the order given; images keep their order.

        Args:
            classes: names, aliases or present labels.

        Raises:
            InputError: for an unknown class, one named twice, or one without images.
        """
        classes = check_classes(classes)
        kept = [self.class_label(wanted) for wanted in classes]
        new_label = torch.full((self.n_classes,), -1)
        for new, old in enumerate(kept):
            if new_label[old] >= 0:
                raise InputError(
                    expected="each class once",
                    got=f"{self.class_names[old]!r} twice in {list(classes)}",
                    do="leave one of them out",
                )
            if self.counts[old] == 0:
                raise InputError(
                    expected=f"images of class {self.class_names[old]!r}",
                    got=f"none in {self.name} {self.split} ({self.origin})",
                    do="leave the class out, or use a source that has it",
                )
            new_label[old] = new
        chosen = self.at(torch.nonzero(new_label[self.labels] >= 0).squeeze(1))
        names = tuple(self.class_names[old] for old in kept)
        return replace(chosen, labels=new_label[chosen.labels], class_names=names)

    def take(self, per_class: int, seed: int) -> LabelledImages:
        """Draw this many images of each class without replacement; sorted by class, then by position.

        The same seed with a smaller ``per_class`` gives a subset of the same draw.

        Raises:
            InputError: when a class has fewer images, naming it.
        """
        return self.at(draw_per_class(self.labels, self.class_names, per_class, seed, _TAKE))

    def tensors(
        self, normalise: Normalise = "auto", augment: AugmentOnce | int | None = None
    ) -> tuple[Float[Tensor, "samples channels height width"], Int64[Tensor, " samples"]]:
        """Make the float32 images and int64 labels to train on.

        Args:
            normalise: ``"auto"`` for the set's constants in `NORMALISATION` (an unlisted set: mean and deviation 0.5,
                which gives [-1, 1]); your own (mean, standard deviation) of pixels in [0, 1], a number or one a
                channel; None for pixels in [0, 1].
            augment: the published crop and flip, applied once and then fixed; a seed stands for ``AugmentOnce(seed)``.

        Raises:
            InputError: for constants that do not fit the channels.
        """
        images = self.images
        if augment is not None:
            augmentation = (
                augment if isinstance(augment, AugmentOnce) else AugmentOnce(check_whole("augment", augment, 0))
            )
            images = augmentation(images)
        pixels = images.to(torch.float32) / self.white
        if normalise is not None:
            mean, deviation = self._check_normalise(normalise)
            pixels = (pixels - self._per_channel(mean)) / self._per_channel(deviation, positive=True)
        return pixels, self.labels.clone()

    def _per_channel(self, values: PerChannel, positive: bool = False) -> Float[Tensor, "channels 1 1"]:
        """Check a normalisation constant and shape it to the images."""
        try:
            constant = torch.as_tensor(values, dtype=torch.float32).reshape(-1, 1, 1)
        except (TypeError, ValueError, RuntimeError):
            constant = torch.empty(0)
        finite = bool(torch.isfinite(constant).all())
        if not finite or len(constant) not in (1, self.shape[0]) or (positive and bool((constant <= 0).any())):
            raise InputError(
                expected=f"a mean and a positive standard deviation: one number, or one for each of {self.shape[0]}",
                got=in_words(values),
                do="correct normalise=(mean, std)",
            )
        return constant

    def _check_normalise(self, normalise: object) -> tuple[PerChannel, PerChannel]:
        """The mean and the standard deviation that are meant."""
        if isinstance(normalise, str) and normalise == "auto":
            return NORMALISATION.get(self.name, (0.5, 0.5))
        if isinstance(normalise, tuple | list) and len(normalise) == 2:
            return normalise[0], normalise[1]
        raise InputError(
            expected="normalise: 'auto', None, or (mean, standard deviation)",
            got=in_words(normalise),
            do="correct normalise",
        )


def draw_per_class(
    labels: Int64[Tensor, " samples"], class_names: Sequence[str], per_class: int, seed: int, stream: int
) -> Int64[Tensor, " chosen"]:
    """Draw positions of each class without replacement, sorted by class and then by position.

    Every class has a generator of its own, seeded (seed, stream, class), so a draw does not depend on other classes.

    Raises:
        InputError: for a count below 1, a negative seed, or a class with too few images.
    """
    check_whole("per_class", per_class, 1)
    check_whole("seed", seed, 0)
    chosen = []
    for label, name in enumerate(class_names):
        positions = torch.nonzero(labels == label).squeeze(1)
        if len(positions) < per_class:
            raise InputError(
                expected=f"at least {per_class} images of class {name!r}",
                got=f"{len(positions)}",
                do="ask for fewer, or use a larger source",
            )
        order = np.random.default_rng([seed, stream, label]).permutation(len(positions))[:per_class]
        chosen.append(positions[torch.from_numpy(np.sort(order))])
    return torch.cat(chosen)


def _plain(name: str) -> str:
    """A class name without capitals and separators, for comparison."""
    return "".join(c for c in name.lower() if c.isalnum())
