"""The data sets by name, and what of them is at hand.

A new set is one reader and one line in `READERS`.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from local_elasticity.base.checks import check_flag, check_path, in_words
from local_elasticity.base.errors import InputError, nearest
from local_elasticity.data import bundled, cifar, idx, matlab
from local_elasticity.data.archives import is_archive
from local_elasticity.data.checks import is_folder
from local_elasticity.data.files import Entry, Folders
from local_elasticity.data.folder import image_folder
from local_elasticity.data.geomnist import entries as geomnist_entries
from local_elasticity.data.geomnist import read as read_geomnist
from local_elasticity.data.images import LabelledImages
from local_elasticity.data.listing import split_names

READERS: dict[str, Callable[..., LabelledImages]] = {
    "digits": lambda split, folders, download, progress: bundled.digits(split),
    "cifar10": cifar.cifar10,
    "cifar100": cifar.cifar100,
    "svhn": matlab.svhn,
    "mnist": idx.mnist,
    "fashion-mnist": idx.fashion_mnist,
    "geomnist": read_geomnist,
    "geomnist-varied": partial(read_geomnist, variant="varied"),
}
"""What `load` knows by name. A reader takes (split, folders, download, progress) and its own options."""


def load(
    name: str | os.PathLike[str],
    split: str = "train",
    folders: Folders = None,
    download: bool = True,
    progress: bool = True,
    **options: Any,
) -> LabelledImages:
    """Read a data set by its name, or a folder or archive of images by its path.

    Args:
        name: digits, cifar10, cifar100, svhn, mnist, fashion-mnist, geomnist, geomnist-varied (however spelt:
            "CIFAR-10" too), or a path.
        split: ``"train"`` or ``"test"``.
        folders: searched first for its files.
        download: whether files that are nowhere may be downloaded.
        progress: whether to show a progress bar.
        **options: what only some sets have: ``source=``, ``at_least=``, ``classes=``, ``labels=``, ``size=``.

    Raises:
        InputError: for an unknown name, or files that are missing or damaged.
    """
    path = check_path("name", name)
    for what, value in (("download", download), ("progress", progress)):
        check_flag(what, value)
    known = {_plain(key): reader for key, reader in READERS.items()}
    if reader := known.get(_plain(str(name))):
        _check_options(str(name), reader, options)
        return reader(split, folders=folders, download=download, progress=progress, **options)
    if is_folder(path) or is_archive(path):
        _check_options("an image folder", image_folder, options)
        return image_folder(path, split, progress=progress, **options)
    raise InputError(
        expected="the name of a data set, or the path of an image folder or tar archive",
        got=in_words(str(name)),
        do=nearest(str(name), READERS),
    )


def other_split(train: LabelledImages, name: str | os.PathLike[str]) -> tuple[str | None, dict[str, Any]]:
    """Name the split that validates a training, and the options that read it from the same source.

    Args:
        train: the training images, as `load` gave them.
        name: as in `load`.

    Returns:
        "test", or "val" of an image folder without it, or None for one without either; and options of `load`.

    Raises:
        InputError: when the folder has changed meanwhile.
    """
    if train.source == "folder":
        splits = split_names(check_path("name", name))
        return next((split for split in ("test", "val") if split in splits), None), {}
    return "test", {"source": train.source} if train.name.startswith("cifar") else {}


def _check_options(name: str, reader: Callable[..., LabelledImages], options: Mapping[str, Any]) -> None:
    """Refuse options that a reader does not have.

    Raises:
        InputError: naming the option, and those that there are.
    """
    own = sorted(set(inspect.signature(reader).parameters) - {"split", "folders", "download", "progress", "path"})
    for option in options:
        if option not in own:
            raise InputError(
                expected=f"options that {name} has",
                got=repr(option),
                do=f"leave it out (it has {', '.join(own) or 'none'})",
            )


def catalogue(folders: Folders = None) -> list[Entry]:
    """List every data set: classes, sizes, where it is or what would be downloaded. Reads no images.

    Args:
        folders: searched first.
    """
    return [
        *bundled.entries(),
        *cifar.entries(folders),
        *matlab.entries(folders),
        *idx.entries(folders),
        *geomnist_entries(),
    ]


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum()) if os.sep not in name else name
