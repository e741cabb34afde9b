"""Image folders: one folder of images a class, on disk or in a tar archive, decoded once and then kept in the cache."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from local_elasticity.base.checks import check_flag, check_path, in_words
from local_elasticity.base.errors import InputError
from local_elasticity.data.archives import is_archive, opened
from local_elasticity.data.checks import is_folder, printable
from local_elasticity.data.decoding import Size, check_size, decode
from local_elasticity.data.files import cache_folder, counting, damaged, unreadable
from local_elasticity.data.images import LabelledImages
from local_elasticity.data.listing import canonical, inside, list_split

CACHE_FROM = 1000
"""Fewer images than this are decoded each time: they take no time, and leave no cache behind."""


def image_folder(
    path: str | os.PathLike[str],
    split: str = "train",
    *,
    size: Size = None,
    name: str | None = None,
    cache: bool = True,
    progress: bool = True,
) -> LabelledImages:
    """Read a folder (or a tar archive of one) that holds one folder of images for each class.

    The class folders lie at the top, or in split folders (``train``, ``test``, ``val`` and the names in use for them,
    whatever their capitals); around them there may be further folders. Classes are those of all splits together,
    sorted, so that a label means the same in each; images are sorted by class and path: that order is what ``indices``
    count. Every file counts once, whatever links lead to it; hidden files, pipes and devices are passed over, and
    ``origin`` says how many. Images are turned as their EXIF orientation says, and grey if all of them are, else red,
    green, blue; transparency is dropped. Images of more than 8 bits a channel, of several frames, and damaged ones are
    refused, naming the file. Sets of 1,000 images and more are kept, decoded, in the cache folder until a file's name,
    size or time changes.

    Args:
        path: the folder or archive (.tar, .tar.gz, .tar.xz, .tar.bz2).
        split: which of the split folders: ``"train"``, ``"test"`` or ``"val"``; ``"train"`` also for a folder without.
        size: resize to this height and width (bilinear); without it all images must have one size.
        name: of the data set; the folder's name unless given.
        cache: whether decoded images may be kept.
        progress: whether to show a progress bar.

    Raises:
        InputError: without Pillow, for a folder of another shape, images of several sizes, or damaged ones.
    """
    path = check_path("path", path)
    height_width = check_size(size)
    for what, value in (("cache", cache), ("progress", progress)):
        check_flag(what, value)
    for what, text in (("split", split), *((("name", name),) if name is not None else ())):
        if not isinstance(text, str):
            raise InputError(expected=f"{what}: a text", got=in_words(text), do=f"correct {what}")
    if not is_folder(path) and not is_archive(path):
        raise _no_folder(path)
    split = canonical(split)
    name = name or printable(_plain_name(path)) or "images"
    stored = None
    if path.is_file() and cache:  # an archive need not even be opened again
        stored = _cache_path(path, split, height_width, [_state(path)])
        if (decoded := _load(stored)) is not None:
            return _labelled(decoded, name=name, split=split, path=path)
    listed = list_split(path, split)
    if path.is_dir() and cache and len(listed.classes) >= CACHE_FROM:
        states = (f"{file}:{_state(path / file)}" for file in sorted(listed.classes))
        stored = _cache_path(path, split, height_width, [*listed.class_names, listed.passed, *states])
        if (decoded := _load(stored)) is not None:
            return _labelled(decoded, name=name, split=split, path=path)
    classes = listed.classes
    order = {file: i for i, file in enumerate(sorted(classes, key=lambda file: (classes[file], file)))}
    label = {class_name: i for i, class_name in enumerate(listed.class_names)}
    pixels = _decode(path, order, height_width, progress)
    decoded = _Decoded(pixels, np.array([label[classes[file]] for file in order]), listed.class_names, listed.passed)
    if stored and len(pixels) >= CACHE_FROM:
        _save(stored, decoded)
    return _labelled(decoded, name=name, split=split, path=path)


def _no_folder(path: Path) -> InputError:
    """Make the error for a path that leads to nothing that can be read."""
    packed = path.name.lower().endswith((".zip", ".7z", ".rar"))
    return InputError(
        expected="a folder of class folders, or a tar archive of one",
        got=printable(str(path)),
        do="unpack it, and give its folder" if packed else "correct the path",
    )


def _plain_name(path: Path) -> str:
    """The name of a folder, or of an archive without its ending."""
    if is_folder(path):
        return path.resolve().name
    return re.sub(r"\.(tar(\.\w+)?|tgz|txz|tbz2)$", "", path.name, flags=re.IGNORECASE)


class _Decoded(NamedTuple):
    """What is stored of a split: pixels, labels, the classes of all splits, and what was passed over."""

    pixels: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    passed: str


def _labelled(decoded: _Decoded, *, name: str, split: str, path: Path) -> LabelledImages:
    kind = "archive" if path.is_file() else "folder"
    count = len(decoded.pixels)
    origin = f"image {kind} {printable(path.resolve().name)}, {split}, all {count:,} images, as their files encode them"
    return LabelledImages(
        images=torch.from_numpy(decoded.pixels),
        labels=torch.from_numpy(decoded.labels.astype(np.int64)),
        class_names=decoded.class_names,
        name=name,
        origin=f"{origin}; {decoded.passed}" if decoded.passed else origin,
        split=split,
        indices=torch.arange(count),
        source="folder",
    )


# --- decoding ----------------------------------------------------------------------------------------------------


def _decode(path: Path, order: dict[str, int], size: tuple[int, int] | None, progress: bool) -> np.ndarray:
    """Decode the images into (samples, channels, height, width), uint8, each at its place in the order."""
    decoded: list[np.ndarray] = [np.empty(0)] * len(order)
    first: tuple[str, tuple[int, ...]] | None = None
    with counting(f"decoding {printable(path.name)}", len(order), progress) as bar:
        for file, blob in _blobs(path, order):
            pixels = decode(blob, printable(file), size)
            first = first or (printable(file), pixels.shape[1:])
            if pixels.shape[1:] != first[1]:
                raise InputError(
                    expected=f"images of one size ({first[0]} has {first[1][0]}x{first[1][1]})",
                    got=f"{printable(file)} with {pixels.shape[1]}x{pixels.shape[2]} (height x width)",
                    do=f"give size= to resize all of them, for example size={first[1]}; --size on the command line",
                )
            decoded[order[file]] = pixels
            bar.update(1)
    if missing := next((file for file, place in order.items() if not decoded[place].size), None):
        raise damaged(path, expected="every image that it lists", got=f"none for {printable(missing)}")
    channels = max(len(pixels) for pixels in decoded)
    stacked = np.empty((len(decoded), channels, *decoded[0].shape[1:]), np.uint8)
    for place, pixels in zip(stacked, decoded, strict=True):
        place[:] = pixels  # a grey image among coloured ones fills all three channels
    return stacked


def _blobs(path: Path, order: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    """Yield each image's bytes: a folder's in order, an archive's in one pass."""
    if path.is_dir():
        for file in order:
            try:
                blob = (path / file).read_bytes()
            except OSError as error:
                raise unreadable(str(path / file), "an image", error) from error
            yield file, blob
        return
    wanted = set(order)
    with opened(path) as archive:
        for member in archive:
            file = "/".join(inside(member))
            if file in wanted and not member.isdir() and (stream := archive.extractfile(member)):
                yield file, stream.read()


