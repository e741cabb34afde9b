"""What loops do around the step, and what trackers are given: as a real step of ``torch.optim`` does, or refused."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import local_elasticity as le
from local_elasticity.errors import InputError
from local_elasticity.similarity import DEFINITIONS

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


# -- what a tracker is given -------------------------------------------------------------------------------------------


def tracker(**options: Any) -> le.Tracker:
    model = options.pop("model", None) or network()
    loss = options.pop("loss", nn.CrossEntropyLoss())
    return le.Tracker(model, loss, samples(), **{"update": le.SGD(lr=0.1), **options})


def one_logit() -> nn.Module:
    return nn.Sequential(network(), nn.Linear(3, 1), nn.Flatten(0)).double()


@pytest.mark.parametrize(
    ("definition", "options", "words"),
    [
        ("kl", {"outputs": "values"}, "logits or probabilities"),
        ("l2", {"outputs": "probabilities"}, "that sum to 1"),
        ("kl", {"loss": lambda o, t: F.binary_cross_entropy_with_logits(o, F.one_hot(t, 3).double())}, "distribution"),
        ("l1", {"model": one_logit(), "loss": lambda o, t: F.mse_loss(o, t.double())}, "distribution"),
        ("of a fourth class", {}, "can be evaluated"),
    ],
)
def test_definitions_that_do_not_fit_are_refused_before_training(
    definition: str, options: dict[str, Any], words: str, definitions: None
) -> None:
    le.define("of a fourth class", on="change")(lambda change: change[..., 3].abs())
    with pytest.raises(InputError, match=words):
        tracker(definitions=("he_su", definition), **options)


@pytest.fixture
def definitions() -> Iterator[None]:
    """Definitions of a test's own are gone afterwards."""
    known = dict(DEFINITIONS)
    yield
    DEFINITIONS.clear()
    DEFINITIONS.update(known)
