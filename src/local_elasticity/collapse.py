"""Neural collapse: NC1 to NC4 (Papyan, Han, Donoho 2020, arXiv:2008.08186) and CDNV (Galanti et al. 2021), per layer.

With class means mu_k (float64), M the rows mu_k - mean_k mu_k, Sigma_W the pooled within-class covariance over all
samples and Sigma_B = M^T M / K (spec lesde 8):

- ``nc1`` = tr(Sigma_W Sigma_B^+) / K, through the K - 1 dimensional span of M: no D x D pseudo-inverse.
- ``nc1_quotient`` = tr Sigma_W / tr Sigma_B.
- ``nc1_cdnv``: mean over pairs of classes of (Var_i + Var_j) / (2 ||mu_i - mu_j||^2), Var_k the mean squared distance
  from mu_k.
- ``nc2_equinorm``: standard deviation over mean of ||M_k||.
- ``nc2_equiangle``, ``nc2_equiangle_max``: mean and largest |cos(M_k, M_l) + 1/(K - 1)|.
- ``nc2_simplex``: Frobenius distance of M M^T / ||M M^T|| from (I - J/K) / sqrt(K - 1), the simplex's.
- ``nc3`` = ||W/||W|| - M/||M||||, W the classifier's weight.
- ``nc4``: share of samples whose class by W h + b differs from the nearest class mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor, nn

from local_elasticity.errors import InputError, nearest

if TYPE_CHECKING:
    from collections.abc import Iterator

Weighting = Literal["classes", "samples"]
Positions = Literal["mean", "flatten"]
Form = Literal["span", "pinv"]
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


class NeuralCollapse:
    """Neural collapse in one pass over batches of features.

    Its state is sums over samples: shards that saw different samples ``merge`` by addition, and ``state`` can be
    reduced by a sum over processes (as torchmetrics' ``dist_reduce_fx="sum"``). NC4 alone needs the final class means:
    after the pass, show the features again to ``update_nc4``, or use `metrics` where all features are at hand.

    Args:
        n_classes: K.
        dim: D, numbers in a feature.
        weighting: how Sigma_B weighs classes: "classes" (all the same, about the mean of class means) or "samples" (by
            their counts, about the mean of all samples).
        device: of the state.

    Raises:
        InputError: for fewer than 2 classes, or no features.
    """

    geometry: ClassVar[tuple[str, ...]] = GEOMETRY

    def __init__(
        self, n_classes: int, dim: int, *, weighting: Weighting = "classes", device: str | torch.device | None = None
    ) -> None:
        if n_classes < 2 or dim < 1:
            raise InputError(
                expected="at least 2 classes and 1 feature", got=f"n_classes={n_classes}, dim={dim}", do="correct them"
            )
        _check_weighting(weighting)
        self.n_classes, self.dim, self.weighting, self.device = n_classes, dim, weighting, torch.device(device or "cpu")
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        options: dict[str, Any] = {"dtype": torch.float64, "device": self.device}
        self.counts = torch.zeros(self.n_classes, **options)
        self.sums = torch.zeros(self.n_classes, self.dim, **options)
        self.squares = torch.zeros(self.n_classes, **options)
        self.scatter = torch.zeros(self.dim, self.dim, **options)
        self.seen = torch.zeros(2, **options)  # samples of the second pass, and those that disagree

    @property
    def state(self) -> dict[str, Tensor]:
        """Everything that is kept; all of it sums over samples."""
        return {name: getattr(self, name) for name in ("counts", "sums", "squares", "scatter", "seen")}

    def update(self, features: Float[Tensor, "samples dim"], labels: Int[Tensor, " samples"]) -> None:
        """Take in a batch.

        Raises:
            InputError: for shapes, labels or numbers that do not fit.
        """
        features, labels = self._checked(features, labels)
        self.counts += torch.bincount(labels, minlength=self.n_classes)
        self.sums.index_add_(0, labels, features)
        self.squares.index_add_(0, labels, features.square().sum(dim=1))
        self.scatter.addmm_(features.T, features)

    def update_nc4(
        self,
        features: Float[Tensor, "samples dim"],
        weight: Float[Tensor, "classes dim"],
        bias: Float[Tensor, " classes"] | None = None,
    ) -> None:
        """Second pass: count the samples whose class by the classifier is not that of the nearest class mean."""
        features = features.detach().to(self.device, torch.float64)
        different = _disagree(features, self.means(), *_classifier(weight, bias, self.n_classes, self.dim, self.device))
        self.seen += torch.stack([different.new_tensor(float(len(features))), different])

    def merge(self, other: NeuralCollapse) -> Self:
        """Add what another shard saw.

        Raises:
            InputError: when it counts other classes or features.
        """
        if (other.n_classes, other.dim, other.weighting) != (self.n_classes, self.dim, self.weighting):
            raise InputError(
                expected=f"{self.n_classes} classes, {self.dim} features, weighting {self.weighting!r}",
                got=f"{other.n_classes}, {other.dim}, {other.weighting!r}",
                do="merge shards of the same layer",
            )
        for name, value in self.state.items():
            value += other.state[name].to(value)
        return self

    merge_state = merge  # what torchmetrics calls it

    def means(self) -> Float64[Tensor, "classes dim"]:
        """The class means.

        Raises:
            InputError: when a class has no samples.
        """
        _check_counts(self.counts)
        return self.sums / self.counts[:, None]

    def within(self) -> Float64[Tensor, "dim dim"]:
        """Sigma_W: the pooled within-class covariance over all samples."""
        means = self.means()
        return (self.scatter - (means * self.counts[:, None]).T @ means) / self.counts.sum()

    def compute(
        self,
        weight: Float[Tensor, "classes dim"] | None = None,
        bias: Float[Tensor, " classes"] | None = None,
        form: Form = "span",
    ) -> dict[str, float]:
        """The metrics of what was seen so far.

        Args:
            weight: of the classifier, for ``nc3``.
            bias: of the classifier; not used by any metric here, taken for symmetry with `metrics`.
            form: of ``nc1``: "span", or "pinv": the D x D pseudo-inverse, slow, the same number.

        Returns:
            name -> value; NaN where a metric is not defined (no spread between class means).

        Raises:
            InputError: when a class has no samples, or the weight does not fit.
        """
        means, n = self.means(), self.counts.sum()
        centred, shares = _centred(means, self.counts, self.weighting)
        within = self.within()
        # Rounding may take a variance of zero below it.
        variances = (self.squares / self.counts - means.square().sum(dim=1)).clamp_min(0)
        found = _geometry(centred, shares, means, variances, self.counts / n, centred @ within @ centred.T)
        if form == "pinv":
            between = centred.T @ (shares[:, None] * centred)
            found["nc1"] = float(torch.trace(within @ torch.linalg.pinv(between, hermitian=True)) / self.n_classes)
        if weight is not None:
            weight, _ = _classifier(weight, bias, self.n_classes, self.dim, self.device)
            found["nc3"] = _duality(weight, centred)
        if float(self.seen[0]):
            found["nc4"] = float(self.seen[1] / self.seen[0])
        return found

    def _checked(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if features.dim() != 2 or features.shape[1] != self.dim or labels.shape != features.shape[:1]:
            raise InputError(
                expected=f"features (samples, {self.dim}) and one label each",
                got=f"shapes {tuple(features.shape)} and {tuple(labels.shape)}",
                do="flatten images, or average them over positions: le.collapse.to_features",
            )
        labels = _class_labels(labels, self.n_classes).to(self.device)
        return features.detach().to(self.device, torch.float64), labels


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
        weight: of the classifier, for ``nc3`` and ``nc4``.
        bias: of the classifier.
        n_classes: K; from the labels by default.
        weighting: as in `NeuralCollapse`.

    Raises:
        InputError: for what does not fit.
    """
    _check_weighting(weighting)
    if features.dim() != 2 or labels.shape != features.shape[:1] or not len(labels):
        raise InputError(
            expected="features (samples, dim) and one label each",
            got=f"shapes {tuple(features.shape)} and {tuple(labels.shape)}",
            do="flatten images, or average them over positions",
        )
    k = n_classes or int(labels.max()) + 1
    if k < 2:
        raise InputError(expected="at least 2 classes", got=str(k), do="collapse is about several classes")
    labels = _class_labels(labels, k).to(features.device)
    x = features.detach().double()
    counts = torch.bincount(labels, minlength=k).double()
    _check_counts(counts)
    means = x.new_zeros(k, x.shape[1]).index_add_(0, labels, x) / counts[:, None]
    rest = x - means[labels]
    centred, shares = _centred(means, counts, weighting)
    variances = x.new_zeros(k).index_add_(0, labels, rest.square().sum(dim=1)) / counts
    along = rest @ centred.T
    found = _geometry(centred, shares, means, variances, counts / len(x), along.T @ along / len(x))
    if weight is not None:
        weight, bias = _classifier(weight, bias, k, x.shape[1], x.device)
        found["nc3"] = _duality(weight, centred)
        found["nc4"] = float(_disagree(x, means, weight, bias) / len(x))
    return found


def _geometry(
    centred: Float64[Tensor, "k dim"],
    shares: Float64[Tensor, " k"],
    means: Float64[Tensor, "k dim"],
    variances: Float64[Tensor, " k"],
    frequencies: Float64[Tensor, " k"],
    projected: Float64[Tensor, "k k"],
) -> dict[str, float]:
    """The metrics from K x K matrices; ``projected`` is M Sigma_W M^T.

    These matrices are small and many: NumPy spares the cost of a dozen tiny tensors.
    """
    import numpy as np

    k = len(centred)
    gram = (centred @ centred.T).cpu().numpy()
    a, p, v, f = (x.cpu().numpy() for x in (shares, projected, variances, frequencies))
    root = np.sqrt(a)
    # Sigma_B = B^T B with B = sqrt(shares) M; with B B^T = U diag(l) U^T its pseudo-inverse is B^T U diag(l^-2) U^T B.
    values, vectors = np.linalg.eigh(root[:, None] * gram * root)
    kept = values > max(centred.shape) * np.finfo(np.float64).eps * max(values[-1], 0)
    kept[0] = False  # the centred means span K - 1 dimensions at most
    scale = np.where(kept, values, np.inf)
    inner = vectors.T @ (root[:, None] * p * root) @ vectors
    norms = np.sqrt(np.maximum(np.diagonal(gram), 0))
    nan = math.nan
    spread = bool(kept.any()) and bool((norms > 0).all())
    off = ~np.eye(k, dtype=bool)
    # Differences of the means themselves: through the Gram matrix they would cancel.
    pairs = torch.pdist(means).square().cpu().numpy()
    i, j = np.triu_indices(k, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        angles = np.abs((gram / norms / norms[:, None])[off] + 1 / (k - 1))
        cdnv = float(np.mean((v[i] + v[j]) / (2 * pairs)))
    simplex = (np.eye(k) - 1 / k) / math.sqrt(k - 1)
    return {
        "nc1": float((np.diagonal(inner) / scale**2).sum() / k) if spread else nan,
        "nc1_quotient": float((f * v).sum() / (a * norms**2).sum()) if spread else nan,
        "nc1_cdnv": cdnv if math.isfinite(cdnv) else nan,
        "nc2_equinorm": float(norms.std() / norms.mean()) if spread else nan,
        "nc2_equiangle": float(angles.mean()) if spread else nan,
        "nc2_equiangle_max": float(angles.max()) if spread else nan,
        "nc2_simplex": float(np.linalg.norm(gram / np.linalg.norm(gram) - simplex)) if spread else nan,
    }


def _centred(means: Tensor, counts: Tensor, weighting: Weighting) -> tuple[Tensor, Tensor]:
    """Class means about their centre, and the classes' weights in Sigma_B."""
    shares = counts / counts.sum() if weighting == "samples" else torch.full_like(counts, 1 / len(counts))
    return means - shares @ means, shares


def _duality(weight: Float64[Tensor, "k dim"], centred: Float64[Tensor, "k dim"]) -> float:
    norms = torch.linalg.norm(weight), torch.linalg.norm(centred)
    if not float(norms[0]) or not float(norms[1]):
        return math.nan
    return float(torch.linalg.norm(weight / norms[0] - centred / norms[1]))


def _disagree(x: Tensor, means: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """How many samples the classifier and the nearest class mean put into different classes."""
    # The nearest mean maximises <x, mu> - ||mu||^2 / 2; both about the same centre, lest they cancel.
    centre = means.mean(dim=0)
    away, moved = x - centre, means - centre
    nearest_mean = (away @ moved.T - moved.square().sum(dim=1) / 2).argmax(dim=1)
    return ((x @ weight.T + bias).argmax(dim=1) != nearest_mean).sum().double()


def _classifier(
    weight: Tensor, bias: Tensor | None, k: int, dim: int, device: torch.device
) -> tuple[Float64[Tensor, "k dim"], Float64[Tensor, " k"]]:
    if weight.shape != (k, dim) or (bias is not None and bias.shape != (k,)):
        shapes = f"{tuple(weight.shape)}" + ("" if bias is None else f" and {tuple(bias.shape)}")
        raise InputError(
            expected=f"the classifier's weight ({k}, {dim}) and bias ({k},)",
            got=shapes,
            do="give the last layer's, with its inputs as features",
        )
    bias = torch.zeros(k) if bias is None else bias
    return weight.detach().to(device, torch.float64), bias.detach().to(device, torch.float64)


def _class_labels(labels: Tensor, k: int) -> Int64[Tensor, " samples"]:
    if labels.is_floating_point() or (len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < k):
        got = str(labels.dtype) if labels.is_floating_point() else f"{int(labels.min())} ... {int(labels.max())}"
        raise InputError(expected=f"whole labels in 0 ... {k - 1}", got=got, do="relabel, or raise n_classes")
    return labels.to(torch.int64)


def _check_counts(counts: Tensor) -> None:
    empty = torch.nonzero(counts == 0).flatten().tolist()
    if empty:
        raise InputError(expected="samples of every class", got=f"none of {empty}", do="add some, or lower n_classes")


def _check_weighting(weighting: str) -> None:
    if weighting not in ("classes", "samples"):
        raise InputError(
            expected="weighting 'classes' or 'samples'",
            got=repr(weighting),
            do=nearest(str(weighting), ("classes", "samples")),
        )


# --- per layer -----------------------------------------------------------------------------------------------------


class LayerCollapse:
    """`NeuralCollapse` of several layers, by name, in one pass of a network over batches.

    Args:
        model: the network; called as it is (put it into eval mode yourself).
        n_classes: K.
        layers: names of modules; every layer with weights by default.
        positions: convolution outputs are averaged over positions ("mean") or flattened.
        weighting: as in `NeuralCollapse`.
    """

    def __init__(
        self,
        model: nn.Module,
        n_classes: int,
        layers: Sequence[str] | None = None,
        *,
        positions: Positions = "mean",
        weighting: Weighting = "classes",
    ) -> None:
        self.model, self.n_classes, self.positions, self.weighting = model, n_classes, positions, weighting
        self.layers = check_layers(model, layers)
        self.states: dict[str, NeuralCollapse] = {}

    def update(self, x: Float[Tensor, "samples ..."], labels: Int[Tensor, " samples"]) -> None:
        """Show the network a batch."""
        for name, features in layer_outputs(self.model, x, self.layers, self.positions).items():
            if name not in self.states:
                self.states[name] = NeuralCollapse(
                    self.n_classes, features.shape[1], weighting=self.weighting, device=features.device
                )
            self.states[name].update(features, labels)

    def merge(self, other: LayerCollapse) -> Self:
        """Add what another shard saw of the same layers."""
        for name, state in other.states.items():
            if name in self.states:
                self.states[name].merge(state)
            else:
                self.states[name] = NeuralCollapse(
                    state.n_classes, state.dim, weighting=state.weighting, device=state.device
                ).merge(state)
        return self

    def reset(self) -> None:
        """Forget everything."""
        self.states.clear()

    def compute(self) -> dict[str, dict[str, float]]:
        """Layer -> metrics."""
        return {name: state.compute() for name, state in self.states.items()}


def layer_metrics(
    model: nn.Module,
    x: Float[Tensor, "samples ..."],
    labels: Int[Tensor, " samples"],
    layers: Sequence[str] | None = None,
    *,
    positions: Positions = "mean",
    weighting: Weighting = "classes",
    batch_size: int = 256,
) -> dict[str, dict[str, float]]:
    """Layer -> `metrics` of its outputs on these samples, after one forward pass over them.

    Args:
        model: the network; called as it is.
        x: samples.
        labels: their classes.
        layers: names of modules; every layer with weights by default.
        positions: convolution outputs are averaged over positions ("mean") or flattened.
        weighting: as in `NeuralCollapse`.
        batch_size: samples in one forward pass.
    """
    names = check_layers(model, layers)
    parts = [layer_outputs(model, part, names, positions) for part in x.split(batch_size)]
    return {name: metrics(torch.cat([part[name] for part in parts]), labels, weighting=weighting) for name in names}


def check_layers(model: nn.Module, layers: Sequence[str] | None) -> tuple[str, ...]:
    """The layers asked for; those with weights by default.

    Raises:
        InputError: for a name that the network does not have.
    """
    if layers is None:
        return tuple(
            n for n, module in model.named_modules() if n and next(module.parameters(recurse=False), None) is not None
        )
    known = {name for name, _ in model.named_modules() if name}
    for layer in layers:
        if layer not in known:
            raise InputError(expected="a layer of the network", got=repr(layer), do=nearest(str(layer), known))
    return tuple(layers)


def layer_outputs(
    model: nn.Module, x: Float[Tensor, "samples ..."], layers: Iterable[str], positions: Positions = "mean"
) -> dict[str, Float[Tensor, "samples dim"]]:
    """Outputs of the named layers for a batch, as features; no gradients, no change of the network.

    Raises:
        InputError: when a layer is not reached, or is reached more than once.
    """
    found: dict[str, Tensor] = {}
    with _listening(model, layers, found, positions), torch.no_grad():
        model(x)
    missing = [name for name in layers if name not in found]
    if missing:
        raise InputError(
            expected="layers that the forward pass goes through", got=f"{missing} not reached", do="leave them out"
        )
    return found


@contextmanager
def _listening(
    model: nn.Module, layers: Iterable[str], found: dict[str, Tensor], positions: Positions
) -> Iterator[Mapping[str, Tensor]]:
    modules = dict(model.named_modules())

    def hear(name: str) -> Any:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            if name in found:
                raise InputError(expected="layers that are used once", got=f"{name!r} used again", do="leave it out")
            found[name] = to_features(output, positions)

        return hook

    handles = [modules[name].register_forward_hook(hear(name)) for name in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def to_features(x: Float[Tensor, "samples ..."], positions: Positions = "mean") -> Float[Tensor, "samples dim"]:
    """(samples, channels, ...) averaged over positions, or flattened; copied, since later layers may write in place."""
    if positions not in ("mean", "flatten"):
        raise InputError(
            expected="positions 'mean' or 'flatten'",
            got=repr(positions),
            do=nearest(str(positions), ("mean", "flatten")),
        )
    x = x.detach()
    if x.dim() <= 2:
        return x.reshape(len(x), -1).clone()
    return x.flatten(2).mean(dim=2) if positions == "mean" else x.flatten(1).clone()
