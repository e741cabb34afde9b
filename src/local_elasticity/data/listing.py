"""The images of a folder or an archive: each file once whatever links lead to it, sorted into splits and classes."""

from __future__ import annotations

import os
import posixpath
import re
import stat
import tarfile
import unicodedata
from collections import deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from local_elasticity.base.errors import InputError
from local_elasticity.data.archives import members, opened
from local_elasticity.data.checks import printable
from local_elasticity.data.files import check_split, unreadable

SUFFIXES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".pbm", ".pnm", ".tif", ".tiff"),
    ".webp",
}
UNREAD = {".heic", ".heif", ".avif", ".jp2", ".jxl", ".dng", ".cr2", ".nef", ".exr", ".tga"}
"""Images that are not decoded here: they are refused, since leaving them out would be another data set."""
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
}
_LIKE_A_SPLIT = re.compile(r"(train|training|test|testing|val|valid|validation|dev|eval|evaluation)(?![a-z])")
_HIDDEN = {"__MACOSX", "@eaDir"}

Parts = tuple[str, ...]


class Image(NamedTuple):
    """An image file: where it lies, and what tells it from all others."""

    parts: Parts
    identity: Hashable


class Again(NamedTuple):
    """A file or folder that was come by a second time; ``clear`` if the first place is the real one, and no link."""

    first: Parts
    second: Parts
    clear: bool


@dataclass
class Listing:
    """What lies in a folder or archive.

    Args:
        images: each once; once in each split if links make it lie in several.
        again: what is left out because it is there already.
        special: how many pipes, sockets and devices have the name of an image; they are never opened.
    """

    images: list[Image] = field(default_factory=list)
    again: list[Again] = field(default_factory=list)
    special: int = 0


@dataclass(frozen=True)
class Split:
    """The images of one split.

    Args:
        name: of the split.
        classes: path within the folder or archive -> class.
        class_names: of all splits together, sorted, so that a label means the same in each of them.
        passed: what was passed over, in words; empty where nothing was.
    """

    name: str
    classes: dict[str, str]
    class_names: tuple[str, ...]
    passed: str


def list_split(path: Path, split: str) -> Split:
    """List the images of a split.

    Args:
        path: the folder or archive.
        split: its name, or another in use for it ("valid"), whatever its capitals; "train" where there are no splits.

    Raises:
        InputError: when the images do not lie in class folders, the splits are not clear, or there is no such split.
    """
    listing, splits, level = _arranged(path)
    here = printable(str(path))
    split = canonical(split)
    known = sorted(splits) or ["train"]
    check_split(here if splits else f"{here}, which has no split folders,", split, known)
    every = {name: [i for i in listing.images if _split_of(i.parts, level, splits) == name] for name in known}
    again = [each for each in listing.again if _split_of(each.second, level, splits) == split]
    chosen = every[split]
    level = _class_level(level, listing.images) if splits else level
    if stray := next((image for image in chosen if len(image.parts) < level + 2), None):
        raise InputError(
            expected=f"every image of {here} in the folder of its class",
            got=f"{printable('/'.join(stray.parts))} beside them",
            do="sort the images into one folder a class",
        )
    _refuse_splits_in_classes(here, chosen, level)
    per_split = {name: {i.parts[level] for i in images if len(i.parts) > level + 1} for name, images in every.items()}
    _refuse_two_spellings(here, per_split)
    again += _same_again(chosen)
    _refuse_two_classes(again, level)
    left_out = {each.second for each in again}
    return Split(
        split,
        {"/".join(image.parts): image.parts[level] for image in chosen if image.parts not in left_out},
        tuple(sorted(set().union(*per_split.values()))),
        _passed(listing.special, len(again)),
    )


def split_names(path: Path) -> tuple[str, ...]:
    """Name the splits of an image folder or archive; none where its class folders lie at the top.

    Args:
        path: the folder or archive.

    Raises:
        InputError: when there are no images, or the splits are not clear.
    """
    return tuple(sorted(_arranged(path)[1]))


def canonical(split: str) -> str:
    """The name of a split, of all those in use for it.

    Args:
        split: "Validation" is "val", for example; an unknown name stays as it is.
    """
    return SPLITS.get(split.strip().casefold(), split)


# --- splits and classes --------------------------------------------------------------------------------------------


