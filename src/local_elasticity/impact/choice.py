"""What engine "auto" does: the first-order engine where it says the same as the finite step for less, else replay.

Both are decided by counts and by changes, never by the clock (docs/engines.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from local_elasticity.base.errors import USER_ERRORS, InputError
from local_elasticity.impact.costs import captured_cost, replayed_cost
from local_elasticity.impact.first_order import (
    ALLOWED,
    CHECKED_TARGETS,
    NOT_THE_DERIVATIVE,
    Result,
    difference_error,
    first_order_change,
    relative_error,
    rounding_error,
)
from local_elasticity.impact.linear import measure_linear
from local_elasticity.impact.pairs.sweep import Contracted, prepare
from local_elasticity.impact.problem import Problem
from local_elasticity.impact.replay import look_after, measure_replay

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
        n_targets, sources = min(check_pairs, problem.n_targets), sorted({problem.first_source, problem.n_sources - 1})
        try:
            tried = {source: _try(problem, source, n_targets) for source in sources}
            ready = _too_far(tried.values()) or prepare(problem, chunk_size=chunk_size, max_memory=max_memory)
            reason = ready if isinstance(ready, str) else _wrong(problem, ready, tried)
        except InputError as error:
            return measure_replay, [f"engine auto: replay ({error})"]
        if not isinstance(ready, str) and reason is None:
            return _linear(problem, ready, tried)
    return measure_replay, [f"engine auto: replay ({reason})"]


@dataclass
class _Tried:
    """Changes of the first targets by one source: of its step, and to first order.

    Attributes:
        finite: by the step.
        exact: the derivative along it; None where forward-mode differentiation cannot follow.
        is_lost: whether they are lost in rounding; None where that is not known yet.
        error: how far first order is off, as a part of the step's change.
    """

    finite: Tensor
    exact: Tensor | None
    is_lost: bool | None = None
    error: float = float("nan")

    def judge(self, problem: Problem, linear: Tensor) -> None:
        """Against a first-order change."""
        self.is_lost = bool((linear.norm(dim=-1) < 10 * problem.noise_floor[: len(linear)]).all())
        self.error = relative_error(self.finite, linear)


def _try(problem: Problem, source: int, n_targets: int) -> _Tried:
    """One derivative and one step, which cost less than a contraction that is then not taken."""
    loss, gradients = problem.gradient(source)
    problem.check_loss(loss, source)
    finite = look_after(problem, gradients, problem.rows(source))[:n_targets] - problem.before[:n_targets]
    tried = _Tried(finite, None)
    if problem.subject.why_not_by_slots(problem.parameters) or any(p.is_complex() for p in problem.parameters):
        return tried
    try:
        tried.exact = first_order_change(problem, problem.step.directions(gradients), problem.targets[:n_targets])
    except USER_ERRORS:  # the contraction may follow all the same
        return tried
    tried.judge(problem, tried.exact)
    return tried


def _too_far(tried: Iterable[_Tried]) -> str | None:
    for one in tried:
        if one.is_lost is False and not one.error <= MOST_ERROR:
            return f"first order is off by {one.error:.2g} of the step's change, more than {MOST_ERROR:g}"
    return None


def _wrong(problem: Problem, ready: Contracted, tried: dict[int, _Tried]) -> str | None:
    """Compare the contraction with the steps of these sources, and with the derivatives."""
    for source, one in tried.items():
        linear = ready.change_of(source, len(one.finite))
        one.judge(problem, linear)
        checked = linear[:CHECKED_TARGETS]
        if one.is_lost:  # a larger step along the same direction tells whether the contraction is right
            off = difference_error(problem, source, checked)
            if not off <= ALLOWED:
                return f"first order is off by {off:.2g}"
            continue
        if one.exact is None:
            off = difference_error(problem, source, checked) / ALLOWED
        else:
            off = rounding_error(problem, one.exact, linear)
        if not off <= 1:
            return NOT_THE_DERIVATIVE
    return _too_far(tried.values())


def _linear(problem: Problem, ready: Contracted, tried: dict[int, _Tried]) -> tuple[Callable[..., Result], list[str]]:
    errors = [one.error for one in tried.values() if not one.is_lost]
    counts = f"{captured_cost(problem):,} against {replayed_cost(problem):,} passes"
    why = f"first order is off by {max(errors):.2g}" if errors else "the step's change is lost in rounding"
    return partial(_with_error, errors[0] if errors else float("nan"), ready), [
        f"engine auto: linear ({why}; {counts})"
    ]


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
