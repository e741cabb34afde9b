"""One writer at a time: a lock beside what is written, which says who holds it and is free again when that one is dead.

Where the file system has ``flock``, the lock is the operating system's and ends with its process, however that ends.
Elsewhere it is a file that is made exclusively; one of a dead process of this machine is taken over.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import socket
import time
import weakref
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from local_elasticity.base.errors import InputError
from local_elasticity.base.files import told_of_disk

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

WITHOUT = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
ATTEMPTS = 50  # each lost only to a lock that was released, or taken over, in the same instant
_writers: weakref.WeakValueDictionary[str, Lock] = weakref.WeakValueDictionary()  # of this process, by lock file
SETTLED = 10.0  # seconds after which a lock file without a name in it is not being written any more


@dataclass(frozen=True)
class Holder:
    """Who holds a lock.

    Attributes:
        pid: its process.
        host: its machine.
        since: when it began, as a person reads it.
        space: the machine's process numbers that the pid is one of; containers have their own.
        began: when the process began, by the machine's clock; numbers of processes are used again.
    """

    pid: int
    host: str
    since: str
    space: str
    began: str

    @classmethod
    def here(cls) -> Holder:
        """This process, now."""
        pid = os.getpid()
        return cls(pid, socket.gethostname(), time.strftime("%Y-%m-%d %H:%M:%S"), _space(), _began(pid))

    @property
    def is_dead(self) -> bool:
        """Whether it was a process of this machine that is no more; False where that cannot be known."""
        if (self.host, self.space) != (socket.gethostname(), _space()):
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:
            return False
        return bool(self.began) and _began(self.pid) != self.began


class Lock:
    """Keeps other writers, of this process or any other, from a path.

    Args:
        target: what is written; the lock is a hidden file beside it.
        takes_over: in one process the newest writer gets the lock, as when a cell of a notebook is run again, and the
            one before is refused at its next write; else the newest is refused.
    """

    def __init__(self, target: Path, *, takes_over: bool = False) -> None:
        self.target, self.takes_over = target, takes_over
        self.path = target.with_name(f".{target.name}.lock")
        self.is_lost = False  # to a newer writer of this process
        self._release: weakref.finalize | None = None
        self._earlier: weakref.ref[Lock] | None = None
        self._pid = 0

    @property
    def is_held(self) -> bool:
        """Whether this object holds it; a forked child does not."""
        return self._release is not None and self._release.alive and self._pid == os.getpid()

    def acquire(self) -> None:
        """Take it.

        Raises:
            InputError: when another has it, or the place cannot be written.
        """
        if self.is_lost:
            raise InputError(
                expected=f"the only writer of {self.target}",
                got="one that a newer writer of this process has taken over from",
                do="use the newer one, or another place",
            )
        if self.is_held:
            return
        self._take_over()
        with told_of_disk(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            for _ in range(ATTEMPTS):
                descriptor = self._try()
                if descriptor is not None:
                    self._pid = os.getpid()
                    self._release = weakref.finalize(self, _let_go, descriptor, self.path, os.getpid())
                    _writers[str(self.path.absolute())] = self
                    return
        raise self._refusal(None)

    def _take_over(self) -> None:
        earlier = _writers.get(str(self.path.absolute()))
        if self.takes_over and earlier is not None and earlier.is_held:
            earlier.release()
            earlier.is_lost, self._earlier = True, weakref.ref(earlier)

    def release(self) -> None:
        """Give it back; nothing happens where it is not held."""
        if self._release is not None:
            self._release()
            self._release = None

    def withdraw(self) -> None:
        """Give it back before anything was written: a writer that it was taken over from may go on."""
        self.release()
        earlier = self._earlier() if self._earlier is not None else None
        if earlier is not None:
            earlier.is_lost = False

    def _try(self) -> int | None:
        """The descriptor of the lock; None when trying again may help."""
        opened = _opened(self.path)
        if opened is None:
            return None
        descriptor, is_new = opened
        try:
            _flock(descriptor)
        except OSError as error:
            if is_new and error.errno in WITHOUT:  # whoever makes the file has the lock
                self._sign(descriptor)
                return descriptor
            holder, age = _read(descriptor), time.time() - os.fstat(descriptor).st_mtime
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                return self._stand_back(holder)
            if error.errno not in WITHOUT:
                raise
            if holder is None and age > SETTLED:
                self.path.unlink(missing_ok=True)
                return None
            return self._stand_back(holder)
        if not _is_at(descriptor, self.path):  # released, and with it removed, since it was opened
            os.close(descriptor)
            return None
        self._sign(descriptor)
        return descriptor

    def _sign(self, descriptor: int) -> None:
        """Write who holds the lock; where the disk has no room for it, nobody does."""
        try:
            _write(descriptor)
        except OSError:
            _let_go(descriptor, self.path, os.getpid())
            raise

    def _stand_back(self, holder: Holder | None) -> None:
        """Refuse, unless the holder is gone: dead but for children that inherited the lock, or garbage of this process.

        Raises:
            InputError: for a holder that is alive.
        """
        if holder is not None and holder.is_dead:
            self.path.unlink(missing_ok=True)
            return
        if holder is not None and holder.pid == os.getpid():
            gc.collect()  # an owner in a circle of references
            if not self.path.exists():
                return
        raise self._refusal(holder)

    def _refusal(self, holder: Holder | None) -> InputError:
        if holder is None:
            who = "one that another process is about to write"
            advice = "wait for it, stop it, or choose another place"
        elif (holder.pid, holder.host) == (os.getpid(), socket.gethostname()):
            who = f"one that this process ({holder.pid} on {holder.host}) has been writing since {holder.since}"
            advice = "wait until that is done, or choose another place"
        else:
            who = f"one that process {holder.pid} on {holder.host} has been writing since {holder.since}"
            advice = f"wait for it, stop it, or choose another place; if it is no more, remove {self.path}"
        return InputError(expected=f"{self.target}, which nothing else writes", got=who, do=advice)

    def __enter__(self) -> Lock:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _opened(path: Path) -> tuple[int, bool] | None:
    """The lock's file, and whether it was made just now; None where it was released in between."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), True
    except FileExistsError:
        try:
            return os.open(path, os.O_RDWR), False
        except FileNotFoundError:
            return None


def _flock(descriptor: int) -> None:
    if fcntl is None:
        raise OSError(errno.ENOSYS, "no flock")
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _let_go(descriptor: int, path: Path, pid: int) -> None:
    with suppress(OSError):
        if os.getpid() == pid and _is_at(descriptor, path):  # a forked child only closes its copy
            path.unlink(missing_ok=True)
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_UN)
    with suppress(OSError):
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    ours = os.fstat(descriptor)
    return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)


def _write(descriptor: int) -> None:
    os.ftruncate(descriptor, 0)
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.write(descriptor, json.dumps(asdict(Holder.here())).encode())


def _read(descriptor: int) -> Holder | None:
    os.lseek(descriptor, 0, os.SEEK_SET)
    return _parsed(os.read(descriptor, 4096).decode(errors="replace"))


def _parsed(content: str) -> Holder | None:
    try:
        holder = Holder(**json.loads(content))
    except (ValueError, TypeError):
        return None
    return holder if isinstance(holder.pid, int) else None


def _space() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _began(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
