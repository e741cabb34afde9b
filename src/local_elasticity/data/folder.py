"""Image folders: one folder of images a class, on disk or in a tar archive, decoded once and then kept in the cache."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np
import torch

from local_elasticity.data.files import cache_folder, check_split, counting, damaged
from local_elasticity.data.images import LabelledImages
from local_elasticity.errors import InputError, missing_extra

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}
SPLITS = {"train": "train", "test": "test", "val": "val", "valid": "val", "validation": "val"}
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2")
CACHE_FROM = 1000
"""Fewer images than this are decoded each time: they take no time, and leave no cache behind."""

Size = int | tuple[int, int] | None


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

    The class folders lie at the top, or in ``train/``, ``test/``, ``val/``; around them there may be further folders.
    Classes are sorted by name, images by class and path: that order is what ``indices`` count. Images are grey if all
    of them are, else red, green, blue; transparency is dropped. Sets of 1,000 images and more are kept, decoded, in the
    cache folder until a file's name, size or time changes.

    Args:
        path: the folder or archive (.tar, .tar.gz, .tar.xz, .tar.bz2).
        split: which of the split folders; ``"train"`` also for a folder without splits.
        size: resize to this height and width (bilinear); without it all images must have one size.
        name: of the data set; the folder's name unless given.
        cache: whether decoded images may be kept.
        progress: whether to show a progress bar.

    Raises:
        InputError: without Pillow, for a folder of another shape, images of several sizes, or damaged ones.
    """
    path = Path(path).expanduser()
    shown = re.sub(r"\.(tar(\.\w+)?|tgz|txz)$", "", path.name) if path.is_file() else path.resolve().name
    name = name or shown
    height_width = _check_size(size)
    if not path.is_dir() and not is_archive(path):
        raise InputError(
            expected="a folder of class folders, or a tar archive of one", got=f"{path}", do="correct the path"
        )
    kept = None
    if path.is_file() and cache:  # an archive need not even be opened again
        kept = _cache_path(path, split, height_width, [_state(path)])
        if (found := _load(kept)) is not None:
            return _labelled(*found, name=name, split=split, path=path)
    images, listed = _list_images(path, split)
    if path.is_dir() and cache and len(images) >= CACHE_FROM:
        kept = _cache_path(path, split, height_width, [f"{image}:{_state(path / image)}" for image in listed])
        if (found := _load(kept)) is not None:
            return _labelled(*found, name=name, split=split, path=path)
    class_names = sorted(set(images.values()))
    order = {file: i for i, file in enumerate(sorted(images, key=lambda file: (images[file], file)))}
    pixels = _decode(path, order, height_width, progress)
    labels = np.array([class_names.index(images[file]) for file in order])
    if kept and len(pixels) >= CACHE_FROM:
        _save(kept, pixels, labels, class_names)
    return _labelled(pixels, labels, class_names, name=name, split=split, path=path)


def is_archive(path: Path) -> bool:
    """Say whether it is a file that is named as a tar archive."""
    return path.name.lower().endswith(ARCHIVES) and path.is_file()


def _labelled(
    pixels: np.ndarray, labels: np.ndarray, class_names: list[str], *, name: str, split: str, path: Path
) -> LabelledImages:
    kind = "archive" if path.is_file() else "folder"
    return LabelledImages(
        images=torch.from_numpy(pixels),
        labels=torch.from_numpy(labels.astype(np.int64)),
        class_names=tuple(class_names),
        name=name,
        origin=f"image {kind} {path.resolve().name}, {split}, all {len(pixels):,} images, as their files encode them",
        split=split,
        indices=torch.arange(len(pixels)),
        source="folder",
    )


def _check_size(size: Size) -> tuple[int, int] | None:
    pair = (size, size) if isinstance(size, int) else size
    if pair is not None and (len(pair) != 2 or min(pair) < 1):
        raise InputError(expected="size: pixels, or (height, width)", got=f"{size!r}", do="correct size")
    return pair


# --- what is there -----------------------------------------------------------------------------------------------


def _list_images(path: Path, split: str) -> tuple[dict[str, str], list[str]]:
    """List the images of a split: path within the folder -> class; and the paths in order.

    Raises:
        InputError: when the images do not lie in class folders, or there is no such split.
    """
    files = {file: PurePosixPath(file).parts for file in _walk(path)}
    if not files:
        raise InputError(
            expected=f"images ({', '.join(sorted(SUFFIXES))}) in class folders",
            got=f"none in {path}",
            do="check the path",
        )
    while True:
        tops = {parts[0] for parts in files.values()}
        shallow = min(len(parts) for parts in files.values())
        if shallow >= 3 and tops <= set(SPLITS):
            check_split(f"{path}", split, sorted({SPLITS[top] for top in tops}))
            files = {file: parts[1:] for file, parts in files.items() if SPLITS[parts[0]] == split}
            break
        if shallow < 3 or len(tops) > 1:
            check_split(f"{path}, which has no split folders,", split, ("train",))
            break
        files = {file: parts[1:] for file, parts in files.items()}
    stray = next((file for file, parts in files.items() if len(parts) < 2), None)
    if stray:
        raise InputError(
            expected=f"every image of {path} in the folder of its class",
            got=f"{stray} beside them",
            do="sort the images into one folder a class",
        )
    return {file: parts[0] for file, parts in files.items()}, sorted(files)


