"""The studies of the papers: one file each, and one line here."""

from local_elasticity.studies.dan2023_images import CIFAR10

STUDIES = {"dan2023-cifar10": CIFAR10}
"""Name -> study; a study has ``title``, ``cost`` and ``run(scale, out, overwrite)``."""

__all__ = ["STUDIES"]
