"""Everything that a model and its loss can reach: the places that hold their state, and the tensors in them.

A place knows what it held (`save`), whether that has changed (`moved`, by identity, in one loop of C) and how to put it
back (`restore`). Objects of torch, NumPy and the standard library are not entered, but for those listed here.
"""

from __future__ import annotations

import argparse
import array
import collections
import dis
import functools
import queue
import random
import sys
import sysconfig
import threading
import types
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import is_
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from local_elasticity.base.errors import InputError

MOST_ITEMS = 1000  # a container with more is not entered
MOST_PLACES = 2000  # beside those of modules
MOST_FIXED_ITEMS = 10**5  # of all tuples and frozensets together
MOST_ARRAY_BYTES = 2**20  # a larger array is compared at times only, as is a container that is not entered
MOST_WATCHED_ITEMS, MOST_WATCHED_BYTES = 10**6, 2**26  # more is not watched at all
FULL_COMPARISONS = 4

_PLAIN = (
    int, float, complex, str, bytes, bool, type(None), range, slice, torch.dtype, torch.device, torch.Size,
    types.ModuleType, types.BuiltinFunctionType, types.CodeType, np.dtype,
)  # fmt: skip
_RECORDS = (
    types.SimpleNamespace, argparse.Namespace, collections.UserDict, collections.UserList, queue.Queue,
    threading.local, weakref.WeakKeyDictionary, weakref.WeakValueDictionary, weakref.WeakSet, collections.ChainMap,
    torch.optim.lr_scheduler.LRScheduler, torch.distributions.Distribution, torch.distributions.Transform,
    torch.quasirandom.SobolEngine, torch.amp.GradScaler,
)  # fmt: skip
_LIBRARIES = (frozenset(sys.stdlib_module_names) | {"torch", "numpy", "scipy", "torchgen", "functorch"}) - {"__main__"}
_INSTALLED = tuple(
    path for name in ("purelib", "platlib", "stdlib") if (path := sysconfig.get_paths().get(name)) is not None
)


class Place(ABC):
    """One holder of state: what is in it can be saved, compared and put back."""

    kind = "python"

    def __init__(self, holder: Any) -> None:
        self.holder = holder
        self.saved = self.original = self.read()

    @abstractmethod
    def read(self) -> Any:
        """What the holder holds, as a collection of values."""

    @abstractmethod
    def write(self, content: Any) -> None:
        """Let the holder hold this."""

    def save(self) -> None:
        """Let what is here now be what `restore` puts back."""
        self.saved = self.read()

    def moved(self) -> bool:
        """Whether the holder holds something else than what was saved."""
        now = self.read()
        return len(now) != len(self.saved) or not all(map(is_, now, self.saved))

    def settle(self) -> None:
        """Let what was here at first be what `restore` puts back; at the end."""
        self.saved = self.original

    def refusal(self) -> InputError | None:
        """Why what has moved cannot be put back; None where it can."""
        return None

    def restore(self) -> None:
        """Put back what was saved."""
        self.write(self.saved)

    def values(self) -> Iterable[Any]:
        """The objects in it, to be entered."""
        return self.read()

    def replaced(self, exchange: Callable[[Any], Any]) -> Any:
        """Its content with some values exchanged; None where none is."""
        now = self.read()
        other = [exchange(value) for value in now]
        return None if all(map(is_, now, other)) else type(now)(other)


class _Dict(Place):
    def read(self) -> dict[Any, Any]:
        return dict(self.holder)

    def moved(self) -> bool:
        saved, holder = self.saved, self.holder
        return (
            len(holder) != len(saved)
            or not all(map(is_, holder.values(), saved.values()))
            or not all(map(is_, holder, saved))
        )

    def write(self, content: dict[Any, Any]) -> None:
        """By the methods of the plain kind: those of a subclass may do something else (a Counter's update adds)."""
        kind = collections.OrderedDict if isinstance(self.holder, collections.OrderedDict) else dict
        if len(self.holder) != len(content) or not all(map(is_, self.holder, content)):
            kind.clear(self.holder)
        for key, value in content.items():
            kind.__setitem__(self.holder, key, value)

    def values(self) -> Iterable[Any]:
        return list(self.holder.values())

    def replaced(self, exchange: Callable[[Any], Any]) -> Any:
        other = {key: exchange(value) for key, value in self.holder.items()}
        return None if all(map(is_, self.holder.values(), other.values())) else other


