"""Engine "linear": the first-order change J(x') (w+ - w) of every target, one Jacobian-vector product a source."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from local_elasticity.errors import InputError
from local_elasticity.impact.checks import check_output
from local_elasticity.impact.plan import MemoryMeter, Plan, check_memory
from local_elasticity.impact.problem import Problem
from local_elasticity.impact.progress import Progress
from local_elasticity.impact.state import call_at


@dataclass
class Result:
    """What an engine returns; shapes as in ``Impact``."""

    after: Float[Tensor, "sources targets outputs"]
    source_after: Float[Tensor, "sources outputs"]
    change: Float[Tensor, "sources targets outputs"]
    source_change: Float[Tensor, "sources outputs"]
    losses: Float[Tensor, " sources"]
    plan: Plan
    linearization_error: float = float("nan")


def first_order_change(problem: Problem, directions: list[Tensor], x: Tensor) -> Float[Tensor, "batch outputs"]:
    """The derivative of the outputs at ``x`` along a direction of the weights, by forward-mode differentiation."""
    weights = [p.detach() for p in problem.parameters]

    def outputs(values: list[Tensor]) -> Tensor:
        return check_output(call_at(problem.model, problem.parameters, values, x), len(x))

    with torch.no_grad():
        return torch.func.jvp(outputs, (weights,), (directions,))[1]


def measure_linear(
    problem: Problem,
    *,
    chunk_size: int | None,
    route: str | None,
    check_pairs: int,
    max_memory: int | None,
    progress: bool,
    meter: MemoryMeter,
) -> Result:
    """First-order change of every target for every source; see ``measure``."""
    if problem.stochastic:
        raise InputError(
            expected="mode='eval' for the linear engine", got="modules in train mode", do="use engine='replay'"
        )
    shape = (problem.n_sources, problem.n_targets, problem.n_outputs)
    check_memory(_bytes(problem, shape), max_memory)
    change = problem.before.new_empty(shape)
    source_change = torch.empty_like(problem.source_before)
    losses = problem.before.new_empty(problem.n_sources)
    plan = Plan("linear", "jvp", 1, problem.target_chunk_size)
    plan.estimated_bytes = _bytes(problem, shape)
    bar = Progress(progress, problem.n_sources, f"{problem.n_sources} x {problem.n_targets} pairs, engine linear")
    started = time.perf_counter()
    with bar:
        for source in range(problem.n_sources):
            loss, gradients = problem.gradient(source)
            problem.check_loss(loss, source)
            losses[source] = loss
            moved = _change_of(problem, problem.step.directions(gradients), problem.rows(source))
            change[source] = moved[: problem.n_targets]
            index = int(problem.self_index[source])
            source_change[source] = moved[index] if index >= 0 else moved[-1]
            if source == 0:
                plan.estimated_seconds = (time.perf_counter() - started) * problem.n_sources
                bar.estimate(plan.estimated_seconds)
            meter.look()
            bar.advance()
    result = Result(problem.before + change, problem.source_before + source_change, change, source_change, losses, plan)
    if check_pairs:
        from local_elasticity.impact.replay import finite_step

        rows = slice(0, min(check_pairs, problem.n_targets))
        finite = finite_step(problem, 0, problem.targets[rows])[1] - problem.forward(problem.targets[rows])
        result.linearization_error = relative_error(finite, change[0, rows])
    return result


def _change_of(problem: Problem, directions: list[Tensor], x: Tensor) -> Tensor:
    try:
        parts = [first_order_change(problem, directions, part) for part in x.split(problem.target_chunk_size)]
    except (NotImplementedError, RuntimeError) as error:
        raise InputError(
            expected="a model that forward-mode differentiation can follow",
            got=str(error).splitlines()[0],
            do="use engine='replay' with a small step in float64",
        ) from error
    return torch.cat(parts)


def relative_error(finite: Tensor, linear: Tensor) -> float:
    """‖finite - linear‖ / ‖finite‖; NaN where nothing moved."""
    size = float(finite.norm())
    return float((finite - linear).norm()) / size if size else float("nan")


def _bytes(problem: Problem, shape: tuple[int, int, int]) -> int:
    weights = sum(p.numel() * p.element_size() for p in problem.parameters)
    return 2 * weights + 2 * math.prod(shape) * problem.before.element_size()
