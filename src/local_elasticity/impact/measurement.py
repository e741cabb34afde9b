"""The measurement at one moment: `measure` takes a step at each source and looks at every target."""

from __future__ import annotations

import time
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from local_elasticity.base.checks import check_choice, check_flag
from local_elasticity.base.errors import NoiseWarning
from local_elasticity.base.tensors import check_module
from local_elasticity.impact import checks
from local_elasticity.impact.choice import choose
from local_elasticity.impact.linear import measure_linear
from local_elasticity.impact.plan import MemoryMeter, Plan, told_of_memory
from local_elasticity.impact.problem import LossFunction, Problem, all_converted, measured_in
from local_elasticity.impact.replay import measure_replay
from local_elasticity.impact.subject import Mode, preserved
from local_elasticity.impact.trimming import trimmed
from local_elasticity.impact.update import Update
from local_elasticity.impact.wrappers import check_alone, inner_module

Engine = Literal["auto", "replay", "linear"]
Outputs = Literal["logits", "probabilities", "values"]
Route = Literal["step", "vmap", "contract", "jvp"]
_ROUTES = {"auto": get_args(Route), "replay": ("step", "vmap"), "linear": ("contract", "jvp")}


@dataclass
class Impact:
    """What one update at each source did to the outputs at each target.

    Attributes:
        before: outputs at the targets before any step, on the model's device and in its dtype.
        after: outputs at the targets after the step of each source (engine "linear": before + first-order change).
        source_before: outputs at each source before its own step.
        source_after: outputs at each source after its own step.
        change: after minus before; the linear engine computes it without cancellation.
        source_change: the same at the sources themselves.
        losses: the loss at each source before its step.
        self_index: for each source the position of the same sample among the targets, -1 where it is not there.
        outputs: what the model emits: "logits", "probabilities" or "values".
        update: name of the update.
        plan: how it was done and what it cost.
        noise_floor: float noise of the output at each target.
        independent: whether the labels or the loss show that the outputs are not one distribution over classes.
        linearization_error: ‖finite - first-order change‖ / ‖finite change‖ on the checked pairs (NaN: unchecked).
    """

    before: Float[Tensor, "targets outputs"]
    after: Float[Tensor, "sources targets outputs"]
    source_before: Float[Tensor, "sources outputs"]
    source_after: Float[Tensor, "sources outputs"]
    change: Float[Tensor, "sources targets outputs"]
    source_change: Float[Tensor, "sources outputs"]
    losses: Float[Tensor, " sources"]
    self_index: Int[Tensor, " sources"]
    outputs: str
    update: str
    plan: Plan
    noise_floor: Float[Tensor, " targets"]
    linearization_error: float = float("nan")
    independent: bool = False
    below_noise: Bool[Tensor, "sources targets"] = field(init=False)

    def __post_init__(self) -> None:
        """Flag the pairs whose change is within ten times the noise of the target."""
        self.below_noise = self.change.norm(dim=-1) < 10 * self.noise_floor