class _Dicts(Place):
    """Many dicts that are mostly empty: attributes of tensors, hooks of modules; a look's own hooks are let be."""

    def read(self) -> dict[Any, Any]:
        return {
            (position, key): value
            for position, each in enumerate(self.holder)
            if each
            for key, value in each.items()
            if not _is_own(value)
        }

    def moved(self) -> bool:
        if not self.saved and not any(self.holder):
            return False
        now = self.read()
        return now.keys() != self.saved.keys() or not all(value is self.saved[name] for name, value in now.items())

    def write(self, content: dict[Any, Any]) -> None:
        for position in {position for position, _ in [*self.read(), *content]}:
            each = self.holder[position]
            own = {key: value for key, value in each.items() if _is_own(value)}
            each.clear()
            each.update({key: value for (place, key), value in content.items() if place == position} | own)

    def values(self) -> Iterable[Any]:
        return list(self.read().values())

    def replaced(self, exchange: Callable[[Any], Any]) -> Any:
        now = self.read()
        other = {name: exchange(value) for name, value in now.items()}
        return None if all(map(is_, now.values(), other.values())) else other


class _Kinds(Place):
    """The classes of all modules."""

    def read(self) -> list[type]:
        return list(map(type, self.holder))

    def write(self, content: list[type]) -> None:
        for module, kind in zip(self.holder, content, strict=True):
            if type(module) is not kind:
                module.__class__ = kind

    def values(self) -> Iterable[Any]:
        return ()

    def replaced(self, exchange: Callable[[Any], Any]) -> Any:
        return None


class _ModuleState(_Dict):
    """A module's ``__dict__``; its dicts have places of their own."""

    def values(self) -> Iterable[Any]:
        return [value for name, value in self.holder.items() if name not in _MODULE_INTERNALS]


class _Buffers(_Dict):
    kind = "buffer"


class _List(Place):
    def read(self) -> list[Any]:
        return list(self.holder)

    def write(self, content: list[Any]) -> None:
        kind: Any = list if isinstance(self.holder, list) else collections.deque
        kind.clear(self.holder)
        kind.extend(self.holder, content)


class _Set(Place):
    def read(self) -> list[Any]:
        return list(self.holder)

    def moved(self) -> bool:
        return len(self.holder) != len(self.saved) or not all(value in self.holder for value in self.saved)

    def write(self, content: list[Any]) -> None:
        set.clear(self.holder)
        set.update(self.holder, content)


class _Length(Place):
    """A container too large to enter: only its length is watched."""

    def read(self) -> Any:
        return len(self.holder)

    def moved(self) -> bool:
        return len(self.holder) != self.saved

    def values(self) -> Iterable[Any]:
        return ()

    def replaced(self, exchange: Callable[[Any], Any]) -> Any:
        return None

    def write(self, content: int) -> None:
        if isinstance(self.holder, list | bytearray) and len(self.holder) > content:
            del self.holder[content:]
        elif isinstance(self.holder, collections.deque):
            while len(self.holder) > content:
                self.holder.pop()
        elif isinstance(self.holder, dict):
            while len(self.holder) > content:
                self.holder.popitem()


class _Seldom:
    """Of a large place: it is compared a few times, then only where it has moved by then, and at the end."""

    comparisons_left = FULL_COMPARISONS

    def moved(self) -> bool:
        place: Any = super()
        if self.comparisons_left <= 0:
            return False
        has_moved = place.moved()
        self.comparisons_left = FULL_COMPARISONS if has_moved else self.comparisons_left - 1
        return has_moved

    def settle(self) -> None:
        place: Any = super()
        place.settle()
        self.comparisons_left = FULL_COMPARISONS

    def values(self) -> Iterable[Any]:
        return ()

    def replaced(self, exchange: Callable[[Any], Any]) -> Any:
        return None


class _LargeDict(_Seldom, _Dict):
    pass


class _LargeList(_Seldom, _List):
    pass


class _LargeSet(_Seldom, _Set):
    pass


class _Cell(Place):
    def read(self) -> list[Any]:
        try:
            return [self.holder.cell_contents]
        except ValueError:  # not bound yet
            return []

    def write(self, content: list[Any]) -> None:
        if content:
            self.holder.cell_contents = content[0]
        else:
            del self.holder.cell_contents


