"""Layer rules: what each layer's function makes of a sample's gradient, as factors that are never multiplied out.

The gradient of a weight at one sample is a sum over positions of outer products, G = sum_t g_t a_t^T, with the layer's
inputs a and the gradients g at its outputs. Two such gradients have the inner product
sum_{t,s} (a_t . a'_s) (g_t . g'_s) ("ghost" product: Goodfellow, arXiv:1510.01799; Bu et al., arXiv:2205.10683), so no
sample's gradient need exist. A rule reads one call of a layer's function and names those factors.

A new rule is one small function, registered by the function that the layer calls (``F.linear`` for ``nn.Linear`` and
for every functional use)::

    @rule(F.linear)
    def linear(call, input, weight, bias=None):
        yield Outer(weight, ..., bias=bias)
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F


@dataclass
class Outer:
    """G = sum over positions of gradient x input, for a dense weight.

    Attributes:
        weight: the parameter.
        inputs: the layer's input, samples first.
        expand_inputs: some samples of it -> (samples, groups, positions, d_in).
        expand_gradients: gradients at the output, samples first -> (samples, groups, positions, d_out).
        shape: (groups, positions, d_out, d_in).
        restore: the gradient (groups, d_out, d_in) in the weight's own layout.
        bias: a parameter whose gradient is the sum of ``expand_gradients`` over positions, or None.
    """

    weight: Tensor
    inputs: Tensor
    expand_inputs: Callable[[Tensor], Float[Tensor, "samples groups positions d_in"]]
    expand_gradients: Callable[[Tensor], Float[Tensor, "samples groups positions d_out"]]
    shape: tuple[int, int, int, int]
    restore: Callable[[Float[Tensor, "groups d_out d_in"]], Tensor]
    bias: Tensor | None = None


@dataclass
class Lookup:
    """G = sum over positions of one-hot(id) x gradient, for a table.

    Attributes:
        weight: the parameter, (vocabulary, d).
        ids: which row each position reads; -1 where no gradient is passed on.
        expand_gradients: gradients at the output, samples first -> (samples, positions, d).
    """

    weight: Tensor
    ids: Int[Tensor, "samples positions"]
    expand_gradients: Callable[[Tensor], Float[Tensor, "samples positions d"]]


@dataclass
class Direct:
    """A parameter so small that its gradient at each sample is formed: ``gradient(g)`` -> (samples, numbers)."""

    weight: Tensor
    gradient: Callable[[Tensor], Float[Tensor, "samples numbers"]]


Part = Outer | Lookup | Direct


Layout = Literal["first", "second", "outer", "inner"]
"""Where the samples are: on the first axis; on the second (sequence-first attention); or on the first together with
positions, as its slower part (outer) or its faster one (inner)."""


@dataclass(frozen=True)
class Call:
    """One call of a layer's function: how many samples there are, and where."""

    n: int
    layout: Layout = "first"

    def samples_first(self, x: Tensor) -> Tensor:
        """``x`` as (samples, ...): the second axis moved, or the first split where it also counts positions."""
        if self.layout == "first":
            return x
        if self.layout == "second":
            return x.movedim(1, 0)
        if self.layout == "outer":
            return x.reshape(self.n, -1, *x.shape[1:])
        return x.reshape(-1, self.n, *x.shape[1:]).movedim(1, 0)

    @staticmethod
    def layouts(x: Tensor, n: int) -> list[Layout]:
        """The readings of a result's axes that are possible, the likeliest first."""
        found: list[Layout] = []
        if x.dim() and x.shape[0] == n:
            found.append("first")
        if x.dim() > 2 and x.shape[1] == n:
            found.append("second")
        if x.dim() and x.shape[0] != n and x.shape[0] and x.shape[0] % n == 0:
            found.extend(("outer", "inner"))
        return found


Rule = Callable[..., Iterator[Part]]
RULES: dict[Callable[..., Any], Rule] = {}
"""The function that a layer calls -> its rule, called with the ``Call`` and then the function's own arguments."""


def rule(*functions: Callable[..., Any]) -> Callable[[Rule], Rule]:
    """Register a rule for the functions that layers call."""

    def register(made: Rule) -> Rule:
        RULES.update(dict.fromkeys(functions, made))
        return made

    return register


def kind(made: Rule) -> str:
    """How reports call a rule."""
    return made.__name__.strip("_")


# --- dense layers ------------------------------------------------------------------------------------------------


