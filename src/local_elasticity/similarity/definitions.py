"""The definitions of ``S_rel``: how much more (or less) a target moves than the source whose update moved it.

A definition is a small function of the outputs before and after an update; ``S_rel`` is that function at the target
divided by the same function (or its ``denominator``) at the source, plus ``eps``. All of it is computed in float64.

Example:
    Register a definition of your own and use it by name::

        @define("linf", on="probabilities", words="largest change of a probability")
        def largest_change(before, after):
            return (after - before).abs().amax(-1)

        s = s_rel(impact, "linf")
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from local_elasticity.base.checks import check_flag
from local_elasticity.base.errors import InputError, nearest
from local_elasticity.base.tensors import check_callable

On = Literal["outputs", "change", "probabilities", "log_probabilities", "bernoulli_log_probabilities"]
Outputs = Literal["logits", "probabilities", "values"]
Movement = Callable[..., Tensor]

LIMIT_SIZE = 1e-6  # largest change of an output at which every definition is at its small-step limit
_CHUNK_NUMBERS = 1 << 17  # float64 numbers held at once while the numerators are computed: they stay in the cache
_ACCELERATOR_NUMBERS = 1 << 22
_ROW_SUM_TOLERANCE = 1e-3


class ImpactLike(Protocol):
    """What ``s_rel`` reads of an impact: outputs before and after, at the targets and at the sources themselves.

    One that says ``independent = True`` holds outputs that are not one distribution (several labels a sample).
    """

    @property
    def before(self) -> Float[Tensor, "t k"]: ...  # noqa: D102
    @property
    def after(self) -> Float[Tensor, "s t k"]: ...  # noqa: D102
    @property
    def source_before(self) -> Float[Tensor, "s k"]: ...  # noqa: D102
    @property
    def source_after(self) -> Float[Tensor, "s k"]: ...  # noqa: D102
    @property
    def change(self) -> Float[Tensor, "s t k"]: ...  # noqa: D102
    @property
    def source_change(self) -> Float[Tensor, "s k"]: ...  # noqa: D102
    @property
    def outputs(self) -> str: ...  # noqa: D102


class _Outputs(NamedTuple):
    """An impact made of plain tensors, in float64."""

    before: Tensor
    after: Tensor
    source_before: Tensor
    source_after: Tensor
    change: Tensor
    source_change: Tensor
    outputs: str
    independent: bool = False


@dataclass(frozen=True)
class Definition:
    """One definition of ``S_rel``.

    Attributes:
        name: the name it is asked for by.
        on: what its functions are given: raw ``"outputs"``, their ``"change"`` alone, ``"probabilities"``,
            ``"log_probabilities"``, or ``"bernoulli_log_probabilities"``, (..., K, 2): those of "no" and "yes" of each
            output by itself.
        numerator: how far a target moved.
        denominator: how far the source moved.
        eps: added to the denominator.
        words: one line for figures and pages.
    """

    name: str
    on: On
    numerator: Movement
    denominator: Movement
    eps: float
    words: str


DEFINITIONS: dict[str, Definition] = {}
_BUILT_IN: set[str] = set()


def define(
    name: str,
    *,
    on: On = "outputs",
    eps: float = 0.0,
    words: str = "",
    denominator: Movement | None = None,
) -> Callable[[Movement], Movement]:
    """Register a definition of ``S_rel`` under a name.

    Args:
        name: the name; a built-in one is refused, an own one is replaced.
        on: what the function is given, with the outputs along the last dimension: ``movement(before, after)`` of raw
            ``"outputs"``, ``"probabilities"`` or ``"log_probabilities"``, ``movement(change)`` for ``"change"``, or
            ``movement(before, after)`` of ``"bernoulli_log_probabilities"``: (..., K, 2), the logarithms of the
            probabilities of "no" and "yes" of each output by itself.
        eps: added to the denominator.
        words: one line that says what is compared.
        denominator: how far the source moved, if it is not measured as at the target.

    Returns:
        A decorator that registers the function and hands it back unchanged.

    Raises:
        InputError: for a built-in name, and for what is no name, no number, no function.
    """
    if not isinstance(name, str) or not name:
        raise InputError(
            expected="a name for the definition", got=_shown(name), do='write @define("name", on="probabilities")'
        )
    if on not in get_args(On):
        raise InputError(expected=f"on in {get_args(On)}", got=_shown(on), do=nearest(str(on), get_args(On)))
    if name in _BUILT_IN:
        raise InputError(expected="a new name", got=f"the built-in definition {name!r}", do="choose another name")
    if not isinstance(words, str):
        raise InputError(expected="words that say what is compared", got=_shown(words), do="pass a string")
    if denominator is not None:
        _check_function("denominator", denominator, on)
    eps = _checked_eps(eps)

    def register(movement: Movement) -> Movement:
        _check_function("movement", movement, on)
        DEFINITIONS[name] = Definition(name, on, movement, denominator or movement, eps, words or name)
        return movement

    return register


def is_built_in(name: str) -> bool:
    """Whether a definition comes with the library."""
    return name in _BUILT_IN


def get_definition(name: str | Definition) -> Definition:
    """The definition of that name.

    Args:
        name: a registered name; a ``Definition`` is handed back as it is.

    Raises:
        InputError: if there is none, with the name that comes nearest.
    """
    if isinstance(name, Definition):
        return name
    if not isinstance(name, str) or name not in DEFINITIONS:
        raise InputError(
            expected="the name of a definition of S_rel",
            got=_shown(name),
            do=nearest(str(name), DEFINITIONS) + "; or register it with similarity.define",
        )
    return DEFINITIONS[name]


def s_rel(impact: ImpactLike, definition: str | Definition = "kl", eps: float | None = None) -> Float[Tensor, "s t"]:
    """Relative similarity of every source and target: how far the target moved over how far the source did.

    Args:
        impact: what ``measure`` returns.
        definition: a name in ``DEFINITIONS``.
        eps: added to the denominator; the definition's own unless given.

    Returns:
        Float64; NaN where the ratio is undefined (a denominator of 0, an infinite movement), never clipped.

    Raises:
        InputError: for an unknown definition, and for outputs that it is not defined for.
    """
    numerators, denominators = movements(impact, definition, eps)
    usable = (denominators != 0) & denominators.isfinite()
    ratio = numerators / denominators.masked_fill(~usable, math.nan)[:, None]
    return ratio.masked_fill(~ratio.isfinite(), math.nan)


def s_rel_of(
    before: Any,
    after: Any,
    source_before: Any,
    source_after: Any,
    definition: str | Definition = "kl",
    outputs: Outputs = "logits",
    eps: float | None = None,
    limit: bool = False,
    independent: bool = False,
) -> Float[Tensor, "s t"]:
    """``s_rel`` from plain tensors or arrays, for outputs that were stored or measured elsewhere.

    Args:
        before: (n_t, K) outputs at the targets before any update.
        after: (n_s, n_t, K) outputs at the targets after each source's update.
        source_before: (n_s, K) outputs at the sources before.
        source_after: (n_s, K) outputs at each source after its own update.
        definition: a name in ``DEFINITIONS``.
        outputs: what the numbers are: ``"logits"``, ``"probabilities"`` or ``"values"``.
        eps: added to the denominator; the definition's own unless given.
        limit: the changes are first-order ones: take the definition's small-step limit (see ``at_limit``).
        independent: the outputs are not one distribution, as in multi-label classification.

    Returns:
        As ``s_rel``.

    Raises:
        InputError: for an unknown definition, for outputs that it is not defined for, and for wrong shapes.
    """
    check_flag("limit", limit)
    moved = outputs_of(before, after, source_before, source_after, outputs, independent)
    return s_rel(at_limit(moved), definition, 0.0 if eps is None else eps) if limit else s_rel(moved, definition, eps)


def outputs_of(
    before: Any,
    after: Any,
    source_before: Any,
    source_after: Any,
    outputs: Outputs = "logits",
    independent: bool = False,
) -> ImpactLike:
    """An impact made of plain tensors or arrays, shaped as in ``s_rel_of``."""
    given = {"before": before, "after": after, "source_before": source_before, "source_after": source_after}
    b, a, sb, sa = (_float64(x, name) for name, x in given.items())
    _check_shapes(b, a, sb, sa)
    return _Outputs(b, a, sb, sa, a - b, sa - sb, outputs, bool(independent))


def at_limit(impact: ImpactLike, together: bool = False) -> ImpactLike:
    """The same first-order change, made so small that every definition is at its small-step limit.

    The changes of a source are scaled, the largest to 1e-6, which scales numerator and denominator alike. Evaluate with
    ``eps=0``. In float64 the limit is reached to about 1e-6 of itself, rounding far below.

    Args:
        impact: of the engine "linear".
        together: one scale for all sources, so that their movements stay comparable (for ratios of means); sources
            that move much less than the largest then lose digits.
    """
    _check_impact(impact)
    change, own = _float64(impact.change), _float64(impact.source_change)
    largest = torch.maximum(change.abs().amax((1, 2)), own.abs().amax(1))
    largest = largest.amax().expand_as(largest) if together else largest
    scale = torch.where(largest > 0, LIMIT_SIZE / largest, 0.0)
    change, own = change * scale[:, None, None], own * scale[:, None]
    before, source_before = _float64(impact.before), _float64(impact.source_before)
    return _Outputs(before, before + change, source_before, source_before + own, change, own, *_kind(impact))


def _kind(impact: ImpactLike) -> tuple[str, bool]:
    """What the numbers of an impact are, and whether they are independent of each other."""
    return impact.outputs, bool(getattr(impact, "independent", False))


def movements(
    impact: ImpactLike, definition: str | Definition = "kl", eps: float | None = None
) -> tuple[Float[Tensor, "s t"], Float[Tensor, " s"]]:
    """The numerators and the denominators of ``s_rel``, in float64.

    Args:
        impact: what ``measure`` returns.
        definition: a name in ``DEFINITIONS``.
        eps: added to the denominators; the definition's own unless given.

    Returns:
        How far every target moved (n_s, n_t), and how far every source moved, ``eps`` included (n_s,).

    Raises:
        InputError: for an unknown definition, and for outputs that it is not defined for.
    """
    _check_impact(impact)
    rule = get_definition(definition)
    eps = rule.eps if eps is None else _checked_eps(eps)
    _check_outputs(*_kind(impact), rule)
    before, after, change = impact.before, impact.after, impact.change
    n_s, n_t, k = after.shape
    source = (impact.source_before, impact.source_after, impact.source_change)
    denominators = _moved(rule, rule.denominator, source, impact.outputs) + eps
    numerators = denominators.new_empty((n_s, n_t))
    numbers = _CHUNK_NUMBERS if after.device.type == "cpu" else _ACCELERATOR_NUMBERS
    step = max(1, numbers // max(1, n_t * k))
    for i in range(0, n_s, step):
        rows = slice(i, i + step)
        target = (before, after[rows], change[rows])
        numerators[rows] = _moved(rule, rule.numerator, target, impact.outputs)
    return numerators, denominators


def _moved(
    rule: Definition, movement: Movement, states: tuple[Tensor, Tensor, Tensor], outputs: str
) -> Float[Tensor, "*batch"]:
    """Apply a movement to (before, after, change), translated to what the definition works on."""
    before, after, change = (_float64(x) for x in states)
    if rule.on == "change":
        given = (change,)
    elif rule.on == "outputs":
        given = (before.expand_as(after), after)
    elif rule.on == "bernoulli_log_probabilities":
        given = _bernoulli(before, after, change, outputs)
    else:
        given = _probabilities(before, after, change, outputs, rule.on == "log_probabilities")
    moved = _called(rule, movement, given)
    if not isinstance(moved, Tensor) or moved.shape != after.shape[:-1] or moved.is_complex():
        raise InputError(
            expected=f"a real movement of shape {tuple(after.shape[:-1])} from definition {rule.name!r}",
            got=f"shape {tuple(moved.shape)}, {moved.dtype}" if isinstance(moved, Tensor) else type(moved).__name__,
            do="reduce over the outputs only, which are the last dimension, and return the tensor",
        )
    return moved.to(torch.float64)


def _called(rule: Definition, movement: Movement, given: tuple[Tensor, ...]) -> Any:
    """A movement of the user's own may raise anything, and write to what it is given; one of ours does not."""
    try:
        return movement(*(given if is_built_in(rule.name) else (x.clone() for x in given)))
    except InputError:
        raise
    except Exception as error:
        shapes = " and ".join(str(tuple(x.shape)) for x in given)
        raise InputError(
            expected=f"a definition {rule.name!r} that can be evaluated on {rule.on} of shape {shapes}",
            got=f"{type(error).__name__}: {error}",
            do="register a function of these arguments that reduces the last dimension",
        ) from error


