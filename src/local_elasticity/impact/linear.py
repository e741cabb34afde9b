"""Engine "linear": the first-order change J(x') (w+ - w) of every target for every source.

Two routes: "contract" takes all pairs at once, layer by layer; "jvp" takes one Jacobian-vector product a source, for
any update.
"""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from local_elasticity.base.errors import USER_ERRORS, InputError, first_line
from local_elasticity.base.progress import Progress
from local_elasticity.impact.costs import captured_cost
from local_elasticity.impact.first_order import (
    ALLOWED,
    CHECKED_TARGETS,
    NOT_THE_DERIVATIVE,
    Result,
    derivative_error,
    difference_error,
    first_order_change,
    relative_error,
)
from local_elasticity.impact.pairs.sweep import Contracted, prepare
from local_elasticity.impact.plan import MemoryMeter, Plan, check_memory
from local_elasticity.impact.problem import Problem
from local_elasticity.impact.replay import look_after


def measure_linear(
    problem: Problem,
    *,
    chunk_size: int | None,
    route: str | None,
    check_pairs: int,
    max_memory: int | None,
    progress: bool,
    meter: MemoryMeter,
    ready: Contracted | None = None,
) -> Result:
    """First-order change of every target for every source; see ``measure``."""
    if problem.narrow is not None:
        raise InputError(
            expected="weights of 32 bits or more for the linear engine",
            got=problem.narrow,
            do="leave dtype='as_is' out",
        )
    if problem.restless is not None:
        raise InputError(
            expected="forward passes and losses that neither draw random numbers nor move state, for the linear engine",
            got=problem.restless,
            do="use mode='eval', or engine='replay'",
        )
    if route not in (None, "contract", "jvp"):
        raise InputError(
            expected="route 'contract' or 'jvp' for the linear engine", got=repr(route), do="use engine='replay'"
        )
    plan = Plan("linear", route or "contract", chunk_size or 1, problem.target_chunk_size)
    if ready is not None:
        return _contract(problem, ready, plan, progress, meter)
    return _by_count(problem, plan, route, chunk_size, check_pairs, max_memory, progress, meter)


def _by_count(
    problem: Problem,
    plan: Plan,
    route: str | None,
    chunk_size: int | None,
    check_pairs: int,
    max_memory: int | None,
    progress: bool,
    meter: MemoryMeter,
) -> Result:
    """By the route asked for; else by contraction, or source by source where there are few sources and many outputs."""
    few = 2 * problem.n_sources <= problem.n_outputs
    order = [route] if route else ["jvp", "contract"] if few else ["contract", "jvp"]
    if route is None:
        count = f"{problem.n_sources} sources, {problem.n_outputs} outputs"
        plan.notes.append(f"route {order[0]}: {count}")
    reason = "no route"
    for name in order:
        plan.route = name
        if name == "jvp":
            outcome = _one_by_one(problem, plan, max_memory, progress, meter)
        else:
            ready = prepare(problem, chunk_size=chunk_size, max_memory=max_memory)
            outcome = ready if isinstance(ready, str) else _contract(problem, ready, plan, progress, meter)
        if isinstance(outcome, Result):
            reason = _wrong(problem, outcome, name, check_pairs)
            if reason is None:
                return outcome
        else:
            reason = outcome
        plan.notes.append(f"route {name}: {reason}")
        plan.chunk_size = 1
    first = reason if route or len(plan.notes) < 2 else "; ".join(plan.notes[-2:])
    advice = "use route='jvp', or engine='replay'" if route == "contract" else "use engine='replay' with a small step"
    raise InputError(
        expected=f"a problem that route={route!r} can take"
        if route
        else "a model and a loss with a first-order change",
        got=first,
        do=f"{advice}, in float64",
    )


