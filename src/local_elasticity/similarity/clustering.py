"""Clustering by local elasticity: samples that a step on one moves alike belong together (arXiv:1910.06943, section 4).

A network is trained to tell some samples from others; within the samples the trained network moves each like its own
kind, although it was never told the kinds. Needs scikit-learn, the extra "cluster".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor, nn

from local_elasticity.base.checks import (
    check_array,
    check_bytes,
    check_choice,
    check_flag,
    check_real,
    check_whole,
    in_words,
    plain_array,
)
from local_elasticity.base.errors import InputError, missing_extra
from local_elasticity.base.tensors import check_module
from local_elasticity.networks import MLP
from local_elasticity.similarity.kernels import Output, Outputs, check_output_choice, s_ker, s_rel_limit, symmetrised

try:
    from sklearn.base import BaseEstimator, ClusterMixin
    from sklearn.utils import check_random_state
    from sklearn.utils.validation import validate_data
except ImportError as error:
    raise missing_extra("scikit-learn", "cluster", "clustering") from error

Similarity = Literal["relative", "kernelised"]
Clusterer = Literal["auto", "kmeans", "kernel_kmeans", "spectral"]


class LocalElasticityClustering(ClusterMixin, BaseEstimator):
    """Cluster samples by how a training step on each would move the prediction at every other.

    The similarity of all pairs is computed from the network as it stands, made symmetric, and clustered. Where the
    network has several outputs, the trace of the tangent kernel takes the place of the scalar kernel.

    Without a network, a small one is trained on the way: to tell the samples (label 1) from ``auxiliary`` ones
    (label 0), as in the paper. Without those either, from the samples with every column shuffled on its own, which
    have the same marginals and no structure (Hastie, Tibshirani, Friedman, "The Elements of Statistical Learning",
    14.2.4). That is a default to begin with, not the paper's method: give a network trained on a task that is near.

    Args:
        network: a trained ``torch.nn.Module`` whose output is (batch, K) or (batch,); left as it is.
        n_clusters: how many clusters.
        similarity: "relative" for |K(x, x')| / K(x, x), "kernelised" for K(x, x'), K the tangent kernel.
        clusterer: "kmeans" on the rows of the similarity, "kernel_kmeans", "spectral"; "auto" is the paper's choice:
            rows for the relative similarity, the kernel for the kernelised one. "spectral" takes the similarity as
            weights, negative ones as 0; "kernel_kmeans" needs a similarity that is close to a kernel.
        outputs: "values" or "probabilities" for the outputs as they are; "logits" for the sigmoid of one logit.
        output: "trace", or the number of one of several outputs.
        normalise: divide by the square root of both self similarities ("kernelised" only).
        auxiliary: samples of other kinds, for the network that is trained when none is given.
        n_init: starts of the clusterer; the best is kept.
        max_memory: bytes that the kernel may take, as in ``kernel``.
        random_state: of the clusterer's starts, and of the network that is trained when none is given.

    Attributes:
        labels_: cluster of each sample, (n,).
        affinity_: the similarity that was clustered, symmetric, (n, n), float64.
        network_: the network that was used.
        n_features_in_: columns of the samples.

    Example:
        >>> import local_elasticity as le
        >>> clustering = le.LocalElasticityClustering(network, n_clusters=2)     # doctest: +SKIP
        >>> labels = clustering.fit_predict(samples)                             # doctest: +SKIP
    """

    labels_: Int[ndarray, " n"]
    affinity_: Float[ndarray, "n n"]
    network_: nn.Module
    n_features_in_: int

    def __init__(
        self,
        network: nn.Module | None = None,
        n_clusters: int = 2,
        *,
        similarity: Similarity = "relative",
        clusterer: Clusterer = "auto",
        outputs: Outputs = "values",
        output: Output = "trace",
        normalise: bool = False,
        auxiliary: Any = None,
        n_init: int = 10,
        max_memory: int | None = None,
        random_state: Any = None,
    ) -> None:
        self.network = network
        self.n_clusters = n_clusters
        self.similarity = similarity
        self.clusterer = clusterer
        self.outputs = outputs
        self.output = output
        self.normalise = normalise
        self.auxiliary = auxiliary
        self.n_init = n_init
        self.max_memory = max_memory
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> LocalElasticityClustering:
        """Compute the similarity of all pairs and cluster it.

        Args:
            X: samples (n, ...), an array or a tensor, as the network takes them.
            y: not used; present for scikit-learn's conventions.

        Returns:
            The estimator itself.

        Raises:
            InputError: for a setting that is none, fewer samples than clusters, or a sample that no step can move.
        """
        array: Any = X.detach().cpu().numpy() if isinstance(X, Tensor) else X
        self._check()
        array = self._validated(array)
        self._check_counts(len(array))
        random = as_random_state(self.random_state)
        self.network_ = self._network(array, random)
        first = next(self.network_.parameters())
        samples = torch.tensor(array).to(first.device, first.dtype)
        self.affinity_ = self._affinity(samples)
        _check_affinity(self.affinity_)
        method: Any = self.clusterer
        if method == "auto":
            method = "kmeans" if self.similarity == "relative" else "kernel_kmeans"
        self.labels_ = cluster(self.affinity_, self.n_clusters, method, n_init=self.n_init, random_state=random)
        return self

    def _validated(self, array: Any) -> Any:
        """The samples as scikit-learn takes them; what it raises is its estimators' convention and goes on."""
        if plain_array(array) is None and not hasattr(array, "shape"):
            raise InputError(
                expected="X: samples (n, ...)", got=in_words(array), do="pass an array, a tensor or a data frame"
            )
        check: Any = validate_data
        return check(self, array, dtype=(np.float64, np.float32), allow_nd=True)

    def _check(self) -> None:
        for name, kind in (("similarity", Similarity), ("clusterer", Clusterer), ("outputs", Outputs)):
            check_choice(name, getattr(self, name), kind)
        if self.network is not None:
            check_module("network", self.network)
        check_output_choice(self.output)
        check_flag("normalise", self.normalise)
        check_whole("n_clusters", self.n_clusters)
        check_whole("n_init", self.n_init)
        check_bytes("max_memory", self.max_memory)
        if self.normalise and self.similarity != "kernelised":
            raise InputError(
                expected="similarity='kernelised' with normalise=True",
                got=f"similarity={self.similarity!r}",
                do="leave normalise out: the relative similarity is a ratio already",
            )

    def _check_counts(self, n_samples: int) -> None:
        if self.n_clusters > n_samples:
            raise InputError(
                expected=f"n_clusters in 1..n_samples, n_clusters={self.n_clusters}",
                got=f"n_samples={n_samples}",
                do="pass more samples or ask for fewer clusters",
            )

    def _network(self, array: ndarray, random: np.random.RandomState) -> nn.Module:
        if self.network is not None:
            return self.network
        others = self.auxiliary
        if others is None:
            flat = array.reshape(len(array), -1)
            others = np.stack([random.permutation(column) for column in flat.T], axis=1).reshape(array.shape)
        others = check_array("auxiliary", others).astype(array.dtype)
        if others.shape[1:] != array.shape[1:]:
            raise InputError(
                expected=f"auxiliary samples of shape {array.shape[1:]}",
                got=f"shape {others.shape[1:]}",
                do="pass samples of the same kind of input",
            )
        return train_discriminator(array, others, int(random.randint(2**31 - 1)))

    def _affinity(self, samples: Tensor) -> Float[ndarray, "n n"]:
        settings: dict[str, Any] = {"outputs": self.outputs, "output": self.output, "max_memory": self.max_memory}
        if self.similarity == "relative":
            found = s_rel_limit(self.network_, samples, **settings)
        else:
            found = s_ker(self.network_, samples, normalise=self.normalise, **settings)
        return symmetrised(found.double()).cpu().numpy()