def _probabilities(before: Tensor, after: Tensor, change: Tensor, outputs: str, logs: bool) -> tuple[Tensor, Tensor]:
    """Class probabilities (or their logarithms) before and after.

    The state after is ``before + change`` in float64, so that a change computed without cancellation keeps its digits.
    """
    if outputs == "logits":
        first, second = _log_softmax(before), _log_softmax(before + change)
        first, second = (first, second) if logs else (first.exp(), second.exp())
    else:
        _check_probabilities(before, "before")
        _check_probabilities(after, "after")
        first, second = _two_class(before), _two_class((before + change).clamp_min(0.0))
        first, second = (first.log(), second.log()) if logs else (first, second)
    return first.expand_as(second), second


def _bernoulli(before: Tensor, after: Tensor, change: Tensor, outputs: str) -> tuple[Tensor, Tensor]:
    """Log-probabilities (..., K, 2) of "no" and "yes" of each output by itself, before and after."""
    if outputs == "logits":
        first, second = (torch.stack((F.logsigmoid(-z), F.logsigmoid(z)), -1) for z in (before, before + change))
    else:
        _check_each_probability(before, "before")
        _check_each_probability(after, "after")
        pair = (before.clamp_max(1.0), (before + change).clamp(0.0, 1.0))
        first, second = (torch.stack((torch.log1p(-p), p.log()), -1) for p in pair)
    return first.expand_as(second), second


