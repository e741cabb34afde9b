"""What is read of a loss function: ignored labels, class weights that cancel, one distribution or several."""

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from local_elasticity.base.errors import InputError
from local_elasticity.impact.losses import (
    cancelling_class_weights,
    check_class_weights,
    ignored_labels,
    ignores,
    one_distribution,
    one_number,
    read_loss,
)

WEIGHT = torch.tensor([0.1, 1.0, 10.0])
LABELS = torch.tensor([0, 2, 7, 1])
OUTPUT = torch.tensor([[0.3, -0.2, 0.9]])


class Trainer:
    """A loss that is a method of an object which holds the criterion in a dict."""

    def __init__(self, criterion):
        self.parts = {"criterion": criterion}

    def loss(self, outputs, labels):
        return self.parts["criterion"](outputs, labels)


class Doubled:
    def __init__(self, criterion):
        self.criterion = criterion

    def __call__(self, outputs, labels):
        return 2 * self.criterion(outputs, labels)


class Head(nn.Module):
    def __init__(self, criterion):
        super().__init__()
        self.criterion = criterion

    def forward(self, outputs, labels):
        return self.criterion(outputs, labels)


def closure(criterion):
    return lambda outputs, labels: criterion(outputs, labels)


def inner(criterion):
    def loss(outputs, labels):
        def run():
            return criterion(outputs, labels)

        return run()

    return loss


HOLDERS = {
    "itself": lambda criterion: criterion,
    "closure": closure,
    "inner function": inner,
    "method": lambda criterion: Trainer(criterion).loss,
    "forward": lambda criterion: criterion.forward,
    "object": Doubled,
    "module": Head,
    "partial": lambda criterion: functools.partial(lambda c, o, y: c(o, y), criterion),
}


def both(loss_fn, output=OUTPUT, labels=LABELS[:1]):
    """What is read of the objects alone, and what is seen when the loss runs."""
    return read_loss(loss_fn), read_loss(loss_fn, output, labels)


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_criterion_is_reached_however_it_is_held(holder):
    loss_fn = HOLDERS[holder](nn.CrossEntropyLoss(weight=WEIGHT, ignore_index=7, reduction="sum"))
    for calls in both(loss_fn):
        (call,) = calls
        assert (call.name, call.ignore_index, call.reduction) == ("cross_entropy", 7, "sum")
        assert call.weight is WEIGHT


@pytest.mark.parametrize(
    ("loss_fn", "index"),
    [
        (F.cross_entropy, -100),
        (functools.partial(F.cross_entropy, ignore_index=7), 7),
        (functools.partial(functools.partial(F.cross_entropy, ignore_index=3), ignore_index=7), 7),
        (nn.NLLLoss(ignore_index=7), 7),
        (lambda o, y: F.nll_loss(o.log_softmax(-1), y), -100),
        (lambda o, y: F.cross_entropy(o, y), -100),
        (torch.compile(functools.partial(F.cross_entropy, ignore_index=7), backend="eager"), 7),
    ],
)
def test_ignored_labels_of_functions(loss_fn, index):
    labels = torch.where(LABELS == 7, index, LABELS)
    for calls in (loss_fn, *both(loss_fn)):
        assert ignored_labels(labels, calls).tolist() == [False, False, True, False]


def test_a_keyword_in_a_lambda_is_seen_when_the_loss_runs():
    calls = read_loss(lambda o, y: F.cross_entropy(o, y, ignore_index=7, weight=WEIGHT), OUTPUT, LABELS[:1])
    assert ignored_labels(LABELS, calls).tolist() == [False, False, True, False]
    assert "weight" in str(cancelling_class_weights(calls, LABELS))


def test_a_sample_of_tokens_is_ignored_where_all_of_them_are():
    labels = torch.tensor([[-100, 1], [-100, -100], [2, 1]])
    assert ignored_labels(labels, F.cross_entropy).tolist() == [False, True, False]


def test_what_is_no_class_label_is_never_ignored():
    assert not ignored_labels(torch.full((3,), -100.0), F.cross_entropy).any()
    assert not ignored_labels(LABELS, nn.MSELoss()).any()
    assert not ignored_labels(torch.full((3,), -100), lambda o, y: (o - y).square().sum()).any()


