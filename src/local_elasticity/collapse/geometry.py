"""The metrics of neural collapse: formulas, from class means, counts and within-class covariance.

Papyan, Han, Donoho (2020, arXiv:2008.08186) for NC1 to NC4, Galanti, György, Hutter (2021, arXiv:2112.15121) for CDNV.
With class means mu_k (float64), M the rows mu_k - mean_k mu_k, Sigma_W the pooled within-class covariance over all
samples and Sigma_B = M^T M / K:

- ``nc1`` = tr(Sigma_W Sigma_B^+) / K, through the K - 1 dimensional span of M: no D x D pseudo-inverse.
- ``nc1_quotient`` = tr Sigma_W / tr Sigma_B.
- ``nc1_cdnv``: mean over pairs of classes of (Var_i + Var_j) / (2 ||mu_i - mu_j||^2), Var_k the mean squared distance
  from mu_k.
- ``nc2_equinorm``: standard deviation over mean of ||M_k||.
- ``nc2_equiangle``, ``nc2_equiangle_max``: mean and largest |cos(M_k, M_l) + 1/(K - 1)|.
- ``nc2_simplex``: Frobenius distance of M M^T / ||M M^T|| from (I - J/K) / sqrt(K - 1), the simplex's.

With the classifier's weight W (and bias b) also

- ``nc2_equinorm_weight``, ``nc2_equiangle_weight``: the same of W's rows, which are not centred.
- ``nc3`` = || W/||W|| - M/||M|| ||.
- ``nc4``: share of samples whose class by W h + b is not that of the nearest class mean.

A metric that is not defined (no spread between class means, a class mean at the centre) is NaN.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor

from local_elasticity.errors import InputError, nearest

Weighting = Literal["classes", "samples"]
Form = Literal["span", "svd", "pinv"]
FORMS = ("span", "svd", "pinv")
GEOMETRY = (
    "nc1",
    "nc1_quotient",
    "nc1_cdnv",
    "nc2_equinorm",
    "nc2_equiangle",
    "nc2_equiangle_max",
    "nc2_simplex",
)
"""The metrics that need features and labels only."""
CLASSIFIER = ("nc2_equinorm_weight", "nc2_equiangle_weight", "nc3", "nc4")
"""The metrics that need the classifier too."""


def metrics(
    features: Float[Tensor, "samples dim"],
    labels: Int[Tensor, " samples"],
    weight: Float[Tensor, "classes dim"] | None = None,
    bias: Float[Tensor, " classes"] | None = None,
    *,
    n_classes: int | None = None,
    weighting: Weighting = "classes",
) -> dict[str, float]:
    """All metrics of features that are at hand: the numbers of `NeuralCollapse` without any D x D matrix.

    Args:
        features: of any size D.
        labels: 0 ... K - 1.
        weight: of the classifier, for those in `CLASSIFIER`.
        bias: of the classifier.
        n_classes: K; from the labels by default.
        weighting: as in `NeuralCollapse`.

    Returns:
        name -> value, as in the first lines of this file; all NaN for features that are not finite (a run that
        diverged).

    Raises:
        InputError: for what does not fit.
    """
    check_weighting(weighting)
    if features.dim() != 2 or labels.shape != features.shape[:1] or not len(labels):
        raise InputError(
            expected="features (samples, dim) and one label each",
            got=f"shapes {tuple(features.shape)} and {tuple(labels.shape)}",
            do="flatten images, or average them over positions: le.collapse.to_features",
        )
    k = n_classes or int(labels.max()) + 1
    if k < 2:
        raise InputError(expected="at least 2 classes", got=str(k), do="collapse is about several classes")
    labels = class_labels(labels, k).to(features.device)
    x = to_double(features)
    labels = labels.to(x.device)
    counts = torch.bincount(labels, minlength=k).double()
    check_counts(counts)
    if weight is not None:
        weight, bias = classifier(weight, bias, k, x.shape[1], x.device)
    if not bool(torch.isfinite(x).all()):
        return dict.fromkeys(GEOMETRY if weight is None else GEOMETRY + CLASSIFIER, math.nan)
    means = x.new_zeros(k, x.shape[1]).index_add_(0, labels, x) / counts[:, None]
    rest = x - means[labels]
    # The mean of many large numbers is off by some of their last digits; what is left over says by how much.
    correction = x.new_zeros(k, x.shape[1]).index_add_(0, labels, rest) / counts[:, None]
    means += correction
    rest -= correction[labels]
    variances = x.new_zeros(k).index_add_(0, labels, rest.square().sum(dim=1)) / counts
    centred, shares = centre(means, counts, variances, weighting)
    along = rest @ centred.T
    found = geometry(centred, shares, means, variances, counts / len(x), along.T @ along / len(x))
    if weight is not None and bias is not None:
        found |= alignment(weight, centred)
        found["nc4"] = float(disagreeing(x, means, weight, bias) / len(x))
    return found


def geometry(
    centred: Float64[Tensor, "k dim"],
    shares: Float64[Tensor, " k"],
    means: Float64[Tensor, "k dim"],
    variances: Float64[Tensor, " k"],
    frequencies: Float64[Tensor, " k"],
    projected: Tensor,
) -> dict[str, float]:
    """The metrics of `GEOMETRY` from K x K matrices; ``projected`` is M Sigma_W M^T.

    These matrices are small and many: NumPy spares the cost of a dozen tiny tensors.
    """
    k = len(centred)
    gram = (centred @ centred.T).cpu().numpy()
    a, p, v, f = (x.cpu().numpy() for x in (shares, projected, variances, frequencies))
    norms = np.sqrt(np.maximum(np.diagonal(gram), 0))
    # Differences of the means themselves: through the Gram matrix they would cancel.
    pairs = torch.pdist(means).square().cpu().numpy()
    i, j = np.triu_indices(k, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        cdnv = np.mean((v[i] + v[j]) / (2 * pairs))
        cosines = gram / norms / norms[:, None]
        off = np.abs(cosines[i, j] + 1 / (k - 1))
        simplex = np.linalg.norm(gram / np.linalg.norm(gram) - (np.eye(k) - 1 / k) / math.sqrt(k - 1))
        found = {
            "nc1": span_trace(gram, a, p, max(centred.shape)) / k,
            "nc1_quotient": (f * v).sum() / (a * norms**2).sum(),
            "nc1_cdnv": cdnv if gram.any() else math.nan,
            "nc2_equinorm": norms.std() / norms.mean(),
            "nc2_equiangle": off.mean(),
            "nc2_equiangle_max": off.max(),
            "nc2_simplex": simplex,
        }
    return {name: float(value) if math.isfinite(value) else math.nan for name, value in found.items()}


def span_trace(
    gram: Float64[np.ndarray, "k k"],
    shares: Float64[np.ndarray, " k"],
    projected: Float64[np.ndarray, "k k"],
    size: int,
) -> float:
    """tr(Sigma_W Sigma_B^+) from M M^T and M Sigma_W M^T; NaN where there is no spread.

    Sigma_B = B^T B with B = sqrt(shares) M; with B B^T = U diag(l) U^T its pseudo-inverse is B^T U diag(l^-2) U^T B.
    """
    root = np.sqrt(shares)
    values, vectors = np.linalg.eigh(root[:, None] * gram * root)
    kept = values > size * np.finfo(np.float64).eps * max(values[-1], 0)  # pinv's own cut
    kept[0] = False  # the centred means span K - 1 dimensions at most
    if not kept.any():
        return math.nan
    u = vectors[:, kept]
    inner = (u * ((root[:, None] * projected * root) @ u)).sum(axis=0)
    return float((inner / values[kept] ** 2).sum())


def svd_trace(
    within: Float64[Tensor, "dim dim"], centred: Float64[Tensor, "k dim"], shares: Float64[Tensor, " k"]
) -> float:
    """The same through the thin SVD of B = sqrt(shares) M (K x D): sum_r v_r^T Sigma_W v_r / s_r^2."""
    _, s, v = torch.linalg.svd(shares.sqrt()[:, None] * centred, full_matrices=False)
    kept = s > s[0] * math.sqrt(max(centred.shape) * torch.finfo(s.dtype).eps)
    kept[len(centred) - 1 :] = False
    if not bool(kept.any()):
        return math.nan
    v = v[kept]
    return float((((v @ within) * v).sum(dim=1) / s[kept] ** 2).sum())


def pinv_trace(
    within: Float64[Tensor, "dim dim"], centred: Float64[Tensor, "k dim"], shares: Float64[Tensor, " k"]
) -> float:
    """The same through the D x D pseudo-inverse of Sigma_B: the definition as it is written, slow."""
    between = centred.T @ (shares[:, None] * centred)
    if not bool(between.any()):
        return math.nan
    return float(torch.trace(within @ torch.linalg.pinv(between, hermitian=True)))


def centre(
    means: Float64[Tensor, "k dim"],
    counts: Float64[Tensor, " k"],
    variances: Float64[Tensor, " k"],
    weighting: Weighting,
) -> tuple[Float64[Tensor, "k dim"], Float64[Tensor, " k"]]:
    """Class means about their centre, and the classes' weights in Sigma_B."""
    shares = counts / counts.sum() if weighting == "samples" else torch.full_like(counts, 1 / len(counts))
    away = means - means[0]  # a large common offset goes first: it would take the digits of the differences
    centred = away - shares @ away
    # What is left of rounding alone is no spread.
    noise = 4 * torch.finfo(means.dtype).eps * (means.abs().amax() + variances.amax().sqrt())
    return (centred if bool(centred.abs().amax() > noise) else torch.zeros_like(centred)), shares


