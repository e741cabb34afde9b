"""``local-elasticity reproduce``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from local_elasticity.base.checks import (
    check_whole,
)
from local_elasticity.base.devices import usable_device
from local_elasticity.base.errors import InputError
from local_elasticity.cli.app import app
from local_elasticity.cli.options import Whole, Words, check_folder


@app.command
def reproduce(
    *names: str,
    scale: Literal["small", "paper"] = "small",
    size: Words = None,
    out: Path | None = None,
    list_: Annotated[bool, Parameter(name="--list", negative="")] = False,
    from_: Annotated[Path | None, Parameter(name="--from")] = None,
    backend: Literal["serial", "loky", "ray", "dask"] | None = None,
    jobs: Whole = 1,
    address: str | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    trainings: Path | None = None,
    train_only: bool = False,
    only: Literal["geomnist", "cifar10"] | None = None,
    results: Path | None = None,
    so_far: bool = False,
) -> int:
    """Run studies of the papers and judge their claims; exit status 1 when a claim that was expected to hold does not.

    Example: local-elasticity reproduce dan2023-cifar10 --scale small

    Args:
        names: the studies, or all; several end with a page that joins their claims.
        scale: small (minutes) or paper (the published size).
        size: a size between, as NAME=VALUE: for example --size epochs=7 runs=1 every=18; the tables say so.
        out: folder of the study (of several: the folder of their folders); runs/NAME-SCALE by default. A study that
            was interrupted continues there.
        list_: list the studies: paper, figure, claim, and what they cost.
        from_: replay the study that made this folder, with its settings and seeds.
        backend: where independent runs are made: serial, loky (processes here), ray or dask (a cluster).
        jobs: runs at once; with more than one, loky unless a backend is named.
        address: of a running Ray or dask cluster, HOST:PORT.
        device: of the networks, cpu or cuda; for studies of images and of ensembles.
        overwrite: throw away what is already there.
        trainings: for studies of ensembles: a folder of trainings to share; else those of neighbouring studies are.
        train_only: for studies of ensembles: stop after the trainings.
        only: for studies of ensembles: one of their data sets.
        results: keep the tables, figures and timings of all studies here too, small files only.
        so_far: judge and draw what an unfinished study has so far; nothing is run.
    """
    from local_elasticity.base.parallel import Workers
    from local_elasticity.studies.engine import reproduction

    if list_ or not (names or from_):
        return reproduction.show_list(sys.stdout.isatty())
    check_whole("--jobs", jobs)
    for option, place in (("--out", out), ("--results", results), ("--trainings", trainings)):
        check_folder(option, place)
    workers = Workers(backend or ("loky" if jobs > 1 else "serial"), jobs, address)
    if from_ is not None:
        if device != "cpu":
            raise InputError(
                expected="the device of the study that is replayed", got=f"--device {device}", do="leave it out"
            )
        return reproduction.replay(from_, out, workers, overwrite)
    usable_device(device)
    if so_far:
        return reproduction.so_far(names, scale, _sizes(size), out)
    ensembles = {"trainings": trainings, "train_only": train_only, "only": only}
    return reproduction.reproduce(names, scale, _sizes(size), out, workers, overwrite, results, ensembles, device)


def _sizes(words: list[str] | None) -> dict[str, str]:
    pairs = [word.partition("=") for word in words or ()]
    for name, equals, value in pairs:
        if not (name and equals and value):
            raise InputError(expected="sizes as NAME=VALUE", got=repr(name + equals + value), do="for example runs=1")
    return {name: value for name, _, value in pairs}