def _walk(path: Path) -> Iterator[str]:
    """Yield the paths of the images, hidden files left out."""
    if path.is_dir():
        for folder, inner, names in os.walk(path, followlinks=True):
            inner[:] = sorted(name for name in inner if not name.startswith("."))
            here = Path(folder).relative_to(path)
            yield from (str(PurePosixPath(here, name)) for name in sorted(names) if _is_image(name))
    else:
        with _opened(path) as archive:
            yield from (_inside(member) for member in archive if member.isreg() and _is_image(_inside(member)))


def _is_image(file: str) -> bool:
    parts = PurePosixPath(file).parts
    return PurePosixPath(file).suffix.lower() in SUFFIXES and not any(part.startswith(".") for part in parts)


def _inside(member: tarfile.TarInfo) -> str:
    """A member's path without a leading ``./``; nothing is ever unpacked to disk, so no path can lead astray."""
    return str(PurePosixPath(member.name))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(path) as archive:
            yield archive
    except InputError:
        raise
    except (tarfile.TarError, EOFError, OSError, zlib.error, _lzma_error()) as error:
        raise damaged(path, expected="a whole tar archive", got=f"{type(error).__name__}: {error}") from error


def _lzma_error() -> type[Exception]:
    """The error of damaged xz data; Python may be built without xz."""
    try:
        from lzma import LZMAError
    except ImportError:
        return tarfile.TarError
    return LZMAError


# --- decoding ----------------------------------------------------------------------------------------------------


def _decode(path: Path, order: dict[str, int], size: tuple[int, int] | None, progress: bool) -> np.ndarray:
    """Decode the images into (samples, channels, height, width), uint8, each at its place in the order."""
    decoded: list[np.ndarray] = [np.empty(0)] * len(order)
    first: tuple[str, tuple[int, ...]] | None = None
    with counting(f"decoding {path.name}", len(order), progress) as bar:
        for file, stream in _streams(path, order):
            pixels = _decode_one(stream, file, size)
            first = first or (file, pixels.shape[1:])
            if pixels.shape[1:] != first[1]:
                raise InputError(
                    expected=f"images of one size ({first[0]} has {first[1][0]}x{first[1][1]})",
                    got=f"{file} with {pixels.shape[1]}x{pixels.shape[2]} (height x width)",
                    do="give size= to resize all of them",
                )
            decoded[order[file]] = pixels
            bar.update(1)
    channels = max(len(pixels) for pixels in decoded)
    stacked = np.empty((len(decoded), channels, *decoded[0].shape[1:]), np.uint8)
    for place, pixels in zip(stacked, decoded, strict=True):
        place[:] = pixels  # a grey image among coloured ones fills all three channels
    return stacked


def _streams(path: Path, order: Iterable[str]) -> Iterator[tuple[str, IO[bytes]]]:
    """Yield each image's bytes: a folder's in order, an archive's in one pass."""
    if path.is_dir():
        for file in order:
            yield file, io.BytesIO((path / file).read_bytes())
        return
    wanted = set(order)
    with _opened(path) as archive:
        for member in archive:
            if member.isreg() and _inside(member) in wanted and (stream := archive.extractfile(member)):
                yield _inside(member), io.BytesIO(stream.read())


def _decode_one(stream: IO[bytes], file: str, size: tuple[int, int] | None) -> np.ndarray:
    """Decode one image to (1 or 3, height, width)."""
    try:
        from PIL import Image
    except ImportError as error:
        raise missing_extra("pillow", "data", "decoding images") from error
    try:
        image = Image.open(stream)
        if image.mode.startswith(("I", "F")):
            raise InputError(
                expected="images of 8 bits a channel", got=f"{file} with mode {image.mode}", do="convert it first"
            )
        image = image.convert("L" if image.mode in ("1", "L") else "RGB")
    except InputError:
        raise
    except Exception as error:  # what decoders make of damaged files is open-ended
        raise damaged(file, expected="a whole image", got=f"{type(error).__name__}: {error}") from error
    if size is not None and (image.height, image.width) != size:
        image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


# --- the cache of decoded images ---------------------------------------------------------------------------------


def _state(file: Path) -> str:
    status = file.stat()
    return f"{status.st_size}:{status.st_mtime_ns}"


def _cache_path(path: Path, split: str, size: tuple[int, int] | None, states: Iterable[str]) -> Path:
    """Name the decoded array after everything that it depends on."""
    text = "\n".join(["1", str(path.resolve()), split, str(size), *states])
    key = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    return cache_folder() / "decoded" / f"{path.name.partition('.')[0]}-{split}-{key}.npz"


def _load(path: Path) -> tuple[np.ndarray, np.ndarray, list[str]] | None:
    """Read a decoded array; a missing or damaged one is simply made anew."""
    try:
        with np.load(path, allow_pickle=False) as kept:
            return kept["pixels"], kept["labels"], [str(name) for name in kept["class_names"]]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _save(path: Path, pixels: np.ndarray, labels: np.ndarray, class_names: list[str]) -> None:
    """Keep a decoded array: whole or not at all, and without complaint where the cache cannot be written."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(file, pixels=pixels, labels=labels, class_names=np.array(class_names))
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
