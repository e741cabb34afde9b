"""Engine "replay": take the step of each source, look at all targets in one batch, undo. Exact for any finite step."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from local_elasticity.base.errors import USER_ERRORS, InputError, first_line
from local_elasticity.base.progress import Progress
from local_elasticity.impact.first_order import Result, first_order_change, relative_error
from local_elasticity.impact.plan import MemoryMeter, Plan, check_memory
from local_elasticity.impact.problem import Gradients, Problem, close

VMAP_BYTES = 256 * 2**20  # without max_memory, more than this in copies of the weights is not made by vmap
VMAP_CHUNK = 32
VMAP_LEAST_SOURCES = 8
VMAP_MOST_PRODUCTS = 2**20  # weights x targets: above, one batched product costs more than one after the other
SAME_CHANGE = 1e-3  # of a change: how far two routes to it may be apart, beside rounding
SAME_CHANGE_OF_CASTS = 0.05  # the same within autocast, whose factors have 8 bits


@dataclass
class _Results:
    after: Tensor
    source_after: Tensor
    losses: Tensor


def look_after(problem: Problem, gradients: Gradients, x: Tensor, buffers: list[Tensor] | None = None) -> Tensor:
    """The outputs at ``x`` after the step by these gradients, which is written to the buffers."""
    stepped = [torch.empty_like(p.data) for p in problem.parameters] if buffers is None else buffers
    with torch.no_grad():
        problem.step.write(gradients, stepped)
    with problem.weights_at(stepped):
        return problem.forward(x)


def _step_and_look(problem: Problem, source: int, x: Tensor, buffers: list[Tensor]) -> tuple[Tensor, Tensor]:
    loss, gradients = problem.gradient(source)
    return loss, look_after(problem, gradients, x, buffers)


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
    n = problem.n_sources
    weight_bytes = sum(p.numel() * p.element_size() for p in problem.parameters)
    result_bytes = n * problem.n_targets * problem.n_outputs * problem.before.element_size()
    check_memory(2 * result_bytes + 2 * weight_bytes, max_memory, problem.before.device)
    limit = VMAP_BYTES if max_memory is None else max_memory - 2 * result_bytes
    plan = _planned(problem, route, chunk_size, weight_bytes, limit)
    copies = 2 if plan.route == "step" else 1 + 2 * plan.chunk_size
    plan.estimated_bytes = 2 * result_bytes + copies * weight_bytes
    check_memory(plan.estimated_bytes, max_memory, problem.before.device)
    results = _Results(
        problem.before.new_empty((n, problem.n_targets, problem.n_outputs)),
        torch.empty_like(problem.source_before),
        problem.before.new_empty(n),
    )
    buffers = [torch.empty_like(p.data) for p in problem.parameters]
    with Progress(progress, n, f"{n} x {problem.n_targets} pairs, engine replay") as bar:
        reason = _by_vmap(problem, plan, results, buffers, bar, meter) if plan.route == "vmap" else None
        if reason is not None:
            if route == "vmap":
                raise InputError(expected="a problem that route='vmap' can batch", got=reason, do="use route='step'")
            plan.route, plan.chunk_size = "step", 1
            plan.notes.append(f"route vmap: {reason}")
        if plan.route == "step":
            _by_step(problem, plan, results, buffers, bar, meter)
    for source in torch.nonzero(~torch.isfinite(results.losses)).flatten().tolist():
        problem.check_loss(results.losses[source], source)
    _settle(problem, results, buffers)
    change = results.after - problem.before
    source_change = results.source_after - problem.source_before
    result = Result(results.after, results.source_after, change, source_change, results.losses, plan)
    if check_pairs:
        result.linearization_error = _check_against_linear(problem, result, check_pairs)
    return result


# --- the route, by counting -----------------------------------------------------------------------------------------


def _planned(problem: Problem, route: str | None, chunk_size: int | None, weight_bytes: int, limit: int) -> Plan:
    """The plan, from counts alone (docs/engines.md)."""
    plan = Plan("replay", route or "step", 1, problem.target_chunk_size)
    if route == "vmap":
        reason = why_no_vmap(problem)
        if reason is not None:
            raise InputError(expected="a problem that route='vmap' can batch", got=reason, do="use route='step'")
    elif route is None:
        reason = why_no_vmap(problem) or _why_step_is_less(problem)
        if reason is None and chunk_size != 1:
            plan.route = "vmap"
        elif reason is not None:
            plan.notes.append(f"route step: {reason}")
    if plan.route == "vmap":
        plan.chunk_size = min(problem.n_sources, chunk_size or VMAP_CHUNK)
        if route is None and chunk_size is None and (1 + 2 * plan.chunk_size) * weight_bytes > limit:
            plan.notes.append(f"route step: {plan.chunk_size} copies of the weights do not fit")
            plan.route, plan.chunk_size = "step", 1
        elif route is None:
            plan.notes.append("route vmap: few weights and targets, no convolution, many sources")
    return plan


def why_no_vmap(problem: Problem) -> str | None:
    """The reason why sources cannot go several at once, known without trying; None where there is none."""
    if problem.restless is not None:
        return problem.restless
    if not problem.step.elementwise:
        return "the update runs a copy of the optimiser, or looks at all gradients at once"
    if any(p.is_complex() for p in problem.parameters):
        return "complex weights"
    reason = problem.subject.why_not_by_slots(problem.parameters)
    if reason is not None:
        return reason
    if any(p._backward_hooks for p in problem.parameters):
        return "hooks on the gradients of weights"
    if any(getattr(module, "scale_grad_by_freq", False) for module in problem.subject.reach.modules):
        return "embeddings that scale their gradient by the frequency in a batch"
    # A parameter without gradient stays, but torch.func gives zeros for it: weight decay would then move it.
    if problem.idle:
        return "parameters without gradient"
    return None


def _why_step_is_less(problem: Problem) -> str | None:
    weights = sum(p.numel() for p in problem.parameters)
    if problem.n_sources < VMAP_LEAST_SOURCES:
        return f"fewer than {VMAP_LEAST_SOURCES} sources"
    if has_convolutions(problem.model):
        return "convolutions gain nothing from batched weights"
    if weights * problem.n_targets > VMAP_MOST_PRODUCTS:
        return f"{weights:,} weights x {problem.n_targets:,} targets are more than {VMAP_MOST_PRODUCTS:,}"
    return None


def has_convolutions(model: nn.Module) -> bool:
    """Whether any layer is a convolution."""
    return any(isinstance(module, nn.modules.conv._ConvNd) for module in model.modules())


# --- the work -------------------------------------------------------------------------------------------------------


def _by_step(
    problem: Problem, plan: Plan, results: _Results, buffers: list[Tensor], bar: Progress, meter: MemoryMeter
) -> None:
    started = time.perf_counter()
    for source in range(problem.n_sources):
        loss, looked = _step_and_look(problem, source, problem.rows(source), buffers)
        problem.check_loss(loss, source)
        _keep(problem, results, source, loss, looked)
        if math.isnan(plan.estimated_seconds):
            plan.estimated_seconds = (time.perf_counter() - started) * problem.n_sources
            bar.estimate(plan.estimated_seconds)
        bar.advance(1)
        meter.look()


def _by_vmap(
    problem: Problem, plan: Plan, results: _Results, buffers: list[Tensor], bar: Progress, meter: MemoryMeter
) -> str | None:
    """Take the sources in chunks; returns why that is not right or not possible, None where it is done."""
    started = time.perf_counter()
    for start in range(0, problem.n_sources, plan.chunk_size):
        stop = min(start + plan.chunk_size, problem.n_sources)
        try:
            losses, looked = _vmap_chunk(problem, start, stop)
        except InputError:
            raise
        except USER_ERRORS as error:
            return first_line(error)
        for offset in range(stop - start):
            _keep(problem, results, start + offset, losses[offset], looked[offset])
        if math.isnan(plan.estimated_seconds):
            plan.estimated_seconds = (time.perf_counter() - started) * problem.n_sources / (stop - start)
            bar.estimate(plan.estimated_seconds)
        bar.advance(stop - start)
        meter.look()
    for source in sorted({0, problem.n_sources - 1}):
        reason = _differs_from_step(problem, results, source, buffers)
        if reason is not None:
            return reason
    return None


def _differs_from_step(problem: Problem, results: _Results, source: int, buffers: list[Tensor]) -> str | None:
    """Compare the changes of a source with those of a plain real step."""
    loss, looked = _step_and_look(problem, source, problem.rows(source), buffers)
    real = looked[: problem.n_targets] - problem.before
    error = (results.after[source] - problem.before - real).norm(dim=-1)
    same = SAME_CHANGE_OF_CASTS if torch.is_autocast_enabled(problem.targets.device.type) else SAME_CHANGE
    allowed = same * real.norm(dim=-1) + 10 * problem.noise_floor
    if bool((error <= allowed).all()) and close(loss, results.losses[source]):
        return None
    if not bool(torch.isfinite(loss)) or not bool(torch.isfinite(real).all()):
        return None  # what is not finite is told by its own check
    size = float(error.max()) / max(float(real.norm(dim=-1).max()), 1e-300)
    return f"its changes at source {source} are off by {size:.2g} from a real step's"


def _keep(problem: Problem, results: _Results, source: int, loss: Tensor, looked: Tensor) -> None:
    results.losses[source] = loss
    results.after[source] = looked[: problem.n_targets]
    index = int(problem.self_index[source])
    results.source_after[source] = looked[index] if index >= 0 else looked[-1]


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


def _vmap_chunk(problem: Problem, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Losses and outputs after the step for several sources at once, by ``torch.func``."""
    weights = [p.detach() for p in problem.parameters]
    step = problem.step
    problem.subject.rewind()

    def one(x: Tensor, y: Tensor, ignored: Tensor) -> tuple[Tensor, Tensor]:
        gradients, loss = torch.func.grad_and_value(problem.loss_at)(weights, x.unsqueeze(0), y.unsqueeze(0))
        if bool(problem.ignored.any()):
            gradients, loss = [torch.where(ignored, 0, g) for g in gradients], torch.where(ignored, 0, loss)
        stepped = [
            step.stepped(index, weight, gradient)
            for index, (weight, gradient) in enumerate(zip(weights, gradients, strict=True))
        ]
        rows = torch.cat([problem.targets, x.unsqueeze(0)]) if problem.has_strangers else problem.targets
        parts = [problem.output_at(stepped, part) for part in rows.split(problem.target_chunk_size)]
        return loss / step.loss_scale, torch.cat(parts)

    with torch.no_grad():
        some = slice(start, stop)
        ignored = problem.ignored[some].to(problem.inputs.device)
        return torch.func.vmap(one, randomness="error")(problem.inputs[some], problem.labels[some], ignored)


def _check_against_linear(problem: Problem, result: Result, check_pairs: int) -> float:
    """How far the first-order change of the first source is from its finite change, on a few targets."""
    reason = problem.restless or problem.subject.why_not_by_slots(problem.parameters)
    if reason is not None:
        result.plan.notes.append(f"linearisation unchecked: {reason}")
        return float("nan")
    rows = slice(0, min(check_pairs, problem.n_targets))
    source = problem.first_source
    try:
        directions = problem.step.directions(problem.gradient(source)[1])
        linear = first_order_change(problem, directions, problem.targets[rows])
    except USER_ERRORS as error:
        result.plan.notes.append(f"linearisation unchecked: {first_line(error)}")
        return float("nan")
    return relative_error(result.change[source, rows], linear)
