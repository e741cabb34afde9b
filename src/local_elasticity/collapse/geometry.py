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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor

from local_elasticity.base.checks import check_choice, check_whole, in_words
from local_elasticity.base.errors import InputError
from local_elasticity.base.tensors import advice_for_tensor, check_class_labels

Weighting = Literal["classes", "samples"]
Form = Literal["span", "svd", "pinv"]
FORMS = ("span", "svd", "pinv")
TOGETHER = 2**18  # numbers of the features that are worked on at once: two megabytes in float64
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
    check_whole("n_classes", n_classes, 2, or_none=True)
    check_features(features, labels)
    if weight is None:
        return metrics_of_many([features], labels, n_classes=n_classes, weighting=weighting)[0]
    k = n_classes or int(labels.max()) + 1
    parts = _Parts.of([features], labels, k, weighting)
    weight, bias = classifier(weight, bias, k, features.shape[1], parts.x.device)
    if not parts.finite[0]:
        return dict.fromkeys(GEOMETRY + CLASSIFIER, math.nan)
    found = _geometry([parts])[0] | alignment(weight, parts.centred[0])
    return found | {"nc4": float(disagreeing(parts.x, parts.means, weight, bias) / len(parts.x))}


def metrics_of_many(
    features: Sequence[Float[Tensor, "samples _"]],
    labels: Int[Tensor, " samples"],
    *,
    n_classes: int | None = None,
    weighting: Weighting = "classes",
) -> list[dict[str, float]]:
    """`metrics` of several features of the same samples, as of the layers of a network or of many networks.

    What they share is done once for all: for small features that is most of it.

    Args:
        features: one after the other, each of any size.
        labels: 0 ... K - 1.
        n_classes: K; from the labels by default.
        weighting: as in `NeuralCollapse`.

    Raises:
        InputError: for what does not fit.
    """
    check_weighting(weighting)
    check_whole("n_classes", n_classes, 2, or_none=True)
    if isinstance(features, Tensor) or not isinstance(features, Sequence):
        raise InputError(
            expected="features: a list of tensors",
            got=in_words(features),
            do="of one, write [features], or use metrics",
        )
    for one in features:
        check_features(one, labels)
    if not features:
        return []
    k = n_classes or int(labels.max()) + 1
    parts = [_Parts.of(some, labels, k, weighting) for some in _groups(features)]
    finite = [one for part in parts for one in part.finite]
    nothing: dict[str, float] = dict.fromkeys(GEOMETRY, math.nan)
    return [found if fine else dict(nothing) for found, fine in zip(_geometry(parts), finite, strict=True)]


