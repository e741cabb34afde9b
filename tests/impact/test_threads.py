"""Looks from any thread: the streams, the weights and the numbers of the others stay what they are."""

import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from fingerprints import bits, handles, streams
from torch import Tensor, nn
from torch.nn import functional as F

import local_elasticity as le

pytestmark = pytest.mark.filterwarnings("ignore")
WAIT = 60  # seconds after which a thread or a process hangs


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(12, 4, generator=generator, dtype=torch.float64), torch.arange(12) % 3


def network(dropout: float = 0.0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.Dropout(dropout), nn.Tanh(), nn.Linear(6, 3)).double()


def measured(model: nn.Module, **options: object) -> Tensor:
    options = {"update": le.SGD(lr=0.05), "engine": "replay"} | options
    return le.measure(model, F.cross_entropy, data(), **options).change  # type: ignore[arg-type]


def train(steps: int = 30) -> tuple[object, object]:
    """A training that draws batches, masks and scales from all three streams; what it ends with."""
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    random.seed(1)
    x, y = data()
    model = network(dropout=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        rows = torch.randint(12, (5,))
        noise = np.random.normal() + random.gauss(0, 1)  # noqa: NPY002
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows] + 0.1 * noise), y[rows]).backward()
        optimizer.step()
    return bits(model), streams()


@contextmanager
def in_background(work: Callable[[], object]) -> Iterator[list[BaseException]]:
    """Do ``work`` over and over in a thread; at least once before the body begins. Hands out what it raised."""
    stop, begun, errors = threading.Event(), threading.Event(), []

    def loop() -> None:
        try:
            while not stop.is_set():
                work()
                begun.set()
        except BaseException as error:
            errors.append(error)
        finally:
            begun.set()

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    assert begun.wait(WAIT)
    try:
        yield errors
    finally:
        stop.set()
        thread.join(WAIT)
        assert not thread.is_alive()


@pytest.mark.parametrize("options", [{}, {"engine": "auto"}, {"engine": "linear"}], ids=["replay", "auto", "linear"])
def test_a_look_behind_leaves_the_training_in_front_alone(options: dict[str, object]) -> None:
    alone = train()
    other = network()
    with in_background(lambda: measured(other, **options)) as errors:
        together = train()
    assert errors == []
    assert together == alone


def test_a_tracker_behind_leaves_the_training_in_front_alone() -> None:
    alone = train()
    other = network()
    tracker = le.Tracker(other, F.cross_entropy, data(), update=le.SGD(lr=0.1), schedule=le.every(1))
    with in_background(tracker.step) as errors:
        together = train()
    assert errors == []
    assert together == alone


def test_looks_in_front_leave_a_training_behind_alone() -> None:
    """The training behind has a generator of its own, as several threads must."""
    x, y = data()
    stop = threading.Event()

    def train_behind(result: list[object], steps: int = 200) -> None:
        model, generator = network(), torch.Generator().manual_seed(2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(steps):
            rows = torch.randint(12, (5,), generator=generator)
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
        result.append(bits(model))
        stop.set()

    alone: list[object] = []
    together: list[object] = []
    train_behind(alone)
    stop.clear()
    thread = threading.Thread(target=train_behind, args=(together,), daemon=True)
    thread.start()
    model = network()
    want = measured(model)
    looks = [measured(model)]
    while not stop.wait(0):
        looks.append(measured(model))
    thread.join(WAIT)
    assert together == alone
    assert all(torch.equal(look, want) for look in looks)


@pytest.mark.parametrize("engine", ["replay", "linear"])
def test_two_threads_on_one_model(engine: str) -> None:
    """They take turns, or the second is refused: never other numbers, never other weights."""
    model = network()
    want, before = measured(model, engine=engine), (bits(model), handles(model))
    wrong: list[object] = []
    looks: list[int] = []

    def look_often() -> None:
        for _ in range(8):
            try:
                got = measured(model, engine=engine)
            except le.InputError:
                continue
            except BaseException as error:
                wrong.append(error)
                return
            looks.append(1)
            if not torch.equal(got, want):
                wrong.append(got)

    threads = [threading.Thread(target=look_often, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []
    assert len(looks) >= 8  # somebody always gets through
    assert (bits(model), handles(model)) == before


def test_two_threads_on_models_that_share_a_layer() -> None:
    shared = network()
    first, second = nn.Sequential(shared, nn.Tanh()), nn.Sequential(shared, nn.Softplus())
    want = {id(model): measured(model) for model in (first, second)}
    wrong: list[object] = []

    def look_often(model: nn.Module) -> None:
        for _ in range(8):
            try:
                if not torch.equal(measured(model), want[id(model)]):
                    wrong.append("other numbers")
            except le.InputError:
                continue
            except BaseException as error:
                wrong.append(error)

    threads = [threading.Thread(target=look_often, args=(model,), daemon=True) for model in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert wrong == []


@pytest.mark.parametrize("source", ["torch", "python"])
def test_a_drawing_look_behind_is_refused_or_draws_nothing(source: str) -> None:
    class Draws(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(4, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.out(x) * (1 + (torch.rand(()) if source == "torch" else random.random()))

    alone = train()
    model = Draws()

    def look() -> None:
        try:
            measured(model)
        except le.InputError:
            looks.append("refused")

    looks: list[str] = []
    with in_background(look) as errors:
        together = train()
    assert errors == []
    # What the first look draws before it is noticed belongs to no seed of the training only if nothing was drawn.
    assert together == alone


def in_child(work: Callable[[], bytes]) -> bytes:
    """What ``work`` gives in a forked process; nothing if it hangs or fails."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # OpenMP's own threads do not survive a fork; workers of a DataLoader do the same
            threading.Timer(WAIT, os._exit, (1,)).start()
            os.write(write, work())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        content = pipe.read()
    os.waitpid(child, 0)
    return content


def test_a_forked_child_measures_as_its_parent_did() -> None:
    model = network()
    want = measured(model)
    assert in_child(lambda: measured(model).numpy().tobytes()) == want.numpy().tobytes()
    assert torch.equal(measured(model), want)


def test_a_child_forked_during_a_look_of_another_thread() -> None:
    """The child has no thread that could ever end that look."""
    other, model = network(), network()
    want = measured(model)
    with in_background(lambda: measured(other)) as errors:
        contents = [in_child(lambda: measured(model).numpy().tobytes()) for _ in range(3)]
    assert errors == []
    assert contents == [want.numpy().tobytes()] * 3


@pytest.mark.parametrize("engine", ["auto", "replay", "linear"])
def test_looks_that_draw_nothing_never_set_a_stream(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: object, **options: object) -> None:
        raise AssertionError("a global stream was set")

    for module, name in ((torch, "set_rng_state"), (torch, "manual_seed"), (np.random, "set_state")):
        monkeypatch.setattr(module, name, forbidden)
    monkeypatch.setattr(np.random, "seed", forbidden)
    monkeypatch.setattr(random, "setstate", forbidden)
    monkeypatch.setattr(random, "seed", forbidden)
    before = streams()
    assert bool(measured(network_of_zeros(), engine=engine).any())
    assert streams() == before


def network_of_zeros() -> nn.Module:
    """Without a draw."""
    layer = nn.utils.skip_init(nn.Linear, 4, 3, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.zero_()
    return layer


def test_draws_of_a_look_are_put_back() -> None:
    model = network(dropout=0.5)
    before = streams()
    first = measured(model, mode="train", route="step")
    assert streams() == before
    assert torch.equal(measured(model, mode="train", route="step"), first)
