"""The locally elastic SDE: its exact law, its paths, what it says about separation and collapse, its estimation."""

from local_elasticity.lesde.direct import ImpactMatrix, impact_matrix
from local_elasticity.lesde.drift import DRIFTS, Drift, Modes, register, simplex
from local_elasticity.lesde.estimate import Fit, estimate
from local_elasticity.lesde.model import LESDE

__all__ = [
    "DRIFTS",
    "LESDE",
    "Drift",
    "Fit",
    "ImpactMatrix",
    "Modes",
    "estimate",
    "impact_matrix",
    "register",
    "simplex",
]