def alignment(weight: Float64[Tensor, "k dim"], centred: Float64[Tensor, "k dim"]) -> dict[str, float]:
    """What the classifier's weight is like by itself, and NC3: how far it is from the class means."""
    k = len(weight)
    norms = torch.linalg.norm(weight, dim=1)
    i, j = torch.triu_indices(k, k, 1, device=weight.device)
    cosines = ((weight @ weight.T) / norms / norms[:, None])[i, j]
    far = torch.linalg.norm(weight / torch.linalg.norm(weight) - centred / torch.linalg.norm(centred))
    return {
        "nc2_equinorm_weight": float(norms.std(correction=0) / norms.mean()),
        "nc2_equiangle_weight": float((cosines + 1 / (k - 1)).abs().mean()),
        "nc3": float(far),
    }


def disagreeing(
    x: Float64[Tensor, "samples dim"],
    means: Float64[Tensor, "k dim"],
    weight: Float64[Tensor, "k dim"],
    bias: Float64[Tensor, " k"],
) -> Float64[Tensor, ""]:
    """How many samples the classifier and the nearest class mean put into different classes."""
    # The nearest mean maximises <x, mu> - ||mu||^2 / 2; both about the same centre, lest they cancel.
    middle = means.mean(dim=0)
    away, moved = x - middle, means - middle
    nearest_mean = (away @ moved.T - moved.square().sum(dim=1) / 2).argmax(dim=1)
    return ((x @ weight.T + bias).argmax(dim=1) != nearest_mean).sum().double()


