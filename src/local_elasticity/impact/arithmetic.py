"""The arithmetic of a measurement on CUDA: float32 in float32, and the same algorithm at every call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def exact_float32(recurrent: bool = False) -> Iterator[None]:
    """No TF32 and no choice of algorithms inside; the caller's settings are back afterwards.

    TF32 keeps 10 bits of a product's factors. Convolutions use it unless told otherwise, and the movement of an output
    after one small step is lost in it. cuDNN's recurrent layers have no gradients in eval mode: ``recurrent`` leaves
    cuDNN out altogether.
    """
    settings = [*_settings()] + [(torch.backends.cudnn, "enabled", False)] * recurrent
    before = [(part, name, _read(part, name)) for part, name, _ in settings]
    matmul = _read(torch, "get_float32_matmul_precision")
    try:
        if matmul is not None:
            torch.set_float32_matmul_precision("highest")
        for (part, name, value), (*_, old) in zip(settings, before, strict=True):
            if old is not None:
                setattr(part, name, value)
        yield
    finally:
        if matmul is not None:
            torch.set_float32_matmul_precision(matmul)
        for part, name, old in before:
            if old is not None:
                setattr(part, name, old)


def _settings() -> Iterator[tuple[Any, str, Any]]:
    """Where, which, and what it should be."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    yield from ((cudnn, "deterministic", True), (cudnn, "benchmark", False), (cudnn, "allow_tf32", False))
    if hasattr(matmul, "fp32_precision"):  # since torch 2.9; both kinds are set, so that they agree
        for part in (cudnn.conv, cudnn.rnn, matmul):
            yield part, "fp32_precision", "ieee"


def _read(part: Any, name: str) -> Any:
    """A setting; None for one of the older kind that the caller has contradicted by one of the newer."""
    try:
        value = getattr(part, name)
        return value() if callable(value) else value
    except RuntimeError:
        return None
