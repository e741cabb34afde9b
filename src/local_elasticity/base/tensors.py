"""Checks of tensors, models and callables, before any work; those of plain values stand in ``base.checks``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from local_elasticity.base.checks import advice_for_labels, as_code, check_choice, in_words, plain_array, written
from local_elasticity.base.errors import InputError

LAZY = "call the model once on a batch, so that its lazy layers get their sizes"


def check_tensor(name: str, value: Any, *, finite: bool = True) -> Tensor:
    """Check a tensor with at least one sample in its first dimension.

    Args:
        name: of the argument.
        value: what came.
        finite: whether NaN and infinity are refused.

    Returns:
        The tensor itself.

    Raises:
        InputError: for anything else, with advice that fits what came.
    """
    if not isinstance(value, Tensor):
        raise InputError(expected=f"{name}: a torch tensor", got=in_words(value), do=advice_for_tensor(name, value))
    if value.is_nested:
        raise InputError(
            expected=f"{name}: a dense tensor",
            got="a nested tensor",
            do=f"pass {as_code(name)}.to_padded_tensor(0.0)",
        )
    if value.layout is not torch.strided:
        raise InputError(
            expected=f"{name}: a dense tensor", got=str(value.layout), do=f"pass {as_code(name)}.to_dense()"
        )
    if value.is_meta:
        raise InputError(
            expected=f"{name}: a tensor with data", got="one on the device 'meta'", do="load the data first"
        )
    if value.dim() == 0 or value.numel() == 0:
        raise InputError(
            expected=f"{name}: at least one sample, samples first",
            got=f"shape {tuple(value.shape)}",
            do="pass a batch: of one sample x, x.unsqueeze(0)" if value.numel() else "pass a batch that is not empty",
        )
    narrow = value.is_floating_point() or value.is_complex()
    if finite and narrow and not bool(torch.isfinite(value.detach()).all()):
        bad = int((~torch.isfinite(value.detach())).sum())
        raise InputError(
            expected=f"{name}: finite numbers",
            got=f"{bad} of {value.numel()} NaN or infinite",
            do="leave those samples out, or find where the numbers come from",
        )
    return value


def advice_for_tensor(name: str, value: Any) -> str:
    """How to make a tensor of what came, in words that can be followed.

    Args:
        name: of the argument.
        value: what came.
    """
    if value is None:
        return f"pass {name}, samples first"
    name = as_code(name)
    if isinstance(value, nn.Module | type) or (callable(value) and not hasattr(value, "__array__")):
        return "check the order of the arguments: this is no data"
    if isinstance(value, Mapping):
        return "pass one tensor, and wrap the model in a module that makes its other arguments of it"
    if isinstance(value, str | bytes):
        return "load the file first, for example with torch.load or numpy.load"
    if hasattr(value, "to_numpy"):
        return f"pass torch.as_tensor({name}.to_numpy())"
    if isinstance(value, list | tuple) and value and all(isinstance(entry, Tensor) for entry in value):
        alike = len({tuple(entry.shape) for entry in value}) == 1
        return f"pass torch.stack({name})" if alike else "bring the samples to one shape, then torch.stack them"
    array = plain_array(value)
    if array is not None and array.dtype.kind in "biufc" and array.ndim:
        return f"pass torch.as_tensor({name})"
    if array is not None and array.dtype.kind in "US":
        return f"number the texts first: torch.as_tensor(numpy.unique({name}, return_inverse=True)[1])"
    if isinstance(value, torch.utils.data.DataLoader):
        return "collect its batches first: torch.cat([x for x, y in loader]), and the same of y"
    if isinstance(value, torch.utils.data.Dataset):
        return "collect its samples first: torch.stack([x for x, y in dataset])"
    if isinstance(value, Iterable) and not isinstance(value, Sequence | set | frozenset):
        return "collect what it yields first: torch.stack(list(...))"
    return "pass a tensor, samples first"


def check_pair(name: str, value: Any) -> tuple[Tensor, Tensor]:
    """Check a pair of tensors, inputs and labels, as many of the one as of the other.

    Args:
        name: of the argument.
        value: what came.

    Returns:
        Inputs and labels.

    Raises:
        InputError: for anything else.
    """
    is_mapping = isinstance(value, Mapping | str | bytes | set | frozenset | Tensor | np.ndarray | nn.Module | type)
    try:
        entries = () if is_mapping else tuple(value) if len(value) == 2 else ()
    except TypeError:  # neither counted nor iterated
        entries = ()
    if len(entries) != 2:
        raise InputError(
            expected=f"{name}: a pair (inputs, labels)", got=in_words(value), do=f"write {name}=(inputs, labels)"
        )
    inputs = check_tensor(f"inputs of {name}", entries[0])
    labels = check_tensor(f"labels of {name}", entries[1])
    if len(labels) != len(inputs):
        raise InputError(
            expected=f"{name}: one label for each of the {len(inputs)} inputs",
            got=f"labels of shape {tuple(labels.shape)}",
            do="pass as many labels as inputs, in the same order",
        )
    return inputs, labels


def check_class_labels(
    name: str, labels: Any, n_classes: int | None = None, n: int | None = None, *, negative: bool = False
) -> Tensor:
    """Check a vector of class labels, as a tensor.

    Args:
        name: of the argument.
        labels: what came.
        n_classes: labels must be below it.
        n: how many there must be.
        negative: whether labels below 0 may be.

    Returns:
        The labels as int64.

    Raises:
        InputError: for what is no tensor, not of an integer dtype, not a vector, or out of range.
    """
    if not isinstance(labels, Tensor) or labels.dim() != 1 or labels.dtype.is_floating_point or labels.is_complex():
        array = plain_array(labels)
        is_tensor = isinstance(labels, Tensor)
        is_numbers = not is_tensor and array is not None and array.dtype.kind in "iu" and array.ndim == 1
        advice = f"pass {as_code(name)}.long()" if is_tensor and labels.dim() == 1 else advice_for_labels(name, array)
        raise InputError(
            expected=f"{name}: a tensor of integer class labels, one a sample",
            got=in_words(labels),
            do=f"pass torch.as_tensor({as_code(name)})" if is_numbers else advice,
        )
    if labels.dtype == torch.bool:
        raise InputError(expected=f"{name}: labels of dtype int64", got="torch.bool", do=f"pass {as_code(name)}.long()")
    if n is not None and len(labels) != n:
        raise InputError(expected=f"{name}: {n} labels", got=str(len(labels)), do="give one label for each sample")
    low, high = (int(labels.min()), int(labels.max())) if len(labels) else (0, 0)
    if (low < 0 and not negative) or (n_classes is not None and high >= n_classes):
        raise InputError(
            expected=f"{name}: labels " + (">= 0" if n_classes is None else f"in 0..{n_classes - 1}"),
            got=f"labels from {low} to {high}",
            do="relabel the classes 0, 1, 2, ..., and leave out samples without a class",
        )
    return labels.long()


def check_module(name: str, value: Any, *, trainable: bool = True) -> nn.Module:
    """Check a network, made and not lazy.

    Args:
        name: of the argument.
        value: what came.
        trainable: whether it must have parameters that require gradients.

    Returns:
        The network.

    Raises:
        InputError: for a class in place of an instance, a function, a state dict, a lazy network or a frozen one.
    """
    if not isinstance(value, nn.Module):
        raise InputError(expected=f"{name}: a torch.nn.Module", got=in_words(value), do=_advice_for_module(value))
    parameters = list(value.named_parameters())
    lazy = [key for key, p in (*parameters, *value.named_buffers()) if nn.parameter.is_lazy(p)]
    if lazy:
        raise InputError(expected=f"{name}: a network whose sizes are known", got=f"{lazy[0]!r} is lazy", do=LAZY)
    meta = [key for key, p in parameters if p.is_meta]
    if meta:
        raise InputError(
            expected=f"{name}: weights with data",
            got=f"{meta[0]!r} on the device 'meta'",
            do="make the network on a real device, or load its weights",
        )
    if trainable and not any(p.requires_grad for _, p in parameters):
        raise InputError(
            expected=f"{name}: parameters that require gradients",
            got="none" if not parameters else f"{len(parameters)} frozen ones",
            do="unfreeze some: parameter.requires_grad_(True)" if parameters else "pass a network that has weights",
        )
    return value


def _advice_for_module(value: Any) -> str:
    if isinstance(value, type) and issubclass(value, nn.Module):
        return f"make one: {value.__name__}(...)"
    if isinstance(value, Mapping):
        return "load it into a network: model.load_state_dict(...)"
    if isinstance(value, str):
        return "build it first, for example with le.networks.build"
    if callable(value):
        return "wrap it in a torch.nn.Module whose forward calls it"
    return "pass the network itself, before the loss and the data"


def check_callable(name: str, value: Any, n_arguments: int | None = None, example: str = "") -> Callable[..., Any]:
    """Check a function of some arguments.

    Args:
        name: of the argument.
        value: what came.
        n_arguments: with how many positional arguments it will be called.
        example: how such a function is written.

    Returns:
        The function.

    Raises:
        InputError: for what cannot be called, a class of a module in place of an instance, a coroutine, or a function
            that cannot take so many arguments.
    """
    words = f"{name}: a function" + ("" if n_arguments is None else f" of {_counted(n_arguments)}")
    do = f"write for example {name}={example}" if example else f"pass such a function as {name}"
    if not callable(value):
        raise InputError(expected=words, got=in_words(value), do=do)
    if isinstance(value, type) and issubclass(value, nn.Module) and n_arguments:
        raise InputError(expected=words, got=in_words(value), do=f"make one: {value.__name__}()")
    if inspect.iscoroutinefunction(value) or inspect.isasyncgenfunction(value) or inspect.isgeneratorfunction(value):
        kind = "a generator function" if inspect.isgeneratorfunction(value) else "a coroutine function"
        raise InputError(
            expected=words, got=f"{kind}, which gives no value when called", do="write it with def and return"
        )
    if n_arguments is not None and not _takes(value, n_arguments):
        raise InputError(expected=words, got=f"{in_words(value)} with {_signature(value)}", do=do)
    return value


def _counted(n: int) -> str:
    return "no arguments" if n == 0 else "one argument" if n == 1 else f"{n} arguments"


def _takes(function: Any, n: int) -> bool:
    try:
        target = function.forward if isinstance(function, nn.Module) else function
        inspect.signature(target).bind(*range(n))
    except TypeError:
        return False
    except ValueError:  # some compiled functions have no signature
        return True
    return True


def _signature(function: Any) -> str:
    target = function.forward if isinstance(function, nn.Module) else function
    return f"the arguments {in_words(str(inspect.signature(target)))[1:-1]}"


def check_dtype(name: str, value: Any, *, or_none: bool = True) -> torch.dtype | None:
    """Check a floating-point dtype of torch.

    Args:
        name: of the argument.
        value: what came.
        or_none: whether None may be, too.

    Returns:
        The dtype, or None.

    Raises:
        InputError: for a name, a dtype of numpy, or whole numbers.
    """
    if value is None and or_none:
        return None
    if isinstance(value, torch.dtype) and value.is_floating_point:
        return value
    text = "" if isinstance(value, torch.dtype) else getattr(value, "__name__", str(value)).removeprefix("torch.")
    meant = getattr(torch, text, None) if text.isidentifier() else None
    is_dtype = isinstance(meant, torch.dtype) and meant.is_floating_point
    raise InputError(
        expected=f"{name}: a floating-point dtype of torch" + (", or None" if or_none else ""),
        got=in_words(value),
        do=f"write {name}={meant if is_dtype else 'torch.float64'}",
    )


def check_device(name: str, value: Any, *, or_none: bool = True) -> torch.device | None:
    """Check a device that can be used here.

    Args:
        name: of the argument.
        value: what came.
        or_none: whether None may be, too.

    Returns:
        The device, or None.

    Raises:
        InputError: for one that torch does not know, or cannot use here.
    """
    if value is None and or_none:
        return None
    do = written(name, "cpu" if name.startswith("--") else '"cpu"')
    if not isinstance(value, str | torch.device):
        raise InputError(expected=f"{name}: a device", got=in_words(value), do=do)
    try:
        device = torch.device(value)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(expected=f"{name}: a device that torch can use here", got=in_words(value), do=do) from error
    if device.type == "meta":
        raise InputError(expected=f"{name}: a device that holds data", got="'meta'", do=do)
    return device


def check_optimizer(name: str, value: Any) -> torch.optim.Optimizer:
    """Check an optimiser of torch.

    Args:
        name: of the argument.
        value: what came.

    Returns:
        The optimiser.

    Raises:
        InputError: for anything else, a class among it.
    """
    if isinstance(value, torch.optim.Optimizer):
        return value
    is_class = isinstance(value, type) and issubclass(value, torch.optim.Optimizer)
    raise InputError(
        expected=f"{name}: a torch optimiser",
        got=in_words(value),
        do=f"make one: {value.__name__}(model.parameters(), lr=...)" if is_class else "pass the optimiser of the loop",
    )


def check_mode(value: Any) -> str:
    """Check the ``mode`` of a look.

    Args:
        value: what came.

    Returns:
        "eval", "train" or "as_is".

    Raises:
        InputError: for anything else.
    """
    return check_choice("mode", value, ("eval", "train", "as_is"))


def check_fits(model: nn.Module, name: str, inputs: Tensor) -> None:
    """Check that inputs are on the device of the weights, and of a dtype that the weights can meet.

    Args:
        model: the network.
        name: of the inputs.
        inputs: them.

    Raises:
        InputError: where every weight lies on one other device.
    """
    devices = {p.device for p in (*model.parameters(), *model.buffers())}
    if len(devices) == 1 and inputs.device not in devices:
        device = next(iter(devices))
        raise InputError(
            expected=f"{name} on the model's device {str(device)!r}",
            got=f"one on {str(inputs.device)!r}",
            do=f"move them: {as_code(name)}.to({str(device)!r})",
        )


def try_model(
    model: nn.Module, inputs: Tensor, name: str = "inputs", call: Callable[[Tensor], Any] | None = None
) -> Any:
    """Call a network on inputs; what it raises is refused in words about the inputs.

    The caller sees to it that the call leaves no trace in the network (``impact.subject.preserved``).

    Args:
        model: the network.
        inputs: one sample or a few; the network is given a copy, in which it may work in place.
        name: of the inputs.
        call: what to call in place of the network.

    Returns:
        What the network returned.

    Raises:
        InputError: when it raised: for a dtype or shape that its layers do not take, or its own reasons.
    """
    try:
        return (call or model)(inputs.clone())
    except InputError:
        raise
    except Exception as error:
        raise refusal_of_inputs(model, inputs, name, error) from error


def refusal_of_inputs(model: nn.Module, inputs: Tensor, name: str, error: BaseException) -> InputError:
    """What is probably wrong with inputs that a network raised at.

    Args:
        model: the network.
        inputs: what it was called with.
        name: of the inputs.
        error: what it raised.
    """
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if len(kinds) == 1 and inputs.is_floating_point() and inputs.dtype not in kinds:
        kind = next(iter(kinds))
        return InputError(
            expected=f"{name} of the model's dtype, {kind}",
            got=str(inputs.dtype),
            do=f"convert them: {as_code(name)}.to({kind})",
        )
    embeds = any(isinstance(module, nn.Embedding | nn.EmbeddingBag) for module in model.modules())
    if kinds and not inputs.is_floating_point() and not embeds:
        kind = next(iter(kinds))
        return InputError(
            expected=f"{name} of a floating-point dtype",
            got=str(inputs.dtype),
            do=f"convert them: {as_code(name)}.to({kind})",
        )
    if embeds and inputs.is_floating_point():
        return InputError(
            expected=f"{name} as token numbers for the embedding",
            got=str(inputs.dtype),
            do=f"convert them: {as_code(name)}.long()",
        )
    if "does not require grad" in str(error):
        return InputError(
            expected="a forward pass that works under torch.no_grad(), as looks call it",
            got="one that differentiates within",
            do="do that in `with torch.enable_grad():`, on an input that requires a gradient there",
        )
    return InputError(
        expected=f"{name} that the model takes" + _first_sizes(model),
        got=f"{type(error).__name__} in its forward pass for {name} of shape {tuple(inputs.shape)}",
        do=f"make model({as_code(name)}[:1]) work; where it does, in the mode and the dtype that are asked for here",
    )


def _first_sizes(model: nn.Module) -> str:
    for module in model.modules():
        for attribute, words in (("in_features", "numbers"), ("in_channels", "channels"), ("num_embeddings", "tokens")):
            size = getattr(module, attribute, None)
            if isinstance(size, int):
                return f" (its first {type(module).__name__} is made for {size} {words})"
    return ""


def try_loss(
    loss_fn: Callable[..., Any], outputs: Tensor, labels: Tensor, name: str = "loss_fn", *, scalar: bool = False
) -> Tensor:
    """Call a loss on outputs and labels; what it raises is refused in our words.

    Args:
        loss_fn: the loss.
        outputs: of the network.
        labels: of the same samples.
        name: of the loss.
        scalar: whether one number must come without dimensions.

    Returns:
        One number, as a scalar tensor.

    Raises:
        InputError: when it raised, or gave anything but one number of a real dtype.
    """
    try:
        loss = loss_fn(outputs, labels)
    except InputError:
        raise
    except Exception as error:
        raise refusal_of_loss(outputs, labels, name, error) from error
    if not isinstance(loss, Tensor) or loss.numel() != 1 or loss.is_complex() or (scalar and loss.dim()):
        raise InputError(
            expected=f"{name} that returns one real number as a tensor",
            got=in_words(loss) if not isinstance(loss, Tensor) else f"{loss.dtype} of shape {tuple(loss.shape)}",
            do="reduce it, as reduction='mean' does, and return the tensor itself, not loss.item()",
        )
    return loss.reshape(())


def refusal_of_loss(outputs: Tensor, labels: Tensor, name: str, error: BaseException) -> InputError:
    """What is probably wrong with labels, or a loss, that raised.

    Args:
        outputs: what it was called with.
        labels: what it was called with.
        name: of the loss.
        error: what it raised.
    """
    classes = outputs.shape[-1] if outputs.dim() > 1 else 0
    if isinstance(error, IndexError) and not labels.is_floating_point() and labels.numel() and classes > 1:
        return InputError(
            expected=f"labels in 0..{classes - 1} for a model with {classes} outputs",
            got=f"labels from {int(labels.min())} to {int(labels.max())}",
            do="relabel the classes 0..K-1, or give the model more outputs",
        )
    return InputError(
        expected=f"{name}(outputs, labels) that takes what the model emits",
        got=f"{type(error).__name__} for outputs {outputs.dtype} {tuple(outputs.shape)} "
        f"and labels {labels.dtype} {tuple(labels.shape)}",
        do="cross-entropy takes int64 labels; squared and binary losses take labels of the outputs' shape and dtype",
    )
