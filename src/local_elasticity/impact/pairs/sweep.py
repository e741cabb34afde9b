"""Route "contract" of the linear engine: every pair's first-order change by one contraction (spec srel 2.0).

change(x, x') = -lr sum_p <J_p(x'), J_p(x)^T dL/df(x)>, and a direction that is common to all sources (weight decay,
the momentum so far) by one Jacobian-vector product. Steps that are not affine in the gradient go another route.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from local_elasticity.base.errors import USER_ERRORS, InputError, first_line
from local_elasticity.impact.first_order import first_order_change
from local_elasticity.impact.losses import one_number
from local_elasticity.impact.pairs.products import (
    BLOCK_BYTES,
    DEFAULT_BYTES,
    Contraction,
    chunk_for,
    contract,
    unit_cotangents,
)
from local_elasticity.impact.plan import check_memory
from local_elasticity.impact.problem import LossFunction, Problem, no_gradient, widened
from local_elasticity.impact.subject import SHARED_MEMORY

MOST_LABELS = 2  # at which the loss is compared with real forward passes, where it cannot reach the model


@dataclass
class LossFactors:
    """What the losses of the sources pass back to the outputs, and what one common term passes to the weights.

    Attributes:
        losses: of each source.
        cotangents: the gradient of each source's loss by its outputs.
        penalty: the gradient of a term on the weights that is the same at every source; None where there is none.
    """

    losses: Float[Tensor, " sources"]
    cotangents: Float[Tensor, "sources outputs"]
    penalty: list[Tensor | None] | None = None


def loss_factors(problem: Problem) -> LossFactors | str:
    """The factors of the user's real loss, or why the loss is not one of the outputs and a common term.

    The losses are taken at outputs cut from the model, and compared with real forward passes, where the loss finds
    what the pass left behind: at some sources of different labels where the loss cannot reach the model, else at all.
    """
    outputs = problem.source_before.to(problem.output_dtype)
    outputs = outputs.squeeze(1) if problem.is_flat else outputs
    try:
        losses, cotangents = per_sample_losses(outputs, problem.labels, problem.loss_fn, problem.ignored)
    except InputError:
        raise
    except USER_ERRORS as error:
        return f"the loss reads more than the outputs ({type(error).__name__})"
    found = LossFactors(widened(losses), widened(cotangents).reshape(problem.source_before.shape))
    penalties = []
    for source in _sources_to_check(problem):
        penalty = _cut(problem, source, found)
        if isinstance(penalty, str):
            return penalty
        penalties.append(penalty)
    if any(any(g is not None for g in penalty) for penalty in penalties):
        if not all(_alike(penalty, penalties[0]) for penalty in penalties):
            return "the loss reads activations, or weights in a way that differs between sources"
        found.penalty = penalties[0]
    return found


def per_sample_losses(
    outputs: Tensor, labels: Tensor, loss_fn: LossFunction, ignored: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Loss of each sample and its gradient by the outputs; both zero where a label is ignored."""
    outputs = outputs.detach().clone().requires_grad_()
    with torch.enable_grad():
        losses = [one_number(loss_fn(row, y)) for row, y in zip(outputs.split(1), labels.clone().split(1), strict=True)]
        total = torch.stack(losses)
        if not total.requires_grad:
            raise InputError(
                expected="a loss that depends on the model's outputs",
                got="a loss without gradient",
                do="return loss_fn(outputs, labels) without detaching",
            )
        counted = total if ignored is None else total[~ignored.to(total.device)]
        gradient = torch.autograd.grad(counted.sum(), outputs, allow_unused=True)[0]
    by_outputs = torch.zeros_like(outputs) if gradient is None else gradient
    if ignored is None or not bool(ignored.any()):
        return total.detach(), by_outputs
    still = ignored.to(outputs.device)
    by_outputs = torch.where(still.view(-1, *[1] * (outputs.dim() - 1)), 0.0, by_outputs)
    return total.detach().masked_fill(still, 0.0), by_outputs


def _sources_to_check(problem: Problem) -> list[int]:
    counted = torch.nonzero(~problem.ignored).flatten().tolist()
    if problem.subject.loss_meets_model:
        return counted
    labels = problem.labels.reshape(problem.n_sources, -1).tolist()
    firsts: dict[tuple[float, ...], int] = {}
    for source in counted:
        firsts.setdefault(tuple(labels[source]), source)
    return list(firsts.values())[:MOST_LABELS]


