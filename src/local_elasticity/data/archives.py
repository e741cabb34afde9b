"""Tar archives, read in one pass and to their very end: what is damaged is said, and never taken for the end."""

from __future__ import annotations

import contextlib
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from local_elasticity.base.errors import InputError
from local_elasticity.data.checks import is_file, kind_and_message
from local_elasticity.data.files import damaged

ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".tbz2")


def is_archive(path: Path) -> bool:
    """Say whether it is a file that is named as a tar archive."""
    return path.name.lower().endswith(ENDINGS) and is_file(path)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tarfile.TarFile]:
    """Open a tar archive.

    Args:
        path: the archive, packed or not.

    Raises:
        InputError: when it, or a member that is read meanwhile, is damaged or cannot be read.
    """
    try:
        with tarfile.open(path, tarinfo=_Header) as archive:
            yield archive
    except InputError:
        raise
    except (tarfile.TarError, EOFError, OSError, KeyError, ValueError, OverflowError, zlib.error, _lzma()) as error:
        raise damaged(path, expected="a whole tar archive", got=kind_and_message(error)) from error


def members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the members, and check that nothing follows them.

    Args:
        archive: as `opened` gives it, nothing of it read yet.

    Raises:
        tarfile.ReadError: when there is more behind the mark of the end: members that would be lost.
    """
    yield from archive
    while rest := archive.fileobj.read(1 << 16) if archive.fileobj else b"":
        if rest.strip(b"\0"):
            raise tarfile.ReadError("more behind the end of the archive, as when several are joined")


class _Header(tarfile.TarInfo):
    """A header that must be whole: tarfile itself takes a damaged or missing one for the end of the archive."""

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> _Header:
        try:
            return super().fromtarfile(tarfile)  # pyright: ignore[reportReturnType]
        except _END:
            raise
        except _HEADER as error:
            raise _READ(f"a damaged header: {error}") from error


_END = tarfile.EOFHeaderError  # pyright: ignore[reportAttributeAccessIssue]
_HEADER, _READ = tarfile.HeaderError, tarfile.ReadError


def _lzma() -> type[Exception]:
    """The error of damaged xz data; Python may be built without xz."""
    try:
        from lzma import LZMAError
    except ImportError:
        return tarfile.TarError
    return LZMAError
