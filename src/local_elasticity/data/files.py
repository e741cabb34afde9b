"""Where data files lie: the folders that are searched, the cache, downloads with a checksum, and the error if none."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from local_elasticity.base.checks import check_path, in_words
from local_elasticity.base.errors import InputError, missing_extra
from local_elasticity.data.checks import check_name, is_folder, kind_and_message, printable

Folders = str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None

ENVIRONMENT = "LOCAL_ELASTICITY_DATA"
"""The environment variable that lists folders with data, separated as PATH is."""


@dataclass(frozen=True)
class Official:
    """A file as its authors publish it.

    Args:
        file: its name.
        address: where it is downloaded from.
        md5: its published checksum.
    """

    file: str
    address: str
    md5: str


@dataclass(frozen=True)
class Entry:
    """One line of the catalogue: a data set, from one source.

    Args:
        name: what `load` calls it.
        source: which of the set's sources (empty where there is one).
        classes: how many.
        shape: (channels, height, width) of an image.
        per_class: images a class, in words.
        found: where it lies; None when it is not at hand.
        state: complete or partial, lossless or lossy, or "not at hand".
        downloads: what would be downloaded.
        made: whether it is made on demand, from no files.
    """

    name: str
    source: str
    classes: int
    shape: tuple[int, int, int]
    per_class: str
    found: Path | None
    state: str
    downloads: tuple[Official, ...] = ()
    made: bool = False

    @property
    def where(self) -> str:
        """The place, or "not at hand"; for what is made on demand, what it is."""
        if self.made:
            return self.state
        return str(self.found) if self.found else "not at hand"


def cache_folder() -> Path:
    """Say where downloads and decoded archives are kept: the user's cache, ``XDG_CACHE_HOME`` first. Not created."""
    if chosen := os.environ.get("XDG_CACHE_HOME"):
        base = Path(chosen)
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path.home() / ".cache"
    return base / "local-elasticity"


def at_home(path: Path) -> str:
    """A path for people: under the home folder with ~."""
    home = Path.home()
    return f"~/{path.relative_to(home).as_posix()}" if path.is_relative_to(home) else str(path)


def search_folders(folders: Folders = None) -> list[Path]:
    """List the folders that are searched, in order, whether they exist or not.

    ``folders``, the environment's list, a ``shared/data`` beside the working directory's or the source tree's folder,
    the system's dataset folders, the cache.

    Raises:
        InputError: when one of ``folders`` is no folder.
    """
    single = isinstance(folders, str | os.PathLike)
    if not single and folders is not None and not isinstance(folders, Sequence):
        raise InputError(expected="folders: a path, or a list of paths", got=in_words(folders), do="correct folders=")
    given = [check_path("folders", folder) for folder in ([folders] if single else folders or ())]
    for folder in given:
        if not is_folder(folder):
            raise InputError(expected="a folder with data files", got=printable(str(folder)), do="correct folders=")
    listed = [Path(part).expanduser() for part in os.environ.get(ENVIRONMENT, "").split(os.pathsep) if part]
    project = Path(__file__).resolve().parents[3]
    beside = [Path.cwd().parent] + ([project.parent] if (project / "pyproject.toml").exists() else [])
    system = [Path("/usr/share/datasets"), Path("/usr/local/share/datasets")]
    ordered = [*given, *listed, *(parent / "shared" / "data" for parent in beside), *system, cache_folder()]
    return list(dict.fromkeys(ordered))


def places(subfolders: Iterable[str], folders: Folders = None) -> Iterator[Path]:
    """Yield the folders that exist among the search folders and these sub-folders of theirs, in order."""
    for root in search_folders(folders):
        for place in (root, *(root / name for name in subfolders)):
            if is_folder(place):
                yield place


