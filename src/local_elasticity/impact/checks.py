"""The checks of a measurement's input: bad input is refused before the work, with one clear error each."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from local_elasticity.errors import InputError


def check_model(model: nn.Module) -> None:
    """Refuse what has no trainable parameters, or has weights that are not finite."""
    if not isinstance(model, nn.Module):
        raise InputError(expected="a torch.nn.Module", got=type(model).__name__, do="pass the network itself")
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trainable:
        raise InputError(
            expected="a model with parameters that require gradients",
            got="a model without any",
            do="unfreeze some with parameter.requires_grad_(True)",
        )
    for name, parameter in trainable:
        _check_parameter(name, parameter)
        if not bool(torch.isfinite(parameter.detach().sum())) and not bool(torch.isfinite(parameter.detach()).all()):
            raise InputError(
                expected="finite weights",
                got=f"NaN or infinity in {name!r}",
                do="measure before training diverges, or lower the learning rate",
            )


def _check_parameter(name: str, parameter: nn.Parameter) -> None:
    """Refuse what no step can be taken on."""
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        raise InputError(
            expected="initialised weights",
            got=f"the lazy parameter {name!r}, which has no shape yet",
            do="run the model on one batch first",
        )
    if parameter._post_accumulate_grad_hooks:
        raise InputError(
            expected="gradients that go to the optimiser as they come",
            got=f"a hook on the stored gradient of {name!r}, which acts outside of the measurement",
            do="remove it (register_post_accumulate_grad_hook) while measuring, or use register_hook",
        )
    if any(size > 1 and stride == 0 for size, stride in zip(parameter.shape, parameter.stride(), strict=True)):
        raise InputError(
            expected="weights that each have memory of their own",
            got=f"the expanded parameter {name!r}, to which no optimiser can write",
            do="make it contiguous, for example nn.Parameter(weight.contiguous())",
        )


def check_sources(sources: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Inputs and labels of the sources, one label an input, at least one source."""
    try:
        inputs, labels = sources
    except (TypeError, ValueError):
        raise InputError(
            expected="sources=(inputs, labels)", got=type(sources).__name__, do="pass a pair of tensors"
        ) from None
    check_tensor("source inputs", inputs)
    check_tensor("source labels", labels)
    if labels.dim() == 0 or len(labels) != len(inputs):
        raise InputError(
            expected=f"one label for each of the {len(inputs)} sources",
            got=f"labels of shape {tuple(labels.shape)}",
            do="pass inputs and labels of the same length",
        )
    return _detached(inputs), _detached(labels)


def check_targets(targets: Tensor) -> Tensor:
    """The targets' inputs, at least one."""
    check_tensor("targets", targets)
    return _detached(targets)


def _detached(x: Tensor) -> Tensor:
    """Without its graph; a tensor made in inference mode is cloned, because autograd cannot save it."""
    return x.clone() if x.is_inference() else x.detach()


def check_tensor(name: str, value: object) -> None:
    """A tensor with at least one sample and nothing but finite numbers."""
    if not isinstance(value, Tensor):
        raise InputError(expected=f"{name} as a torch tensor", got=type(value).__name__, do="use torch.as_tensor")
    if value.dim() == 0 or len(value) == 0:
        raise InputError(
            expected=f"{name} with at least one sample",
            got=f"shape {tuple(value.shape)}",
            do="pass a batch, samples first",
        )
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise InputError(expected=f"finite {name}", got="NaN or infinity", do="clean the data first")


def check_output(output: object, batch: int) -> Tensor:
    """The model's output as (batch, K); (batch,) is kept as K = 1."""
    if isinstance(output, Tensor) and output.dim() in (1, 2) and output.shape[0] == batch:
        return output if output.dim() == 2 else output.unsqueeze(1)
    got = f"shape {tuple(output.shape)} for {batch} samples" if isinstance(output, Tensor) else type(output).__name__
    raise InputError(
        expected="a model whose output is (batch, K) or (batch,)",
        got=got,
        do="wrap the model in a module that returns such a tensor",
    )


def check_labels(labels: Tensor, n_outputs: int, outputs: str) -> None:
    """Class labels must be int64 in 0..K-1 where the model emits K >= 2 logits or probabilities."""
    if outputs == "values" or n_outputs < 2 or labels.dim() != 1:
        return
    if labels.dtype != torch.int64:
        raise InputError(
            expected="class labels of dtype int64", got=str(labels.dtype), do="convert them with labels.long()"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= n_outputs:
        raise InputError(
            expected=f"labels in 0..{n_outputs - 1} for a model with {n_outputs} outputs",
            got=f"labels from {low} to {high}",
            do="relabel the classes 0..K-1, or give the model more outputs",
        )
