"""What a loss function says about its labels: which it ignores, which weights cancel, what the outputs stand for.

PyTorch's own losses are recognised however ``loss_fn`` reaches them. ``read_loss`` runs the loss once and takes down
the calls that it makes, with their arguments; where it cannot be run, what it is made of is read instead: modules,
partials, bound methods, closures and the functions that it names.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from local_elasticity.base.errors import InputError

CLASSES = ("cross_entropy", "nll_loss")
INDEPENDENT = (
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "multilabel_margin_loss",
    "multilabel_soft_margin_loss",
)
REGRESSION = ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "gaussian_nll_loss", "poisson_nll_loss")

SIGMOID, SOFTMAX = "sigmoid", "softmax"  # what a loss written by hand makes of its outputs

_NAMES = (*CLASSES, *INDEPENDENT, *REGRESSION)
_FUNCTIONS: dict[Any, str] = {getattr(F, name): name for name in _NAMES}
_MADE_BY_HAND: dict[Any, str] = {
    **dict.fromkeys((torch.sigmoid, Tensor.sigmoid, torch.special.expit, F.sigmoid, F.logsigmoid, F.softplus), SIGMOID),
    **dict.fromkeys((torch.softmax, torch.log_softmax, Tensor.softmax, Tensor.log_softmax), SOFTMAX),
    **dict.fromkeys((F.softmax, F.log_softmax, F.softmin, torch.logsumexp, Tensor.logsumexp), SOFTMAX),
}
_MODULES = {
    nn.CrossEntropyLoss: "cross_entropy",
    nn.NLLLoss: "nll_loss",
    nn.BCELoss: "binary_cross_entropy",
    nn.BCEWithLogitsLoss: "binary_cross_entropy_with_logits",
    nn.MultiLabelMarginLoss: "multilabel_margin_loss",
    nn.MultiLabelSoftMarginLoss: "multilabel_soft_margin_loss",
    nn.MSELoss: "mse_loss",
    nn.L1Loss: "l1_loss",
    nn.SmoothL1Loss: "smooth_l1_loss",
    nn.HuberLoss: "huber_loss",
    nn.GaussianNLLLoss: "gaussian_nll_loss",
    nn.PoissonNLLLoss: "poisson_nll_loss",
}
_POSITIONS = ("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction")  # of CLASSES
_FUNCTION_TYPES = (types.FunctionType, types.BuiltinFunctionType)
_MAX_OBJECTS = 2000
_ROW_SUM_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class LossCall:
    """One use of a loss of ``torch.nn.functional``, or of what losses written by hand are made of.

    Attributes:
        name: the name of the function, or "sigmoid" or "softmax" of anything like it.
        reduction: "mean", "sum" or "none".
        ignore_index: the label that it ignores; None where it ignores none.
        weight: its class weights; None without, and for losses whose weights are not of classes.
        n_classes: over how many outputs its softmax goes, where the call itself was seen.
        soft: whether its targets were probabilities, where the call itself was seen.
    """

    name: str
    reduction: str = "mean"
    ignore_index: int | None = None
    weight: Tensor | None = None
    n_classes: int | None = None
    soft: bool = False


Losses = Callable[..., Any] | Sequence[LossCall]


# -- reading a loss ---------------------------------------------------------------------------------------------------


def read_loss(
    loss_fn: Callable[..., Any], output: Tensor | None = None, labels: Tensor | None = None
) -> tuple[LossCall, ...]:
    """The losses of PyTorch that a loss function uses.

    With an output and labels it is called once, without gradient, and its own calls are taken down: exact, whatever is
    between. Call it where what a loss may touch is put back; an error that it raises is left for the real call.
    Without them, for a compiled loss, and where no call is seen, the objects that it can reach are read.

    Args:
        loss_fn: ``loss_fn(outputs, labels)``.
        output: the output at one sample, (1, K), right after the model's own forward pass.
        labels: the label of that sample, (1, ...).

    Returns:
        The losses, empty where there are none.
    """
    if output is None or labels is None or _is_compiled(loss_fn):
        return tuple(_reached(loss_fn))
    recorder = _Recorder()
    try:
        with torch.no_grad(), recorder:
            loss_fn(output.detach(), labels)
    except Exception:  # a foreign function may raise anything; the measurement itself meets it again
        pass
    seen = tuple(recorder.calls)
    return seen if any(call.name in _NAMES for call in seen) else (*seen, *_reached(loss_fn))


class _Recorder(TorchFunctionMode):
    """Takes down every call of a known loss, and lets it through unchanged."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[LossCall] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if name := _FUNCTIONS.get(func):
            self.calls.append(_call(name, args, kwargs or {}))
        elif name := _MADE_BY_HAND.get(func):
            self.calls.append(LossCall(name))
        return func(*args, **(kwargs or {}))


