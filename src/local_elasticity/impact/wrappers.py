"""Models of several devices or processes: what is measured is the module inside the wrapper, by one process alone.

A look calls the model without its wrapper, so that no process waits for another; what cannot be done alone is refused.
"""

from __future__ import annotations

import sys
from typing import Any, Literal

import torch
from torch import nn

from local_elasticity.base.errors import InputError

_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel)


def inner_module(model: nn.Module) -> nn.Module:
    """The module inside ``DistributedDataParallel`` or ``DataParallel``, also below ``torch.compile``.

    Args:
        model: any module; one without such a wrapper is handed back as it is.

    Raises:
        InputError: for weights that are sharded over processes, and a wrapper inside the model.
    """
    inner: Any = model
    while isinstance(inner, _WRAPPERS) or _compiled_wrapper(inner):
        inner = inner.module if isinstance(inner, _WRAPPERS) else inner._orig_mod
    if isinstance(inner, nn.Module):
        _refuse_shards(inner)
        _refuse_wrappers_inside(inner)
    return inner


def first_rank(model: nn.Module) -> bool:
    """Whether this process is rank 0 of the group of a ``DistributedDataParallel`` model; true for any other model."""
    wrapper: Any = model._orig_mod if _compiled_wrapper(model) else model
    if not isinstance(wrapper, nn.parallel.DistributedDataParallel):
        return True
    return torch.distributed.get_rank(wrapper.process_group) == 0


def check_alone(model: nn.Module, mode: Literal["eval", "train", "as_is"]) -> None:
    """Refuse modules whose forward pass waits for other processes in this mode.

    Args:
        model: the module that is measured.
        mode: flags of the modules meanwhile, as in ``measure``.

    Raises:
        InputError: for ``SyncBatchNorm`` in train mode, in a group of several processes.
    """
    dist = torch.distributed
    if mode == "eval" or not (dist.is_available() and dist.is_initialized()):
        return
    for name, module in model.named_modules():
        group: Any = getattr(module, "process_group", None)
        waits = isinstance(module, nn.SyncBatchNorm) and (mode == "train" or module.training)
        if waits and dist.get_world_size(group) > 1:
            raise InputError(
                expected="a model that one process can call alone",
                got=f"SyncBatchNorm in train mode at {name!r}, which waits for the other processes",
                do="measure with mode='eval'",
            )


def _compiled_wrapper(model: Any) -> bool:
    """Whether a compiled module (``torch.compile``) has a wrapper below it; other compiled modules work as they are."""
    return isinstance(model, nn.Module) and isinstance(getattr(model, "_orig_mod", None), _WRAPPERS)


def _refuse_shards(model: nn.Module) -> None:
    """A type that was never imported has no instances, so nothing is imported to find out."""
    fsdp = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", None)
    tensor = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    sharded = [] if fsdp is None else [name for name, module in model.named_modules() if isinstance(module, fsdp)]
    sharded += [] if tensor is None else [name for name, p in model.named_parameters() if isinstance(p, tensor)]
    if sharded:
        raise InputError(
            expected="a model whose weights this process holds whole",
            got=f"weights sharded over processes (FullyShardedDataParallel or DTensor) at {sharded[0] or 'the top'!r}",
            do="gather them into a plain copy of the model (get_model_state_dict of torch.distributed.checkpoint, with "
            "full_state_dict=True) and measure that, or train with DistributedDataParallel",
        )


def _refuse_wrappers_inside(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, _WRAPPERS):
            raise InputError(
                expected="DistributedDataParallel or DataParallel around the whole model",
                got=f"{type(module).__name__} inside it, at {name!r}",
                do="measure a model that holds the module inside that wrapper, its .module",
            )