def md5(data: bytes | Path) -> str:
    """Compute the MD5 of some bytes or of a file: a check for damage, not for malice."""
    if isinstance(data, Path):
        try:
            with open(data, "rb") as file:
                return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        except OSError as error:
            raise unreadable(data, "a data file", error) from error
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def fetch(files: Sequence[Official], folder: Path, progress: bool = True) -> list[Path]:
    """Download files that are not there yet, and check every one against its checksum.

    Raises:
        InputError: without pooch, without a connection, or when a checksum differs.
    """
    try:
        import pooch
    except ImportError as error:
        raise missing_extra("pooch", "data", "downloads with a checksum") from error
    paths = []
    log, level = pooch.get_logger(), pooch.get_logger().level
    for file in files:
        # pooch takes any object with total, update, reset and close as its bar.
        bar: Any = _Bar(f"downloading {file.file}") if progress else False
        downloader: Any = pooch.HTTPDownloader(progressbar=bar, chunk_size=1 << 20, timeout=60)
        log.setLevel("WARNING")  # the bar says what is downloaded
        try:
            path = pooch.retrieve(
                file.address, known_hash=f"md5:{file.md5}", fname=file.file, path=folder, downloader=downloader
            )
        except Exception as error:  # whatever a network, a proxy or a disk can do
            differs = isinstance(error, ValueError) and "hash" in str(error)
            raise InputError(
                expected=f"{file.file} from {file.address} (MD5 {file.md5})",
                got="a file with another checksum" if differs else f"a failed download ({kind_and_message(error)})",
                do=f"try again later, or put the file into {at_home(folder)} or a folder named in {ENVIRONMENT}",
            ) from error
        finally:
            log.setLevel(level)
            if bar:
                bar.close()
        paths.append(Path(path))
    return paths


def not_at_hand(name: str, files: str, official: Sequence[Official], folders: Folders = None) -> NoReturn:
    """Refuse, saying which files to put where.

    Raises:
        InputError: always.
    """
    searched = ", ".join(str(folder) for folder in search_folders(folders))
    addresses = ", ".join(file.address for file in official)
    raise InputError(
        expected=f"the files of {name}: {files}",
        got=f"none of them in {searched}",
        do=f"put them into one of these folders or one named in {ENVIRONMENT}"
        + (f", or allow the download from {addresses}" if addresses else ""),
    )


def damaged(path: Path | str, *, expected: str, got: str) -> InputError:
    """Make the error for a file that is not what it should be."""
    return InputError(
        expected=f"{path}: {expected}", got=got, do="delete the file and download it again, or correct the folder"
    )


def unreadable(place: Path | str, what: str, error: OSError) -> InputError:
    """Make the error for a file or folder that the operating system does not give.

    Args:
        place: its path.
        what: it should be.
        error: of the operating system.
    """
    return InputError(
        expected=f"{what} that can be read",
        got=f"{printable(str(place))} ({kind_and_message(error)})",
        do="check that it is there and its permissions",
    )


def read_bytes(path: Path) -> bytes:
    """Read a data file whole.

    Args:
        path: the file.

    Raises:
        InputError: when the operating system does not give it.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise unreadable(path, "a data file", error) from error


def in_cache(path: Path) -> bool:
    """Say whether a file lies in our cache, where only official files belong."""
    return cache_folder().resolve() in path.resolve().parents


def check_split(name: str, split: str, known: Sequence[str] = ("train", "test")) -> None:
    """Refuse a split that the set does not have.

    Raises:
        InputError: naming the nearest one.
    """
    check_name(f"a split of {name}", split, known)


@contextmanager
def counting(what: str, total: int, show: bool) -> Iterator[_Bar]:
    """A progress bar on the terminal's error stream, for counted work."""
    bar = _Bar(what, unit="images", show=show)
    bar.total = total
    try:
        yield bar
    finally:
        bar.close()


class _Bar:
    """A progress bar with the four methods that pooch calls; silent when the error stream is no terminal."""

    def __init__(self, what: str, unit: str = "bytes", show: bool = True) -> None:
        self.what, self.unit, self.show = what, unit, show and sys.stderr.isatty()
        self.total = 0
        self._done = 0
        self._progress: Any = None

    def update(self, count: int) -> None:
        """Count on."""
        self._done += count
        if not self.show:
            return
        if self._progress is None:
            self._progress = self._started()
        self._progress.update(0, completed=min(self._done, self.total), total=self.total)

    def reset(self) -> None:
        """Start counting anew."""
        self._done = 0

    def close(self) -> None:
        """Take the bar away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _started(self) -> Any:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        counter = DownloadColumn() if self.unit == "bytes" else MofNCompleteColumn()
        columns = (TextColumn("{task.description}"), BarColumn(), counter, TimeRemainingColumn())
        progress = Progress(*columns, console=Console(stderr=True), transient=True)
        progress.add_task(self.what, total=self.total)
        progress.start()
        return progress
