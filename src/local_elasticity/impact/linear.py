"""Engine "linear": the first-order change J(x') (w+ - w) of every target for every source.

Two routes: "contract" takes all pairs at once, layer by layer; "jvp" takes one Jacobian-vector product a source, for
any update.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from local_elasticity.errors import InputError
from local_elasticity.impact.capture import transformable
from local_elasticity.impact.checks import check_output
from local_elasticity.impact.plan import MemoryMeter, Plan, check_memory
from local_elasticity.impact.problem import Problem
from local_elasticity.impact.progress import Progress
from local_elasticity.impact.state import call_at

if TYPE_CHECKING:
    from local_elasticity.impact.contracted import Contracted


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

    with torch.no_grad(), transformable(problem.model):
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
    ready: Contracted | str | None = None,
) -> Result:
    """First-order change of every target for every source; see ``measure``."""
    from local_elasticity.impact.contracted import prepare

    if problem.stochastic:
        raise InputError(
            expected="mode='eval' for the linear engine", got="modules in train mode", do="use engine='replay'"
        )
    if route not in (None, "contract", "jvp"):
        raise InputError(
            expected="route 'contract' or 'jvp' for the linear engine", got=repr(route), do="use engine='replay'"
        )
    started = time.perf_counter()
    if ready is None and route != "jvp":
        ready = prepare(problem, chunk_size=chunk_size, max_memory=max_memory)
    if isinstance(ready, str) and route == "contract":
        raise InputError(expected="an update and a loss that can be contracted", got=ready, do="use route='jvp'")
    finite, seconds = _finite(problem, check_pairs)
    plan = Plan("linear", "contract", chunk_size or 1, problem.target_chunk_size)
    if not isinstance(ready, str) and ready is not None:
        plan.estimated_routes["contract"] = ready.estimated_seconds
        if route is None and problem.n_sources > 1:
            _price_jvp(problem, plan)
    by_contraction = min(plan.estimated_routes, key=plan.estimated_routes.__getitem__, default="jvp") == "contract"
    if by_contraction and ready is not None and not isinstance(ready, str):
        result = _contract(problem, ready, plan, progress, meter, time.perf_counter() - started)
    else:
        plan.route, plan.chunk_size = "jvp", 1
        plan.notes += [f"route contract: {ready}"] if isinstance(ready, str) else []
        result = _one_by_one(problem, plan, max_memory, progress, meter)
        plan.estimated_seconds += seconds
    if finite is not None:
        result.linearization_error = relative_error(finite, result.change[0, : len(finite)])
    return result


def _finite(problem: Problem, check_pairs: int) -> tuple[Tensor | None, float]:
    """The finite change of a few targets by the first source, and the seconds it took."""
    if not check_pairs:
        return None, 0.0
    from local_elasticity.impact.replay import finite_step

    started = time.perf_counter()
    rows = slice(0, min(check_pairs, problem.n_targets))
    loss, after = finite_step(problem, 0, problem.targets[rows])
    problem.check_loss(loss, 0)
    return after - problem.forward(problem.targets[rows]), time.perf_counter() - started


def _price_jvp(problem: Problem, plan: Plan) -> None:
    """Time one source by the other route where it could be the cheaper one: a few sources, or many outputs."""
    if problem.n_sources > 4 * problem.n_outputs:
        return
    try:
        started = time.perf_counter()
        _change_of(problem, problem.step.directions(problem.gradient(0)[1]), problem.rows(0))
        plan.estimated_routes["jvp"] = (time.perf_counter() - started) * problem.n_sources
    except InputError as error:
        plan.notes.append(f"route jvp: {error}")


def _contract(
    problem: Problem, ready: Contracted, plan: Plan, progress: bool, meter: MemoryMeter, spent: float
) -> Result:
    plan.chunk_size = ready.chunk_size
    plan.estimated_seconds, plan.estimated_bytes = spent + ready.estimated_seconds, ready.estimated_bytes
    title = f"{problem.n_sources} x {problem.n_targets} pairs, engine linear"

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


def _one_by_one(problem: Problem, plan: Plan, max_memory: int | None, progress: bool, meter: MemoryMeter) -> Result:
    shape = (problem.n_sources, problem.n_targets, problem.n_outputs)
    check_memory(_bytes(problem, shape), max_memory)
    change = problem.before.new_empty(shape)
    source_change = torch.empty_like(problem.source_before)
    losses = problem.before.new_empty(problem.n_sources)
    plan.estimated_bytes = _bytes(problem, shape)
    bar = Progress(progress, problem.n_sources, f"{problem.n_sources} x {problem.n_targets} pairs, engine linear")
    with bar:
        started = time.perf_counter()
        for source in range(problem.n_sources):
            loss, gradients = problem.gradient(source)
            problem.check_loss(loss, source)
            losses[source] = loss
            moved = _change_of(problem, problem.step.directions(gradients), problem.rows(source))
            change[source] = moved[: problem.n_targets]
            index = int(problem.self_index[source])
            source_change[source] = moved[index] if index >= 0 else moved[-1]
            if source == min(1, problem.n_sources - 1):  # the second: the first one warms up
                plan.estimated_seconds = (time.perf_counter() - started) * problem.n_sources / (source + 1)
                bar.estimate(plan.estimated_seconds)
            meter.look()
            bar.advance()
    return Result(problem.before + change, problem.source_before + source_change, change, source_change, losses, plan)


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
