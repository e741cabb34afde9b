"""The state that a measurement must leave untouched: flags, buffers, random streams, gradients, autocast's cache."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from local_elasticity.impact.arithmetic import exact_float32

Mode = Literal["eval", "train", "as_is"]


def random_state() -> dict[str, Any]:
    """The random streams of torch (CPU and CUDA), NumPy and Python."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    return {"torch": torch.get_rng_state(), "cuda": cuda, "numpy": np.random.get_state(), "python": random.getstate()}  # noqa: NPY002 (the global stream itself)


def set_random_state(state: dict[str, Any]) -> None:
    """Put the random streams back to where ``random_state`` found them."""
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    random.setstate(state["python"])


@contextmanager
def preserved(model: nn.Module, mode: Mode) -> Iterator[dict[str, Any]]:
    """Put the model into ``mode`` and give everything back afterwards, also after an exception.

    Buffers live in copies meanwhile, so their own bits are never written. Flags are set one by one, because a
    module's own ``train()`` may do more than set a flag. Autocast's weight cache is off inside: it would serve casts of
    the weights from before the step. A model on CUDA computes with `exact_float32`.

    Yields:
        The random state at the start, so that every forward pass can see the same stream.
    """
    streams = random_state()
    flags = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.data)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    cache = torch.is_autocast_cache_enabled()
    try:
        torch.set_autocast_cache_enabled(False)
        copies = {id(buffer): data.clone() for _, _, buffer, data in buffers}
        for _, _, buffer, _ in buffers:
            buffer.data = copies[id(buffer)]
        for module, _ in flags:
            module.training = {"eval": False, "train": True, "as_is": module.training}[mode]
        cuda = any(parameter.is_cuda for parameter in model.parameters())
        recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
        with torch.inference_mode(False), exact_float32(recurrent) if cuda else nullcontext():
            yield streams
    finally:
        for module, flag in flags:
            module.training = flag
        for module, name, buffer, data in buffers:
            buffer.data = data
            module._buffers[name] = buffer
        torch.set_autocast_cache_enabled(cache)
        set_random_state(streams)


@contextmanager
def weights_at(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> Iterator[None]:
    """Let the parameters point at other values; their own storage is never written, so undoing is exact."""
    own = [parameter.data for parameter in parameters]
    try:
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data = value
        yield
    finally:
        for parameter, value in zip(parameters, own, strict=True):
            parameter.data = value


def call_at(model: nn.Module, parameters: Sequence[nn.Parameter], values: Sequence[Tensor], x: Tensor) -> Any:
    """The model's output with other tensors in the place of its parameters, for transforms of ``torch.func``.

    ``torch.func.functional_call`` would leave the weights changed where one module has two names in the model.
    """
    stand_in = {id(parameter): value for parameter, value in zip(parameters, values, strict=True)}
    places = [
        (module._parameters, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if id(parameter) in stand_in
    ]
    slots: dict[str, Any]
    try:
        for slots, name, parameter in places:
            slots[name] = stand_in[id(parameter)]
        return model(x)
    finally:
        for slots, name, parameter in places:
            slots[name] = parameter
