"""Regression sets that come inside packages: scikit-learn's diabetes (442 rows), statsmodels' fair (6,366 rows)."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from local_elasticity.base.errors import missing_extra
from local_elasticity.data.checks import check_name


class RegressionSet(NamedTuple):
    """Standardised inputs (n, p) and labels (n,), float64, and where they come from."""

    inputs: Float[Tensor, "n p"]
    labels: Float[Tensor, " n"]
    origin: str


def regression(name: str) -> RegressionSet:
    """Read a regression set; inputs and labels have mean 0 and variance 1.

    Args:
        name: "diabetes" (disease progression from 10 measurements) or "fair" (years married from the 8 other answers
            of Fair's survey).

    Raises:
        InputError: for an unknown name, or where the package that carries it is missing.
    """
    check_name("a regression set", name, READERS)
    inputs, labels, origin = READERS[name]()
    x, y = (torch.from_numpy((v - v.mean(0)) / v.std(0)) for v in (inputs, labels))
    return RegressionSet(x, y, origin)


def _diabetes() -> tuple[np.ndarray, np.ndarray, str]:
    try:
        from sklearn.datasets import load_diabetes
    except ImportError:
        raise missing_extra("scikit-learn", "data", "carries the diabetes data") from None
    bunch: Any = load_diabetes()
    return np.asarray(bunch.data), np.asarray(bunch.target), f"scikit-learn's diabetes, {len(bunch.data)} rows"


def _fair() -> tuple[np.ndarray, np.ndarray, str]:
    try:
        from statsmodels.datasets import fair
    except ImportError:
        raise missing_extra("statsmodels", "regression", "carries Fair's survey") from None
    frame: Any = fair.load_pandas().data
    labels = frame["yrs_married"].to_numpy(dtype=np.float64)
    inputs = frame.drop(columns="yrs_married").to_numpy(dtype=np.float64)
    return inputs, labels, f"statsmodels' fair, {len(frame)} rows"


READERS = {"diabetes": _diabetes, "fair": _fair}
