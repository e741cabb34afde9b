"""What the two ways to all changes cost, by counting: forward passes of one target (docs/engines.md)."""

from __future__ import annotations

from torch import nn

from local_elasticity.impact.problem import Problem

STEP_COST = 32  # a gradient and a written step, in forward passes of one target
CAPTURE_COST = 3  # a source that is no target is captured too
ONE_POSITION, MANY_POSITIONS = 2, 5  # what a captured target costs an output, in its forward passes
UNROLLED = 10  # recurrent layers are unrolled in Python to be captured


def captured_cost(problem: Problem) -> int:
    """Forward passes of one target that the contraction's captures cost."""
    layers = list(problem.model.modules())
    factor = MANY_POSITIONS if any(isinstance(layer, _POSITIONS) for layer in layers) else ONE_POSITION
    unrolled = UNROLLED if any(isinstance(layer, nn.RNNBase | nn.RNNCellBase) for layer in layers) else 1
    strangers = 0 if problem.inputs is problem.targets else CAPTURE_COST * problem.n_sources
    return (1 + factor * problem.n_outputs) * problem.n_targets * unrolled + strangers


def replayed_cost(problem: Problem) -> int:
    """Forward passes of one target that replaying every source costs."""
    return problem.n_sources * (problem.n_targets + STEP_COST)


_POSITIONS = (
    nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm,
    nn.MultiheadAttention, nn.Embedding, nn.EmbeddingBag, nn.RNNBase, nn.RNNCellBase,
)  # fmt: skip