def _call(name: str, args: Sequence[Any], keywords: dict[str, Any]) -> LossCall:
    """A loss as it was called, or as far as a partial fixes its arguments."""
    given = dict(zip(_POSITIONS if name in CLASSES else _POSITIONS[:2], args, strict=False)) | keywords
    reduction = _reduction(given)
    if name not in CLASSES:
        return LossCall(name, reduction)
    outputs, target = given.get("input"), given.get("target")
    return LossCall(
        name,
        reduction,
        ignore_index=given.get("ignore_index", -100),
        weight=given.get("weight"),
        n_classes=outputs.shape[min(1, outputs.dim() - 1)] if isinstance(outputs, Tensor) and outputs.dim() else None,
        soft=isinstance(target, Tensor) and target.is_floating_point(),
    )


def _reduction(given: dict[str, Any]) -> str:
    """The reduction, the old arguments ``size_average`` and ``reduce`` included."""
    if given.get("reduce") is None and given.get("size_average") is None:
        return str(given.get("reduction", "mean"))
    if given.get("reduce") is False:
        return "none"
    return "sum" if given.get("size_average") is False else "mean"


def _is_compiled(loss_fn: Any) -> bool:
    return hasattr(loss_fn, "_torchdynamo_orig_callable") or hasattr(loss_fn, "_orig_mod")


def _reached(loss_fn: Any) -> Iterator[LossCall]:
    """The losses among the objects that a loss function can reach."""
    waiting, seen = [loss_fn], set()
    while waiting and len(seen) < _MAX_OBJECTS:
        item = waiting.pop(0)
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, functools.partial) and _name_of(item.func):
            yield _call(_name_of(item.func), item.args, item.keywords)
        elif _name_of(item):
            yield _call(_name_of(item), (), {})
        elif name := next((name for kind, name in _MODULES.items() if isinstance(item, kind)), None):
            settings = {
                key: getattr(item, key) for key in ("reduction", "ignore_index", "weight") if hasattr(item, key)
            }
            yield _call(name, (), settings)
        else:
            waiting += _parts(item)


def _name_of(item: Any) -> str:
    return _FUNCTIONS.get(item, "") if isinstance(item, _FUNCTION_TYPES) else ""


def _parts(item: Any) -> list[Any]:
    """What an object holds, and what a function closes over or names."""
    if isinstance(item, (str, bytes, int, float, Tensor, torch.dtype, type, types.ModuleType)) or item is None:
        return []
    if isinstance(item, dict):
        return list(item.values())
    if isinstance(item, (list, tuple, set, frozenset)):
        return list(item)
    if isinstance(item, functools.partial):
        return [item.func, *item.args, *item.keywords.values()]
    if isinstance(item, types.MethodType):
        return [item.__self__, item.__func__]
    if isinstance(item, types.FunctionType):
        return _parts_of_function(item)
    runs = "forward" if isinstance(item, nn.Module) else "__call__"
    return [*getattr(item, "__dict__", {}).values(), getattr(type(item), runs, None)]


def _parts_of_function(function: types.FunctionType) -> list[Any]:
    if function.__module__.split(".")[0] == "torch" and not _is_compiled(function):
        return []
    names = function.__code__.co_names
    parts = [function.__globals__[name] for name in names if name in function.__globals__]
    modules = [part for part in parts if isinstance(part, types.ModuleType)]
    parts += [getattr(module, name) for module in modules for name in names if name in _NAMES and hasattr(module, name)]
    for cell in function.__closure__ or ():
        try:
            parts.append(cell.cell_contents)
        except ValueError:  # a variable that is not set yet
            continue
    constants = [part for part in function.__code__.co_consts if isinstance(part, types.CodeType)]
    nested = [types.FunctionType(code, function.__globals__) for code in constants if not code.co_freevars]
    wrapped = [getattr(function, "_torchdynamo_orig_callable", None), getattr(function, "__wrapped__", None)]
    return [*parts, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values(), *nested, *wrapped]