# --- checks --------------------------------------------------------------------------------------------------------


def classifier(
    weight: Tensor, bias: Tensor | None, k: int, dim: int, device: torch.device
) -> tuple[Float64[Tensor, "k dim"], Float64[Tensor, " k"]]:
    """The classifier in float64.

    Raises:
        InputError: when its shapes do not fit.
    """
    if weight.shape != (k, dim) or (bias is not None and bias.shape != (k,)):
        shapes = f"{tuple(weight.shape)}" + ("" if bias is None else f" and {tuple(bias.shape)}")
        raise InputError(
            expected=f"the classifier's weight ({k}, {dim}) and bias ({k},)",
            got=shapes,
            do="give the last layer's, with its inputs as features",
        )
    bias = torch.zeros(k) if bias is None else bias
    return to_double(weight).to(device), to_double(bias).to(device)


def class_labels(labels: Tensor, k: int) -> Int64[Tensor, " samples"]:
    """Labels as int64.

    Raises:
        InputError: when they are no classes 0 ... k - 1.
    """
    if labels.is_floating_point() or (len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < k):
        got = str(labels.dtype) if labels.is_floating_point() else f"{int(labels.min())} ... {int(labels.max())}"
        raise InputError(expected=f"whole labels in 0 ... {k - 1}", got=got, do="relabel, or raise n_classes")
    return labels.to(torch.int64)


def check_counts(counts: Tensor) -> None:
    """Refuse classes without samples."""
    empty = torch.nonzero(counts == 0).flatten().tolist()
    if empty:
        raise InputError(expected="samples of every class", got=f"none of {empty}", do="add some, or lower n_classes")


def check_weighting(weighting: str) -> None:
    """Refuse an unknown weighting."""
    check_word("weighting", weighting, ("classes", "samples"))


def check_word(what: str, word: str, known: tuple[str, ...]) -> None:
    """Refuse a word that is not one of those known."""
    if word not in known:
        words = " or ".join(map(repr, known))
        raise InputError(expected=f"{what} {words}", got=repr(word), do=nearest(str(word), known))


def to_double(x: Tensor) -> Tensor:
    """In float64, on the same device where that has float64 (Apple's has not)."""
    x = x.detach()
    return (x.cpu() if x.device.type == "mps" else x).to(torch.float64)