def _cut(problem: Problem, source: int, factors: LossFactors) -> list[Tensor | None] | str:
    """What the loss passes to the weights past the outputs, right after a real forward pass of this source."""
    with torch.enable_grad():
        output = problem.subject.call(problem.inputs[source : source + 1])
        leaf = output.detach().requires_grad_()
        loss = one_number(problem.loss_fn(leaf, problem.labels[source : source + 1].clone()))
        if not loss.requires_grad:
            raise no_gradient()
        by_output, *by_weights = torch.autograd.grad(loss, [leaf, *problem.parameters], allow_unused=True)
    eps = torch.finfo(problem.output_dtype).eps ** 0.5
    mine = torch.zeros_like(factors.cotangents[source]) if by_output is None else by_output.detach().reshape(-1)
    near = (mine - factors.cotangents[source]).abs().max() <= eps * (1e-30 + mine.abs().max() + 1e-3)
    if not bool(near) or not bool((loss.detach() - factors.losses[source]).abs() <= eps * (1 + loss.detach().abs())):
        return "the loss reads more than the outputs (activations without their graph, or other samples)"
    return [None if g is None else g.detach() for g in by_weights]


def _alike(one: list[Tensor | None], other: list[Tensor | None]) -> bool:
    return all(
        (a is None and b is None) or (a is not None and b is not None and _close(a, b))
        for a, b in zip(one, other, strict=True)
    )


def _close(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= 1e3 * torch.finfo(one.dtype).eps * (one.abs().max() + 1e-30))


@dataclass
class Contracted:
    """The route made ready: what it contracts, in which chunks, and what that will cost.

    Attributes:
        losses: of each source.
        cotangents: the gradient of each source's loss by its outputs.
        common: the change that the update makes at every target and source, whatever the source; None where none.
        chunk_size: samples captured at once.
        estimated_bytes: captures, blocks and results.
        notes: what was added to the products.
    """

    problem: Problem
    contraction: Contraction
    losses: Tensor
    cotangents: Tensor
    common: list[Tensor] | None
    chunk_size: int
    estimated_bytes: int
    notes: list[str] = field(default_factory=list)

    def work(self, advance: Callable[[int], None] | None = None) -> tuple[Tensor, Tensor]:
        """First-order change of every target and at the sources themselves."""
        problem, k = self.problem, self.problem.n_outputs
        units = unit_cotangents(problem.n_targets, k, problem.before)
        change = contract(
            problem.model,
            problem.inputs,
            self.cotangents,
            problem.targets,
            units,
            chunk_size=self.chunk_size,
            contraction=self.contraction,
            advance=advance,
        )
        index = problem.self_index.clamp(min=0)
        own = change[torch.arange(problem.n_sources, device=index.device), index]
        strangers = torch.nonzero(problem.self_index < 0).flatten()
        for some in strangers.split(self.chunk_size) if len(strangers) else ():
            own[some] = self._own(some)
        if self.common is not None:
            change += self._along(self.common, problem.targets)
            own += self._along(self.common, problem.inputs)
        return change, own

    def _own(self, some: Tensor) -> Float[Tensor, "sources outputs"]:
        """The change at sources that are no targets."""
        x, u = self.problem.inputs[some], self.cotangents[some].unsqueeze(1)
        units = unit_cotangents(len(x), self.problem.n_outputs, self.problem.before)
        whole = self.contraction.capture(x, units)
        out = self.problem.before.new_zeros((1, units.shape[1], len(x)))
        self.contraction.add_own(whole.combined(u), whole, out)
        self.contraction.add_left_over((x, u), (x, units), out, own=True)
        return out[0].T

    def _along(self, directions: list[Tensor], x: Tensor) -> Tensor:
        parts = x.split(max(self.problem.target_chunk_size, 1))
        return torch.cat([first_order_change(self.problem, directions, part) for part in parts])

    def change_of(self, source: int, n_targets: int) -> Float[Tensor, "targets outputs"]:
        """First-order change of the first targets by one source."""
        problem, some = self.problem, slice(source, source + 1)
        targets = problem.targets[:n_targets]
        units = unit_cotangents(len(targets), problem.n_outputs, problem.before)
        change = contract(
            problem.model, problem.inputs[some], self.cotangents[some], targets, units, contraction=self.contraction
        )
        return change[0] if self.common is None else change[0] + self._along(self.common, targets)