def _wrong(problem: Problem, result: Result, route: str, check_pairs: int) -> str | None:
    """Compare the changes of one source with real forward passes, of another with the derivative (of a contraction)."""
    source, other = problem.first_source, problem.n_sources - 1
    loss, gradients = problem.gradient(source)
    problem.check_loss(loss, source)
    if check_pairs:
        x = problem.targets[: min(check_pairs, problem.n_targets)]
        finite = look_after(problem, gradients, x) - problem.forward(x)
        result.linearization_error = relative_error(finite, result.change[source, : len(x)])
    if check_pairs < CHECKED_TARGETS or not result.linearization_error <= ALLOWED:
        # the step is curved, or lost in rounding: along the same direction, as far as neither counts
        error = difference_error(problem, source, result.change[source, :CHECKED_TARGETS], gradients)
        if not error <= ALLOWED:
            return f"its changes at source {source} are off by {error:.2g} from those of real forward passes"
    if route == "contract" and not derivative_error(problem, other, result.change[other, :CHECKED_TARGETS]) <= 1:
        return NOT_THE_DERIVATIVE
    return None


def _contract(problem: Problem, ready: Contracted, plan: Plan, progress: bool, meter: MemoryMeter) -> Result:
    plan.chunk_size, plan.estimated_bytes = ready.chunk_size, ready.estimated_bytes
    plan.notes += ready.notes
    title = f"{problem.n_sources} x {problem.n_targets} pairs, engine linear"
    plan.estimated_seconds = problem.seconds_so_far + problem.seconds_per_target * captured_cost(problem)

    def advance(amount: int) -> None:
        bar.advance(amount)
        meter.look()

    with Progress(progress, problem.n_sources, title) as bar:
        bar.estimate(plan.estimated_seconds)
        change, own = ready.work(advance)
        meter.look()
    names = [name for name, p in problem.model.named_parameters() if p.requires_grad]
    plan.ways = {name: ready.contraction.way(index) for index, name in enumerate(names)}
    before, own_before = problem.before, problem.source_before
    return Result(before + change, own_before + own, change, own, ready.losses, plan)


def _one_by_one(
    problem: Problem, plan: Plan, max_memory: int | None, progress: bool, meter: MemoryMeter
) -> Result | str:
    reason = problem.subject.why_not_by_slots(problem.parameters)
    if reason is not None:
        return reason
    shape = (problem.n_sources, problem.n_targets, problem.n_outputs)
    plan.estimated_bytes = _bytes(problem, shape)
    check_memory(plan.estimated_bytes, max_memory, problem.before.device)
    change = problem.before.new_empty(shape)
    source_change = torch.empty_like(problem.source_before)
    losses = problem.before.new_empty(problem.n_sources)
    bar = Progress(progress, problem.n_sources, f"{problem.n_sources} x {problem.n_targets} pairs, engine linear")
    with bar:
        started = time.perf_counter()
        for source in range(problem.n_sources):
            loss, gradients = problem.gradient(source)
            problem.check_loss(loss, source)
            losses[source] = loss
            moved = _change_of(problem, problem.step.directions(gradients), problem.rows(source))
            if isinstance(moved, str):
                return moved
            change[source] = moved[: problem.n_targets]
            index = int(problem.self_index[source])
            source_change[source] = moved[index] if index >= 0 else moved[-1]
            if source == min(1, problem.n_sources - 1):  # the second: the first one warms up
                plan.estimated_seconds = (time.perf_counter() - started) * problem.n_sources / (source + 1)
                bar.estimate(plan.estimated_seconds)
            meter.look()
            bar.advance()
    return Result(problem.before + change, problem.source_before + source_change, change, source_change, losses, plan)


def _change_of(problem: Problem, directions: list[Tensor], x: Tensor) -> Tensor | str:
    """The change along some directions, or why forward-mode differentiation cannot follow the model."""
    try:
        parts = [first_order_change(problem, directions, part) for part in x.split(problem.target_chunk_size)]
    except InputError:
        raise
    except USER_ERRORS as error:
        return f"forward-mode differentiation cannot follow the model ({first_line(error)})"
    return torch.cat(parts)


def _bytes(problem: Problem, shape: tuple[int, int, int]) -> int:
    weights = sum(p.numel() * p.element_size() for p in problem.parameters)
    return 2 * weights + 2 * math.prod(shape) * problem.before.element_size()
