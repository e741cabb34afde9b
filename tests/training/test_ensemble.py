import itertools
import random
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import local_elasticity as le
from local_elasticity.base.errors import InputError
from local_elasticity.networks import MLP, SimpleConv
from local_elasticity.training.lockstep import routes
from local_elasticity.training.lockstep.routes import Route

SHAPES = le.data.geomnist(6, 4)
IMAGES, LABELS = SHAPES.train


def clusters(n=24, features=6, classes=3, seed=3):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    return torch.randn(n, features, generator=generator, dtype=torch.float64) + y[:, None], y


def mlp():
    return MLP(6, 3, depth=2, width=9).double()


def conv():
    return SimpleConv(3).double()


def small_conv():
    """Padding, stride, average pooling, no bias, a layer that is frozen, activations of several kinds."""
    model = nn.Sequential(
        nn.Conv2d(1, 3, 5, stride=2, padding=1, bias=False),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Conv2d(3, 4, 3, dilation=2),
        nn.ReLU(),
        nn.MaxPool2d(2, stride=1),
        nn.Flatten(),
        nn.Linear(4 * 2 * 2, 5),
        nn.SiLU(),
        nn.Linear(5, 3),
    ).double()
    model[7].weight.requires_grad_(False)
    return model


def train(make=mlp, data=None, *, lr=0.05, steps=40, replicas=3, loss_fn=F.cross_entropy, **options):
    return le.train_ensemble(
        make, clusters() if data is None else data, loss_fn, lr=lr, steps=steps, replicas=replicas, **options
    )


def plain(ensemble, start, data, optimizer, loss_fn=F.cross_entropy):
    """Every replica trained by itself as PyTorch is used: outputs, losses of every step, and the networks."""
    x, y = data
    everything = []
    for position, model in enumerate(start):
        stepper, outputs, losses = optimizer(model), [], []
        for row in ensemble.samples[:, position]:
            chosen = torch.from_numpy(np.atleast_1d(row)).long()
            out = model(x[chosen])
            loss = loss_fn(out, y[chosen])
            stepper.zero_grad()
            loss.backward()
            stepper.step()
            outputs.append(out.detach())
            losses.append(loss.item())
        everything.append((torch.stack(outputs).numpy(), np.array(losses), model))
    return everything


def fresh(**settings):
    """The replicas before the first update."""
    start = train(**settings, stop_at=0)
    return [start.model(position) for position in range(len(start.replicas))]


def difference(one, two):
    return max(float((one[name] - two[name]).abs().max()) for name in one)


def same_bits(one, two):
    assert one.step == two.step
    for name, values in one.log.items():
        np.testing.assert_array_equal(values, two.log[name], err_msg=name)
    for kind in ("weights", "buffers"):
        for name, values in getattr(one, kind).items():
            assert torch.equal(values, getattr(two, kind)[name]), name
    np.testing.assert_array_equal(one.diverged, two.diverged)


# --- equality with one-by-one training --------------------------------------------------------------------------------

SGD = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.01}
CASES = {
    "SimpleConv, one sample": (conv, (IMAGES, LABELS), {"lr": 0.02}, torch.optim.SGD),
    # At a larger learning rate the steps themselves enlarge rounding beyond 1e-12.
    "SimpleConv, batches, momentum": (conv, (IMAGES, LABELS), {**SGD, "lr": 0.01, "batch_size": 3}, torch.optim.SGD),
    "SimpleConv, one sample, Adam": (conv, (IMAGES, LABELS), {"lr": 1e-3, "optimizer": "adam"}, torch.optim.Adam),
    "MLP, one sample": (mlp, clusters(), {"lr": 0.1, "weight_decay": 0.01}, torch.optim.SGD),
    "MLP, one sample, momentum": (mlp, clusters(), SGD, torch.optim.SGD),
    "MLP, batches": (mlp, clusters(), {"lr": 0.1, "weight_decay": 0.01, "batch_size": 5}, torch.optim.SGD),
    "MLP, batches, Adam": (
        mlp,
        clusters(),
        {"lr": 0.01, "weight_decay": 0.01, "optimizer": "adam", "batch_size": 5},
        torch.optim.Adam,
    ),
    "other layers, batches": (small_conv, (IMAGES, LABELS), {"lr": 0.1, "batch_size": 2}, torch.optim.SGD),
    "other layers, one sample": (small_conv, (IMAGES, LABELS), {"lr": 0.1}, torch.optim.SGD),
}


