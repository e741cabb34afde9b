"""Convolutions without the taps that only ever see padding: 3 x 3 on a 1 x 1 image is 1 x 1, and its step is smaller.

Such taps multiply zeros before and after every step, so leaving them out changes no output, but by rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from local_elasticity.impact.pairs.rules import live_taps
from local_elasticity.impact.problem import Problem

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
LEAST_SAVED = 0.1  # of all weights that move; below it, there is nothing to gain


@dataclass(frozen=True)
class _Trim:
    """A convolution, the part of its weight that sees data, and the padding that goes with it."""

    module: Convolution
    index: int
    live: tuple[slice, ...]
    padding: tuple[int, ...]


@contextmanager
def trimmed(problem: Problem) -> Iterator[int]:
    """Let the problem's convolutions do without their dead taps, where that is certain to change nothing.

    It is done when the step treats every weight by itself, and the loss and gradient of the first source confirm it
    (a penalty on the weights, or a weight that is also used elsewhere, does not).

    Args:
        problem: looked at before; its model, parameters and step are trimmed inside and whole again afterwards.

    Yields:
        How many weights were left out.
    """
    trims = _find(problem)
    saved = sum(problem.parameters[t.index].numel() - problem.parameters[t.index][t.live].numel() for t in trims)
    if saved < LEAST_SAVED * sum(p.numel() for p in problem.parameters):
        yield 0
        return
    whole = problem.gradient(problem.first_source)
    parameters, step = list(problem.parameters), problem.step
    paddings = [trim.module.padding for trim in trims]
    try:
        problem.step = step.narrowed({trim.index: trim.live for trim in trims})
        for trim in trims:
            part = nn.Parameter(parameters[trim.index].detach()[trim.live].contiguous())
            trim.module._parameters["weight"] = problem.parameters[trim.index] = part
            _set_padding(trim.module, trim.padding)
        problem.subject.resave()
        problem.forget_first_gradient()
        same = _same(whole, problem.gradient(problem.first_source), trims)
        del whole
        if not same:
            _undo(problem, trims, parameters, paddings)
            problem.step, saved = step, 0
        yield saved
    finally:
        _undo(problem, trims, parameters, paddings)
        problem.step = step


def _undo(problem: Problem, trims: list[_Trim], parameters: list[nn.Parameter], paddings: list[Any]) -> None:
    problem.subject.rewind()
    problem.parameters[:] = parameters
    for trim, padding in zip(trims, paddings, strict=True):
        trim.module._parameters["weight"] = parameters[trim.index]
        _set_padding(trim.module, padding)
    problem.subject.resave()
    problem.forget_first_gradient()


def _set_padding(module: Any, padding: Any) -> None:
    module.padding = padding


def _find(problem: Problem) -> list[_Trim]:
    """Convolutions with dead taps, each called with one size of images and alone in holding its weight."""
    if (
        problem.restless is not None
        or not problem.step.elementwise
        or isinstance(problem.model, torch.jit.ScriptModule)
    ):
        return []
    slots = [(m, p) for m in problem.model.modules() for p in m._parameters.values() if p is not None]
    holders = [id(p) for _, p in slots]
    index = {id(p): i for i, p in enumerate(problem.parameters)}
    candidates = {
        module: index[id(weight)]
        for module, weight in slots
        if isinstance(module, Convolution)
        and type(module) in get_args(Convolution)
        and weight is module._parameters.get("weight")
        and id(weight) in index
        and holders.count(id(weight)) == 1
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
        and any(module.padding)
    }
    sizes = _sizes(problem, list(candidates)) if candidates else {}
    found = []
    for module, place in candidates.items():
        if len(sizes[module]) == 1:
            trim = _trim(module, place, next(iter(sizes[module])))
            found += [] if trim is None else [trim]
    return found


def _sizes(problem: Problem, modules: list[Convolution]) -> dict[Convolution, set[tuple[int, ...]]]:
    """The sizes of images that each convolution is called with, at a source and at a target."""
    seen: dict[Convolution, set[tuple[int, ...]]] = {module: set() for module in modules}

    def note(module: Any, arguments: tuple[Tensor, ...]) -> None:
        seen[module].add(tuple(arguments[0].shape[-len(module.kernel_size) :]))

    handles = [module.register_forward_pre_hook(note) for module in modules]
    try:
        problem.forward(problem.inputs[:1])
        problem.forward(problem.targets[:1])
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _trim(module: Any, index: int, size: tuple[int, ...]) -> _Trim | None:
    """What is left of a convolution on images of this size; None where all of it sees data."""
    geometry = zip(size, module.kernel_size, module.stride, module.padding, module.dilation, strict=True)
    ends = [narrowed_taps(*numbers) for numbers in geometry]
    if all(end is None for end in ends):
        return None
    whole = zip(ends, module.kernel_size, module.padding, strict=True)
    parts = [(slice(0, kernel), padding) if end is None else end for end, kernel, padding in whole]
    live = (slice(None), slice(None), *(taps for taps, _ in parts))
    return _Trim(module, index, live, tuple(padding for _, padding in parts))


def narrowed_taps(size: int, kernel: int, stride: int, padding: int, dilation: int) -> tuple[slice, int] | None:
    """The taps of one dimension that see data at some position, and the padding that keeps the output as it is.

    Returns:
        None where all taps do, or where no padding that is alike on both sides would do.
    """
    span = dilation * (kernel - 1) + 1
    positions = (size + 2 * padding - span) // stride + 1
    first, stop = live_taps(size, kernel, stride, padding, dilation, positions)
    if stop - first in (0, kernel):
        return None
    left = padding - first * dilation
    if left < 0 or (size + 2 * left - dilation * (stop - 1 - first) - 1) // stride + 1 != positions:
        return None
    return slice(first, stop), left


def _same(
    whole: tuple[Tensor, list[Tensor | None]], part: tuple[Tensor, list[Tensor | None]], trims: list[_Trim]
) -> bool:
    """Whether loss and gradients are alike, to rounding, and exactly zero at the taps that were left out."""
    places = {trim.index: trim.live for trim in trims}
    pairs = [(whole[0].reshape(1), part[0].reshape(1))]
    for index, (one, other) in enumerate(zip(whole[1], part[1], strict=True)):
        if one is None or other is None:
            if one is not other:
                return False
            continue
        if index in places:
            if int(one.count_nonzero()) != int(one[places[index]].count_nonzero()):
                return False
            one = one[places[index]]
        pairs.append((one, other))
    return all(_close(one, other) for one, other in pairs)


def _close(one: Tensor, other: Tensor) -> bool:
    scale = float(one.abs().max()) if one.numel() else 0.0
    return bool(((one - other).abs() <= 1e4 * torch.finfo(one.dtype).eps * scale).all())
