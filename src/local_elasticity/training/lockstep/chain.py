"""Whether a network is a plain chain of known layers: each leaf's input is the very output of the one before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from local_elasticity.impact.subject import preserved
from local_elasticity.training.lockstep.kernels import KERNELS, Unsupported

Chain = list[tuple[str, nn.Module]]


def find_chain(model: nn.Module, x: Tensor) -> Chain:
    """The layers in the order of the forward pass.

    Args:
        model: the network, whose buffers and random streams stay as they are.
        x: a batch to try it on.

    Raises:
        Unsupported: with the reason, when the network is anything else than a chain of layers with kernels.
    """
    leaves = {module: name for name, module in model.named_modules() if not list(module.children())}
    calls: list[tuple[nn.Module, Any, Any]] = []
    with preserved(model, "as_is", restore_streams=True), torch.no_grad():
        handles = [leaf.register_forward_hook(lambda m, args, out: calls.append((m, args, out))) for leaf in leaves]
        try:
            last = model(x)
        except RuntimeError as error:
            raise Unsupported("a forward pass that needs a graph") from error
        finally:
            for handle in handles:
                handle.remove()
    chain: Chain = []
    current: Any = x
    for module, arguments, output in calls:
        if len(arguments) != 1 or arguments[0] is not current:
            raise Unsupported(f"something happens between the layers before {leaves[module]!r}")
        chain.append((leaves[module], module))
        current = output
    if current is not last:
        raise Unsupported("something happens after the last layer")
    _check(model, chain)
    return chain


def _check(model: nn.Module, chain: Chain) -> None:
    for name, module in chain:
        if type(module) not in KERNELS:
            raise Unsupported(f"layer {name!r} ({type(module).__name__}) has no kernel")
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            raise Unsupported(f"layer {name!r} has hooks")
    if len({id(module) for _, module in chain}) < len(chain):
        raise Unsupported("a layer is used twice")
    here = [id(p) for _, module in chain for p in module.parameters(recurse=False)]
    if len(set(here)) < len(here) or set(here) != {id(p) for p in model.parameters()}:
        raise Unsupported("parameters are shared, or lie outside of the layers")
