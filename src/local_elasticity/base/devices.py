"""Devices by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def usable_device(name: str) -> torch.device:
    """The device of this name.

    Raises:
        InputError: for one that torch does not know, or cannot use here.
    """
    from local_elasticity.base.tensors import check_device

    device = check_device("--device", name, or_none=False)
    assert device is not None
    return device
