"""Impact: take an update at a source, look at the targets. Knows nothing of training."""

from local_elasticity.impact.kernel import kernel
from local_elasticity.impact.measurement import Impact, measure
from local_elasticity.impact.plan import Plan
from local_elasticity.impact.ripple import Ripple, ripple
from local_elasticity.impact.tiles import gradient_gram, measure_tiles

__all__ = ["Impact", "Plan", "Ripple", "gradient_gram", "kernel", "measure", "measure_tiles", "ripple"]