class _CellContent(_Cell):
    """A cell that no function of the subject binds anew: entered, and exchanged, but never put back by itself."""

    def moved(self) -> bool:
        return False


class _Names(Place):
    """Global names that a function binds."""

    def __init__(self, holder: dict[str, Any], names: Sequence[str]) -> None:
        self.names = names
        super().__init__(holder)

    def read(self) -> list[Any]:
        return [self.holder.get(name, _MISSING) for name in self.names]

    def write(self, content: list[Any]) -> None:
        for name, value in zip(self.names, content, strict=True):
            if value is _MISSING:
                self.holder.pop(name, None)
            else:
                self.holder[name] = value

    def values(self) -> Iterable[Any]:
        return [value for value in self.read() if value is not _MISSING]


class _Attributes(_Names):
    """Slots of an object without a ``__dict__``, or attributes of a class."""

    def read(self) -> list[Any]:
        return [getattr(self.holder, name, _MISSING) for name in self.names]

    def write(self, content: list[Any]) -> None:
        for name, value in zip(self.names, content, strict=True):
            if value is _MISSING:
                if hasattr(self.holder, name):
                    object.__delattr__(self.holder, name)
            elif getattr(self.holder, name, _MISSING) is not value:
                object.__setattr__(self.holder, name, value)


class _ClassAttributes(Place):
    """Data attributes of a user's class."""

    def read(self) -> dict[str, Any]:
        return {
            name: value
            for name, value in vars(self.holder).items()
            if not (name.startswith("__") and name.endswith("__")) and not name.startswith("_abc_")
        }

    def moved(self) -> bool:
        now = self.read()
        return len(now) != len(self.saved) or not all(map(is_, now.values(), self.saved.values()))

    def write(self, content: dict[str, Any]) -> None:
        now = self.read()
        for name in now.keys() - content.keys():
            delattr(self.holder, name)
        for name, value in content.items():
            if now.get(name, _MISSING) is not value:
                setattr(self.holder, name, value)

    def values(self) -> Iterable[Any]:
        return [value for value in self.read().values() if not isinstance(value, types.FunctionType)]

    def replaced(self, exchange: Callable[[Any], Any]) -> Any:
        now = self.read()
        other = {name: exchange(value) for name, value in now.items()}
        return None if all(map(is_, now.values(), other.values())) else other


class _Partial(Place):
    def read(self) -> tuple[Any, ...]:
        return self.holder.args

    def write(self, content: tuple[Any, ...]) -> None:
        part = self.holder
        part.__setstate__((part.func, tuple(content), part.keywords, part.__dict__ or None))

    def values(self) -> Iterable[Any]:
        return [self.holder.func, *self.holder.args]


class _Defaults(Place):
    def read(self) -> tuple[Any, ...]:
        return self.holder.__defaults__ or ()

    def write(self, content: tuple[Any, ...]) -> None:
        self.holder.__defaults__ = tuple(content)


class _Cache(Place):
    """A ``functools.lru_cache``, which does not show what it holds: one that was empty is emptied again."""

    def read(self) -> Any:
        return self.holder.cache_info()

    def moved(self) -> bool:
        return self.holder.cache_info().misses != self.saved.misses

    def write(self, content: Any) -> None:
        if content.currsize == 0:
            self.holder.cache_clear()

    def refusal(self) -> InputError | None:
        if self.saved.currsize == 0:
            return None
        name = getattr(self.holder, "__qualname__", "a function")
        return InputError(
            expected="caches of functions that a forward pass and a loss do not add to, for that cannot be put back",
            got=f"{name}, an lru_cache that was called with new arguments",
            do=f"call {name}.cache_clear() before the look",
        )

    def values(self) -> Iterable[Any]:
        return [self.holder.__wrapped__]

    def replaced(self, exchange: Callable[[Any], Any]) -> Any:
        return None


