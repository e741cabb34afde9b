"""Reports of a run: matplotlib figures and one self-contained HTML page."""

from local_elasticity.report.figures import class_pair_curves, heat_map, intra_inter, save, write_all
from local_elasticity.report.page import write_page

__all__ = ["class_pair_curves", "heat_map", "intra_inter", "save", "write_all", "write_page"]
