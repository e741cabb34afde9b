"""Losses that users bring: ordinary ones, ones that read more than outputs and labels, ones that keep a state."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from odd_models import CLASSES, DIM, Loss
from torch import Tensor, nn
from torch.nn import functional as F


def fixed(make: Callable[[], Loss]) -> Callable[[nn.Module], Loss]:
    """A loss that knows nothing of the model."""
    return lambda model: make()


# -- outputs and labels only ------------------------------------------------------------------------------------------


def weighted_sum() -> Loss:
    return nn.CrossEntropyLoss(weight=torch.tensor([0.5, 1.0, 4.0]), reduction="sum")


def users_mean() -> Loss:
    return lambda o, t: F.cross_entropy(o, t, reduction="none").mean()


def unreduced() -> Loss:
    return nn.CrossEntropyLoss(reduction="none")


def log_likelihood() -> Loss:
    return lambda o, t: F.nll_loss(F.log_softmax(o, 1), t)


def focal(o: Tensor, t: Tensor) -> Tensor:
    loss = F.cross_entropy(o, t, reduction="none")
    return ((1 - (-loss).exp()) ** 2 * loss).sum()


def divergence(o: Tensor, t: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(o, 1), t, reduction="batchmean")


def gaussian(o: Tensor, t: Tensor) -> Tensor:
    return F.gaussian_nll_loss(o[:, :1], t[:, :1], F.softplus(o[:, 1:2]))


def writes_its_arguments(o: Tensor, t: Tensor) -> Tensor:
    """Cleans labels in place, and shifts the outputs in place."""
    t.clamp_(max=1)
    return F.cross_entropy(o.mul_(2), t)


def branches_on_label(o: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(o, t) if int(t[0]) else (o**2).sum()


def some_rows(o: Tensor, t: Tensor) -> Tensor:
    """Boolean indexing: no batching rule has it, no sample but one of label 0 is penalised."""
    return F.cross_entropy(o, t) + o[t == 0].pow(2).sum()


# -- weights ----------------------------------------------------------------------------------------------------------


def _squares(parameters: Any) -> Tensor:
    return sum((p.abs() ** 2).sum() for p in parameters)  # type: ignore[return-value]


def penalised_lambda(model: nn.Module) -> Loss:
    return lambda o, t: F.cross_entropy(o, t) + 0.5 * _squares(model.parameters())


def _penalised(model: nn.Module, factor: float, o: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(o, t) + factor * _squares(model.parameters())


def penalised_partial(model: nn.Module) -> Loss:
    return partial(_penalised, model, 0.5)


class Trainer:
    def __init__(self, model: nn.Module) -> None:
        self.model, self.factor = model, 0.5

    def loss(self, o: Tensor, t: Tensor) -> Tensor:
        return _penalised(self.model, self.factor, o, t)


def penalised_method(model: nn.Module) -> Loss:
    return Trainer(model).loss


class Penalised(nn.Module):
    """Keeps the model in a list, so that it is no submodule; or as a submodule."""

    def __init__(self, model: nn.Module, hidden: bool) -> None:
        super().__init__()
        if hidden:
            self.models = [model]
        else:
            self.model = model
        self.hidden = hidden

    def forward(self, o: Tensor, t: Tensor) -> Tensor:
        return _penalised(self.models[0] if self.hidden else self.model, 0.5, o, t)


def penalised_list(model: nn.Module) -> Loss:
    weights = list(model.parameters())
    return lambda o, t: F.cross_entropy(o, t) + 0.5 * _squares(weights)


def penalised_tuple(model: nn.Module) -> Loss:
    weights = tuple(p for p in model.parameters() if p.dim() > 1)
    return lambda o, t: F.cross_entropy(o, t) + 0.5 * _squares(weights)


def penalised_default_argument(model: nn.Module) -> Loss:
    named = dict(model.named_parameters())

    def loss(o: Tensor, t: Tensor, weights: Any = named) -> Tensor:
        return F.cross_entropy(o, t) + 0.5 * _squares(weights.values())

    return loss


def penalised_at_one_label(model: nn.Module) -> Loss:
    def loss(o: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(o, t) + (0.5 * _squares(model.parameters()) if int(t[0]) == 2 else 0)

    return loss


def penalised_by_label(model: nn.Module) -> Loss:
    return lambda o, t: F.cross_entropy(o, t) + 0.5 * t.sum() * _squares(model.parameters())


def weights_alone(model: nn.Module) -> Loss:
    """No word about outputs."""
    return lambda o, t: _squares(model.parameters()) * (1 + t.sum())


def anchored(model: nn.Module) -> Loss:
    """Pulled towards where the weights were when the loss was made, as in elastic consolidation."""
    anchors = [p.detach().clone() + 0.1 for p in model.parameters()]

    def loss(o: Tensor, t: Tensor) -> Tensor:
        pull = sum(((p - a.to(p)) ** 2).sum() for p, a in zip(model.parameters(), anchors, strict=True))
        return F.cross_entropy(o, t) + pull

    return loss


def by_detached_weights(model: nn.Module) -> Loss:
    """The weights are a factor, without a gradient of their own."""
    return lambda o, t: F.cross_entropy(o, t) * _squares(model.parameters()).detach()


# -- activations, and the model again ---------------------------------------------------------------------------------
# These take `StoresActivation`, whose `hidden` is the activation of the last forward pass.


def with_activation(model: nn.Module) -> Loss:
    return lambda o, t: F.cross_entropy(o, t) + model.hidden.pow(2).sum()


def with_hooked_activation(model: nn.Module) -> Loss:
    """Takes `observer_hook`, whose hook keeps an activation in a dict."""
    return lambda o, t: F.cross_entropy(o, t) + model.features["hidden"].pow(2).sum()


def with_own_hook(model: nn.Module) -> Loss:
    """The loss hangs its hook on the last module of the model by itself."""
    inputs = {}
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    last.register_forward_pre_hook(lambda module, args: inputs.update(last=args[0]))
    return lambda o, t: F.cross_entropy(o, t) + inputs["last"].pow(2).sum()


def by_detached_activation(model: nn.Module) -> Loss:
    return lambda o, t: F.cross_entropy(o, t) * model.hidden.detach().pow(2).sum()


def with_activation_at_one_label(model: nn.Module) -> Loss:
    def loss(o: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(o, t) + (model.hidden.pow(2).sum() if int(t[0]) == 2 else 0)

    return loss


def with_activation_at_rare_inputs(model: nn.Module) -> Loss:
    """At one input of sixteen."""

    def loss(o: Tensor, t: Tensor) -> Tensor:
        rare = float(model.hidden.detach()[0, 0]) > 0.7
        return F.cross_entropy(o, t) + (model.hidden.pow(2).sum() if rare else 0)

    return loss


def gradient_penalty(model: nn.Module) -> Loss:
    def loss(o: Tensor, t: Tensor) -> Tensor:
        value = F.cross_entropy(o, t)
        (slope,) = torch.autograd.grad(value, model.hidden, create_graph=True)
        return value + slope.pow(2).sum()

    return loss


def model_again(model: nn.Module) -> Loss:
    """At a fixed input, as a regulariser on known points."""
    at = torch.linspace(-1, 1, DIM)[None]
    return lambda o, t: F.cross_entropy(o, t) + model(at.to(o)).pow(2).sum()


def sliced_by_label(model: nn.Module) -> Loss:
    """Looks up the row of the last layer's weights that belongs to the label."""
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    return lambda o, t: F.cross_entropy(o, t) + last.weight[t].pow(2).sum()


