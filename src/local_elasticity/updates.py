"""The probe update: which step is taken at x (spec srel 1.1, 1.7). An update turns a gradient into stepped weights."""

from __future__ import annotations

import copy
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from local_elasticity.errors import InputError, nearest

Parameters = Mapping[str, nn.Parameter]


class Step(ABC):
    """An update bound to the weights of one model: what it makes of a gradient.

    Attributes:
        weights: the weights before the step, one tensor a trainable parameter; never written.
        elementwise: whether ``stepped`` and ``direction`` are pure functions that ``torch.func.vmap`` can batch.
        loss_scale: what the loss is multiplied with before its gradient is taken; the step divides by it.
    """

    elementwise = True
    loss_scale = 1.0

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self.weights = [weight.detach() for weight in weights]

    @abstractmethod
    def stepped(self, index: int, weight: Tensor, gradient: Tensor) -> Tensor:
        """The weight after the step; ``gradient`` may carry leading batch dimensions under vmap."""

    @abstractmethod
    def direction(self, index: int, weight: Tensor, gradient: Tensor) -> Tensor:
        """The step itself, weight after minus weight before, free of cancellation."""

    def write(self, gradients: Sequence[Tensor | None], out: Sequence[Tensor]) -> None:
        """Write the stepped weights into ``out``; a parameter without gradient stays, as in ``torch.optim``."""
        for index, (weight, gradient) in enumerate(zip(self.weights, gradients, strict=True)):
            if gradient is None:
                out[index].copy_(weight)
            else:
                self._write_one(index, weight, gradient, out[index])

    def _write_one(self, index: int, weight: Tensor, gradient: Tensor, out: Tensor) -> None:
        out.copy_(self.stepped(index, weight, gradient))

    def affine(self) -> tuple[list[float], list[Tensor] | None] | None:
        """The step as factor x gradient + a direction common to all sources; None where it is no such step.

        Returns:
            A factor for each parameter, and the common directions (None where there are none).
        """
        return None

    def narrowed(self, parts: Mapping[int, tuple[slice, ...]]) -> Step:
        """The same step on parts of some weights, by index; for elementwise steps only."""
        other = copy.copy(self)
        other.weights = [
            weight[parts[index]].contiguous() if index in parts else weight for index, weight in enumerate(self.weights)
        ]
        return other

    def directions(self, gradients: Sequence[Tensor | None]) -> list[Tensor]:
        """All directions of one source, zeros where a parameter got no gradient."""
        return [
            torch.zeros_like(weight) if gradient is None else self.direction(index, weight, gradient)
            for index, (weight, gradient) in enumerate(zip(self.weights, gradients, strict=True))
        ]


class Update(ABC):
    """What kind of step is taken at a source; ``bind`` ties it to the weights of one model."""

    @property
    @abstractmethod
    def name(self) -> str:
        """How tables and runs call this update, in the command line's grammar."""

    @abstractmethod
    def bind(self, parameters: Parameters, originals: Parameters | None = None) -> Step:
        """Tie the update to the trainable parameters of a model.

        Args:
            parameters: name -> parameter to step from.
            originals: the same names on the model that a live optimiser knows, when measuring on a converted copy.
        """


def _check_rate(name: str, value: float) -> None:
    if not value >= 0 or value == float("inf"):
        raise InputError(expected=f"{name} >= 0 and finite", got=f"{name}={value}", do=f"pass a usable {name}")


@dataclass(frozen=True)
class SGD(Update):
    """One step of plain gradient descent, w+ = w - lr (g + weight_decay w)."""

    lr: float
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        """Refuse rates that are no rates."""
        _check_rate("lr", self.lr)
        _check_rate("weight_decay", self.weight_decay)

    @property
    def name(self) -> str:
        """For example ``sgd:0.01``."""
        return f"sgd:{self.lr:g}"

    def bind(self, parameters: Parameters, originals: Parameters | None = None) -> Step:
        """See ``Update.bind``."""
        return _PlainSGD(list(parameters.values()), self)


