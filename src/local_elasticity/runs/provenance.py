"""What decides numbers besides the settings: versions, and the revision of the code."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version


def versions() -> dict[str, str]:
    """Versions that decide numbers."""
    found = {"python": sys.version.split()[0]}
    for package in ("local-elasticity", "torch", "numpy", "xarray", "zarr"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def git_revision() -> str:
    """The revision of the working directory, with "+changes" when it is not clean; empty outside a repository."""
    try:
        revision = subprocess.run(
            ["git", "describe", "--always", "--dirty=+changes", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return revision.stdout.strip()
