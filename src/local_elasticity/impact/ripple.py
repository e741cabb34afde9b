"""The probe as He and Su's code takes it: one SGD step a source, its rate tripled until the source's output moves.

Source: the code published with "The Local Elasticity of Neural Networks" (arXiv:1910.06943); spec srel 1.1, 1.2. It
starts at a rate of 1e-6, restores the weights before each try, and stops when float32 shows any change at the source.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from local_elasticity.base.checks import check_choice, check_flag
from local_elasticity.base.errors import InputError
from local_elasticity.base.progress import Progress
from local_elasticity.base.tensors import check_module
from local_elasticity.impact import checks
from local_elasticity.impact.plan import told_of_memory
from local_elasticity.impact.problem import LossFunction, Problem
from local_elasticity.impact.subject import Mode, preserved
from local_elasticity.impact.update import SGD
from local_elasticity.impact.wrappers import inner_module

START, FACTOR, MOST = 1e-6, 3.0, 1e4


@dataclass
class Ripple:
    """What the smallest visible step at each source did to the output at each target; ``s_rel`` reads it.

    Attributes:
        before: outputs at the targets before any step.
        after: outputs at the targets after the step of each source.
        source_before: outputs at each source before its step.
        source_after: outputs at each source after its step.
        change: after minus before.
        source_change: the same at the sources.
        outputs: what the model emits.
        lr: the rate that each source's step had.
        slope: the derivative of the loss at each source by its output, before the step.
        moved: whether the source's output changed at any rate tried; where it did not, nothing is known of it.
    """

    before: Float[Tensor, "targets outputs"]
    after: Float[Tensor, "sources targets outputs"]
    source_before: Float[Tensor, "sources outputs"]
    source_after: Float[Tensor, "sources outputs"]
    change: Float[Tensor, "sources targets outputs"]
    source_change: Float[Tensor, "sources outputs"]
    outputs: str
    lr: Float[Tensor, " sources"]
    slope: Float[Tensor, "sources outputs"]
    moved: Bool[Tensor, " sources"]


@told_of_memory()
def ripple(
    model: nn.Module,
    loss_fn: LossFunction,
    sources: tuple[Tensor, Tensor],
    targets: Tensor | None = None,
    *,
    outputs: str = "values",
    mode: Mode = "eval",
    progress: bool = False,
) -> Ripple:
    """Take the smallest visible SGD step at each source, as He and Su's code does, and look at every target.

    The rates tried are 1e-6, 3e-6, 9e-6, … below 1e4. As in that code, a source counts as moved when its own output
    differs by one bit, so these ratios carry float noise of order one where the model is float32 and the steps small:
    ``s_rel_limit`` and ``s_ker`` are what they estimate. The model is left as it is.

    Args:
        model: any module whose output is (batch, K) or (batch,).
        loss_fn: ``loss_fn(outputs, labels)``, called with one sample.
        sources: inputs (n_s, ...) and labels (n_s, ...).
        targets: inputs (n_t, ...); the sources by default.
        outputs: what the model emits: "values", "logits" or "probabilities".
        mode: "eval", "train" or "as_is" for the module's flags meanwhile.
        progress: show a progress bar.

    Raises:
        InputError: for anything that cannot be measured.
    """
    check_choice("outputs", outputs, ("logits", "probabilities", "values"))
    check_choice("mode", mode, get_args(Mode))
    check_flag("progress", progress)
    checks.check_loss_function(loss_fn)
    with torch.inference_mode(False):
        model = inner_module(check_module("model", model))
        checks.check_model(model)
        inputs, labels = checks.check_sources(sources)
        looked_at = inputs if targets is None else checks.check_targets(targets)
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with preserved(model, mode, loss_fn) as subject:
        step = SGD(START).bind(parameters)
        problem = Problem(subject, loss_fn, inputs, labels, looked_at, parameters, step)
        problem.look_before(outputs)
        n = problem.n_sources
        after = problem.before.new_empty((n, problem.n_targets, problem.n_outputs))
        source_after = problem.source_before.clone()
        lr = problem.before.new_full((n,), math.nan)
        slope = torch.empty_like(problem.source_before)
        moved = torch.zeros(n, dtype=torch.bool, device=after.device)
        buffers = [torch.empty_like(p.data) for p in problem.parameters]
        with Progress(progress, n, f"smallest visible step of {n} sources") as bar:
            for source in range(n):
                loss, gradients = problem.gradient(source)
                problem.check_loss(loss, source)
                slope[source] = _slope(problem, source)
                looked, rate = _smallest_step(problem, source, gradients, buffers)
                after[source] = looked[: problem.n_targets]
                index = int(problem.self_index[source])
                source_after[source] = looked[index] if index >= 0 else looked[-1]
                lr[source], moved[source] = rate, not math.isnan(rate)
                bar.advance()
    before, source_before = problem.before, problem.source_before
    return Ripple(
        before,
        after,
        source_before,
        source_after,
        after - before,
        source_after - source_before,
        outputs,
        lr,
        slope,
        moved,
    )


def _smallest_step(
    problem: Problem, source: int, gradients: list[Tensor | None], buffers: list[Tensor]
) -> tuple[Tensor, float]:
    """Outputs after the first rate that moves the source, and that rate; NaN where none does.

    A rate that moves nothing at the source alone is passed over cheaply; the verdict is always on the whole batch.
    """
    own = problem.inputs[source : source + 1]
    alone = problem.forward(own)
    index = int(problem.self_index[source])
    looked, rate = problem.forward(problem.rows(source)), START
    while rate < MOST:
        with torch.no_grad():
            for p, g, out in zip(problem.parameters, gradients, buffers, strict=True):
                torch.add(p.data, 0 if g is None else g, alpha=-rate, out=out)
        with problem.weights_at(buffers):
            if not torch.equal(problem.forward(own), alone):
                looked = problem.forward(problem.rows(source))
                if not torch.equal(looked[index], problem.source_before[source]):
                    return looked, rate
        rate *= FACTOR
    return looked, math.nan


def _slope(problem: Problem, source: int) -> Float[Tensor, " outputs"]:
    """dL/df at one source."""
    with torch.enable_grad():
        output, loss = problem.loss(source)
        slope = torch.autograd.grad(loss, output)[0].detach().reshape(-1)
    if not bool(torch.isfinite(slope).all()):
        raise InputError(
            expected="a finite derivative of the loss at every source",
            got=f"{slope.tolist()} at source {source}",
            do="train less, or let the model emit logits",
        )
    return slope
