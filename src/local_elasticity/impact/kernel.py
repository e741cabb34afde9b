"""The empirical neural tangent kernel K(x, x') = J(x) J(x')^T of a network as it stands (spec srel 2.0, 2.7)."""

from __future__ import annotations

import math
import time
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from local_elasticity.base.checks import check_bytes, check_choice, check_flag, check_whole
from local_elasticity.base.errors import InputError
from local_elasticity.base.progress import Progress
from local_elasticity.base.tensors import check_fits, check_module
from local_elasticity.impact import checks
from local_elasticity.impact.pairs.products import BLOCK_BYTES, Contraction, chunk_for, contract
from local_elasticity.impact.plan import check_memory, told_of_memory
from local_elasticity.impact.problem import all_converted, asked, measured_in
from local_elasticity.impact.subject import Mode, Subject, preserved
from local_elasticity.impact.wrappers import inner_module

Form = Literal["full", "trace"] | int

WORKING_BYTES = 512 * 2**20  # of factors at once, without max_memory


def kernel(
    model: nn.Module,
    xs: Tensor,
    xt: Tensor | None = None,
    *,
    form: Form = "full",
    chunk_size: int | None = None,
    max_memory: int | None = None,
    dtype: torch.dtype | None = None,
    mode: Mode = "eval",
    progress: bool = False,
) -> Float[Tensor, "sources targets ..."]:
    """The empirical neural tangent kernel of the model's outputs, K(x, x') = J(x) J(x')^T over all trainable weights.

    Exact up to rounding. The model, its buffers, gradients, flags and the random streams are left as they are.

    Args:
        model: any module whose output is (batch, K) or (batch,).
        xs: inputs (n_s, ...).
        xt: inputs (n_t, ...); ``xs`` itself by default, and then the kernel is exactly symmetric.
        form: "full" for (n_s, n_t, K, K), first the output at ``xs``; "trace" for the sum over equal outputs
            (n_s, n_t); a number for that output alone (n_s, n_t).
        chunk_size: samples whose Jacobians are held at once; by default as memory allows.
        max_memory: bytes that Jacobians and the result may take.
        dtype: computed on a copy converted to this dtype, for example ``torch.float64``.
        mode: "eval" or "as_is" for the module's flags meanwhile; a module in train mode is refused.
        progress: show the estimate, then a progress bar.

    Returns:
        The kernel, in the model's dtype and on its device.

    Raises:
        InputError: for bad input, an unknown form, or a memory limit below one chunk.

    Source: Jacot, Gabriel, Hongler, "Neural Tangent Kernel" (arXiv:1806.07572), at the weights as they are.
    """
    check_whole("chunk_size", chunk_size, or_none=True)
    check_bytes("max_memory", max_memory)
    check_choice("mode", mode, get_args(Mode))
    check_flag("progress", progress)
    checks.check_measured_dtype(dtype)
    with torch.inference_mode(False):
        model = inner_module(check_module("model", model))
        checks.check_model(model)
        sources = checks.check_targets(xs, "xs")
        targets = sources if xt is None else checks.check_targets(xt, "xt")
        check_fits(model, "xs", sources)
        check_fits(model, "xt", targets)
        kind, only_narrow = measured_in(model, dtype)
        sources, _, targets = all_converted((sources, sources, targets), kind, only_narrow)
        with told_of_memory(), preserved(model, mode, dtype=kind, only_narrow=only_narrow) as subject:
            contraction = _prepared(subject, sources, max_memory)
            asked(subject, targets[:1])
            outputs = _chosen_outputs(form, contraction.n_outputs)
            rows = len(outputs) if form == "full" else 1
            own = parameters_dtype(model).itemsize
            result_bytes = 2 * len(sources) * len(targets) * rows**2 * own
            needed = result_bytes + 2 * math.ceil(contraction.bytes_per_sample(rows)) * (chunk_size or 1)
            check_memory(needed, max_memory, sources.device)
            room = WORKING_BYTES if max_memory is None else max_memory - result_bytes
            passes = [outputs] if form == "full" else [[output] for output in outputs]
            title = f"kernel of {len(sources)} x {len(targets)} samples"
            total: Tensor | None = None
            with Progress(progress, len(sources) * len(passes), title) as bar:
                told = _Estimate(bar, len(sources) * len(passes))
                for some in passes:
                    part = contract(
                        model,
                        sources,
                        u := _cotangents(some, contraction, sources),
                        targets,
                        u if targets is sources else _cotangents(some, contraction, targets),
                        chunk_size=chunk_size,
                        max_memory=room,
                        contraction=contraction,
                        advance=told,
                    )
                    total = part if total is None else total.add_(part)
    assert total is not None
    blocks = total.permute(0, 2, 1, 3)
    blocks = 0.5 * (blocks + blocks.permute(1, 0, 3, 2)) if xt is None else blocks
    return blocks.contiguous() if form == "full" else blocks[:, :, 0, 0].contiguous()


