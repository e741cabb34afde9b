"""Inner products of per-sample gradients, <J(x)^T u, J(x')^T v> for all pairs, layer by layer (spec srel 2.0).

A layer's product of two samples goes by the cheaper of two forms: over pairs of positions,
sum_{t,s} (a_t . a'_s)(g_t . g'_s), or through blocks of the per-sample gradients, which are multiplied and freed.
Samples x parameters is never formed. A parameter that no rule covers, or whose rule does not reproduce autograd's
gradient, falls back, alone, to per-sample gradients by ``torch.func``.
"""

from __future__ import annotations

import itertools
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from local_elasticity.base.errors import USER_ERRORS, InputError
from local_elasticity.impact.checks import check_output
from local_elasticity.impact.pairs.capture import Capture, Factor, Key, Parameters, capture, eager, transformable
from local_elasticity.impact.pairs.rules import Layout, Lookup, Outer
from local_elasticity.impact.subject import Subject, call, call_at, subject_of

PROBE = 5  # samples of the check: a prime, so that an axis of positions is rarely taken for the samples'
BLOCK_BYTES = 32 * 2**20
DEFAULT_BYTES = 2**30
LEAST_KEPT = 128  # samples to a chunk, below which captures are rather taken again than kept
MOVE = 12  # operations of a matrix product that cost as much as moving one number through memory


