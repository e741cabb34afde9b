"""Data: readers of image sets, class subsets, and the choice of probes.

Files are read from where they lie (``LOCAL_ELASTICITY_DATA`` lists folders), else downloaded with a checksum.
Importing this package imports none of the optional packages.
"""

from local_elasticity.data.bundled import digits
from local_elasticity.data.cifar import cifar10, cifar100
from local_elasticity.data.corruption import corrupt_labels
from local_elasticity.data.files import ENVIRONMENT, Entry, Official, cache_folder, search_folders
from local_elasticity.data.folder import image_folder
from local_elasticity.data.geomnist import TensorData, geomnist
from local_elasticity.data.idx import fashion_mnist, mnist
from local_elasticity.data.images import NORMALISATION, AugmentOnce, LabelledImages
from local_elasticity.data.matlab import svhn
from local_elasticity.data.probing import Probes, probes
from local_elasticity.data.sets import READERS, catalogue, load
from local_elasticity.data.splits import load_split
from local_elasticity.data.subsets import cifar10_subset

__all__ = [
    "ENVIRONMENT",
    "NORMALISATION",
    "READERS",
    "AugmentOnce",
    "Entry",
    "LabelledImages",
    "Official",
    "Probes",
    "TensorData",
    "cache_folder",
    "catalogue",
    "cifar10",
    "cifar10_subset",
    "cifar100",
    "corrupt_labels",
    "digits",
    "fashion_mnist",
    "geomnist",
    "image_folder",
    "load",
    "load_split",
    "mnist",
    "probes",
    "search_folders",
    "svhn",
]
