"""The probe update: which step is taken at x (spec srel 1.1, 1.7). An update turns a gradient into stepped weights."""

from __future__ import annotations

import copy
import inspect
import math
import sys
from abc import ABC, abstractmethod
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils._python_dispatch import TorchDispatchMode

from local_elasticity.base import streams
from local_elasticity.base.checks import check_rate, check_real, check_text, in_words
from local_elasticity.base.errors import USER_ERRORS, InputError, first_line, nearest
from local_elasticity.base.reach import Reach
from local_elasticity.base.tensors import check_optimizer

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
        if any(isinstance(weight, UninitializedParameter | UninitializedBuffer) for weight in weights):
            raise InputError(
                expected="parameters that have a shape",
                got="lazy parameters, not initialised yet",
                do="call the model once on a batch before building the optimiser and measuring",
            )
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

        Raises:
            InputError: for parameters that this update cannot step from.
        """


def _betas(value: Any) -> tuple[float, float]:
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise InputError(
            expected="two numbers for betas", got=f"betas={in_words(value)}", do="pass for example betas=(0.9, 0.999)"
        )
    first, second = (check_real(f"betas[{i}]", beta, 0.0, 1.0, below=True) for i, beta in enumerate(value))
    return first, second


def _dense(gradient: Tensor) -> Tensor:
    return gradient if gradient.layout == torch.strided else gradient.to_dense()


@dataclass(frozen=True)
class SGD(Update):
    """One step of plain gradient descent, w+ = w - lr (g + weight_decay w).

    Args:
        lr: the learning rate; 0 is the control that takes no step.
        weight_decay: the factor of w in the gradient.

    Raises:
        InputError: for rates that are no finite numbers >= 0.
    """

    lr: float
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        """Refuse rates that are no rates."""
        object.__setattr__(self, "lr", check_rate("lr", self.lr))
        object.__setattr__(self, "weight_decay", check_rate("weight_decay", self.weight_decay))

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
        return _dense(gradient).add(weight, alpha=decay) if decay else gradient

    def stepped(self, index: int, weight: Tensor, gradient: Tensor) -> Tensor:
        return torch.add(weight, self._gradient(weight, gradient), alpha=-self.rule.lr)

    def direction(self, index: int, weight: Tensor, gradient: Tensor) -> Tensor:
        return -self.rule.lr * _dense(self._gradient(weight, gradient))

    def affine(self) -> tuple[list[float], list[Tensor] | None]:
        decay = [-self.rule.lr * self.rule.weight_decay * weight for weight in self.weights]
        return [-self.rule.lr] * len(self.weights), decay if self.rule.weight_decay else None

    def _write_one(self, index: int, weight: Tensor, gradient: Tensor, out: Tensor) -> None:
        torch.add(weight, self._gradient(weight, gradient), alpha=-self.rule.lr, out=out)


@dataclass(frozen=True)
class Adam(Update):
    """The first step of a fresh Adam (spec srel 0.5): w+ = w - lr g / (|g| + eps), with g + weight_decay w for g.

    Bias correction cancels the betas at the first step exactly; they are kept because they name the optimiser. A
    complex weight is two real ones, as in ``torch.optim``. In 16 bits nothing cancels: there the step goes by
    ``torch.optim.Adam``'s operations, one by one.

    Args:
        lr: the learning rate.
        betas: of the running means.
        eps: added to the denominator.
        weight_decay: the factor of w in the gradient.

    Raises:
        InputError: for rates that are no finite numbers >= 0, and betas outside of [0, 1).
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        """Refuse rates that are no rates."""
        object.__setattr__(self, "lr", check_rate("lr", self.lr))
        object.__setattr__(self, "betas", _betas(self.betas))
        object.__setattr__(self, "eps", check_rate("eps", self.eps))
        object.__setattr__(self, "weight_decay", check_rate("weight_decay", self.weight_decay))

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
        self.group = {"lr": rule.lr, "betas": rule.betas, "eps": rule.eps}

    def _gradient(self, weight: Tensor, gradient: Tensor) -> Tensor:
        decay = self.rule.weight_decay
        gradient = _dense(gradient)
        return gradient.add(weight, alpha=decay) if decay else gradient

    def stepped(self, index: int, weight: Tensor, gradient: Tensor) -> Tensor:
        gradient = self._gradient(weight, gradient)
        if weight.is_complex():
            return torch.view_as_complex(self._moved(torch.view_as_real(weight.resolve_conj()), _as_real(gradient)))
        return self._moved(weight, gradient)

    def _moved(self, weight: Tensor, gradient: Tensor) -> Tensor:
        if weight.element_size() == 2:
            mean, denominator, size = _adam_parts(weight, gradient, self.group, {})
            return torch.addcdiv(weight, mean, denominator, value=-size)
        return torch.addcdiv(weight, gradient, gradient.abs() + self.rule.eps, value=-self.rule.lr)

    def direction(self, index: int, weight: Tensor, gradient: Tensor) -> Tensor:
        gradient = self._gradient(weight, gradient)
        if weight.is_complex():
            return torch.view_as_complex(self._along(_as_real(gradient)))
        return self._along(gradient)

    def _along(self, gradient: Tensor) -> Tensor:
        return -self.rule.lr * gradient / (gradient.abs() + self.rule.eps)

    def _write_one(self, index: int, weight: Tensor, gradient: Tensor, out: Tensor) -> None:
        if weight.is_complex() or weight.element_size() == 2:
            out.copy_(self.stepped(index, weight, gradient))
            return
        # The denominator is built where the result goes: no temporary, one pass less over memory.
        gradient = self._gradient(weight, gradient)
        torch.abs(gradient, out=out)
        out.add_(self.rule.eps)
        torch.addcdiv(weight, gradient, out, value=-self.rule.lr, out=out)


