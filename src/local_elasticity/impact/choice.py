"""What engine "auto" does: the first-order engine where it says the same as the finite step for less, else replay."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from local_elasticity.errors import InputError
from local_elasticity.impact.contracted import prepare
from local_elasticity.impact.linear import Result, first_order_change, measure_linear, relative_error
from local_elasticity.impact.problem import Problem
from local_elasticity.impact.replay import finite_step, measure_replay

LEAST_SOURCES = 16  # fewer are replayed in less time than the choice takes
MOST_ERROR = 0.01


def choose(
    problem: Problem, *, chunk_size: int | None, route: str | None, check_pairs: int, max_memory: int | None
) -> tuple[Callable[..., Result], list[str]]:
    """The engine to run, and the note that says why."""
    reason = _reason_to_replay(problem, route, check_pairs)
    if route in ("contract", "jvp"):
        return measure_linear, [f"engine auto: linear, as route {route!r} was asked"]
    if reason is None:
        try:
            ready = prepare(problem, chunk_size=chunk_size, max_memory=max_memory)
        except InputError as error:
            return measure_replay, [f"engine auto: replay ({error})"]
        if isinstance(ready, str):
            reason = ready
        else:
            rows = slice(0, min(check_pairs, problem.n_targets))
            started = time.perf_counter()
            finite = finite_step(problem, 0, problem.rows(0))[1][rows] - problem.before[rows]
            seconds = (time.perf_counter() - started) * problem.n_sources
            directions = problem.step.directions(problem.gradient(0)[1])
            linear = first_order_change(problem, directions, problem.targets[rows])
            error = relative_error(finite, linear)
            lost = bool((linear.norm(dim=-1) < 10 * problem.noise_floor[rows]).all())
            costs = f"about {ready.estimated_seconds:.2g} s, replay about {seconds:.2g} s"
            if not lost and not error <= MOST_ERROR:
                reason = f"first order is off by {error:.2g} of the step's change, more than {MOST_ERROR:g}"
            elif ready.estimated_seconds >= seconds and not lost:
                reason = f"linear would take {costs}"
            else:
                why = "the step's change is lost in rounding" if lost else f"first order is off by {error:.2g}"
                return partial(measure_linear, ready=ready), [f"engine auto: linear ({why}; {costs})"]
    return measure_replay, [f"engine auto: replay ({reason})"]


def _reason_to_replay(problem: Problem, route: str | None, check_pairs: int) -> str | None:
    if route in ("step", "vmap"):
        return f"route {route!r} was asked"
    if problem.stochastic:
        return "modules in train mode"
    if problem.n_sources < LEAST_SOURCES:
        return f"fewer than {LEAST_SOURCES} sources"
    if not check_pairs:
        return "check_pairs=0: nothing says how far first order is off"
    if problem.step.affine() is None:
        return "the update is not affine in the gradient"
    return None
