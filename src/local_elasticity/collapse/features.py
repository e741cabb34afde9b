"""Features: what a layer puts out, as one vector a sample."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from local_elasticity.base.checks import check_choice
from local_elasticity.base.tensors import check_tensor

Positions = Literal["mean", "flatten"]


def to_features(
    x: Float[Tensor, "samples ..."], positions: Positions = "mean", *, channels_last: bool = False
) -> Float[Tensor, "samples dim"]:
    """(samples, channels, ...) averaged over positions, or flattened; copied, since later layers may write in place.

    Args:
        x: outputs of a layer.
        positions: "mean" or "flatten".
        channels_last: (samples, ..., channels), as layers on sequences put it out.

    Raises:
        InputError: for another word.
    """
    check_choice("positions", positions, Positions)
    x = check_tensor("x", x, finite=False).detach()
    if x.dim() <= 2:
        return x.reshape(len(x), -1).clone()
    if positions == "flatten":
        return x.flatten(1).clone()
    return x.flatten(1, -2).mean(dim=1) if channels_last else x.flatten(2).mean(dim=2)
