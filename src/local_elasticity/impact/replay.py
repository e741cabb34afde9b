"""Engine "replay": take the step of each source, look at all targets in one batch, undo. Exact for any finite step."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from local_elasticity.errors import InputError
from local_elasticity.impact.checks import check_output
from local_elasticity.impact.linear import Result, first_order_change, relative_error
from local_elasticity.impact.plan import MemoryMeter, Plan, check_memory
from local_elasticity.impact.problem import Problem, as_scalar
from local_elasticity.impact.progress import Progress
from local_elasticity.impact.state import call_at, weights_at

VMAP_BYTES = 256 * 2**20  # without max_memory, more than this in copies of the weights is not tried by vmap
PILOT_CHUNKS = (8, 32)


@dataclass
class _Results:
    after: Tensor
    source_after: Tensor
    losses: Tensor


def finite_step(problem: Problem, source: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of a source, and the outputs at ``x`` after the step of that source, in buffers of its own."""
    buffers = [torch.empty_like(p.data) for p in problem.parameters]
    return _step_and_look(problem, source, x, buffers)


def _step_and_look(problem: Problem, source: int, x: Tensor, buffers: list[Tensor]) -> tuple[Tensor, Tensor]:
    loss, gradients = problem.gradient(source)
    with torch.no_grad():
        problem.step.write(gradients, buffers)
    with weights_at(problem.parameters, buffers):
        return loss, problem.forward(x)


def measure_replay(
    problem: Problem,
    *,
    chunk_size: int | None,
    route: str | None,
    check_pairs: int,
    max_memory: int | None,
    progress: bool,
    meter: MemoryMeter,
) -> Result:
    """The finite step of every source; see ``measure``."""
    n, weight_bytes = problem.n_sources, sum(p.numel() * p.element_size() for p in problem.parameters)
    results = _Results(
        problem.before.new_empty((n, problem.n_targets, problem.n_outputs)),
        torch.empty_like(problem.source_before),
        problem.before.new_empty(n),
    )
    plan = Plan("replay", route or "step", chunk_size or 1, problem.target_chunk_size)
    result_bytes = results.after.numel() * results.after.element_size()
    check_memory(result_bytes + 2 * weight_bytes, max_memory)
    buffers = [torch.empty_like(p.data) for p in problem.parameters]
    with Progress(progress, n, f"{n} x {problem.n_targets} pairs, engine replay") as bar:
        done = 0
        if route is None and chunk_size is None:
            limit = VMAP_BYTES if max_memory is None else max_memory - result_bytes
            done = _choose_route(problem, plan, results, buffers, limit, weight_bytes, bar)
        elif plan.route == "vmap":
            _require_vmap(problem)
            plan.chunk_size = min(n, chunk_size or PILOT_CHUNKS[0])
        elif route is None and plan.chunk_size > 1:
            plan.route = "vmap" if _why_no_vmap(problem) is None else "step"
        if plan.route == "step":
            plan.chunk_size = 1
        copies = 2 if plan.route == "step" else 1 + 2 * plan.chunk_size
        plan.estimated_bytes = result_bytes + copies * weight_bytes
        check_memory(plan.estimated_bytes, max_memory)
        started = time.perf_counter()
        while done < n:
            taken = _take(problem, plan, results, buffers, done)
            done += taken
            if math.isnan(plan.estimated_seconds):
                plan.estimated_seconds = (time.perf_counter() - started) * n / taken
                bar.estimate(plan.estimated_seconds)
            bar.advance(taken)
            meter.look()
    for source in torch.nonzero(~torch.isfinite(results.losses)).flatten().tolist():
        problem.check_loss(results.losses[source], source)
    _settle(problem, results, buffers)
    change = results.after - problem.before
    source_change = results.source_after - problem.source_before
    result = Result(results.after, results.source_after, change, source_change, results.losses, plan)
    if check_pairs:
        result.linearization_error = _check_against_linear(problem, result, check_pairs)
    return result


def _settle(problem: Problem, results: _Results, buffers: list[Tensor]) -> None:
    """Exactly no change for a source whose step moved no bit of the weights (lr = 0, a gradient of zero).

    Outputs before and after may come from different kernels (vmap, another place in the batch): that rounding is none.
    """
    moved = (results.after - problem.before).norm(dim=-1) >= 10 * problem.noise_floor
    for source in torch.nonzero(~moved.any(dim=1)).flatten().tolist():
        with torch.no_grad():
            problem.step.write(problem.gradient(source)[1], buffers)
        if all(torch.equal(p.data, value) for p, value in zip(problem.parameters, buffers, strict=True)):
            results.after[source] = problem.before
            results.source_after[source] = problem.source_before[source]


def _take(problem: Problem, plan: Plan, results: _Results, buffers: list[Tensor], start: int) -> int:
    """Measure the next source or chunk of sources; returns how many were taken."""
    if plan.route == "step":
        loss, looked = _step_and_look(problem, start, problem.rows(start), buffers)
        problem.check_loss(loss, start)
        _keep(problem, results, start, loss, looked)
        return 1
    stop = min(start + plan.chunk_size, problem.n_sources)
    _keep_chunk(problem, results, start, stop, *_vmap_chunk(problem, start, stop))
    return stop - start


def _keep(problem: Problem, results: _Results, source: int, loss: Tensor, looked: Tensor) -> None:
    results.losses[source] = loss
    results.after[source] = looked[: problem.n_targets]
    index = int(problem.self_index[source])
    results.source_after[source] = looked[index] if index >= 0 else looked[-1]


