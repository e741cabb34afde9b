"""The locally elastic SDE: its exact law, its paths, what it says about separation and collapse."""

from local_elasticity.lesde.drift import DRIFTS, Drift, Modes, register, simplex
from local_elasticity.lesde.model import LESDE
from local_elasticity.lesde.separability import PhaseDiagram, cover_probability, phase_diagram, separable

__all__ = [
    "DRIFTS",
    "LESDE",
    "Drift",
    "Modes",
    "PhaseDiagram",
    "cover_probability",
    "phase_diagram",
    "register",
    "separable",
    "simplex",
]
