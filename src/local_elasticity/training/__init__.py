"""Training: follow local elasticity through any loop."""

from local_elasticity.runs.ensembles import open_ensemble
from local_elasticity.training.ensemble.log import Ensemble
from local_elasticity.training.ensemble.train import train_ensemble
from local_elasticity.training.schedule import Schedule, at, budget, every, log_spaced
from local_elasticity.training.tracker import Look, Tracker

__all__ = [
    "Ensemble",
    "Look",
    "Schedule",
    "Tracker",
    "at",
    "budget",
    "every",
    "log_spaced",
    "open_ensemble",
    "train_ensemble",
]
