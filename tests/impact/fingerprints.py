"""Everything that a look may not change, as values that can be compared: bits, identities, versions."""

import functools
import random
import types
from collections import OrderedDict, deque
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Bits = tuple[Any, ...]


def bits(value: Any) -> Any:
    """The state that can be reached from a value, tensors and generators by their bits."""
    return _bits(value, set())


def _bits(value: Any, visited: set[int]) -> Any:
    if isinstance(value, Tensor):
        return tensor_bits(value)
    if isinstance(value, int) and value > 2**40:  # an address, as compiled code keeps them
        return "address"
    if isinstance(value, (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device)):
        return value
    if isinstance(value, (np.generic, np.ndarray)):
        return ("array", value.shape, str(value.dtype), value.tobytes())
    if isinstance(value, torch.Generator):
        return value.get_state().numpy().tobytes()
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        return value.get_state()[1].tobytes(), value.get_state()[2:]
    if id(value) in visited:
        return "visited"
    return _inside(value, visited | {id(value)})


def _inside(value: Any, visited: set[int]) -> Any:
    if isinstance(value, OrderedDict) and all(isinstance(key, int) for key in value):  # hooks by a running number
        return [_bits(item, visited) for item in value.values()]
    if isinstance(value, dict):
        items = [(key, item) for key, item in value.items() if key != "_torchdynamo_wrapper_id"]
        return [(repr(_bits(key, visited)), _bits(item, visited)) for key, item in items]
    if isinstance(value, (list, tuple, deque)):
        return [type(value).__name__, *(_bits(item, visited) for item in value)]
    if isinstance(value, (set, frozenset)):
        return sorted(repr(item) for item in value)
    if isinstance(value, types.MethodType):
        return _bits(value.__self__, visited)
    if isinstance(value, functools.partial):
        return _bits((value.func, value.args, value.keywords), visited)
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        return _bits((cells, value.__defaults__, vars(value)), visited)
    if isinstance(value, torch.jit.ScriptModule):
        return _bits((dict(value.named_parameters()), dict(value.named_buffers()), value.training), visited)
    if isinstance(value, nn.Module) or type(value).__module__.split(".")[0] not in ("torch", "builtins"):
        return type(value).__name__, _bits(getattr(value, "__dict__", {}), visited)
    return type(value).__name__


def tensor_bits(value: Tensor) -> Bits:
    """Dtype, shape, strides, flags and the bits themselves."""
    plain = value.detach()
    plain = (plain.to_dense() if plain.is_sparse else plain).resolve_conj().cpu().contiguous()
    content = plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""
    strides = () if value.is_sparse else value.stride()
    return (str(value.dtype), tuple(value.shape), strides, value.requires_grad, content)


def streams() -> Bits:
    """The global random streams of torch, NumPy and Python."""
    numpy = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().numpy().tobytes(), numpy[1].tobytes(), numpy[2:], random.getstate()  # type: ignore[union-attr]


def handles(model: nn.Module) -> list[Bits]:
    """What the bits do not show: which tensors there are, where, and how often they were written."""
    tensors = [*model.parameters(), *model.buffers()]
    gradients = [parameter.grad for parameter in model.parameters()]
    places = [(id(t), t.data_ptr(), t._version) for t in tensors]
    places += [(0, 0, 0) if g is None else (id(g), 0 if g.is_sparse else g.data_ptr(), g._version) for g in gradients]
    return [*places, *((id(module), module.training) for module in model.modules())]