def _calls(losses: Losses) -> Sequence[LossCall]:
    return losses if isinstance(losses, (list, tuple)) else read_loss(losses)  # pyright: ignore[reportReturnType, reportArgumentType]


# -- what follows for labels -------------------------------------------------------------------------------------------


def ignored_labels(labels: Shaped[Tensor, "samples ..."], losses: Losses) -> Bool[Tensor, " samples"]:
    """Which samples the loss ignores: all of their class labels are its ``ignore_index``.

    The gradient at such a sample is exactly zero in every reduction; its loss is 0 with "sum", and 0/0 with "mean".

    Args:
        labels: one class label a sample, or several (tokens).
        losses: a loss function, or what ``read_loss`` says of it.

    Returns:
        True for samples that are ignored by every loss over classes, of which there is one at least.
    """
    kept = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
    indices = [call.ignore_index for call in _calls(losses) if call.name in CLASSES and not call.soft]
    if not indices or not _are_classes(labels) or any(index is None for index in indices):
        return kept
    flat = labels.reshape(len(labels), -1)
    each = [(flat == index).all(dim=1) for index in indices]
    return torch.stack(each).all(dim=0)


def ignores(loss_fn: Callable[..., Any], output: Tensor, labels: Tensor) -> bool:
    """Whether a loss takes nothing from one sample: asked of the loss itself, for masks that it writes by hand.

    Args:
        loss_fn: ``loss_fn(outputs, labels)``.
        output: the output at the sample, (1, K).
        labels: its label, (1, ...).

    Returns:
        True when the loss is 0 or 0/0 and its gradient in the outputs exactly zero; False also when it raises.
    """
    leaf = output.detach().clone().requires_grad_()
    try:
        with torch.enable_grad():
            loss = loss_fn(leaf, labels)
            gradient = torch.autograd.grad(loss.sum(), leaf)[0] if loss.requires_grad else torch.zeros_like(leaf)
    except Exception:  # a foreign function may raise anything
        return False
    return not bool(gradient.any()) and bool(((loss == 0) | loss.isnan()).all())


def cancelling_class_weights(losses: Losses, labels: Tensor) -> str | None:
    """What to tell a user whose class weights have no effect on a step at one sample.

    The weighted mean over a batch is sum of w_i loss_i / sum of w_i (torch.nn.CrossEntropyLoss); over one sample it is
    the loss, whatever its weight.

    Args:
        losses: a loss function, or what ``read_loss`` says of it.
        labels: the labels of the sources.

    Returns:
        One line that says what cancels and what to do, or None.
    """
    for call in _calls(losses):
        if _has_mean_weights(call, labels) and call.weight is not None and bool((call.weight != call.weight[0]).any()):
            several = _classes_a_sample(labels) > 1
            what = "are divided by their sum within each sample" if several else "cancel in the mean over one sample"
            return (
                f"the class weights of {call.name} {what}, so they do not scale the step of a source: use "
                "reduction='sum', or multiply the loss by weight[label] yourself, if they should"
            )
    return None


def check_class_weights(losses: Losses, labels: Tensor) -> None:
    """Refuse a label of weight 0 where the loss is a weighted mean: over one sample that is 0/0, its gradient NaN.

    Args:
        losses: a loss function, or what ``read_loss`` says of it.
        labels: the labels of the sources.

    Raises:
        InputError: with the first such source.
    """
    for call in _calls(losses):
        if not _has_mean_weights(call, labels) or call.weight is None:
            continue
        weight = call.weight.detach().to(labels.device)
        counted = (labels != call.ignore_index) & (labels >= 0) & (labels < len(weight))
        weightless = (weight[labels.clamp(0, len(weight) - 1).long()] == 0) & counted
        heavy = (counted & ~weightless).reshape(len(labels), -1).any(dim=1)
        undefined = weightless.reshape(len(labels), -1).any(dim=1) & ~heavy
        if bool(undefined.any()):
            source = int(undefined.nonzero()[0])
            label = int(labels[source].reshape(-1)[0])
            raise InputError(
                expected=f"class weights above 0 for the labels of the sources, where {call.name} takes a mean",
                got=f"weight 0 for label {label} at source {source}: the mean over this sample is 0/0",
                do="use reduction='sum', in which such a source moves nothing, or leave these sources out",
            )


