"""What is found out before the first step: whether the replicas can be trained together, and by which route.

Every route is compared with plain gradients of the replicas as ``make_model`` made them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from local_elasticity.base.errors import USER_ERRORS, InputError, first_line
from local_elasticity.base.reach import Reach
from local_elasticity.base.tensors import try_loss, try_model
from local_elasticity.impact.problem import refuse_hidden_graph
from local_elasticity.impact.subject import Subject, preserved
from local_elasticity.training.lockstep.chain import find_chain
from local_elasticity.training.lockstep.kernels import Unsupported
from local_elasticity.training.lockstep.optimizers import Rule
from local_elasticity.training.lockstep.routes import Kernels, Problem, RouteName, Stack, Vmap

_RATE = 0.1
_MODULE_STATE = frozenset(vars(nn.Module())) - {"training"}
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, type)


@dataclass(frozen=True)
class Trial:
    """What a pass of the first replica shows.

    Attributes:
        idle: names of the trainable weights that the loss does not reach.
        alone: why only one replica after the other can be right, in words; empty where nothing speaks for it.
        hidden: what the network keeps from one call to the next outside of weights and buffers, in words.
    """

    idle: frozenset[str] = frozenset()
    alone: str = ""
    hidden: str = ""


@dataclass(frozen=True)
class _Pass:
    """Plain autograd on one replica."""

    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]


# --- one replica ---------------------------------------------------------------------------------------------------


def try_replica(stack: Stack, problem: Problem) -> Trial:
    """One forward and backward pass of the first replica, which leaves no trace.

    Raises:
        InputError: for a loss that reads more than outputs and labels, or keeps something; for gradients that cannot
            be followed.
    """
    model, some = stack.models[0], slice(0, problem.batch_size)
    x, y = problem.inputs[some], problem.labels[some]
    with preserved(model, "as_is", problem.loss_fn, restore_streams=True) as subject, torch.enable_grad():
        outputs = try_model(model, x, "inputs of data")
        moved = _moved(subject, stack)
        _check_loss(subject, problem, outputs, y)
        subject.rewind()
        loss = problem.loss_fn(model(x.clone()), y.clone())
        refuse_hidden_graph(loss)
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        found = _gradients(loss, named)
        if any(p.grad is not None for p in named.values()):
            raise InputError(
                expected="a network that leaves .grad of its weights as it was",
                got="a backward() within its forward pass",
                do="use torch.autograd.grad there",
            )
    idle = frozenset(name for name, gradient in found.items() if gradient is None)
    hidden = sorted(moved & {"attributes", "a generator of its own", "tensors outside of its buffers"})
    alone = f"its forward pass changes {', '.join(sorted(moved))}" if moved else ""
    return Trial(idle, alone or _odd_replica(stack, problem), ", ".join(hidden))


def _moved(subject: Subject, stack: Stack) -> set[str]:
    """What the forward pass has moved, but for buffers written in place, which all routes keep.

    Raises:
        InputError: when other replicas hold it too, so that they would train one another.
    """
    model = subject.model
    named = {id(t) for t in (*model.parameters(), *model.buffers())}
    others = [t for t in subject.reach.tensors if id(t) not in named]
    words = {"python": "attributes", "generator": "a generator of its own", "buffer": "which tensor a buffer is"}
    moved = {"tensors outside of its buffers"} if subject.has_written(others) else set()
    holders = [place.holder for place in subject.reach.places if place.moved()]
    if len(stack.models) > 1 and (holders or moved):
        _refuse_shared(holders, [t for t in others if subject.has_written([t])], Reach(stack.models[1]))
    subject.rewind()
    moved |= {words[kind] for kind in subject.moved if kind in words}
    if "weights" in subject.moved:
        moved.add("weights")
    subject.moved.clear()
    return moved


def _refuse_shared(holders: list[Any], tensors: list[Tensor], other: Reach) -> None:
    held = {*(id(place.holder) for place in other.places), *map(id, other.tensors)}
    if any(id(one) in held for one in (*holders, *tensors)):
        raise InputError(
            expected="networks that each keep their own state",
            got="a forward pass that changes what all of them share: a class attribute, a global or closed-over name",
            do="keep it in an attribute or a buffer of the network, made in its __init__",
        )


def _check_loss(subject: Subject, problem: Problem, outputs: Tensor, y: Tensor) -> None:
    leaf = outputs.detach().requires_grad_()
    loss = try_loss(problem.loss_fn, leaf, y.clone(), scalar=True)
    if any(variable is not leaf for variable in _variables(loss)):
        raise InputError(
            expected="a loss of outputs and labels alone, for replicas that share it",
            got="a loss that reads trainable weights",
            do="use weight_decay= for a penalty, or freeze the weights of the loss (requires_grad_(False))",
        )
    keeps = subject.has_written(subject.reach.tensors)
    subject.rewind()
    if keeps or subject.moved:
        raise InputError(
            expected="a loss that keeps nothing from one call to the next: all replicas share it",
            got="one that changes its buffers, attributes or what it closes over",
            do="leave that out, and look at the replicas with callback= or validation=",
        )


def _variables(loss: Tensor) -> Iterator[Tensor]:
    """Leaves of the graph of a loss."""
    nodes, known = [loss.grad_fn], set()
    while nodes:
        node: Any = nodes.pop()
        if node is None or node in known:
            continue
        known.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        nodes += [following for following, _ in node.next_functions]


def _gradients(loss: Tensor, named: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    try:
        found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    except USER_ERRORS as error:
        raise InputError(
            expected="a loss that can be differentiated by the weights",
            got=f"{type(error).__name__} in its backward pass",
            do="make loss_fn(model(x[:1]), y[:1]).backward() work",
        ) from error
    return dict(zip(named, found, strict=True))


# --- all replicas --------------------------------------------------------------------------------------------------


def _odd_replica(stack: Stack, problem: Problem) -> str:
    """Whether a replica differs from the first in more than weights and buffers, in words."""
    first = _plain_state(stack.models[0])
    for number, model in enumerate(stack.models):
        if first is not None and _plain_state(model) == first:
            continue
        if not _says_the_same(stack, problem, number):
            return f"replica {number} differs from replica 0 in more than weights and buffers"
    return ""


def _plain_state(model: nn.Module) -> list[Any] | None:
    """Attributes of all modules where they are numbers and texts; None where there are others."""
    state: list[Any] = []
    for module in model.modules():
        own = {name: value for name, value in vars(module).items() if name not in _MODULE_STATE}
        if not all(_is_plain(value) for value in own.values()):
            return None
        state.append((type(module), own))
    return state


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN) or getattr(value, "__module__", "").startswith("torch.nn.functional")


def _says_the_same(stack: Stack, problem: Problem, number: int) -> bool:
    """Whether the template with the replica's weights is the replica, in eval mode at the first samples."""
    x, model = problem.inputs[: problem.batch_size], stack.models[number]
    own = {name: w[number] for name, w in (*stack.weights.items(), *stack.buffers.items())}
    with torch.no_grad(), preserved(model, "eval", restore_streams=True) as subject:
        wanted = subject.call(x)
    with torch.no_grad(), preserved(stack.template, "eval", restore_streams=True):
        return torch.equal(torch.func.functional_call(stack.template, own, (x.clone(),)), wanted)


