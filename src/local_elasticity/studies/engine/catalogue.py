"""What each study is about: the paper, its figure, the claim in a line. A study may say so itself by attributes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

PAPERS = {
    "dan2023": "Dan, Mukherjee, Das, Gampa (arXiv:2111.01166)",
    "hesu2020": "He and Su (arXiv:1910.06943)",
    "wang2021": "Zhang, Wang, Su (arXiv:2110.05960)",
}


@dataclass(frozen=True)
class About:
    """What a study is about.

    Attributes:
        paper: the paper.
        figure: its figure or section.
        claim: what it claims, in a line.
    """

    paper: str
    figure: str
    claim: str


ABOUT = {
    "dan2023-flows": About(
        PAPERS["dan2023"],
        "theorems 3.2, 5.1 to 5.3, lemma 4.3",
        "S_rel along gradient flows in closed form: constant, elastic then inelastic, or with jumps",
    ),
    "dan2023-regression": About(
        PAPERS["dan2023"],
        "neural regression",
        "S_rel of regression networks changes fast at first (elastic) and settles later (inelastic)",
    ),
    "dan2023-ridge": About(
        PAPERS["dan2023"], "ridge figures (6 to 9)", "S_rel of ridge classification rises by decades, then stays"
    ),
    "wang2021-dynamics": About(
        PAPERS["wang2021"],
        "figures 1 and 3",
        "classes separate in stages: alpha exceeds beta in the rise, then both die out",
    ),
    "wang2021-corruption": About(
        PAPERS["wang2021"],
        "figure 4",
        "wrong labels raise the tail index of alpha, to 1 near two thirds of them, where classes stop separating",
    ),
    "wang2021-size": About(
        PAPERS["wang2021"],
        "none (early notebooks)",
        "the dynamics on GeoMNIST hardly depend on the number of images, 50 to 6,000 a class",
    ),
    "wang2021-classes": About(
        PAPERS["wang2021"],
        "none (published code)",
        "CIFAR-10 with 2, 3, 4 and 5 classes: alpha exceeds beta in the rise, later than on GeoMNIST",
    ),
    "wang2021-imitation": About(
        PAPERS["wang2021"], "figure 5", "the L-model imitates the class means of networks better than the I-model"
    ),
    "collapse-prediction": About(
        "not in the papers",
        "none",
        "class means, separability, NC1 and NC2 can be foretold from the first part of training",
    ),
    "hesu2020-clustering": About(
        PAPERS["hesu2020"],
        "table of clusterings",
        "local elasticity of a network tells two classes apart that it was not told, better than K-means",
    ),
    "hesu2020-synthetic": About(
        PAPERS["hesu2020"],
        "torus and folded boxes",
        "S_rel of a network falls with geodesic distance; that of its linear twin does not",
    ),
}


def about(name: str, study: Any) -> About:
    """What a study is about: by its own attributes, by the table above, else by its name and title."""
    known = ABOUT.get(name)
    prefix = name.partition("-")[0]
    title = str(study.title)
    default = known or About(PAPERS.get(prefix, "see the study"), "see the study", title.partition(": ")[2] or title)
    given = {field: str(getattr(study, field, "") or "") for field in ("paper", "figure", "claim")}
    return About(**{field: value or getattr(default, field) for field, value in given.items()})
