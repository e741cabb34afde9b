"""GeoMNIST: grey images of shapes, made here. As published (arXiv:2110.05960, code; spec lesde 4), or varied properly.

As published the angle, the size and the place of a shape are one and the same number, and a rectangle can be told by
its pixel sum alone. The variant "varied" draws place, rotation, size, intensity and noise independently, and gives all
shapes the same mean area.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from local_elasticity.base.checks import check_real, check_whole, in_words
from local_elasticity.base.errors import InputError
from local_elasticity.data.checks import check_name
from local_elasticity.data.files import Entry, Folders, check_split
from local_elasticity.data.images import LabelledImages

SIDE = 32
CENTRE = (SIDE - 1) / 2
PUBLISHED = ("triangle", "rectangle", "ellipse")
"""The classes as published, in the order of their labels."""
SHAPES = (*PUBLISHED, "cross", "star", "ring")
"""The shapes of the varied variant, in the order of their labels."""
AREA = 120.0  # pixels, of every shape of the varied variant at size 1
_FINE = 3  # points a pixel and axis at which a varied shape is tested

Image = Float64[np.ndarray, "height width"]


@dataclass(frozen=True, eq=False, repr=False)
class TensorData:
    """Training and validation samples as tensors.

    Args:
        train: inputs (samples, channels, height, width) and labels (samples,), class after class.
        validation: the same.
        class_names: one name a class.
        origin: one line for people.
        factors: name -> what was drawn for each sample, training samples first; empty where nothing was.

    Raises:
        InputError: when inputs and labels are no tensors of one length.
    """

    train: tuple[Tensor, Int64[Tensor, " samples"]]
    validation: tuple[Tensor, Int64[Tensor, " samples"]]
    class_names: tuple[str, ...]
    origin: str
    factors: dict[str, Float64[np.ndarray, " samples"]]

    def __post_init__(self) -> None:
        for what, pair in (("train", self.train), ("validation", self.validation)):
            tensors = isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(part, Tensor) for part in pair)
            if not tensors or pair[1].ndim != 1 or pair[0].shape[:1] != pair[1].shape:
                shapes = " and ".join(in_words(part) for part in pair) if tensors else in_words(pair)
                raise InputError(
                    expected=f"{what}: inputs and as many labels, two tensors", got=shapes, do=f"correct {what}"
                )

    @property
    def n_classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return tuple(self.train[0].shape[1:])

    def __repr__(self) -> str:
        return f"TensorData({len(self.train[0])} + {len(self.validation[0])} samples; {self.origin})"


def geomnist(
    n_train: int = 500,
    n_validation: int = 500,
    *,
    variant: Literal["published", "varied"] = "published",
    n_classes: int = 3,
    seed: int = 0,
    place: float = 3.0,
    size: float = 0.15,
    intensity: float = 0.6,
    noise: float = 0.05,
) -> TensorData:
    """Make GeoMNIST: float64 images of 32 x 32, one channel, background 0, shape 1.

    "published" gives bit for bit what the published code gives after ``numpy.random.seed(seed)``. "varied" draws place,
    rotation (uniform in 0 ... 360 degrees), size, intensity, blur (0.9 ... 1.1, as published) and the noise of every
    pixel independently; every class has a random stream of its own, so its images do not depend on ``n_classes``.

    Args:
        n_train: training images a class.
        n_validation: validation images a class.
        variant: "published" (triangle, rectangle, ellipse) or "varied".
        n_classes: the first of `PUBLISHED` or `SHAPES`.
        seed: of everything; the global random streams are not touched.
        place: "varied": largest shift of the centre along each axis, in pixels (uniform); no shape is cut off at the
            defaults.
        size: "varied": the scale is uniform in 1 - size ... 1 + size.
        intensity: "varied": the grey of a shape is uniform in intensity ... 1.
        noise: "varied": standard deviation of Gaussian noise of every pixel.

    Raises:
        InputError: for counts, classes or ranges that cannot be.
    """
    known = {"published": PUBLISHED, "varied": SHAPES}
    check_name("a variant of GeoMNIST", variant, known)
    most = {"seed": 2**32 - 1 if variant == "published" else None}  # of the published generator
    for name, value, least in (("n_train", n_train, 1), ("n_validation", n_validation, 1), ("seed", seed, 0)):
        check_whole(name, value, least, most.get(name))
    names = known[variant]
    if check_whole("n_classes", n_classes, 2) > len(names):
        raise InputError(
            expected=f"2 to {len(names)} classes of GeoMNIST, {variant}", got=str(n_classes), do="ask for fewer classes"
        )
    for name, value in (("place", place), ("size", size), ("intensity", intensity), ("noise", noise)):
        check_real(name, value)
    if not (0 <= place <= 6 and 0 <= size <= 0.3 and 0 < intensity <= 1 and noise >= 0):
        raise InputError(
            expected="place in [0, 6], size in [0, 0.3], intensity in (0, 1], noise >= 0",
            got=f"place={place}, size={size}, intensity={intensity}, noise={noise}",
            do="correct the ranges",
        )
    n = n_train + n_validation
    if variant == "published":
        images, factors = _published(n, n_classes, seed)
    else:
        images, factors = _varied(n, names[:n_classes], seed, place, size, intensity, noise)
    parts = []
    for part in (slice(0, n_train), slice(n_train, None)):
        x = torch.from_numpy(np.concatenate([one[part] for one in images])).unsqueeze(1)
        y = torch.arange(n_classes).repeat_interleave(len(images[0][part]))
        parts.append((x, y))
    ordered = {
        key: np.concatenate([one[s] for s in (slice(0, n_train), slice(n_train, None)) for one in values])
        for key, values in factors.items()
    }
    words = f"GeoMNIST, {variant}, {n_train} + {n_validation} images a class, seed {seed}"
    return TensorData(parts[0], parts[1], names[:n_classes], words, ordered)


def read(
    split: str = "train",
    folders: Folders = None,
    download: bool = True,
    progress: bool = True,
    *,
    variant: Literal["published", "varied"] = "published",
    n_classes: int | None = None,
    per_class: int = 500,
    seed: int = 0,
) -> LabelledImages:
    """Make one half of GeoMNIST as labelled images, exact (float64), what `load` calls "geomnist".

    Args:
        split: ``"train"`` or ``"test"``: the training or the validation images.
        folders: not used: nothing is read.
        download: not used.
        progress: not used: it takes two seconds.
        variant: as in `geomnist`.
        n_classes: 3 by default, or all 6 of "varied".
        per_class: images a class in each of the two.
        seed: as in `geomnist`.

    Raises:
        InputError: for another split, or what `geomnist` refuses.
    """
    check_split("geomnist", split, ("train", "test"))
    check_name("a variant of GeoMNIST", variant, ("published", "varied"))
    for what, value, least in (("n_classes", n_classes, 2), ("per_class", per_class, 1), ("seed", seed, 0)):
        if value is not None or what != "n_classes":
            check_whole(what, value, least)
    made = _made(variant, n_classes or (len(SHAPES) if variant == "varied" else len(PUBLISHED)), per_class, seed)
    images, labels = made.train if split == "train" else made.validation
    return LabelledImages(
        images=images.clone(),
        labels=labels.clone(),
        class_names=made.class_names,
        name="geomnist",
        origin=made.origin,
        split=split,
        indices=torch.arange(len(labels)),
        source=variant,
        white=1,
    )


@lru_cache(maxsize=2)
def _made(variant: Literal["published", "varied"], n_classes: int, per_class: int, seed: int) -> TensorData:
    return geomnist(per_class, per_class, variant=variant, n_classes=n_classes, seed=seed)


def entries() -> list[Entry]:
    """List the two variants for the catalogue; they are made, not read."""
    return [
        Entry(name, "", len(shapes), (1, SIDE, SIDE), "500 train + 500 test", None, f"made here: {words}", made=True)
        for name, shapes in (("geomnist", PUBLISHED), ("geomnist-varied", SHAPES))
        for words in [", ".join(shapes)]
    ]


# --- as published --------------------------------------------------------------------------------------------------


def ellipse(row: float, column: float, row_radius: float, column_radius: float) -> Image:
    """Pixels strictly inside of an ellipse, as ``skimage.draw.ellipse``."""
    rows, columns = np.ogrid[0 : float(SIDE), 0 : float(SIDE)]
    distance = ((rows - row) / row_radius) ** 2 + ((columns - column) / column_radius) ** 2
    image = np.zeros((SIDE, SIDE))
    image[distance < 1] = 1
    return image


def rectangle(start: tuple[float, float], end: tuple[float, float]) -> Image:
    """Pixels from corner to corner, both rounded to even and included, as ``skimage.draw.rectangle``."""
    image = np.zeros((SIDE, SIDE))
    (top, left), (bottom, right) = np.round(start).astype(int), np.round(end).astype(int)
    image[max(top, 0) : bottom + 1, max(left, 0) : right + 1] = 1
    return image


def polygon(rows: np.ndarray, columns: np.ndarray) -> Image:
    """Pixels inside or on the border of a convex polygon, as ``skimage.draw.polygon``."""
    r, c = np.ogrid[0 : float(SIDE), 0 : float(SIDE)]
    edges = []
    for i in range(len(rows)):
        j = (i + 1) % len(rows)
        edges.append((columns[j] - columns[i]) * (r - rows[i]) - (rows[j] - rows[i]) * (c - columns[i]))
    side = np.stack(edges)
    image = np.zeros((SIDE, SIDE))
    image[(side >= -1e-12).all(axis=0) | (side <= 1e-12).all(axis=0)] = 1
    return image


def _base(name: str, n: int) -> tuple[list[Image], np.ndarray]:
    """The n images of a shape before rotation, and the number that makes them differ."""
    if name == "ellipse":
        parameter = np.linspace(5, 7, n)
        return [ellipse(16, 16, r, 2 * r) for r in parameter], parameter
    parameter = np.linspace(-1, 1, n)
    if name == "rectangle":
        return [rectangle((12 + s, 8 + s), (20 + s, 24 + s)) for s in parameter], parameter
    corners = np.array([16.0, 26.0, 6.0]), np.array([16 - 8 * np.sqrt(3), 24.0, 24.0])
    return [polygon(corners[0] + s, corners[1] + s) for s in parameter], parameter


def _published(n: int, n_classes: int, seed: int) -> tuple[list[np.ndarray], dict[str, list[np.ndarray]]]:
    """Rotate by a fixed grid of angles, blur by a random width, shuffle.

    The stream is NumPy's global one as it was, and its numbers are used in the published order: blurs of ellipses,
    rectangles and triangles, then the three shuffles. All three are drawn whatever ``n_classes``.
    """
    from scipy import ndimage

    stream = np.random.RandomState(seed)
    turns = 176 / n * np.arange(n)
    blurs = {name: stream.random_sample(n) * (1.1 - 0.9) + 0.9 for name in reversed(PUBLISHED)}
    orders = {name: np.arange(n) for name in reversed(PUBLISHED)}
    for order in orders.values():
        stream.shuffle(order)
    images: list[np.ndarray] = []
    factors: dict[str, list[np.ndarray]] = {"parameter": [], "angle": [], "blur": []}
    for name in PUBLISHED[:n_classes]:
        drawn, parameter = _base(name, n)
        turned = [ndimage.rotate(image, angle, reshape=False) for image, angle in zip(drawn, turns, strict=True)]
        made = [ndimage.gaussian_filter(image, blur) for image, blur in zip(turned, blurs[name], strict=True)]
        images.append(np.stack(made)[orders[name]])
        for key, values in (("parameter", parameter), ("angle", turns), ("blur", blurs[name])):
            factors[key].append(values[orders[name]])
    return images, factors


# --- varied --------------------------------------------------------------------------------------------------------

Inside = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _regular(corners: int) -> Inside:
    """A regular polygon about the origin, of radius 1."""

    def inside(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        turns = 2 * np.pi * (np.arange(corners) + 0.5) / corners
        reach = np.max([u * np.cos(t) + v * np.sin(t) for t in turns], axis=0)
        return reach <= np.cos(np.pi / corners)

    return inside


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """A star of five rays, its inner radius half of the outer."""
    angle = np.abs((np.arctan2(v, u) % (2 * np.pi / 5)) - np.pi / 5)  # 0 between two rays, pi/5 on a ray
    x, y = np.hypot(u, v) * np.cos(angle), np.hypot(u, v) * np.sin(angle)
    tip = np.cos(np.pi / 5), np.sin(np.pi / 5)
    # The edge runs from (0.5, 0), between the rays, to the tip.
    return (x - 0.5) * tip[1] - y * (tip[0] - 0.5) <= 0


# Shape -> (points inside of it, its area), in units of its own.
INSIDE: dict[str, tuple[Inside, float]] = {
    "triangle": (_regular(3), 3 * np.sqrt(3) / 4),
    "rectangle": (lambda u, v: (np.abs(u) <= 1) & (np.abs(v) <= 0.5), 2.0),
    "ellipse": (lambda u, v: u**2 + 4 * v**2 <= 1, np.pi / 2),
    "cross": (
        lambda u, v: ((np.abs(u) <= 0.3) & (np.abs(v) <= 1)) | ((np.abs(v) <= 0.3) & (np.abs(u) <= 1)),
        4 * 0.6 - 0.36,
    ),
    "star": (_star, 5 * 0.5 * np.sin(np.pi / 5)),
    "ring": (lambda u, v: (u**2 + v**2 <= 1) & (u**2 + v**2 >= 0.25), 0.75 * np.pi),
}


def _varied(
    n: int, names: tuple[str, ...], seed: int, place: float, size: float, intensity: float, noise: float
) -> tuple[list[np.ndarray], dict[str, list[np.ndarray]]]:
    from scipy import ndimage

    fine = (np.arange(SIDE * _FINE) + 0.5) / _FINE - 0.5  # pixel i reaches from i - 1/2 to i + 1/2
    images: list[np.ndarray] = []
    factors: dict[str, list[np.ndarray]] = {key: [] for key in ("row", "column", "angle", "size", "intensity", "blur")}
    for label, name in enumerate(names):
        stream = np.random.default_rng([seed, label])  # a class does not depend on the others
        drawn = {
            "row": stream.uniform(-place, place, n),
            "column": stream.uniform(-place, place, n),
            "angle": stream.uniform(0, 360, n),
            "size": stream.uniform(1 - size, 1 + size, n),
            "intensity": stream.uniform(intensity, 1, n),
            "blur": stream.uniform(0.9, 1.1, n),
        }
        inside, area = INSIDE[name]
        made = np.empty((n, SIDE, SIDE))
        for i in range(n):
            unit = drawn["size"][i] * np.sqrt(AREA / area)
            angle = np.deg2rad(drawn["angle"][i])
            r = (fine[:, None] - CENTRE - drawn["row"][i]) / unit
            c = (fine[None, :] - CENTRE - drawn["column"][i]) / unit
            covered = inside(c * np.cos(angle) + r * np.sin(angle), r * np.cos(angle) - c * np.sin(angle))
            image = covered.reshape(SIDE, _FINE, SIDE, _FINE).mean(axis=(1, 3))
            made[i] = drawn["intensity"][i] * ndimage.gaussian_filter(image, drawn["blur"][i])
        images.append(made + noise * stream.standard_normal(made.shape))
        for key, values in drawn.items():
            factors[key].append(values)
    return images, factors
