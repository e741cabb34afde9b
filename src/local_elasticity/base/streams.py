"""The global random streams: read without touching them, and told whether this thread's own work drew from them."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from local_elasticity.base.errors import InputError


def random_state() -> dict[str, Any]:
    """The random streams of torch (CPU and CUDA), NumPy and Python."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    return {"torch": torch.get_rng_state(), "cuda": cuda, "numpy": np.random.get_state(), "python": random.getstate()}  # noqa: NPY002 (the global stream itself)


def set_random_state(state: dict[str, Any], names: Iterable[str] = ("torch", "cuda", "numpy", "python")) -> None:
    """Put the random streams back to where ``random_state`` found them, those of these names alone."""
    names = set(names)
    if "torch" in names:
        torch.set_rng_state(state["torch"])
    if "cuda" in names and state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    if "numpy" in names:
        np.random.set_state(state["numpy"])  # noqa: NPY002
    if "python" in names:
        random.setstate(state["python"])


def moved_streams(state: dict[str, Any]) -> set[str]:
    """The names of the streams that are elsewhere now."""
    names = set()
    if not torch.equal(torch.get_rng_state(), state["torch"]):
        names.add("torch")
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        now = torch.cuda.get_rng_state_all()
        if len(now) != len(state["cuda"]) or not all(map(torch.equal, now, state["cuda"])):
            names.add("cuda")
    _, keys, *rest = np.random.get_state()  # noqa: NPY002
    if rest != list(state["numpy"][2:]) or not np.array_equal(keys, state["numpy"][1]):
        names.add("numpy")
    if random.getstate() != state["python"]:
        names.add("python")
    return names


@contextmanager
def kept_streams() -> Iterator[None]:
    """Put back what a function of the user's draws from the global streams; draws of other threads stay."""
    before = random_state()
    watched = Draws() if threading.active_count() > 1 else None
    try:
        with watched or nullcontext():
            yield
    finally:
        names = moved_streams(before)
        set_random_state(before, names if watched is None else names & own_streams(watched))


def own_streams(watched: Draws) -> set[str]:
    """The names of the streams that watched work may have moved: NumPy's cannot be seen, and is the main thread's."""
    seen = {"torch", "cuda"} if watched.were_seen else set()
    return seen | ({"python"} if watched.in_python else set()) | ({"numpy"} if in_main_thread() else set())


def in_main_thread() -> bool:
    """Whether this is the thread that the process began with."""
    return threading.current_thread() is threading.main_thread()


class Draws(TorchDispatchMode):
    """Notices operations of this thread that draw from the global streams of torch, and of Python.

    Args:
        refuse: raise before the first of them, instead of noting it.

    Attributes:
        were_seen: whether any drew from torch's.
        in_python: whether any drew from Python's.
    """

    def __init__(self, refuse: bool = False) -> None:
        super().__init__()
        self.refuse, self.were_seen, self.in_python = refuse, False, False

    def __enter__(self) -> Draws:
        self._profiler = sys.getprofile()
        sys.setprofile(self._on_call)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        sys.setprofile(self._profiler)

    def _on_call(self, frame: Any, event: str, argument: Any) -> None:
        """Notices calls of Python's own stream by this thread; those of NumPy's cannot be seen."""
        if event == "c_call" and getattr(argument, "__self__", None) is cast(Any, random)._inst:
            self.in_python = True
            if self.refuse:
                raise DrawsInThreadError

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and look at what it is."""
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags and _draws(func, args, kwargs):
            if self.refuse:
                raise DrawsInThreadError
            self.were_seen = True
        return func(*args, **kwargs)


class DrawsInThreadError(InputError):
    """A forward pass or a loss draws from the global streams, in a thread that is not the main one."""

    def __init__(self) -> None:
        super().__init__(
            expected="a model and a loss that draw no random numbers, in a thread that is not the main one",
            got="a draw from a global stream, which belongs to all threads",
            do="measure in the main thread, use mode='eval', or give the module a torch.Generator of its own",
        )


def _draws(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a seeded operation draws with these arguments: dropout of probability 0, or out of training, does not."""
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    if given.get("generator") is not None:
        return False
    if given.get("train", True) is False or given.get("training", True) is False:
        return False
    return all(given.get(name, 1.0) != 0.0 for name in ("dropout_p", "dropout"))
