"""The studies of the papers: one file each, and one line here."""

from local_elasticity.studies.dan2023.cifar10 import CIFAR10
from local_elasticity.studies.dan2023.cifar100 import CIFAR100
from local_elasticity.studies.dan2023.flows import FLOWS
from local_elasticity.studies.dan2023.modern import MODERN
from local_elasticity.studies.dan2023.regression import REGRESSION
from local_elasticity.studies.dan2023.ridge import RIDGE
from local_elasticity.studies.dan2023.svhn import SVHN
from local_elasticity.studies.hesu2020.clustering import CLUSTERING
from local_elasticity.studies.hesu2020.synthetic import SYNTHETIC
from local_elasticity.studies.own.collapse_prediction import PREDICTION
from local_elasticity.studies.wang2021.classes import CLASSES
from local_elasticity.studies.wang2021.corruption import CORRUPTION
from local_elasticity.studies.wang2021.dynamics import DYNAMICS
from local_elasticity.studies.wang2021.imitation import IMITATION
from local_elasticity.studies.wang2021.size import SIZE

STUDIES = {
    "collapse-prediction": PREDICTION,
    "dan2023-cifar10": CIFAR10,
    "dan2023-cifar100": CIFAR100,
    "dan2023-flows": FLOWS,
    "dan2023-modern": MODERN,
    "dan2023-regression": REGRESSION,
    "dan2023-ridge": RIDGE,
    "dan2023-svhn": SVHN,
    "hesu2020-clustering": CLUSTERING,
    "hesu2020-synthetic": SYNTHETIC,
    "wang2021-classes": CLASSES,
    "wang2021-corruption": CORRUPTION,
    "wang2021-dynamics": DYNAMICS,
    "wang2021-imitation": IMITATION,
    "wang2021-size": SIZE,
}
"""Name -> study; a study has ``title``, ``cost`` and ``run(scale, out, overwrite)``."""

__all__ = ["STUDIES"]
