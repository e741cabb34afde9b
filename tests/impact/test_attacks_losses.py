"""Losses, optimisers and states of every shape against a real step of ``torch.optim`` on a fresh copy."""

import collections
import contextvars
import copy
import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import local_elasticity as le

pytestmark = pytest.mark.filterwarnings("ignore")
RATE = 0.05
MakeLoss = Callable[[nn.Sequential], Callable[[Tensor, Tensor], Tensor]]


def network() -> nn.Sequential:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def samples() -> tuple[Tensor, Tensor]:
    x = torch.randn(16, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return x, torch.arange(16) % 3


def real_changes(make_loss: MakeLoss, x: Tensor, y: Tensor) -> Tensor:
    """(sources, targets, outputs) of a step at each source, of a network and a loss that are made afresh."""
    changes = []
    for source in range(len(x)):
        model = network()
        before, loss = model(x).detach(), make_loss(model)
        loss(model(x[source : source + 1]), y[source : source + 1]).backward()
        torch.optim.SGD(model.parameters(), lr=RATE).step()
        changes.append(model(x).detach() - before)
    return torch.stack(changes)


def measured(make_loss: MakeLoss, **options: Any) -> le.Impact:
    model = network()
    return le.measure(model, make_loss(model), samples(), update=le.SGD(lr=RATE), engine="replay", **options)


def check_right(make_loss: MakeLoss) -> None:
    torch.testing.assert_close(measured(make_loss).change, real_changes(make_loss, *samples()), rtol=1e-6, atol=1e-12)


# -- memory that weights share ----------------------------------------------------------------------------------------


def scaled_by_data(model: nn.Sequential) -> Callable[[Tensor, Tensor], Tensor]:
    data = model[0].weight.data
    return lambda o, t: F.cross_entropy(o, t) * data.pow(2).sum()


def scaled_by_state_dict(model: nn.Sequential) -> Callable[[Tensor, Tensor], Tensor]:
    state = model.state_dict()
    return lambda o, t: F.cross_entropy(o, t) * sum(value.pow(2).sum() for value in state.values())


def penalised_view(model: nn.Sequential) -> Callable[[Tensor, Tensor], Tensor]:
    rows = model[0].weight[:2]
    return lambda o, t: F.cross_entropy(o, t) + rows.pow(2).sum()


@pytest.mark.parametrize("make_loss", [scaled_by_data, scaled_by_state_dict, penalised_view])
def test_every_source_steps_from_the_same_weights_where_a_loss_holds_their_memory(make_loss: MakeLoss) -> None:
    check_right(make_loss)


# -- where losses keep their state ------------------------------------------------------------------------------------


class NamedMeters(dict):  # type: ignore[type-arg]
    count = 0


class History(list):  # type: ignore[type-arg]
    count = 0


class Recent(collections.deque):  # type: ignore[type-arg]
    count = 0


def counted_in(make_holder: Callable[[nn.Module], Any], count: Callable[[Any], float]) -> MakeLoss:
    """A loss that weighs its n-th call by what a holder of state says of it."""

    def make_loss(model: nn.Sequential) -> Callable[[Tensor, Tensor], Tensor]:
        holder = make_holder(model)
        return lambda o, t: F.cross_entropy(o, t) * count(holder)

    return make_loss


def by_attribute(holder: Any) -> float:
    holder.count += 1
    return holder.count


def by_queue(holder: Any) -> float:
    holder.put(1)
    return holder.qsize()


def by_only_key(holder: Any) -> float:
    (key,) = holder
    holder[key] += 1
    return holder[key]


def by_rate(holder: Any) -> float:
    holder.param_groups[0]["lr"] /= 2
    return holder.param_groups[0]["lr"]


def by_schedule(holder: Any) -> float:
    holder.step()
    return holder.get_last_lr()[0]


def counting_local(model: nn.Module) -> threading.local:
    holder = threading.local()
    holder.count = 0
    return holder


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1.0)


