"""Zarr arrays whose chunks are all there and whole: each has a checksum, and one that is missing is no fill value.

A store with the attribute ``checksums`` was written so from its first chunk on. Older ones are read as far as they can
be checked: what cannot be decoded is refused there too.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import google_crc32c
import numpy as np
import zarr
from numcodecs.zstd import Zstd
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.storage import LocalStore

from local_elasticity.base.errors import InputError
from local_elasticity.base.files import discard, told_of_disk, write_whole

SEALED = {"checksums": "crc32c"}  # attributes of a store that was written by `create_array` alone
CODECS = ("bytes", "zstd", "crc32c")
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
    return group.create_array(name, compressors=codecs, config={"write_empty_chunks": True}, overwrite=True, **settings)


def open_arrays(path: Path, names: Iterable[str]) -> dict[str, Any]:
    """Open arrays for writing; chunks that equal the fill value are written where the store is sealed.

    Args:
        path: of the store.
        names: of the arrays.

    Returns:
        The arrays by name.

    Raises:
        InputError: for damaged metadata.
    """
    sealed, group = is_sealed(read_document(path)), open_group(path)
    with zarr.config.set({"array.write_empty_chunks": sealed}):
        try:
            return {name: group[name] for name in names}
        except (ValueError, KeyError, TypeError) as error:
            raise _damaged(path, "zarr.json", error) from error


def open_group(path: Path) -> zarr.Group:
    """Open a group for writing.

    Args:
        path: of the store.

    Returns:
        The group.

    Raises:
        InputError: for damaged metadata.
    """
    try:
        return zarr.open_group(str(path), mode="r+", use_consolidated=False)
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, "zarr.json", error) from error


def open_dataset(path: Path, **options: Any) -> Any:
    """A store as a dataset that is read when it is asked for, every chunk checked.

    Args:
        path: of the store.
        **options: as of ``xarray.open_zarr``.

    Returns:
        An ``xarray.Dataset``.

    Raises:
        InputError: for damaged metadata.
    """
    import xarray

    with told_of_disk(path):
        try:
            return xarray.open_zarr(CheckedStore(path), zarr_format=3, **options)
        except (InputError, OSError):
            raise
        except Exception as error:  # what damaged metadata makes of two libraries is open-ended
            raise _damaged(path, "zarr.json", error) from error


class Column:
    """An array that grows along its first dimension, row after row; every chunk spans all others and is replaced whole.

    What zarr would write, without its event loop: a snapshot has some thirty of them.

    Args:
        path: of the store.
        name: of the array.
        meta: its metadata.

    Raises:
        InputError: for an array that was not written by this class or, in older stores, by zarr's defaults.
    """

    def __init__(self, path: Path, name: str, meta: Mapping[str, Any]) -> None:
        self.path, self.name = path, name
        try:
            self.codecs = tuple(codec["name"] for codec in meta["codecs"])
            self.dtype = np.dtype(meta["data_type"]).newbyteorder("<")
            self.shape, self.chunk = tuple(meta["shape"][1:]), _chunk_shape(meta)
            self.fill = np.array(meta["fill_value"], dtype=self.dtype)[()]
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(path, f"{name}/zarr.json", error) from error
        if self.codecs not in (CODECS, CODECS[:-1]) or tuple(self.chunk[1:]) != tuple(max(1, n) for n in self.shape):
            raise _damaged(path, f"{name}/zarr.json", "it is stored in another way")
        self._last: tuple[int, np.ndarray] | None = None

    @classmethod
    def create(cls, path: Path, name: str, example: np.ndarray, dims: Sequence[str], rows: int, chunk: int) -> Column:
        """A column whose first rows, if any, hold no number: NaN, or 0.

        Args:
            path: of the store.
            name: of the array; one that is there is replaced.
            example: a row.
            dims: names of a row's dimensions.
            rows: how many there are already.
            chunk: rows in a chunk.

        Returns:
            The column.
        """
        fill: Any = "NaN" if example.dtype.kind == "f" else example.dtype.type(0).item()
        meta = {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [rows, *example.shape],
            "data_type": example.dtype.name,
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": [chunk, *(max(1, size) for size in example.shape)]},
            },
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": fill,
            "codecs": [
                {"name": "bytes", "configuration": {"endian": "little"}},
                {"name": "zstd", "configuration": {"level": 0, "checksum": False}},
                {"name": "crc32c"},
            ],
            "attributes": {},
            "dimension_names": ["step", *dims],
            "storage_transformers": [],
        }
        discard(path / name)
        (path / name).mkdir()
        write_whole(path / name / "zarr.json", json.dumps(meta))
        column = cls(path, name, meta)
        for row in range(rows):
            column.write(row, None)
        return column

    def write(self, row: int, values: np.ndarray | None) -> None:
        """Write a row, and with it its chunk.

        Args:
            row: which; rows after it in its chunk may hold anything until they are written.
            values: what; None for no number.
        """
        if 0 in self.shape:
            return
        place, position = divmod(row, self.chunk[0])
        if self._last is None or self._last[0] != place:
            self._last = (place, self._read(place, position))
        content = self._last[1]
        content[position] = self.fill if values is None else values
        encoded = Zstd(level=0).encode(np.ascontiguousarray(content))
        if self.codecs == CODECS:
            encoded += google_crc32c.value(encoded).to_bytes(4, "little")
        file = self._file(place)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, encoded)

    def _read(self, place: int, rows: int) -> np.ndarray:
        """A chunk whose first rows are there, and count."""
        content = np.full((self.chunk[0], *self.chunk[1:]), self.fill, dtype=self.dtype)
        if not rows:
            return content
        file = self._file(place)
        key = str(file.relative_to(self.path))
        if not file.is_file():
            if self.codecs != CODECS:  # zarr leaves out what equals the fill value
                return content
            raise missing_chunk(self.path, key)
        encoded = file.read_bytes()
        if self.codecs == CODECS:
            check_chunk(self.path, key, encoded)
            encoded = encoded[:-4]
        try:
            content[:] = np.frombuffer(Zstd().decode(encoded), dtype=self.dtype).reshape(content.shape)
        except (RuntimeError, ValueError) as error:
            raise _damaged(self.path, key, error) from error
        return content

    def shorten(self, rows: int) -> None:
        """Remove the chunks of the rows from this one on.

        Args:
            rows: how many stay.
        """
        self._last = None
        first = -(-rows // self.chunk[0])
        folder = self.path / self.name / "c"
        for place in [*folder.iterdir()] if folder.is_dir() else []:
            if place.name.isdigit() and int(place.name) >= first:
                discard(place)

    def _file(self, place: int) -> Path:
        return self.path.joinpath(self.name, "c", str(place), *["0"] * len(self.shape))


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


def mend_metadata(path: Path, document: Mapping[str, Any]) -> None:
    """Write the metadata of each array again where it is not what the group says: an interrupted write, or damage.

    Args:
        path: of the store.
        document: its ``zarr.json``; older ones that say nothing of their arrays are left as they are.

    Raises:
        InputError: for a place that cannot be written.
    """
    if not document.get("consolidated_metadata"):
        return
    for name, meta in arrays_of(path, document).items():
        place = path / name / "zarr.json"
        if not place.is_file() or _parsed(place) != meta:
            with told_of_disk(place):
                place.parent.mkdir(exist_ok=True)
            write_whole(place, json.dumps(meta))


def _parsed(place: Path) -> Any:
    try:
        return json.loads(place.read_text())
    except ValueError:
        return None


def check_version(found: Any, known: int, what: str) -> None:
    """Refuse what a newer version of this library wrote.

    Args:
        found: the format's version as stored.
        known: the newest that is read here.
        what: where it is stored.

    Raises:
        InputError: for a newer one, or no number at all.
    """
    if isinstance(found, bool) or not isinstance(found, int) or not 1 <= found <= known:
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
    if not _matches(content):
        raise _damaged(path, key, "its checksum is another")


def is_whole(file: Path) -> bool:
    """Whether the file of a chunk is there, and its checksum right.

    Args:
        file: of a store with checksums.

    Returns:
        True when it can be relied upon.
    """
    return file.is_file() and _matches(file.read_bytes())


def _matches(content: bytes) -> bool:
    return len(content) >= 4 and google_crc32c.value(content[:-4]) == int.from_bytes(content[-4:], "little")


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