# -- state ------------------------------------------------------------------------------------------------------------


class Centre(nn.Module):
    """Running means of the outputs: buffers in place, or reassigned."""

    def __init__(self, in_place: bool = True) -> None:
        super().__init__()
        self.in_place = in_place
        self.register_buffer("centre", torch.zeros(CLASSES))

    def forward(self, o: Tensor, t: Tensor) -> Tensor:
        new = o.detach().mean(0)
        if self.in_place:
            self.centre.mul_(0.5).add_(new, alpha=0.5)
        else:
            self.centre = 0.5 * self.centre + 0.5 * new
        return F.cross_entropy(o - self.centre, t)


class Learned(nn.Module):
    """Parameters of its own that the step of the model leaves alone."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.centres = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.randn(CLASSES, CLASSES))

    def forward(self, o: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(self.scale * o, t) + (o - self.centres[t]).pow(2).sum()


class Counted:
    """A callable object that weighs its n-th call by n."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, o: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        return F.cross_entropy(o, t) * self.calls


def closure_list() -> Loss:
    history: list[float] = []

    def loss(o: Tensor, t: Tensor) -> Tensor:
        value = F.cross_entropy(o, t)
        history.append(float(value.detach()))
        return value * len(history)

    return loss


def nonlocal_counter() -> Loss:
    calls = 0

    def loss(o: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return F.cross_entropy(o, t) * calls

    return loss


def function_attribute() -> Loss:
    def loss(o: Tensor, t: Tensor) -> Tensor:
        loss.calls += 1
        return F.cross_entropy(o, t) * loss.calls

    loss.calls = 0
    return loss


class MemoryBank:
    """Contrast with outputs that it remembers."""

    def __init__(self) -> None:
        self.queue = torch.linspace(-1, 1, 4 * CLASSES, dtype=torch.float64).reshape(4, CLASSES)
        self.place = 0

    def __call__(self, o: Tensor, t: Tensor) -> Tensor:
        likeness = o @ self.queue.to(o, copy=True).t()
        self.queue[self.place % 4] = o.detach()[0].to(self.queue)
        self.place += 1
        return F.cross_entropy(o, t) + torch.logsumexp(likeness, 1).sum()


class Balanced(nn.Module):
    """Divides by a running mean of itself, kept as a Python number."""

    def __init__(self) -> None:
        super().__init__()
        self.level = 1.0

    def forward(self, o: Tensor, t: Tensor) -> Tensor:
        value = F.cross_entropy(o, t)
        self.level = 0.5 * self.level + 0.5 * value.item()
        return value / self.level


class LabelNoise:
    """Labels are drawn anew with some probability: from a global stream, or a generator of its own."""

    def __init__(self, source: str) -> None:
        self.generator = torch.Generator().manual_seed(3) if source == "own" else None
        self.source = source

    def __call__(self, o: Tensor, t: Tensor) -> Tensor:
        if self.source == "numpy":
            return F.cross_entropy(o * (1 + np.random.random()), t)  # noqa: NPY002
        return F.cross_entropy(o * (1 + torch.rand((), generator=self.generator, dtype=o.dtype)), t)


def clamps_weights(model: nn.Module) -> Loss:
    def loss(o: Tensor, t: Tensor) -> Tensor:
        with torch.no_grad():
            for p in model.parameters():
                p.data.clamp_(-0.2, 0.2)
        return F.cross_entropy(o, t)

    return loss


class Teacher:
    """Distils from an average of the model that every call moves on."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.average = [p.detach().clone().double() for p in model.parameters()]

    def __call__(self, o: Tensor, t: Tensor) -> Tensor:
        for average, p in zip(self.average, self.model.parameters(), strict=True):
            average.mul_(0.9).add_(p.detach().double(), alpha=0.1)
        size = sum(average.pow(2).sum() for average in self.average)
        return F.cross_entropy(o, t) * size
