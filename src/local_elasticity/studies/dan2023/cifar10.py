"""Study dan2023-cifar10: S_rel of ResNet-18 on CIFAR-10 airplane, automobile, ship (arXiv 2111.01166; srel 3.1)."""

from local_elasticity.studies.dan2023.images import Condition, ImageStudy, Scale
from local_elasticity.studies.dan2023.report import report

CLASSES = ("airplane", "automobile", "ship")

CIFAR10 = ImageStudy(
    name="dan2023-cifar10",
    title="dan2023-cifar10: S_rel of ResNet-18 on CIFAR-10 plane, car, ship",
    conditions=dict.fromkeys(("small", "paper"), (Condition("cifar10", CLASSES),)),
    sizes={"small": Scale(200, 25, 3, 1, probes_per_class=10), "paper": Scale(5000, 256, 7, 3)},
    cost={"small": "3 min on 1 core", "paper": "3 hours on 1 core"},
    report=report,
    figure="CIFAR-10 figures (KL and SuHe)",
    claim="S_rel by the new definition puts the own class above the others; by the original definition it does not",
)