def cluster(
    affinity: Float[ndarray, "n n"],
    n_clusters: int,
    method: Literal["kmeans", "kernel_kmeans", "spectral"],
    *,
    n_init: int = 10,
    random_state: Any = None,
) -> Int[ndarray, " n"]:
    """Cluster a symmetric similarity of all pairs.

    Args:
        affinity: the similarity.
        n_clusters: how many clusters.
        method: K-means on its rows, kernel K-means, or spectral clustering (negative similarities count as 0).
        n_init: starts; the best is kept.
        random_state: of the starts.

    Returns:
        The cluster of each sample, 0 ... n_clusters - 1.

    Raises:
        InputError: for what is no square similarity, or a setting that is none.
    """
    import sklearn.cluster

    check_choice("method", method, ("kmeans", "kernel_kmeans", "spectral"))
    affinity = _square("affinity", affinity)
    n_clusters, n_init = check_whole("n_clusters", n_clusters, most=len(affinity)), check_whole("n_init", n_init)
    random_state = as_random_state(random_state)
    makers: Any = sklearn.cluster  # its stubs know "auto" alone for n_init
    if method == "kmeans":
        return makers.KMeans(n_clusters, n_init=n_init, random_state=random_state).fit(affinity).labels_
    if method == "spectral":
        weights = np.maximum(affinity, 0.0)
        spectral = makers.SpectralClustering(
            n_clusters, affinity="precomputed", n_init=n_init, random_state=random_state, assign_labels="kmeans"
        )
        return spectral.fit(weights).labels_
    return kernel_kmeans(affinity, n_clusters, n_init=n_init, random_state=random_state).labels