@pytest.mark.parametrize(
    "make_loss",
    [
        counted_in(lambda model: NamedMeters(), by_attribute),
        counted_in(lambda model: History(), by_attribute),
        counted_in(lambda model: Recent(maxlen=3), by_attribute),
        counted_in(counting_local, by_attribute),
        counted_in(lambda model: queue.Queue(), by_queue),
        counted_in(lambda model: weakref.WeakKeyDictionary({model: 0}), by_only_key),
        counted_in(optimizer, by_rate),
        counted_in(lambda model: torch.optim.lr_scheduler.ExponentialLR(optimizer(model), 0.5), by_schedule),
    ],
    ids=["dict", "list", "deque", "local", "queue", "weak dict", "optimiser", "scheduler"],
)
def test_what_holds_a_count_is_put_back(make_loss: MakeLoss) -> None:
    check_right(make_loss)


def test_a_count_that_cannot_be_put_back_is_refused() -> None:
    count = contextvars.ContextVar("count", default=0)

    def counted(o: Tensor, t: Tensor) -> Tensor:
        count.set(count.get() + 1)
        return F.cross_entropy(o, t) * count.get()

    with pytest.raises(le.InputError, match="starts from the same state"):
        measured(lambda model: counted)


# -- losses that go backward by themselves, or cannot be transformed --------------------------------------------------


def backward_within(model: nn.Sequential) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(o: Tensor, t: Tensor) -> Tensor:
        value = F.cross_entropy(o, t)
        value.backward(retain_graph=True)
        return 2 * value

    return loss


def hook_at_each_call(model: nn.Sequential) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(o: Tensor, t: Tensor) -> Tensor:
        model[0].weight.register_hook(lambda gradient: 2 * gradient)
        return F.cross_entropy(o, t)

    return loss


@pytest.mark.parametrize("make_loss", [backward_within, hook_at_each_call])
@pytest.mark.parametrize("engine", ["auto", "replay", "linear"])
def test_what_a_loss_leaves_at_the_weights_is_refused_and_taken_away(make_loss: MakeLoss, engine: Any) -> None:
    model = network()
    with pytest.raises(le.InputError, match=r"leaves? (.grad|the hooks) of the weights"):
        le.measure(model, make_loss(model), samples(), update=le.SGD(lr=RATE), engine=engine)
    assert all(p.grad is None and not p._backward_hooks for p in model.parameters())


def test_a_compiled_loss() -> None:
    check_right(lambda model: torch.compile(lambda o, t: 2 * F.cross_entropy(o, t), backend="eager"))


def test_a_loss_that_raises_under_a_transform() -> None:
    def asserting(o: Tensor, t: Tensor) -> Tensor:
        assert not torch._C._functorch.is_gradtrackingtensor(o)
        return F.cross_entropy(o, t)

    check_right(lambda model: asserting)


def test_a_loss_that_fails_at_a_later_source_is_told() -> None:
    by_label = {0: F.cross_entropy, 1: lambda o, t: o.square().sum()}
    with pytest.raises(le.InputError, match="KeyError"):
        measured(lambda model: lambda o, t: by_label[int(t)](o, t))


# -- ensembles --------------------------------------------------------------------------------------------------------


class WithUnused(nn.Module):
    """Has a layer that no forward pass takes, and writes to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.unused, self.last = nn.Linear(4, 6), nn.Linear(2, 2), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x.relu_()).tanh())


@pytest.mark.parametrize("route", ["vmap", "loop"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_an_ensemble_leaves_weights_without_gradient_and_its_data_alone(route: Any, optimizer: Any) -> None:
    made, (x, y) = [], samples()

    def make() -> nn.Module:
        made.append(WithUnused().double())
        return copy.deepcopy(made[-1])

    first = x.clone()
    decay = {"lr": RATE, "weight_decay": 0.1}
    ensemble = le.train_ensemble(
        make, (x, y), nn.CrossEntropyLoss(), steps=3, replicas=2, batch_size=16, replacement=False, route=route,
        optimizer=optimizer, validation=(x, y), **decay,
    )  # fmt: skip
    assert torch.equal(x, first)
    for replica, start in enumerate(made):
        stepping = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer](start.parameters(), **decay)
        for _ in range(3):
            stepping.zero_grad()
            F.cross_entropy(start(x.clone()), y).backward()
            stepping.step()
        for name, value in start.state_dict().items():
            torch.testing.assert_close(ensemble.weights[name][replica], value, rtol=1e-9, atol=1e-12)
