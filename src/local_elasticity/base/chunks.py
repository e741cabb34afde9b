"""Zarr arrays whose chunks are all there and whole: each has a checksum, and one that is missing is no fill value.

A store with the attribute ``checksums`` was written so from its first chunk on. Older ones are read as far as they can
be checked: what cannot be decoded is refused there too.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import google_crc32c
import zarr
from numcodecs.zstd import Zstd
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.storage import LocalStore

from local_elasticity.base.files import told_of_disk
from local_elasticity.errors import InputError

SEALED = {"checksums": "crc32c"}  # attributes of a store that was written by `create_array` alone
AGAIN = "restore it from a copy, or make the store again"


def create_array(group: zarr.Group, name: str, **settings: Any) -> zarr.Array:
    """Create an array with checksums whose chunks are all written, also those that equal the fill value.

    Args:
        group: where.
        name: of the array; one that is there is replaced.
        **settings: as of ``zarr.Group.create_array``.

    Returns:
        The array.
    """
    codecs = [ZstdCodec(level=0), Crc32cCodec()]
    return group.create_array(
        name, compressors=codecs, config={"write_empty_chunks": True}, overwrite=True, **settings
    )


def open_arrays(path: Path, names: Iterable[str]) -> tuple[zarr.Group, dict[str, zarr.Array]]:
    """Open a group and arrays of it for writing, also of chunks that equal the fill value.

    Args:
        path: of the store.
        names: of the arrays.

    Returns:
        The group, and its arrays by name.

    Raises:
        InputError: for what is no group, or one with damaged metadata.
    """
    with told_of_disk(path), zarr.config.set({"array.write_empty_chunks": True}):
        try:
            group = zarr.open_group(str(path), mode="r+", use_consolidated=False)
            arrays: dict[str, Any] = {name: group[name] for name in names}
            return group, arrays
        except (ValueError, KeyError, TypeError) as error:
            raise _damaged(path, "zarr.json", error) from error


def read_document(path: Path) -> dict[str, Any]:
    """The metadata of a group.

    Args:
        path: of the store.

    Returns:
        Its ``zarr.json``.

    Raises:
        InputError: when it is missing or damaged.
    """
    with told_of_disk(path):
        content = (path / "zarr.json").read_text(errors="replace")
    try:
        document = json.loads(content)
        if not isinstance(document["attributes"], dict):
            raise TypeError("no attributes")
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, "zarr.json", error) from error
    return document


def arrays_of(path: Path, document: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The metadata of the arrays of a group, as consolidated.

    Args:
        path: of the store.
        document: its ``zarr.json``.

    Returns:
        Name -> metadata.

    Raises:
        InputError: when there is none, or it is damaged.
    """
    try:
        arrays = document["consolidated_metadata"]["metadata"]
        if not all(isinstance(meta["shape"], list) and _chunk_shape(meta) is not None for meta in arrays.values()):
            raise TypeError("no shapes")
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, "zarr.json", error) from error
    return arrays


def check_version(found: Any, known: int, what: str) -> None:
    """Refuse what a newer version of this library wrote.

    Args:
        found: the format's version as stored.
        known: the newest that is read here.
        what: where it is stored.

    Raises:
        InputError: for a newer one, or no number at all.
    """
    if isinstance(found, bool) or not isinstance(found, int) or found > known:
        raise InputError(
            expected=f"{what} in format version {known} or older",
            got=f"format version {found!r}",
            do="read it with the version of local-elasticity that wrote it, or a newer one (pip install -U)",
        )


def check_chunks(path: Path, document: Mapping[str, Any], rows: Mapping[str, int] | None = None) -> None:
    """Check that every chunk of a sealed store has its file, and that the last of each array is whole.

    Args:
        path: of the store.
        document: its ``zarr.json``.
        rows: array -> rows that were written, where that is not all.

    Raises:
        InputError: naming a chunk that is missing or damaged.
    """
    if not is_sealed(document):
        return
    for name, meta in arrays_of(path, document).items():
        key = ""
        for key in chunk_keys(name, meta, (rows or {}).get(name)):
            if not (path / key).is_file():
                raise missing_chunk(path, key)
        if key:
            with told_of_disk(path / key):
                check_chunk(path, key, (path / key).read_bytes())


