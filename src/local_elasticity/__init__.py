"""Local elasticity: when one update is taken at x, how much does the prediction at x' move?"""

from local_elasticity import data, lesde, networks, similarity
from local_elasticity.classes import ClassTable, by_class
from local_elasticity.errors import IdentifiabilityWarning, InputError, NoiseWarning
from local_elasticity.impact import Impact, Plan, measure
from local_elasticity.lesde import LESDE, Fit, ImpactMatrix, estimate, impact_matrix
from local_elasticity.runs import Run, open_run
from local_elasticity.similarity import define, s_rel
from local_elasticity.training import Tracker, at, budget, every, log_spaced
from local_elasticity.updates import SGD, Adam, Update, from_optimizer

__version__ = "0.1.0"

__all__ = [  # grouped as the work goes: update, moment, definitions, tables, training, runs, rooms, errors
    "LESDE",
    "SGD",
    "Adam",
    "ClassTable",
    "Fit",
    "IdentifiabilityWarning",
    "Impact",
    "ImpactMatrix",
    "InputError",
    "NoiseWarning",
    "Plan",
    "Run",
    "Tracker",
    "Update",
    "at",
    "budget",
    "by_class",
    "data",
    "define",
    "estimate",
    "every",
    "from_optimizer",
    "impact_matrix",
    "lesde",
    "log_spaced",
    "measure",
    "networks",
    "open_run",
    "s_rel",
    "similarity",
]
