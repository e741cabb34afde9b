"""Neural collapse: closed configurations, the slow formulas, shards, digits, layers."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from local_elasticity.base.errors import InputError
from local_elasticity.collapse import (
    CLASSIFIER,
    GEOMETRY,
    LayerCollapse,
    NeuralCollapse,
    check_layers,
    layer_metrics,
    layer_outputs,
    metrics,
    metrics_of_many,
    to_features,
    weighted_layers,
)


def etf(k, dim, seed=0):
    """K unit vectors of a simplex equiangular tight frame, turned at random into D dimensions (rows)."""
    turned = np.linalg.qr(np.random.default_rng(seed).standard_normal((dim, k)))[0].T
    return torch.from_numpy(np.sqrt(k / (k - 1)) * (np.eye(k) - 1 / k) @ turned)


def noisy(k=4, dim=7, counts=(9, 14, 6, 20), spread=0.7, seed=1):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(k).repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=generator)]
    means = torch.randn(k, dim, generator=generator, dtype=torch.float64)
    mixing = torch.randn(dim, dim, generator=generator, dtype=torch.float64) * spread
    x = means[labels] + torch.randn(len(labels), dim, generator=generator, dtype=torch.float64) @ mixing
    weight = torch.randn(k, dim, generator=generator, dtype=torch.float64)
    bias = torch.randn(k, generator=generator, dtype=torch.float64)
    return x, labels, weight, bias


def slowly(x, y, weight, bias, weighting="classes"):
    """Every metric as its definition is written, sample by sample and pair by pair."""
    x, y, w, b = (t.numpy() for t in (x, y, weight, bias))
    classes, n, k = np.unique(y), len(y), len(np.unique(y))
    mu = np.stack([x[y == c].mean(axis=0) for c in classes])
    share = np.array([(y == c).mean() if weighting == "samples" else 1 / k for c in classes])
    centre = sum(s * m for s, m in zip(share, mu, strict=True))
    within = sum(np.outer(a - mu[c], a - mu[c]) for a, c in zip(x, y, strict=True)) / n
    between = sum(s * np.outer(m - centre, m - centre) for s, m in zip(share, mu, strict=True))
    variance = [((x[y == c] - mu[c]) ** 2).sum(axis=1).mean() for c in classes]
    pairs = [(i, j) for i in range(k) for j in range(i + 1, k)]
    m = mu - centre
    norms = np.linalg.norm(m, axis=1)
    angles = [abs(m[i] @ m[j] / norms[i] / norms[j] + 1 / (k - 1)) for i, j in pairs]
    gram, ideal = m @ m.T, np.eye(k) - np.ones((k, k)) / k
    rows = np.linalg.norm(w, axis=1)
    said = [np.argmax(w @ a + b) for a in x]
    near = [np.argmin([np.linalg.norm(a - one) for one in mu]) for a in x]
    return {
        "nc1": np.trace(within @ np.linalg.pinv(between, rcond=1e-10)) / k,
        "nc1_quotient": np.trace(within) / np.trace(between),
        "nc1_cdnv": np.mean([(variance[i] + variance[j]) / 2 / np.sum((mu[i] - mu[j]) ** 2) for i, j in pairs]),
        "nc2_equinorm": norms.std() / norms.mean(),
        "nc2_equiangle": np.mean(angles),
        "nc2_equiangle_max": np.max(angles),
        "nc2_simplex": np.linalg.norm(gram / np.linalg.norm(gram) - ideal / np.linalg.norm(ideal)),
        "nc2_equinorm_weight": rows.std() / rows.mean(),
        "nc2_equiangle_weight": np.mean([abs(w[i] @ w[j] / rows[i] / rows[j] + 1 / (k - 1)) for i, j in pairs]),
        "nc3": np.linalg.norm(w / np.linalg.norm(w) - m / np.linalg.norm(m)),
        "nc4": np.mean(np.array(said) != np.array(near)),
    }


def collapse_of(x, y, k=4, batches=3, **options):
    state = NeuralCollapse(k, x.shape[1], **options)
    for part in torch.arange(len(x)).chunk(batches):
        state.update(x[part], y[part])
    return state


def same(found, expected, rel=1e-10, absolute=1e-12):
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=rel, abs=absolute, nan_ok=True), name


# --- the slow formulas ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["classes", "samples"])
def test_equal_to_the_slow_formulas_with_unequal_classes(weighting):
    x, y, weight, bias = noisy()
    expected = slowly(x, y, weight, bias, weighting)
    assert 0.1 < expected["nc4"] < 0.9
    assert set(expected) == {*GEOMETRY, *CLASSIFIER}
    same(metrics(x, y, weight, bias, weighting=weighting), expected)
    state = collapse_of(x, y, weighting=weighting)
    same(state.compute(weight, bias) | {"nc4": 0}, expected | {"nc4": 0})
    for part in x.chunk(2):
        state.update_nc4(part, weight, bias)
    same(state.compute(weight, bias), expected)
    same(collapse_of(x, y, weighting=weighting, keep="features").compute(weight, bias), expected)
    same(state.compute(), {name: expected[name] for name in GEOMETRY})


@pytest.mark.parametrize("dim", [2, 3, 7, 30])
def test_all_forms_of_nc1_agree(dim):
    """Fewer features than K - 1, as many, more, and more than samples."""
    x, y, _, _ = noisy(dim=dim)
    for keep in ("sums", "features"):
        state = collapse_of(x, y, keep=keep)
        forms = [state.compute(form=form)["nc1"] for form in ("span", "svd", "pinv")]
        assert forms == pytest.approx([forms[2]] * 3, rel=1e-9)
        assert metrics(x, y)["nc1"] == pytest.approx(forms[2], rel=1e-9)


def test_sigma_w_is_that_of_all_samples():
    x, y, _, _ = noisy()
    rest = x - torch.stack([x[y == c].mean(0) for c in range(4)])[y]
    for keep in ("sums", "features"):
        np.testing.assert_allclose(collapse_of(x, y, keep=keep).within(), rest.T @ rest / len(x), atol=1e-13)


# --- closed configurations -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [2, 3, 10])
def test_exact_simplex(k):
    """Every metric of collapse is 0, with the classifier on the simplex too."""
    means = 3 * etf(k, 12)
    y = torch.arange(k).repeat(5)
    for found in (metrics(means[y], y, 0.5 * means), collapse_of(means[y], y, k, keep="features").compute(0.5 * means)):
        same(found, dict.fromkeys(found, 0.0), absolute=1e-12)
    found = collapse_of(means[y], y, k).compute(0.5 * means)
    assert math.isnan(found.pop("nc4"))
    same(found, dict.fromkeys(found, 0.0), absolute=1e-12)


@pytest.mark.parametrize("k", [2, 5])
def test_isotropic_noise_about_a_simplex(k):
    """Sigma_W = s^2 I in D dimensions about unit simplex means: Sigma_B has K - 1 eigenvalues 1 / (K - 1)."""
    dim, s = 9, 0.3
    # Noise whose covariance is exactly s^2 I: +- sqrt(D) s e_i, around every mean.
    steps = math.sqrt(dim) * s * torch.cat([torch.eye(dim), -torch.eye(dim)]).double()
    means = etf(k, dim)
    x = (means[:, None] + steps).reshape(-1, dim)
    y = torch.arange(k).repeat_interleave(2 * dim)
    expected = {
        "nc1": s**2 * (k - 1) ** 2 / k,
        "nc1_quotient": dim * s**2,
        "nc1_cdnv": dim * s**2 * (k - 1) / (2 * k),  # ||mu_i - mu_j||^2 = 2K / (K - 1)
        "nc2_equinorm": 0,
        "nc2_equiangle": 0,
        "nc2_equiangle_max": 0,
        "nc2_simplex": 0,
    }
    same(metrics(x, y), expected)
    same(collapse_of(x, y, k).compute(), expected)


def test_known_departures_from_the_simplex():
    # Three means on the axes at distances 1, 1, 2 from each other's plane: by hand.
    means = torch.tensor([[1.0, 0], [-1.0, 0], [0, 0]])
    y = torch.arange(3).repeat(4)
    found = metrics(means[y], y)
    assert found["nc2_equinorm"] == pytest.approx(math.sqrt(2) / 2)  # norms 1, 1, 0
    assert math.isnan(found["nc2_equiangle"])  # the third has no direction
    assert found["nc1"] == 0  # but nc1 is defined
    orthogonal = torch.eye(4).repeat(3, 1)  # about their mean an exact simplex: a Papyan's classifier
    found = metrics(orthogonal, torch.arange(4).repeat(3), torch.eye(4))
    same(found, dict.fromkeys(found, 0.0) | {"nc2_equiangle_weight": 1 / 3, "nc3": found["nc3"]}, absolute=1e-7)
    # || I/2 - (I - J/4)/sqrt(3) ||: cos of the two is tr(I - J/4) / (2 sqrt(3)) = sqrt(3)/2
    assert found["nc3"] == pytest.approx(math.sqrt(2 - math.sqrt(3)))


def test_nothing_between_the_classes_is_undefined_and_not_zero():
    x = torch.randn(6, 3, dtype=torch.float64)
    y = torch.arange(2).repeat_interleave(6)
    for offset in (0, 1e6):
        for found in (metrics(torch.cat([x, x]) + offset, y), collapse_of(torch.cat([x, x]) + offset, y, 2).compute()):
            assert all(math.isnan(value) for value in found.values()), found
    for form in ("svd", "pinv"):
        assert math.isnan(collapse_of(torch.cat([x, x]), y, 2).compute(form=form)["nc1"])


# --- one pass, shards ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", ["sums", "features"])
def test_merged_shards_equal_one_pass(keep):
    x, y, weight, bias = noisy()
    order = torch.argsort(y)  # the first shard has never heard of the last class
    whole = collapse_of(x, y, keep=keep)
    parts = [NeuralCollapse(4, 7, keep=keep) for _ in range(4)]
    for state, rows in zip(parts, order.chunk(3), strict=False):
        state.update(x[rows], y[rows])
    first, *rest = parts  # the fourth saw nothing
    before = copy.deepcopy(rest[0].state)
    for state in rest:
        assert first.merge(state) is first
    same(first.compute(weight, bias), whole.compute(weight, bias), rel=1e-12)
    for name, value in before.items():
        assert torch.equal(rest[0].state[name], value)  # what is merged stays as it is
    first.update(x, y)  # goes on
    same(first.compute(), metrics(torch.cat([x, x]), torch.cat([y, y])), rel=1e-12)
    np.testing.assert_allclose(first.means(), whole.means(), atol=1e-14)


def test_states_about_the_same_points_are_reduced_by_a_sum():
    x, y, _, _ = noisy()
    parts = [collapse_of(x[rows], y[rows]) for rows in torch.arange(len(x)).chunk(3)]
    points = torch.randn(4, 7)
    reduced = NeuralCollapse(4, 7).recentre(points)
    for name, value in reduced.state.items():
        value += sum(state.recentre(points).state[name] for state in parts)
    same(reduced.compute(), metrics(x, y))
    assert set(reduced.state) == {"counts", "sums", "squares", "scatter"}
    assert all(value.dtype == torch.float64 for value in reduced.state.values())


def test_reset_forgets_and_order_does_not_matter():
    x, y, _, _ = noisy()
    state = collapse_of(x, y)
    expected = state.compute()
    state.reset()
    with pytest.raises(InputError, match=r"none of \[0, 1, 2, 3\]"):
        state.compute()
    for row in torch.randperm(len(x), generator=torch.Generator().manual_seed(3)):  # one sample a batch
        state.update(x[row : row + 1], y[row : row + 1])
    same(state.compute(), expected, rel=1e-12)


def test_more_samples_make_the_second_pass_void():
    x, y, weight, bias = noisy()
    state = collapse_of(x, y)
    state.update_nc4(x, weight, bias)
    assert state.compute(weight, bias)["nc4"] == metrics(x, y, weight, bias)["nc4"]
    state.update(x, y)
    assert math.isnan(state.compute(weight, bias)["nc4"])


# --- digits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [1e4, 1e8])
def test_a_large_common_offset_costs_only_the_digits_of_the_input(offset):
    x, y, weight, bias = noisy()
    far = x + offset
    near = far - offset  # the same rounding
    expected = slowly(near, y, weight, bias)
    names = [*GEOMETRY, "nc3"]
    for found in (
        metrics(far, y, weight),
        collapse_of(far, y).compute(weight),
        collapse_of(far[:20], y[:20]).merge(collapse_of(far[20:], y[20:])).compute(weight),
    ):
        for name in names:
            assert found[name] == pytest.approx(expected[name], rel=3e-16 * offset + 1e-11), name


@pytest.mark.parametrize("gap", [1e3, 1e7])
def test_strong_collapse_keeps_its_digits(gap):
    """Sums about one point for all classes would lose the spread: gap^2 eps is 100 times its square at 1e7."""
    x, y, weight, bias = noisy()
    spread = x - torch.stack([x[y == c].mean(0) for c in range(4)])[y]
    far = gap * etf(4, 7)[y] + spread
    expected = slowly(far, y, weight, bias)
    for found in (metrics(far, y), collapse_of(far, y).compute(), collapse_of(far, y).compute(form="svd")):
        for name in GEOMETRY[:3]:
            assert found[name] == pytest.approx(expected[name], rel=1e-8), name
    assert expected["nc1"] < 30 / gap**2


def test_float32_and_half_features_have_float64_means():
    x, y, _, _ = noisy()
    for dtype in (torch.float32, torch.bfloat16):
        low = x.to(dtype)
        same(collapse_of(low, y).compute(), metrics(low.double(), y), rel=1e-12)
        assert collapse_of(low, y).means().dtype == torch.float64


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (lambda x, y: NeuralCollapse(1, 3), "n_classes: a whole number >= 2"),
        (lambda x, y: NeuralCollapse(3, 0), "dim: a whole number >= 1"),
        (lambda x, y: NeuralCollapse(3, 65_536), "keep='features'"),
        (lambda x, y: NeuralCollapse(3, 4, weighting="sample"), "did you mean 'samples'"),
        (lambda x, y: NeuralCollapse(3, 4, keep="all"), "keep: one of 'sums', 'features'"),
        (lambda x, y: NeuralCollapse(4, 8).update(x, y), r"features \(samples, 8\)"),
        (lambda x, y: NeuralCollapse(4, 7).update(x, y[:-1]), "labels, one a sample"),
        (lambda x, y: NeuralCollapse(3, 7).update(x, y), r"labels in 0\.\.2"),
        (lambda x, y: NeuralCollapse(4, 7).update(x, y.double()), "integer class labels"),
        (lambda x, y: NeuralCollapse(4, 7).update(x / 0, y), "finite features"),
        (lambda x, y: collapse_of(x[y != 2], y[y != 2]).compute(), r"none of \[2\]"),
        (lambda x, y: collapse_of(x, y).compute(torch.zeros(4, 6)), r"weight \(4, 7\)"),
        (lambda x, y: collapse_of(x, y).compute(torch.zeros(4, 7), torch.zeros(3)), r"bias \(4,\)"),
        (lambda x, y: collapse_of(x, y).compute(form="svdd"), "did you mean 'svd'"),
        (lambda x, y: collapse_of(x, y).merge(NeuralCollapse(4, 6)), "shards of the same layer"),
        (lambda x, y: collapse_of(x, y).recentre(torch.zeros(4, 6)), r"points \(4, 7\)"),
        (lambda x, y: collapse_of(x, y, keep="features").update_nc4(x, x[:4]), "knows nc4"),
        (lambda x, y: metrics(x, y * 0), "at least 2 classes"),
        (lambda x, y: metrics(x[:, 0], y), "features"),
        (lambda x, y: metrics(x, y, n_classes=5), r"none of \[4\]"),
        (lambda x, y: to_features(x, "average"), "positions"),
    ],
)
def test_bad_input(work, message):
    x, y, _, _ = noisy()
    with pytest.raises(InputError, match=message):
        work(x, y)


def test_features_that_diverged_have_no_metrics():
    x, y, weight, _ = noisy()
    found = metrics(x / 0, y, weight)
    assert set(found) == {*GEOMETRY, *CLASSIFIER}
    assert all(math.isnan(value) for value in found.values())


def test_squares_that_overflow_leave_the_other_features_alone():
    x, y, _, _ = noisy()
    huge, sound = metrics_of_many([1e200 * x, x], y)
    assert all(math.isnan(value) for value in huge.values())
    same(sound, metrics(x, y), rel=1e-12)


# --- layers --------------------------------------------------------------------------------------------------------


def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.ReLU(inplace=True),
            nn.BatchNorm2d(4),
            nn.Flatten(),
            nn.Linear(64, 5),
            nn.ReLU(inplace=True),
            nn.Linear(5, 3),
        ).eval()


def images(n=24, seed=2):
    return torch.randn(n, 1, 6, 6, generator=torch.Generator().manual_seed(seed)), torch.arange(n) % 3


@pytest.mark.parametrize("positions", ["mean", "flatten"])
def test_layers_by_name_in_one_pass(positions):
    model, (x, y) = network(), images()
    with torch.no_grad():
        conv = model[0](x)  # before the ReLU writes into it
        norm, hidden = model[:3](x), model[:5](x)
    expected = {
        "0": conv.mean((2, 3)) if positions == "mean" else conv.flatten(1),
        "2": norm.mean((2, 3)) if positions == "mean" else norm.flatten(1),
        "4": hidden,
        "6": model(x).detach(),
    }
    assert weighted_layers(model) == ("0", "2", "4", "6")
    found = layer_metrics(model, x, y, positions=positions, batch_size=7)
    assert list(found) == list(expected)
    collapse = LayerCollapse(model, 3, positions=positions)
    shards = [LayerCollapse(model, 3, positions=positions) for _ in range(2)]
    for i, part in enumerate(torch.arange(len(x)).chunk(4)):
        collapse.update(x[part], y[part])
        shards[i % 2].update(x[part], y[part])
    for name, features in expected.items():
        same(found[name], metrics(features, y), rel=1e-5, absolute=1e-6)
        same(collapse.compute()[name], found[name], rel=1e-5, absolute=1e-6)
    merged = LayerCollapse(model, 3).merge(shards[0]).merge(shards[1])
    for name, values in collapse.compute().items():
        same(merged.compute()[name], values)
    collapse.reset()
    assert collapse.compute() == {}


class Block(nn.Module):
    """Convolution and normalisation, with something between or after them."""

    def __init__(self, between=None, norm=nn.BatchNorm2d, after=None):
        super().__init__()
        self.conv, self.norm, self.between = nn.Conv2d(1, 4, 3), norm(4), between
        if after is not None:
            self.norm.register_forward_hook(after)

    def forward(self, x):
        x = self.conv(x)
        return self.norm(x if self.between is None else self.between(x)).relu_()


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize(
    ("block", "derived"),
    [
        ({}, True),
        ({"between": nn.ReLU()}, False),
        ({"between": nn.ReLU(inplace=True)}, False),
        ({"after": lambda module, arguments, output: output**2}, False),
        ({"norm": lambda n: nn.BatchNorm2d(n, track_running_stats=False)}, False),
        ({"norm": lambda n: nn.BatchNorm2d(n, affine=False)}, True),
        ({"norm": lambda n: nn.GroupNorm(2, n)}, False),
    ],
)
def test_averages_of_normalised_outputs_come_from_those_before(block, derived, inference, monkeypatch):
    model, (x, _) = Block(**block).double(), images()
    x = x.double()
    model(3 * x + 1)  # running statistics that are no identity
    model.eval()
    with torch.no_grad():
        inputs = model.conv(x)
        outputs = model.norm(inputs if model.between is None else model.between(inputs)).mean((2, 3))
    averaged = []

    def counting(*arguments, **options):
        averaged.append(arguments)
        return to_features(*arguments, **options)

    monkeypatch.setattr("local_elasticity.collapse.layers.to_features", counting)
    with torch.inference_mode(inference):
        found = layer_outputs(model, x, ["conv", "norm"])
    torch.testing.assert_close(found["norm"], outputs, rtol=1e-12, atol=1e-12)
    assert len(averaged) == (1 if derived and not inference else 2)


@pytest.mark.parametrize("width", [5, 6])
def test_positions_that_were_channels_before_are_averaged_as_they_are(width):
    model, x = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(5)), torch.randn(8, 5, 4)
    model(3 * x + 1)
    model.eval()
    with torch.no_grad():
        expected = model(x).mean(2)
    torch.testing.assert_close(layer_outputs(model, x, ["0", "1"])["1"], expected)


def test_a_layer_with_another_forward_is_asked_itself():
    model, (x, _) = Block().eval(), images()
    model.norm.forward = lambda inputs: 2 * inputs
    with torch.no_grad():
        expected = 2 * model.conv(x).mean((2, 3))
    torch.testing.assert_close(layer_outputs(model, x, ["conv", "norm"])["norm"], expected)


def test_the_statistics_of_the_batch_are_not_those_that_run():
    model, (x, _) = Block().double().train(), images()
    x = 3 * x.double() + 1
    with torch.no_grad():
        outputs = copy.deepcopy(model).norm(model.conv(x)).mean((2, 3))
    torch.testing.assert_close(layer_outputs(model, x, ["conv", "norm"])["norm"], outputs)


def test_many_features_are_worked_on_in_groups(monkeypatch):
    generator = torch.Generator().manual_seed(5)
    labels = torch.arange(30) % 3
    features = [torch.randn(30, dim, generator=generator) + labels[:, None] for dim in (5, 40, 2, 7, 7, 90, 1)]
    whole = metrics_of_many(features, labels)
    for together in (1, 300, 1500):
        monkeypatch.setattr("local_elasticity.collapse.geometry.TOGETHER", together)
        for some, all_ in zip(metrics_of_many(features, labels), whole, strict=True):
            same(some, all_)


def test_convolution_outputs_may_be_given_as_they_are():
    x, y = torch.randn(12, 3, 4, 5), torch.arange(12) % 2
    same(_of_images(x, y, 3, "mean"), metrics(x.mean((2, 3)), y), rel=1e-5)
    same(_of_images(x, y, 60, "flatten"), metrics(x.flatten(1), y))


def _of_images(x, y, dim, positions):
    state = NeuralCollapse(2, dim, positions=positions)
    state.update(x, y)
    return state.compute()


def test_sequences_have_their_channels_last():
    x = torch.randn(5, 7, 6)
    found = layer_outputs(nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4)), x, ["0", "1"])
    assert found["0"].shape == (5, 4)
    conv = nn.Sequential(nn.Conv1d(7, 3, 2), nn.GroupNorm(1, 3))
    found = layer_outputs(conv, x, ["0", "1"])
    assert found["0"].shape == found["1"].shape == (5, 3)
    assert torch.equal(found["0"], conv[0](x).mean(2).detach())


def test_bad_layers():
    model, (x, _) = network(), images(6)
    with pytest.raises(InputError, match="a layer of the network"):
        check_layers(model, ["7"])
    with pytest.raises(InputError, match="each once"):
        check_layers(model, ["4", "4"])
    with pytest.raises(InputError, match="each once"):
        check_layers(nn.Sequential(nn.ReLU()), None)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.unused = nn.Linear(36, 36), nn.Linear(2, 2)

        def forward(self, x):
            return self.a(self.a(x.flatten(1)))

    for layer, message in (("a", "used again"), ("unused", "not reached")):
        model = Twice()
        with pytest.raises(InputError, match=message):
            layer_outputs(model, x, [layer])
        assert not model.a._forward_hooks
    lstm = nn.Sequential(nn.LSTM(6, 4))
    with pytest.raises(InputError, match="as a tensor"):
        layer_outputs(lstm, torch.randn(5, 7, 6), ["0"])