def _has_mean_weights(call: LossCall, labels: Tensor) -> bool:
    if call.name not in CLASSES or call.reduction != "mean" or call.weight is None or call.soft:
        return False
    return _are_classes(labels) and call.weight.numel() > 0


def _are_classes(labels: Tensor) -> bool:
    return labels.dim() >= 1 and not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)


def _classes_a_sample(labels: Tensor) -> int:
    return labels[0].numel() if len(labels) else 0


# -- what the outputs stand for ----------------------------------------------------------------------------------------


def one_distribution(labels: Tensor, n_outputs: int, losses: Losses) -> bool:
    """Whether the K outputs of a sample are one distribution over K classes, as labels and loss have it.

    Args:
        labels: the labels of the sources.
        n_outputs: K; one output is two classes.
        losses: a loss function, or what ``read_loss`` says of it.

    Returns:
        False for independent (multi-label) outputs, several distributions side by side, and regression.
    """
    calls = _calls(losses)
    names = {call.name for call in calls}
    if n_outputs == 1:
        return _two_classes(labels, bool(names.intersection(REGRESSION)))
    by_hand = SIGMOID in names and not names.intersection((*CLASSES, SOFTMAX))
    if names.intersection(INDEPENDENT) or by_hand:
        return False
    widths = {call.n_classes for call in calls if call.n_classes is not None}
    if widths:
        return widths == {n_outputs}
    return _labels_of_one_distribution(labels, n_outputs)


def _two_classes(labels: Tensor, regression: bool) -> bool:
    """Whether labels are those of one logit: probabilities, or signs; in a loss of regression only zeros and ones."""
    if labels.is_complex() or _classes_a_sample(labels) > 1:
        return False
    binary = bool(((labels == 0) | (labels == 1)).all())
    if regression or binary:
        return binary
    signs = bool(((labels == -1) | (labels == 1)).all())
    return signs or not labels.is_floating_point() or bool(((labels >= 0) & (labels <= 1)).all())


def _labels_of_one_distribution(labels: Tensor, n_outputs: int) -> bool:
    """Whether labels are classes, or weights of K classes that sum to 1."""
    if labels.is_complex():
        return False
    if _classes_a_sample(labels) == 1:
        return not labels.is_floating_point() or bool((labels == labels.round()).all())
    if labels.shape[1:] != (n_outputs,):
        return False
    rows = labels.double()
    coarse = torch.finfo(labels.dtype).eps if labels.is_floating_point() else 0.0
    off = (rows.sum(dim=1) - 1).abs()
    return bool((rows >= 0).all()) and bool((off <= max(_ROW_SUM_TOLERANCE, 4 * coarse)).all())


# -- the loss of one sample --------------------------------------------------------------------------------------------


def one_number(loss: object) -> Tensor:
    """The loss of one sample as a scalar; one real number in any shape will do.

    Args:
        loss: what ``loss_fn`` returned.

    Raises:
        InputError: for anything else, with what to do about it.
    """
    if isinstance(loss, Tensor) and loss.numel() == 1 and not loss.is_complex():
        return loss.reshape(())
    if not isinstance(loss, Tensor):
        raise InputError(
            expected="one number from loss_fn for one sample, as a tensor",
            got=type(loss).__name__,
            do=_instead_of(loss),
        )
    if loss.is_complex():
        raise InputError(
            expected="a real loss", got=f"dtype {loss.dtype}", do="return its real part or its modulus, loss.abs()"
        )
    raise InputError(
        expected="one number from loss_fn for one sample",
        got=f"shape {tuple(loss.shape)}, as reduction='none' gives where a sample has several outputs",
        do="use reduction='mean' or 'sum', or reduce it: lambda outputs, labels: loss_fn(outputs, labels).sum()",
    )


def _instead_of(loss: object) -> str:
    if isinstance(loss, (int, float)):
        return "return the loss tensor itself, without .item() or float()"
    if isinstance(loss, (tuple, list, dict)):
        return "return the loss alone, without what comes with it"
    return "return the loss as a torch tensor"
