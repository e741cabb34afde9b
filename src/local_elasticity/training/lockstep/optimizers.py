"""Optimisers over stacked weights (replica, ...): the formulas of ``torch.optim``, one replica a row.

A gradient comes dense, or as the two factors of a sum of outer products, which plain SGD adds in place without ever
forming it: for one sample a step that is the cheapest update there is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from local_elasticity.base.checks import check_choice, check_rate, check_real, in_words
from local_elasticity.base.errors import InputError


@dataclass(frozen=True)
class Rule:
    """How weights move.

    Attributes:
        optimizer: "sgd" or "adam".
        lr: learning rate.
        momentum: of "sgd", without dampening.
        weight_decay: added to the gradient as ``weight_decay`` times the weight.
        betas: of "adam".
        eps: of "adam".
    """

    optimizer: Literal["sgd", "adam"] = "sgd"
    lr: float = 0.01
    momentum: float = 0.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        """Refuse what cannot train."""
        check_choice("optimizer", self.optimizer, ("sgd", "adam"))
        for name in ("lr", "momentum", "weight_decay"):
            check_rate(name, getattr(self, name))
        if self.optimizer == "adam" and self.momentum:
            raise InputError(expected="momentum with 'sgd' only", got="'adam'", do="set betas instead")
        check_rate("eps", self.eps, zero=False)
        if not isinstance(self.betas, tuple | list) or len(self.betas) != 2:
            raise InputError(
                expected="betas: two numbers in [0, 1)", got=in_words(self.betas), do="write betas=(0.9, 0.999)"
            )
        for beta in self.betas:
            check_real("each of betas", beta, 0.0, 1.0, below=True)


class StackedOptimizer:
    """Moves stacked weights in place.

    Args:
        rule: how.
        weights: name -> (replica, ...) tensor, written in place.
    """

    def __init__(self, rule: Rule, weights: Mapping[str, Tensor]) -> None:
        self.rule, self.weights = rule, weights
        self.plain = rule.optimizer == "sgd" and not rule.momentum
        self.keep = 1 - rule.lr * rule.weight_decay  # what plain SGD with weight decay leaves of a weight
        self.steps = 0
        self.absent: set[tuple[str, int]] = set()  # weights (name, replica) that the last step did not reach
        moments = () if self.plain else ("velocity",) if rule.optimizer == "sgd" else ("mean", "square")
        self.moments = {kind: {name: torch.zeros_like(w) for name, w in weights.items()} for kind in moments}

    def begin(self) -> None:
        """Count a step, before its gradients come."""
        self.steps += 1

    def dense(self, name: str, gradient: Float[Tensor, "replicas ..."]) -> None:
        """Take the step along a gradient, which may be overwritten."""
        weight, rule = self.weights[name], self.rule
        if self.plain:
            if rule.weight_decay:
                weight.mul_(self.keep)
            weight.add_(gradient, alpha=-rule.lr)
            return
        if rule.weight_decay:
            gradient = gradient.add(weight, alpha=rule.weight_decay)
        if rule.optimizer == "sgd":
            velocity = self.moments["velocity"][name]
            velocity.mul_(rule.momentum).add_(gradient)
            weight.add_(velocity, alpha=-rule.lr)
            return
        (beta1, beta2), mean, square = rule.betas, self.moments["mean"][name], self.moments["square"][name]
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        scale = math.sqrt(1 - beta2**self.steps)
        weight.addcdiv_(mean, square.sqrt().div_(scale).add_(rule.eps), value=-rule.lr / (1 - beta1**self.steps))

    def outer(
        self, name: str, left: Float[Tensor, "replicas n rows"], right: Float[Tensor, "replicas n columns"]
    ) -> None:
        """Take the step along sum_n left_n right_n^T, the gradient of a weight (replica, rows, columns)."""
        if not self.plain:
            return self.dense(name, torch.bmm(left.transpose(1, 2), right))
        weight, lr = self.weights[name], self.rule.lr
        if left.shape[1] == 1:
            if self.rule.weight_decay:
                weight.mul_(self.keep)
            weight.addcmul_(left.transpose(1, 2), right, value=-lr)
        else:
            weight.baddbmm_(left.transpose(1, 2), right, beta=self.keep, alpha=-lr)
        return None

    @contextmanager
    def left_alone(self, absent: Sequence[tuple[str, int]]) -> Iterator[None]:
        """Let weights (name, replica) without gradient be as they were, after the step inside; as in ``torch.optim``.

        Raises:
            InputError: for "adam", which counts the steps of every weight by itself.
        """
        if self.rule.optimizer == "adam" and self.steps and set(absent) != self.absent:
            name, _ = min(set(absent) ^ self.absent)
            raise InputError(
                expected="weights that every batch reaches, or none, with optimizer='adam'",
                got=f"no gradient of {name!r} at some batches",
                do="let unused parts take part with the factor 0, or use optimizer='sgd'",
            )
        self.absent = set(absent)
        tensors = [held[name][i] for name, i in absent for held in (self.weights, *self.moments.values())]
        kept = [t.clone() for t in tensors]
        yield
        for t, before in zip(tensors, kept, strict=True):
            t.copy_(before)

    def state(self) -> dict[str, Tensor]:
        """Everything but the weights, by name."""
        return {f"{kind}.{name}": value for kind, part in self.moments.items() for name, value in part.items()}