class Contraction:
    """The contraction for one model: which parameter goes which way, found and checked on a few samples.

    Args:
        model: the network; its outputs must be (batch, K) or (batch,), and must not mix samples.
        x: inputs for the check, a few suffice.
        parameters: the parameters of interest; those that require gradients by default.
        scales: what each parameter's products are multiplied with; 1 by default.
        block_bytes: what a block of intermediate products may take.

    Attributes:
        ways: for each parameter "rule", "unused" or "fallback".
        reasons: why a parameter fell back, by position.
        calls: how many calls each rule saw in one forward pass.
        forms: for each parameter by position, the form its products took last.

    Raises:
        InputError: for a model whose outputs mix samples, differ between two calls, or have no gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        *,
        parameters: Sequence[nn.Parameter] | None = None,
        scales: Sequence[float] | None = None,
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        self.model = model
        chosen = [p for p in model.parameters() if p.requires_grad] if parameters is None else list(parameters)
        self.parameters = Parameters(chosen)
        self.scales = [1.0] * len(chosen) if scales is None else list(scales)
        self.block_bytes = block_bytes
        self.forms: dict[int, str] = {}
        self.reasons: dict[int, str] = {}
        self.ways = ["rule"] * len(chosen)
        self.calls: Counter[str] = Counter()
        self._layouts: list[Layout] = []
        self._signature: tuple | None = None
        self._reading: dict[int, int] = {}
        probe = x[: min(PROBE, len(x))]
        self.n_outputs = self._check_samples(probe)
        self._probe(probe)

    # -- the check --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _check_samples(self, x: Tensor) -> int:
        """The outputs of a sample must not depend on its company."""
        with eager(self.model):
            together = check_output(call(self.model, x), len(x))
            again = check_output(call(self.model, x[:1]), 1)[0]
        scale = float(together.abs().max())
        tolerance = torch.finfo(together.dtype).eps ** 0.5 * max(scale, 1e-30)
        if torch.is_autocast_enabled(x.device.type):
            tolerance = 0.05 * scale
        if len(x) > 1 and float((together[0] - again).abs().max()) > tolerance:
            raise InputError(
                expected="a model whose outputs at a sample do not depend on the other samples of the batch",
                got=f"outputs that differ by {float((together[0] - again).abs().max()):.2g} between two batches",
                do="use mode='eval' (BatchNorm, dropout), or engine='replay'",
            )
        return together.shape[1]

    def _probe(self, x: Tensor) -> None:
        generator = torch.Generator().manual_seed(0)
        cotangents = torch.randn(len(x), 2, self.n_outputs, generator=generator, dtype=torch.float64, device="cpu")
        weights = torch.randn(len(x), 2, generator=generator, dtype=torch.float64, device="cpu")
        cotangents, weights = cotangents.to(x.device), weights.to(x.device)
        self._examine(x, cotangents, weights)
        # An axis of positions may be as long as the batch, or share one with it: read those calls the other way.
        for turn in (1, 2):
            failed = [i for i, reason in self.reasons.items() if "autograd" in reason]
            before = (dict(self._reading), dict(self.reasons))
            if not failed:
                return
            self._reading.update(dict.fromkeys(failed, turn))
            self._examine(x, cotangents, weights)
            if len(self.reasons) >= len(before[1]):
                self._reading = before[0]
                self._examine(x, cotangents, weights)

    def _examine(self, x: Tensor, cotangents: Tensor, weights: Tensor) -> None:
        taken, reference = capture(self.model, self.parameters, x, cotangents, reading=self._reading, check=weights)
        if not reference:
            raise InputError(
                expected="outputs that depend on the model's trainable parameters by operations with a gradient",
                got="outputs without gradient",
                do="do not detach inside the model, or use engine='replay'",
            )
        self._signature, self._layouts = taken.signature, taken.layouts
        self._bytes = (taken.n_bytes[0] / len(x), taken.n_bytes[1] / len(x))
        self.calls = Counter(name for name, _, covered in taken.signature if covered)
        self.reasons = {}
        self.ways = self._judge(taken, reference, weights)

    def _judge(self, taken: Capture, reference: Sequence[Tensor | None], weights: Tensor) -> list[str]:
        """Compare the sum of the per-sample gradients by rule with autograd's, parameter by parameter."""
        parts = _parts(taken)
        ways = []
        for index, (parameter, expected) in enumerate(zip(self.parameters.parameters, reference, strict=True)):
            mine = {key: part for key, part in parts.items() if key[0] == index}
            used = sorted(
                {name for name, touched, covered in taken.signature if index in touched and index not in covered}
            )
            reason = self._unfit(mine, parameter)
            if expected is None and not mine and not used:
                ways.append("unused")
                continue
            if not mine:
                reason = f"no rule for {', '.join(used)}" if used else "used where no rule sees it"
            if reason is None:
                total, size = _weighted_sum(mine, parameter, weights.to(parameter.dtype))
                wanted = torch.zeros_like(total) if expected is None else expected.to_dense()
                if not float((total - wanted).abs().max()) <= _tolerance(parameter) * max(size, 1e-30):
                    reason = f"its rule does not give autograd's gradient (also used by {', '.join(used) or 'others'})"
            if reason is not None:
                self.reasons[index] = reason
            ways.append("rule" if reason is None else "fallback")
        return ways

    @staticmethod
    def _unfit(mine: dict[Key, _Part], parameter: Tensor) -> str | None:
        """Why a parameter's factors cannot be multiplied with each other."""
        blocks = sorted(key[1] for key in mine)
        if any(a[1] > b[0] for a, b in itertools.pairwise(blocks)):
            return "overlapping blocks of it are used"
        for part in mine.values():
            if (bool(part.outers) + bool(part.lookups) + part.is_direct) > 1:
                return "it is used by layers of different kinds (tied weights)"
            if len({(f.part.shape[0], *f.part.shape[2:]) for f in part.outers if isinstance(f.part, Outer)}) > 1:
                return "it is used in different shapes"
        return None

    def bytes_per_sample(self, rows: int) -> float:
        """Bytes that a capture takes for each sample, by rows of cotangents."""
        return self._bytes[0] + self._bytes[1] * rows

    def held_per_sample(self, rows: int) -> float:
        """Bytes of each sample that stay once it is captured: half of the inputs' share, and the gradients."""
        return (self._bytes[0] - 2 * self._bytes[1]) / 2 + self._bytes[1] * rows

    # -- captures ---------------------------------------------------------------------------------------------------

    def capture(self, x: Tensor, cotangents: Float[Tensor, "samples rows outputs"]) -> Capture:
        """The factors of a batch; a batch that takes another path through the model is checked like the first."""
        taken, _ = capture(self.model, self.parameters, x, cotangents, layouts=self._layouts, reading=self._reading)
        if taken.signature == self._signature:
            return taken
        generator = torch.Generator().manual_seed(0)
        weights = torch.randn(len(x), cotangents.shape[1], generator=generator, dtype=torch.float64, device="cpu").to(
            x.device
        )
        taken, reference = capture(self.model, self.parameters, x, cotangents, reading=self._reading, check=weights)
        reasons = dict(self.reasons)
        ways = self._judge(taken, reference, weights)
        broken = [
            i
            for i, (old, new) in enumerate(zip(self.ways, ways, strict=True))
            if old != "fallback" and new == "fallback"
        ]
        if broken:
            raise InputError(
                expected="a model that takes the same path for every batch",
                got=f"a parameter that is used in another way in some batches: {self.reasons[broken[0]]}",
                do="use engine='replay', or engine='linear' with route='jvp'",
            )
        self.reasons = reasons
        self.ways = [
            "rule" if "rule" in pair and "fallback" not in pair else pair[0]
            for pair in zip(self.ways, ways, strict=True)
        ]
        return taken

    def way(self, index: int) -> str:
        """In words: by which rule and form a parameter's products were taken, or why it fell back."""
        if self.ways[index] == "fallback":
            return f"fallback: {self.reasons[index]}"
        return "unused" if self.ways[index] == "unused" else f"rule: {self.forms.get(index, 'not needed')}"

    @property
    def left_over(self) -> list[int]:
        """The parameters that fall back."""
        return [i for i, way in enumerate(self.ways) if way == "fallback"]

    # -- products ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def add_products(self, left: Capture, right: Capture, out: Float[Tensor, "rows_l left rows_r right"]) -> None:
        """Add what the rules cover of every pair's product."""
        for task in self._tasks(left, right):
            task.add(out)

    @torch.no_grad()
    def add_own(self, left: Capture, right: Capture, out: Float[Tensor, "rows_l rows_r samples"]) -> None:
        """The same for each sample with itself only: two captures of one batch."""
        for task in self._tasks(left, right):
            task.add_own(out)

    def operations(self, left: Capture, right: Capture, n: int, m: int) -> float:
        """Operations of the rules' products for n left and m right samples like these."""
        return sum(task.operations(n, m) for task in self._tasks(left, right))

    def _tasks(self, left: Capture, right: Capture) -> Iterator[_Task]:
        ones, others = _parts(left), left is right or _parts(right)
        if others is True:
            others = ones
        assert isinstance(others, dict)
        fused = self._fused(ones) & self._fused(others)
        biases = {bias for _, bias in fused}
        partner = dict(fused)
        for key, one in ones.items():
            other = others.get(key)
            if self.ways[key[0]] != "rule" or other is None:
                continue
            scale = self.scales[key[0]]
            if one.outers or one.lookups:
                bias = partner.get(key)
                task = _Task(one, other, scale, 0.0 if bias is None else self.scales[bias[0]], self.block_bytes)
                self.forms[key[0]] = task.form
                if bias is not None:
                    self.forms[bias[0]] = "with its weight"
                yield task
            elif key not in biases:
                self.forms[key[0]] = "direct"
                yield _Task(one, other, scale, 0.0, self.block_bytes)

    def _fused(self, parts: dict[Key, _Part]) -> set[tuple[Key, Key]]:
        """Weights whose bias is used by the same calls and nowhere else: its product is theirs with a . a' = 1."""
        found = set()
        for key, part in parts.items():
            if not part.outers or self.ways[key[0]] != "rule":
                continue
            biases = {f.bias for f in part.outers}
            bias = next(iter(biases))
            if len(biases) != 1 or bias is None or self.ways[bias[0]] != "rule":
                continue
            own = parts[bias]
            if not own.numbers and [id(f) for f in own.biased] == [id(f) for f in part.outers]:
                found.add((key, bias))
        return found

    # -- the rest ---------------------------------------------------------------------------------------------------

    def add_left_over(
        self,
        left: tuple[Tensor, Tensor],
        right: tuple[Tensor, Tensor],
        out: Float[Tensor, "rows_l left rows_r right"],
        own: bool = False,
    ) -> None:
        """Add the products of the parameters that no rule covers, in blocks of samples (``own``: as ``add_own``)."""
        if not self.left_over:
            return
        chosen = [self.parameters.parameters[i] for i in self.left_over]
        scale = torch.cat(
            [p.new_full((p.numel(),), self.scales[i]) for i, p in zip(self.left_over, chosen, strict=True)]
        )
        (x, u), (y, v) = left, right
        size = scale.numel() * scale.element_size()
        n = max(1, self.block_bytes // (size * max(u.shape[1], v.shape[1])))
        for start in range(0, len(x), n):
            some = slice(start, start + n)
            ones = per_sample_gradients(self.model, chosen, x[some], u[some]) * scale
            if own:
                others = per_sample_gradients(self.model, chosen, y[some], v[some])
                out[..., some] += torch.einsum("nqp,nrp->qrn", ones, others)
                continue
            for first in range(0, len(y), n):
                rest = slice(first, first + n)
                same = x is y and u is v and rest == some
                others = ones / scale if same and bool((scale != 0).all()) else None
                if others is None:
                    others = per_sample_gradients(self.model, chosen, y[rest], v[rest])
                out[:, some, :, rest] += torch.einsum("nqp,mrp->qnrm", ones, others)


def _tolerance(parameter: Tensor) -> float:
    eps = torch.finfo(parameter.dtype).eps
    if torch.is_autocast_enabled(parameter.device.type):
        return 0.05
    if parameter.is_cuda and parameter.dtype == torch.float32:
        return 5e-3  # convolutions may go through TensorFloat-32
    return min(0.05, 512 * eps)


# --- a parameter's factors, and their products -------------------------------------------------------------------


@dataclass
class _Part:
    """All that one parameter (or block of its rows) got in a batch."""

    outers: list[Factor]
    lookups: list[Factor]
    biased: list[Factor]
    numbers: list[Tensor]

    @property
    def is_direct(self) -> bool:
        return bool(self.biased or self.numbers)

    def vector(self, some: slice) -> Float[Tensor, "rows samples numbers"]:
        """The gradient of a small parameter at some samples."""
        pieces = [f.outputs(some).sum(3).flatten(2) for f in self.biased] + [g[:, some] for g in self.numbers]
        return pieces[0] if len(pieces) == 1 else torch.stack(pieces).sum(0)


def _parts(taken: Capture) -> dict[Key, _Part]:
    parts: dict[Key, _Part] = defaultdict(lambda: _Part([], [], [], []))
    for factor in taken.factors:
        if factor.key is not None:
            (parts[factor.key].outers if isinstance(factor.part, Outer) else parts[factor.key].lookups).append(factor)
        if factor.bias is not None:
            parts[factor.bias].biased.append(factor)
    for key, numbers in taken.direct.items():
        parts[key].numbers.append(numbers)
    return dict(parts)


def _weighted_sum(mine: dict[Key, _Part], parameter: Tensor, weights: Tensor) -> tuple[Tensor, float]:
    """sum_ir weight_ir gradient_ir in the parameter's layout, and the size of what was summed."""
    total, size = torch.zeros_like(parameter), 0.0
    everything = slice(None)
    for (_, (first, last)), part in mine.items():
        rows = total[first:last] if total.dim() else total
        for f in part.outers:
            a, g = f.inputs(everything), torch.einsum("nr,rngtd->ngtd", weights, f.outputs(everything))
            assert isinstance(f.part, Outer)
            rows += f.part.restore(torch.einsum("ngto,ngti->goi", g, a)).reshape(rows.shape)
            size += float(torch.einsum("ngto,ngti->goi", g.abs(), a.abs()).max())
        for f in part.lookups:
            assert isinstance(f.part, Lookup)
            g, ids = torch.einsum("nr,rntd->ntd", weights, f.outputs(everything)).flatten(0, 1), f.part.ids.flatten()
            rows.index_add_(0, ids[ids >= 0], g[ids >= 0])
            size += float(g.abs().sum(0).max()) if g.numel() else 0.0
        if part.is_direct:
            vector = part.vector(everything)
            if vector.shape[2] != rows.numel():
                return torch.full_like(parameter, float("nan")), 0.0
            rows += torch.einsum("nr,rnp->p", weights, vector).reshape(rows.shape)
            # Before positions are summed: a bias in front of a normalisation has a gradient of nothing but rounding.
            unsigned = [f.outputs(everything).abs().sum(3).flatten(2) for f in part.biased]
            sizes = sum([g.abs() for g in part.numbers] + unsigned, torch.zeros_like(vector))
            size += float((sizes * weights.T.abs().unsqueeze(2)).sum((0, 1)).max())
    return total, size


class _Task:
    """The products of one parameter's gradients at the samples of two batches, in the cheaper form."""

    def __init__(self, one: _Part, other: _Part, scale: float, bias_scale: float, block_bytes: int) -> None:
        self.one, self.other, self.scale, self.bias_scale, self.block_bytes = one, other, scale, bias_scale, block_bytes
        self.form = self._cheaper() if one.outers or one.lookups else "direct"

    def _sizes(self, part: _Part) -> tuple[int, int, int]:
        """Rows, samples, positions."""
        factors = part.outers or part.lookups
        first = factors[0].gradients
        if part.outers:
            return first.shape[0], first.shape[1], sum(f.part.shape[1] for f in factors if isinstance(f.part, Outer))
        return first.shape[0], first.shape[1], sum(f.part.ids.shape[1] for f in factors if isinstance(f.part, Lookup))

    def _cheaper(self) -> str:
        """The form with the smaller count of operations, memory traffic included."""
        (_, n, _), (_, m, _) = self._sizes(self.one), self._sizes(self.other)
        pairs, gradients = self._operations(n, m)
        return "pairs" if pairs <= gradients else "gradients"

    def operations(self, n: int, m: int) -> float:
        """Operations for n left and m right samples, in the form that this task has."""
        if self.form == "direct":
            return n * m * self.one.vector(slice(0, 1)).numel()
        return self._operations(n, m)[self.form == "gradients"]

    def _operations(self, n: int, m: int) -> tuple[float, float]:
        """Counts over pairs of positions, and through gradients (P^2 (d_out + d_in) against d_out d_in a pair)."""
        (r, _, t), (q, _, s) = self._sizes(self.one), self._sizes(self.other)
        if self.one.outers:
            part = self.one.outers[0].part
            assert isinstance(part, Outer)
            groups, _, d_out, d_in = part.shape
            size, seen = groups * d_out * d_in, groups * (d_in + r * q * d_out)
        else:
            part = self.one.lookups[0].part
            size = min(part.weight.shape[0], n * t) * part.weight.shape[1]
            groups, seen = 1, r * q * part.weight.shape[1]
        pairs = n * m * t * s * (seen + groups * r * q * MOVE)
        formed = (n * r * t + m * q * s) * size + (n * r + m * q) * size * MOVE + n * m * r * q * size
        return pairs, formed

    def add(self, out: Float[Tensor, "rows_l left rows_r right"]) -> None:
        """Add scale * products to ``out``."""
        if self.form == "direct":
            self._add_vectors(out, self.scale)
        elif self.form == "pairs":
            self._add_pairs(out)
        else:
            self._add_gradients(out)
            if self.bias_scale:
                self._add_vectors(out, self.bias_scale, biases=True)

    def _vectors(self, biases: bool) -> Iterator[Tensor]:
        for part in (self.one, self.other):
            yield (_Part([], [], part.outers, []) if biases else part).vector(slice(None))

    def _add_vectors(self, out: Tensor, scale: float, biases: bool = False) -> None:
        one, other = self._vectors(biases)
        out += scale * torch.matmul(one.flatten(0, 1), other.flatten(0, 1).T).view(out.shape)

    # over pairs of positions

    def _positions(self, part: _Part, some: slice) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Inputs (groups, positions, samples, d), gradients (groups, positions, rows, samples, d), ids."""
        if part.lookups:
            g = torch.cat([f.outputs(some) for f in part.lookups], 2)
            ids = torch.cat([f.part.ids[some] for f in part.lookups if isinstance(f.part, Lookup)], 1)
            return None, g.permute(2, 0, 1, 3).unsqueeze(0), ids.T
        a = _joined([f.inputs(some) for f in part.outers], 2)
        g = _joined([f.outputs(some) for f in part.outers], 3)
        return a.permute(1, 2, 0, 3), g.permute(2, 3, 0, 1, 4), None

    def _add_pairs(self, out: Tensor) -> None:
        (r, n, t), (q, m, s) = self._sizes(self.one), self._sizes(self.other)
        groups = self.one.outers[0].part.shape[0] if self.one.outers else 1  # pyright: ignore[reportAttributeAccessIssue]
        item = out.element_size()
        width = max(1, min(m, int(self.block_bytes / (item * groups * t * s * (1 + r * q) * 8))))
        height = max(1, int(self.block_bytes / (item * groups * t * s * (1 + r * q) * width)))
        for first in range(0, m, width):
            columns = slice(first, first + width)
            right = self._positions(self.other, columns)
            right_g = right[1].reshape(groups, -1, right[1].shape[-1]).transpose(1, 2)
            right_a = None if right[0] is None else right[0].reshape(groups, -1, right[0].shape[-1]).transpose(1, 2)
            for start in range(0, n, height):
                rows = slice(start, start + height)
                left_a, left_g, left_ids = self._positions(self.one, rows)
                products = torch.matmul(left_g.reshape(groups, -1, left_g.shape[-1]), right_g)
                b, c = left_g.shape[3], right[1].shape[3]
                products = products.view(groups, t, r, b, s, q, c)
                if left_a is not None and right_a is not None:
                    match = torch.matmul(left_a.reshape(groups, -1, left_a.shape[-1]), right_a)
                else:
                    assert left_ids is not None
                    assert right[2] is not None
                    match = (left_ids.reshape(-1, 1) == right[2].reshape(1, -1)) & (left_ids.reshape(-1, 1) >= 0)
                    match = match.to(out.dtype).unsqueeze(0)
                if self.scale != 1:
                    match.mul_(self.scale)
                if self.bias_scale:
                    match.add_(self.bias_scale)
                match = match.view(groups, t, 1, b, s, 1, c)
                target = out[:, rows, :, columns]
                if groups * t * s == 1:
                    target.addcmul_(products[0, 0, :, :, 0], match[0, 0, :, :, 0])
                else:
                    target += products.mul_(match).sum((0, 1, 4))

    # through per-sample gradients

    def _blocks(self) -> Iterator[tuple[slice, slice]]:
        """Blocks of groups and of output channels whose gradients fit."""
        (r, n, _), (q, m, _) = self._sizes(self.one), self._sizes(self.other)
        part = self.one.outers[0].part
        assert isinstance(part, Outer)
        groups, _, d_out, d_in = part.shape
        lines = max(
            1, int(2 * self.block_bytes / ((n * r + m * q) * d_in * self.one.outers[0].gradients.element_size()))
        )
        if lines >= d_out:
            step = lines // d_out
            for g in range(0, groups, step):
                yield slice(g, min(g + step, groups)), slice(0, d_out)
        else:
            for g in range(groups):
                for o in range(0, d_out, lines):
                    yield slice(g, g + 1), slice(o, min(o + lines, d_out))

    def _formed(self, part: _Part, groups: slice, channels: slice) -> Float[Tensor, "rows samples numbers"]:
        r, n, _ = self._sizes(part)
        first = part.outers[0]
        assert isinstance(first.part, Outer)
        d_in = first.part.shape[3]
        size = ((groups.stop - groups.start), (channels.stop - channels.start), d_in)
        made = first.gradients.new_zeros((r, n, *size))
        seen = sum(f.part.shape[0] * f.part.shape[1] for f in part.outers if isinstance(f.part, Outer)) * d_in
        step = max(1, int(self.block_bytes / (seen * made.element_size())))
        for start in range(0, n, step):
            some = slice(start, min(start + step, n))
            for f in part.outers:
                a = f.inputs(some)[:, groups]
                g = f.outputs(some)[:, :, groups, :, channels].transpose(3, 4)
                for row in range(r):
                    if len(part.outers) == 1:
                        torch.matmul(g[row], a, out=made[row, some])
                    else:
                        made[row, some] += torch.matmul(g[row], a)
        return made.flatten(2)

    def _formed_table(self, part: _Part, ids: Tensor) -> Float[Tensor, "rows samples numbers"]:
        """Per-sample gradients of some rows of a table; ``ids`` sorted."""
        r, n, _ = self._sizes(part)
        d = part.lookups[0].part.weight.shape[1]
        made = part.lookups[0].gradients.new_zeros((r, n * len(ids), d))
        for f in part.lookups:
            assert isinstance(f.part, Lookup)
            at = torch.searchsorted(ids, f.part.ids.contiguous()).clamp(max=len(ids) - 1)
            hit = ids[at] == f.part.ids
            place = (torch.arange(n, device=ids.device).unsqueeze(1) * len(ids) + at)[hit]
            for row in range(r):
                made[row].index_add_(0, place, f.outputs(slice(None))[row][hit])
        return made.view(r, n, -1)

    def _pairs_of_gradients(self) -> Iterator[tuple[Tensor, Tensor]]:
        same = self.one is self.other
        if self.one.outers:
            for groups, channels in self._blocks():
                one = self._formed(self.one, groups, channels)
                yield one, one if same else self._formed(self.other, groups, channels)
            return
        ids = torch.cat([f.part.ids.flatten() for f in self.one.lookups if isinstance(f.part, Lookup)]).unique()
        ids = ids[ids >= 0]
        (r, n, _), (q, m, _) = self._sizes(self.one), self._sizes(self.other)
        first = self.one.lookups[0]
        line = (n * r + m * q) * first.part.weight.shape[1] * first.gradients.element_size()
        for some in ids.split(max(1, int(2 * self.block_bytes / line))):
            one = self._formed_table(self.one, some)
            yield one, one if same else self._formed_table(self.other, some)

    def _add_gradients(self, out: Tensor) -> None:
        for one, other in self._pairs_of_gradients():
            product = torch.matmul(one.flatten(0, 1), other.flatten(0, 1).T).view(out.shape)
            out.add_(product, alpha=self.scale)

    # each sample with itself

    def add_own(self, out: Float[Tensor, "rows_l rows_r samples"]) -> None:
        """Add scale * the products of each sample with itself."""
        if self.form == "direct":
            one, other = self._vectors(biases=False)
            out += self.scale * torch.einsum("qnp,rnp->qrn", one, other)
            return
        if self.bias_scale:
            one, other = self._vectors(biases=True)
            out += self.bias_scale * torch.einsum("qnp,rnp->qrn", one, other)
        t, s = self._sizes(self.one)[2], self._sizes(self.other)[2]
        if self.one.outers and t * s == 1:
            left_a, left_g, _ = self._positions(self.one, slice(None))
            right_a, right_g, _ = self._positions(self.other, slice(None))
            assert left_a is not None
            assert right_a is not None
            match = (left_a * right_a).sum(-1)[:, 0]
            out += self.scale * torch.einsum("gqnd,grnd,gn->qrn", left_g[:, 0], right_g[:, 0], match)
            return
        for one, other in self._pairs_of_gradients():
            out += self.scale * torch.einsum("qnp,rnp->qrn", one, other)


def _joined(pieces: list[Tensor], dim: int) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


# --- per-sample gradients, for what no rule covers -----------------------------------------------------------------


def per_sample_gradients(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    x: Tensor,
    cotangents: Float[Tensor, "samples rows outputs"],
) -> Float[Tensor, "samples rows numbers"]:
    """J(x)^T u for each sample and row, of these parameters alone: by ``vmap``, one by one where it cannot."""
    weights = [p.detach() for p in parameters]

    def one(sample: Tensor, rows: Tensor) -> Tensor:
        def outputs(values: list[Tensor]) -> Tensor:
            return check_output(call_at(model, parameters, values, sample.unsqueeze(0)), 1)[0]

        pull = torch.func.vjp(outputs, weights)[1]
        return torch.stack([torch.cat([g.flatten() for g in pull(row)[0]]) for row in rows.unbind()])

    cotangents = cotangents.to(weights[0])
    subject = subject_of(model)
    if subject is None:
        with Subject(model, "as_is"):
            return per_sample_gradients(model, parameters, x, cotangents)
    subject.rewind()
    if any(getattr(module, "scale_grad_by_freq", False) for module in model.modules()):
        return _one_by_one(model, parameters, x, cotangents)  # frequencies are those of a sample's own batch
    try:
        with torch.no_grad(), transformable(model), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="There is a performance drop")
            batched = torch.func.vmap(one, randomness="error")(x, cotangents)
        # some operations count over the whole batch: embeddings that scale their gradient by frequency
        first = _one_by_one(model, parameters, x[:1], cotangents[:1])[0]
        if bool(((batched[0] - first).abs() <= _tolerance(parameters[0]) * first.abs().max().clamp(min=1e-30)).all()):
            return batched
        return _one_by_one(model, parameters, x, cotangents)
    except USER_ERRORS:
        return _one_by_one(model, parameters, x, cotangents)


def _one_by_one(model: nn.Module, parameters: Sequence[nn.Parameter], x: Tensor, cotangents: Tensor) -> Tensor:
    made = []
    for sample, rows in zip(x.split(1), cotangents, strict=True):
        with torch.enable_grad(), eager(model):
            out = check_output(call(model, sample), 1)
            for row in rows:
                got = torch.autograd.grad(
                    out, list(parameters), row.unsqueeze(0).to(out), retain_graph=True, allow_unused=True
                )
                dense = [
                    torch.zeros_like(p) if g is None else g.to_dense() for p, g in zip(parameters, got, strict=True)
                ]
                made.append(torch.cat([g.detach().flatten() for g in dense]))
    return torch.stack(made).unflatten(0, cotangents.shape[:2])


# --- the whole ---------------------------------------------------------------------------------------------------


def unit_cotangents(n: int, n_outputs: int, like: Tensor) -> Float[Tensor, "samples outputs outputs"]:
    """The K unit vectors at every sample: their contraction is the Jacobian."""
    return torch.eye(n_outputs, dtype=like.dtype, device=like.device).expand(n, n_outputs, n_outputs)


def chunk_for(contraction: Contraction, rows: int, n: int, budget: int) -> int:
    """Samples whose capture fits into a budget of bytes."""
    return max(1, min(n, int(budget / max(contraction.bytes_per_sample(rows), 1.0))))


def contract(
    model: nn.Module,
    left_inputs: Tensor,
    left_cotangents: Tensor,
    right_inputs: Tensor,
    right_cotangents: Tensor,
    *,
    parameters: Sequence[nn.Parameter] | None = None,
    scales: Sequence[float] | None = None,
    chunk_size: int | None = None,
    max_memory: int | None = None,
    contraction: Contraction | None = None,
    advance: Callable[[int], None] | None = None,
) -> Tensor:
    """<J(x)^T u, J(x')^T v> for every left and right sample, summed over the parameters, without their gradients.

    Args:
        model: the network, in the mode that it is to be measured in; nothing of it is changed.
        left_inputs: (n_left, ...).
        left_cotangents: u, (n_left, K) or several rows a sample, (n_left, R, K).
        right_inputs: (n_right, ...); pass the same tensors on both sides and each is captured once.
        right_cotangents: v, as on the left. ``unit_cotangents`` makes them the whole Jacobian.
        parameters: those summed over; all that require gradients by default.
        scales: a factor for each parameter's products.
        chunk_size: samples captured at once; by default what fits.
        max_memory: bytes for captures and blocks, 1 GiB by default.
        contraction: one made before for this model, whose check need not be repeated.
        advance: told after each chunk of left samples how many are done.

    Returns:
        (n_left, n_right), with R_left after n_left and R_right at the end where the cotangents have rows.

    Raises:
        InputError: for a model whose outputs mix samples, or that has no gradient.
    """
    budget = DEFAULT_BYTES if max_memory is None else max_memory
    if contraction is None:
        contraction = Contraction(
            model,
            left_inputs,
            parameters=parameters,
            scales=scales,
            block_bytes=min(BLOCK_BYTES, max(budget // 8, 2**16)),
        )
    u = left_cotangents if left_cotangents.dim() == 3 else left_cotangents.unsqueeze(1)
    v = right_cotangents if right_cotangents.dim() == 3 else right_cotangents.unsqueeze(1)
    same_inputs = left_inputs is right_inputs
    same = same_inputs and left_cotangents is right_cotangents
    derived = same_inputs and not same and _is_unit(right_cotangents)
    if derived and v.shape[1] == 1:  # one output: a kernel, symmetric, whose rows the left cotangents scale
        whole = contract(
            model, right_inputs, v, right_inputs, v, chunk_size=chunk_size, max_memory=max_memory,
            contraction=contraction, advance=advance,
        )  # fmt: skip
        result = u.to(whole).unsqueeze(3) * whole
        return result.squeeze(1) if left_cotangents.dim() == 2 else result
    n_left, n_right = len(u), len(v)
    dtype = contraction.parameters.parameters[0].dtype
    out = torch.zeros((u.shape[1], n_left, v.shape[1], n_right), dtype=dtype, device=u.device)
    rows = v.shape[1] + (0 if same else u.shape[1])
    rows_bytes = contraction.bytes_per_sample(rows) * (1 if same else 2)
    spare = budget - n_right * contraction.held_per_sample(v.shape[1])  # where every capture of the right is kept
    keeps = spare >= rows_bytes * min(n_right, LEAST_KEPT)
    room = spare if keeps and n_right * rows_bytes > budget else budget
    chunk = chunk_size or chunk_for(contraction, rows, max(n_left, n_right), int(room if same else room / 2))
    parts = [slice(i, min(i + chunk, n_right)) for i in range(0, n_right, chunk)]
    keep: dict[int, Capture] = {}
    for start in range(0, n_left, chunk):
        some = slice(start, min(start + chunk, n_left))
        mine = None if same or derived else contraction.capture(left_inputs[some], u[some])
        if mine is None:
            whole = keep.get(start) or contraction.capture(right_inputs[some], v[some])
            mine = whole if same else whole.combined(u[some].to(whole.outputs))
            keep = {**keep, start: whole} if keeps else {start: whole}
        for part in parts:
            if same and part.start < start:
                continue
            other = keep.get(part.start)
            if other is None:
                other = contraction.capture(right_inputs[part], v[part])
                if len(parts) == 1 or keeps:
                    keep[part.start] = other
            contraction.add_products(mine, other, out[:, some, :, part])
            if same and part.start > start:
                out[:, part, :, some] += out[:, some, :, part].permute(2, 3, 0, 1)
        if advance is not None:
            advance(some.stop - some.start)
    contraction.add_left_over((left_inputs, u), (right_inputs, v), out)
    result = out.permute(1, 0, 3, 2)
    if left_cotangents.dim() == 2:
        result = result.squeeze(1)
    return (result.squeeze(-1) if right_cotangents.dim() == 2 else result).contiguous()


def _is_unit(cotangents: Tensor) -> bool:
    if cotangents.dim() != 3 or cotangents.shape[1] != cotangents.shape[2] or cotangents.stride(0) != 0:
        return False
    return bool(
        torch.equal(cotangents[0], torch.eye(cotangents.shape[2], dtype=cotangents.dtype, device=cotangents.device))
    )
