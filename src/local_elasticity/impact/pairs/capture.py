"""One pass over a batch that keeps, per layer, its inputs and the gradients at its outputs: no hook, nothing patched.

The forward pass runs under a torch-function mode, which sees every function that a layer (or the user's own code)
calls with a parameter. The gradients at the outputs of these calls are asked of autograd by their edges in the graph,
as they were when the call returned: operations in place afterwards do not matter, and no weight's gradient is formed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from local_elasticity.impact.checks import check_output
from local_elasticity.impact.pairs.rules import (
    RULES,
    Call,
    Direct,
    Layout,
    Lookup,
    Outer,
    Part,
    Rule,
    attention_with,
    kind,
)
from local_elasticity.impact.subject import call

Key = tuple[int, tuple[int, int]]
"""A parameter by its position, and the rows of it."""


@contextmanager
def eager(model: nn.Module) -> Iterator[None]:
    """No fused inference paths and no compiled code inside: both hide what is called. Restored afterwards."""
    fused = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        if any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in model.modules()):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)


@contextmanager
def transformable(model: nn.Module) -> Iterator[None]:
    """As ``eager``, and attention by its formula: its fused kernels know no forward-mode derivative and no vmap."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with eager(model), sdpa_kernel(SDPBackend.MATH):
        yield


class Parameters:
    """Finds out which parameter a tensor is, or which rows of one."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.index = {id(p): i for i, p in enumerate(self.parameters)}

    def key(self, x: Tensor | None) -> Key | None:
        """The place of a parameter or of a block of its rows; None for anything else."""
        if not isinstance(x, Tensor):
            return None
        index = self.index.get(id(x))
        if index is not None:
            return index, (0, x.shape[0] if x.dim() else 1)
        base = x._base
        index = None if base is None else self.index.get(id(base))
        if index is None or base is None or base.dim() == 0 or x.shape[1:] != base.shape[1:]:
            return None
        if x.stride() != base.stride() or not base.is_contiguous() or base.stride(0) == 0:
            return None
        first, rest = divmod(int(x.storage_offset() - base.storage_offset()), int(base.stride(0)))
        return None if rest else (index, (first, first + x.shape[0]))

    def among(self, args: Any) -> list[int]:
        """The parameters among a function's arguments, blocks of rows included."""
        leaves = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
        found = [self.index.get(id(x), self.index.get(id(x._base)) if x._base is not None else None) for x in leaves]
        return [i for i in found if i is not None]


@dataclass
class Record:
    """One call that a rule covers."""

    rule: Rule
    call: Call
    edge: GradientEdge
    shape: torch.Size
    dtype: torch.dtype
    parts: list[Part]