@dataclass(frozen=True)
class KernelKMeans:
    """What ``kernel_kmeans`` found.

    Attributes:
        labels: the cluster of each sample.
        inertia: sum of squared distances to the centres, in the kernel's space.
        n_iter: rounds of the best start.
    """

    labels: Int[ndarray, " n"]
    inertia: float
    n_iter: int


def kernel_kmeans(
    kernel_values: Float[ndarray, "n n"],
    n_clusters: int,
    *,
    n_init: int = 10,
    max_iter: int = 100,
    tol: float = 1e-3,
    random_state: Any = None,
) -> KernelKMeans:
    """Lloyd's K-means in the space of a kernel, from random labels.

    The squared distance of x to the centre of a cluster C is K(x, x) - 2 mean_C K(x, .) + mean_CxC K.

    Args:
        kernel_values: a symmetric kernel.
        n_clusters: how many clusters.
        n_init: starts; the one of least inertia is kept.
        max_iter: rounds at most.
        tol: stop when a smaller fraction of the samples changes its cluster.
        random_state: of the first labels.

    Returns:
        Labels, inertia and rounds of the best start.

    Raises:
        InputError: for what is no square kernel, or a setting that is none.
    """
    kernel_values = _square("kernel_values", kernel_values)
    n_clusters, n_init = check_whole("n_clusters", n_clusters, most=len(kernel_values)), check_whole("n_init", n_init)
    max_iter, tol = check_whole("max_iter", max_iter), check_real("tol", tol, 0.0)
    random = as_random_state(random_state)
    runs = [_one_start(kernel_values, n_clusters, max_iter, tol, random) for _ in range(n_init)]
    return min(runs, key=lambda run: run.inertia)


