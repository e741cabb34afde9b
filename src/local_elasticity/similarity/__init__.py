"""Relative similarity: its definitions, class tables, kernels, clustering, phases."""

from local_elasticity.similarity.definitions import (
    Definition,
    at_limit,
    define,
    get_definition,
    outputs_of,
    s_rel,
    s_rel_of,
)

__all__ = ["Definition", "at_limit", "define", "get_definition", "outputs_of", "s_rel", "s_rel_of"]
