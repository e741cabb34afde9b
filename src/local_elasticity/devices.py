"""Devices by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from local_elasticity.errors import InputError

if TYPE_CHECKING:
    import torch


def usable_device(name: str) -> torch.device:
    """The device of this name.

    Raises:
        InputError: for one that torch does not know, or cannot use here.
    """
    import torch

    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            expected="a device that torch can use here", got=f"{name!r}: {str(error).splitlines()[0]}", do="use cpu"
        ) from None
    return device