@pytest.mark.parametrize("case", CASES)
def test_lock_step_equals_one_by_one_over_300_steps(case):
    make, data, options, optimizer = CASES[case]
    settings = {"make": make, "data": data, "replicas": 2, "steps": 300, **options}
    ensemble = train(**settings)
    assert ensemble.plan.route == "kernels"
    given = {name: value for name, value in options.items() if name in ("lr", "momentum", "weight_decay")}
    start = fresh(**settings)
    moved = difference(dict(start[0].state_dict()), {name: w[0] for name, w in ensemble.weights.items()})
    assert moved > 0.01
    alone = plain(ensemble, start, data, lambda model: optimizer(model.parameters(), **given))
    for position, (outputs, losses, model) in enumerate(alone):
        shape = ensemble.logits[:, position].shape
        np.testing.assert_allclose(ensemble.logits[:, position], outputs.reshape(shape), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(ensemble.losses[:, position], losses, rtol=1e-12, atol=1e-12)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(ensemble.weights[name][position], parameter.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("route", ["kernels", "vmap", "loop"])
@pytest.mark.parametrize("loss_fn", [F.mse_loss, F.huber_loss])
def test_routes_and_other_losses(route, loss_fn):
    x, _ = clusters()
    data = x, torch.stack([x.sum(dim=1).sin(), x[:, 0], x[:, 1] * x[:, 2]], dim=1)
    settings = {"data": data, "loss_fn": loss_fn, "steps": 50, "batch_size": 2, "replicas": 2}
    ensemble = train(**settings, route=route)
    alone = plain(ensemble, fresh(**settings), data, lambda m: torch.optim.SGD(m.parameters(), lr=0.05), loss_fn)
    for position, (_, losses, model) in enumerate(alone):
        np.testing.assert_allclose(ensemble.losses[:, position], losses, rtol=1e-12, atol=1e-12)
        assert difference(dict(model.state_dict()), {n: w[position] for n, w in ensemble.weights.items()}) < 1e-12
    np.testing.assert_array_equal(ensemble.labels, data[1].numpy()[ensemble.samples])


def test_float32_stays_float32_and_close_to_float64():
    short = train(lambda: MLP(6, 3, depth=1, width=8), dtype=torch.float32)
    exact = train(lambda: MLP(6, 3, depth=1, width=8), dtype=torch.float64)
    assert short.logits.dtype == np.float32
    assert exact.logits.dtype == np.float64
    np.testing.assert_allclose(short.logits, exact.logits, atol=1e-4)
    assert np.abs(short.logits - exact.logits).max() > 0


# --- replicas are independent -----------------------------------------------------------------------------------------


@pytest.mark.exhaustive
@pytest.mark.parametrize(("make", "data"), [(conv, (IMAGES, LABELS)), (mlp, clusters())], ids=["SimpleConv", "MLP"])
def test_replicas_depend_neither_on_their_number_nor_order_nor_chunk(make, data):
    settings = {"make": make, "data": data, "steps": 300, "lr": 0.02}
    whole = train(**settings, replicas=5)
    for replicas, options in (((3, 1), {}), (5, {"chunk_size": 2}), ((4, 0, 2, 1, 3), {"chunk_size": 3})):
        other = train(**settings, replicas=replicas, **options)
        where = list(other.replicas)
        np.testing.assert_array_equal(other.samples, whole.samples[:, where])
        np.testing.assert_allclose(other.logits, whole.logits[:, where], rtol=1e-12, atol=1e-12)
        for name, values in other.weights.items():
            torch.testing.assert_close(values, whole.weights[name][where], rtol=1e-12, atol=1e-12)
    assert len({tuple(column) for column in whole.samples.T}) == 5  # own order
    starts = fresh(**settings, replicas=5)
    assert all(
        float((a - b).detach().abs().max()) > 1e-3
        for one, two in itertools.combinations(starts, 2)
        for a, b in zip(one.parameters(), two.parameters(), strict=True)
    )


def test_same_seed_same_bits_another_seed_other_numbers():
    settings = {"dtype": torch.float32, "replicas": 20, "chunk_size": 8, "threads": 2}
    first = train(**settings)
    same_bits(first, train(**settings))
    same_bits(first, train(**{**settings, "threads": 1}))
    assert not np.array_equal(first.samples, train(**settings, seed=1).samples)


def test_samples_are_drawn_with_replacement_or_by_permutations():
    drawn = train(steps=600, batch_size=1).samples
    assert drawn.min() == 0
    assert drawn.max() == 23
    counts = np.bincount(drawn[:24, 0], minlength=24)
    assert counts.max() > 1  # an epoch without any repetition has probability 24! / 24^24
    turns = train(steps=48 // 5 * 2, batch_size=5, replacement=False).samples
    epoch = turns[:4, 0].ravel()
    assert len(set(epoch.tolist())) == 20
    assert not np.array_equal(turns[:4, 0], turns[4:8, 0])


def test_the_callers_random_streams_are_untouched():
    def state():
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002

    before = state()
    train(lambda: nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.Linear(8, 3)).double(), route="loop", steps=3)
    train(steps=3)
    assert state() == before


def test_a_model_that_draws_from_any_stream_is_the_same_each_time():
    def make():
        model = mlp()
        with torch.no_grad():
            model.out.bias.add_(random.random() + np.random.rand())  # noqa: NPY002
        return model

    same_bits(train(make, steps=2), train(make, steps=2))


# --- divergence, fallbacks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ["kernels", "loop"])
def test_a_replica_that_diverges_is_marked_and_leaves_the_others_alone(route):
    def make(scale):
        made = itertools.count()

        def one():
            model = mlp()
            if next(made) == 1:
                with torch.no_grad():
                    model.out.weight.mul_(scale)
            return model

        return one

    settings = {"validation": clusters(seed=8), "probes": clusters(seed=9), "route": route}
    ensemble = train(make(1e200), **settings)
    healthy = train(make(1.0), **settings)
    assert ensemble.diverged[1] >= 0
    assert ensemble.diverged[0] == ensemble.diverged[2] == -1
    first = int(ensemble.diverged[1])
    assert np.isfinite(ensemble.losses[:first, 1]).all()
    assert not np.isfinite(ensemble.losses[first, 1])
    for others in (0, 2):
        np.testing.assert_array_equal(ensemble.logits[:, others], healthy.logits[:, others])
        np.testing.assert_array_equal(ensemble.validation_loss[:, others], healthy.validation_loss[:, others])
        np.testing.assert_array_equal(ensemble.nc1[:, others], healthy.nc1[:, others])
    means = ensemble.class_means()
    assert np.isfinite(means).any()
    assert "1 diverged" in repr(ensemble)


class Branching(nn.Module):
    def forward(self, x):
        return x if float(x.sum()) > 1e9 else 2 * x


@pytest.mark.parametrize(
    ("layer", "name"),
    [(Branching(), "1 (Branching)"), (nn.Dropout(0.5), "1 (Dropout)")],
)
def test_a_layer_that_cannot_be_batched_is_named_and_the_loop_taken(layer, name):
    def make():
        import copy

        return nn.Sequential(nn.Linear(6, 8), copy.deepcopy(layer), nn.Linear(8, 3)).double()

    with pytest.warns(UserWarning, match=re.escape(f"cannot batch layer {name}")):
        ensemble = train(make, steps=20, batch_size=4)
    assert ensemble.plan.route == "loop"
    with pytest.warns(UserWarning, match="one after the other"):
        same_bits(ensemble, train(make, steps=20, batch_size=4))
    with pytest.warns(UserWarning, match="one after the other"):  # each replica has a random stream of its own
        alone = train(make, steps=20, batch_size=4, replicas=[2])
    np.testing.assert_allclose(alone.logits[:, 0], ensemble.logits[:, 2], rtol=1e-12)


def test_a_network_that_is_no_chain_goes_through_vmap():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.two(x + torch.relu(self.one(x)))

    settings = {"make": lambda: Residual().double(), "batch_size": 2, "optimizer": "adam", "lr": 0.01}
    ensemble = train(**settings)
    assert ensemble.plan.route == "vmap"
    alone = plain(ensemble, fresh(**settings), clusters(), lambda m: torch.optim.Adam(m.parameters(), lr=0.01))
    for position, (_, losses, _model) in enumerate(alone):
        np.testing.assert_allclose(ensemble.losses[:, position], losses, rtol=1e-12, atol=1e-12)


def test_running_statistics_are_those_of_each_replica():
    def make():
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).double()

    settings = {"make": make, "batch_size": 4}
    ensemble = train(**settings)
    alone = plain(ensemble, fresh(**settings), clusters(), lambda m: torch.optim.SGD(m.parameters(), lr=0.05))
    for position, (_, losses, model) in enumerate(alone):
        np.testing.assert_allclose(ensemble.losses[:, position], losses, rtol=1e-12, atol=1e-12)
        for name, buffer in model.named_buffers():
            torch.testing.assert_close(ensemble.buffers[name][position], buffer, rtol=1e-12, atol=1e-12)


# --- the log ----------------------------------------------------------------------------------------------------------


def test_schedules_validation_and_probes_agree_with_slow_formulas():
    validation, probes = clusters(30, seed=8), clusters(21, seed=9)
    settings = {
        "validation": validation,
        "validate": le.every(7),
        "probes": probes,
        "probe": le.at([0, 4, 9]),
        "collapse_layers": ["hidden.2"],
        "steps": 20,
    }
    ensemble = train(**settings)
    assert ensemble.times["validation"].tolist() == [0, 1, 8, 15, 20]
    assert ensemble.times["probe"].tolist() == [0, 1, 5, 10, 20]
    assert ensemble.layers == ("outputs", "hidden.2")
    for row, stop in enumerate(ensemble.times["probe"]):
        then = train(**settings, stop_at=int(stop))
        for position in range(3):
            model = then.model(position)
            with torch.no_grad():
                out = model(probes[0])
                hidden = model.hidden[:3](probes[0])
            for label in range(3):
                own = out[probes[1] == label].numpy()
                np.testing.assert_allclose(ensemble.probe_mean[row, position, label], own.mean(0), atol=1e-12)
                np.testing.assert_allclose(
                    ensemble.probe_variance[row, position, label], own.var(0, ddof=1), atol=1e-12
                )
            for layer, features in enumerate((out.numpy(), hidden.numpy())):
                for name, value in slow_collapse(features, probes[1].numpy()).items():
                    np.testing.assert_allclose(ensemble.log[name][row, position, layer], value, rtol=1e-8, err_msg=name)
    for row, stop in enumerate(ensemble.times["validation"]):
        then = train(**settings, stop_at=int(stop))
        for position in range(3):
            with torch.no_grad():
                out = then.model(position)(validation[0])
            assert ensemble.validation_loss[row, position] == pytest.approx(float(F.cross_entropy(out, validation[1])))
            right = float((out.argmax(1) == validation[1]).double().mean())
            assert ensemble.validation_accuracy[row, position] == pytest.approx(right)


def slow_collapse(features, labels):
    """The formulas as they are written (spec lesde 8), with the D x D pseudo-inverse."""
    classes = np.unique(labels)
    K = len(classes)
    means = np.stack([features[labels == k].mean(0) for k in classes])
    M = means - means.mean(0)
    within = sum(np.outer(x - means[k], x - means[k]) for x, k in zip(features, labels, strict=True)) / len(features)
    between = M.T @ M / K
    norms = np.linalg.norm(M, axis=1)
    cosines = M @ M.T / np.outer(norms, norms)
    off = [(k, j) for k in range(K) for j in range(K) if k != j]
    spread = [np.mean(np.sum((features[labels == k] - means[k]) ** 2, 1)) for k in classes]
    simplex = (np.eye(K) - np.ones((K, K)) / K) / np.sqrt(K - 1)
    return {
        "nc1": np.trace(within @ np.linalg.pinv(between, rcond=1e-10)) / K,
        "nc1_quotient": np.trace(within) / np.trace(between),
        "nc1_cdnv": np.mean([(spread[k] + spread[j]) / (2 * np.sum((means[k] - means[j]) ** 2)) for k, j in off]),
        "nc2_equinorm": norms.std() / norms.mean(),
        "nc2_equiangle": np.mean([abs(cosines[k, j] + 1 / (K - 1)) for k, j in off]),
        "nc2_equiangle_max": max(abs(cosines[k, j] + 1 / (K - 1)) for k, j in off),
        "nc2_simplex": np.linalg.norm(M @ M.T / np.linalg.norm(M @ M.T) - simplex),
    }


def test_class_means_are_means_over_the_replicas_that_saw_the_class():
    ensemble = train(replicas=6, steps=12)
    means = ensemble.class_means()
    for step in range(12):
        for label in range(3):
            rows = [ensemble.logits[step, r] for r in range(6) if ensemble.labels[step, r] == label]
            expected = np.mean(rows, axis=0) if rows else np.full(3, np.nan)
            np.testing.assert_allclose(means[step, label], expected)


def test_outputs_models_and_callback():
    x, _ = clusters(9, seed=4)
    seen = []
    ensemble = train(callback=lambda step, e: seen.append((step, e.outputs(x))), call=le.every(10))
    assert [step for step, _ in seen] == [0, 1, 11, 21, 31, 40]
    with torch.no_grad():
        expected = torch.stack([ensemble.model(i)(x) for i in range(3)])
    torch.testing.assert_close(ensemble.outputs(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(seen[-1][1], expected, rtol=1e-12, atol=1e-12)
    assert float((seen[0][1] - expected).abs().max()) > 1e-3
    same_bits(ensemble, train())  # being called changes nothing


@pytest.mark.parametrize("route", ["kernels", "vmap", "loop"])
def test_looks_of_an_accelerator_are_those_of_a_processor(route, monkeypatch):
    ensemble = train(conv, data=(IMAGES, LABELS), route=route, probes=(IMAGES, LABELS))
    plain = ensemble.outputs(IMAGES)
    monkeypatch.setattr(Route, "accelerated", True)  # as if calls cost more than arithmetic
    monkeypatch.setattr(routes, "ACCELERATOR_AT_ONCE", 5 * IMAGES[0].numel())
    torch.testing.assert_close(ensemble.outputs(IMAGES), plain, rtol=1e-12, atol=1e-12)


def test_the_tracker_of_a_replica_looks_at_its_network():
    probes = clusters(6, seed=9)

    def make(model, resume):
        return le.Tracker(model, F.cross_entropy, probes, update=le.SGD(lr=0.01), schedule=le.every(15), route="step")

    ensemble = train(trackers={1: make})
    run = ensemble.runs[1].dataset
    assert run["step"].values.tolist() == [1, 16, 31]
    for row, stop in enumerate(run["step"].values):
        then = train(stop_at=int(stop))
        with torch.no_grad():
            np.testing.assert_allclose(run["before"].values[row], then.model(1)(probes[0]), rtol=1e-12)
    same_bits(ensemble, train())
    with pytest.raises(InputError, match=re.escape("key of trackers: a whole number in 0..2")):
        train(trackers={3: make})


def test_without_a_log_there_is_none():
    ensemble = train(log=False)
    assert "logits" not in ensemble.log
    with pytest.raises(InputError, match="log with logits"):
        ensemble.class_means()
    with pytest.raises(AttributeError, match="without 'logits'"):
        ensemble.logits  # noqa: B018


# --- bad input --------------------------------------------------------------------------------------------------------

X, Y = clusters()
SHARED = mlp()
BAD = {
    "labels outside of the outputs": ({"data": (X, Y + 1)}, "labels in 0 ... 2"),
    "a batch larger than the data": ({"batch_size": 25}, "at most the 24 samples"),
    "a network of another input size": ({"make": lambda: MLP(7, 3).double()}, "its first Linear is made for 7 numbers"),
    "one output for classes": ({"make": lambda: MLP(6, 1).double()}, "one output a class"),
    "outputs of three dimensions": (
        {"make": lambda: nn.Sequential(nn.Linear(6, 3), nn.Unflatten(1, (3, 1))).double()},
        "outputs of shape",
    ),
    "targets of another shape": ({"data": (X, X), "loss_fn": F.mse_loss}, "targets of the outputs' shape"),
    "validation with more classes": ({"validation": (X, Y + 1)}, "validation: labels in 0 ... 2"),
    "probes without a class": ({"probes": (X, Y.clamp(min=1))}, "none of class 0"),
    "NaN in the data": ({"data": (X * torch.nan, Y)}, "inputs of data: finite numbers"),
    "a negative learning rate": ({"lr": -1.0}, "lr: a finite number >= 0"),
    "no steps": ({"steps": 0}, "steps: a whole number"),
    "no replicas": ({"replicas": 0}, "replicas"),
    "replicas twice": ({"replicas": [1, 1]}, "different numbers"),
    "an unknown optimiser": ({"optimizer": "sdg"}, "did you mean 'sgd'"),
    "an unknown route": ({"route": "kernel"}, "did you mean 'kernels'"),
    "an unknown layer": ({"probes": (X, Y), "collapse_layers": ["hidden.9"]}, "a layer of the network"),
    "a loss a sample": ({"loss_fn": lambda o, y: F.cross_entropy(o, y, reduction="none")}, "one real number"),
    "a budget": ({"validation": (X, Y), "validate": le.budget(0.1)}, "depends on the step alone"),
    "resuming nothing": ({"resume": True}, "a store to resume"),
    "networks that share weights": ({"make": lambda: SHARED}, "a new network at each call"),
    "no network": ({"make": lambda: 3}, "torch.nn.Module"),
    "stopping late": ({"stop_at": 41}, "stop_at: a whole number in 0..40"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_one_clear_line(case):
    options, words = BAD[case]
    with pytest.raises(InputError, match=re.escape(words)):
        train(**options)


def test_networks_of_different_shapes_are_refused():
    widths = itertools.count(4)
    with pytest.raises(InputError, match="networks of one shape"):
        train(lambda: MLP(6, 3, depth=1, width=next(widths)).double())


# --- a device ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_replicas_on_cuda_draw_from_streams_of_their_own():
    def dropping():
        return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.Linear(8, 3)).double()

    before = torch.cuda.get_rng_state()
    both = train(dropping, route="loop", replicas=2, device="cuda")
    alone = train(dropping, route="loop", replicas=[1], device="cuda")
    np.testing.assert_array_equal(both.logits[:, 1], alone.logits[:, 0])
    assert torch.equal(torch.cuda.get_rng_state(), before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("route", ["kernels", "vmap", "loop"])
def test_cuda_gives_the_numbers_of_the_cpu(route):
    settings = {"make": conv, "data": (IMAGES, LABELS), "lr": 0.02, "route": route, "probes": (IMAGES, LABELS)}
    here, there = train(**settings), train(**settings, device="cuda")
    assert next(iter(there.weights.values())).is_cuda
    np.testing.assert_allclose(there.logits, here.logits, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(there.probe_mean, here.probe_mean, rtol=1e-9, atol=1e-10)