def _groups(features: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Small features together, as many as stay in the cache: together they cost fewer calls, and no more memory."""
    group: list[Tensor] = []
    for one in features:
        if group and sum(map(Tensor.numel, group)) + one.numel() > TOGETHER:
            yield group
            group = []
        group.append(one)
    yield group


@dataclass(eq=False)
class _Parts:
    """Class means and what is left of the samples, of several features side by side in the columns."""

    x: Float64[Tensor, "samples columns"]
    means: Float64[Tensor, "k columns"]
    counts: Float64[Tensor, " k"]
    variances: Float64[Tensor, "k features"]
    centred: Sequence[Float64[Tensor, "k dim"]]
    rest: Sequence[Float64[Tensor, "samples dim"]]
    shares: Float64[Tensor, " k"]
    finite: list[bool]

    @classmethod
    def of(cls, features: Sequence[Tensor], labels: Tensor, k: int, weighting: Weighting) -> _Parts:
        if k < 2:
            raise InputError(expected="at least 2 classes", got=str(k), do="collapse is about several classes")
        x = to_double(features[0] if len(features) == 1 else torch.cat(tuple(features), dim=1))
        sizes = [one.shape[1] for one in features]
        labels = class_labels(labels, k).to(x.device)
        counts = torch.bincount(labels, minlength=k).double()
        check_counts(counts)
        finite = [True] * len(sizes)
        means = x.new_zeros(k, x.shape[1]).index_add_(0, labels, x) / counts[:, None]
        if not bool(torch.isfinite(means).all()):  # what is not finite stays so in a sum
            finite = [bool(torch.isfinite(one).all()) for one in x.split(sizes, 1)]
            x = torch.where(torch.isfinite(x), x, 0.0)
            means = x.new_zeros(k, x.shape[1]).index_add_(0, labels, x) / counts[:, None]
        rest = x - means[labels]
        # The mean of many large numbers is off by some of their last digits; what is left over says by how much.
        correction = x.new_zeros(k, x.shape[1]).index_add_(0, labels, rest) / counts[:, None]
        means += correction
        rest -= correction[labels]
        squares = torch.stack([one.sum(dim=1) for one in rest.square().split(sizes, 1)], dim=1)
        variances = x.new_zeros(k, len(sizes)).index_add_(0, labels, squares) / counts[:, None]
        centred, shares = centre(means, counts, variances, weighting, sizes)
        return cls(x, means, counts, variances, centred, rest.split(sizes, 1), shares, finite)

    def projected(self) -> Float64[Tensor, "features k k"]:
        """M Sigma_W M^T of each."""
        along = torch.stack([rest @ centred.T for rest, centred in zip(self.rest, self.centred, strict=True)])
        return along.mT @ along / len(self.x)


def _geometry(parts: Sequence[_Parts]) -> list[dict[str, float]]:
    """The metrics of all features of several parts about the same samples."""
    first = parts[0]
    centred = [one for part in parts for one in part.centred]
    variances = torch.cat([part.variances for part in parts], dim=1)
    projected = torch.cat([part.projected() for part in parts])
    return geometry(centred, first.shares, variances, first.counts / len(first.x), projected)


def geometry(
    centred: Sequence[Float64[Tensor, "k dim"]],
    shares: Float64[Tensor, " k"],
    variances: Float64[Tensor, "k features"],
    frequencies: Float64[Tensor, " k"],
    projected: Float64[Tensor, "features k k"],
) -> list[dict[str, float]]:
    """The metrics of `GEOMETRY`, for each of several features; ``projected`` is M Sigma_W M^T.

    These K x K matrices are small and many: NumPy does them for all features at once.
    """
    k = len(shares)
    gram = torch.stack([one @ one.T for one in centred]).cpu().numpy()
    # Differences of the means themselves: through the Gram matrix they would cancel.
    pairs = torch.stack([torch.pdist(one) for one in centred]).square().cpu().numpy()
    a, p, v, f = (x.cpu().numpy() for x in (shares, projected, variances.T, frequencies))
    overflown = ~np.isfinite(gram).all(axis=(1, 2))  # finite numbers whose squares are not
    gram[overflown] = 0
    norms = np.sqrt(np.maximum(np.diagonal(gram, axis1=1, axis2=2), 0))
    i, j = np.triu_indices(k, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        cdnv = np.mean((v[:, i] + v[:, j]) / (2 * pairs), axis=1)
        cosines = gram / norms[:, None, :] / norms[:, :, None]
        off = np.abs(cosines[:, i, j] + 1 / (k - 1))
        lengths = np.linalg.norm(gram, axis=(1, 2))
        found = {
            "nc1": span_trace(gram, a, p, np.array([max(one.shape) for one in centred])) / k,
            "nc1_quotient": (f * v).sum(axis=1) / (a * norms**2).sum(axis=1),
            "nc1_cdnv": np.where(lengths > 0, cdnv, np.nan),
            "nc2_equinorm": norms.std(axis=1) / norms.mean(axis=1),
            "nc2_equiangle": off.mean(axis=1),
            "nc2_equiangle_max": off.max(axis=1),
            "nc2_simplex": np.linalg.norm(
                gram / lengths[:, None, None] - (np.eye(k) - 1 / k) / math.sqrt(k - 1), axis=(1, 2)
            ),
        }
    table = {
        name: np.where(np.isfinite(values) & ~overflown, values, np.nan).tolist() for name, values in found.items()
    }
    return [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]


def span_trace(
    gram: Float64[np.ndarray, "features k k"],
    shares: Float64[np.ndarray, " k"],
    projected: Float64[np.ndarray, "features k k"],
    sizes: Int[np.ndarray, " features"],
) -> Float64[np.ndarray, " features"]:
    """tr(Sigma_W Sigma_B^+) from M M^T and M Sigma_W M^T; NaN where there is no spread.

    Sigma_B = B^T B with B = sqrt(shares) M; with B B^T = U diag(l) U^T its pseudo-inverse is B^T U diag(l^-2) U^T B.
    """
    root = np.sqrt(shares)
    scale = np.outer(root, root)
    values, vectors = np.linalg.eigh(scale * gram)
    # pinv's own cut
    kept = values > (sizes * np.finfo(np.float64).eps * np.maximum(values[:, -1], 0))[:, None]
    kept[:, 0] = False  # the centred means span K - 1 dimensions at most
    inner = (vectors * ((scale * projected) @ vectors)).sum(axis=1)
    parts = np.divide(inner, values**2, out=np.zeros_like(inner), where=kept)
    return np.where(kept.any(axis=1), parts.sum(axis=1), np.nan)


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
    means: Float64[Tensor, "k columns"],
    counts: Float64[Tensor, " k"],
    variances: Float64[Tensor, "k features"],
    weighting: Weighting,
    sizes: Sequence[int],
) -> tuple[list[Float64[Tensor, "k dim"]], Float64[Tensor, " k"]]:
    """Class means about their centre, for features of these sizes, and the classes' weights in Sigma_B."""
    shares = counts / counts.sum() if weighting == "samples" else torch.full_like(counts, 1 / len(counts))
    away = means - means[0]  # a large common offset goes first: it would take the digits of the differences
    away -= shares @ away
    # What is left of rounding alone is no spread.
    owner = torch.repeat_interleave(torch.tensor(sizes)).to(means.device)  # of each column

    def largest(x: Tensor) -> Float64[Tensor, " features"]:
        return x.new_zeros(len(sizes)).scatter_reduce_(0, owner, x.abs().amax(dim=0), "amax")

    noise = 4 * torch.finfo(means.dtype).eps * (largest(means) + variances.amax(dim=0).sqrt())
    spread = (largest(away) > noise).tolist()
    centred = away.split(list(sizes), 1)
    return [one if kept else torch.zeros_like(one) for one, kept in zip(centred, spread, strict=True)], shares


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
    for name, value in (("weight", weight), ("bias", bias)):
        if not isinstance(value, Tensor) and (name == "weight" or value is not None):
            raise InputError(expected=f"{name}: a torch tensor", got=in_words(value), do=advice_for_tensor(name, value))
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
    return check_class_labels("labels", labels, k)


def check_features(features: Tensor, labels: Tensor) -> None:
    """Refuse features that are no rows, or have no label each."""
    if not isinstance(features, Tensor):
        raise InputError(
            expected="features: a torch tensor", got=in_words(features), do=advice_for_tensor("features", features)
        )
    check_class_labels("labels", labels)
    if features.dim() != 2 or labels.shape != features.shape[:1] or not len(labels):
        raise InputError(
            expected="features (samples, dim) and one label each",
            got=f"shapes {tuple(features.shape)} and {tuple(labels.shape)}",
            do="flatten images, or average them over positions: le.collapse.to_features",
        )


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
    check_choice(what, word, known)


def to_double(x: Tensor) -> Tensor:
    """In float64, on the same device where that has float64 (Apple's has not)."""
    x = x.detach()
    return (x.cpu() if x.device.type == "mps" else x).to(torch.float64)
