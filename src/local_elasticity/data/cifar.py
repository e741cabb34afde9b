"""CIFAR-10 and CIFAR-100: the official python and binary layouts, subsets in these layouts, and a JPEG image folder.

Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images" (2009),
www.cs.toronto.edu/~kriz/cifar.html.

Checksums. A file that holds as many images as the official one must have the official MD5, wherever it lies: it is the
file or it is damaged. A file with fewer images is accepted as a subset if its structure is sound, and the origin of
its images says "partial". There is no published MD5 for the unpacked files of CIFAR-10's binary layout: they are
checked by their size and labels. In the cache only official archives are accepted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from local_elasticity.base.checks import check_flag, check_whole
from local_elasticity.base.errors import InputError
from local_elasticity.data.archives import members, opened
from local_elasticity.data.checks import check_classes, check_name, is_file
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
from local_elasticity.data.folder import image_folder
from local_elasticity.data.images import LabelledImages
from local_elasticity.data.pickles import read_pickle

PIXELS = 3 * 32 * 32
SITE = "https://www.cs.toronto.edu/~kriz/"

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_FINE = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
    caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
    flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
    motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate
    poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
    squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
    wardrobe whale willow_tree wolf woman worm
"""
CIFAR100_CLASSES = tuple(_FINE.split())
CIFAR100_SUPERCLASSES = (
    *("aquatic_mammals", "fish", "flowers", "food_containers", "fruit_and_vegetables", "household_electrical_devices"),
    *("household_furniture", "insects", "large_carnivores", "large_man-made_outdoor_things"),
    *("large_natural_outdoor_scenes", "large_omnivores_and_herbivores", "medium_mammals", "non-insect_invertebrates"),
    *("people", "reptiles", "small_mammals", "trees", "vehicles_1", "vehicles_2"),
)
_ALIASES = {"plane": "airplane", "aeroplane": "airplane", "car": "automobile", "boat": "ship", "lorry": "truck"}


@dataclass(frozen=True)
class _Cifar:
    """What one of the two sets looks like on disk. A label key is a column of labels, in the order of the bytes."""

    name: str
    python: Mapping[str, Mapping[str, str]]  # split -> file -> MD5
    binary: Mapping[str, Mapping[str, str]]  # "" where no MD5 is published
    records: Mapping[str, int]  # images in one file of a split
    label_keys: tuple[str, ...]
    label_counts: tuple[int, ...]
    folders: tuple[str, ...]
    archives: Mapping[str, Official]  # by layout
    meta: str

    def files(self, layout: str, split: str) -> Mapping[str, str]:
        return (self.python if layout == "python" else self.binary)[split]

    def size(self, split: str) -> int:
        return self.records[split] * len(self.python[split])


CIFAR10 = _Cifar(
    name="cifar10",
    python={
        "train": {
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        },
        "test": {"test_batch": "40351d587109b95175f43aff81a1287e"},
    },
    binary={"train": {f"data_batch_{i}.bin": "" for i in range(1, 6)}, "test": {"test_batch.bin": ""}},
    records={"train": 10_000, "test": 10_000},
    label_keys=("labels",),
    label_counts=(10,),
    folders=(
        *("cifar-10-batches-py", "cifar-10-batches-bin", "cifar-10-python", "cifar-10-binary", "cifar10", "cifar-10"),
        *("cifar10-subset-bin", "cifar10-bin", "CIFAR10", "cifar10/cifar-10-batches-py", "CIFAR10/cifar-10-batches-py"),
    ),
    archives={
        "python": Official(
            "cifar-10-python.tar.gz", SITE + "cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"
        ),
        "binary": Official(
            "cifar-10-binary.tar.gz", SITE + "cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"
        ),
    },
    meta="batches.meta",
)