def prepare(problem: Problem, *, chunk_size: int | None, max_memory: int | None) -> Contracted | str:
    """Make the route ready and check that it is right for this model and loss; or say why it is not admissible.

    Raises:
        InputError: for a model whose outputs mix samples, a loss that is not finite, or too small a memory.
    """
    affine = problem.step.affine()
    if affine is None:
        return "the update is not affine in the gradient"
    if any(p.is_complex() for p in problem.parameters):
        return "complex weights"
    if problem.subject.why_not_by_slots(problem.parameters) == SHARED_MEMORY:
        return SHARED_MEMORY
    scales, common = affine
    item = problem.before.element_size()
    pairs = problem.n_sources * problem.n_targets * problem.n_outputs * item
    results = 3 * pairs  # the contraction, the change and after
    budget = DEFAULT_BYTES if max_memory is None else max_memory - results
    block = min(BLOCK_BYTES, max(budget // 8, 2**16))
    if any(p._backward_hooks for p in problem.parameters):
        return "hooks on the gradients of weights"
    try:
        contraction = Contraction(
            problem.model, problem.targets, parameters=problem.parameters, scales=scales, block_bytes=block
        )
    except InputError:
        raise
    except USER_ERRORS as error:
        return f"the layers cannot be followed ({first_line(error)})"
    factors = loss_factors(problem)
    if isinstance(factors, str):
        return factors
    if not _is_linear_backwards(problem, factors.cotangents[problem.first_source]):
        return "a backward pass that is not linear (a hook or function that changes gradients)"
    for source in torch.nonzero(~torch.isfinite(factors.losses)).flatten().tolist():
        problem.check_loss(factors.losses[source], source)
    notes = []
    if common is not None:
        # a parameter without gradient stays where it is: neither momentum nor decay moves it
        common = [torch.zeros_like(d) if i in problem.idle else d for i, d in enumerate(common)]
    if factors.penalty is not None:
        common = _with_penalty(problem, scales, common, factors.penalty)
        notes.append("a term of the loss on the weights, alike at every source, is added to the products")
    k, n = problem.n_outputs, max(problem.n_sources, problem.n_targets)
    left_over = sum(problem.parameters[i].numel() for i in contraction.left_over) * item * 2 * (k + 1)
    least = int(results + 2 * contraction.bytes_per_sample(k + 1) + 4 * block + left_over)
    check_memory(least, max_memory, problem.before.device)
    spare = budget - 4 * block - left_over if max_memory is not None else budget
    chunk = chunk_size or chunk_for(contraction, k + 1, n, spare // 2)
    captured = int(contraction.bytes_per_sample(k + 1) * min(chunk, n) * (1 if problem.n_targets <= chunk else 2))
    return Contracted(
        problem,
        contraction,
        factors.losses,
        factors.cotangents,
        common,
        chunk,
        results + captured + 4 * block + left_over,
        notes,
    )


def _is_linear_backwards(problem: Problem, cotangent: Tensor) -> bool:
    """Whether the backward pass of a sum is the sum of the backward passes, as contraction takes it to be."""
    other = torch.linspace(1.0, 2.0, cotangent.numel(), dtype=cotangent.dtype, device=cotangent.device)
    other = other * (cotangent.abs().max() + (cotangent.abs().max() == 0)) * 3
    with torch.enable_grad():
        output = problem.subject.call(problem.inputs[problem.first_source : problem.first_source + 1])
        parts = [
            torch.autograd.grad(
                output, problem.parameters, seed.reshape(output.shape).to(output), retain_graph=True, allow_unused=True
            )
            for seed in (cotangent, other, cotangent + other)
        ]
    tolerance = 1e3 * torch.finfo(problem.output_dtype).eps
    return all(
        _largest((_dense(c) - _dense(a)).sub_(_dense(b)))
        <= tolerance * (_largest(_dense(a)) + _largest(_dense(b)) + 1e-30)
        for a, b, c in zip(*parts, strict=True)
        if a is not None and a.numel()
    )


def _largest(x: Tensor) -> float:
    """The largest modulus, NaN where any number is; several times faster than ``abs().max()``."""
    low, high = torch.aminmax(x)
    return float(torch.maximum(high, -low))


def _dense(x: Tensor | None) -> Any:
    return x.to_dense() if x is not None and x.is_sparse else x


def _with_penalty(
    problem: Problem, scales: Sequence[float], common: list[Tensor] | None, penalty: list[Tensor | None]
) -> list[Tensor]:
    """The direction that a term on the weights adds to every source's step."""
    start = [torch.zeros_like(p) for p in problem.parameters] if common is None else common
    return [d if g is None else d.add(g, alpha=s) for d, g, s in zip(start, penalty, scales, strict=True)]
