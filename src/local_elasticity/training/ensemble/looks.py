"""What is looked at while an ensemble trains, and when."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from local_elasticity.base.checks import (
    plain_array,
)
from local_elasticity.base.errors import InputError, nearest
from local_elasticity.base.tensors import (
    check_pair,
    try_model,
)
from local_elasticity.impact.subject import preserved
from local_elasticity.training.lockstep.routes import copied
from local_elasticity.training.schedule import Budget, Moment, Schedule, every

if TYPE_CHECKING:
    pass


Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Looks:
    """Samples that are looked at, and when."""

    pair: Any
    times: np.ndarray

    @classmethod
    def of(
        cls, pair: Any, schedule: Schedule | None, steps: int, default: int, name: str, dtype: Any, device: Any
    ) -> Looks:
        """Of samples and a schedule; of none where there are no samples."""
        if pair is None:
            if schedule is not None:
                raise InputError(expected=f"{name} with a schedule of them", got="none", do=f"pass {name}=(X, Y)")
            return cls(None, np.empty(0, dtype=np.int64))
        x, y = checked_pair(pair, name)
        times = due(schedule or every(max(1, steps // default)), steps)
        return cls((cast(x, dtype, device), cast(y, dtype, device)), np.array(times, dtype=np.int64))

    def __contains__(self, step: int) -> bool:
        return self.pair is not None and bool((self.times == step).any())

    def position(self, step: int) -> int:
        """The row of a step."""
        return int(np.searchsorted(self.times, step))

    def describe(self) -> list[Any]:
        """What makes two of them the same."""
        return [] if self.pair is None else [digest(*self.pair), self.times.tolist()]

    @property
    def classes(self) -> int:
        """Number of classes of the samples; 0 where labels are no classes."""
        return 0 if self.pair is None or not is_class(self.pair[1]) else int(self.pair[1].max()) + 1


def due(schedule: Schedule, steps: int, *, first: bool = True, last: bool = True) -> list[int]:
    """Updates made at each look of a schedule, with one before the first update and one after the last.

    Raises:
        InputError: for a budget: what is looked at would depend on the clock.
    """
    if isinstance(schedule, Budget):
        raise InputError(
            expected="a schedule that depends on the step alone",
            got="budget(...)",
            do="use every(n), log_spaced(n, total) or at([...])",
        )
    asked = (call + 1 for call in range(steps) if schedule.due(Moment(call, call, 0.0, 0.0, lambda: math.nan)))
    return sorted({*asked, *([0] if first else []), *([steps] if last else [])})


def cast(x: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers in a dtype, classes as int64, on a device."""
    return x.detach().to(device, dtype if x.is_floating_point() else torch.int64)


def checked_pair(pair: Any, name: str) -> Pair:
    """Inputs and labels that belong together, finite."""
    if isinstance(pair, tuple | list) and len(pair) == 2:  # arrays are as good, unlike in a measurement
        pair = [_as_tensor(values) for values in pair]
    x, y = check_pair(name, pair)
    if x.dim() < 2:
        raise InputError(
            expected=f"inputs of {name}: (samples, ...)",
            got=f"shape {tuple(x.shape)}",
            do="of one number a sample, pass x.unsqueeze(1); of one sample, x.unsqueeze(0)",
        )
    return x, y


def _as_tensor(values: Any) -> Any:
    """A tensor of an array or of lists of numbers; anything else as it is."""
    array = None if isinstance(values, Tensor) else plain_array(values)
    return values if array is None or array.dtype.kind not in "biuf" else torch.as_tensor(array)


def is_class(y: Tensor) -> bool:
    """Whether labels are classes."""
    return y.dim() == 1 and not y.is_floating_point()


def check_looks(checking: Looks, probing: Looks, outputs: int, layers: Sequence[str], template: nn.Module) -> None:
    """Refuse looks that the outputs or the layers do not allow.

    Raises:
        InputError: before any training.
    """
    if probing.pair is not None and not probing.classes:
        raise InputError(
            expected="probes with classes", got="labels that are no whole numbers", do="use validation or callback"
        )
    for name, looks in (("validation", checking), ("probes", probing)):
        if looks.pair is not None:
            with torch.no_grad(), preserved(copied(template), "eval", restore_streams=True) as subject:
                try_model(subject.model, looks.pair[0][:1], f"inputs of {name}")
        if looks.classes > max(outputs, 2):
            raise InputError(
                expected=f"{name}: labels in 0 ... {outputs - 1}", got=f"label {looks.classes - 1}", do="relabel"
            )
    if probing.pair is not None:
        counts = torch.bincount(probing.pair[1])
        if int(counts.min()) == 0:
            raise InputError(
                expected="probes of every class",
                got=f"none of class {int(counts.argmin())}",
                do="add some, or relabel",
            )
    known = {name for name, _ in template.named_modules() if name}
    for layer in layers:
        if layer not in known:
            raise InputError(expected="a layer of the network", got=repr(layer), do=nearest(layer, known))
        if probing.pair is None:
            raise InputError(expected="probes with collapse_layers", got="none", do="pass probes=(X, Y)")


def digest(x: Shaped[Tensor, "samples ..."], y: Shaped[Tensor, "samples ..."]) -> str:
    """A name for samples: the same for the same numbers."""
    content = hashlib.sha256(x.cpu().contiguous().float().numpy().tobytes())
    content.update(y.cpu().contiguous().double().numpy().tobytes())
    return content.hexdigest()[:16]
