"""Losses, optimisers and states of every shape against a real step of ``torch.optim`` on a fresh copy."""

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
    x = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return x, torch.arange(6) % 3


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