def _arranged(path: Path) -> tuple[Listing, dict[str, str], int]:
    """List everything; the split folders, as split -> name, and the level of the folders that hold classes or splits.

    Raises:
        InputError: when there are no images, or the splits are not clear.
    """
    listing = _folder(path) if path.is_dir() else _archive(path)
    here = printable(str(path))
    if not listing.images:
        pipes = f"; {listing.special} pipes, sockets or devices, which are never opened" if listing.special else ""
        raise InputError(
            expected=f"images ({', '.join(sorted(SUFFIXES))}) in class folders",
            got=f"none in {here}{pipes}",
            do="check the path",
        )
    level = 0
    while True:
        tops = {image.parts[level] for image in listing.images}
        shallow = min(len(image.parts) for image in listing.images) - level
        named = {top for top in tops if top.casefold() in SPLITS}
        if named == tops and shallow >= 2:
            return listing, _splits(here, tops), level
        if shallow < 3 or len(tops) > 1:
            _refuse_half_split(here, listing.images, level, shallow)
            return listing, {}, level
        level += 1


def _splits(here: str, tops: set[str]) -> dict[str, str]:
    """Which folder is which split.

    Raises:
        InputError: when two are the same one.
    """
    splits: dict[str, str] = {}
    for top in sorted(tops):
        first = splits.setdefault(SPLITS[top.casefold()], top)
        if first != top:
            raise InputError(
                expected=f"one folder for each split of {here}",
                got=f"{first} and {top}, both {SPLITS[top.casefold()]}",
                do="join them, or move one of them away",
            )
    return splits


def _refuse_half_split(here: str, images: list[Image], level: int, shallow: int) -> None:
    """Refuse what may be split folders and may be classes.

    Raises:
        InputError: when some of the folders at this level look like splits and hold folders, but not all are known.
    """
    depth: dict[str, int] = {}
    for image in images:
        top = image.parts[level]
        depth[top] = min(depth.get(top, 99), len(image.parts) - level)
    like = sorted(top for top in depth if _LIKE_A_SPLIT.match(top.casefold()) and depth[top] >= 2)
    deep = [top for top in like if depth[top] >= 3]
    others = sorted(set(depth) - set(like))
    all_like = not others and len(like) > 1 and shallow >= 2
    if all_like or len(deep) > 1 or any(top.casefold() in SPLITS for top in deep):
        odd = [top for top in (*others, *like) if top.casefold() not in SPLITS]
        shown = ", ".join(printable(top) for top in (*deep[:3], *(o for o in odd[:3] if o not in deep[:3])))
        raise InputError(
            expected=f"split folders only ({', '.join(sorted(SPLITS))}) or class folders only in {here}",
            got=f"both, or names that may be either: {shown}",
            do="name every split folder so and move the rest away, or put the class folders into one folder 'train'",
        )


def _split_of(parts: Parts, level: int, splits: dict[str, str]) -> str:
    """The split of a path; everything is "train" where there are no split folders."""
    if not splits:
        return "train"
    return SPLITS.get(parts[level].casefold(), "") if len(parts) > level else ""


def _class_level(level: int, images: list[Image]) -> int:
    """The level of the class folders in split folders: below a folder that lies around all of them."""
    level += 1
    while len({image.parts[level] for image in images}) == 1 and min(len(image.parts) for image in images) - level >= 3:
        level += 1
    return level


def _refuse_splits_in_classes(here: str, images: list[Image], level: int) -> None:
    """Refuse classes that are divided into splits themselves: all of them together would mix the splits.

    Raises:
        InputError: naming such a folder.
    """
    for image in images:
        if len(image.parts) > level + 2 and image.parts[level + 1].casefold() in SPLITS:
            raise InputError(
                expected=f"split folders at the top of {here}, and classes in them",
                got=f"the split folder {printable('/'.join(image.parts[: level + 2]))}",
                do="move the split folders to the top, or give the path of one set of them",
            )


def _refuse_two_spellings(here: str, per_split: dict[str, set[str]]) -> None:
    """Refuse a class that is written in two ways in two splits, and names that cannot be shown or stored.

    Raises:
        InputError: naming them.
    """
    spelt: dict[str, str] = {}
    for name in sorted(set().union(*per_split.values())):
        if not name.isprintable():
            raise InputError(
                expected=f"class folders of {here} whose names can be printed",
                got=printable(name),
                do="rename the folder (its name is not UTF-8, or has control characters)",
            )
        first = spelt.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if first != name and not any({first, name} <= names for names in per_split.values()):
            raise InputError(
                expected=f"one spelling of a class in all splits of {here}", got=f"{first} and {name}", do="rename one"
            )


