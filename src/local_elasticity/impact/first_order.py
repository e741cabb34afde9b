"""First-order changes: the derivative of the outputs along a direction of the weights, and how it is checked."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from local_elasticity.base.errors import USER_ERRORS
from local_elasticity.impact.pairs.capture import transformable
from local_elasticity.impact.plan import Plan
from local_elasticity.impact.problem import Gradients, Problem

ALLOWED = 0.02  # of a first-order change: how far a central difference of the real forward pass may be from it
CHECKED_TARGETS = 8
NOT_THE_DERIVATIVE = "backward passes that are not the derivative (a hook or function that changes gradients)"


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
    problem.subject.rewind()
    with torch.no_grad(), transformable(problem.model):
        return torch.func.jvp(lambda values: problem.output_at(values, x), (weights,), (directions,))[1]


def relative_error(finite: Tensor, linear: Tensor) -> float:
    """‖finite - linear‖ / ‖finite‖; NaN where nothing moved."""
    size = float(finite.norm())
    return float((finite - linear).norm()) / size if size else float("nan")


def derivative_error(problem: Problem, source: int, linear: Float[Tensor, "rows outputs"]) -> float:
    """How far a contracted change of the first targets is from the derivative itself, in parts of what is allowed.

    Contraction takes the Jacobian from backward passes, which a hook or a function of the model may have changed. It is
    compared with forward-mode differentiation, to rounding; where that cannot follow, with ``difference_error``.

    Returns:
        At most 1 where it is right.
    """
    gradients = problem.gradient(source)[1]
    try:
        exact = first_order_change(problem, problem.step.directions(gradients), problem.targets[: len(linear)])
    except USER_ERRORS:
        return difference_error(problem, source, linear, gradients) / ALLOWED
    return rounding_error(problem, exact, linear)


def rounding_error(problem: Problem, exact: Tensor, linear: Tensor) -> float:
    """How far a contracted change is from the derivative, in parts of what rounding may do."""
    eps = torch.finfo(problem.output_dtype).eps
    allowed = eps**0.5 * float(exact.norm()) + eps * float(problem.before.abs().max())
    return float((exact - linear).norm()) / max(allowed, 1e-300)


def difference_error(
    problem: Problem, source: int, linear: Float[Tensor, "rows outputs"], gradients: Gradients | None = None
) -> float:
    """How far a first-order change of the first targets is from a central difference of real forward passes.

    The weights go along the step's direction, as far as moves the outputs by a size at which neither rounding nor
    curvature counts; less far where that crosses a kink.

    Args:
        problem: the problem.
        source: whose step.
        linear: its first-order change.
        gradients: of that source, where they are at hand.

    Returns:
        ‖difference - linear‖ / ‖linear‖; 0 where both are within rounding.
    """
    directions = problem.step.directions(problem.gradient(source)[1] if gradients is None else gradients)
    moving = [float(d.norm()) / (float(p.detach().norm()) + 1e-30) for p, d in _pairs(problem, directions)]
    eps, scale = torch.finfo(problem.output_dtype).eps, float(problem.before[: len(linear)].norm()) or 1.0
    size, longest = float(linear.norm()), max(moving)
    furthest = 1.0 if longest == 0 else 0.1 / longest
    errors = []
    for part in (3.0, 0.3):
        reach = min(part * eps**0.5 * scale / size, furthest) if size else 0.1 * part * furthest
        errors.append(_error_at(problem, directions, reach, linear, 4 * eps * scale / reach))
        if errors[-1] <= ALLOWED:
            break
    return min(errors)


def _error_at(problem: Problem, directions: list[Tensor], reach: float, linear: Tensor, rounding: float) -> float:
    x = problem.targets[: len(linear)]
    moved = _outputs_along(problem, directions, reach, x) - _outputs_along(problem, directions, -reach, x)
    error = float((moved / (2 * reach) - linear).norm())
    return 0.0 if error <= rounding else error / max(float(linear.norm()), 1e-300)


def _pairs(problem: Problem, directions: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(problem.parameters, directions, strict=True))


def _outputs_along(problem: Problem, directions: list[Tensor], reach: float, x: Tensor) -> Tensor:
    with torch.no_grad():
        values = [p.detach().add(d, alpha=reach) for p, d in _pairs(problem, directions)]
    with problem.weights_at(values):
        return problem.forward(x)
