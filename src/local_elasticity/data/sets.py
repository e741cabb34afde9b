"""The data sets by name, and what of them is at hand.

A new set is one reader and one line in `READERS`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from local_elasticity.data import bundled, cifar, idx, matlab
from local_elasticity.data.archives import is_archive
from local_elasticity.data.files import Entry, Folders
from local_elasticity.data.folder import image_folder
from local_elasticity.data.geomnist import entries as geomnist_entries
from local_elasticity.data.geomnist import read as read_geomnist
from local_elasticity.data.images import LabelledImages
from local_elasticity.errors import InputError, nearest

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
    known = {_plain(key): reader for key, reader in READERS.items()}
    path = Path(name).expanduser()
    try:
        if reader := known.get(_plain(str(name))):
            return reader(split, folders=folders, download=download, progress=progress, **options)
        if path.is_dir() or is_archive(path):
            return image_folder(path, split, progress=progress, **options)
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise InputError(
            expected=f"options that {name} has", got=str(error).rpartition("argument ")[2], do="leave it out"
        ) from error
    raise InputError(
        expected="the name of a data set, or the path of an image folder or tar archive",
        got=repr(str(name)),
        do=nearest(str(name), READERS),
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