# --- links -----------------------------------------------------------------------------------------------------------


def _same_again(images: list[Image]) -> list[Again]:
    """Images of one split that were listed twice, because two folders might have been splits and are none."""
    first: dict[Hashable, Parts] = {}
    repeats = []
    for image in images:
        place = first.setdefault(image.identity, image.parts)
        if place != image.parts:
            repeats.append(Again(place, image.parts, False))
    return repeats


def _refuse_two_classes(again: Iterable[Again], level: int) -> None:
    """Refuse a file that lies in two classes with equal right: its label would be a matter of sorting.

    Raises:
        InputError: naming both places.
    """
    for first, second, clear in again:
        if not clear and len(second) > level and len(first) > level and first[level] != second[level]:
            raise InputError(
                expected="every image in one class",
                got=f"{printable('/'.join(second))}, the same file as {printable('/'.join(first))}",
                do="take one of the two links away",
            )


def _passed(special: int, again: int) -> str:
    words = []
    if special:
        words.append(f"{special} {'pipe, socket or device' if special == 1 else 'pipes, sockets or devices'}")
    if again:
        words.append(f"{again} {'link to what is' if again == 1 else 'links to what is'} there already")
    return f"passed over {' and '.join(words)}" if words else ""


# --- folders -------------------------------------------------------------------------------------------------------


def _folder(path: Path) -> Listing:
    """List a folder: what really lies in it first, and then what links add to it; each once in a possible split.

    Raises:
        InputError: for folders that cannot be read, broken links, and images of a kind that is not decoded.
    """
    listing = Listing()
    root = os.fspath(path)
    ancestors = {_identity(status) for parent in path.resolve().parents if (status := _status(parent)) is not None}
    reached: dict[Hashable, tuple[Parts, bool]] = {}
    waiting: deque[tuple[Parts, bool]] = deque([((), False)])
    links: deque[Parts] = deque()
    while waiting or links:
        parts, linked = waiting.popleft() if waiting else (links.popleft(), True)
        place = os.path.join(root, *parts)
        status = _status(place)
        name = parts[-1] if parts else ""
        if status is None:
            _refuse_broken(parts, linked)
            continue
        folder, image = stat.S_ISDIR(status.st_mode), _is_image(name)
        if not folder and not image:
            _refuse_unread(parts)
            continue
        if not folder and not stat.S_ISREG(status.st_mode):
            listing.special += 1
            continue
        identity = _identity(status)
        first, first_linked = reached.setdefault((_scope(parts), identity), (parts, linked))
        if folder and identity in ancestors:
            listing.again.append(Again((), parts, True))
        elif first != parts:
            listing.again.append(Again(first, parts, linked and not first_linked))
        elif folder:
            _enter(place, parts, linked, waiting, links)
        else:
            listing.images.append(Image(parts, identity))
    return listing


def _enter(place: str, parts: Parts, linked: bool, waiting: deque[tuple[Parts, bool]], links: deque[Parts]) -> None:
    """Put what lies in a folder into the queues: hidden files left out, links last.

    Raises:
        InputError: when it may not be read, or has vanished.
    """
    try:
        with os.scandir(place) as entries:
            inside = sorted((entry.name, entry.is_symlink(), entry.is_dir(follow_symlinks=False)) for entry in entries)
    except OSError as error:
        raise unreadable(place, "a folder", error) from error
    for name, link, folder in inside:
        if _is_hidden(name):
            continue
        if link:
            links.append((*parts, name))
        elif folder or PurePosixPath(name).suffix.lower() in SUFFIXES | UNREAD:
            waiting.append(((*parts, name), linked))


def _status(place: str | Path) -> os.stat_result | None:
    """The state of what is there, links followed; None where nothing is.

    Raises:
        InputError: when it may not be asked for.
    """
    try:
        return os.stat(place)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if os.path.islink(place) and not isinstance(error, PermissionError):
            return None  # links that lead round in a circle
        raise unreadable(str(place), "a file or folder", error) from error


def _identity(status: os.stat_result) -> Hashable:
    return status.st_dev, status.st_ino


def _scope(parts: Parts) -> str:
    """The split that a path may belong to: a file may lie in two of them, by a link."""
    return next((SPLITS[part.casefold()] for part in parts if part.casefold() in SPLITS), "")