class _ScriptState(Place):
    """Attributes of a TorchScript module that are no weights, buffers or modules; containers come and go as copies."""

    def __init__(self, holder: torch.jit.ScriptModule) -> None:
        others: Any = (holder._parameters, holder._buffers, holder._modules)
        self.names = [name for name in _attributes_of(holder) if not any(name in other for other in others)]
        super().__init__(holder)

    def read(self) -> dict[str, Any]:
        return {name: self.holder._c.getattr(name) for name in self.names}

    def moved(self) -> bool:
        return not all(_same(value, self.saved[name]) for name, value in self.read().items())

    def write(self, content: dict[str, Any]) -> None:
        for name, value in content.items():
            self.holder._c.setattr(name, value)

    def values(self) -> Iterable[Any]:
        return self.read().values()

    def replaced(self, exchange: Callable[[Any], Any]) -> Any:
        return None


class _Array(Place):
    """A NumPy array or a bytearray, by value."""

    def read(self) -> Any:
        return self.holder.copy()

    def moved(self) -> bool:
        if isinstance(self.holder, bytearray | array.array):
            return self.holder != self.saved
        return self.holder.shape != self.saved.shape or not _same_bytes(self.holder, self.saved)

    def write(self, content: Any) -> None:
        self.holder[...] = content

    def values(self) -> Iterable[Any]:
        return ()

    def replaced(self, exchange: Callable[[Any], Any]) -> Any:
        return None


class _LargeArray(_Seldom, _Array):
    pass


class _Bytes(_Array):
    def read(self) -> Any:
        return self.holder[:]

    def write(self, content: Any) -> None:
        self.holder[:] = content


class _TorchGenerator(_Array):
    kind = "generator"

    def read(self) -> Any:
        return self.holder.get_state()

    def moved(self) -> bool:
        return not torch.equal(self.holder.get_state(), self.saved)

    def write(self, content: Any) -> None:
        self.holder.set_state(content)


class _NumpyBits(_Array):
    kind = "generator"

    def read(self) -> Any:
        return self.holder.state

    def moved(self) -> bool:
        return _plain(self.read()) != _plain(self.saved)

    def write(self, content: Any) -> None:
        self.holder.state = content


class _NumpyGenerator(_Array):
    kind = "generator"

    def read(self) -> Any:
        return self.holder.bit_generator.state

    def moved(self) -> bool:
        return _plain(self.read()) != _plain(self.saved)

    def write(self, content: Any) -> None:
        self.holder.bit_generator.state = content


class _NumpyRandomState(_Array):
    kind = "generator"

    def read(self) -> Any:
        return self.holder.get_state(legacy=False)

    def moved(self) -> bool:
        return _plain(self.read()) != _plain(self.saved)

    def write(self, content: Any) -> None:
        self.holder.set_state(content)


class _PythonRandom(_Array):
    kind = "generator"

    def read(self) -> Any:
        return self.holder.getstate()

    def moved(self) -> bool:
        return self.holder.getstate() != self.saved

    def write(self, content: Any) -> None:
        self.holder.setstate(content)


def _same_bytes(one: np.ndarray, other: np.ndarray) -> bool:
    if one.flags.c_contiguous and other.flags.c_contiguous and one.nbytes > MOST_ARRAY_BYTES:
        return np.array_equal(one.reshape(-1).view(np.uint8), other.reshape(-1).view(np.uint8))
    return one.tobytes() == other.tobytes()


def _attributes_of(module: Any) -> list[str]:
    kinds = getattr(module, "_concrete_type", None)
    names = () if kinds is None else kinds.get_attributes()
    return [name for name in names if name not in ("training", "_is_full_backward_hook")]


def _same(one: Any, other: Any) -> bool:
    """Whether two values of TorchScript are the same: tensors by identity, anything else by value."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return one is other
    if isinstance(one, list | tuple) and type(one) is type(other):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict) and type(one) is type(other):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    return bool(one == other)


_MISSING = object()
_MODULE_INTERNALS = frozenset(nn.Module().__dict__) | {"_is_full_backward_hook"}


def _plain(state: Any) -> Any:
    """A generator's state with its arrays as bytes, to be compared."""
    if isinstance(state, dict):
        return {key: _plain(value) for key, value in state.items()}
    return state.tobytes() if isinstance(state, np.ndarray) else state


