"""The small digits that come inside scikit-learn: 1,797 images of 8x8, no download.

Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits" (UCI, 1998), the test set.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import torch

from local_elasticity.base.errors import missing_extra
from local_elasticity.data.files import Entry, check_split
from local_elasticity.data.images import LabelledImages

TRAIN = 1437
"""The first four fifths are "train" and the rest "test": the set has no split of its own."""


def digits(split: str = "train") -> LabelledImages:
    """Read the digits: 8x8 grey, levels 0 ... 16 kept as they are (``white`` is 16), about 144 + 36 images a class.

    Args:
        split: ``"train"`` (the first 1,437 images), ``"test"`` (the last 360) or ``"all"``.

    Raises:
        InputError: without scikit-learn, or for another split.
    """
    check_split("digits", split, ("train", "test", "all"))
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise missing_extra("scikit-learn", "data", "the small digits inside it") from error
    pixels, labels = load_digits(return_X_y=True)
    chosen = {"train": slice(0, TRAIN), "test": slice(TRAIN, None), "all": slice(None)}[split]
    part = {"train": f"first {TRAIN:,} images", "test": f"last {len(labels) - TRAIN} images", "all": "all images"}[
        split
    ]
    return LabelledImages(
        images=torch.from_numpy(pixels[chosen].astype(np.uint8).reshape(-1, 1, 8, 8)),
        labels=torch.from_numpy(labels[chosen].astype(np.int64)),
        class_names=tuple("0123456789"),
        name="digits",
        origin=f"digits inside scikit-learn, {part} of {len(labels):,}, complete, lossless",
        split=split,
        indices=torch.arange(len(labels))[chosen],
        source="official",
        white=16,
    )


def entries() -> list[Entry]:
    """List the set for the catalogue, without importing scikit-learn."""
    spec = importlib.util.find_spec("sklearn")
    found = Path(spec.origin).parent if spec and spec.origin else None
    state = "complete, lossless" if found else "not at hand (install scikit-learn)"
    return [Entry("digits", "", 10, (1, 8, 8), "about 144 train + 36 test", found, state)]