def _refuse_broken(parts: Parts, linked: bool) -> None:
    """Refuse an image, or what may have been a folder of them, that is not there.

    Raises:
        InputError: naming it.
    """
    if not linked or _is_image(parts[-1]) or not PurePosixPath(parts[-1]).suffix:
        raise InputError(
            expected="images and folders that are there, while they are listed",
            got=f"{printable('/'.join(parts)) or 'a folder'}, {'a broken link' if linked else 'which has vanished'}",
            do="mend or remove the link" if linked else "read the folder while nothing changes it",
        )


def _refuse_unread(parts: Parts) -> None:
    """Refuse an image of a kind that is not decoded.

    Raises:
        InputError: naming it.
    """
    if PurePosixPath(parts[-1]).suffix.lower() in UNREAD:
        raise InputError(
            expected=f"images that can be decoded ({', '.join(sorted(SUFFIXES))})",
            got=printable("/".join(parts)),
            do="convert it to PNG or JPEG, or take it out",
        )


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in _HIDDEN


def _is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in SUFFIXES


# --- archives ------------------------------------------------------------------------------------------------------


def _archive(path: Path) -> Listing:
    """List an archive: regular members first, and then what links inside of it add.

    Raises:
        InputError: for a damaged archive, links that lead out of it, and images of a kind that is not decoded.
    """
    listing = Listing()
    regular: dict[str, Parts] = {}
    links: dict[str, tarfile.TarInfo] = {}
    with opened(path) as archive:
        for member in members(archive):
            parts = inside(member)
            if any(_is_hidden(part) for part in parts if part != ".."):
                continue
            if member.isreg():
                regular["/".join(parts)] = parts
                links.pop("/".join(parts), None)
            elif member.issym() or member.islnk():
                links["/".join(parts)] = member
                regular.pop("/".join(parts), None)
            elif not member.isdir() and parts and _is_image(parts[-1]):
                listing.special += 1
    for parts in regular.values():
        _refuse_unread(parts)
        if _is_image(parts[-1]):
            _refuse_climbing(parts)
            listing.images.append(Image(parts, ("member", parts)))
    folders = {"/".join(parts[:n]) for parts in regular.values() for n in range(len(parts))}
    for name, member in links.items():
        _add_link(listing, tuple(name.split("/")), _target(name, links), regular, folders, member.islnk())
    return listing


def _add_link(
    listing: Listing, parts: Parts, target: str | None, regular: dict[str, Parts], folders: set[str], hard: bool
) -> None:
    """Count a link as what is there already, or as an image where its own place would not be listed.

    Raises:
        InputError: for a link that leads out of the archive, or to a folder that is not read at its own place.
    """
    aim = tuple(target.split("/")) if target else ()
    same_split = not aim or (_scope(aim) == _scope(parts) and not any(_is_hidden(part) for part in aim))
    if target in folders and same_split:
        listing.again.append(Again(aim, parts, True))
    elif target in regular and _is_image(parts[-1]):
        _refuse_climbing(parts)
        if same_split and _is_image(aim[-1] if aim else ""):
            listing.again.append(Again(aim, parts, not hard))
        else:
            listing.images.append(Image(parts, ("member", aim)))
    elif target not in regular and (_is_image(parts[-1]) or not PurePosixPath(parts[-1]).suffix):
        raise InputError(
            expected="an archive that holds the images themselves",
            got=f"{printable('/'.join(parts))}, a link to what is not in it",
            do="pack it again with tar --dereference, or leave the link out",
        )


def _target(name: str, links: dict[str, tarfile.TarInfo]) -> str | None:
    """Where a link leads, by any other links, within the archive; None for a circle."""
    for _ in range(len(links) + 1):
        member = links.get(name)
        if member is None:
            return name
        base = "" if member.islnk() else posixpath.dirname(name)
        name = posixpath.normpath(posixpath.join(base, member.linkname)).removeprefix("./")
        name = "" if name == "." else name
    return None


def _refuse_climbing(parts: Parts) -> None:
    """Refuse an image that would lie outside of its archive, where it has no class.

    Raises:
        InputError: naming it.
    """
    if ".." in parts:
        raise InputError(
            expected="images inside of their archive",
            got=printable("/".join(parts)),
            do="do not trust this archive; pack it again from the folder itself",
        )


def inside(member: tarfile.TarInfo) -> Parts:
    """A member's path without a leading ``./``; nothing is ever unpacked to disk, so no path can lead astray.

    Args:
        member: of an archive.
    """
    return tuple(part for part in PurePosixPath(member.name).parts if part not in (".", "/"))
