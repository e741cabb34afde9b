"""The arithmetic of a measurement on CUDA: float32 in float32, and the same algorithm at every call."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

backends: Any = torch.backends
cudnn: Any = torch.backends.cudnn


@contextmanager
def exact_float32(recurrent: bool = False) -> Iterator[None]:
    """No TF32 and no choice of algorithms inside; the caller's settings are back afterwards.

    TF32 keeps 10 bits of a product's factors. Convolutions use it unless told otherwise, and the movement of an output
    after one small step is lost in it. cuDNN's recurrent layers have no gradients in eval mode: ``recurrent`` leaves
    cuDNN out altogether.

    PyTorch has an older and, since 2.9, a newer set of switches, and refuses to read the older ones where the two
    disagree. Those that the caller used are used here, so that code of the model may still read them. One trace is left
    where the caller used none: convolutions are then set to what was their default, and a newer root switch that is set
    only afterwards does not reach them.
    """
    with ExitStack() as stack:
        stack.enter_context(_set(cudnn, "deterministic", True))
        stack.enter_context(_set(cudnn, "benchmark", False))
        if recurrent:
            stack.enter_context(_set(cudnn, "enabled", False))
        stack.enter_context(_exact_convolutions())
        stack.enter_context(_exact_products())
        yield


def has_new_switches() -> bool:
    """Whether this PyTorch has ``fp32_precision``."""
    return hasattr(backends, "fp32_precision") and hasattr(cudnn, "fp32_precision")


@contextmanager
def _set(part: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(part, name)
    if before == value:
        yield
        return
    with _quiet():
        setattr(part, name, value)
    try:
        yield
    finally:
        with _quiet():
            setattr(part, name, before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the advice to use the newer switches."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _read(part: Any, name: str) -> Any:
    """A setting; None for one of the older kind that the caller has contradicted by one of the newer."""
    try:
        with _quiet():
            value = getattr(part, name)
            return value() if callable(value) else value
    except RuntimeError:
        return None


@contextmanager
def _exact_convolutions() -> Iterator[None]:
    older = _read(cudnn, "allow_tf32")
    roots_set = has_new_switches() and (backends.fp32_precision, cudnn.fp32_precision) != ("none", "none")
    if not has_new_switches() or (older is not None and not roots_set):
        with _set(cudnn, "allow_tf32", False):
            yield
        return
    with ExitStack() as stack:
        with _set(backends, "fp32_precision", "none"):  # without it a switch that is not set reads as the root says
            stack.enter_context(_set(cudnn, "fp32_precision", "ieee"))
            if cudnn.conv.fp32_precision != "ieee":  # it has a value of its own
                stack.enter_context(_set(cudnn.conv, "fp32_precision", "ieee"))
        yield


@contextmanager
def _exact_products() -> Iterator[None]:
    matmul = backends.cuda.matmul
    older = _read(torch, "get_float32_matmul_precision")
    if has_new_switches():
        value = matmul.fp32_precision
        if value in ("ieee", "none"):
            yield
            return
        if older in (None, "highest"):  # the caller used the newer one
            with _set(matmul, "fp32_precision", "ieee"):
                yield
            return
        cpu = backends.mkldnn.matmul  # which the older switch sets too
        with _set_later(cpu, "fp32_precision"), _set_later(matmul, "fp32_precision"), _precision(older, "highest"):
            yield
        return
    with _precision(older, "highest"):
        yield


@contextmanager
def _set_later(part: Any, name: str) -> Iterator[None]:
    """Give a setting back its value, whatever happens to it inside."""
    before = getattr(part, name)
    try:
        yield
    finally:
        if getattr(part, name) != before:
            setattr(part, name, before)


@contextmanager
def _precision(before: str, inside: str) -> Iterator[None]:
    with _quiet():
        torch.set_float32_matmul_precision(inside)
    try:
        yield
    finally:
        with _quiet():
            torch.set_float32_matmul_precision(before)
