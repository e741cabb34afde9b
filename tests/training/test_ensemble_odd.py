"""Odd networks and losses in ensembles: every replica as ``torch.optim`` trains it by itself, or refused."""

import copy
import warnings
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import local_elasticity as le

X = torch.randn(12, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
Y = torch.arange(12) % 3
STEPS, RATE = 5, 0.1


class Net(nn.Module):
    """Two layers, with room for oddities."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.hidden(self.first(x)).tanh())

    def hidden(self, h: Tensor) -> Tensor:
        return h


class ReassignedBuffer(Net):
    """Keeps a running mean by giving its buffer's name to another tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(5))

    def hidden(self, h: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
        return h - self.mean


class WrittenBuffer(ReassignedBuffer):
    """Keeps it in place."""

    def hidden(self, h: Tensor) -> Tensor:
        if self.training:
            self.mean.mul_(0.9).add_(0.1 * h.detach().mean(0))
        return h - self.mean


class Annealed(Net):
    """Counts its calls in an attribute that matters."""

    calls = 0

    def hidden(self, h: Tensor) -> Tensor:
        self.calls += self.training
        return h / (1 + 0.1 * self.calls)


class PlainTensor(Net):
    """Keeps a tensor that is no buffer, and writes to it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.ones(5, dtype=torch.float64)

    def hidden(self, h: Tensor) -> Tensor:
        if self.training:
            self.scale += 0.1
        return h * self.scale


class OwnFeatures(Net):
    """Has random features of its own in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.features = torch.randn(5, dtype=torch.float64)

    def hidden(self, h: Tensor) -> Tensor:
        return h * self.features


class OwnNumber(Net):
    """Has a drawn number in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = float(torch.rand(()))

    def hidden(self, h: Tensor) -> Tensor:
        return h * self.factor


class OwnGenerator(Net):
    """Draws noise from a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(int(torch.randint(1000, ())))

    def hidden(self, h: Tensor) -> Tensor:
        if not self.training:
            return h
        return h + torch.randn(h.shape, generator=self.generator, dtype=h.dtype)


class Branches(Net):
    """Its second branch takes part in some batches only."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(5, 5)

    def hidden(self, h: Tensor) -> Tensor:
        return self.second(h) if float(h.detach().sum()) > 0 else h


class Remembers(Net):
    """Keeps what it saw last, with its graph."""

    def hidden(self, h: Tensor) -> Tensor:
        self.seen = h
        return h


class Scaled(Net):
    """Scales the gradient by a function of its own."""

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(context, h):
            return h.clone()

        @staticmethod
        def backward(context, *gradients):
            return 2 * gradients[0]

    def hidden(self, h: Tensor) -> Tensor:
        return self.Twice.apply(h)


class Capped(Net):
    """An embedding whose forward pass writes to the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 5, max_norm=0.5)

    def hidden(self, h: Tensor) -> Tensor:
        return h + self.table((h.detach().abs().sum(1) * 10).long() % 6)


class Differentiates(Net):
    """Its outputs are a derivative."""

    def forward(self, x):
        x = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(super().forward(x).square().sum(), x, create_graph=True)
        return g[:, :3]


KEPT = [Annealed, PlainTensor, OwnGenerator, Remembers]
ODD = [ReassignedBuffer, WrittenBuffer, *KEPT, OwnFeatures, OwnNumber, Branches, Scaled, Capped, Differentiates]
RULES = {"sgd": {"weight_decay": 0.1}, "momentum": {"momentum": 0.9, "weight_decay": 0.1}}


def train(kind, loss=F.cross_entropy, **settings):
    """The ensemble, and a copy of each of its networks from before."""
    made = []

    def make():
        model = kind().double()
        made.append(copy.deepcopy(model))
        return model

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*one after the other")
        options = {"lr": RATE, "steps": STEPS, "replicas": 3, "batch_size": 4, "validation": (X, Y), **settings}
        return le.train_ensemble(make, (X, Y), loss, **options), made


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", ODD)
def test_every_replica_is_as_torch_optim_trains_it(kind, rule):
    ensemble, made = train(kind, **RULES[rule])
    for replica, model in enumerate(made):
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE, **RULES[rule])
        for rows in ensemble.samples[:, replica]:
            optimizer.zero_grad()
            F.cross_entropy(model(X[rows]), Y[rows]).backward()
            optimizer.step()
        for name, p in model.named_parameters():
            torch.testing.assert_close(ensemble.weights[name][replica], p.detach(), rtol=1e-10, atol=1e-12)
        for name, b in model.named_buffers():
            torch.testing.assert_close(ensemble.buffers[name][replica], b, rtol=1e-10, atol=1e-12)
        loss = float(F.cross_entropy(model.eval()(X), Y).detach())
        assert ensemble.validation_loss[-1, replica] == pytest.approx(loss, rel=1e-10)
        if kind is not Remembers:  # its tensor has a graph
            torch.testing.assert_close(ensemble.model(replica).eval()(X), model(X), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", [OwnFeatures, Annealed])
def test_a_tracker_and_layers_see_the_replica_itself(kind):
    def track(model, resume):
        return le.Tracker(model, F.cross_entropy, (X[:4], Y[:4]), update=le.SGD(0.1), schedule=le.every(1))

    ensemble, _ = train(kind, trackers={1: track}, probes=(X, Y), collapse_layers=["first"])
    data = ensemble.runs[1].dataset
    with torch.no_grad():
        wanted = ensemble.model(1).eval()(X[:4])
    torch.testing.assert_close(torch.as_tensor(data["before"].values[-1]).reshape(4, 3), wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", KEPT)
def test_what_no_store_keeps_is_refused_with_a_store(kind, tmp_path):
    with pytest.raises(le.InputError, match="register_buffer"):
        train(kind, store=tmp_path / "run")


@pytest.mark.parametrize("kind", [ReassignedBuffer, Annealed, OwnFeatures])
@pytest.mark.parametrize("route", ["vmap", "kernels"])
def test_a_route_that_is_not_right_is_refused(kind, route):
    with pytest.raises(le.InputError, match=r"loop"):
        train(kind, route=route)


class RunningLoss(nn.Module):
    """Divides by a running mean of itself."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.ones((), dtype=torch.float64))

    def forward(self, outputs, labels):
        loss = F.cross_entropy(outputs, labels)
        self.mean.lerp_(loss.detach(), 0.1)
        return loss / self.mean


class CountingLoss:
    """Is annealed by a count."""

    def __init__(self):
        self.calls = 0

    def __call__(self, outputs, labels):
        self.calls += 1
        return F.cross_entropy(outputs, labels) / self.calls


class LearntLoss(nn.Module):
    """Has weights."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, outputs, labels):
        return F.cross_entropy(outputs * self.scale, labels)


def list_in_a_closure():
    seen = []

    def loss(outputs, labels):
        seen.append(float(outputs.detach().sum()))
        return F.cross_entropy(outputs, labels) / len(seen)

    return loss


OTHER = Net().double()


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (RunningLoss(), "all replicas share it"),
        (CountingLoss(), "all replicas share it"),
        (list_in_a_closure(), "all replicas share it"),
        (LearntLoss(), "freeze"),
        (lambda o, y: F.cross_entropy(o, y) + OTHER.first.weight.square().sum(), "weight_decay="),
    ],
)
def test_a_loss_that_is_not_of_outputs_and_labels_alone_is_refused(loss, words):
    with pytest.raises(le.InputError, match=words):
        train(Net, loss)


