"""The flow of a quadratic loss, dw/dt = b - H w: w(t) = e^{-Ht} (w0 - H^{-1} b) + H^{-1} b (spec srel 2.2, 2.3)."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
from jaxtyping import Float

from local_elasticity.base.errors import InputError
from local_elasticity.flows.base import Array, checked_array, checked_times

SYMMETRY = 1e-10  # largest difference from the transpose, relative to the largest entry


class QuadraticFlow:
    """w(t) by one eigendecomposition of H, for all times and all initial weights.

    Args:
        matrix: (p, p) H, symmetric and positive definite.
        vector: (..., p) b.
        start: (..., p) w0; leading dimensions are broadcast against those of b.

    Raises:
        InputError: for a matrix that is not square, not symmetric, singular or not positive definite.
    """

    def __init__(self, matrix: Any, vector: Any, start: Any) -> None:
        h = checked_array("matrix", matrix, ndim=2)
        self.eigenvalues, self.basis = checked_eigh(h)
        b = checked_array("vector", vector, len(h))
        self._start_from((b @ self.basis / self.eigenvalues) @ self.basis.T, start)

    def restarted(self, start: Any) -> QuadraticFlow:
        """The same flow from another w0, without decomposing H again."""
        other = copy.copy(self)
        other._start_from(self._fixed, start)
        return other

    def _start_from(self, fixed: Array, start: Any) -> None:
        self._fixed = fixed  # H^{-1} b, with the dimensions of b
        self.transient = (checked_array("w0", start, len(self.basis)) - fixed) @ self.basis  # in the eigenbasis
        self.limit = np.broadcast_to(fixed, self.transient.shape)

    def decay(self, t: Any) -> Float[np.ndarray, "T p"]:
        """The factors e^{-eigenvalue t}."""
        return np.exp(-np.multiply.outer(checked_times(t), self.eigenvalues))

    def weights(self, t: Any) -> Array:
        """W at times t: (T, ..., p)."""
        moving = np.expand_dims(self.decay(t), tuple(range(1, self.transient.ndim))) * self.transient
        return moving @ self.basis.T + self.limit

    def project(self, t: Any, vectors: Float[np.ndarray, "n p"]) -> Array:
        """w(t) . v for every vector, without forming w(t): (T, ..., n)."""
        shape = self.transient.shape[:-1]
        coefficients = self.transient.reshape(-1, self.transient.shape[-1])
        products = coefficients.T[:, :, None] * (vectors @ self.basis).T[:, None, :]
        moving = self.decay(t) @ products.reshape(len(self.eigenvalues), -1)
        return moving.reshape(-1, *shape, len(vectors)) + self.limit @ vectors.T


def checked_eigh(h: Float[np.ndarray, "p p"]) -> tuple[Float[np.ndarray, " p"], Float[np.ndarray, "p p"]]:
    """Eigenvalues and eigenvectors of a symmetric positive definite matrix."""
    if h.shape[0] != h.shape[1]:
        raise InputError(expected="a square matrix", got=f"shape {h.shape}", do="pass (p, p)")
    size = np.abs(h).max()
    if np.abs(h - h.T).max() > SYMMETRY * size:
        raise InputError(
            expected="a symmetric matrix",
            got=f"entries that differ by {np.abs(h - h.T).max():.3g} from their mirror images",
            do="use (H + H.T) / 2 if that is rounding, else check how it was made",
        )
    eigenvalues, basis = np.linalg.eigh((h + h.T) / 2)
    if eigenvalues[0] <= len(h) * np.finfo(np.float64).eps * np.abs(eigenvalues).max():
        singular = abs(eigenvalues[0]) <= 1e-9 * np.abs(eigenvalues).max()
        raise InputError(
            expected="a positive definite matrix",
            got=f"{'a singular one' if singular else 'one'} with smallest eigenvalue {eigenvalues[0]:.3g}",
            do="add a penalty, drop dependent features or use more samples than features",
        )
    return eigenvalues, basis
