"""Where modules stood before they had rooms: the old names import the new modules, with a DeprecationWarning."""

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
import warnings
from collections.abc import Sequence

PACKAGE = __name__.rpartition(".")[0]
MOVED = {
    "classes": "similarity.tables",
    "cluster": "similarity.clustering",
    "devices": "base.devices",
    "errors": "base.errors",
    "interrupts": "base.interrupts",
    "kernel_similarity": "similarity.kernels",
    "parallel": "base.parallel",
    "phases": "similarity.phases",
    "updates": "impact.update",
}


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        return importlib.machinery.ModuleSpec(fullname, self) if package == PACKAGE and name in MOVED else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        old = module.__name__
        new = f"{PACKAGE}.{MOVED[old.rpartition('.')[2]]}"
        warnings.warn(f"{old} is {new} now", DeprecationWarning, stacklevel=2)
        sys.modules[old] = importlib.import_module(new)


def install() -> None:
    """Let the old names be found."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