class Reach:
    """One walk over all that the roots can reach.

    Args:
        roots: models, loss functions, anything.

    Attributes:
        places: the holders of state.
        modules: every module, each once.
        tensors: every tensor that is held somewhere, each once.
        held: ids of the objects that were entered, for the question whether two walks meet.
        arrays: every NumPy array.
        iterators: descriptions of running iterators, whose position cannot be put back.
        is_cut: whether a limit of the walk was met.
    """

    def __init__(self, *roots: Any) -> None:
        self.places: list[Place] = []
        self.modules: list[nn.Module] = []
        self.tensors: list[Tensor] = []
        self.arrays: list[np.ndarray] = []
        self.iterators: list[str] = []
        self.held: dict[int, Any] = {}
        self.is_cut = False
        self._free_places, self._free_items = MOST_PLACES, MOST_FIXED_ITEMS
        self._is_foreign = False  # inside an installed package's object
        self._hooks: list[dict[Any, Any]] = []
        self._attributes: list[Any] = []
        self._queue: list[tuple[Any, bool]] = []
        self._put(roots)
        while self._queue:
            value, self._is_foreign = self._queue.pop()
            self._enter(value)
        self.places += [place(each) for place, each in self._common_places() if each]

    def _common_places(self) -> list[tuple[type[Place], list[Any]]]:
        return [(_Kinds, self.modules), (_Dicts, self._hooks), (_Dicts, self._attributes)]

    # -- the walk ---------------------------------------------------------------------------------------------------

    def _put(self, values: Iterable[Any]) -> None:
        self._queue += [(value, self._is_foreign) for value in values if not isinstance(value, _PLAIN)]

    def _enter(self, value: Any) -> None:
        if isinstance(value, _PLAIN) or id(value) in self.held:
            return
        self.held[id(value)] = value
        if isinstance(value, Tensor):
            self._enter_tensor(value)
        elif isinstance(value, nn.Module):
            self._enter_module(value)
        elif self._free_places <= 0:
            self.is_cut = True
        elif isinstance(value, types.FunctionType):
            self._enter_function(value)
        elif isinstance(value, types.MethodType):
            self._put([value.__self__, value.__func__])
        elif isinstance(value, functools.partial):
            self._add(_Partial(value))
            self._put([value.keywords, value.__dict__])
        elif isinstance(value, type):
            self._enter_class(value)
        elif isinstance(value, functools._lru_cache_wrapper):
            if isinstance(value.__wrapped__, types.FunctionType) and not _is_library(value.__wrapped__):
                self._add(_Cache(value))
        else:
            self._enter_object(value)

    def _add(self, place: Place, of_module: bool = False) -> None:
        self.places.append(place)
        self._free_places -= not of_module
        self._put(place.values())

    def _enter_tensor(self, value: Tensor) -> None:
        self.tensors.append(value)
        self._attributes.append(value.__dict__)
        self._put(value.__dict__.values())
        for hooks in (value._backward_hooks, getattr(value, "_post_accumulate_grad_hooks", None)):
            self._put(hooks.values() if hooks else ())

    def _enter_module(self, module: nn.Module) -> None:
        self.modules.append(module)
        if isinstance(module, torch.jit.ScriptModule):
            self._add(_ScriptState(module), of_module=True)
            self._put([*module.parameters(recurse=False), *module.buffers(recurse=False), *module.children()])
            return
        state = module.__dict__
        self._add(_ModuleState(state), of_module=True)
        for name in ("_parameters", "_modules"):
            self._add(_Dict(state[name]), of_module=True)
            self.held[id(state[name])] = state[name]
        self._add(_Buffers(state["_buffers"]), of_module=True)
        self.held[id(state["_buffers"])] = state["_buffers"]
        self._hooks += [state[name] for name in state if name.startswith(("_forward", "_backward")) and "hooks" in name]
        self._put(hook for name, hooks in state.items() if name.endswith("hooks") for hook in hooks.values())
        self._add_slots(module, of_module=True)
        self._put([type(module)])

    def _enter_function(self, function: types.FunctionType) -> None:
        if _root(function.__module__) in _LIBRARIES and function.__closure__ is None:
            return
        uses = _uses(function.__code__)
        if function.__defaults__:
            self._add(_Defaults(function))
        if function.__kwdefaults__:
            self._put([function.__kwdefaults__])
        self._put([function.__dict__])
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            if id(cell) not in self.held:
                self.held[id(cell)] = cell
                self._add(_Cell(cell) if name in uses.bound_cells else _CellContent(cell))
            elif name in uses.bound_cells:
                self.places = [p for p in self.places if p.holder is not cell] + [_Cell(cell)]
        if _is_installed(function.__code__.co_filename):
            return
        space = function.__globals__
        if uses.bound_globals:
            self._add(_Names(space, sorted(uses.bound_globals)))
        named = [space[name] for name in uses.read_globals if name in space]
        self._put(named)
        for value in named:
            if isinstance(value, types.ModuleType):
                self._enter_python_module(value, uses)

    def _enter_python_module(self, module: types.ModuleType, uses: _Uses) -> None:
        """What a function reads or binds of a module of the user's: ``settings.step += 1``."""
        if _root(module.__name__) in _LIBRARIES or _is_installed(str(getattr(module, "__file__", None) or "")):
            return
        if uses.bound_attributes:
            self._add(_Names(vars(module), sorted(uses.bound_attributes)))
        self._put(vars(module)[name] for name in uses.read_attributes if name in vars(module))

    def _enter_class(self, kind: type) -> None:
        """A user's class: its data attributes, and what its methods name."""
        for part in kind.__mro__:
            if _root(part.__module__) in _LIBRARIES or _is_installed(_file_of(part)):
                continue
            if part is not kind and id(part) in self.held:
                continue
            self.held[id(part)] = part
            self._add(_ClassAttributes(part))
            self._put(_function(value) for value in vars(part).values())

    def _enter_object(self, value: Any) -> None:
        place = self._place_for(value)
        if place is not None:
            self._add(place)
            if isinstance(value, dict) and not isinstance(place, _Length | _Seldom):
                self._put(value)
            if _root(type(value).__module__) not in _LIBRARIES:  # a user's kind of list or dict
                self._enter_instance(value, type(value))
            return
        if isinstance(value, torch.optim.Optimizer):
            self._enter_optimizer(value)
            return
        if isinstance(value, tuple | frozenset | types.MappingProxyType):
            self._free_items -= len(value)
            if len(value) > MOST_ITEMS or self._free_items < 0:
                self.is_cut = True
            else:
                self._put(value.values() if isinstance(value, types.MappingProxyType) else value)
            return
        kind = type(value)
        if isinstance(value, Iterator) and _root(kind.__module__) in _LIBRARIES and not hasattr(value, "fileno"):
            if not self._is_foreign:
                self.iterators.append(f"a {kind.__name__}")
            return
        is_library = _root(kind.__module__) in _LIBRARIES and not isinstance(value, _RECORDS)
        if is_library or _file_of(kind).startswith(_OWN_FILES):
            return
        self._is_foreign = self._is_foreign or _is_installed(_file_of(kind))
        self._enter_instance(value, kind)

    def _enter_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Its settings and its state; its weights are the model's, and stay those that it steps on."""
        for group in optimizer.param_groups:
            self.held[id(group["params"])] = group["params"]
        self._put([optimizer.param_groups, optimizer.state])

    def _enter_instance(self, value: Any, kind: type) -> None:
        state = getattr(value, "__dict__", None)
        if isinstance(state, dict):
            self.held[id(state)] = state
            self._add(_Dict(state))
        self._add_slots(value)
        self._put([kind])

    def _add_slots(self, value: Any, of_module: bool = False) -> None:
        slots = [name for part in type(value).__mro__ for name in _slots_of(part)]
        if slots:
            self._add(_Attributes(value, slots), of_module)

    def _place_for(self, value: Any) -> Place | None:
        if isinstance(value, dict | list | set | collections.deque | bytearray | array.array):
            if len(value) > MOST_ITEMS:
                self.is_cut = True
                if len(value) > MOST_WATCHED_ITEMS or isinstance(value, bytearray | array.array):
                    return _Length(value)
                large = (_LargeDict, _LargeSet, _LargeList)
                return large[0 if isinstance(value, dict) else 1 if isinstance(value, set) else 2](value)
            if isinstance(value, bytearray | array.array):
                return _Bytes(value)
            return (_Dict if isinstance(value, dict) else _Set if isinstance(value, set) else _List)(value)
        if isinstance(value, np.ndarray):
            self.arrays.append(value)
            if value.dtype.hasobject or not value.flags.writeable:
                return None
            if value.nbytes > MOST_WATCHED_BYTES:
                self.is_cut = True
                return None
            if value.nbytes > MOST_ARRAY_BYTES:
                return _LargeArray(value)
            return _Array(value)
        if isinstance(value, torch.Generator):
            return None if value in _global_generators() else _TorchGenerator(value)
        if isinstance(value, np.random.Generator):
            return _NumpyGenerator(value)
        if isinstance(value, np.random.BitGenerator):
            return _NumpyBits(value)
        if isinstance(value, np.random.RandomState):
            return None if value is cast(Any, np.random.mtrand)._rand else _NumpyRandomState(value)
        if isinstance(value, random.Random):
            has_state = value is not cast(Any, random)._inst and not isinstance(value, random.SystemRandom)
            return _PythonRandom(value) if has_state else None
        return None

    # -- what was reached -------------------------------------------------------------------------------------------

    def meets(self, other: Reach) -> bool:
        """Whether the two walks hold state in common."""
        mine = {id(place.holder) for place in self.places if not isinstance(place, _Names | _ClassAttributes)}
        theirs = {id(place.holder) for place in other.places}
        return not mine.isdisjoint(theirs) or not {*map(id, self.tensors)}.isdisjoint(map(id, other.tensors))


