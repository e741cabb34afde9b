"""Study dan2023-svhn: S_rel of ResNet-18 on the digits 0, 2 and 4 of SVHN (arXiv 2111.01166; spec srel 3.1)."""

from local_elasticity.studies.dan2023.images import Condition, ImageStudy, Scale
from local_elasticity.studies.dan2023.report import report

SVHN = ImageStudy(
    name="dan2023-svhn",
    title="dan2023-svhn: S_rel of ResNet-18 on SVHN 0, 2, 4",
    conditions=dict.fromkeys(("small", "paper"), (Condition("svhn", ("0", "2", "4")),)),
    sizes={"small": Scale(200, 25, 3, 1, probes_per_class=10), "paper": Scale(4000, 256, 7, 3)},
    cost={"small": "3 min on 1 core", "paper": "3 hours on 1 core"},
    report=report,
    figure="SVHN figures (KL and SuHe)",
    claim="S_rel by the new definition puts the own class above the others; by the original definition it does not",
)
