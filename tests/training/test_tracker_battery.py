"""A tracked training is the untracked one, bit for bit, for every odd model and loss; or it is refused at once."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import local_elasticity as le

sys.path.insert(0, str(Path(__file__).parents[1] / "impact"))

from fingerprints import bits, handles, streams
from odd_cases import CASES
from odd_models import Case
from test_battery import seed_streams

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS, PROBES = 6, 3
WITHOUT_CLASSES = frozenset(  # class tables need a class of each probe
    {
        "one output",
        "labels ignored",
        "soft labels",
        "divergence from soft labels",
        "multi-label",
        "squares",
        "huber",
        "gaussian",
    }
)
UNTRAINABLE = frozenset({"expanded weight", "weight norm, cached by the user"})  # without a tracker either
TRACKABLE = [
    case
    for case in CASES
    if case.name not in WITHOUT_CLASSES | UNTRAINABLE and not case.name.endswith(", conv")  # their twins do
]


@dataclass
class Trained:
    """What a training leaves behind, and what its looks saw."""

    state: dict[str, Any]
    disturbed: list[str]
    looks: int = 0


def train(case: Case, tracked: bool) -> Trained:
    """Six steps of SGD with momentum on halves of the data; looks after the steps, and one before a step."""
    model, loss_fn, x, y = case.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    seed_streams()
    with case.around():
        tracker = tracker_of(case, model, loss_fn, x, y, optimizer) if tracked else None
        trained = Trained({}, [])
        for count in range(STEPS):
            rows = slice(0, 8) if count % 2 else slice(8, None)
            optimizer.zero_grad(set_to_none=count != 3)
            loss = loss_fn(model(x[rows].clone()), y[rows].clone()).sum()
            loss.backward()
            if tracker is not None and count == 2:
                undisturbed(trained, model, optimizer, lambda: tracker.snapshot())
            optimizer.step()
            if tracker is not None:
                undisturbed(trained, model, optimizer, lambda: tracker.step())
    trained.looks = 0 if tracker is None else len(tracker.finish().dataset.step)
    outside = model.outside() if hasattr(model, "outside") else None
    trained.state = {
        "model": bits(model),
        "loss": bits(loss_fn),
        "optimiser": bits(optimizer.state_dict()),
        "gradients": bits([parameter.grad for parameter in model.parameters()]),
        "inputs": bits((x, y)),
        "streams": streams(),
        "versions": [parameter._version for parameter in model.parameters()],
        "outside": outside,
    }
    return trained


def tracker_of(
    case: Case, model: nn.Module, loss_fn: Any, x: Any, y: Any, optimizer: torch.optim.Optimizer
) -> le.Tracker:
    definition = "l2"
    return le.Tracker(
        model,
        loss_fn,
        (x[:PROBES], y[:PROBES]),
        update=le.from_optimizer(optimizer),
        definitions=(definition,),
        schedule=le.every(3),
        mode=case.mode,
    )


def undisturbed(trained: Trained, model: nn.Module, optimizer: torch.optim.Optimizer, look: Any) -> None:
    """Look, and note what is not where and as it was."""
    before = handles(model), bits(optimizer.state_dict()), streams()
    look()
    after = handles(model), bits(optimizer.state_dict()), streams()
    names = ("handles of tensors and flags", "optimiser", "streams")
    trained.disturbed += [name for name, a, b in zip(names, before, after, strict=True) if a != b]


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in TRACKABLE])
def test_tracked_training_is_untracked_training(case: Case) -> None:
    tracked, refusal = attempt(case)
    if tracked is None:
        assert case.must_refuse, f"refused: {refusal}"
        return
    assert not case.must_refuse
    assert tracked.looks == 3
    assert tracked.disturbed == []
    untracked = train(case, tracked=False)
    changed = [name for name, value in untracked.state.items() if value != tracked.state[name]]
    assert changed == []


def attempt(case: Case) -> tuple[Trained | None, le.InputError | None]:
    """The tracked training, or its refusal."""
    try:
        return train(case, tracked=True), None
    except le.InputError as refusal:
        return None, refusal