def substituted(value: Any, exchange: Callable[[Any], Any]) -> Any:
    """A tensor exchanged for another, also inside tuples; anything else as it is."""
    if isinstance(value, Tensor):
        return exchange(value)
    if (
        isinstance(value, tuple)
        and len(value) <= MOST_ITEMS
        and any(isinstance(part, Tensor | tuple) for part in value)
    ):
        parts = [substituted(part, exchange) for part in value]
        if all(map(is_, parts, value)):
            return value
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def _global_generators() -> list[torch.Generator]:
    cuda = list(torch.cuda.default_generators) if torch.cuda.is_available() else []
    return [torch.default_generator, *cuda]


def _root(module: str | None) -> str:
    return (module or "").partition(".")[0]


def _file_of(kind: type) -> str:
    return str(getattr(sys.modules.get(kind.__module__), "__file__", "") or "")


def _is_installed(file: str) -> bool:
    """Whether code belongs to an installed package rather than to the user."""
    return file.startswith(_INSTALLED) or file.startswith(_OWN_FILES)


_OWN_FILES = __file__.rpartition("base")[0]
_OWN_NAME = _root(__name__)


def _is_library(function: types.FunctionType) -> bool:
    return _root(function.__module__) in _LIBRARIES or _is_installed(function.__code__.co_filename)