class HookedWeight(Net):
    """Scales the gradient of a weight."""

    def __init__(self):
        super().__init__()
        self.first.weight.register_hook(lambda g: 2 * g)


class Locked(Net):
    """Holds what cannot be copied."""

    def __init__(self):
        super().__init__()
        self.rows = (row for row in range(3))


class Views(Net):
    """A buffer that is a view of a weight."""

    def __init__(self):
        super().__init__()
        self.double()
        self.register_buffer("row", self.first.weight.detach()[0])


class CountsForAll(Net):
    """Its count is the class's."""

    count = 0

    def hidden(self, h):
        CountsForAll.count += 1
        return h / CountsForAll.count


class SharedList(Net):
    """Its list is the class's."""

    seen: ClassVar = []

    def hidden(self, h):
        self.seen.append(1)
        return h / len(self.seen)


STATE = torch.zeros((), dtype=torch.float64)


class SharedTensor(Net):
    """Writes to a global tensor."""

    def hidden(self, h):
        STATE.add_(0.1)
        return h + STATE


@pytest.mark.parametrize("kind", [CountsForAll, SharedList, SharedTensor])
def test_state_that_replicas_share_is_refused(kind):
    with pytest.raises(le.InputError, match="share"):
        train(kind)


@pytest.mark.parametrize(
    ("kind", "words"),
    [(HookedWeight, "hook"), (Locked, "copied|iterators|copy"), (Views, "views")],
)
def test_a_network_that_cannot_be_trained_so_is_refused(kind, words):
    with pytest.raises(le.InputError, match=words):
        le.train_ensemble(lambda: kind().double(), (X, Y), F.cross_entropy, lr=RATE, steps=2, replicas=2)


def test_adam_refuses_weights_that_some_batches_leave_out():
    with pytest.raises(le.InputError, match="no gradient of 'second"):
        train(Branches, optimizer="adam", steps=20)


def test_networks_of_the_caller_stay_as_they_are():
    mine = [Net().double() for _ in range(3)]
    before = [copy.deepcopy(model.state_dict()) for model in mine]
    waiting = iter(mine)
    le.train_ensemble(lambda: next(waiting), (X, Y), F.cross_entropy, lr=RATE, steps=3, replicas=3, route="loop")
    for model, state in zip(mine, before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