def test_two_losses_ignore_what_both_ignore():
    def loss_fn(outputs, labels):
        return F.cross_entropy(outputs, labels, ignore_index=7) + F.cross_entropy(outputs, labels, ignore_index=2)

    assert not ignored_labels(LABELS, read_loss(loss_fn, OUTPUT, LABELS[:1])).any()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_the_gradient_at_an_ignored_sample_is_exactly_zero(reduction, smoothing, weight):
    loss_fn = nn.CrossEntropyLoss(weight=weight, label_smoothing=smoothing, reduction=reduction, ignore_index=7)
    output = OUTPUT.clone().requires_grad_()
    loss = one_number(loss_fn(output, LABELS[2:3]))
    (gradient,) = torch.autograd.grad(loss, output)
    assert not gradient.any()
    assert bool(loss.isnan()) == (reduction == "mean")
    assert ignores(loss_fn, OUTPUT, LABELS[2:3])
    assert not ignores(loss_fn, OUTPUT, LABELS[:1])


def test_a_mask_written_by_hand_is_asked_of_the_loss():
    def loss_fn(outputs, labels):
        counted = (labels >= 0).to(outputs.dtype)
        return (F.cross_entropy(outputs, labels.clamp(min=0), reduction="none") * counted).sum()

    assert ignores(loss_fn, OUTPUT, torch.tensor([-1]))
    assert not ignores(loss_fn, OUTPUT, torch.tensor([1]))
    assert not ignores(F.cross_entropy, OUTPUT, torch.tensor([3])), "a label out of range is not an ignored one"


def test_weights_that_cancel_are_told():
    for holder in HOLDERS.values():
        said = cancelling_class_weights(holder(nn.CrossEntropyLoss(weight=WEIGHT)), LABELS)
        assert "weight" in str(said)
        assert "reduction='sum'" in str(said)
    assert "weight" in str(cancelling_class_weights(functools.partial(F.nll_loss, weight=WEIGHT), LABELS))
    assert "within each sample" in str(cancelling_class_weights(nn.CrossEntropyLoss(WEIGHT), LABELS.view(2, 2)))


@pytest.mark.parametrize(
    "loss_fn",
    [
        F.cross_entropy,
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(weight=torch.full((3,), 2.0)),
        nn.CrossEntropyLoss(weight=WEIGHT, reduction="sum"),
        nn.CrossEntropyLoss(weight=WEIGHT, size_average=False),
        functools.partial(F.cross_entropy, weight=WEIGHT, reduction="none"),
        nn.MultiMarginLoss(weight=WEIGHT),
        nn.BCEWithLogitsLoss(weight=WEIGHT),
    ],
)
def test_weights_that_stay_are_not(loss_fn):
    assert cancelling_class_weights(loss_fn, LABELS) is None


def test_weights_do_not_cancel_for_soft_labels():
    soft = torch.tensor([[0.2, 0.3, 0.5]])
    loss_fn = nn.CrossEntropyLoss(weight=WEIGHT)
    assert cancelling_class_weights(read_loss(loss_fn, OUTPUT, soft), soft) is None
    heavier = nn.CrossEntropyLoss(weight=2 * WEIGHT)
    torch.testing.assert_close(heavier(OUTPUT, soft), 2 * loss_fn(OUTPUT, soft))


def test_weights_really_cancel():
    for label in range(3):
        labels = torch.tensor([label])
        torch.testing.assert_close(nn.CrossEntropyLoss(WEIGHT)(OUTPUT, labels), F.cross_entropy(OUTPUT, labels))


def test_a_label_of_weight_zero_is_refused_in_a_mean():
    weight = torch.tensor([1.0, 0.0, 1.0])
    labels = torch.tensor([0, 2, -100, 1])
    with pytest.raises(InputError, match="label 1 at source 3"):
        check_class_weights(nn.CrossEntropyLoss(weight), labels)
    check_class_weights(nn.CrossEntropyLoss(weight), labels[:3])
    check_class_weights(nn.CrossEntropyLoss(weight, reduction="sum"), labels)
    check_class_weights(nn.CrossEntropyLoss(weight), torch.tensor([[0, 1], [2, 1]]))  # each has a label that counts
    with pytest.raises(InputError, match="source 1"):
        check_class_weights(nn.CrossEntropyLoss(weight), torch.tensor([[0, 1], [-100, 1]]))


def focal(outputs, labels):
    """Lin et al.: a sigmoid of each output."""
    p, t = outputs.sigmoid(), F.one_hot(labels, outputs.shape[1]).to(outputs)
    p_true = p * t + (1 - p) * (1 - t)
    return -((1 - p_true).square() * p_true.log()).sum()


def softmax_focal(outputs, labels):
    log_p = outputs.log_softmax(-1)[0, labels]
    return -((1 - log_p.exp()).square() * log_p).sum()


def gated(outputs, labels):
    return F.cross_entropy(outputs, labels) * (1 + outputs.mean().sigmoid())


MULTI_HOT = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
SOFT = torch.tensor([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]])


