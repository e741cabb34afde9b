"""What a look may touch, and puts back: all that the model and the loss can reach (docs/measurement.md).

Every forward pass starts from the same state: `Subject.call` first puts back whatever the pass before has moved.
Tensors stand in for themselves by copy on write, so nothing is copied unless it is written.
"""

from __future__ import annotations

import bisect
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from local_elasticity.base.arithmetic import exact_float32
from local_elasticity.base.errors import InputError
from local_elasticity.base.reach import Place, Reach, substituted
from local_elasticity.base.streams import (
    Draws,
    in_main_thread,
    moved_streams,
    random_state,
    set_random_state,
)
from local_elasticity.impact.shadows import Shadows, overlapping, private, same_part, share_memory

Mode = Literal["eval", "train", "as_is"]
SHARED_MEMORY = "weights whose memory another tensor shares"

_turn = (
    threading.RLock()
)  # random streams, autocast's cache and attention's switches are the process's, not the model's
_subjects: list[Subject] = []


def _renew_turn() -> None:
    global _turn
    _turn = threading.RLock()
    _subjects.clear()


os.register_at_fork(after_in_child=_renew_turn)


class Subject:
    """A model and a loss during a look.

    Args:
        model: the network.
        mode: "eval", "train" or "as_is" for its flags.
        loss_fn: the loss, whose state is preserved like the model's.
        dtype: convert every floating tensor that is reached to this dtype, in the place where it is held.
        only_narrow: with ``dtype``, convert tensors of 16 bits alone.
        restore_streams: put the global random streams back whoever moved them; for work that trains in this thread.

    Attributes:
        moved: what forward passes and losses have moved so far: "python" (attributes, containers, cells), "buffer",
            "generator", "tensor" (written in place), "weights".
        draws: names of the global random streams that they draw from.
        cut: where the graphs of converted tensors, made before the look, now end.
    """

    def __init__(
        self,
        model: nn.Module,
        mode: Mode = "eval",
        loss_fn: Any = None,
        dtype: torch.dtype | None = None,
        only_narrow: bool = False,
        restore_streams: bool = False,
    ) -> None:
        self.restore_streams = restore_streams
        self.model, self.mode, self.loss_fn, self.dtype, self.only_narrow = model, mode, loss_fn, dtype, only_narrow
        self.moved: set[str] = set()
        self.draws: set[str] = set()
        self._stepped: frozenset[int] = frozenset()
        self._exchanged: list[Place] = []
        self.cut: list[Tensor] = []
        self._stack = ExitStack()

    # -- entering and leaving ---------------------------------------------------------------------------------------

    def __enter__(self) -> Subject:
        _turn.acquire()
        try:
            self._stack.callback(_turn.release)
            self._stack.enter_context(torch.inference_mode(False))
            self._walk()
            self._keep()
            self._stand_in()
            self._set_mode()
            self._switch()
            _subjects.append(self)
            self._stack.callback(_subjects.remove, self)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        late = self._late_draws() if error[0] is None else None
        self._stack.close()
        if late is not None:
            raise late

    def _walk(self) -> None:
        self.reach = Reach(self.model, self.loss_fn)
        if self.reach.iterators:
            raise InputError(
                expected="a model and a loss without running iterators, whose place cannot be put back",
                got=", ".join(sorted(set(self.reach.iterators))),
                do="keep a list or an index instead",
            )
        if self.reach.arrays and _share_memory(self.reach.arrays, self.model.parameters()):
            raise InputError(
                expected="weights whose memory no NumPy array shares, for a step could not be seen there",
                got="an array that is a view of a weight (weight.numpy(), np.asarray(weight))",
                do="keep the tensor, weight.detach(), in its place, or a copy of the array",
            )

    def _keep(self) -> None:
        """Let everything be put back at the end, in the reverse order, whatever happens."""
        stack, reach = self._stack, self.reach
        self.streams = random_state()
        stack.callback(self._put_back_streams)
        leaves = [t for t in reach.tensors if t.is_leaf]
        flags = [(t, t.requires_grad) for t in leaves]
        stack.callback(_put_back_requirements, flags)
        scripted = [(m, m.training) for m in reach.modules if isinstance(m, torch.jit.ScriptModule)]
        stack.callback(_put_back_flags, scripted)
        grads = [(t, t.grad) for t in leaves if t.grad is not None]
        for t, _ in grads:
            t.grad = None
        stack.callback(_put_back_grads, leaves, grads)
        stack.callback(_put_back_hooks, [(t, dict(t._backward_hooks or {})) for t in leaves if t.requires_grad])
        stack.callback(self._put_back_places)

    def _stand_in(self) -> None:
        if self.dtype is not None:
            self._convert(self.dtype)
        tensors = self.reach.tensors if self.dtype is None else self._converted
        self._shadows = Shadows(tensors)
        self._stack.callback(self._shadows.lift)
        weights = [p for p in self.model.parameters() if p.requires_grad]
        self._trainable = frozenset(map(id, weights))
        if overlapping(weights):
            raise InputError(
                expected="trainable weights that each have memory of their own",
                got="weights of the same memory, which an optimiser steps on one after the other",
                do="hold one Parameter in both places (b.weight = a.weight), or give one a copy (.data.clone())",
            )

    def _convert(self, dtype: torch.dtype) -> None:
        """Exchange every floating tensor for one of another dtype, wherever it is held."""
        others: dict[int, Tensor] = {id(t): self._other(t, dtype) for t in self.reach.tensors}
        self._share_again(others)
        self._originals = {id(other): t for t in self.reach.tensors if (other := others[id(t)]) is not t}
        self._exchanged = self._exchange(lambda t: others.get(id(t), t))
        self._converted = list({id(t): t for t in others.values()}.values())
        for module in self.reach.modules:
            if isinstance(module, torch.jit.ScriptModule) and any(id(p) in others for p in module.parameters()):
                raise InputError(
                    expected="a model of Python modules for dtype=",
                    got="a TorchScript module",
                    do="convert it yourself",
                )

    def _other(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """A tensor of another dtype; one with a graph begins a graph of its own, where that can be noticed."""
        other = _converted(x, dtype, self.only_narrow)
        if other is x or x.is_leaf or not x.requires_grad:
            return other
        self.cut.append(other.requires_grad_())
        return other.clone()

    def _share_again(self, others: dict[int, Tensor]) -> None:
        """Let what shares the memory of a weight share that of the converted one."""
        shared = overlapping(self.reach.tensors)
        weights = {id(p): p for p in self.model.parameters() if p.requires_grad and id(p) in shared}
        for x in self.reach.tensors if weights else ():
            weight = next((p for p in weights.values() if p is not x and share_memory(x, p)), None)
            if weight is None or id(x) in weights or others[id(weight)] is weight:
                continue
            part = same_part(x, weight, others[id(weight)])
            if part is None:
                raise InputError(
                    expected="weights whose memory is not part of another tensor's, for dtype= and weights of 16 bits",
                    got=f"a tensor of shape {tuple(x.shape)} that holds the memory of a weight and more",
                    do="convert the model yourself (and say dtype='as_is' for weights of 16 bits)",
                )
            others[id(x)] = _of_the_kind_of(x, part)
            if x.requires_grad and not x.is_leaf:
                self.cut.append(part.requires_grad_())

    def _exchange(self, exchange: Callable[[Tensor], Tensor]) -> list[Place]:
        """Exchange tensors in all places; returns those that hold other ones now."""
        changed = []
        for place in self.reach.places:
            content = place.replaced(lambda value: substituted(value, exchange))
            if content is not None:
                place.write(content)
                changed.append(place)
        return changed

    def _set_mode(self) -> None:
        """Flags are set one by one, because a module's own ``train()`` may do more than set a flag."""
        if self.mode != "as_is":
            for module in self.model.modules():
                module.training = self.mode == "train"
        self.resave()

    def _switch(self) -> None:
        """Autocast's cache and that of parametrisations would serve weights from before the step."""
        stack = self._stack
        stack.callback(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
        torch.set_autocast_cache_enabled(False)
        stack.callback(setattr, parametrize, "_cache_enabled", parametrize._cache_enabled)
        parametrize._cache_enabled = 0
        if any(t.is_cuda for t in self.reach.tensors):
            stack.enter_context(exact_float32(any(isinstance(m, nn.RNNBase) for m in self.reach.modules)))

    def _put_back_places(self) -> None:
        for place in self.reach.places:
            place.settle()
            if place.moved():
                place.restore()
        for place in self._exchanged:
            place.restore()

    def _put_back_streams(self) -> None:
        if self.restore_streams:
            set_random_state(self.streams, moved_streams(self.streams))
        elif self.draws:
            set_random_state(self.streams, self.draws)

    def _late_draws(self) -> InputError | None:
        """The error for draws that the first forward passes did not make; None where there were none of this thread."""
        if self.restore_streams or not in_main_thread() or threading.active_count() > 1:
            return None
        names = moved_streams(self.streams) - self.draws
        if not names:
            return None
        self.draws |= names
        return late_draws_error()

    # -- within a look ----------------------------------------------------------------------------------------------

    def resave(self) -> None:
        """Let the state of all places, as it is now, be the one that every forward pass starts from."""
        for place in self.reach.places:
            place.save()

    def rewind(self) -> None:
        """Put back what has moved since the last time."""
        self._rewind_places()
        for t in self._shadows.rewind(self._stepped):
            self.moved.add("weights" if id(t) in self._trainable else "tensor")
        if self.draws:
            set_random_state(self.streams, self.draws)

    def _rewind_places(self) -> None:
        for place in self.reach.places:
            if place.moved():
                self.moved.add(place.kind)
                refusal = place.refusal()
                if refusal is not None:
                    raise refusal
                place.restore()

    def call(self, x: Tensor) -> Any:
        """The model's output at ``x``, from the state at the beginning; what the model writes to is a copy."""
        self.rewind()
        return self.model(private(x))

    def weights_written(self) -> bool:
        """Whether the pass that is under way has written to trainable weights."""
        return self.has_written([p for p in self.model.parameters() if id(p) in self._trainable])

    def has_written(self, tensors: Sequence[Tensor]) -> bool:
        """Whether any of these has been written in place since the last rewind."""
        return self._shadows.written(tensors)

    @property
    def restless(self) -> bool:
        """Whether forward passes or losses move more than Python attributes, or draw random numbers."""
        return bool(self.moved - {"python"} or self.draws)

    @property
    def loss_meets_model(self) -> bool:
        """Whether the loss can reach any state of the model."""
        return Reach(self.loss_fn).meets(Reach(self.model))

    def original(self, parameter: nn.Parameter) -> Tensor:
        """The user's own parameter behind a converted one."""
        return getattr(self, "_originals", {}).get(id(parameter), parameter)

    def why_not_by_slots(self, parameters: Sequence[Tensor]) -> str | None:
        """Why other tensors cannot stand in the places of the weights; None where they can."""
        names = {id(p) for p in parameters}
        if self._shadows.aliases(names):
            return SHARED_MEMORY
        if any(isinstance(m, torch.jit.ScriptModule) for m in self.reach.modules):
            return "a TorchScript module"
        return None

    @contextmanager
    def standing_in(self, parameters: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
        """Let other tensors be held wherever the weights are, by model and loss alike; for transforms of torch.func.

        Rewind before the transform: tensors cannot be given other data within one.
        """
        self._rewind_places()
        others = {id(p): value for p, value in zip(parameters, values, strict=True)}
        for p, value in zip(parameters, values, strict=True):
            if p.__dict__:
                _share_attributes(p, value)
        changed: list[Place] = []
        try:
            changed = self._exchange(lambda t: others.get(id(t), t))
            yield
        finally:
            for place in changed:
                place.restore()

    @contextmanager
    def weights_at(self, parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> Iterator[None]:
        """Let the parameters point at other values; their own storage is never written, so undoing is exact."""
        self.rewind()
        stood_at = [parameter.data for parameter in parameters]
        try:
            self._stepped = frozenset(map(id, parameters))
            shared = self._shadows.aliases(self._stepped)
            if shared:  # the step holds the weights themselves, whose memory is not to be written
                self._shadows.renew(parameters)
            for parameter, value in zip(parameters, values, strict=True):
                if id(parameter) in shared:
                    parameter.data.copy_(value)
                else:
                    parameter.data = value
            yield
        finally:
            for parameter, value in zip(parameters, stood_at, strict=True):
                parameter.data = value
            self._stepped = frozenset()
            self._shadows.renew(parameters)

    def check_quiet(self, work: Callable[[], Any]) -> Any:
        """Do some work that stands for all that follows, and refuse what it moves or draws; returns its result.

        Raises:
            InputError: for forward passes that are not all alike.
        """
        result = self.find_draws(work)
        self.rewind()
        if self.restless:
            raise InputError(
                expected="forward passes that neither draw random numbers nor move state",
                got=", ".join(sorted((self.draws and {"random numbers"}) or self.moved - {"python"})),
                do="use mode='eval', or le.measure with engine='replay'",
            )
        return result

    def find_draws(self, work: Callable[[], Any]) -> Any:
        """Do some work, and find out whether it draws from the global streams; returns what it returns.

        In the main thread the streams are compared; where another thread may have moved them, the work is watched. In
        any other thread a draw is refused before it is made.
        """
        if not in_main_thread():
            with Draws(refuse=True):
                return work()
        before = random_state()
        result = work()
        names = moved_streams(before)
        if names and threading.active_count() > 1:
            names = self._attributed(work, names)
        if names:
            self.draws |= names
            self.streams |= {name: before[name] for name in names}
        return result

    def _attributed(self, work: Callable[[], Any], names: set[str]) -> set[str]:
        """Those of the streams that this thread's work moved; NumPy's counts where it moves every time."""
        watched = Draws()
        for _ in range(2):
            before = random_state()
            with watched:
                work()
            names = names & (moved_streams(before) | {"torch", "cuda", "python"})
        blamed = (() if watched.were_seen else ("torch", "cuda")) + (() if watched.in_python else ("python",))
        return names - set(blamed)

    def check_late_draws(self, work: Callable[[], Any]) -> None:
        """Where streams moved though no draw was found, and other threads live: watch the work once more.

        Raises:
            InputError: when it is this thread's work that draws.
        """
        if not in_main_thread() or threading.active_count() == 1:
            return
        if not (moved_streams(self.streams) - self.draws) & {"torch", "cuda"}:
            return
        watched = Draws()
        with watched:
            work()
        if watched.were_seen:
            self.draws |= {"torch", "cuda"}
            raise late_draws_error()


def late_draws_error() -> InputError:
    """What is said of draws at some inputs only."""
    return InputError(
        expected="a model and a loss that draw random numbers at every input or at none",
        got="draws at some inputs only, so that looks would differ from one another",
        do="use mode='eval', or give the module a torch.Generator of its own",
    )


def preserved(
    model: nn.Module,
    mode: Mode,
    loss_fn: Any = None,
    dtype: torch.dtype | None = None,
    only_narrow: bool = False,
    restore_streams: bool = False,
) -> Subject:
    """Put the model into ``mode`` and give everything back afterwards, also after an exception; see `Subject`."""
    return Subject(model, mode, loss_fn, dtype, only_narrow, restore_streams)


def subject_of(model: nn.Module) -> Subject | None:
    """The look that is under way at this model in this thread, if there is one."""
    return next((s for s in reversed(_subjects) if s.model is model), None)


def call(model: nn.Module, x: Tensor) -> Any:
    """The model's output at ``x``; within a look from the state at its beginning."""
    subject = subject_of(model)
    return model(x) if subject is None else subject.call(x)


def call_at(model: nn.Module, parameters: Sequence[nn.Parameter], values: Sequence[Tensor], x: Tensor) -> Any:
    """The model's output with other tensors in the place of its parameters, for transforms of ``torch.func``."""
    subject = subject_of(model)
    if subject is None:
        raise RuntimeError("call_at is for models within a look")
    with subject.standing_in(parameters, values):
        return model(x.clone())


def _converted(x: Tensor, dtype: torch.dtype, only_narrow: bool) -> Tensor:
    if not (x.is_floating_point() or x.is_complex()) or (only_narrow and x.element_size() != 2):
        return x
    kind = dtype if x.is_floating_point() else dtype.to_complex()
    if x.dtype == kind:
        return x
    other = x.detach().to(kind)
    if isinstance(x, nn.Parameter):
        other = nn.Parameter(other, x.requires_grad)
    else:
        other.requires_grad_(x.requires_grad and x.is_leaf)
    _of_the_kind_of(x, other)
    if x._backward_hooks:
        for hook in x._backward_hooks.values():
            other.register_hook(hook)
    return other


def _of_the_kind_of(x: Tensor, other: Tensor) -> Tensor:
    """The other tensor, with the class of ``x`` and the very attributes that the user has set on it."""
    if type(other) is not type(x):
        other.__class__ = type(x)
    _share_attributes(x, other)
    return other


def _share_attributes(x: Any, other: Any) -> None:
    """Let the very attributes that the user has set on one tensor be another's."""
    other.__dict__ = x.__dict__


def _share_memory(arrays: Sequence[np.ndarray], weights: Iterable[Tensor]) -> bool:
    """Whether any of these arrays begins within the memory of a trainable weight."""
    trained = [p for p in weights if p.requires_grad and p.device.type == "cpu" and p.layout is torch.strided]
    ends = sorted((p.untyped_storage().data_ptr(), p.untyped_storage().nbytes()) for p in trained)
    for array in arrays:
        begins = array.__array_interface__["data"][0]
        place = bisect.bisect(ends, begins, key=lambda end: end[0]) - 1
        if place >= 0 and begins < sum(ends[place]):
            return True
    return False


def _put_back_requirements(flags: list[tuple[Tensor, bool]]) -> None:
    for t, flag in flags:
        if t.requires_grad != flag and t.is_leaf:
            t.requires_grad_(flag)


def _put_back_flags(flags: Sequence[tuple[nn.Module, bool]]) -> None:
    for module, flag in flags:
        module.training = flag


def _put_back_grads(leaves: list[Tensor], grads: list[tuple[Tensor, Tensor]]) -> None:
    for t in leaves:
        if t.grad is not None:
            t.grad = None
    for t, grad in grads:
        t.grad = grad


def _put_back_hooks(hooks: list[tuple[Tensor, dict[int, Any]]]) -> None:
    for t, first in hooks:
        now = t._backward_hooks
        if now is not None and list(now) != list(first):
            now.clear()
            now.update(first)