CIFAR100 = _Cifar(
    name="cifar100",
    python={
        "train": {"train": "16019d7e3df5f24257cddd939b257f8d"},
        "test": {"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
    },
    binary={
        "train": {"train.bin": "6172c7755cfe09b2fe270c85cebc1b15"},
        "test": {"test.bin": "4499cfba6c016c1be1438163640a0898"},
    },
    records={"train": 50_000, "test": 10_000},
    label_keys=("coarse_labels", "fine_labels"),
    label_counts=(20, 100),
    folders=(
        *("cifar-100-python", "cifar-100-binary", "cifar100", "cifar-100", "cifar100-subset-bin", "cifar100-bin"),
        *("CIFAR100", "cifar100/cifar-100-python", "CIFAR100/cifar-100-python"),
    ),
    archives={
        "python": Official(
            "cifar-100-python.tar.gz", SITE + "cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85"
        ),
        "binary": Official(
            "cifar-100-binary.tar.gz", SITE + "cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8"
        ),
    },
    meta="meta",
)

JPEG_PLACES = ("cifar10-jpeg.tar.xz", "cifar10-jpeg.tar.gz", "cifar10-jpeg.tar", "cifar10-jpeg")


def cifar10(
    split: str = "train",
    *,
    source: Literal["auto", "official", "subset", "jpeg"] = "auto",
    at_least: int | None = None,
    classes: Sequence[str | int] | None = None,
    folders: Folders = None,
    download: bool = True,
    progress: bool = True,
) -> LabelledImages:
    """Read CIFAR-10: 32x32 colour images, ten classes, 5,000 + 1,000 images a class when complete.

    Images always come from one source. ``"auto"`` takes the first of these that is at hand and has enough images of
    each class asked for: the official complete files, a lossless subset in the binary or python layout, the JPEG image
    folder (lossy); then it downloads the official files. Read another split from the same source with
    ``source=train.source``.

    Args:
        split: ``"train"`` or ``"test"``.
        source: which source.
        at_least: images wanted of each class.
        classes: keep these classes, relabelled in this order ("plane" and "car" are known too).
        folders: searched first.
        download: whether the official files may be downloaded.
        progress: whether to show a progress bar.

    Raises:
        InputError: when no source has the images, or a file is damaged.
    """
    return _select(
        CIFAR10,
        split,
        (0, CIFAR10_CLASSES),
        source=source,
        sources=("official", "subset", "jpeg"),
        at_least=at_least,
        classes=classes,
        folders=folders,
        download=download,
        progress=progress,
    )


def cifar100(
    split: str = "train",
    *,
    labels: Literal["fine", "coarse"] = "fine",
    source: Literal["auto", "official", "subset"] = "auto",
    at_least: int | None = None,
    classes: Sequence[str | int] | None = None,
    folders: Folders = None,
    download: bool = True,
    progress: bool = True,
) -> LabelledImages:
    """Read CIFAR-100: 32x32 colour images, 100 classes (500 + 100 images each) or 20 superclasses (2,500 + 500).

    Args:
        split: ``"train"`` or ``"test"``.
        labels: ``"fine"`` for the classes, ``"coarse"`` for the superclasses.
        source: ``"official"`` (complete), ``"subset"``, or ``"auto"``: the first that has the images, else a download.
        at_least: images wanted of each class.
        classes: keep these classes, relabelled in this order.
        folders: searched first.
        download: whether the official files may be downloaded.
        progress: whether to show a progress bar.

    Raises:
        InputError: when no source has the images, or a file is damaged.
    """
    columns = {"coarse": (0, CIFAR100_SUPERCLASSES), "fine": (1, CIFAR100_CLASSES)}
    check_name("labels of CIFAR-100", labels, columns)
    return _select(
        CIFAR100,
        split,
        columns[labels],
        source=source,
        sources=("official", "subset"),
        at_least=at_least,
        classes=classes,
        folders=folders,
        download=download,
        progress=progress,
    )


def entries(folders: Folders = None) -> list[Entry]:
    """List the sources of both sets for the catalogue, without reading images."""
    listed = []
    for cifar, classes in ((CIFAR10, 10), (CIFAR100, 100)):
        download = (cifar.archives["python"],)
        whole = " + ".join(f"{cifar.size(split) // classes:,} {split}" for split in ("train", "test"))
        found = []
        for layout, path in _found(cifar, "train", folders):
            complete = _complete(cifar, layout, path)
            counts = whole if complete else _estimate(cifar, layout, path, classes)
            source = "official" if complete else "subset"
            state = f"{'complete' if complete else 'partial'}, lossless"
            found.append(Entry(cifar.name, source, classes, (3, 32, 32), counts, path, state, download))
        if cifar is CIFAR10:
            found += [
                Entry(cifar.name, "jpeg", classes, (3, 32, 32), f"up to {whole}", path, "JPEG, lossy", download)
                for path in _jpegs(folders)
            ]
        missing = Entry(cifar.name, "official", classes, (3, 32, 32), whole, None, "not at hand", download)
        listed += sorted(found, key=lambda e: ("official", "subset", "jpeg").index(e.source)) or [missing]
    return listed


# --- which source ------------------------------------------------------------------------------------------------


def _select(
    cifar: _Cifar,
    split: str,
    labelling: tuple[int, tuple[str, ...]],
    *,
    source: str,
    sources: tuple[str, ...],
    at_least: int | None,
    classes: Sequence[str | int] | None,
    folders: Folders,
    download: bool,
    progress: bool,
) -> LabelledImages:
    """Read from the first source that has enough images of each class, else download, else refuse.

    ``labelling`` is the column of the labels in the files and the names of the classes; ``sources`` are all that there
    are, the best first.
    """
    column, names = labelling
    official = cifar.archives["python"]
    check_split(cifar.name, split)
    check_name(f"a source of {cifar.name}", source, ("auto", *sources))
    for what, value in (("download", download), ("progress", progress)):
        check_flag(what, value)
    if at_least is not None:
        check_whole("at_least", at_least, 1)
    classes = None if classes is None else check_classes(classes)
    most = cifar.size(split) // len(names)
    if at_least is not None and at_least > most:
        raise InputError(
            expected=f"at most {most} images a class: the whole of {cifar.name} {split} has no more",
            got=f"at_least={at_least}",
            do="ask for fewer",
        )
    short = []
    for kind, layout, path in _candidates(cifar, split, sources if source == "auto" else (source,), folders):
        if kind == "jpeg":
            images = _read_jpeg(path, split, progress)
        else:
            images = _read(cifar, layout, path, split, kind, column, names)
        wanted = range(len(names)) if classes is None else [images.class_label(c) for c in classes]
        least = min(wanted, key=lambda label: int(images.counts[label]))
        if (at_least is None and classes is None) or images.counts[least] >= (at_least or 1):
            return images if classes is None else images.subset(classes)
        short.append(f"{int(images.counts[least])} of {names[least]!r} in {images.origin}")
    if download and source in ("auto", "official"):
        try:
            (path,) = fetch([official], cache_folder(), progress)
        except InputError as error:
            if not short:
                raise
            short.append(f"{error.got} when downloading {official.address}")
        else:
            images = _read(cifar, "python", path, split, "official", column, names)
            return images if classes is None else images.subset(classes)
    if short:
        raise InputError(
            expected=f"at least {at_least or 1} images of each class of {cifar.name} {split}",
            got="; ".join(short),
            do=f"ask for fewer, or put {official.file} ({official.address}) into a data folder",
        )
    text = f"{official.file}, {cifar.archives['binary'].file} or one of these unpacked"
    text += f", or {JPEG_PLACES[0]}" if "jpeg" in sources else ""
    not_at_hand(
        f"{cifar.name} {split}" + (f" (source {source!r})" if source != "auto" else ""),
        text,
        [official] if source in ("auto", "official") else [],
        folders,
    )


def _candidates(cifar: _Cifar, split: str, kinds: Sequence[str], folders: Folders) -> Iterator[tuple[str, str, Path]]:
    """Yield (source, layout, path) of what is at hand, in the order of preference."""
    found = [
        ("official" if _complete(cifar, layout, path) else "subset", layout, path)
        for layout, path in _found(cifar, split, folders)
    ]
    for kind in kinds:
        if kind == "jpeg":
            yield from (("jpeg", "jpeg", path) for path in _jpegs(folders))
        else:
            yield from (candidate for candidate in found if candidate[0] == kind)


def _found(cifar: _Cifar, split: str, folders: Folders) -> Iterator[tuple[str, Path]]:
    """Yield (layout, path) of the folders and archives that have files of this split."""
    for place in places(cifar.folders, folders):
        for layout in ("python", "binary"):
            there = any(is_file(place / file) for file in cifar.files(layout, split))
            # CIFAR-100's python files are called "train" and "test": only beside their "meta" are they what they seem.
            vague = layout == "python" and split in cifar.python[split]
            if there and (not vague or (place / cifar.meta).is_file() or place.name in cifar.folders):
                yield layout, place
            if is_file(place / cifar.archives[layout].file):
                yield layout, place / cifar.archives[layout].file


def _jpegs(folders: Folders) -> Iterator[Path]:
    for place in places((), folders):
        yield from (place / name for name in JPEG_PLACES if (place / name).exists())


def _complete(cifar: _Cifar, layout: str, path: Path) -> bool:
    """Judge by sizes alone whether both splits are whole."""
    if path.is_file():  # photographs hardly compress: the official archives have 92 % of the size of their pixels
        return path.stat().st_size > 0.85 * PIXELS * (cifar.size("train") + cifar.size("test"))
    for split in ("train", "test"):
        for file in cifar.files(layout, split):
            size = (path / file).stat().st_size if (path / file).is_file() else 0
            pixels, labels = cifar.records[split] * PIXELS, cifar.records[split] * len(cifar.label_keys)
            # The official pickles are 1 % larger than their pixels (labels and file names).
            if not (size == pixels + labels if layout == "binary" else pixels < size < 1.02 * pixels):
                return False
    return True


def _estimate(cifar: _Cifar, layout: str, path: Path, classes: int) -> str:
    """Say about how many images a class a subset has, from the sizes of its files."""
    if layout == "python" or path.is_file():
        return "unknown until read"
    record = PIXELS + len(cifar.label_keys)
    files = {split: [path / file for file in cifar.files(layout, split)] for split in ("train", "test")}
    totals = {split: sum(f.stat().st_size for f in files[split] if f.is_file()) // record for split in files}
    return "about " + " + ".join(f"{round(total / classes):,} {split}" for split, total in totals.items())


# --- reading -----------------------------------------------------------------------------------------------------


def _read(
    cifar: _Cifar, layout: str, path: Path, split: str, source: str, column: int, names: tuple[str, ...]
) -> LabelledImages:
    """Read one split from a folder or an archive in one of the official layouts."""
    blobs = _contents(path, list(cifar.files(layout, split)))
    parse = _parse_python if layout == "python" else _parse_binary
    parts = [parse(cifar, blob, f"{path.name}/{file}") for file, blob in blobs.items()]
    if not parts:
        raise damaged(path, expected=f"files of the {split} split", got="none of them")
    unchecked = False
    for (file, blob), (pixels, _) in zip(blobs.items(), parts, strict=True):
        if len(pixels) > cifar.records[split]:
            raise damaged(path / file, expected=f"at most {cifar.records[split]} images", got=f"{len(pixels)}")
        if len(pixels) == cifar.records[split]:
            known = cifar.files(layout, split)[file]
            unchecked |= not known
            if known and md5(blob) != known:
                raise damaged(path / file, expected=f"MD5 {known}, as this file is whole", got=md5(blob))
    pixels = np.concatenate([part[0] for part in parts])
    labels = np.concatenate([part[1] for part in parts])[:, column]
    complete = len(pixels) == cifar.size(split)
    archive = cifar.archives[layout]
    if path.is_file() and (in_cache(path) or (complete and unchecked)) and (found := md5(path)) != archive.md5:
        raise damaged(path, expected=f"MD5 {archive.md5}", got=found)
    if source == "official" and not complete:
        raise damaged(path, expected=f"{cifar.size(split):,} {split} images, going by the size", got=f"{len(pixels):,}")
    extent = "complete" if complete else f"partial: {len(pixels):,} of {cifar.size(split):,} {split} images"
    what = path.name if path.is_file() else f"{path.name}/{{{','.join(blobs)}}}"
    return LabelledImages(
        images=torch.from_numpy(pixels),
        labels=torch.from_numpy(labels.astype(np.int64)),
        class_names=names,
        name=cifar.name,
        origin=f"{source} {what}, {layout} layout, {extent}, lossless",
        split=split,
        indices=torch.arange(len(pixels)),
        source=source,
        aliases=_ALIASES if cifar.name == "cifar10" else {},
    )


def _contents(path: Path, files: list[str]) -> dict[str, bytes]:
    """Read those of the files that are there, from a folder or (in one pass, nothing unpacked to disk) an archive."""
    if path.is_dir():
        return {file: read_bytes(path / file) for file in files if is_file(path / file)}
    found: dict[str, bytes] = {}
    with opened(path) as archive:
        for member in members(archive):
            file = member.name.rpartition("/")[2]
            if file in files and member.isreg() and (stream := archive.extractfile(member)):
                found[file] = stream.read()
    return {file: found[file] for file in files if file in found}


def _parse_binary(cifar: _Cifar, blob: bytes, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Read records of label bytes (one, or coarse and fine) and 3,072 pixel bytes: red, green, blue planes."""
    n_labels = len(cifar.label_keys)
    record = n_labels + PIXELS
    if not blob or len(blob) % record:
        raise damaged(name, expected=f"a multiple of {record:,} bytes (one record)", got=f"{len(blob):,} bytes")
    table = np.frombuffer(blob, np.uint8).reshape(-1, record)
    labels = table[:, :n_labels]
    _check_labels(cifar, labels, name)
    return table[:, n_labels:].reshape(-1, 3, 32, 32), labels


def _parse_python(cifar: _Cifar, blob: bytes, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Read a pickled dictionary of ``data`` (n, 3072) and lists of labels."""
    batch = read_pickle(blob, name)
    batch = {_text(key): value for key, value in batch.items()} if isinstance(batch, dict) else {}
    pixels = batch.get("data")
    columns = [batch.get(key) for key in cifar.label_keys]
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (PIXELS,):
        got = f"{pixels.dtype} {pixels.shape}" if isinstance(pixels, np.ndarray) else f"keys {sorted(batch)}"
        raise damaged(name, expected=f"a dictionary with uint8 'data' of shape (n, {PIXELS})", got=got)
    try:
        labels = np.array(columns).T
    except ValueError:
        labels = np.empty(0)
    if labels.shape != (len(pixels), len(columns)) or labels.dtype.kind not in "iu":
        raise damaged(
            name, expected=f"{len(pixels)} whole numbers in each of {', '.join(cifar.label_keys)}", got="other labels"
        )
    _check_labels(cifar, labels, name)
    return pixels.reshape(-1, 3, 32, 32), labels


def _check_labels(cifar: _Cifar, labels: np.ndarray, name: str) -> None:
    for column, (key, count) in enumerate(zip(cifar.label_keys, cifar.label_counts, strict=True)):
        if len(labels) and not 0 <= labels[:, column].min() <= labels[:, column].max() < count:
            worst = labels[:, column].max() if labels[:, column].max() >= count else labels[:, column].min()
            raise damaged(name, expected=f"{key} in 0 ... {count - 1} of {cifar.name}", got=f"a label {worst}")


def _text(key: object) -> str:
    return key.decode("latin1") if isinstance(key, bytes) else str(key)


def _read_jpeg(path: Path, split: str, progress: bool) -> LabelledImages:
    """Read one split of the JPEG image folder, and say that it is lossy."""
    images = image_folder(path, split=split, name="cifar10", progress=progress)
    if images.class_names != CIFAR10_CLASSES or images.shape != (3, 32, 32):
        raise damaged(
            path,
            expected="an image folder of CIFAR-10's ten classes, 32x32 colour",
            got=f"{images.n_classes} classes of shape {images.shape}",
        )
    whole = CIFAR10.size(split)
    extent = "complete" if len(images) == whole else f"partial: {len(images):,} of {whole:,} {split} images"
    return LabelledImages(
        images=images.images,
        labels=images.labels,
        class_names=CIFAR10_CLASSES,
        name="cifar10",
        origin=f"jpeg {path.name}, JPEG image folder, {extent}, lossy",
        split=split,
        indices=images.indices,
        source="jpeg",
        aliases=_ALIASES,
    )