class _PlainSGD(Step):
    def __init__(self, weights: Sequence[Tensor], rule: SGD) -> None:
        super().__init__(weights)
        self.rule = rule

    def _gradient(self, weight: Tensor, gradient: Tensor) -> Tensor:
        decay = self.rule.weight_decay
        return gradient.add(weight, alpha=decay) if decay else gradient

    def stepped(self, index: int, weight: Tensor, gradient: Tensor) -> Tensor:
        return torch.add(weight, self._gradient(weight, gradient), alpha=-self.rule.lr)

    def direction(self, index: int, weight: Tensor, gradient: Tensor) -> Tensor:
        return -self.rule.lr * self._gradient(weight, gradient)

    def affine(self) -> tuple[list[float], list[Tensor] | None]:
        decay = [-self.rule.lr * self.rule.weight_decay * weight for weight in self.weights]
        return [-self.rule.lr] * len(self.weights), decay if self.rule.weight_decay else None

    def _write_one(self, index: int, weight: Tensor, gradient: Tensor, out: Tensor) -> None:
        torch.add(weight, self._gradient(weight, gradient), alpha=-self.rule.lr, out=out)


@dataclass(frozen=True)
class Adam(Update):
    """The first step of a fresh Adam (spec srel 0.5): w+ = w - lr g / (|g| + eps), with g + weight_decay w for g.

    Bias correction cancels the betas at the first step exactly; they are kept because they name the optimiser.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        """Refuse rates that are no rates."""
        _check_rate("lr", self.lr)
        _check_rate("eps", self.eps)
        _check_rate("weight_decay", self.weight_decay)

    @property
    def name(self) -> str:
        """For example ``adam:0.0001``."""
        return f"adam:{self.lr:g}"

    def bind(self, parameters: Parameters, originals: Parameters | None = None) -> Step:
        """See ``Update.bind``."""
        return _FreshAdam(list(parameters.values()), self)


class _FreshAdam(Step):
    def __init__(self, weights: Sequence[Tensor], rule: Adam) -> None:
        super().__init__(weights)
        self.rule = rule

    def _gradient(self, weight: Tensor, gradient: Tensor) -> Tensor:
        decay = self.rule.weight_decay
        return gradient.add(weight, alpha=decay) if decay else gradient

    def stepped(self, index: int, weight: Tensor, gradient: Tensor) -> Tensor:
        gradient = self._gradient(weight, gradient)
        return torch.addcdiv(weight, gradient, gradient.abs() + self.rule.eps, value=-self.rule.lr)

    def direction(self, index: int, weight: Tensor, gradient: Tensor) -> Tensor:
        gradient = self._gradient(weight, gradient)
        return -self.rule.lr * gradient / (gradient.abs() + self.rule.eps)

    def _write_one(self, index: int, weight: Tensor, gradient: Tensor, out: Tensor) -> None:
        # The denominator is built where the result goes: no temporary, one pass less over memory.
        gradient = self._gradient(weight, gradient)
        torch.abs(gradient, out=out)
        out.add_(self.rule.eps)
        torch.addcdiv(weight, gradient, out, value=-self.rule.lr, out=out)


@dataclass(frozen=True)
class _Live(Update):
    optimizer: torch.optim.Optimizer

    @property
    def name(self) -> str:
        return "optimizer"

    def bind(self, parameters: Parameters, originals: Parameters | None = None) -> Step:
        originals = parameters if originals is None else originals
        owned = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        if not any(id(p) in owned for p in originals.values()):
            raise InputError(
                expected="an optimiser that holds parameters of this model",
                got=f"{type(self.optimizer).__name__} without any of them",
                do="build the optimiser from model.parameters() and pass that one",
            )
        _warn_of_hooks(self.optimizer)
        rule = _fast_rule(self.optimizer)
        if rule is None:
            return _Shadow(parameters, originals, self.optimizer)
        return rule(parameters, originals, self.optimizer, owned)


def from_optimizer(optimizer: torch.optim.Optimizer) -> Update:
    """The very next step that this live optimiser would take on a gradient; its state is read, never written.

    SGD, Adam and AdamW in their plain form go by formulas that equal ``torch.optim`` bit for bit; any other setting or
    class of ``torch.optim`` runs as a copy of the optimiser. Step hooks of the optimiser are not run.

    Args:
        optimizer: the optimiser of the training loop.

    Raises:
        InputError: for what is no ``torch.optim.Optimizer``, or one whose step needs a closure (LBFGS).
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InputError(
            expected="a torch.optim.Optimizer", got=type(optimizer).__name__, do="pass the optimiser of your loop"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise InputError(
            expected="an optimiser whose step needs only a gradient",
            got="LBFGS, whose step calls a closure",
            do="use le.SGD(lr) or le.Adam(lr) as the probe update",
        )
    return _Live(optimizer)


def _warn_of_hooks(optimizer: torch.optim.Optimizer) -> None:
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        warnings.warn("the optimiser's step hooks are not run by the probe update", stacklevel=4)


def _fast_rule(optimizer: torch.optim.Optimizer) -> type[_LiveRule] | None:
    """The formula that equals this optimiser bit for bit, or None where a copy must run instead."""
    rules: dict[type, type[_LiveRule]] = {
        torch.optim.SGD: _LiveSGD,
        torch.optim.Adam: _LiveAdam,
        torch.optim.AdamW: _LiveAdam,
    }
    rule = rules.get(type(optimizer))
    unusual = ("maximize", "amsgrad", "foreach", "fused", "capturable", "differentiable")
    for group in optimizer.param_groups:
        numbers = [group["lr"], group.get("weight_decay", 0), *group.get("betas", ())]
        if any(group.get(key) for key in unusual) or any(isinstance(x, Tensor) for x in numbers):
            return None
        # On an accelerator torch.optim takes its multi-tensor form by default: there the copy runs the same form.
        if any(p.device.type != "cpu" or p.is_complex() for p in group["params"]):
            return None
    return rule


class _LiveRule(Step):
    """Shared part of the formulas for live optimisers: per parameter its group and its state."""

    def __init__(
        self, parameters: Parameters, originals: Parameters, optimizer: torch.optim.Optimizer, owned: dict[int, Any]
    ) -> None:
        super().__init__(list(parameters.values()))
        self.groups = [owned.get(id(p)) for p in originals.values()]
        self.decoupled = isinstance(optimizer, torch.optim.AdamW)
        self.states = [
            {key: _like(key, value, weight) for key, value in optimizer.state.get(original, {}).items()}
            for original, weight in zip(originals.values(), self.weights, strict=True)
        ]

    def stepped(self, index: int, weight: Tensor, gradient: Tensor) -> Tensor:
        group = self.groups[index]
        return weight if group is None else self._stepped(weight, gradient, group, self.states[index])

    def direction(self, index: int, weight: Tensor, gradient: Tensor) -> Tensor:
        group = self.groups[index]
        if group is None:
            return torch.zeros_like(weight)
        return self._direction(weight, gradient, group, self.states[index])

    def narrowed(self, parts: Mapping[int, tuple[slice, ...]]) -> Step:
        other = super().narrowed(parts)
        assert isinstance(other, _LiveRule)
        other.states = [
            {key: _part(value, self.weights[index], parts.get(index)) for key, value in state.items()}
            for index, state in enumerate(self.states)
        ]
        return other

    @abstractmethod
    def _stepped(self, weight: Tensor, gradient: Tensor, group: dict[str, Any], state: dict[str, Any]) -> Tensor: ...

    @abstractmethod
    def _direction(self, weight: Tensor, gradient: Tensor, group: dict[str, Any], state: dict[str, Any]) -> Tensor: ...


def _like(key: str, value: Any, weight: Tensor) -> Any:
    """A state tensor on the dtype and device of its weight (a no-op unless measuring on a converted copy)."""
    # Counters are scalars of torch.optim's own dtype and device: a scalar weight must not claim them.
    if isinstance(value, Tensor) and value.shape == weight.shape and key not in ("step", "mu_product", "eta", "mu"):
        return value.detach().to(weight)
    return value


def _part(value: Any, weight: Tensor, part: tuple[slice, ...] | None) -> Any:
    """The part of a state tensor that belongs to a part of its weight."""
    if part is None or not isinstance(value, Tensor) or value.shape != weight.shape:
        return value
    return value[part].contiguous()


class _LiveSGD(_LiveRule):
    """SGD with momentum, dampening, Nesterov and weight decay, in the order of operations of torch.optim."""

    def _descent(self, weight: Tensor, gradient: Tensor, group: dict[str, Any], state: dict[str, Any]) -> Tensor:
        if group["weight_decay"] != 0:
            gradient = gradient.add(weight, alpha=group["weight_decay"])
        momentum = group["momentum"]
        if momentum == 0:
            return gradient
        buffer = state.get("momentum_buffer")
        buffer = gradient if buffer is None else buffer.mul(momentum).add(gradient, alpha=1 - group["dampening"])
        return gradient.add(buffer, alpha=momentum) if group["nesterov"] else buffer

    def _stepped(self, weight: Tensor, gradient: Tensor, group: dict[str, Any], state: dict[str, Any]) -> Tensor:
        return weight.add(self._descent(weight, gradient, group, state), alpha=-group["lr"])

    def _direction(self, weight: Tensor, gradient: Tensor, group: dict[str, Any], state: dict[str, Any]) -> Tensor:
        return -group["lr"] * self._descent(weight, gradient, group, state)

    def affine(self) -> tuple[list[float], list[Tensor] | None]:
        factors = []
        for group, state in zip(self.groups, self.states, strict=True):
            if group is None:
                factors.append(0.0)
                continue
            momentum, started = group["momentum"], state.get("momentum_buffer") is not None
            kept = (1 - group["dampening"] if started else 1.0) if momentum else 1.0
            factors.append(-group["lr"] * (1 + momentum * kept if momentum and group["nesterov"] else kept))
        common = [self.direction(i, weight, torch.zeros_like(weight)) for i, weight in enumerate(self.weights)]
        return factors, common if any(bool(direction.any()) for direction in common) else None


class _LiveAdam(_LiveRule):
    """Adam and AdamW, in the order of operations of torch.optim's single-tensor form."""

    def _parts(
        self, weight: Tensor, gradient: Tensor, group: dict[str, Any], state: dict[str, Any]
    ) -> tuple[Tensor, Tensor, float]:
        beta1, beta2 = group["betas"]
        step = float(state.get("step", 0)) + 1
        zero = torch.zeros_like(weight)
        mean = torch.lerp(state.get("exp_avg", zero), gradient, 1 - beta1)
        square = state.get("exp_avg_sq", zero).mul(beta2).addcmul(gradient, gradient, value=1 - beta2)
        denominator = (square.sqrt() / (1 - beta2**step) ** 0.5).add(group["eps"])
        return mean, denominator, group["lr"] / (1 - beta1**step)

    def _is_decoupled(self, group: dict[str, Any]) -> bool:
        return self.decoupled or bool(group.get("decoupled_weight_decay", False))

    def _stepped(self, weight: Tensor, gradient: Tensor, group: dict[str, Any], state: dict[str, Any]) -> Tensor:
        decay = group["weight_decay"]
        if decay != 0 and self._is_decoupled(group):
            weight = weight.mul(1 - group["lr"] * decay)
        elif decay != 0:
            gradient = gradient.add(weight, alpha=decay)
        mean, denominator, size = self._parts(weight, gradient, group, state)
        return weight.addcdiv(mean, denominator, value=-size)

    def _direction(self, weight: Tensor, gradient: Tensor, group: dict[str, Any], state: dict[str, Any]) -> Tensor:
        decay, extra = group["weight_decay"], 0.0
        if decay != 0 and self._is_decoupled(group):
            extra = -group["lr"] * decay * weight
        elif decay != 0:
            gradient = gradient.add(weight, alpha=decay)
        mean, denominator, size = self._parts(weight, gradient, group, state)
        return -size * mean / denominator + extra


class _Shadow(Step):
    """Any other optimiser: a copy of it steps on buffers, and its state is reset before every source."""

    elementwise = False

    def __init__(self, parameters: Parameters, originals: Parameters, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(list(parameters.values()))
        self.buffers = [nn.Parameter(weight.clone()) for weight in self.weights]
        self.state = {
            buffer: {key: _like(key, value, weight) for key, value in optimizer.state[original].items()}
            for buffer, original, weight in zip(self.buffers, originals.values(), self.weights, strict=True)
            if original in optimizer.state
        }
        self.copy = _copy_optimizer(optimizer, dict(zip(map(id, originals.values()), self.buffers, strict=True)))

    def _run(self, gradients: Sequence[Tensor | None]) -> None:
        with torch.no_grad():
            for buffer, weight, gradient in zip(self.buffers, self.weights, gradients, strict=True):
                buffer.data.copy_(weight)
                buffer.grad = gradient
        self.copy.state.clear()
        self.copy.state.update({buffer: _fresh(state) for buffer, state in self.state.items()})
        try:
            with torch.enable_grad():
                self.copy.step()
        except (RuntimeError, TypeError, ValueError) as error:
            raise InputError(
                expected="an optimiser that can step on dense gradients without a closure",
                got=f"{type(self.copy).__name__}: {error}",
                do="use le.SGD(lr) or le.Adam(lr) as the probe update",
            ) from error

    def write(self, gradients: Sequence[Tensor | None], out: Sequence[Tensor]) -> None:
        self._run(gradients)
        for stepped, buffer in zip(out, self.buffers, strict=True):
            stepped.copy_(buffer.detach())

    def directions(self, gradients: Sequence[Tensor | None]) -> list[Tensor]:
        self._run(gradients)
        return [buffer.detach() - weight for buffer, weight in zip(self.buffers, self.weights, strict=True)]

    def stepped(self, index: int, weight: Tensor, gradient: Tensor) -> Tensor:
        raise TypeError("a copied optimiser steps on all parameters at once: call write()")

    def direction(self, index: int, weight: Tensor, gradient: Tensor) -> Tensor:
        raise TypeError("a copied optimiser steps on all parameters at once: call directions()")


def _fresh(state: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
        for key, value in state.items()
    }


def _copy_optimizer(optimizer: torch.optim.Optimizer, buffers: dict[int, nn.Parameter]) -> torch.optim.Optimizer:
    """A copy whose parameters are the buffers; built anew, because schedulers patch ``step`` on the live instance."""
    groups = []
    for group in optimizer.param_groups:
        kept = [buffers[id(p)] for p in group["params"] if id(p) in buffers]
        rest = {key: copy.deepcopy(value) for key, value in group.items() if key not in ("params", "param_names")}
        if kept:
            groups.append({"params": kept, **rest})
    shadow = type(optimizer).__new__(type(optimizer))
    torch.optim.Optimizer.__init__(shadow, groups, copy.deepcopy(optimizer.defaults))
    skipped = {"step", "state", "param_groups", "defaults", "profile_hook_step"}
    for key, value in vars(optimizer).items():
        if key not in skipped and key not in vars(shadow):
            setattr(shadow, key, copy.deepcopy(value))
    return shadow


def parse_update(text: str, optimizer: torch.optim.Optimizer | None = None) -> tuple[str, Update]:
    """Read the command line's grammar: ``sgd:LR``, ``adam:LR`` or ``optimizer``, with an optional ``NAME=`` before.

    Returns:
        The name and the update.

    Raises:
        InputError: for an unknown kind (with the nearest name), or a rate that is no number.
    """
    label, _, rule = text.rpartition("=")
    kind, _, rate = rule.partition(":")
    if kind == "optimizer" and not rate:
        if optimizer is None:
            raise InputError(
                expected="an update that needs no live optimiser (sgd:LR, adam:LR)",
                got="'optimizer' where nothing trains",
                do="name the step, for example sgd:0.01",
            )
        update: Update = from_optimizer(optimizer)
        return label or update.name, update
    kinds: dict[str, type[SGD] | type[Adam]] = {"sgd": SGD, "adam": Adam}
    if kind not in kinds:
        known = nearest(kind, [*kinds, "optimizer"])
        raise InputError(expected="sgd:LR, adam:LR or optimizer", got=f"update {text!r}", do=known)
    try:
        update = kinds[kind](lr=float(rate))
    except InputError:
        raise
    except ValueError:
        raise InputError(
            expected=f"a learning rate after '{kind}:'", got=repr(rate), do=f"write for example {kind}:1e-4"
        ) from None
    return label or update.name, update
