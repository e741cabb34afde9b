"""Local elasticity: when one update is taken at x, how much does the prediction at x' move?"""

from typing import TYPE_CHECKING, Any

from local_elasticity import collapse, data, flows, lesde, networks, similarity
from local_elasticity.classes import ClassTable, by_class
from local_elasticity.errors import IdentifiabilityWarning, InputError, NoiseWarning
from local_elasticity.impact import Impact, Plan, Ripple, gradient_gram, kernel, measure, measure_tiles, ripple
from local_elasticity.impact.ranks import measure_across_ranks
from local_elasticity.kernel_similarity import s_ker, s_rel_limit
from local_elasticity.lesde import LESDE, Fit, ImpactMatrix, estimate, impact_matrix
from local_elasticity.runs import Run, open_run
from local_elasticity.similarity import define, s_rel
from local_elasticity.training import Ensemble, Tracker, at, budget, every, log_spaced, open_ensemble, train_ensemble
from local_elasticity.updates import SGD, Adam, Update, from_optimizer

if TYPE_CHECKING:
    from local_elasticity.cluster import LocalElasticityClustering as LocalElasticityClustering

__version__ = "0.1.0"

__all__ = [  # grouped as the work goes: update, moment, definitions, tables, training, runs, rooms, errors
    "LESDE",
    "SGD",
    "Adam",
    "ClassTable",
    "Ensemble",
    "Fit",
    "IdentifiabilityWarning",
    "Impact",
    "ImpactMatrix",
    "InputError",
    "NoiseWarning",
    "Plan",
    "Ripple",
    "Run",
    "Tracker",
    "Update",
    "at",
    "budget",
    "by_class",
    "collapse",
    "data",
    "define",
    "estimate",
    "every",
    "flows",
    "from_optimizer",
    "gradient_gram",
    "impact_matrix",
    "kernel",
    "lesde",
    "log_spaced",
    "measure",
    "measure_across_ranks",
    "measure_tiles",
    "networks",
    "open_ensemble",
    "open_run",
    "ripple",
    "s_ker",
    "s_rel",
    "s_rel_limit",
    "similarity",
    "train_ensemble",
]


def __getattr__(name: str) -> Any:
    """What needs an extra is imported when it is asked for (and is therefore not in ``__all__``)."""
    if name == "LocalElasticityClustering":
        from local_elasticity.cluster import LocalElasticityClustering

        return LocalElasticityClustering
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