def kernel_diagonal(
    model: nn.Module, xs: Tensor, *, form: Literal["trace"] | int = 0, mode: Mode = "eval"
) -> Float[Tensor, " sources"]:
    """K(x, x) of every sample, the squared norm of its gradient.

    Args:
        model: any module whose output is (batch, K) or (batch,).
        xs: inputs (n, ...).
        form: "trace" for the sum over outputs, or a number for that output alone.
        mode: as in ``kernel``.

    Raises:
        InputError: as ``kernel``.
    """
    check_choice("mode", mode, get_args(Mode))
    with torch.inference_mode(False):
        model = inner_module(check_module("model", model))
        checks.check_model(model)
        x = checks.check_targets(xs, "xs")
        kind, only_narrow = measured_in(model, None)
        x = all_converted((x, x, x), kind, only_narrow)[0]
        with told_of_memory(), preserved(model, mode, dtype=kind, only_narrow=only_narrow) as subject:
            contraction = _prepared(subject, x, None)
            found = torch.zeros(len(x), dtype=parameters_dtype(model), device=x.device)
            for output in _chosen_outputs(form, contraction.n_outputs):
                for some in torch.arange(len(x), device=x.device).split(
                    chunk_for(contraction, 1, len(x), WORKING_BYTES)
                ):
                    part = x[some]
                    u = _cotangents([output], contraction, part)
                    own = found.new_zeros((1, 1, len(part)))
                    taken = contraction.capture(part, u)
                    contraction.add_own(taken, taken, own)
                    contraction.add_left_over((part, u), (part, u), own, own=True)
                    found[some] += own[0, 0]
    return found


def parameters_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the first trainable weight."""
    return next(p.dtype for p in model.parameters() if p.requires_grad)


def _prepared(subject: Subject, x: Tensor, max_memory: int | None) -> Contraction:
    if any(module.training for module in subject.model.modules()):
        raise InputError(expected="mode='eval' for a kernel", got="modules in train mode", do="use mode='eval'")
    if any(p.is_complex() for p in subject.model.parameters()):
        raise InputError(
            expected="real weights for a kernel", got="complex ones", do="use le.measure, which takes complex weights"
        )
    block = min(BLOCK_BYTES, max((max_memory or WORKING_BYTES) // 8, 2**16))
    asked(subject, x[:1])
    return subject.check_quiet(lambda: Contraction(subject.model, x, block_bytes=block))


def _cotangents(outputs: list[int], contraction: Contraction, x: Tensor) -> Float[Tensor, "samples rows outputs"]:
    """The unit vectors of these outputs, at every sample."""
    dtype = contraction.parameters.parameters[0].dtype
    units = torch.eye(contraction.n_outputs, dtype=dtype, device=x.device)[outputs]
    return units.expand(len(x), *units.shape)


class _Estimate:
    """Advances the bar, and tells from the first chunk what the whole takes."""

    def __init__(self, bar: Progress, total: int) -> None:
        self.bar, self.total, self.started, self.told = bar, total, time.perf_counter(), False

    def __call__(self, done: int) -> None:
        if not self.told:
            self.bar.estimate((time.perf_counter() - self.started) * self.total / done)
            self.told = True
        self.bar.advance(done)


def _chosen_outputs(form: Form, n_outputs: int) -> list[int]:
    if form in ("full", "trace"):
        return list(range(n_outputs))
    if isinstance(form, int) and not isinstance(form, bool) and 0 <= form < n_outputs:
        return [form]
    raise InputError(
        expected=f"form 'full', 'trace', or an output in 0..{n_outputs - 1}",
        got=repr(form),
        do="choose one of them",
    )