@pytest.mark.parametrize(
    ("labels", "n_outputs", "loss_fn", "answer"),
    [
        (torch.tensor([0, 2]), 3, F.cross_entropy, True),
        (torch.tensor([0, 2]), 3, lambda o, y: -o[0, y], True),
        (torch.tensor([[0], [2]]), 3, lambda o, y: F.cross_entropy(o, y.flatten()), True),
        (SOFT, 3, F.cross_entropy, True),
        (SOFT.bfloat16(), 3, lambda o, y: (o - y).exp().sum(), True),
        (SOFT, 3, nn.BCEWithLogitsLoss(), False),
        (MULTI_HOT, 3, lambda o, y: (o - y).square().sum(), False),
        (MULTI_HOT.long(), 3, nn.MultiLabelSoftMarginLoss(), False),
        (MULTI_HOT.long(), 3, lambda o, y: F.softplus(o).sum() - (o * y).sum(), False),
        (MULTI_HOT.bool(), 3, lambda o, y: F.softplus(o).sum() - (o * y).sum(), False),
        (torch.tensor([[0, -1, -1]]), 3, nn.MultiLabelMarginLoss(), False),
        (torch.eye(3), 3, nn.MSELoss(), True),
        (torch.eye(3).long(), 3, lambda o, y: F.cross_entropy(o, y.argmax(1)), True),
        (torch.randn(4, 3), 3, nn.MSELoss(), False),
        (torch.tensor([0.3, 1.7]), 3, lambda o, y: (o.sum(1) - y).square(), False),
        (torch.tensor([[1, 2], [0, 1]]), 6, lambda o, y: F.cross_entropy(o.view(-1, 3), y.flatten()), False),
        (torch.tensor([0, 1]), 5, lambda o, y: F.cross_entropy(o[:, :2], y), False),
        (torch.tensor([0, 1]), 2, lambda o, y: F.binary_cross_entropy(o.sigmoid(), F.one_hot(y, 2).float()), False),
        (torch.tensor([0, 2]), 3, focal, False),
        (torch.tensor([0, 2]), 3, softmax_focal, True),
        (torch.tensor([0, 2]), 3, gated, True),
        (SOFT, 3, lambda o, y: (F.softplus(o) - o * y).sum(), False),
        (SOFT, 3, lambda o, y: torch.logsumexp(o, 1).sum() - (o * y).sum(), True),
        (torch.tensor([0, 1]), 1, lambda o, y: (F.softplus(o[:, 0]) - o[:, 0] * y).sum(), True),
        (torch.tensor([0, 1]), 1, nn.BCEWithLogitsLoss(), True),
        (torch.tensor([0.0, 1.0]), 1, nn.BCEWithLogitsLoss(), True),
        (torch.tensor([[0.2], [0.9]]), 1, nn.BCEWithLogitsLoss(), True),
        (torch.tensor([-1.0, 1.0]), 1, nn.SoftMarginLoss(), True),
        (torch.tensor([[0.2], [0.9]]), 1, nn.MSELoss(), False),
        (torch.tensor([-1.3, 4.0]), 1, lambda o, y: (o[:, 0] - y).square(), False),
        (torch.tensor([0.0, 1.0]), 1, lambda o, y: F.mse_loss(o.sigmoid().flatten(), y), True),
    ],
)
def test_one_distribution(labels, n_outputs, loss_fn, answer):
    output = torch.linspace(-1, 1, n_outputs)[None]
    assert one_distribution(labels, n_outputs, read_loss(loss_fn, output, labels[:1])) is answer


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize(
    "criterion", [nn.BCEWithLogitsLoss(), nn.BCELoss(), nn.MultiLabelSoftMarginLoss(), nn.MultiLabelMarginLoss()]
)
def test_independent_outputs_are_known_by_their_loss(holder, criterion):
    assert not one_distribution(SOFT, 3, HOLDERS[holder](criterion))


def test_reading_a_loss_changes_and_raises_nothing():
    streams = torch.get_rng_state()
    calls = read_loss(nn.CrossEntropyLoss(), OUTPUT, torch.tensor([9]))  # out of range: torch would raise
    assert calls[0].name == "cross_entropy"
    assert read_loss(lambda o, y: 1 / 0, OUTPUT, LABELS[:1]) == ()
    assert torch.equal(torch.get_rng_state(), streams)


def test_a_loss_of_one_sample_is_one_number():
    assert one_number(torch.tensor([[2.0]])).shape == ()
    unreduced = nn.BCEWithLogitsLoss(reduction="none")(OUTPUT, SOFT[:1])
    for loss, words in (
        (unreduced, "reduction='mean' or 'sum'"),
        (0.5, r"without .item\(\)"),
        ((torch.tensor(1.0), {}), "the loss alone"),
        (None, "as a torch tensor"),
        (torch.tensor(1j), "real"),
    ):
        with pytest.raises(InputError, match=words):
            one_number(loss)
