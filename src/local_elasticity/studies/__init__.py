"""The studies of the papers: one file each, and one line here."""

from local_elasticity.studies.collapse_prediction import PREDICTION
from local_elasticity.studies.dan2023_cifar10 import CIFAR10
from local_elasticity.studies.dan2023_cifar100 import CIFAR100
from local_elasticity.studies.dan2023_flows import FLOWS
from local_elasticity.studies.dan2023_modern import MODERN
from local_elasticity.studies.dan2023_regression import REGRESSION
from local_elasticity.studies.dan2023_ridge import RIDGE
from local_elasticity.studies.dan2023_svhn import SVHN
from local_elasticity.studies.hesu2020_clustering import CLUSTERING
from local_elasticity.studies.hesu2020_synthetic import SYNTHETIC
from local_elasticity.studies.wang2021_classes import CLASSES
from local_elasticity.studies.wang2021_corruption import CORRUPTION
from local_elasticity.studies.wang2021_dynamics import DYNAMICS
from local_elasticity.studies.wang2021_imitation import IMITATION
from local_elasticity.studies.wang2021_size import SIZE

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
