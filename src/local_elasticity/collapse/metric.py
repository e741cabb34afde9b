"""Neural collapse as a metric of torchmetrics: in a MetricCollection, in Lightning's ``self.log``, across processes."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from local_elasticity.base.errors import missing_extra
from local_elasticity.collapse.features import Positions
from local_elasticity.collapse.geometry import CLASSIFIER, GEOMETRY, Weighting
from local_elasticity.collapse.state import SUMS, Keep, NeuralCollapse

try:
    from torchmetrics import Metric
except ImportError as error:
    raise missing_extra("torchmetrics", "metrics", "NeuralCollapse as one of its metrics") from error


class NeuralCollapseMetric(Metric):
    """`NeuralCollapse` for torchmetrics: its states are registered with ``dist_reduce_fx="sum"`` ("cat" for features).

    Before processes add up their sums they agree on the points that these are about, so that a reduced metric is that
    of one process that saw everything, without loss of digits. ``compute`` gives a dict name -> scalar tensor; classes
    without samples give NaN and a warning, since ``forward`` computes a value of every batch.

    Args:
        n_classes: K.
        dim: D, numbers in a feature.
        classifier: the last layer, for NC3 (and NC4 with ``keep="features"``); its weight at the time of ``compute``.
        weighting: as in `NeuralCollapse`.
        keep: as in `NeuralCollapse`.
        positions: as in `NeuralCollapse`.
        **options: of ``torchmetrics.Metric``.
    """

    full_state_update = True  # a batch's sums are about other points than those of all batches
    is_differentiable = False
    higher_is_better = False

    def __init__(
        self,
        n_classes: int,
        dim: int,
        *,
        classifier: nn.Linear | None = None,
        weighting: Weighting = "classes",
        keep: Keep = "sums",
        positions: Positions = "mean",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self._options: dict[str, Any] = {"weighting": weighting, "keep": keep, "positions": positions}
        self._sizes, self._classifier = (n_classes, dim), (classifier,)  # a tuple: it is not a part of this module
        empty = NeuralCollapse(n_classes, dim, **self._options)
        self.add_state("counts", empty.counts, dist_reduce_fx="sum")
        if keep == "features":
            self.add_state("features", [], dist_reduce_fx="cat")
            self.add_state("labels", [], dist_reduce_fx="cat")
            return
        for name in SUMS[1:]:
            self.add_state(name, getattr(empty, name), dist_reduce_fx="sum")
        self.add_state("shift", empty.shift, dist_reduce_fx="mean")  # the same everywhere when it is reduced

    def update(self, features: Float[Tensor, "samples dim"], labels: Int[Tensor, " samples"]) -> None:
        """Take in a batch."""
        inner = self._inner()
        inner.update(features, labels)
        self._take(inner)

    def compute(self) -> dict[str, Tensor]:
        """The metrics of everything seen, by all processes."""
        (linear,), inner = self._classifier, self._inner()
        names = GEOMETRY if linear is None else GEOMETRY + CLASSIFIER
        empty = torch.nonzero(inner.counts == 0).flatten().tolist()
        found = dict.fromkeys(names, math.nan)
        if empty:
            warnings.warn(f"no samples of the classes {empty}: no neural collapse", stacklevel=2)
        else:
            found = inner.compute() if linear is None else inner.compute(linear.weight, linear.bias)
        return {name: torch.tensor(value, dtype=torch.float64, device=self.device) for name, value in found.items()}

    def merge_state(self, incoming_state: Any) -> None:
        """Add what another metric saw.

        Args:
            incoming_state: the metric, or the dict of its states.
        """
        inner = self._inner()
        inner.merge(self._inner(incoming_state))
        self._take(inner)
        self._update_count += 1
        self._computed = None

    def _sync_dist(self, dist_sync_fn: Any = None, process_group: Any = None) -> None:
        if self._options["keep"] == "sums":
            counts = torch.stack(dist_sync_fn(self.counts, group=process_group))[..., None]
            shifts = torch.stack(dist_sync_fn(self.shift, group=process_group))
            inner = self._inner()
            # A point among those of the processes, near all samples of the class.
            inner.recentre((counts * shifts).sum(dim=0) / counts.sum(dim=0).clamp_min(1))
            self._take(inner)
        super()._sync_dist(dist_sync_fn, process_group)

    def _inner(self, source: Any = None) -> NeuralCollapse:
        """A `NeuralCollapse` over copies of the states of this metric, of another, or of a dict of states."""
        state = {
            name: source[name] if isinstance(source, dict) else getattr(source or self, name) for name in self._defaults
        }
        inner = NeuralCollapse(*self._sizes, **self._options, device=self.device)
        for name, value in state.items():
            if isinstance(value, list):
                value = list(value)
            elif name in ("features", "labels"):
                value = [value]  # reduced: one tensor
            else:
                value = value.detach().clone()
            setattr(inner, name, value)
        return inner

    def _take(self, inner: NeuralCollapse) -> None:
        for name in self._defaults:
            setattr(self, name, getattr(inner, name))