def _as_real(x: Tensor) -> Tensor:
    return torch.view_as_real(x.resolve_conj())


@dataclass(frozen=True)
class _Live(Update):
    optimizer: torch.optim.Optimizer
    clip_grad_norm: float | None = None
    clip_grad_value: float | None = None
    scaler: torch.amp.GradScaler | None = None

    @property
    def name(self) -> str:
        return "optimizer"

    def bind(self, parameters: Parameters, originals: Parameters | None = None) -> Step:
        _check_optimizer(self.optimizer)
        originals = parameters if originals is None else originals
        owned = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        if not any(id(p) in owned for p in originals.values()):
            raise InputError(
                expected="an optimiser that holds parameters of this model",
                got=f"{type(self.optimizer).__name__} without any of them",
                do="build the optimiser from model.parameters() and pass that one",
            )
        rule = _fast_rule(self.optimizer) or _Shadow
        step = rule(list(parameters.values()), list(originals.values()), self.optimizer)
        is_scaled = self.scaler is not None and self.scaler.is_enabled()
        if self.clip_grad_norm is None and self.clip_grad_value is None and not is_scaled:
            return step
        return _LoopStep(step, self, [(p, id(p) in owned) for p in originals.values()])


def from_optimizer(
    optimizer: torch.optim.Optimizer,
    clip_grad_norm: float | None = None,
    clip_grad_value: float | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> Update:
    """The very next step that this live optimiser would take on a gradient; its state is read, never written.

    SGD, Adam and AdamW in their plain form go by formulas that equal ``torch.optim`` bit for bit; any other setting or
    class runs as a copy of the optimiser, made anew for every source.

    What the loop does between ``backward()`` and ``step()`` is done too, in the usual order: unscale, look for infinite
    gradients, clip.

    Args:
        optimizer: the optimiser of the training loop.
        clip_grad_norm: ``max_norm`` of the loop's ``torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)``: the
            2-norm over all trainable parameters of the model, those that the optimiser does not hold among them.
        clip_grad_value: ``clip_value`` of the loop's ``torch.nn.utils.clip_grad_value_``.
        scaler: the loop's ``torch.amp.GradScaler``: the loss is multiplied with its present scale and the gradients are
            divided by it; where one of them is infinite or NaN, the step is skipped. The scaler is not written.

    Returns:
        The update.

    Raises:
        InputError: for what is no ``torch.optim.Optimizer``; one whose step needs a closure (LBFGS), is distributed,
            was replaced on the instance or runs hooks; clips that are no numbers >= 0, or both; a scaler that is none.

    Examples:
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> from_optimizer(optimizer, clip_grad_norm=1.0).name
        'optimizer'
    """
    _check_optimizer(optimizer)
    if clip_grad_norm is not None and clip_grad_value is not None:
        raise InputError(
            expected="one way of clipping",
            got="clip_grad_norm and clip_grad_value",
            do="pass the one that your loop uses",
        )
    if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
        raise InputError(
            expected="a torch.amp.GradScaler for scaler",
            got=in_words(scaler),
            do="pass the scaler of your loop, or None",
        )
    norm, value = _clip("clip_grad_norm", clip_grad_norm), _clip("clip_grad_value", clip_grad_value)
    return _Live(optimizer, norm, value, scaler)


def _clip(name: str, value: Any) -> float | None:
    is_none = value is None or (isinstance(value, float) and value == math.inf)  # loops clip at inf to log the norm
    return None if is_none else check_rate(name, value)


def _check_optimizer(optimizer: Any) -> None:
    check_optimizer("optimizer", optimizer)
    kind = type(optimizer)
    if isinstance(optimizer, torch.optim.LBFGS):
        raise InputError(
            expected="an optimiser whose step needs only a gradient",
            got="LBFGS, whose step calls a closure",
            do="use le.SGD(lr) or le.Adam(lr) as the probe update",
        )
    if any(base.__module__.startswith("torch.distributed") for base in kind.__mro__):
        raise InputError(
            expected="an optimiser that steps in one process",
            got=f"{kind.__name__}, whose step speaks to other processes",
            do="use le.SGD(lr) or le.Adam(lr) as the probe update",
        )
    step = vars(optimizer).get("step")
    is_patched_by_scheduler = hasattr(step, "_wrapped_by_lr_sched") and getattr(step, "__wrapped__", None) is kind.step
    if step is not None and not is_patched_by_scheduler:
        raise InputError(
            expected="an optimiser that steps as its class does",
            got=f"a {kind.__name__} whose step was replaced on the instance",
            do="make a subclass of it with that step, or take the replacement off while measuring",
        )
    _check_step_hooks(optimizer)


def _check_step_hooks(optimizer: torch.optim.Optimizer) -> None:
    """Refuse step hooks: what they do to gradients or weights belongs to the step, and may reach anything else."""
    module = sys.modules[torch.optim.Optimizer.__module__]
    kinds = [getattr(module, f"_global_optimizer_{when}_hooks") for when in ("pre", "post")]
    for each in _optimizers_in(optimizer, set()):
        kinds += [getattr(each, f"_optimizer_step_{when}_hooks", {}) for when in ("pre", "post")]  # wrappers have none
    hooks = [hook for kind in kinds for hook in kind.values()]
    users = [hook for hook in hooks if not str(getattr(hook, "__module__", "")).startswith("torch.")]
    if users:
        name = getattr(users[0], "__qualname__", type(users[0]).__name__)
        raise InputError(
            expected="an optimiser without step hooks",
            got=f"a {type(optimizer).__name__} whose step runs the hook {name}",
            do="do in the loop what the hook does, or in the step of a subclass of the optimiser",
        )


class _LoopStep(Step):
    """What a loop does to the gradients before its optimiser steps: unscale, skip what is not finite, clip."""

    def __init__(self, step: Step, loop: _Live, originals: Sequence[tuple[nn.Parameter, bool]]) -> None:
        super().__init__(step.weights)
        self.step, self.loop = step, loop
        self.weights = step.weights  # one list: who refreshes it, refreshes both
        self.is_owned = [is_owned for _, is_owned in originals]
        self.is_scaled = loop.scaler is not None and loop.scaler.is_enabled()
        self.elementwise = step.elementwise and loop.clip_grad_norm is None and not self.is_scaled
        self._check([p for p, _ in originals])
        if self.is_scaled:
            assert loop.scaler is not None
            self.loss_scale = float(loop.scaler.get_scale())
            # As in torch, whose scale is a float32: the reciprocal by way of float64.
            self.inverse_scale = float(
                torch.tensor(self.loss_scale, dtype=torch.float64, device="cpu").reciprocal().float()
            )

    def _check(self, originals: Sequence[nn.Parameter]) -> None:
        has_complex = any(p.is_complex() for p in originals)
        if has_complex and self.loop.clip_grad_value is not None:
            raise InputError(
                expected="real parameters with clip_grad_value, as in torch.nn.utils.clip_grad_value_",
                got="complex ones",
                do="use clip_grad_norm",
            )
        if not self.is_scaled:
            return
        if has_complex or any(p.dtype == torch.float16 for p in originals):
            raise InputError(
                expected="parameters that torch.amp.GradScaler can unscale the gradients of",
                got="complex ones" if has_complex else "float16 ones",
                do="keep the weights in float32 and use torch.autocast, or leave scaler out",
            )
        if self.loop.clip_grad_norm is not None and not all(self.is_owned):
            raise InputError(
                expected="all trainable parameters in the optimiser, where a scaler unscales what a norm is taken of",
                got=f"{self.is_owned.count(False)} that it does not hold, whose gradients stay scaled",
                do="freeze them with requires_grad_(False), or leave scaler or clip_grad_norm out",
            )

    def _prepared(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None] | None:
        """The gradients as the optimiser gets them; None where the step is skipped."""
        prepared = list(gradients)
        if self.is_scaled:
            prepared = [
                g if g is None or not is_owned else g * self.inverse_scale
                for g, is_owned in zip(prepared, self.is_owned, strict=True)
            ]
            if not all(
                g is None or _is_finite(g) for g, is_owned in zip(prepared, self.is_owned, strict=True) if is_owned
            ):
                return None
        limit = self.loop.clip_grad_norm
        if limit is not None:
            return self._clipped(prepared, partial(nn.utils.clip_grad_norm_, max_norm=limit))
        limit = self.loop.clip_grad_value
        return (
            prepared if limit is None else self._clipped(prepared, partial(nn.utils.clip_grad_value_, clip_value=limit))
        )

    def _clipped(self, gradients: list[Tensor | None], clip: Callable[[list[Tensor]], Any]) -> list[Tensor | None]:
        """What torch's own function makes of copies of the gradients, each laid out like its weight, as in a loop."""
        if any(g is not None and g.layout != torch.strided for g in gradients):
            raise InputError(
                expected="dense gradients, which torch.nn.utils can clip",
                got="sparse ones",
                do="make the embedding with sparse=False, or leave the clipping out as your loop must",
            )
        holders = [weight.detach() for weight in self.weights]
        for holder, gradient in zip(holders, gradients, strict=True):
            if gradient is not None:
                holder.grad = _own_gradient(gradient, holder)
        with_gradient = [holder for holder in holders if holder.grad is not None]
        if with_gradient:
            clip(with_gradient)
        return [holder.grad for holder in holders]

    def write(self, gradients: Sequence[Tensor | None], out: Sequence[Tensor]) -> None:
        prepared = self._prepared(gradients)
        self.step.write([None] * len(gradients) if prepared is None else prepared, out)

    def directions(self, gradients: Sequence[Tensor | None]) -> list[Tensor]:
        prepared = self._prepared(gradients)
        return self.step.directions([None] * len(gradients) if prepared is None else prepared)

    def stepped(self, index: int, weight: Tensor, gradient: Tensor) -> Tensor:
        return self.step.stepped(index, weight, self._clamped(gradient))

    def direction(self, index: int, weight: Tensor, gradient: Tensor) -> Tensor:
        return self.step.direction(index, weight, self._clamped(gradient))

    def _clamped(self, gradient: Tensor) -> Tensor:
        limit = self.loop.clip_grad_value
        if limit is None or not self.elementwise:
            raise TypeError("this step looks at all gradients at once: call write() or directions()")
        return gradient.clamp(-limit, limit)

    def narrowed(self, parts: Mapping[int, tuple[slice, ...]]) -> Step:
        other = copy.copy(self)
        other.step = self.step.narrowed(parts)
        other.weights = other.step.weights
        return other


def _is_finite(gradient: Tensor) -> bool:
    values = gradient if gradient.layout == torch.strided else gradient._values()
    return bool(torch.isfinite(values).all())


def _own_gradient(gradient: Tensor, weight: Tensor) -> Tensor:
    """A copy laid out like the weight, as ``.grad`` is: gradients of autograd may share memory with one another."""
    if gradient.layout != torch.strided:
        return gradient.clone()
    return torch.empty_like(weight).copy_(gradient)


def _fast_rule(optimizer: torch.optim.Optimizer) -> type[_LiveRule] | None:
    """The formula that equals this optimiser bit for bit, or None where a copy must run instead."""
    rules: dict[type, type[_LiveRule]] = {
        torch.optim.SGD: _LiveSGD,
        torch.optim.Adam: _LiveAdam,
        torch.optim.AdamW: _LiveAdam,
    }
    rule = rules.get(type(optimizer))
    if rule is None or not inspect.unwrap(type(optimizer).step).__module__.startswith("torch.optim."):
        return None
    unusual = ("maximize", "amsgrad", "foreach", "fused", "capturable", "differentiable")
    for group in optimizer.param_groups:
        if not group.keys() >= optimizer.defaults.keys():
            return None  # the real step has a word to say
        numbers = [group["lr"], group.get("weight_decay", 0), *group.get("betas", ())]
        if any(group.get(key) for key in unusual) or any(isinstance(x, Tensor) for x in numbers):
            return None
        # On an accelerator torch.optim takes its multi-tensor form by default: there the copy runs the same form.
        if any(p.device.type != "cpu" or p.is_complex() for p in group["params"]):
            return None
    if any(_is_unlike(value, p) for p, state in optimizer.state.items() for value in state.values()):
        return None
    return rule


def _is_unlike(value: Any, weight: Any) -> bool:
    """Whether part of a state is not laid out like its weight; a number is not meant to be."""
    if not isinstance(value, Tensor) or (value.dim() == 0 and value.layout == torch.strided):
        return False
    return _is_sparse(value) or value.shape != weight.shape or value.dtype != weight.dtype


def _is_sparse(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout != torch.strided


class _LiveRule(Step):
    """Shared part of the formulas for live optimisers: per parameter its group and its state."""

    def __init__(
        self, weights: Sequence[Tensor], originals: Sequence[Tensor], optimizer: torch.optim.Optimizer
    ) -> None:
        super().__init__(weights)
        owned = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        self.groups = [owned.get(id(p)) for p in originals]
        self.decoupled = isinstance(optimizer, torch.optim.AdamW)
        self.originals, self.optimizer = originals, optimizer
        self.states = _states(optimizer, originals, self.weights)

    def _copied(self) -> _Shadow:
        return _Shadow(self.weights, self.originals, self.optimizer, self.states)

    def write(self, gradients: Sequence[Tensor | None], out: Sequence[Tensor]) -> None:
        if any(map(_is_sparse, gradients)):
            return self._copied().write(gradients, out)
        return super().write(gradients, out)

    def directions(self, gradients: Sequence[Tensor | None]) -> list[Tensor]:
        if any(map(_is_sparse, gradients)):
            return self._copied().directions(gradients)
        return super().directions(gradients)

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


def _states(
    optimizer: torch.optim.Optimizer, originals: Sequence[Tensor], weights: Sequence[Tensor]
) -> list[dict[str, Any]]:
    """What the optimiser keeps of each parameter, in the dtype and on the device that is measured in."""
    return [
        {key: _like(key, value, original, weight) for key, value in optimizer.state.get(original, {}).items()}
        for original, weight in zip(originals, weights, strict=True)
    ]


def _like(key: str, value: Any, original: Tensor, weight: Tensor) -> Any:
    """A value of the optimiser's state; converted where the weight is, on the dtype and device of the weight."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    if (original.dtype, original.device) == (weight.dtype, weight.device):
        return value
    # Counters are scalars of torch.optim's own dtype and device: a scalar weight must not claim them.
    is_counter = value.dim() == 0 and (weight.dim() > 0 or key in ("step", "mu_product", "eta", "mu"))
    if is_counter or not (value.is_floating_point() or value.is_complex()):
        return value
    return value.to(
        weight.device, weight.dtype if value.is_complex() == weight.is_complex() else weight.dtype.to_real()
    )


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


def _adam_parts(
    weight: Tensor, gradient: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]
) -> tuple[Tensor, Tensor, float]:
    """The running mean, the denominator and the step size, as torch.optim's single-tensor form has them."""
    beta1, beta2 = group["betas"]
    step = float(state.get("step", 0)) + 1
    zero = torch.zeros_like(weight)
    mean = torch.lerp(state.get("exp_avg", zero), gradient, 1 - beta1)
    square = state.get("exp_avg_sq", zero).mul(beta2).addcmul(gradient, gradient, value=1 - beta2)
    denominator = (square.sqrt() / (1 - beta2**step) ** 0.5).add(group["eps"])
    return mean, denominator, group["lr"] / (1 - beta1**step)


class _LiveAdam(_LiveRule):
    """Adam and AdamW, in the order of operations of torch.optim's single-tensor form."""

    def _is_decoupled(self, group: dict[str, Any]) -> bool:
        return self.decoupled or bool(group.get("decoupled_weight_decay", False))

    def _stepped(self, weight: Tensor, gradient: Tensor, group: dict[str, Any], state: dict[str, Any]) -> Tensor:
        decay = group["weight_decay"]
        if decay != 0 and self._is_decoupled(group):
            weight = weight.mul(1 - group["lr"] * decay)
        elif decay != 0:
            gradient = gradient.add(weight, alpha=decay)
        mean, denominator, size = _adam_parts(weight, gradient, group, state)
        return weight.addcdiv(mean, denominator, value=-size)

    def _direction(self, weight: Tensor, gradient: Tensor, group: dict[str, Any], state: dict[str, Any]) -> Tensor:
        decay, extra = group["weight_decay"], 0.0
        if decay != 0 and self._is_decoupled(group):
            extra = -group["lr"] * decay * weight
        elif decay != 0:
            gradient = gradient.add(weight, alpha=decay)
        mean, denominator, size = _adam_parts(weight, gradient, group, state)
        return -size * mean / denominator + extra


class _Shadow(Step):
    """Any other optimiser: a copy of it, made anew for every source, steps on buffers."""

    elementwise = False

    def __init__(
        self,
        weights: Sequence[Tensor],
        originals: Sequence[Tensor],
        optimizer: torch.optim.Optimizer,
        states: list[dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(weights)
        self.originals, self.optimizer = originals, optimizer
        self.states = _states(optimizer, originals, self.weights) if states is None else states
        self.buffers = [nn.Parameter(weight.clone()) for weight in self.weights]
        self.shared = _shared_places(optimizer)

    def _run(self, gradients: Sequence[Tensor | None]) -> None:
        with torch.no_grad():
            for buffer, weight, gradient in zip(self.buffers, self.weights, gradients, strict=True):
                buffer.data.copy_(weight)
                buffer.grad = None if gradient is None else _own_gradient(gradient, buffer)
        if all(gradient is None for gradient in gradients):
            return
        try:
            copied = _copy_optimizer(self.optimizer, self._memo())
        except USER_ERRORS as error:
            raise InputError(
                expected="an optimiser that can be copied",
                got=f"{type(self.optimizer).__name__}: {first_line(error)}",
                do="use le.SGD(lr) or le.Adam(lr) as the probe update",
            ) from error
        live = [] if _is_of_torch(self.optimizer) else [p.detach() for p in self.originals]
        contents = [p.clone() for p in live]
        try:
            with torch.enable_grad():
                _step_without_hooks(copied)
        except InputError:
            raise
        except USER_ERRORS as error:
            raise InputError(
                expected="an optimiser that can step on these gradients without a closure",
                got=f"{type(self.optimizer).__name__}: {first_line(error)}",
                do="use le.SGD(lr) or le.Adam(lr) as the probe update",
            ) from error
        finally:
            for place in self.shared:
                if place.moved():
                    place.restore()
            _put_back(live, contents)

    def _memo(self) -> dict[int, Any]:
        """Stand-ins for ``copy.deepcopy``: a buffer for every weight, a copy for all that is kept of it."""
        memo: dict[int, Any] = {id(p): buffer for p, buffer in zip(self.originals, self.buffers, strict=True)}
        for original, state in zip(self.originals, self.states, strict=True):
            live = self.optimizer.state.get(original, {})
            for key, value in state.items():
                if isinstance(value, Tensor):
                    memo[id(live[key])] = value.clone()
        return memo

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


def _copy_optimizer(optimizer: torch.optim.Optimizer, memo: dict[int, Any]) -> torch.optim.Optimizer:
    """A copy that steps on the buffers in ``memo``, with all that the optimiser keeps and the optimisers that it wraps.

    ``copy.deepcopy`` alone would lose what a class keeps beside groups and state, and keep what a scheduler patches.
    """
    optimizers = list(_optimizers_in(optimizer, set()))
    for each in optimizers:
        memo[id(each)] = type(each).__new__(type(each))
    if not _is_of_torch(optimizer):
        _stand_in_for_others(optimizers, memo)
    for each in optimizers:
        _copy_groups(each.param_groups, memo)
    for each in optimizers:
        state = memo[id(each.state)] = defaultdict(dict)
        for key, value in _by_copies(each.state, memo).items():
            if not isinstance(key, Tensor) or id(key) in memo:
                state[memo.get(id(key), key)] = copy.deepcopy(value, memo)
    for each in optimizers:
        others = {key: value for key, value in vars(each).items() if key not in ("step", "profile_hook_step")}
        hooks = {key: OrderedDict() for key in others if key.startswith("_optimizer_") and key.endswith("_hooks")}
        rest = {key: copy.deepcopy(_by_copies(value, memo), memo) for key, value in others.items() if key not in hooks}
        vars(memo[id(each)]).update(hooks | rest)
    return memo[id(optimizer)]


def _is_of_torch(optimizer: torch.optim.Optimizer) -> bool:
    return type(optimizer).__module__.startswith("torch.optim.")


def _shared_places(optimizer: torch.optim.Optimizer) -> list[Any]:
    """What copies of an optimiser share with it: attributes of its class, globals and closures of its functions."""
    optimizers = [each for each in _optimizers_in(optimizer, set()) if not _is_of_torch(each)]
    functions = [v for each in optimizers for v in vars(each).values() if isinstance(v, FunctionType)]
    return Reach(*map(type, optimizers), *functions).places if optimizers else []


def _by_copies(value: Any, memo: Mapping[int, Any]) -> Any:
    """A dictionary whose keys are the ids of parameters, with those of their copies."""
    if not isinstance(value, dict) or not any(isinstance(memo.get(key), nn.Parameter) for key in value if _is_id(key)):
        return value
    keys = [id(memo[key]) if _is_id(key) and isinstance(memo.get(key), nn.Parameter) else key for key in value]
    other = copy.copy(value)
    other.clear()
    other.update(zip(keys, value.values(), strict=True))
    return other


def _is_id(key: Any) -> bool:
    return type(key) is int


def _stand_in_for_others(optimizers: Sequence[torch.optim.Optimizer], memo: dict[int, Any]) -> None:
    """Copies of parameters that are frozen or another model's: a user's class may keep lists as long as its groups.

    Those of ``torch.optim`` do nothing to a parameter without gradient, which may therefore be left out. Where the
    others outweigh the trainable ones their contents are not copied: a step that asks for them fails, and is refused.
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    others = {id(p): p for group in groups for p in group["params"] if id(p) not in memo}
    room = sum(p.numel() for p in memo.values() if isinstance(p, nn.Parameter))
    is_large = sum(p.numel() for p in others.values()) > room
    for key, p in others.items():
        content = p.detach()
        memo[key] = nn.Parameter(content.to("meta") if is_large else content.clone(), p.requires_grad)


def _copy_groups(groups: list[dict[str, Any]], memo: dict[int, Any]) -> None:
    """Groups of those parameters alone that have a copy."""
    if id(groups) in memo:
        return
    for group in groups:
        if id(group) not in memo:
            kept = [position for position, p in enumerate(group["params"]) if id(p) in memo]
            aligned = {key: [group[key][i] for i in kept] for key in ("params", "param_names") if key in group}
            rest = {key: value for key, value in group.items() if key not in aligned}
            memo[id(group)] = {"params": [memo[id(p)] for p in aligned["params"]]} | copy.deepcopy(rest, memo)
            if "param_names" in aligned:
                memo[id(group)]["param_names"] = aligned["param_names"]
    memo[id(groups)] = [memo[id(group)] for group in groups]


def _optimizers_in(value: Any, known: set[int], depth: int = 3) -> Iterator[torch.optim.Optimizer]:
    """An optimiser and those that it wraps, in attributes, lists and dictionaries."""
    if id(value) in known or depth < 0:
        return
    if isinstance(value, torch.optim.Optimizer):
        known.add(id(value))
        yield value
        for attribute in vars(value).values():
            yield from _optimizers_in(attribute, known)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _optimizers_in(item, known, depth - 1)
    elif isinstance(value, dict) and not isinstance(value, defaultdict):
        for item in value.values():
            yield from _optimizers_in(item, known, depth - 1)


def _step_without_hooks(optimizer: torch.optim.Optimizer) -> None:
    step = type(optimizer).step
    if getattr(step, "hooked", False):
        step = getattr(step, "__wrapped__", step)
    if _is_of_torch(optimizer):
        step(optimizer)
        return
    before, watched = streams.random_state(), streams.Draws()
    with _NoDraws(), watched:
        step(optimizer)
    names = streams.moved_streams(before) & streams.own_streams(watched)
    if names:
        streams.set_random_state(before, names)
        raise _draws("a draw from the global stream of " + " and ".join(sorted(names)), "a generator")


def _draws(got: str, instead: str) -> InputError:
    return InputError(
        expected="an optimiser whose step draws no random numbers",
        got=got,
        do=f"give the optimiser {instead} of its own, or use le.SGD(lr) as the probe update",
    )


def _put_back(weights: Sequence[Tensor], contents: Sequence[Tensor]) -> None:
    """Undo what a step has done to weights that are not its own, and refuse it."""
    moved = [(weight, content) for weight, content in zip(weights, contents, strict=True) if _differs(weight, content)]
    for weight, content in moved:
        weight.copy_(content)
    if moved:
        raise InputError(
            expected="an optimiser that steps on the parameters of its groups",
            got="one that writes to weights which it reaches in another way (a global, a closure)",
            do="let its step go over self.param_groups, or use le.SGD(lr) or le.Adam(lr) as the probe update",
        )


def _differs(weight: Tensor, content: Tensor) -> bool:
    return not torch.equal(weight, content) and not bool(((weight == content) | (weight != weight)).all())


class _NoDraws(TorchDispatchMode):
    """Refuses operations that draw from the global random streams, which belong to the training."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [*args, kwargs.get("generator")]
        if torch.Tag.nondeterministic_seeded in func.tags and not any(isinstance(x, torch.Generator) for x in given):
            raise _draws(f"a draw by {func}", "a torch.Generator")
        return func(*args, **kwargs)


def parse_update(text: str, optimizer: torch.optim.Optimizer | None = None) -> tuple[str, Update]:
    """Read the command line's grammar: ``sgd:LR``, ``adam:LR`` or ``optimizer``, with an optional ``NAME=`` before.

    Args:
        text: what was written.
        optimizer: the one that ``optimizer`` stands for, where something trains.

    Returns:
        The name and the update.

    Raises:
        InputError: for an unknown kind (with the nearest name), or a rate that is no number.
    """
    if not isinstance(text, str):
        check_text("update", text)
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


def parse_updates(texts: Sequence[str], optimizer: torch.optim.Optimizer | None = None) -> dict[str, Update]:
    """Read several updates, see ``parse_update``.

    Args:
        texts: what was written.
        optimizer: the one that ``optimizer`` stands for, where something trains.

    Returns:
        Name -> update.

    Raises:
        InputError: as ``parse_update``, and for a name that comes twice.
    """
    updates: dict[str, Update] = {}
    for text in texts:
        name, update = parse_update(text, optimizer)
        if name in updates:
            raise InputError(
                expected="updates of different names",
                got=f"{name!r} twice, by {text!r} the second time",
                do=f"leave one out, or name it: other={text.rpartition('=')[2]}",
            )
        updates[name] = update
    return updates
