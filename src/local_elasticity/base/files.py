"""Files that are there whole or not at all, and what an operating system says of a disk, in our words."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from local_elasticity.base.errors import InputError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
DISK = (*FULL, errno.EIO)  # what the operating system says without naming a file
NO_FOLDER = (errno.EEXIST, errno.ELOOP, errno.ENOTDIR)
VANISHED = (errno.ENOENT, errno.ESTALE)


def leftover_of(path: Path) -> Path:
    """Where a file or folder is while it is being made or removed.

    Args:
        path: its place when it is whole.

    Returns:
        A hidden name beside it; what is there after a kill belongs to nobody.
    """
    return path.with_name(f".{path.name}.partial")


def write_whole(path: Path, content: bytes | str) -> None:
    """Replace a file by one rename: a reader, or whoever comes after a kill, sees the old content or the new.

    Args:
        path: the file.
        content: all of it.

    Raises:
        InputError: for a disk that is full, or a place that cannot be written.
    """
    with put_whole(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def put_whole(path: Path) -> Iterator[Path]:
    """Let a file be written beside its place, and move it there by one rename.

    Args:
        path: the file.

    Yields:
        Where to write it.

    Raises:
        InputError: for a disk that is full, or a place that cannot be written.
    """
    partial = leftover_of(path)
    with told_of_disk(path):
        try:
            yield partial
            os.replace(partial, path)
        except Exception:
            with suppress(OSError):  # room for others on a disk that is full
                partial.unlink()
            raise


def discard(path: Path) -> None:
    """Remove a file or folder, if there is one; killed in the middle, it is gone from its place or still whole.

    Args:
        path: what to remove.

    Raises:
        InputError: for a place that cannot be written.
    """
    with told_of_disk(path):
        partial = leftover_of(path)
        _remove(partial)
        if path.is_dir() and not path.is_symlink():
            path.rename(partial)
            _remove(partial)
        else:
            path.unlink(missing_ok=True)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def told_of_disk(path: Path) -> Iterator[None]:
    """Say an error of the operating system in one line of ours.

    Args:
        path: what was being written or read.

    Yields:
        Nothing.

    Raises:
        InputError: in place of an OSError of a disk.
    """
    try:
        yield
    except (ConnectionError, TimeoutError, InterruptedError):  # not of a disk
        raise
    except OSError as error:
        raise refusal_of(error, path) from error


def refusal_of(error: OSError, path: Path | None = None) -> InputError:
    """What to say of an error of the operating system.

    Args:
        error: what it raised.
        path: what was being written or read, where the error does not say.

    Returns:
        The error in our words.
    """
    place = error.filename if isinstance(error.filename, str) else path
    if path is not None and isinstance(place, str) and path.name not in place:
        place = path
    said = error.strerror or str(error) or type(error).__name__
    return InputError(**_words(error.errno, f"{place}" if place is not None else "this machine", said))


def _words(number: int | None, place: str, said: str) -> dict[str, str]:
    if number in FULL:
        return {
            "expected": f"room on the disk of {place}",
            "got": f"none ({said})",
            "do": "free some, then go on as after an interruption; what was stored before is whole",
        }
    if number in FORBIDDEN:
        return {
            "expected": f"{place}, which may be written",
            "got": f"a place that may not ({said})",
            "do": "change its permissions, or choose another place",
        }
    if number == errno.ENAMETOOLONG:
        return {"expected": "a path of names that the disk takes", "got": f"{place[:60]}… ({said})", "do": "shorten it"}
    if number in NO_FOLDER:
        return {
            "expected": f"{place} in folders that are there or can be made",
            "got": f"a file, or a link that leads nowhere, in the place of one ({said})",
            "do": "choose another place, or move that away",
        }
    if number in VANISHED:
        return {
            "expected": f"{place}, or a folder that it can be made in",
            "got": f"none ({said})",
            "do": "check whether something removed or moved it meanwhile, and start again in a place that stays",
        }
    return {
        "expected": f"a disk that reads and writes {place}",
        "got": said,
        "do": "check the disk, or choose another place",
    }
