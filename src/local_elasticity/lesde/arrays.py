"""Arrays in, the same kind out: NumPy arrays and torch tensors on the way into the model and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from local_elasticity.base.checks import as_numbers, plain_array

if TYPE_CHECKING:
    import torch

Array = Any  # a NumPy array or a torch tensor, as the user gave


def is_tensor(value: Any) -> bool:
    """Is this a torch tensor?"""
    return type(value).__module__.partition(".")[0] == "torch" and hasattr(value, "detach")


def to_numpy(value: Any, name: str) -> np.ndarray:
    """A NumPy array of numbers, float64 unless it was another floating type."""
    array = plain_array(value)
    return array if array is not None and array.dtype.kind == "f" else as_numbers(name, value)


@dataclass(frozen=True)
class Like:
    """The kind of array that a user works with.

    Attributes:
        dtype: floating type, by its name.
        device: where torch tensors live; None for NumPy arrays.
    """

    dtype: str = "float64"
    device: torch.device | None = None

    @staticmethod
    def of(value: Any) -> Like:
        """The kind of ``value``; float64 where it holds integers or is no array."""
        if is_tensor(value):
            dtype = str(value.dtype).removeprefix("torch.") if value.is_floating_point() else "float64"
            return Like(dtype, value.device)
        dtype = getattr(value, "dtype", None)
        return Like(str(dtype) if dtype is not None and np.dtype(dtype).kind == "f" else "float64")

    def __call__(self, array: np.ndarray) -> Array:
        """``array`` as that kind."""
        if self.device is None:
            return array.astype(self.dtype, copy=False)
        import torch

        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, getattr(torch, self.dtype))