def measure(
    model: nn.Module,
    loss_fn: LossFunction,
    sources: tuple[Tensor, Tensor],
    targets: Tensor | None = None,
    *,
    update: Update,
    engine: Engine = "auto",
    outputs: Outputs = "logits",
    chunk_size: int | None = None,
    target_chunk_size: int | None = None,
    route: Route | None = None,
    mode: Mode = "eval",
    dtype: torch.dtype | Literal["as_is"] | None = None,
    check_pairs: int = 8,
    max_memory: int | None = None,
    progress: bool = False,
) -> Impact:
    """Measure how much one update at each source moves the output at every target (spec srel 1.1, 1.7).

    All that the model and the loss can reach is bit for bit the same afterwards: weights, buffers, attributes,
    gradients, flags, inputs, generators and random streams. Every forward pass starts from the same state, so no look
    depends on another. Changes of two sources are compared with a real step on every route.

    Args:
        model: any module whose output is (batch, K) or (batch,).
        loss_fn: ``loss_fn(outputs, labels)``, called with one sample.
        sources: inputs (n_s, ...) and labels (n_s, ...): where an update is taken.
        targets: inputs (n_t, ...): where we look; the sources themselves by default.
        update: the step, for example ``SGD(lr=0.01)``, ``Adam(lr=1e-4)`` or ``from_optimizer(opt)``.
        engine: "replay" takes the finite step; "linear" its first-order limit. "auto" is "linear" where that says the
            same for less: 16 sources or more, an update that is affine in the gradient (SGD with or without momentum
            and decay), first-order change of the checked pairs within 1 % of the finite one (or the finite one lost
            in rounding), and fewer passes by count; else "replay". ``plan.notes`` says what decided.
        outputs: what the model emits; probability definitions refuse "values".
        chunk_size: sources at once (engine linear: samples captured at once); by default chosen by counting.
        target_chunk_size: targets in one forward pass; all of them by default.
        route: "step" or "vmap" for replay, "contract" (all pairs at once) or "jvp" (source by source, any update) for
            linear; by default chosen by counting weights, samples and outputs (docs/engines.md), never by the clock.
            A forced route that differs from a real step is refused.
        mode: "eval", "train" or "as_is" for the module's flags during the measurement.
        dtype: measure in this dtype, for example ``torch.float64``: every tensor that the model or the loss holds is
            converted for the time being. Weights of 16 bits are measured in float32 unless it is "as_is".
        check_pairs: targets of the first source at which the other engine is asked too; 0 turns the check off.
        max_memory: bytes that copies of weights and results may take.
        progress: show the estimate, then a progress bar.

    Returns:
        The impact, with its plan, its noise floor and its linearisation error.

    Raises:
        InputError: for anything that cannot be measured, before the work where possible.
    """
    started = time.perf_counter()
    check_choice("engine", engine, get_args(Engine))
    check_choice("outputs", outputs, get_args(Outputs))
    check_choice("mode", mode, get_args(Mode))
    check_choice("route", route, _ROUTES[engine], or_none=True)
    checks.check_numbers(chunk_size, target_chunk_size, check_pairs, max_memory)
    checks.check_measured_dtype(dtype)
    check_flag("progress", progress)
    checks.check_loss_function(loss_fn)
    checks.check_update(update)
    with torch.inference_mode(False):
        model = inner_module(check_module("model", model))
        check_alone(model, mode)
        checks.check_model(model)
        inputs, labels = checks.check_sources(sources)
        looked_at = inputs if targets is None else checks.check_targets(targets, like=inputs)
        kind, only_narrow = measured_in(model, dtype)
        originals = {name: p for name, p in model.named_parameters() if p.requires_grad}
        inputs, labels, looked_at = all_converted((inputs, labels, looked_at), kind, only_narrow)
    with told_of_memory(), preserved(model, mode, loss_fn, kind, only_narrow) as subject:
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        step = update.bind(parameters, originals)
        problem = Problem(subject, loss_fn, inputs, labels, looked_at, parameters, step, target_chunk_size)
        problem.look_before(outputs)
        run, notes = measure_linear, []
        if engine == "auto":
            run, notes = choose(
                problem, chunk_size=chunk_size, route=route, check_pairs=check_pairs, max_memory=max_memory
            )
        elif engine == "replay":
            run = measure_replay
        with trimmed(problem) if run is measure_replay else nullcontext(0) as left_out:
            if left_out:
                problem.look_before(outputs)
            meter = MemoryMeter(next(iter(parameters.values())).device)
            result = run(
                problem,
                chunk_size=chunk_size,
                route=route,
                check_pairs=check_pairs,
                max_memory=max_memory,
                progress=progress,
                meter=meter,
            )
        problem.check_late_draws()
    plan: Plan = result.plan
    plan.notes[:0] = notes
    plan.notes += problem.notes
    if left_out:
        plan.notes.append(f"{left_out:,} weights only ever meet padding and were left out")
    if only_narrow:
        plan.notes.append("weights of 16 bits are measured on float32 copies (dtype='as_is' measures them as they are)")
    if subject.reach.is_cut:
        plan.notes.append(
            "some state is too large to be watched: what containers of over 1,000 items hold, arrays of over 64 MiB"
        )
    plan.peak_bytes = meter.rise
    plan.measured_seconds = time.perf_counter() - started
    impact = Impact(
        before=problem.before,
        after=result.after,
        source_before=problem.source_before,
        source_after=result.source_after,
        change=result.change,
        source_change=result.source_change,
        losses=result.losses,
        self_index=problem.self_index,
        outputs=outputs,
        update=update.name,
        plan=plan,
        noise_floor=problem.noise_floor,
        linearization_error=result.linearization_error,
        independent=problem.independent,
    )
    if plan.engine == "replay":
        _warn_of_noise(impact, problem.ignored)
    return impact


def _warn_of_noise(impact: Impact, ignored: Tensor) -> None:
    flagged = int(impact.below_noise[~ignored.to(impact.below_noise.device)].sum())
    if flagged and bool(impact.change.any()):
        warnings.warn(
            f"{flagged} of {impact.below_noise.numel()} pairs move less than ten times the noise of their target: "
            "use float64 (dtype= here, a float64 model in a Tracker), a larger step, or the limit (engine='linear', "
            "limits= of a Tracker)",
            NoiseWarning,
            stacklevel=3,
        )