@rule(F.linear)
def linear(call: Call, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Iterator[Part]:
    """Y = x W^T + b, at any number of positions."""
    d_out, d_in = weight.shape
    inputs = call.samples_first(input)
    yield Outer(
        weight,
        inputs,
        lambda x: x.reshape(len(x), 1, -1, d_in),
        lambda g: g.reshape(len(g), 1, -1, d_out),
        (1, math.prod(inputs.shape[1:-1]), d_out, d_in),
        lambda gradient: gradient[0],
        bias,
    )


@rule(F.bilinear)
def bilinear(call: Call, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Iterator[Part]:
    """y_o = x1^T W_o x2 + b_o: a linear layer on the products x1_i x2_j."""
    d_out = weight.shape[0]
    one, two = call.samples_first(input1), call.samples_first(input2)
    pairs = (one.unsqueeze(-1) * two.unsqueeze(-2)).flatten(-2)
    yield Outer(
        weight,
        pairs,
        lambda x: x.reshape(len(x), 1, -1, pairs.shape[-1]),
        lambda g: g.reshape(len(g), 1, -1, d_out),
        (1, math.prod(pairs.shape[1:-1]), d_out, pairs.shape[-1]),
        lambda gradient: gradient[0].reshape(weight.shape),
        bias,
    )


# --- convolutions ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Window:
    """A sliding window: which inputs each output position of a convolution sees.

    Taps that see only padding wherever the window stands are left out: their weights get no gradient.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    size: tuple[int, ...]
    positions: tuple[int, ...]

    @classmethod
    def of(cls, size: Sequence[int], kernel: Sequence[int], stride: Any, padding: Any, dilation: Any) -> Window:
        """Read the arguments of a convolution; ``padding`` may be "same" or "valid"."""
        dims = len(kernel)
        stride, dilation = _tuple(stride, dims), _tuple(dilation, dims)
        reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        if padding == "same":
            sides = tuple((r // 2, r - r // 2) for r in reach)
        else:
            sides = tuple((p, p) for p in _tuple(0 if padding == "valid" else padding, dims))
        spans = zip(size, sides, reach, stride, strict=True)
        positions = tuple((s + low + high - r - 1) // step + 1 for s, (low, high), r, step in spans)
        return cls(tuple(kernel), stride, sides, dilation, tuple(size), positions)

    @property
    def taps(self) -> tuple[tuple[int, int], ...]:
        """Per dimension the range of taps that ever see an input."""
        lows = [low for low, _ in self.padding]
        numbers = zip(self.size, self.kernel, self.stride, lows, self.dilation, self.positions, strict=True)
        return tuple(live_taps(*dimension) for dimension in numbers)

    def patches(self, x: Tensor, groups: int) -> Float[Tensor, "samples groups positions window"]:
        """What each position sees, in the order (taps, channels): channels last copy in long runs."""
        dims, channels = len(self.kernel), x.shape[1] // groups
        x = x.movedim(1, -1)
        needed = [
            (p - 1) * s + (k - 1) * d + 1
            for p, s, k, d in zip(self.positions, self.stride, self.kernel, self.dilation, strict=True)
        ]
        sides = [0, 0]
        for (low, _), size, span in reversed(list(zip(self.padding, self.size, needed, strict=True))):
            sides += [low, max(0, span - size - low)]
        x = F.pad(x, sides).contiguous() if any(sides) else x.contiguous()
        steps = x.stride()
        taps = self.taps
        start = sum(t[0] * d * s for t, d, s in zip(taps, self.dilation, steps[1:-1], strict=True))
        shape = (len(x), groups, *self.positions, *(b - a for a, b in taps), channels)
        strides = (
            steps[0],
            channels,
            *(s * step for s, step in zip(steps[1:-1], self.stride, strict=True)),
            *(s * d for s, d in zip(steps[1:-1], self.dilation, strict=True)),
            1,
        )
        view = x.as_strided(shape, strides, x.storage_offset() + start)
        return view.reshape(len(x), groups, math.prod(self.positions), math.prod(shape[2 + dims :]))

    def width(self, channels: int) -> int:
        """Numbers that a position sees, of so many channels."""
        return channels * math.prod(b - a for a, b in self.taps)

    def spread(self, seen: Float[Tensor, "*lead window"], channels: int) -> Tensor:
        """(..., live taps x channels) -> (..., channels, *kernel), zeros where a tap sees only padding."""
        taps = self.taps
        seen = seen.reshape(*seen.shape[:-1], *(b - a for a, b in taps), channels).movedim(-1, -1 - len(taps))
        sides = [n for (a, b), k in zip(reversed(taps), reversed(self.kernel), strict=True) for n in (a, k - b)]
        return F.pad(seen, sides)


def live_taps(size: int, kernel: int, stride: int, low: int, dilation: int, positions: int) -> tuple[int, int]:
    """The range of one dimension's taps outside of which only padding is ever seen; (0, 0) where nothing else is."""
    offsets = [tap * dilation - low for tap in range(kernel)]
    live = [t for t, offset in enumerate(offsets) if any(0 <= offset + o * stride < size for o in range(positions))]
    return (live[0], live[-1] + 1) if live else (0, 0)


def _tuple(value: Any, dims: int) -> tuple[int, ...]:
    numbers = (value,) if isinstance(value, int) else tuple(value)
    return numbers * dims if len(numbers) == 1 else numbers


@rule(torch.conv1d, torch.conv2d, torch.conv3d)
def convolution(
    call: Call,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Iterator[Part]:
    """A linear layer on patches; positions are those of the output. Other padding modes pad before they call this."""
    d_out, channels, *kernel = weight.shape
    if input.dim() != weight.dim():
        return
    window = Window.of(input.shape[2:], kernel, stride, padding, dilation)
    many = call.samples_first(input)
    times = many.shape[1] if many.dim() > input.dim() else 1  # more than one image a sample

    def see(x: Tensor) -> Tensor:
        seen = window.patches(x.reshape(-1, *x.shape[-len(kernel) - 1 :]), groups)
        return _gather_times(seen, len(x))

    def gradients(g: Tensor) -> Tensor:
        folded = g.reshape(-1, groups, d_out // groups, math.prod(window.positions)).transpose(2, 3)
        return _gather_times(folded, len(g))

    yield Outer(
        weight,
        many,
        see,
        gradients,
        (groups, times * math.prod(window.positions), d_out // groups, window.width(channels)),
        lambda gradient: window.spread(gradient, channels).flatten(0, 1),
        bias,
    )


@rule(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)
def transposed_convolution(
    call: Call,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Iterator[Part]:
    """The adjoint of a convolution: positions are those of the input, and the gradient is what is seen in patches."""
    d_in, channels, *kernel = weight.shape
    if input.dim() != weight.dim():
        return
    dims = len(kernel)
    size = [
        (s - 1) * step - 2 * p + d * (k - 1) + 1 + extra
        for s, step, p, d, k, extra in zip(
            input.shape[2:],
            _tuple(stride, dims),
            _tuple(padding, dims),
            _tuple(dilation, dims),
            kernel,
            _tuple(output_padding, dims),
            strict=True,
        )
    ]
    whole = Window.of(size, kernel, stride, padding, dilation)
    window = Window(whole.kernel, whole.stride, whole.padding, whole.dilation, whole.size, tuple(input.shape[2:]))
    many = call.samples_first(input)
    times = many.shape[1] if many.dim() > input.dim() else 1

    def inputs(x: Tensor) -> Tensor:
        folded = x.reshape(-1, groups, d_in // groups, math.prod(window.positions)).transpose(2, 3)
        return _gather_times(folded, len(x))

    def see(g: Tensor) -> Tensor:
        return _gather_times(window.patches(g.reshape(-1, *g.shape[-dims - 1 :]), groups), len(g))

    yield Outer(
        weight,
        many,
        inputs,
        see,
        (groups, times * math.prod(window.positions), window.width(channels), d_in // groups),
        lambda gradient: window.spread(gradient.transpose(1, 2), channels).flatten(0, 1),
    )
    if bias is not None:
        yield Direct(bias, _channel_sum(call, dims))


def _gather_times(x: Float[Tensor, "images groups positions d"], n: int) -> Tensor:
    """Images of one sample become positions of it."""
    if len(x) == n:
        return x
    return x.unflatten(0, (n, -1)).transpose(1, 2).flatten(2, 3)


def _channel_sum(call: Call, dims: int) -> Callable[[Tensor], Tensor]:
    def gradient(g: Tensor) -> Tensor:
        g = call.samples_first(g)
        return g.sum([d for d in range(1, g.dim()) if d != g.dim() - dims - 1])

    return gradient


# --- tables ------------------------------------------------------------------------------------------------------


@rule(F.embedding)
def embedding(
    call: Call,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Iterator[Part]:
    """A table's rows by their ids; a padding id passes no gradient on."""
    if max_norm is not None or scale_grad_by_freq:
        return
    ids = call.samples_first(input.unsqueeze(-1)).reshape(call.n, -1)
    if padding_idx is not None:
        ids = torch.where(ids == padding_idx % len(weight), -1, ids)
    yield Lookup(weight, ids, lambda g: g.reshape(len(g), -1, weight.shape[1]))


# --- normalisation, and what acts number by number -----------------------------------------------------------------


def _affine(
    call: Call, normal: Tensor, weight: Tensor | None, bias: Tensor | None, axes: Callable[[Tensor], list[int]]
) -> Iterator[Part]:
    """Y = normal * weight + bias: sums over everything but ``axes``, counted from the end."""

    def total(g: Tensor) -> Tensor:
        first = call.samples_first(g)
        kept = axes(g)
        over = [d for d in range(1, first.dim()) if d - first.dim() not in kept]
        return (first.sum(over) if over else first).flatten(1)

    if weight is not None:
        yield Direct(weight, lambda g: total(g * normal))
    if bias is not None:
        yield Direct(bias, total)


@rule(F.layer_norm)
def layer_norm(
    call: Call,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Iterator[Part]:
    """Normalised over the last axes, scaled and shifted there."""
    normal = F.layer_norm(input.detach(), normalized_shape, None, None, eps)
    yield from _affine(call, normal, weight, bias, lambda g: list(range(-len(normalized_shape), 0)))


@rule(F.rms_norm)
def rms_norm(
    call: Call,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Iterator[Part]:
    """Divided by the root mean square over the last axes, scaled there."""
    normal = F.rms_norm(input.detach(), normalized_shape, None, eps)
    yield from _affine(call, normal, weight, None, lambda g: list(range(-len(normalized_shape), 0)))


@rule(F.group_norm)
def group_norm(
    call: Call,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Iterator[Part]:
    """Normalised within groups of channels of a sample, scaled and shifted by channel."""
    normal = F.group_norm(input.detach(), num_groups, None, None, eps)
    yield from _affine(call, normal, weight, bias, lambda g: [1 - g.dim()])


@rule(F.batch_norm)
def batch_norm(
    call: Call,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Iterator[Part]:
    """In eval mode: normalised by the running statistics, scaled and shifted by channel."""
    if training or running_mean is None or running_var is None:
        return
    normal = F.batch_norm(input.detach(), running_mean, running_var, None, None, False, 0.0, eps)
    yield from _affine(call, normal, weight, bias, lambda g: [1 - g.dim()])


@rule(torch.prelu)
def prelu(call: Call, input: Tensor, weight: Tensor) -> Iterator[Part]:
    """Y = x where x > 0, weight * x elsewhere; one weight, or one a channel."""
    negative = input.detach().clamp(max=0)
    channel = (lambda g: [1 - g.dim()]) if weight.numel() > 1 else (lambda g: [])
    yield from (
        Direct(part.weight, lambda g, part=part: part.gradient(g).reshape(call.n, -1))
        for part in _affine(call, negative, weight, None, channel)
        if isinstance(part, Direct)
    )


@rule(torch.Tensor.add, torch.add, torch.Tensor.__add__, torch.Tensor.__radd__)
def addition(call: Call, input: Tensor, other: Any, *, alpha: float = 1) -> Iterator[Part]:
    """Sum x + b with a bare parameter b (a position embedding, a bias); either may be the parameter."""
    for parameter, partner, factor in ((input, other, 1), (other, input, alpha)):
        if isinstance(parameter, torch.nn.Parameter) and isinstance(partner, Tensor):
            yield _broadcast(call, parameter, None, factor)


@rule(torch.Tensor.mul, torch.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__)
def multiplication(call: Call, input: Tensor, other: Any) -> Iterator[Part]:
    """Product x * s with a bare parameter s (a layer scale, a temperature); either may be the parameter."""
    for parameter, partner in ((input, other), (other, input)):
        if isinstance(parameter, torch.nn.Parameter) and isinstance(partner, Tensor):
            yield _broadcast(call, parameter, partner.detach(), 1)


def _broadcast(call: Call, parameter: Tensor, factor: Tensor | None, scale: float) -> Direct:
    """The gradient of a parameter that was broadcast over the batch: a sum over every axis that it lacks."""

    def gradient(g: Tensor) -> Tensor:
        g = g * scale if factor is None else g * factor
        if g.dim() <= parameter.dim() and g.dim() and parameter.shape[0] != 1:
            raise ValueError("the parameter has one value a sample")
        first = call.samples_first(g)
        lead = g.dim() - parameter.dim()
        sizes = [1] * lead + list(parameter.shape)
        if call.layout == "second":
            sizes = [sizes[1], sizes[0], *sizes[2:]]
        elif first.dim() > g.dim():
            sizes = [sizes[0], 1, *sizes[1:]]
        over = [d for d in range(1, first.dim()) if sizes[d] == 1]
        return (first.sum(over) if over else first).reshape(call.n, -1)

    return Direct(parameter, gradient)


# --- attention ---------------------------------------------------------------------------------------------------


def attention_with(record: Callable[..., Tensor]) -> Callable[..., Any]:
    """PyTorch's own ``multi_head_attention_forward`` with another ``linear`` in it, which sees its projections.

    The functions are copied with their own view of the module's names: nothing in PyTorch is changed.
    """
    names = dict(vars(F))
    names["linear"] = record
    for name in ("_in_projection_packed", "_in_projection", "multi_head_attention_forward"):
        original = inspect.unwrap(names[name])
        copied = FunctionType(original.__code__, names, name, original.__defaults__, original.__closure__)
        copied.__kwdefaults__ = original.__kwdefaults__
        names[name] = copied
    return names["multi_head_attention_forward"]