# --- the cache of decoded images ---------------------------------------------------------------------------------


def _state(file: Path) -> str:
    try:
        status = file.stat()
    except OSError as error:
        raise unreadable(str(file), "an image or archive", error) from error
    return f"{status.st_size}:{status.st_mtime_ns}"


def _cache_path(path: Path, split: str, size: tuple[int, int] | None, states: Iterable[str]) -> Path:
    """Name the decoded array after everything that it depends on."""
    text = "\n".join(["2", str(path.resolve()), split, str(size), *states])
    key = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).hexdigest()
    stem = re.sub(r"[^\w-]", "_", path.name.partition(".")[0], flags=re.ASCII)[:60]
    return cache_folder() / "decoded" / f"{stem}-{split}-{key}.npz"


def _load(path: Path) -> _Decoded | None:
    """Read a decoded array; a missing or damaged one is simply made anew."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            pixels, labels, passed = stored["pixels"], stored["labels"], str(stored["passed"])
            class_names = tuple(str(name) for name in stored["class_names"])
    except Exception:  # what a damaged file makes the reader do is open-ended
        return None
    whole = (
        pixels.ndim == 4 and pixels.dtype == np.uint8 and labels.shape == (len(pixels),) and labels.dtype.kind == "i"
    )
    whole = whole and len(labels) > 0 and 0 <= labels.min() <= labels.max() < len(class_names)
    return _Decoded(pixels, labels, class_names, passed) if whole else None


def _save(path: Path, decoded: _Decoded) -> None:
    """Keep a decoded array: whole or not at all, and without complaint where the cache cannot be written."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(file, **{**decoded._asdict(), "class_names": np.array(decoded.class_names)})
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
