"""One writer to a store: a lock that names its holder, and that dies with its process."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
import weakref
from pathlib import Path
from typing import Any

from local_elasticity.errors import InputError

try:
    import fcntl
except ImportError:  # no such locks on this system
    fcntl = None

_holders: weakref.WeakValueDictionary[Path, StoreLock] = weakref.WeakValueDictionary()


def lock_name(store: Path) -> str:
    """The name of a store's lock, beside it."""
    return f".{store.name}.lock"


class StoreLock:
    """The right to write one store, from now until it is released, collected, or its process ends.

    Another process that holds it is named and refuses us. In one process the newest writer takes over, as when a cell
    of a notebook is run again, and the one before is refused at its next write.

    Args:
        store: path of the store; its folder is made.

    Raises:
        InputError: when another process holds it, or the folder cannot be written.
    """

    def __init__(self, store: Path) -> None:
        self.store = store.absolute()
        self.path = self.store.with_name(lock_name(self.store))
        self._file: int | None = None
        self._is_taken = False
        earlier = _holders.get(self.store)
        if earlier is not None:
            earlier.release()
            earlier._is_taken = True
        self._acquire()
        _holders[self.store] = self

    def check(self) -> None:
        """Refuse to write where another writer has taken over.

        Raises:
            InputError: when one has.
        """
        if self._is_taken:
            raise InputError(
                expected=f"to be the only writer of {self.store}",
                got="another one in this process, which was made later and has taken over",
                do="use the newer one, or store elsewhere",
            )

    def release(self) -> None:
        """Let others write."""
        file, self._file = self._file, None
        if file is None:
            return
        with contextlib.suppress(OSError):
            self.path.unlink()
        with contextlib.suppress(OSError):
            os.close(file)

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            self.release()

    def __enter__(self) -> StoreLock:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def _acquire(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            while self._file is None:
                self._file = self._try()
        except OSError as error:
            raise InputError(
                expected=f"a folder that can be written at {self.path.parent}",
                got=error.strerror or type(error).__name__,
                do="choose another place, or free space and permissions there",
            ) from error
        with contextlib.suppress(OSError):
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, json.dumps(_here()).encode(), 0)

    def _try(self) -> int | None:
        """An open file that is locked; None where it vanished meanwhile, and is to be tried again."""
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            elif _is_alive(_read(self.path)):
                raise BlockingIOError
        except BlockingIOError:
            os.close(file)
            raise self._held() from None
        except OSError:  # a file system without such locks: go by what is written there
            if _is_alive(_read(self.path)):
                os.close(file)
                raise self._held() from None
        if not _is_at(file, self.path):
            os.close(file)
            return None
        return file

    def _held(self) -> InputError:
        holder = _read(self.path)
        who = "another process"
        if holder:
            who = f"process {holder.get('pid')} on {holder.get('host')}, which writes it since {holder.get('since')}"
        return InputError(
            expected=f"a store that nobody else writes, {self.store}", got=who, do="let it finish, or store elsewhere"
        )


def _here() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _is_alive(holder: dict[str, Any]) -> bool:
    """Whether the process that wrote a lock still runs; on another host it may."""
    if not isinstance(holder.get("pid"), int) or holder["pid"] == os.getpid():
        return False
    if holder.get("host") != socket.gethostname():
        return True
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False