def _passes(stack: Stack, problem: Problem, index: Tensor, dtype: torch.dtype | None = None) -> list[_Pass]:
    """Plain gradients of the first replicas, each on its own samples, and what the pass made of the buffers."""
    found = []
    for model, rows in zip(stack.models, index, strict=False):
        with preserved(model, "as_is", problem.loss_fn, dtype=dtype, restore_streams=True), torch.enable_grad():
            x, y = problem.inputs[rows], problem.labels[rows]
            if dtype is not None:
                x, y = x.to(dtype), y.to(dtype) if y.is_floating_point() else y
            loss = problem.loss_fn(model(x), y)
            named = {name: p for name, p in model.named_parameters() if name in stack.trained}
            gradients = _gradients(loss, named)
            buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
        found.append(_Pass({n: torch.zeros_like(named[n]) if g is None else g for n, g in gradients.items()}, buffers))
    return found


# --- the route -----------------------------------------------------------------------------------------------------


def choose_route(stack: Stack, problem: Problem, trial: Trial, asked: RouteName | None = None) -> RouteName:
    """The fastest route that is right for these replicas, or the one that is asked for.

    Warns:
        UserWarning: saying why, when only the loop is left.

    Raises:
        InputError: when the route that is asked for is not right for them.
    """
    if asked == "loop":
        return "loop"
    reason = trial.alone
    if not reason and asked != "vmap":
        reason = _why_not_kernels(stack, problem)
        if not reason:
            return "kernels"
    if asked == "kernels":
        raise _not_right(asked, reason)
    reason = trial.alone or _why_not_vmap(stack, problem)
    if not reason:
        return "vmap"
    if asked is not None:
        raise _not_right(asked, reason)
    warnings.warn(f"{reason}. The replicas are trained one after the other, which is slower", stacklevel=3)
    return "loop"


