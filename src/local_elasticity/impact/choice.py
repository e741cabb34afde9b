"""What engine "auto" does: the first-order engine where it says the same as the finite step for less, else replay.

Both are decided by counts and by changes, never by the clock (docs/engines.md).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from local_elasticity.errors import USER_ERRORS, InputError
from local_elasticity.impact.contracted import Contracted, prepare
from local_elasticity.impact.costs import captured_cost, replayed_cost
from local_elasticity.impact.first_order import (
    CHECKED_TARGETS,
    NOT_THE_DERIVATIVE,
    Result,
    derivative_error,
    difference_error,
    first_order_change,
    relative_error,
)
from local_elasticity.impact.linear import ALLOWED, measure_linear
from local_elasticity.impact.problem import Problem
from local_elasticity.impact.replay import finite_step, look_after, measure_replay

LEAST_SOURCES = 16  # fewer are replayed in less time than the choice takes
MOST_ERROR = 0.01


def choose(
    problem: Problem, *, chunk_size: int | None, route: str | None, check_pairs: int, max_memory: int | None
) -> tuple[Callable[..., Result], list[str]]:
    """The engine to run, and the note that says why."""
    if route in ("contract", "jvp"):
        return measure_linear, [f"engine auto: linear, as route {route!r} was asked"]
    reason = _reason_to_replay(problem, route, check_pairs)
    if reason is None:
        n_targets = min(check_pairs, problem.n_targets)
        try:
            if (curved := _curved(problem, n_targets)) is not None:
                return measure_replay, [f"engine auto: replay ({curved})"]
            ready = prepare(problem, chunk_size=chunk_size, max_memory=max_memory)
        except InputError as error:
            return measure_replay, [f"engine auto: replay ({error})"]
        if not isinstance(ready, str):
            return _checked(problem, ready, n_targets)
        reason = ready
    return measure_replay, [f"engine auto: replay ({reason})"]


def _curved(problem: Problem, n_targets: int) -> str | None:
    """Why first order will not do, told by one derivative and one step before a contraction is made ready for it."""
    if problem.subject.why_not_by_slots(problem.parameters) or any(p.is_complex() for p in problem.parameters):
        return None
    loss, gradients = problem.gradient(problem.first_source)
    problem.check_loss(loss, problem.first_source)
    try:
        linear = first_order_change(problem, problem.step.directions(gradients), problem.targets[:n_targets])
    except USER_ERRORS:  # the contraction may still follow
        return None
    finite = look_after(problem, gradients, problem.rows(problem.first_source))[:n_targets] - problem.before[:n_targets]
    if bool((linear.norm(dim=-1) < 10 * problem.noise_floor[:n_targets]).all()):
        return None
    error = relative_error(finite, linear)
    return None if error <= MOST_ERROR else _too_far(error)


def _too_far(error: float) -> str:
    return f"first order is off by {error:.2g} of the step's change, more than {MOST_ERROR:g}"


def _checked(problem: Problem, ready: Contracted, n_targets: int) -> tuple[Callable[..., Result], list[str]]:
    """Compare the contraction itself with the finite steps of two sources."""
    errors = []
    for source in sorted({problem.first_source, problem.n_sources - 1}):
        linear = ready.change_of(source, n_targets)
        loss, looked = finite_step(problem, source, problem.rows(source))
        problem.check_loss(loss, source)
        finite = looked[:n_targets] - problem.before[:n_targets]
        error = relative_error(finite, linear)
        if bool((linear.norm(dim=-1) < 10 * problem.noise_floor[:n_targets]).all()):
            # lost in rounding: a larger step along the same direction tells whether the contraction is right
            wrong = difference_error(problem, source, linear[:CHECKED_TARGETS])
            if not wrong <= ALLOWED:
                return measure_replay, [f"engine auto: replay (first order is off by {wrong:.2g})"]
            continue
        if source != problem.first_source and not derivative_error(problem, source, linear[:CHECKED_TARGETS]) <= 1:
            return measure_replay, [f"engine auto: replay ({NOT_THE_DERIVATIVE})"]
        if not error <= MOST_ERROR:
            return measure_replay, [f"engine auto: replay ({_too_far(error)})"]
        errors.append(error)
    counts = f"{captured_cost(problem):,} against {replayed_cost(problem):,} passes"
    why = f"first order is off by {max(errors):.2g}" if errors else "the step's change is lost in rounding"
    found = partial(_with_error, errors[0] if errors else float("nan"), ready)
    return found, [f"engine auto: linear ({why}; {counts})"]


def _with_error(error: float, ready: Contracted, problem: Problem, **settings: object) -> Result:
    result = measure_linear(problem, ready=ready, **settings)  # pyright: ignore[reportArgumentType]
    result.linearization_error = error
    return result


def _reason_to_replay(problem: Problem, route: str | None, check_pairs: int) -> str | None:
    if route in ("step", "vmap"):
        return f"route {route!r} was asked"
    if (reason := problem.restless or problem.narrow) is not None:
        return reason
    if problem.n_sources < LEAST_SOURCES:
        return f"fewer than {LEAST_SOURCES} sources"
    if not check_pairs:
        return "check_pairs=0: nothing says how far first order is off"
    if problem.step.affine() is None:
        return "the update is not affine in the gradient"
    if not captured_cost(problem) < replayed_cost(problem):
        return f"captures cost {captured_cost(problem):,} passes, replaying {replayed_cost(problem):,}"
    return None
