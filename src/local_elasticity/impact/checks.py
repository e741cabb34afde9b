"""The checks of a measurement's input: bad input is refused before the work, with one clear error each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from local_elasticity.base.checks import check_bytes, check_instance, check_whole
from local_elasticity.base.errors import InputError
from local_elasticity.base.tensors import check_callable, check_dtype, check_module, check_pair, check_tensor
from local_elasticity.impact.update import Update


def check_model(model: nn.Module) -> None:
    """Refuse what has no trainable parameters, or has weights that are not finite."""
    check_module("model", model)
    _check_parameters(model)
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for name, parameter in trainable:
        _check_parameter(name, parameter)
        if not bool(torch.isfinite(parameter.detach().sum())) and not bool(torch.isfinite(parameter.detach()).all()):
            raise InputError(
                expected="finite weights",
                got=f"NaN or infinity in {name!r}",
                do="measure before training diverges, or lower the learning rate",
            )


def _check_parameters(model: nn.Module) -> None:
    """Refuse a ``parameters()`` of the model's own, for then an optimiser moves others than those that are named."""
    if type(model).parameters is nn.Module.parameters and type(model).named_parameters is nn.Module.named_parameters:
        return
    named = {id(p) for _, p in nn.Module.named_parameters(model) if p.requires_grad}
    if {id(p) for p in model.parameters() if p.requires_grad} != named:
        raise InputError(
            expected="model.parameters() to give all trainable weights of its modules",
            got=f"a {type(model).__name__} whose parameters() gives others",
            do="freeze those that are not trained (requires_grad_(False)) in place of overriding parameters()",
        )


def _check_parameter(name: str, parameter: nn.Parameter) -> None:
    """Refuse what no step can be taken on."""
    if parameter._post_accumulate_grad_hooks:
        raise InputError(
            expected="gradients that go to the optimiser as they come",
            got=f"a hook on the stored gradient of {name!r}, which acts outside of the measurement",
            do="remove it (register_post_accumulate_grad_hook) while measuring, or use register_hook",
        )
    dispatch: Any = getattr(type(parameter), "__torch_dispatch__", None)
    if parameter.layout is not torch.strided or dispatch is not torch._C._disabled_torch_dispatch_impl:
        raise InputError(
            expected="trainable weights that are dense tensors, whose memory a step can exchange",
            got=f"{name!r} of the kind {type(parameter).__name__}, {parameter.layout}",
            do="make it a dense torch.nn.Parameter, or freeze it (requires_grad_(False))",
        )
    if any(size > 1 and stride == 0 for size, stride in zip(parameter.shape, parameter.stride(), strict=True)):
        raise InputError(
            expected="weights that each have memory of their own",
            got=f"the expanded parameter {name!r}, to which no optimiser can write",
            do="make it contiguous, for example nn.Parameter(weight.contiguous())",
        )


def check_loss_function(loss_fn: object) -> None:
    """Refuse what is no function of outputs and labels."""
    check_callable("loss_fn", loss_fn, 2, "torch.nn.functional.cross_entropy")


def check_sources(sources: tuple[Tensor, Tensor], name: str = "sources") -> tuple[Tensor, Tensor]:
    """Inputs and labels of the sources, one label an input, at least one source."""
    inputs, labels = check_pair(name, sources)
    return _detached(inputs), _detached(labels)


def check_targets(targets: Tensor, name: str = "targets", like: Tensor | None = None) -> Tensor:
    """The targets' inputs, at least one, each of the shape of one source where that is given."""
    check_tensor(name, targets)
    if like is not None and targets.shape[1:] != like.shape[1:]:
        raise InputError(
            expected=f"{name}: samples of the sources' shape {tuple(like.shape[1:])}",
            got=f"samples of shape {tuple(targets.shape[1:])}",
            do="look at inputs of the kind that the step is taken at",
        )
    return _detached(targets)


def check_update(update: object) -> None:
    """Refuse what is no update."""
    if isinstance(update, torch.optim.Optimizer):
        raise InputError(
            expected="update: a step", got=f"the optimiser {type(update).__name__}", do="pass le.from_optimizer(it)"
        )
    check_instance("update", update, Update, "le.SGD(lr=0.01)")


def check_numbers(
    chunk_size: object = None, target_chunk_size: object = None, check_pairs: object = 0, max_memory: object = None
) -> None:
    """The numbers that most looks take."""
    check_whole("chunk_size", chunk_size, or_none=True)
    check_whole("target_chunk_size", target_chunk_size, or_none=True)
    check_whole("check_pairs", check_pairs, 0)
    check_bytes("max_memory", max_memory)


def check_measured_dtype(dtype: object) -> None:
    """A floating-point dtype, "as_is" or None."""
    if dtype != "as_is":
        check_dtype("dtype", dtype)


def _detached(x: Tensor) -> Tensor:
    """Without its graph; a tensor made in inference mode is cloned, because autograd cannot save it."""
    return x.clone() if x.is_inference() else x.detach()


def check_output(output: object, batch: int) -> Tensor:
    """The model's output as (batch, K); (batch,) is kept as K = 1."""
    if isinstance(output, Tensor) and not (output.is_floating_point() or output.is_complex()):
        raise InputError(
            expected="a model whose output is (batch, K) or (batch,) of a floating-point dtype",
            got=str(output.dtype),
            do="wrap the model in a module that returns scores, before they become classes",
        )
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