def _not_right(asked: str, reason: str) -> InputError:
    return InputError(
        expected=f"replicas that route {asked!r} can train",
        got=f"others: {reason}",
        do="leave route out, or set route='loop'",
    )


def _why_not_kernels(stack: Stack, problem: Problem) -> str:
    """Why own kernels do not take the step that autograd takes, in float64 on a few samples; empty where they do."""
    try:
        chain = find_chain(stack.template, problem.inputs[:2].clone())
    except Unsupported as error:
        return str(error)
    two, batch = stack.rows(0, 2), problem.batch_size
    some = torch.arange(len(two) * batch, device=problem.inputs.device) % len(problem.inputs)
    labels = problem.labels[some]
    exact = Problem(
        problem.inputs[some].double(),
        labels.double() if labels.is_floating_point() else labels,
        problem.loss_fn,
        Rule("sgd", lr=_RATE),
        batch,
    )
    index = torch.arange(len(two) * batch, device=some.device).view(len(two), batch)
    ours = two.to(torch.float64)
    before = {name: w.clone() for name, w in ours.weights.items()}
    Kernels(ours, exact, chain).step(index)
    wanted = _passes(two, exact, index, torch.float64)
    for replica, plain in enumerate(wanted):
        for name, gradient in plain.gradients.items():
            stepped = before[name][replica] - _RATE * gradient
            if not torch.allclose(ours.weights[name][replica], stepped, rtol=1e-9, atol=1e-12, equal_nan=True):
                return f"a step of {name!r} by kernels is not autograd's"
    return ""


def _why_not_vmap(stack: Stack, problem: Problem) -> str:
    """Why ``torch.func.vmap`` does not give the gradients and buffers that autograd gives; empty where it does."""
    two = stack.rows(0, 2)
    index = torch.arange(len(two) * problem.batch_size, device=problem.inputs.device) % len(problem.inputs)
    index = index.view(len(two), problem.batch_size)
    trial, entered = two.to(problem.inputs.dtype), []
    names = {module: name or "the network" for name, module in trial.template.named_modules()}
    for module in names:
        module.register_forward_pre_hook(lambda m, args: entered.append(f"{names[m]} ({type(m).__name__})"))
    try:
        gradients, _ = Vmap(trial, problem).gradients(index)
    except USER_ERRORS as error:
        layer = entered[-1] if entered else type(stack.template).__name__
        return f"torch.func.vmap cannot batch layer {layer}: {first_line(error)[:160]}"
    for replica, plain in enumerate(_passes(two, problem, index)):
        largest = max((float(g.abs().max()) for g in plain.gradients.values() if g.numel()), default=0.0)
        for name, gradient in plain.gradients.items():
            tolerance = torch.finfo(gradient.dtype).eps ** 0.5 * largest
            if not torch.allclose(gradients[name][replica], gradient, rtol=0, atol=tolerance, equal_nan=True):
                return f"torch.func.vmap gives another gradient of {name!r} than autograd"
        for name, buffer in plain.buffers.items():
            if not torch.allclose(trial.buffers[name][replica], buffer, rtol=1e-2, atol=1e-4, equal_nan=True):
                return f"torch.func.vmap leaves buffer {name!r} as it was, or makes something else of it"
    return ""
