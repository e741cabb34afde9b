import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.cluster import KMeans
from sklearn.datasets import make_blobs
from sklearn.metrics import adjusted_rand_score
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn

import local_elasticity as le
from local_elasticity.base.errors import InputError
from local_elasticity.networks import MLP
from local_elasticity.similarity.clustering import LocalElasticityClustering, cluster, kernel_kmeans


@parametrize_with_checks(
    [LocalElasticityClustering(random_state=0)]
)  # every check that scikit-learn has for clusterers
def test_is_a_scikit_learn_clusterer(estimator, check):
    check(estimator)


def two_kinds(n=30):
    """Two kinds of samples, in directions at right angles, and what each is."""
    random = np.random.default_rng(0)
    kind = random.permutation(np.arange(n) % 2)
    x = random.normal(scale=0.15, size=(n, 4))
    x[np.arange(n), kind] += 2.0
    return x, kind


CHOICES = [
    ("relative", "auto"),
    ("kernelised", "auto"),
    ("relative", "spectral"),
    ("kernelised", "spectral"),
    ("kernelised", "kmeans"),
    ("relative", "kernel_kmeans"),
]


@pytest.mark.parametrize(("similarity", "clusterer"), CHOICES)
def test_finds_kinds_that_a_network_moves_apart(similarity, clusterer):
    x, kind = two_kinds()
    torch.manual_seed(0)
    model = MLP(4, 1, depth=1, width=200)
    estimator = le.LocalElasticityClustering(model, similarity=similarity, clusterer=clusterer, random_state=0)
    assert adjusted_rand_score(kind, estimator.fit_predict(x)) == 1.0
    assert np.array_equal(estimator.labels_, clone(estimator).fit(x).labels_)
    assert estimator.n_features_in_ == 4


@pytest.mark.parametrize("similarity", ["relative", "kernelised"])
def test_affinity_is_the_symmetrised_similarity_of_the_network(similarity):
    x, _ = two_kinds()
    torch.manual_seed(0)
    model = MLP(4, 3, depth=1, width=20).double()
    before = [p.detach().clone() for p in model.parameters()]
    estimator = LocalElasticityClustering(model, similarity=similarity, random_state=0).fit(torch.tensor(x))
    function = {"relative": le.s_rel_limit, "kernelised": le.s_ker}[similarity]
    found = function(model, torch.tensor(x))
    torch.testing.assert_close(torch.tensor(estimator.affinity_), (found + found.T) / 2)
    assert estimator.network_ is model
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_normalised_and_logits():
    x, _ = two_kinds()
    torch.manual_seed(0)
    model = MLP(4, 1, depth=1, width=20).double()
    estimator = LocalElasticityClustering(model, similarity="kernelised", normalise=True, outputs="logits").fit(x)
    np.testing.assert_allclose(np.diagonal(estimator.affinity_), 1.0)
    probabilities = nn.Sequential(model, nn.Sigmoid())
    same = LocalElasticityClustering(probabilities, similarity="kernelised", normalise=True).fit(x)
    np.testing.assert_allclose(estimator.affinity_, same.affinity_, rtol=1e-9)


def test_takes_images():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(18, 1))
    estimator = LocalElasticityClustering(model, random_state=0).fit(torch.randn(6, 1, 5, 5))
    assert estimator.labels_.shape == (6,)


def test_without_a_network_it_tells_samples_from_the_auxiliary_ones():
    x, _ = two_kinds()
    random = np.random.default_rng(1)
    others = random.normal(scale=0.15, size=(30, 4)) - [0, 0, 2.0, 0]
    estimator = LocalElasticityClustering(auxiliary=others, random_state=0).fit(x)
    with torch.no_grad():
        right = torch.cat([
            estimator.network_(torch.tensor(x)) > 0, estimator.network_(torch.tensor(others)) < 0,
        ])  # fmt: skip
    assert right.double().mean() > 0.95
    with pytest.raises(InputError, match="auxiliary samples"):
        LocalElasticityClustering(auxiliary=others[:, :2]).fit(x)


def test_kernel_kmeans_of_a_linear_kernel_is_kmeans():
    x, _ = make_blobs(60, centers=4, n_features=3, random_state=3)
    plain = KMeans(4, n_init=20, random_state=0).fit(x)
    found = kernel_kmeans(x @ x.T, 4, n_init=20, random_state=0)
    assert adjusted_rand_score(plain.labels_, found.labels) == 1.0
    assert found.inertia == pytest.approx(plain.inertia_)
    assert found.inertia == pytest.approx(
        sum(((x[found.labels == c] - x[found.labels == c].mean(0)) ** 2).sum() for c in range(4))
    )


def test_kernel_kmeans_leaves_no_cluster_empty():
    x = np.ones((5, 1))
    for k in (1, 3, 5):
        labels = kernel_kmeans(x @ x.T, k, random_state=0).labels
        assert sorted(set(labels.tolist())) == list(range(k))


def test_bad_input():
    x, _ = two_kinds()
    model = MLP(4, 1, depth=1, width=8)
    bad = [
        ({"similarity": "relativ"}, "did you mean 'relative'"),
        ({"clusterer": "dbscan"}, "clusterer: one of"),
        ({"n_clusters": 31}, "n_samples=30"),
        ({"n_clusters": 0}, "write n_clusters=1"),
        ({"normalise": True}, "kernelised"),
        ({"output": 3}, "form 'full'"),
    ]
    for settings, words in bad:
        with pytest.raises(InputError, match=words):
            LocalElasticityClustering(model, **settings).fit(x)
    with pytest.raises(InputError, match=r"torch\.nn\.Module"):
        LocalElasticityClustering("mlp").fit(x)
    with pytest.raises(InputError, match="method: one of"):
        cluster(np.eye(3), 2, "ward")
    dead = nn.Sequential(nn.Linear(4, 1, bias=False), nn.ReLU())
    with pytest.raises(InputError, match="gradient is zero"):
        LocalElasticityClustering(dead).fit(np.vstack([x, np.zeros(4)]))


def test_scikit_learn_is_an_extra():
    code = """if True:
        import sys
        import local_elasticity as le
        assert "sklearn" not in sys.modules, "imported before it is asked for"
        sys.modules["sklearn"] = None
        try:
            le.LocalElasticityClustering
        except le.InputError as error:
            assert 'local-elasticity[cluster]' in str(error), error
        else:
            raise AssertionError("no error")
        try:
            le.LocalElasticityClusterin
        except AttributeError:
            pass
        else:
            raise AssertionError("no error")
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