def is_sealed(document: Mapping[str, Any]) -> bool:
    """Whether a store was written with checksums from its first chunk on.

    Args:
        document: its ``zarr.json``.

    Returns:
        What its attributes say.
    """
    return document["attributes"].get("checksums") == SEALED["checksums"]


def chunk_keys(name: str, meta: Mapping[str, Any], rows: int | None = None) -> Iterator[str]:
    """The files that hold the chunks of an array.

    Args:
        name: of the array.
        meta: its metadata.
        rows: only of so many rows.

    Yields:
        Paths relative to the store, row after row.
    """
    shape = list(meta["shape"])
    if rows is not None:
        shape[0] = min(rows, shape[0])
    counts = [-(-size // chunk) for size, chunk in zip(shape, _chunk_shape(meta), strict=True)]
    for place in itertools.product(*(range(count) for count in counts)):
        yield "/".join([name, "c", *map(str, place)])


def check_chunk(path: Path, key: str, content: bytes) -> None:
    """Check the checksum of a chunk.

    Args:
        path: of the store.
        key: of the chunk.
        content: of its file.

    Raises:
        InputError: when it is damaged.
    """
    if len(content) < 4 or google_crc32c.value(content[:-4]) != int.from_bytes(content[-4:], "little"):
        raise _damaged(path, key, "its checksum is another")


class CheckedStore(LocalStore):
    """Reads a store on disk: a chunk that is missing or damaged is refused by name, never filled in."""

    def __init__(self, root: Path | str, *, read_only: bool = True) -> None:
        super().__init__(root, read_only=read_only)

    async def get(self, key: str, *arguments: Any, **options: Any) -> Any:
        """As ``LocalStore.get``.

        Raises:
            InputError: for a chunk that is missing or damaged.
        """
        return self._checked(key, await super().get(key, *arguments, **options), arguments, options)

    def get_sync(self, key: str, **options: Any) -> Any:
        """As ``LocalStore.get_sync``.

        Raises:
            InputError: for a chunk that is missing or damaged.
        """
        return self._checked(key, super().get_sync(key, **options), (), options)

    def with_read_only(self, read_only: bool = False) -> Self:
        """As ``LocalStore.with_read_only``."""
        return type(self)(self.root, read_only=read_only)

    @cached_property
    def _arrays(self) -> dict[str, dict[str, Any]]:
        document = read_document(self.root)
        arrays = (document.get("consolidated_metadata") or {}).get("metadata") or {}
        return {name: {**meta, "sealed": is_sealed(document)} for name, meta in arrays.items()}

    def _checked(self, key: str, value: Any, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
        name, is_chunk = _array_of(key)
        if not is_chunk or len(arguments) > 1 or options.get("byte_range") is not None:
            return value
        meta = self._arrays.get(name, {})
        if not meta.get("sealed"):
            return self._decoded(key, value, meta)
        if value is None:
            raise missing_chunk(self.root, key)
        check_chunk(self.root, key, value.to_bytes())
        return value

    def _decoded(self, key: str, value: Any, meta: Mapping[str, Any]) -> Any:
        """A chunk of an older store, once it could be decoded."""
        if value is not None and [codec.get("name") for codec in meta.get("codecs", ())][-1:] == ["zstd"]:
            try:
                Zstd().decode(value.to_bytes())
            except (RuntimeError, ValueError) as error:
                raise _damaged(self.root, key, error) from error
        return value


def missing_chunk(path: Path, key: str) -> InputError:
    """The error for a chunk without its file.

    Args:
        path: of the store.
        key: of the chunk.

    Returns:
        The error.
    """
    return InputError(expected=f"all chunks of {path}", got=f"none at {key}: the file is missing", do=AGAIN)


def _damaged(path: Path, key: str, reason: object) -> InputError:
    said = type(reason).__name__ if isinstance(reason, BaseException) else reason
    return InputError(expected=f"{path} as it was written", got=f"a damaged {key} in it ({said})", do=AGAIN)


def _array_of(key: str) -> tuple[str, bool]:
    name, separator, place = key.rpartition("/c/")
    if separator and all(part.isdigit() for part in place.split("/")):
        return name, True
    return (key[:-2], True) if key.endswith("/c") else (key, False)


def _chunk_shape(meta: Mapping[str, Any]) -> list[int]:
    return meta["chunk_grid"]["configuration"]["chunk_shape"]
