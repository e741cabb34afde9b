"""Losses of all replicas at once, and their gradients at the outputs.

Cross-entropy and squared error are written out; any other loss goes through ``torch.func``, or one replica at a time
where that cannot batch it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional

LossFunction = Callable[[Tensor, Tensor], Tensor]
Outputs = Float[Tensor, "replicas batch outputs"]
Labels = Shaped[Tensor, "replicas batch ..."]
Losses = Float[Tensor, " replicas"]
StackedLoss = Callable[[Outputs, Labels], tuple[Losses, Outputs]]
"""Gives the loss of every replica and its gradient at the outputs."""


def stacked_loss(loss_fn: LossFunction) -> StackedLoss:
    """The loss of every replica at once, equal to ``loss_fn`` on each."""
    if is_cross_entropy(loss_fn):
        return cross_entropy
    if is_squared_error(loss_fn):
        return squared_error
    return _Generic(loss_fn)


def is_cross_entropy(loss_fn: LossFunction) -> bool:
    """Whether it is PyTorch's cross-entropy with its defaults."""
    if loss_fn is functional.cross_entropy:
        return True
    return (
        isinstance(loss_fn, nn.CrossEntropyLoss)
        and type(loss_fn) is nn.CrossEntropyLoss
        and loss_fn.weight is None
        and loss_fn.ignore_index == -100
        and loss_fn.reduction == "mean"
        and loss_fn.label_smoothing == 0
    )


def is_squared_error(loss_fn: LossFunction) -> bool:
    """Whether it is PyTorch's mean squared error with its defaults."""
    if loss_fn is functional.mse_loss:
        return True
    return isinstance(loss_fn, nn.MSELoss) and type(loss_fn) is nn.MSELoss and loss_fn.reduction == "mean"


def cross_entropy(outputs: Outputs, labels: Labels) -> tuple[Losses, Outputs]:
    """Mean over the batch of -log softmax at the label; gradient (softmax - one-hot) / batch."""
    if labels.is_floating_point():  # probabilities instead of classes
        return _Generic(functional.cross_entropy)(outputs, labels)
    logs = torch.log_softmax(outputs, dim=2)
    index = labels.unsqueeze(2)
    losses = logs.gather(2, index).squeeze(2).mean(dim=1).neg_()
    gradient = logs.exp_()
    gradient.scatter_add_(2, index, gradient.new_full((1, 1, 1), -1.0).expand(index.shape))
    return losses, gradient if outputs.shape[1] == 1 else gradient.div_(outputs.shape[1])


def squared_error(outputs: Outputs, labels: Labels) -> tuple[Losses, Outputs]:
    """Mean of (output - label)^2 over batch and outputs."""
    difference = outputs - labels.reshape(outputs.shape)
    count = difference[0].numel()
    return difference.square().flatten(1).mean(dim=1), difference.mul_(2 / count)


class _Generic:
    """Any loss, by ``vmap``; one replica at a time once that has failed."""

    def __init__(self, loss_fn: LossFunction) -> None:
        self.loss_fn, self.batched = loss_fn, True

    def __call__(self, outputs: Outputs, labels: Labels) -> tuple[Losses, Outputs]:
        if self.batched:
            try:
                gradient, losses = torch.func.vmap(torch.func.grad_and_value(self.loss_fn))(outputs, labels)
                return losses.detach(), gradient.detach()
            except RuntimeError:
                self.batched = False
        pairs = [self._one(o, y) for o, y in zip(outputs, labels, strict=True)]
        return torch.stack([loss for loss, _ in pairs]), torch.stack([gradient for _, gradient in pairs])

    def _one(self, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = outputs.detach().requires_grad_()
            loss = self.loss_fn(leaf, labels)
            (gradient,) = torch.autograd.grad(loss, leaf)
        return loss.detach(), gradient
