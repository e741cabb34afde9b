"""Models, their state and their inputs of every shape against a real step of ``torch.optim`` on a fresh copy."""

import collections
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import local_elasticity as le

pytestmark = pytest.mark.filterwarnings("ignore")
RATE = 0.05
MakeModel = Callable[[], nn.Module]


def samples() -> tuple[Tensor, Tensor]:
    x = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return x, torch.arange(6) % 3


def fresh(make_model: MakeModel) -> nn.Module:
    torch.manual_seed(7)
    return make_model().double().eval()


def real_changes(make_model: MakeModel) -> Tensor:
    """(sources, targets, outputs): a step at each source, looked at by a network that is made afresh."""
    x, y = samples()
    before, changes = fresh(make_model)(x).detach().clone(), []
    for source in range(len(x)):
        stepping, looking = fresh(make_model), fresh(make_model)
        F.cross_entropy(stepping(x[source : source + 1]), y[source : source + 1]).backward()
        torch.optim.SGD(stepping.parameters(), lr=RATE).step()
        for weight, stepped in zip(looking.parameters(), stepping.parameters(), strict=True):
            weight.data.copy_(stepped)
        changes.append(looking(x).detach() - before)
    return torch.stack(changes)


def measured(model: nn.Module, **options: Any) -> le.Impact:
    return le.measure(model, F.cross_entropy, samples(), update=le.SGD(lr=RATE), engine="replay", **options)


def check_right(make_model: MakeModel, outside: Callable[[Any], Any] = lambda model: None, **options: Any) -> None:
    """The changes are those of real steps, and what is seen ``outside`` is as before."""
    model = fresh(make_model)
    before = outside(model)
    torch.testing.assert_close(measured(model, **options).change, real_changes(make_model), rtol=1e-6, atol=1e-12)
    assert outside(model) == before


class Layer(nn.Module):
    """One layer, to be made odd."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)


# -- memory that weights share ----------------------------------------------------------------------------------------


class PartsOfOneBuffer(nn.Module):
    """Weights that are parts of one tensor, as in flat training; one of them is read through the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = torch.randn(27, dtype=torch.float64)
        self.a, self.b = nn.Parameter(self.flat[:12].view(3, 4)), nn.Parameter(self.flat[12:15])
        self.c = nn.Parameter(self.flat[15:].view(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.a, self.b) + F.linear(x, self.c).tanh() * self.flat[15:].pow(2).sum()


def test_a_tensor_that_several_weights_are_parts_of() -> None:
    check_right(PartsOfOneBuffer)


# -- where models keep their state ------------------------------------------------------------------------------------


class CountsInCounter(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.seen = collections.Counter(calls=3)

    def forward(self, x: Tensor) -> Tensor:
        self.seen["calls"] += 1
        return self.layer(x) * self.seen["calls"]


def test_a_counter_whose_update_adds() -> None:
    check_right(CountsInCounter, lambda model: dict(model.seen))


class HoldsSystemRandom(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.source = random.SystemRandom()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def test_a_random_source_without_a_state() -> None:
    check_right(HoldsSystemRandom)
