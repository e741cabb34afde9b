"""``local-elasticity data``."""

from __future__ import annotations

from local_elasticity.cli.app import app, console
from local_elasticity.cli.options import Sizes, size_option


@app.command(name="data")
def data_command(name: str | None = None, *, size: Sizes = None) -> int:
    """List the data sets: where each was found, or what would be downloaded; with a name, read it and count.

    Example: local-elasticity data cifar10

    Args:
        name: a data set to read (and to download where it is not at hand), or a folder of class folders of images.
        size: as in track.
    """
    import local_elasticity as le

    if name is not None:
        images = le.data.load(name, **size_option(size))
        console.print(f"{images.name}: {images.origin}; {len(images)} training images of shape {images.shape}")
        for label, count in zip(images.class_names, images.counts.tolist(), strict=True):
            console.print(f"  {label}: {count}", markup=False)
        return 0
    for entry in le.data.catalogue():
        console.print(f"{entry.name}: {entry.where}", markup=False)
    return 0
