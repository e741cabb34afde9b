"""Neural collapse: NC1 to NC4 and CDNV of features, in one pass, per layer, and as a metric of torchmetrics."""

from typing import Any

from local_elasticity.collapse.features import to_features
from local_elasticity.collapse.geometry import CLASSIFIER, GEOMETRY, metrics, metrics_of_many
from local_elasticity.collapse.layers import (
    OUTPUTS,
    PENULTIMATE,
    LayerCollapse,
    check_layers,
    layer_metrics,
    layer_outputs,
    weighted_layers,
)
from local_elasticity.collapse.state import NeuralCollapse

__all__ = [
    "CLASSIFIER",
    "GEOMETRY",
    "OUTPUTS",
    "PENULTIMATE",
    "LayerCollapse",
    "NeuralCollapse",
    "check_layers",
    "layer_metrics",
    "layer_outputs",
    "metrics",
    "metrics_of_many",
    "to_features",
    "weighted_layers",
]


def __getattr__(name: str) -> Any:
    """What needs an extra is imported when it is asked for (and is therefore not in ``__all__``)."""
    if name == "NeuralCollapseMetric":
        from local_elasticity.collapse.metric import NeuralCollapseMetric

        return NeuralCollapseMetric
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
