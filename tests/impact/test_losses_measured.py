"""Measurements under losses that ignore labels, weigh classes, or see several labels a sample, against real steps."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import local_elasticity as le

X = torch.randn(20, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(20) % 3
MULTI_HOT = (torch.rand(20, 3, generator=torch.Generator().manual_seed(1)) > 0.5).double()
ROUTES = ({}, {"engine": "replay", "route": "step"}, {"engine": "replay", "route": "vmap"}, {"engine": "linear"})


def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def real_change(loss_fn, labels, source, make_optimizer):
    """What one step of a real optimiser at one source does to all outputs, on a copy."""
    model = net()
    before = model(X).detach()
    optimizer = make_optimizer(model.parameters())
    loss_fn(model(X[source : source + 1]), labels[source : source + 1]).backward()
    optimizer.step()
    return model(X).detach() - before


def with_ignored(index):
    labels = Y.clone()
    labels[3] = labels[17] = index
    return labels


@pytest.mark.parametrize("route", ROUTES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("index", [-100, 1, 7])
def test_an_ignored_label_moves_nothing(route, reduction, index):
    loss_fn = nn.CrossEntropyLoss(ignore_index=index, reduction=reduction)
    labels = with_ignored(index)
    ignored = labels == index
    impact = le.measure(net(), loss_fn, (X, labels), update=le.SGD(lr=1e-4), **route)
    assert not impact.change[ignored].any()
    assert not impact.source_change[ignored].any()
    assert not impact.losses[ignored].any()
    assert impact.losses.isfinite().all()
    assert (impact.source_change[~ignored].abs().amax(1) > 0).all()
    want = real_change(loss_fn, labels, 2, lambda p: torch.optim.SGD(p, lr=1e-4))
    torch.testing.assert_close(impact.change[2], want, rtol=1e-3, atol=1e-9)


def test_an_ignored_label_still_decays_the_weights():
    """The gradient is zero, but the step is the optimiser's own, as in training."""

    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=0.1, weight_decay=0.1)

    labels = with_ignored(-100)
    model = net()
    update = le.from_optimizer(sgd(model.parameters()))
    impact = le.measure(model, F.cross_entropy, (X, labels), update=update, engine="replay")
    torch.testing.assert_close(impact.change[3], real_change(F.cross_entropy, labels, 3, sgd), rtol=1e-9, atol=1e-15)
    assert impact.change[3].any()


def test_a_mask_written_by_hand_is_no_label_out_of_range():
    def loss_fn(outputs, labels):
        return (F.cross_entropy(outputs, labels.clamp(min=0), reduction="none") * (labels >= 0)).sum()

    impact = le.measure(net(), loss_fn, (X, with_ignored(-1)), update=le.SGD(lr=0.01), engine="replay", route="step")
    assert not impact.change[[3, 17]].any()
    assert impact.change[4].any()


@pytest.mark.parametrize("index", [3, -1])
def test_a_label_that_nothing_ignores_is_still_out_of_range(index):
    with pytest.raises(le.InputError, match=r"labels in 0\.\.2"):
        le.measure(net(), F.cross_entropy, (X, with_ignored(index)), update=le.SGD(lr=0.01))


def test_class_weights_that_cancel_are_told():
    weight = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)

    def notes(loss_fn):
        return " ".join(le.measure(net(), loss_fn, (X, Y), update=le.SGD(lr=0.01), engine="replay").plan.notes)

    assert "class weights" in notes(nn.CrossEntropyLoss(weight))
    assert "class weights" in notes(lambda o, y: F.cross_entropy(o, y, weight=weight))
    assert "class weights" not in notes(nn.CrossEntropyLoss(weight, reduction="sum"))
    assert "class weights" not in notes(F.cross_entropy)
    with pytest.raises(le.InputError, match="0/0"):
        le.measure(net(), nn.CrossEntropyLoss(weight.clamp(max=1) - 0.1), (X, Y), update=le.SGD(lr=0.01))


@pytest.mark.parametrize(
    "loss_fn",
    [nn.BCEWithLogitsLoss(), lambda o, y: F.binary_cross_entropy(o.sigmoid(), y), nn.MultiLabelSoftMarginLoss()],
)
@pytest.mark.parametrize("engine", ["replay", "linear", "auto"])
def test_independent_outputs_have_no_kl(loss_fn, engine):
    impact = le.measure(net(), loss_fn, (X, MULTI_HOT), update=le.SGD(lr=0.5), engine=engine)
    for name in ("kl", "l1", "kl_published"):
        with pytest.raises(le.InputError, match="bernoulli_kl"):
            le.s_rel(impact, name)
    assert le.s_rel(impact, "bernoulli_kl").isfinite().all()


def test_soft_labels_and_smoothing_have_one():
    for loss_fn, labels in (
        (F.cross_entropy, torch.softmax(X[:, :3], -1)),
        (nn.CrossEntropyLoss(label_smoothing=0.1), Y),
    ):
        impact = le.measure(net(), loss_fn, (X, labels), update=le.SGD(lr=0.1), engine="replay")
        assert le.s_rel(impact, "kl").isfinite().all()
        want = real_change(loss_fn, labels, 5, lambda p: torch.optim.SGD(p, lr=0.1))
        torch.testing.assert_close(impact.change[5], want, rtol=1e-9, atol=1e-12)


def test_an_unreduced_loss():
    unreduced = nn.CrossEntropyLoss(reduction="none")
    one = le.measure(net(), unreduced, (X, Y), update=le.SGD(lr=0.1), engine="replay")
    other = le.measure(net(), F.cross_entropy, (X, Y), update=le.SGD(lr=0.1), engine="replay")
    torch.testing.assert_close(one.change, other.change)
    with pytest.raises(le.InputError, match="reduction='mean' or 'sum'"):
        le.measure(net(), nn.BCEWithLogitsLoss(reduction="none"), (X, MULTI_HOT), update=le.SGD(lr=0.1))


def test_reading_a_loss_leaves_no_trace_in_its_own_state():
    """A loss that keeps a mean of its own is called once more to be read."""

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(3, dtype=torch.float64))

        def forward(self, outputs, labels):
            self.mean += outputs.detach().mean(0)
            return F.cross_entropy(outputs - self.mean, labels)

    loss_fn = Loss()
    want = real_change(copy.deepcopy(loss_fn), Y, 4, lambda p: torch.optim.SGD(p, lr=0.1))
    impact = le.measure(net(), loss_fn, (X, Y), update=le.SGD(lr=0.1), engine="replay", route="step")
    assert not loss_fn.mean.any()
    torch.testing.assert_close(impact.change[4], want, rtol=1e-9, atol=1e-12)