def _log_softmax(logits: Float[Tensor, "... k"]) -> Float[Tensor, "... c"]:
    """Log-probabilities; one logit stands for two classes."""
    if logits.shape[-1] == 1:
        return torch.cat((F.logsigmoid(-logits), F.logsigmoid(logits)), -1)
    return torch.log_softmax(logits, -1)


def _two_class(p: Float[Tensor, "... k"]) -> Float[Tensor, "... c"]:
    """Probabilities as they are; one stands for (1 - p, p)."""
    return torch.cat(((1 - p).clamp_min(0.0), p), -1) if p.shape[-1] == 1 else p


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) as the sum of p (d + expm1(-d)), d = log p - log q: every term is at least 0, nothing cancels."""
    d = log_p - log_q
    series = d * d * (0.5 - d * (1 / 6 - d * (1 / 24 - d / 120)))
    terms = log_p.exp() * torch.where(d.abs() < 1e-3, series, d + torch.expm1(-d))
    return torch.where(log_p == -math.inf, log_q.exp(), terms).sum(-1)


def _pseudo_kl(p: Tensor, q: Tensor) -> Tensor:
    """What the published code measured: the mean of p (log p - q), p before and q after."""
    return (torch.xlogy(p, p) - p * q).mean(-1)


def _float64(x: Any, name: str = "outputs") -> Tensor:
    """A detached float64 tensor, on its own device where that knows float64."""
    x = _real_tensor(x, name)
    return (x.cpu() if x.device.type == "mps" else x).to(torch.float64)


def _real_tensor(x: Any, name: str) -> Tensor:
    try:
        x = (x if isinstance(x, Tensor) else torch.as_tensor(x)).detach()
    except (TypeError, ValueError, RuntimeError):
        raise InputError(
            expected=f"numbers for {name}, in a tensor or an array",
            got=_shown(x),
            do="pass what the network emitted, samples first",
        ) from None
    if x.is_complex():
        raise InputError(
            expected=f"real numbers for {name}", got=str(x.dtype), do="look at their real parts or their moduli"
        )
    return x


def _shown(x: object) -> str:
    """A short value as it is written, and the type of anything longer."""
    text = repr(x) if isinstance(x, (str, int, float, type(None), list, tuple)) else type(x).__name__
    return text if len(text) <= 80 else f"{type(x).__name__} {text[:60]}…"


def _check_function(name: str, value: object, on: str) -> None:
    arguments = 1 if on == "change" else 2
    example = (
        "lambda change: change.norm(dim=-1)"
        if on == "change"
        else "lambda before, after: (after - before).abs().sum(-1)"
    )
    check_callable(name, value, arguments, example)


def _checked_eps(eps: float) -> float:
    if isinstance(eps, bool) or not isinstance(eps, numbers.Real) or not (math.isfinite(eps) and eps >= 0):
        raise InputError(expected="eps of at least 0", got=_shown(eps), do="give 0 or a small positive number")
    return float(eps)


def _check_impact(impact: ImpactLike) -> None:
    missing = [name for name in _Outputs._fields[:-1] if not hasattr(impact, name)]
    if missing:
        raise InputError(
            expected="an impact, as le.measure returns it",
            got=f"{type(impact).__name__} without {', '.join(missing)}",
            do="pass that impact, or the outputs themselves to similarity.s_rel_of",
        )
    states = (impact.before, impact.after, impact.source_before, impact.source_after)
    _check_shapes(*(_real_tensor(x, name) for name, x in zip(_Outputs._fields, states, strict=False)))


def _check_shapes(before: Tensor, after: Tensor, source_before: Tensor, source_after: Tensor) -> None:
    shapes = [tuple(x.shape) for x in (before, after, source_before, source_after)]
    n_s, n_t, k = shapes[1] if len(shapes[1]) == 3 else (-1, -1, -1)
    if shapes != [(n_t, k), (n_s, n_t, k), (n_s, k), (n_s, k)]:
        raise InputError(
            expected="before (n_t, K), after (n_s, n_t, K), source_before and source_after (n_s, K)",
            got=", ".join(map(str, shapes)),
            do="keep the outputs along the last dimension, as K = 1 for scalar outputs",
        )
    if 0 in shapes[1]:
        raise InputError(
            expected="at least one source, one target and one output", got=str(shapes[1]), do="pass samples first"
        )
    devices = {str(x.device) for x in (before, after, source_before, source_after)}
    if len(devices) > 1:
        raise InputError(
            expected="outputs on one device", got=", ".join(sorted(devices)), do="move them to one with .to(device)"
        )


def _check_outputs(outputs: str, independent: bool, rule: Definition) -> None:
    if not isinstance(outputs, str) or outputs not in get_args(Outputs):
        raise InputError(
            expected=f"outputs in {get_args(Outputs)}",
            got=_shown(outputs),
            do=nearest(str(outputs), get_args(Outputs)),
        )
    if independent and rule.on in ("probabilities", "log_probabilities"):
        raise InputError(
            expected=f"outputs that are one distribution, for the definition {rule.name!r}",
            got="independent ones, as labels and loss have it (several labels a sample)",
            do='use definition="bernoulli_kl", which takes each output by itself, or "he_su" for the raw outputs',
        )
    if outputs == "values" and "probabilities" in rule.on:
        raise InputError(
            expected=f"logits or probabilities for the definition {rule.name!r}",
            got='outputs="values"',
            do='use definition="he_su", or measure with outputs="logits" if the model is a classifier',
        )


def _check_probabilities(p: Tensor, when: str) -> None:
    one = p.shape[-1] == 1
    wrong = (p < 0).any() or ((p > 1 + _ROW_SUM_TOLERANCE).any() if one else _sums_off(p))
    if wrong:
        raise InputError(
            expected='outputs="probabilities" of at least 0 that sum to 1 (a single one at most 1)',
            got=f"outputs {when} the update with minimum {p.min().item():.6g} and row sums "
            f"from {p.sum(-1).min().item():.6g} to {p.sum(-1).max().item():.6g}",
            do='say outputs="logits" if that is what the model emits, or let it emit logits and measure those',
        )


def _check_each_probability(p: Tensor, when: str) -> None:
    if bool((p < 0).any()) or bool((p > 1 + _ROW_SUM_TOLERANCE).any()):
        raise InputError(
            expected='outputs="probabilities" between 0 and 1',
            got=f"outputs {when} the update from {p.min().item():.6g} to {p.max().item():.6g}",
            do='say outputs="logits" if that is what the model emits, or let it emit logits and measure those',
        )


def _sums_off(p: Tensor) -> bool:
    return bool(((p.sum(-1) - 1).abs() > _ROW_SUM_TOLERANCE).any())


@define("he_su", on="change", words="norm of the change of the output")
def _he_su(change: Tensor) -> Tensor:
    return torch.linalg.vector_norm(change, dim=-1)


@define("l1", on="probabilities", words="summed change of the probabilities")
def _l1(before: Tensor, after: Tensor) -> Tensor:
    return (after - before).abs().sum(-1)


@define("l2", on="probabilities", words="Euclidean change of the probabilities")
def _l2(before: Tensor, after: Tensor) -> Tensor:
    return torch.linalg.vector_norm(after - before, dim=-1)


@define("kl", on="log_probabilities", eps=1e-8, words="KL(after || before)")
def _kl_after_before(before: Tensor, after: Tensor) -> Tensor:
    return _kl(after, before)


@define("kl_reverse", on="log_probabilities", eps=1e-8, words="KL(before || after)")
def _kl_before_after(before: Tensor, after: Tensor) -> Tensor:
    return _kl(before, after)


@define(
    "bernoulli_kl",
    on="bernoulli_log_probabilities",
    eps=1e-8,
    words="KL(after || before) of each output by itself, summed",
)
def _bernoulli_kl(before: Tensor, after: Tensor) -> Tensor:
    return _kl(after, before).sum(-1)


def _root_mean_square(before: Tensor, after: Tensor) -> Tensor:
    return (after - before).square().mean(-1).sqrt()


@define(
    "suhe_published",
    on="probabilities",
    eps=1e-8,
    words="mean change over root mean square change, as published",
    denominator=_root_mean_square,
)
def _suhe_published(before: Tensor, after: Tensor) -> Tensor:
    return (after - before).abs().mean(-1)


define("kl_published", on="probabilities", eps=1e-8, words="pseudo-KL, as published")(_pseudo_kl)
_BUILT_IN.update(DEFINITIONS)
