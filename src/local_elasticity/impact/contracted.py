"""Route "contract" of the linear engine: every pair's first-order change by one contraction (spec srel 2.0).

change(x, x') = -lr sum_p <J_p(x'), J_p(x)^T dL/df(x)>, and a direction that is common to all sources (weight decay,
the momentum so far) by one Jacobian-vector product. Steps that are not affine in the gradient go another route.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from local_elasticity.errors import InputError
from local_elasticity.impact.contraction import (
    BLOCK_BYTES,
    DEFAULT_BYTES,
    Contraction,
    chunk_for,
    contract,
    per_sample_gradients,
    unit_cotangents,
)
from local_elasticity.impact.linear import first_order_change
from local_elasticity.impact.plan import check_memory
from local_elasticity.impact.problem import LossFunction, Problem, as_scalar

T = TypeVar("T")
PILOT_SHARE = 16  # the pilot takes one sample of so many, on each side


def loss_gradients(problem: Problem) -> tuple[Float[Tensor, " sources"], Float[Tensor, "sources outputs"], bool]:
    """Loss of each source and its gradient by the outputs; and whether the loss reads the weights in another way."""
    with torch.no_grad():
        flat = problem.model(problem.inputs[:1]).dim() == 1
    outputs = problem.source_before.squeeze(1) if flat else problem.source_before
    losses, gradients, reads = per_sample_losses(outputs, problem.labels, problem.loss_fn, problem.parameters)
    return losses, gradients.reshape(problem.source_before.shape), reads


def per_sample_losses(
    outputs: Tensor, labels: Tensor, loss_fn: LossFunction, parameters: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor, bool]:
    """Loss of each sample, its gradient by the outputs, and whether any of the parameters gets one directly."""
    outputs = outputs.detach().clone().requires_grad_()
    with torch.enable_grad():
        losses = [as_scalar(loss_fn(row, y)) for row, y in zip(outputs.split(1), labels.split(1), strict=True)]
        total = torch.stack(losses)
        if not total.requires_grad:
            raise InputError(
                expected="a loss that depends on the model's outputs",
                got="a loss without gradient",
                do="return loss_fn(outputs, labels) without detaching",
            )
        found = torch.autograd.grad(total.sum(), [outputs, *parameters], allow_unused=True)
    by_outputs = torch.zeros_like(outputs) if found[0] is None else found[0]
    return total.detach(), by_outputs, any(g is not None for g in found[1:])


@dataclass
class Contracted:
    """The route made ready: what it contracts, in which chunks, and what that will cost.

    Attributes:
        losses: of each source.
        cotangents: the gradient of each source's loss by its outputs.
        common: the change that the update makes at every target and source, whatever the source; None where none.
        chunk_size: samples captured at once.
        estimated_seconds: of the work still to do.
        estimated_bytes: captures, blocks and results.
    """

    problem: Problem
    contraction: Contraction
    losses: Tensor
    cotangents: Tensor
    common: list[Tensor] | None
    chunk_size: int
    estimated_bytes: int
    estimated_seconds: float = float("nan")

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


def prepare(problem: Problem, *, chunk_size: int | None, max_memory: int | None) -> Contracted | str:
    """Make the route ready, check that it is right for this model, and time a pilot; or say why it is not admissible.

    Raises:
        InputError: for a model whose outputs mix samples, a loss that is not finite, or too small a memory.
    """
    affine = problem.step.affine()
    if affine is None:
        return "the update is not affine in the gradient"
    losses, cotangents, reads_weights = loss_gradients(problem)
    for source in torch.nonzero(~torch.isfinite(losses)).flatten().tolist():
        problem.check_loss(losses[source], source)
    if reads_weights:
        return "the loss reads the weights directly, not only through the outputs"
    factors, common = affine
    if common is not None:
        # a parameter without gradient stays where it is: neither momentum nor decay moves it
        gradients = problem.gradient(0)[1]
        common = [torch.zeros_like(d) if g is None else d for d, g in zip(common, gradients, strict=True)]
    item = problem.before.element_size()
    pairs = problem.n_sources * problem.n_targets * problem.n_outputs * item
    results = 3 * pairs  # the contraction, the change and after
    budget = DEFAULT_BYTES if max_memory is None else max_memory - results
    block = min(BLOCK_BYTES, max(budget // 8, 2**16))
    contraction = Contraction(
        problem.model, problem.targets, parameters=problem.parameters, scales=factors, block_bytes=block
    )
    k, n = problem.n_outputs, max(problem.n_sources, problem.n_targets)
    left_over = sum(problem.parameters[i].numel() for i in contraction.left_over) * item * 2 * (k + 1)
    least = int(results + 2 * contraction.bytes_per_sample(k + 1) + 4 * block + left_over)
    check_memory(least, max_memory)
    spare = budget - 4 * block - left_over if max_memory is not None else budget
    chunk = chunk_size or chunk_for(contraction, k + 1, n, spare // 2)
    captured = int(contraction.bytes_per_sample(k + 1) * min(chunk, n) * (1 if problem.n_targets <= chunk else 2))
    made = Contracted(
        problem, contraction, losses, cotangents, common, chunk, results + captured + 4 * block + left_over
    )
    made.estimated_seconds = _pilot(made)
    return made


def _pilot(made: Contracted) -> float:
    """Time captures and products of a sixteenth of the samples on each side, and carry them to all."""
    problem, contraction = made.problem, made.contraction
    n, m, k = problem.n_sources, problem.n_targets, problem.n_outputs
    few, some = min(n, max(4, n // PILOT_SHARE)), min(m, max(8, m // PILOT_SHARE))
    few, some = min(few, made.chunk_size), min(some, made.chunk_size)
    same = problem.inputs is problem.targets
    units = unit_cotangents(some, k, problem.before)
    half = max(1, some // 2)
    small, _ = _timed(lambda: contraction.capture(problem.targets[:half], units[:half]))
    large, right = _timed(lambda: contraction.capture(problem.targets[:some], units))
    slope = max(0.0, (large - small) / max(some - half, 1))
    slope = slope or large / some
    fixed = max(0.0, large - slope * some)
    chunks, passes = -(-n // made.chunk_size), -(-m // made.chunk_size)
    turns = chunks * passes if passes > 1 else 1
    seconds = turns * fixed + chunks * slope * m if passes > 1 else fixed + slope * m
    if not same:
        one, left = _timed(lambda: contraction.capture(problem.inputs[:few], made.cotangents[:few].unsqueeze(1)))
        seconds += one / few * n
    else:
        left = right.combined(made.cotangents[:some].unsqueeze(1))
        few = some
    out = problem.before.new_zeros((1, few, k, some))
    product = _timed(lambda: contraction.add_products(left, right, out))[0]
    done = contraction.operations(left, right, few, some)
    seconds += product * contraction.operations(left, right, n, m) / max(done, 1.0)
    if contraction.left_over:
        chosen = [problem.parameters[i] for i in contraction.left_over]
        two = _timed(lambda: per_sample_gradients(problem.model, chosen, problem.targets[:2], units[:2]))[0]
        seconds += two / len(problem.targets[:2]) * (m + n / max(k, 1))
    strangers = int((problem.self_index < 0).sum())
    if strangers:
        seconds += 2 * slope * strangers
    # reading and writing the results: the transposed copy, and after = before + change
    flow = torch.zeros(min(n * m * k, 2**20), dtype=problem.before.dtype, device=problem.before.device)
    copied = _timed(lambda: flow + 1)[0]
    return seconds + 4 * copied * n * m * k / len(flow)


def _timed(work: Callable[[], T]) -> tuple[float, T]:
    started = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started, result
