"""Study dan2023-cifar100: S_rel of ResNet-18 on CIFAR-100 motorcycle, orange, wardrobe (arXiv 2111.01166; srel 3.1).

The small scale takes the superclasses of these three, so that a subset of the data set is enough for it.
"""

from local_elasticity.studies.dan2023.images import Condition, ImageStudy, Scale
from local_elasticity.studies.dan2023.report import report

FINE = Condition("cifar100", ("motorcycle", "orange", "wardrobe"))
COARSE = Condition("cifar100", ("vehicles_1", "fruit_and_vegetables", "household_furniture"), labels="coarse")

CIFAR100 = ImageStudy(
    name="dan2023-cifar100",
    title="dan2023-cifar100: S_rel of ResNet-18 on CIFAR-100 motorcycle, orange, wardrobe (small: their superclasses)",
    conditions={"small": (COARSE,), "paper": (FINE,)},
    sizes={"small": Scale(50, 10, 5, 1, probes_per_class=6, every=8), "paper": Scale(500, 25, 7, 3)},
    cost={"small": "2 min on 1 core", "paper": "2 hours on 1 core"},
    report=report,
    figure="CIFAR-100 figures (KL and SuHe)",
    claim="S_rel by the new definition puts the own class above the others; by the original definition it does not",
)
