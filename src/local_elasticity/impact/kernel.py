"""The empirical neural tangent kernel K(x, x') = J(x) J(x')^T of a network as it stands (spec srel 2.0, 2.7)."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from local_elasticity.errors import InputError
from local_elasticity.impact import checks, dense
from local_elasticity.impact.plan import check_memory
from local_elasticity.impact.progress import Progress
from local_elasticity.impact.state import Mode, call_at, preserved

Form = Literal["full", "trace"] | int

WORKING_BYTES = 512 * 2**20  # of Jacobians or factors at once, without max_memory


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
    with torch.inference_mode(False):
        checks.check_model(model)
        sources = checks.check_targets(xs)
        targets = sources if xt is None else checks.check_targets(xt)
        if dtype is not None:
            model = copy.deepcopy(model).to(dtype)
            same = targets is sources
            sources = sources.to(dtype) if sources.is_floating_point() else sources
            targets = sources if same else (targets.to(dtype) if targets.is_floating_point() else targets)
        with preserved(model, mode):
            if any(module.training for module in model.modules()):
                raise InputError(expected="mode='eval' for a kernel", got="modules in train mode", do="use mode='eval'")
            with torch.no_grad():
                n_outputs = checks.check_output(model(sources[:1]), 1).shape[1]
            outputs = _chosen_outputs(form, n_outputs)
            blocks = _contract(model, sources, targets, outputs, form, chunk_size, max_memory, progress)
    return blocks if form == "full" else blocks[:, :, 0, 0]


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
    return torch.cat([kernel(model, x, form=form, mode=mode).reshape(1) for x in checks.check_targets(xs).split(1)])


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


def _contract(
    model: nn.Module,
    xs: Tensor,
    xt: Tensor,
    outputs: list[int],
    form: Form,
    chunk_size: int | None,
    max_memory: int | None,
    progress: bool,
) -> Float[Tensor, "sources targets k k"]:
    """Tile by tile; only the upper triangle where both sides are the same samples."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    same, full = xs is xt, form == "full"
    layers = dense.covered(model)
    if layers and dense.Factors.of(model, xs[:1], outputs) is None:
        layers = []
    size = dense.bytes_per_sample(layers, len(outputs))
    size = size or sum(p.numel() for p in parameters) * len(outputs) * parameters[0].element_size()
    blocks = parameters[0].new_zeros((len(xs), len(xt), *((len(outputs),) * 2 if full else (1, 1))))
    result_bytes = 2 * blocks.numel() * blocks.element_size()
    check_memory(result_bytes + 2 * size * (chunk_size or 1), max_memory)
    room = WORKING_BYTES if max_memory is None else max_memory - result_bytes
    step = chunk_size or max(1, room // size if same and room >= size * len(xs) else room // (2 * size))
    starts = [(i, j) for i in range(0, len(xs), step) for j in range(i if same else 0, len(xt), step)]

    def prepared(x: Tensor) -> _Jacobians | dense.Factors:
        factors = dense.Factors.of(model, x, outputs) if layers else None
        return factors or _Jacobians(_jacobian(model, parameters, x, outputs))

    with Progress(progress, len(starts), f"kernel of {len(xs)} x {len(xt)} samples") as bar:
        started, row, left = time.perf_counter(), -1, None
        for i, j in starts:
            if i != row:
                row, left = i, prepared(xs[i : i + step])
            right: Any = left if same and i == j else prepared(xt[j : j + step])
            assert left is not None
            tile = left.contract(right, full)
            blocks[i : i + step, j : j + step] = tile
            if same and i != j:
                blocks[j : j + step, i : i + step] = tile.permute(1, 0, 3, 2)
            bar.advance()
            if (i, j) == starts[0]:
                bar.estimate((time.perf_counter() - started) * len(starts))
    return 0.5 * (blocks + blocks.permute(1, 0, 3, 2)) if same else blocks


@dataclass
class _Jacobians:
    """The Jacobians of some samples, one matrix a parameter: for networks that are not linear layers alone."""

    parts: list[Float[Tensor, "samples k weights"]]

    def contract(self, other: _Jacobians, full: bool) -> Float[Tensor, "samples others k k"]:
        equation = "xkp,ylp->xykl" if full else "xkp,ykp->xy"
        total = sum(torch.einsum(equation, a, b) for a, b in zip(self.parts, other.parts, strict=True))
        assert isinstance(total, Tensor)
        return total if full else total[:, :, None, None]


def _jacobian(
    model: nn.Module, parameters: list[nn.Parameter], x: Tensor, outputs: list[int]
) -> list[Float[Tensor, "samples k weights"]]:
    """The derivative of the chosen outputs by every trainable weight, one matrix a parameter."""
    values = [p.detach() for p in parameters]

    def one(weights: list[Tensor], sample: Tensor) -> Tensor:
        return checks.check_output(call_at(model, parameters, weights, sample[None]), 1)[0, outputs]

    jacobians = torch.func.vmap(torch.func.jacrev(one), (None, 0))(values, x)
    return [j.flatten(2).detach() for j in jacobians]
