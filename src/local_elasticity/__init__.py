"""Local elasticity: when one update is taken at x, how much does the prediction at x' move?"""

import importlib
from typing import TYPE_CHECKING, Any

from local_elasticity import _moved

if TYPE_CHECKING:
    from local_elasticity import collapse, data, flows, lesde, networks, similarity
    from local_elasticity.base.errors import IdentifiabilityWarning, InputError, NoiseWarning
    from local_elasticity.impact import Impact, Plan, Ripple, gradient_gram, kernel, measure, measure_tiles, ripple
    from local_elasticity.impact.ranks import measure_across_ranks
    from local_elasticity.impact.update import SGD, Adam, Update, from_optimizer
    from local_elasticity.lesde import LESDE, Fit, ImpactMatrix, estimate, impact_matrix
    from local_elasticity.runs.run import Run, open_run
    from local_elasticity.similarity.clustering import LocalElasticityClustering as LocalElasticityClustering
    from local_elasticity.similarity.definitions import define, s_rel
    from local_elasticity.similarity.kernels import s_ker, s_rel_limit
    from local_elasticity.similarity.tables import ClassTable, by_class
    from local_elasticity.training import (
        Ensemble,
        Tracker,
        at,
        budget,
        every,
        log_spaced,
        open_ensemble,
        train_ensemble,
    )

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

_HOMES = {  # imported when first asked for: the command line must be able to answer a signal before torch is there
    "local_elasticity.similarity.tables": "ClassTable by_class",
    "local_elasticity.base.errors": "IdentifiabilityWarning InputError NoiseWarning",
    "local_elasticity.impact": "Impact Plan Ripple gradient_gram kernel measure measure_tiles ripple",
    "local_elasticity.impact.ranks": "measure_across_ranks",
    "local_elasticity.similarity.kernels": "s_ker s_rel_limit",
    "local_elasticity.lesde": "LESDE Fit ImpactMatrix estimate impact_matrix",
    "local_elasticity.runs": "Run open_run",
    "local_elasticity.similarity.definitions": "define s_rel",
    "local_elasticity.training": "Ensemble Tracker at budget every log_spaced open_ensemble train_ensemble",
    "local_elasticity.impact.update": "SGD Adam Update from_optimizer",
    "local_elasticity.similarity.clustering": "LocalElasticityClustering",  # an extra: not in __all__
}
_ROOMS = {
    "base",
    "collapse",
    "data",
    "flows",
    "impact",
    "lesde",
    "networks",
    "report",
    "runs",
    "similarity",
    "training",
}

_moved.install()


def __getattr__(name: str) -> Any:
    if name in _ROOMS or name in _moved.MOVED:
        return importlib.import_module(f"{__name__}.{name}")
    home = next((module for module, names in _HOMES.items() if name in names.split()), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(importlib.import_module(home), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
