"""What loops do around the step, and what trackers are given: as a real step of ``torch.optim`` does, or refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import local_elasticity as le
from local_elasticity.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore")


def network() -> nn.Sequential:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def samples() -> tuple[Tensor, Tensor]:
    x = torch.randn(12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return x, torch.arange(12) % 3


# -- step hooks --------------------------------------------------------------------------------------------------------


class Wrapping(torch.optim.Optimizer):
    """Steps by another optimiser."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner = inner

    def step(self, closure: Any = None) -> None:
        self.inner.step()


def renormalise(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for p in optimizer.param_groups[0]["params"]:
        p.data /= p.data.norm()


HOOKS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "before": lambda optimizer: optimizer.register_step_pre_hook(renormalise),
    "after": lambda optimizer: optimizer.register_step_post_hook(renormalise),
    "before all": lambda _: register_optimizer_step_pre_hook(renormalise),
    "after all": lambda _: register_optimizer_step_post_hook(renormalise),
}


@pytest.mark.parametrize("wraps", [False, True])
@pytest.mark.parametrize("when", HOOKS)
def test_step_hooks_are_refused_by_name(when: str, wraps: bool) -> None:
    model = network()
    optimizer = inner = torch.optim.Adam(model.parameters())
    if wraps:
        optimizer = Wrapping(inner)
    update = le.from_optimizer(optimizer)
    handle = HOOKS[when](inner)
    try:
        with pytest.raises(InputError, match="hook renormalise"):
            le.from_optimizer(optimizer)
        with pytest.raises(InputError, match="hook renormalise"):
            le.measure(model, F.cross_entropy, samples(), update=update)
    finally:
        handle.remove()
    le.measure(model, F.cross_entropy, samples(), update=update)