class Recorder(TorchFunctionMode):
    """Records the calls that touch parameters while a forward pass runs.

    Args:
        parameters: the parameters of interest.
        n: samples in the batch.
        layouts: for each recorded call in order where its samples are; None to go by shapes.
        reading: parameters whose calls are read in another than the likeliest way, and which.
    """

    def __init__(
        self,
        parameters: Parameters,
        n: int,
        layouts: Sequence[Layout] | None = None,
        reading: Mapping[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.parameters, self.n, self.forced, self.reading = parameters, n, layouts, reading or {}
        self.records: list[Record] = []
        self.signature: list[tuple[Any, ...]] = []
        self._attention = attention_with(self._linear)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function and look at what it was given."""
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            return self._attention(*args, **kwargs)
        return self._watch(func, args, kwargs)

    def _linear(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._watch(F.linear, args, kwargs)

    def _watch(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        if not torch.is_grad_enabled():
            return result
        touched = self.parameters.among((args, kwargs))
        if not touched or not any(isinstance(x, Tensor) and x.requires_grad for x in tree_leaves(result)):
            return result
        made = RULES.get(func)
        parts: list[Part] = []
        if made is not None and isinstance(result, Tensor):
            parts = self._apply(made, result, args, kwargs, touched)
        # A view of a parameter is no use of it yet: the function that gets the view is.
        covered = sorted({key[0] for part in parts for key in self._keys(part)})
        name = kind(made) if parts and made is not None else getattr(func, "__name__", str(func))
        self.signature.append((name, tuple(touched), tuple(covered)))
        return result

    def _apply(self, made: Rule, result: Tensor, args: Any, kwargs: dict[str, Any], touched: list[int]) -> list[Part]:
        position = len(self.records)
        possible: list[Layout] = Call.layouts(result, self.n)
        if self.forced is not None and position < len(self.forced):
            possible = [self.forced[position]] if self.n == 1 or self.forced[position] in possible else []
        if not possible:
            return []
        turn = max(self.reading.get(i, 0) for i in touched)
        call = Call(self.n, possible[min(turn, len(possible) - 1)])
        with torch.no_grad():
            bare = {key: self._bare(value) for key, value in kwargs.items()}
            try:
                parts = [part for part in made(call, *map(self._bare, args), **bare) if self._keys(part)]
            except (ValueError, RuntimeError, TypeError, IndexError):  # a use that the rule was not made for
                return []
        if parts:
            record = Record(made, call, get_gradient_edge(result), result.shape, result.dtype, parts)
            self.records.append(record)
        return parts

    def _bare(self, x: Any) -> Any:
        """Without its graph, which a rule would keep alive; parameters stay what they are."""
        return x.detach() if isinstance(x, Tensor) and self.parameters.key(x) is None else x

    def _keys(self, part: Part) -> list[Key]:
        named = [part.weight, part.bias] if isinstance(part, Outer) else [part.weight]
        return [key for x in named if (key := self.parameters.key(x)) is not None]


@dataclass
class Factor:
    """One call's part in a weight's gradient, for all samples of a batch and all rows of cotangents.

    Attributes:
        part: the rule's expanders.
        key: the weight, or None where only the bias is of interest.
        bias: the bias, or None.
        gradients: gradients at the output, (rows, samples, ...).
    """

    part: Outer | Lookup
    key: Key | None
    bias: Key | None
    gradients: Float[Tensor, "rows samples *output"]

    def inputs(self, some: slice) -> Float[Tensor, "samples groups positions d_in"]:
        """Expanded inputs of some samples."""
        assert isinstance(self.part, Outer)
        return self.part.expand_inputs(self.part.inputs[some]).to(self.gradients.dtype)

    def outputs(self, some: slice) -> Float[Tensor, "rows samples *groups positions d_out"]:
        """Expanded gradients of some samples, every row."""
        g = self.gradients[:, some]
        return self.part.expand_gradients(g.flatten(0, 1)).unflatten(0, g.shape[:2])


@dataclass
class Capture:
    """What a batch's layers saw and passed back: enough for every inner product of its samples' gradients."""

    n: int
    rows: int
    outputs: Float[Tensor, "samples outputs"]
    factors: list[Factor]
    direct: dict[Key, Float[Tensor, "rows samples numbers"]]
    signature: tuple[Any, ...]
    layouts: list[Layout]
    n_bytes: tuple[int, int] = (0, 0)  # without rows, and for each row

    def combined(self, weights: Float[Tensor, "samples new rows"]) -> Capture:
        """The capture for other cotangents, which are combinations of the rows of this one."""

        def mix(g: Tensor) -> Tensor:
            return torch.einsum("nqr,rnd->qnd", weights.to(g), g.flatten(2)).unflatten(2, g.shape[2:])

        factors = [Factor(f.part, f.key, f.bias, mix(f.gradients)) for f in self.factors]
        direct = {key: mix(g) for key, g in self.direct.items()}
        return Capture(
            self.n, weights.shape[1], self.outputs, factors, direct, self.signature, self.layouts, self.n_bytes
        )


def capture(
    model: nn.Module,
    parameters: Parameters,
    x: Tensor,
    cotangents: Float[Tensor, "samples rows outputs"],
    *,
    layouts: Sequence[Layout] | None = None,
    reading: Mapping[int, int] | None = None,
    check: Tensor | None = None,
) -> tuple[Capture, list[Tensor | None]]:
    """Run the model on a batch and keep the factors of every sample's gradients.

    Args:
        model: the network, its outputs (batch, K) or (batch,).
        parameters: the parameters of interest.
        x: the batch.
        cotangents: what the outputs' Jacobian is multiplied with, for each sample in some rows.
        layouts: for each call where its samples are.
        reading: parameters whose calls are read in another than the likeliest way.
        check: weights (samples, rows): also return autograd's gradient of sum_ir check_ir cotangent_ir . output_i.

    Returns:
        The capture, and the gradients for the check (empty without).
    """
    n, rows = cotangents.shape[:2]
    reference: list[Tensor | None] = []
    with torch.enable_grad(), eager(model):
        with Recorder(parameters, n, layouts, reading) as recorder:
            out = check_output(call(model, x), n)
        records = recorder.records
        if not out.requires_grad:
            records, rows_left = [], 0
        else:
            rows_left = rows
        edges = [record.edge for record in records]
        if check is not None and out.requires_grad:
            seed = torch.einsum("nr,nrk->nk", check.to(cotangents), cotangents).to(out)
            reference = list(
                torch.autograd.grad(out, parameters.parameters, seed, retain_graph=True, allow_unused=True)
            )
        made = _Factors(parameters, records, n, rows)
        for row in range(rows_left if edges else 0):
            got = torch.autograd.grad(
                out, edges, cotangents[:, row].to(out), retain_graph=row < rows - 1, allow_unused=True
            )
            made.take(row, got)
    result = Capture(
        n,
        rows,
        out.detach(),
        made.factors(),
        made.direct,
        tuple(recorder.signature),
        [record.call.layout for record in records],
        (made.n_bytes, made.row_bytes),
    )
    return result, [None if g is None else g.detach() for g in reference]


def _gradient_of(part: Direct, g: Tensor) -> Tensor:
    """The gradient of a small parameter at every sample; NaN, which fails the check, for a use not made for it."""
    try:
        return part.gradient(g)
    except (ValueError, RuntimeError, TypeError, IndexError):
        return torch.full((len(g), 1), float("nan"), dtype=part.weight.dtype, device=g.device)


@dataclass
class _Factors:
    """Sorts the gradients at the calls' outputs into factors and direct gradients as they come, row by row."""

    parameters: Parameters
    records: list[Record]
    n: int
    rows: int
    direct: dict[Key, Tensor] = field(default_factory=dict)
    n_bytes: int = 0
    row_bytes: int = 0

    def __post_init__(self) -> None:
        self.kept: list[Tensor | None] = [None] * len(self.records)

    @torch.no_grad()
    def take(self, row: int, got: Sequence[Tensor | None]) -> None:
        """The gradients at every call's output for one row of cotangents."""
        for position, (record, g) in enumerate(zip(self.records, got, strict=True)):
            if g is None:
                continue
            if any(isinstance(part, Outer | Lookup) for part in record.parts):
                self._keep(position, row, record.call.samples_first(g))
            for part in record.parts:
                if isinstance(part, Direct):
                    self._add(part, row, _gradient_of(part, g))

    def _keep(self, position: int, row: int, g: Tensor) -> None:
        part = next(part for part in self.records[position].parts if isinstance(part, Outer | Lookup))
        dtype = part.weight.dtype
        if self.rows == 1:
            self.kept[position] = g.to(dtype).unsqueeze(0)
            return
        kept = self.kept[position]
        if kept is None:
            kept = self.kept[position] = torch.zeros((self.rows, *g.shape), dtype=dtype, device=g.device)
        kept[row] = g

    def _add(self, part: Direct, row: int, g: Tensor) -> None:
        key = self.parameters.key(part.weight)
        if key is None:
            return
        if key not in self.direct:
            self.direct[key] = torch.zeros((self.rows, *g.shape), dtype=part.weight.dtype, device=g.device)
        self.direct[key][row] += g

    def factors(self) -> list[Factor]:
        """The factors, without the calls that passed nothing back."""
        made = []
        for record, g in zip(self.records, self.kept, strict=True):
            for part in record.parts:
                if isinstance(part, Direct) or g is None:
                    continue
                bias = self.parameters.key(part.bias) if isinstance(part, Outer) else None
                made.append(Factor(part, self.parameters.key(part.weight), bias, g))
                inputs = part.inputs if isinstance(part, Outer) else part.ids
                self.n_bytes += 2 * inputs.numel() * inputs.element_size()
        kept = [g for g in self.kept if g is not None]
        kept += list(self.direct.values())
        self.row_bytes = sum(g[0].numel() * g.element_size() for g in kept)
        self.n_bytes += 2 * self.row_bytes  # what autograd holds meanwhile
        return made
