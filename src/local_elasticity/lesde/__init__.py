"""The locally elastic SDE: its exact law, its paths, what it says about separation and collapse, its estimation."""

from local_elasticity.lesde.direct import ImpactMatrix, impact_matrix
from local_elasticity.lesde.drift import DRIFTS, Drift, Modes, register, simplex
from local_elasticity.lesde.estimation.estimate import Fit, estimate
from local_elasticity.lesde.model import LESDE
from local_elasticity.lesde.phase_diagram import PhaseDiagram, phase_diagram
from local_elasticity.lesde.separability import cover_probability, separable

__all__ = [
    "DRIFTS",
    "LESDE",
    "Drift",
    "Fit",
    "ImpactMatrix",
    "Modes",
    "PhaseDiagram",
    "cover_probability",
    "estimate",
    "impact_matrix",
    "phase_diagram",
    "register",
    "separable",
    "simplex",
]