def _one_start(
    k: Float[ndarray, "n n"], n_clusters: int, max_iter: int, tol: float, random: np.random.RandomState
) -> KernelKMeans:
    n = len(k)
    labels = random.randint(n_clusters, size=n)
    own = np.diagonal(k)
    distances = np.zeros((n, n_clusters))
    round_ = 0
    for round_ in range(1, max_iter + 1):
        _fill_empty(labels, distances[np.arange(n), labels] if round_ > 1 else random.random_sample(n), n_clusters)
        members = np.eye(n_clusters)[labels]
        towards = k @ members / members.sum(0)
        centres = (members * towards).sum(0) / members.sum(0)
        distances = own[:, None] - 2 * towards + centres
        new = distances.argmin(1)
        changed = float((new != labels).mean())
        labels = new
        if changed < tol:
            break
    _fill_empty(labels, distances[np.arange(n), labels], n_clusters)
    return KernelKMeans(labels, float(distances[np.arange(n), labels].sum()), round_)


def _fill_empty(labels: Int[ndarray, " n"], distances: Float[ndarray, " n"], n_clusters: int) -> None:
    """Give every empty cluster the sample that is farthest from its own centre and not alone in it."""
    counts = np.bincount(labels, minlength=n_clusters)
    for empty in np.flatnonzero(counts == 0):
        farthest = int(np.where(counts[labels] > 1, distances, -np.inf).argmax())
        counts[labels[farthest]] -= 1
        labels[farthest] = empty
        counts[empty] = 1


class _Standardise(nn.Module):
    """Subtract the mean and divide by the deviation of the data that the network was made for."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, x: Float[Tensor, "n d"]) -> None:
        super().__init__()
        deviation = x.std(0, correction=0)
        self.register_buffer("mean", x.mean(0))
        self.register_buffer("deviation", torch.where(deviation > 0, deviation, torch.ones_like(deviation)))

    def forward(self, x: Float[Tensor, "n ..."]) -> Float[Tensor, "n d"]:
        return (x.flatten(1) - self.mean) / self.deviation


def train_discriminator(
    samples: Float[ndarray, "n ..."], others: Float[ndarray, "m ..."], seed: int, width: int = 256, steps: int = 200
) -> nn.Module:
    """Train a two-layer ReLU network to tell samples (1) from others (0): full batches, Adam 1e-2, cross-entropy.

    Args:
        samples: label 1.
        others: label 0.
        seed: of the weights.
        width: hidden units.
        steps: updates.

    Returns:
        The network, float64, one logit, standardisation included.
    """
    x = torch.tensor(np.concatenate([samples, others]), dtype=torch.float64)
    labels = torch.cat([torch.ones(len(samples)), torch.zeros(len(others))]).double()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        network = nn.Sequential(_Standardise(x.flatten(1)), MLP(x[0].numel(), 1, depth=1, width=width)).double()
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
        for _ in range(steps):
            optimizer.zero_grad()
            nn.functional.binary_cross_entropy_with_logits(network(x)[:, 0], labels).backward()
            optimizer.step()
    return network.eval()


def _check_affinity(affinity: Float[ndarray, "n n"]) -> None:
    undefined = int((~np.isfinite(np.diagonal(affinity))).sum())
    if undefined or not np.isfinite(affinity).all():
        raise InputError(
            expected="a network that a step on each sample moves",
            got=f"{undefined} samples whose gradient is zero or not finite",
            do="use similarity='kernelised', train less, or leave those samples out",
        )


def as_random_state(value: Any) -> np.random.RandomState:
    """What scikit-learn calls a random state: a seed, a ``RandomState``, or None.

    Args:
        value: what came.

    Returns:
        The random state.

    Raises:
        InputError: for anything else.
    """
    try:
        return check_random_state(value)
    except ValueError as error:
        raise InputError(
            expected="random_state: a whole number from 0 to 2**32 - 1, a numpy RandomState, or None",
            got=in_words(value),
            do="write random_state=0",
        ) from error


def _square(name: str, value: Any) -> Float[ndarray, "n n"]:
    array = check_array(name, value, (None, None))
    if array.shape[0] != array.shape[1]:
        raise InputError(
            expected=f"{name}: a square matrix (n, n)", got=f"shape {array.shape}", do="pass the pairs of all samples"
        )
    return array