def _is_own(value: Any) -> bool:
    return isinstance(value, types.FunctionType) and _root(value.__module__) == _OWN_NAME


def _function(value: Any) -> types.FunctionType | None:
    """The plain function behind a method, static method, class method or property."""
    value = getattr(value, "__func__", value)
    value = getattr(value, "fget", value)
    return value if isinstance(value, types.FunctionType) else None


def _slots_of(kind: type) -> list[str]:
    names = vars(kind).get("__slots__", ())
    names = [names] if isinstance(names, str) else list(names)
    return [
        f"_{kind.__name__.lstrip('_')}{name}" if name.startswith("__") and not name.endswith("__") else name
        for name in names
        if name not in ("__dict__", "__weakref__")
    ]


class _Uses:
    """The names that a function's code reads and binds, nested functions included."""

    def __init__(self, code: types.CodeType) -> None:
        self.read_globals: set[str] = set()
        self.bound_globals: set[str] = set()
        self.bound_cells: set[str] = set()
        self.read_attributes: set[str] = set()
        self.bound_attributes: set[str] = set()
        self._read(code)

    def _read(self, code: types.CodeType) -> None:
        for instruction in dis.get_instructions(code):
            if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                self.read_globals.add(instruction.argval)
            elif instruction.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
                self.bound_globals.add(instruction.argval)
            elif instruction.opname in ("STORE_DEREF", "DELETE_DEREF"):
                self.bound_cells.add(instruction.argval)
            elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                self.read_attributes.add(instruction.argval)
            elif instruction.opname in ("STORE_ATTR", "DELETE_ATTR"):
                self.bound_attributes.add(instruction.argval)
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._read(constant)


@functools.lru_cache(maxsize=4096)
def _uses(code: types.CodeType) -> _Uses:
    return _Uses(code)
