"""Impact: take an update at a source, look at the targets. Knows nothing of training."""

from local_elasticity.impact.measurement import Impact, measure
from local_elasticity.impact.plan import Plan

__all__ = ["Impact", "Plan", "measure"]