def _keep_chunk(problem: Problem, results: _Results, start: int, stop: int, losses: Tensor, looked: Tensor) -> None:
    for offset in range(stop - start):
        _keep(problem, results, start + offset, losses[offset], looked[offset])


def _vmap_chunk(problem: Problem, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Losses and outputs after the step for several sources at once, by ``torch.func``."""
    weights = [p.detach() for p in problem.parameters]

    def loss_of(values: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
        output = call_at(problem.model, problem.parameters, values, x.unsqueeze(0))
        return as_scalar(problem.loss_fn(output, y.unsqueeze(0)))

    def one(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        gradients, loss = torch.func.grad_and_value(loss_of)(weights, x, y)
        stepped = [
            problem.step.stepped(index, weight, gradient)
            for index, (weight, gradient) in enumerate(zip(weights, gradients, strict=True))
        ]
        rows = torch.cat([problem.targets, x.unsqueeze(0)]) if problem.has_strangers else problem.targets
        parts = [
            check_output(call_at(problem.model, problem.parameters, stepped, part), len(part))
            for part in rows.split(problem.target_chunk_size)
        ]
        return loss, torch.cat(parts)

    with torch.no_grad():
        return torch.func.vmap(one, randomness="error")(problem.inputs[start:stop], problem.labels[start:stop])


def _why_no_vmap(problem: Problem) -> str | None:
    """The reason why sources cannot go several at once, known without trying; None where there is none."""
    if problem.stochastic:
        return "modules in train mode"
    if not problem.step.elementwise:
        return "the update runs a copy of the optimiser"
    # A parameter without gradient stays, but torch.func gives zeros for it: weight decay would then move it.
    if any(gradient is None for gradient in problem.gradient(0)[1]):
        return "parameters without gradient"
    return None


def _require_vmap(problem: Problem) -> None:
    reason = _why_no_vmap(problem)
    if reason is not None:
        raise InputError(expected="a problem that route='vmap' can batch", got=reason, do="use route='step'")


def _choose_route(
    problem: Problem,
    plan: Plan,
    results: _Results,
    buffers: list[Tensor],
    limit: int,
    weight_bytes: int,
    bar: Progress,
) -> int:
    """Time a few sources by each route, keep the fastest; returns how many sources are done.

    None are where another route than the pilot's is taken: numbers depend on the route, and never on who chose it.
    """
    pilots = min(3, problem.n_sources)
    seconds = []
    for source in range(pilots):
        started = time.perf_counter()
        _take(problem, plan, results, buffers, source)
        seconds.append(time.perf_counter() - started)
    plan.seconds_per_source["step"] = min(seconds)
    left = problem.n_sources - pilots
    if left >= PILOT_CHUNKS[0]:
        _try_vmap(problem, plan, results, pilots, limit, weight_bytes)
    fastest = min(plan.seconds_per_source, key=plan.seconds_per_source.__getitem__)
    plan.route, _, chunk = fastest.partition(":")
    plan.chunk_size = int(chunk or 1)
    done = pilots if plan.route == "step" else 0
    plan.estimated_seconds = sum(seconds) + (problem.n_sources - done) * plan.seconds_per_source[fastest]
    bar.estimate(plan.estimated_seconds)
    bar.advance(done)
    return done


def _try_vmap(problem: Problem, plan: Plan, results: _Results, pilots: int, limit: int, weight_bytes: int) -> None:
    """Time the vectorised route on chunks that fit, and rule it out where it disagrees with the step route."""
    reason = _why_no_vmap(problem)
    for chunk in PILOT_CHUNKS:
        if reason is None and (1 + 2 * chunk) * weight_bytes > limit:
            reason = f"{chunk} copies of the weights do not fit"
        if reason is not None or chunk > problem.n_sources:
            break
        try:
            _vmap_chunk(problem, 0, chunk)
            started = time.perf_counter()
            looked = _vmap_chunk(problem, 0, chunk)[1]
            plan.seconds_per_source[f"vmap:{chunk}"] = (time.perf_counter() - started) / chunk
        except (RuntimeError, NotImplementedError, ValueError) as error:
            reason = str(error).splitlines()[0]
            break
        if not _agree(looked[:pilots, : problem.n_targets], results.after[:pilots], problem.before):
            plan.seconds_per_source.pop(f"vmap:{chunk}")
            reason = "its outputs differ from the step route's"
    if reason is not None:
        plan.notes.append(f"route vmap: {reason}")


def _agree(one: Tensor, other: Tensor, before: Tensor) -> bool:
    """Whether two routes moved the outputs alike, to the rounding of their dtype."""
    scale = before.abs().max() + (other - before).abs().max()
    return bool((one - other).abs().max() <= 1e4 * torch.finfo(before.dtype).eps * scale)


def _check_against_linear(problem: Problem, result: Result, check_pairs: int) -> float:
    """How far the first-order change of the first source is from its finite change, on a few targets."""
    if problem.stochastic:
        result.plan.notes.append("linearisation unchecked: modules in train mode")
        return float("nan")
    rows = slice(0, min(check_pairs, problem.n_targets))
    try:
        directions = problem.step.directions(problem.gradient(0)[1])
        linear = first_order_change(problem, directions, problem.targets[rows])
    except (RuntimeError, NotImplementedError) as error:
        result.plan.notes.append(f"linearisation unchecked: {str(error).splitlines()[0]}")
        return float("nan")
    return relative_error(result.change[0, rows], linear)
