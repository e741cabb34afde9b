import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from local_elasticity.base.errors import InputError
from local_elasticity.impact import measure
from local_elasticity.impact.trimming import narrowed_taps
from local_elasticity.impact.update import SGD, Adam, from_optimizer


def make(padding=1):
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1), nn.Tanh(), nn.AvgPool2d(4), nn.Conv2d(5, 5, 3, padding=padding), nn.Tanh(),
        nn.Conv2d(5, 5, 3, padding=padding), nn.Flatten(), nn.Linear(5, 3),
    )  # fmt: skip
    return net.double(), torch.randn(9, 2, 4, 4, dtype=torch.float64), torch.arange(9) % 3


def left_out(impact):
    return [note for note in impact.plan.notes if "padding" in note]


@given(
    size=st.integers(1, 6), kernel=st.integers(1, 7), stride=st.integers(1, 3), padding=st.integers(0, 3),
    dilation=st.integers(1, 3),
)  # fmt: skip
def test_narrowed_taps_give_the_same_convolution(size, kernel, stride, padding, dilation):
    if size + 2 * padding < dilation * (kernel - 1) + 1:
        return
    trim = narrowed_taps(size, kernel, stride, padding, dilation)
    x, weight = torch.randn(1, 1, size, dtype=torch.float64), torch.randn(1, 1, kernel, dtype=torch.float64)
    whole = F.conv1d(x, weight, None, stride, padding, dilation)
    if trim is not None:
        taps, left = trim
        assert weight[..., taps].numel() < kernel
        torch.testing.assert_close(F.conv1d(x, weight[..., taps], None, stride, left, dilation), whole)


def test_the_middle_of_three_taps():
    assert narrowed_taps(1, 3, 1, 1, 1) == (slice(1, 2), 0)
    assert narrowed_taps(2, 3, 2, 1, 1) == (slice(1, 3), 0)
    assert narrowed_taps(2, 3, 1, 1, 1) is None


@pytest.mark.parametrize("update", [SGD(0.1), Adam(1e-2), SGD(0.1, weight_decay=0.1)])
@pytest.mark.parametrize("route", ["step", "vmap"])
def test_trimmed_is_the_naive_loop(update, route):
    model, x, y = make()
    impact = measure(model, F.cross_entropy, (x, y), update=update, route=route)
    assert left_out(impact)
    for source in range(len(x)):
        moved = copy.deepcopy(model)
        kind = {SGD: torch.optim.SGD, Adam: torch.optim.Adam}[type(update)]
        optimizer = kind(moved.parameters(), lr=update.lr, weight_decay=update.weight_decay)
        F.cross_entropy(moved(x[source : source + 1]), y[source : source + 1]).backward()
        optimizer.step()
        torch.testing.assert_close(impact.after[source], moved(x).detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_the_state_of_a_live_optimizer_is_trimmed_too(kind):
    model, x, y = make()
    optimizer = kind(
        model.parameters(), lr=1e-2, weight_decay=0.1, **({"momentum": 0.9} if kind.__name__ == "SGD" else {})
    )
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    impact = measure(model, F.cross_entropy, (x, y), update=from_optimizer(optimizer))
    assert left_out(impact)
    optimizer.zero_grad()
    F.cross_entropy(model(x[:1]), y[:1]).backward()
    optimizer.step()
    torch.testing.assert_close(impact.after[0], model(x).detach(), rtol=0, atol=1e-12)


def test_a_penalty_on_the_weights_is_seen():
    model, x, y = make()

    def penalised(outputs, labels):
        return F.cross_entropy(outputs, labels) + sum(p.square().sum() for p in model.parameters())

    assert not left_out(measure(model, penalised, (x, y), update=SGD(0.1)))


def test_an_update_that_is_not_elementwise_keeps_all():
    model, x, y = make()
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3)
    assert not left_out(measure(model, F.cross_entropy, (x, y), update=from_optimizer(optimizer)))


def test_the_model_is_whole_afterwards():
    model, x, y = make()
    weights, state = list(model.parameters()), copy.deepcopy(model.state_dict())

    def fails_later(outputs, labels):
        if int(labels) == int(y[4]) != int(y[0]):
            raise RuntimeError("a loss that fails")
        return F.cross_entropy(outputs, labels)

    with pytest.raises(InputError, match="RuntimeError"):
        measure(model, fails_later, (x, y), update=SGD(0.1))
    assert all(one is other for one, other in zip(weights, model.parameters(), strict=True))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [m.padding for m in model if isinstance(m, nn.Conv2d)] == [(1, 1)] * 3
    assert not any(m._forward_pre_hooks for m in model)


def test_labels_are_checked_first():
    model, x, _ = make()
    with pytest.raises(InputError, match=r"labels in 0\.\.2"):
        measure(model, F.cross_entropy, (x, torch.full((9,), 7)), update=SGD(0.1))
