"""Training: follow local elasticity through any loop."""

from local_elasticity.training.schedule import Schedule, at, budget, every, log_spaced
from local_elasticity.training.tracker import Look, Tracker

__all__ = ["Look", "Schedule", "Tracker", "at", "budget", "every", "log_spaced"]
