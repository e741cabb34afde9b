"""SVHN, the Street View House Numbers: cropped 32x32 digits in the official MATLAB files.

Source: Y. Netzer et al., "Reading Digits in Natural Images with Unsupervised Feature Learning" (2011),
ufldl.stanford.edu/housenumbers. A file with as many images as the official one must have the official MD5; a smaller
one is accepted as a subset, and its origin says "partial".
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch

from local_elasticity.base.checks import check_flag
from local_elasticity.data.checks import is_file, kind_and_message
from local_elasticity.data.files import (
    Entry,
    Folders,
    Official,
    cache_folder,
    check_split,
    damaged,
    fetch,
    in_cache,
    md5,
    not_at_hand,
    places,
    read_bytes,
)
from local_elasticity.data.images import LabelledImages

SITE = "http://ufldl.stanford.edu/housenumbers/"
FILES = {
    "train": Official("train_32x32.mat", SITE + "train_32x32.mat", "e26dedcc434d2e4c54c9b2d4a06d8373"),
    "test": Official("test_32x32.mat", SITE + "test_32x32.mat", "eb5a983be6a315427106f1b164d9cef3"),
}
SIZES = {"train": 73_257, "test": 26_032}
FOLDERS = ("svhn", "SVHN", "housenumbers")
PER_CLASS = "4,659 to 13,861 train + 1,595 to 5,099 test"


def svhn(
    split: str = "train", *, folders: Folders = None, download: bool = True, progress: bool = True
) -> LabelledImages:
    """Read SVHN: 32x32 colour digits, ten classes of unequal size. The files' label 10 is the digit 0 and becomes 0.

    Args:
        split: ``"train"`` or ``"test"``.
        folders: searched first.
        download: whether the file may be downloaded.
        progress: whether to show a progress bar.

    Raises:
        InputError: when the file is not at hand or damaged.
    """
    for what, value in (("download", download), ("progress", progress)):
        check_flag(what, value)
    check_split("svhn", split)
    official = FILES[split]
    found = _find(split, folders)
    if found is None and not download:
        not_at_hand(f"svhn {split}", official.file, [official], folders)
    return _read(found or fetch([official], cache_folder() / "svhn", progress)[0], split)


def entries(folders: Folders = None) -> list[Entry]:
    """List the set for the catalogue, without reading images."""
    found = _find("train", folders)
    whole = found is not None and found.stat().st_size > 0.5 * SIZES["train"] * 3072
    state = ("complete, lossless" if whole else "partial, lossless") if found else "not at hand"
    counts = PER_CLASS if whole or not found else "unknown until read"
    return [Entry("svhn", "", 10, (3, 32, 32), counts, found, state, tuple(FILES.values()))]


def _find(split: str, folders: Folders) -> Path | None:
    files = (place / FILES[split].file for place in places(FOLDERS, folders))
    return next((file for file in files if is_file(file)), None)


def _read(path: Path, split: str) -> LabelledImages:
    """Read X (32, 32, 3, n) and y (n, 1)."""
    from scipy.io import loadmat

    official = FILES[split]
    blob = read_bytes(path)
    try:
        contents = loadmat(io.BytesIO(blob), variable_names=["X", "y"])
        pixels, labels = contents["X"], contents["y"].reshape(-1)
    except Exception as error:  # what a damaged file makes the reader do is open-ended
        raise damaged(path, expected="a whole MATLAB file with X and y", got=kind_and_message(error)) from error
    n = len(labels)
    if labels.dtype.kind not in "iuf" or (labels != labels.round()).any():
        raise damaged(path, expected="y: whole numbers", got=f"other values, {labels.dtype}")
    if not isinstance(pixels, np.ndarray) or pixels.shape != (32, 32, 3, n) or pixels.dtype != np.uint8 or not n:
        raise damaged(path, expected=f"X: bytes of shape (32, 32, 3, {n})", got=f"{pixels.dtype} {pixels.shape}")
    if not 1 <= labels.min() <= labels.max() <= 10:
        raise damaged(path, expected="labels in 1 ... 10", got=f"labels from {labels.min()} to {labels.max()}")
    complete = n == SIZES[split]
    if (complete or in_cache(path)) and (found := md5(path)) != official.md5:
        raise damaged(path, expected=f"MD5 {official.md5}", got=found)
    extent = "complete" if complete else f"partial: {n:,} of {SIZES[split]:,} {split} images"
    return LabelledImages(
        images=torch.from_numpy(np.ascontiguousarray(pixels.transpose(3, 2, 0, 1))),
        labels=torch.from_numpy(labels.astype(np.int64) % 10),
        class_names=tuple("0123456789"),
        name="svhn",
        origin=f"{path.name}, MATLAB, {extent}, lossless",
        split=split,
        indices=torch.arange(n),
        source="official" if complete else "subset",
    )
