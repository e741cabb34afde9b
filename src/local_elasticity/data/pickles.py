"""An unpickler for plain arrays: CIFAR's batches are read by it, and nothing that they name can run."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np

from local_elasticity.base.errors import InputError
from local_elasticity.data.checks import kind_and_message
from local_elasticity.data.files import damaged


def read_pickle(data: bytes, name: str) -> Any:
    """Read a pickle that holds containers, numbers, bytes and NumPy arrays only. Strings of Python 2 come as bytes.

    Args:
        data: the pickle.
        name: of its file, for the error.

    Raises:
        InputError: when the pickle names anything else (nothing of it is imported or called), or is damaged.
    """
    try:
        return _PlainUnpickler(io.BytesIO(data), name).load()
    except InputError:
        raise
    except Exception as error:  # a damaged pickle may fail in any of the ways that objects can be built wrongly
        raise damaged(name, expected="a whole pickle", got=kind_and_message(error)) from error


class _PlainUnpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, name: str) -> None:
        super().__init__(file, encoding="bytes")
        self.name = name

    def find_class(self, module: str, name: str) -> Any:
        """Answer with our own harmless twin of what was asked for, or refuse."""
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise InputError(
                expected=f"{self.name}: a pickle of plain arrays and lists",
                got=f"one that wants to call {module}.{name}; nothing was run",
                do="do not use this file: delete it and download the official one",
            ) from None

    def persistent_load(self, pid: Any) -> Any:
        """Refuse references to outside objects."""
        raise pickle.UnpicklingError("a reference to something outside the file")


def _empty_array(kind: type, shape: tuple[int, ...], typecode: bytes | str) -> np.ndarray:
    """Make the empty array that a pickle fills in (what NumPy calls _reconstruct)."""
    if kind is not np.ndarray:
        raise pickle.UnpicklingError("not a plain array")
    return np.ndarray(shape, np.dtype(typecode.decode() if isinstance(typecode, bytes) else typecode))


def _array_of(buffer: bytes, dtype: np.dtype, shape: tuple[int, ...], order: str, *axes: None) -> np.ndarray:
    """Make an array from its bytes (what NumPy calls _frombuffer, in protocol 5)."""
    if order not in ("C", "F") or any(axis is not None for axis in axes):
        raise pickle.UnpicklingError("an array of unusual order")
    return np.frombuffer(buffer, dtype).reshape(shape, order="C" if order == "C" else "F")


def _encode(text: str, encoding: str) -> bytes:
    """Turn text back into the bytes that protocol 2 wrote as text."""
    if encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"encoding {encoding!r}")
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy.core.multiarray", "_reconstruct"): _empty_array,
    ("numpy._core.multiarray", "_reconstruct"): _empty_array,
    ("numpy.core.numeric", "_frombuffer"): _array_of,
    ("numpy._core.numeric", "_frombuffer"): _array_of,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _encode,
    **{
        (module, kind.__name__): kind
        for module in ("builtins", "__builtin__")
        for kind in (list, tuple, dict, set, frozenset, bytes)
    },
}
