"""What loops do around the step, and what trackers are given: as a real step of ``torch.optim`` does, or refused."""

import random
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import local_elasticity as le
from local_elasticity.base.errors import InputError, NoiseWarning
from local_elasticity.cli import main
from local_elasticity.impact.update import parse_updates
from local_elasticity.similarity.definitions import DEFINITIONS
from local_elasticity.training.schedule import Moment, Schedule

pytestmark = pytest.mark.filterwarnings("ignore")


def network() -> nn.Sequential:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def samples() -> tuple[Tensor, Tensor]:
    x = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return x, torch.arange(8) % 3


# -- step hooks --------------------------------------------------------------------------------------------------------


class Wrapping(torch.optim.Optimizer):
    """Steps by another optimiser."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner = inner

    def step(self, closure: Any = None) -> None:
        self.inner.step()


def renormalise(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for p in optimizer.param_groups[0]["params"]:
        p.data /= p.data.norm()


HOOKS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "before": lambda optimizer: optimizer.register_step_pre_hook(renormalise),
    "after": lambda optimizer: optimizer.register_step_post_hook(renormalise),
    "before all": lambda _: register_optimizer_step_pre_hook(renormalise),
    "after all": lambda _: register_optimizer_step_post_hook(renormalise),
}


@pytest.mark.parametrize("wraps", [False, True])
@pytest.mark.parametrize("when", HOOKS)
def test_step_hooks_are_refused_by_name(when: str, wraps: bool) -> None:
    model = network()
    optimizer = inner = torch.optim.Adam(model.parameters())
    if wraps:
        optimizer = Wrapping(inner)
    update = le.from_optimizer(optimizer)
    handle = HOOKS[when](inner)
    try:
        with pytest.raises(InputError, match="hook renormalise"):
            le.from_optimizer(optimizer)
        with pytest.raises(InputError, match="hook renormalise"):
            le.measure(model, F.cross_entropy, samples(), update=update)
    finally:
        handle.remove()
    le.measure(model, F.cross_entropy, samples(), update=update)


# -- what a tracker is given -------------------------------------------------------------------------------------------


def tracker(**options: Any) -> le.Tracker:
    model = options.pop("model", None) or network()
    loss = options.pop("loss", nn.CrossEntropyLoss())
    x, y = samples()
    return le.Tracker(model, loss, (x[:3], y[:3]), **{"update": le.SGD(lr=0.1), **options})


def one_logit() -> nn.Module:
    return nn.Sequential(network(), nn.Linear(3, 1), nn.Flatten(0)).double()


@pytest.mark.parametrize(
    ("definition", "options", "words"),
    [
        ("kl", {"outputs": "values"}, "logits or probabilities"),
        ("l2", {"outputs": "probabilities"}, "that sum to 1"),
        ("kl", {"loss": lambda o, t: F.binary_cross_entropy_with_logits(o, F.one_hot(t, 3).double())}, "distribution"),
        ("l1", {"model": one_logit(), "loss": lambda o, t: F.mse_loss(o, t.double())}, "distribution"),
        ("of a fourth class", {}, "can be evaluated"),
    ],
)
def test_definitions_that_do_not_fit_are_refused_before_training(
    definition: str, options: dict[str, Any], words: str, definitions: None
) -> None:
    le.define("of a fourth class", on="change")(lambda change: change[..., 3].abs())
    with pytest.raises(InputError, match=words):
        tracker(definitions=("he_su", definition), **options)


@pytest.fixture
def definitions() -> Iterator[None]:
    """Definitions of a test's own are gone afterwards."""
    known = dict(DEFINITIONS)
    yield
    DEFINITIONS.clear()
    DEFINITIONS.update(known)


def test_a_definition_may_write_to_what_it_is_given(definitions: None) -> None:
    @le.define("in place", on="outputs")
    def moved(before: Tensor, after: Tensor) -> Tensor:
        return after.sub_(before).abs_().sum(-1)

    impact = le.measure(network(), F.cross_entropy, samples(), update=le.SGD(lr=0.1))
    after = impact.after.clone()
    first = le.s_rel(impact, "in place")
    assert torch.equal(impact.after, after)
    torch.testing.assert_close(le.s_rel(impact, "in place"), first)


def train(track: Callable[[nn.Module], le.Tracker] | None, epochs: int = 4, **scalars: Any) -> list[Tensor]:
    """Batches are drawn from torch's global stream."""
    torch.manual_seed(3)
    (x, y), model = samples(), network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracked = track(model) if track else None
    for _ in range(epochs):
        batch = torch.randperm(len(x))[:4]
        loss = F.cross_entropy(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if tracked:
            tracked.step(**scalars)
    return [p.detach() for p in model.parameters()]


def draw(*_: Any) -> float:
    """As iterating over a shuffled loader does."""
    random.random()
    np.random.rand()  # noqa: NPY002
    return float(torch.rand(()))


class AtRandom(Schedule):
    def due(self, moment: Moment) -> bool:
        return draw() < 2


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside another thread"])
def test_functions_that_a_tracker_calls_leave_the_random_streams(beside: bool, definitions: None) -> None:
    le.define("drawn", on="change")(lambda change: change.norm(dim=-1) + draw())
    options = {"definitions": ("drawn",), "schedule": AtRandom(), "before_commit": draw}
    alone = train(None)
    release = threading.Event()
    thread = threading.Thread(target=release.wait, daemon=True)
    if beside:
        thread.start()
    try:
        together = train(lambda model: tracker(model=model, **options), accuracy=draw)
    finally:
        release.set()
    assert all(map(torch.equal, alone, together))


@pytest.mark.parametrize("name", ["train/loss", "", "..", ".hidden", "zarr.json", "x" * 300])
def test_numbers_whose_names_no_array_can_have_are_refused_at_the_first_step(name: str) -> None:
    with pytest.raises(InputError, match="rename this number"):
        tracker(schedule=le.every(100)).step(**{name: 1.0})


def test_a_run_of_several_labels_a_sample_refuses_later_what_it_refuses_at_once(tmp_path: Path) -> None:
    def loss(o: Tensor, t: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(o, F.one_hot(t, 3).double())

    for options in ({}, {"store": tmp_path / "run.zarr"}):
        tracked = tracker(loss=loss, definitions=("he_su",), **options)
        tracked.snapshot()
        with pytest.raises(InputError, match="one distribution"):
            tracked.finish().s_rel("kl")


def test_a_run_without_snapshots_says_so() -> None:
    tracked = tracker(schedule=le.at([]))
    tracked.step()
    with pytest.raises(InputError, match="look more often"):
        tracked.finish().s_rel("kl")


# -- labels that one term of a loss ignores ----------------------------------------------------------------------------


def squares(model: nn.Module) -> Tensor:
    return torch.stack([p.pow(2).sum() for p in model.parameters()]).sum()


TERMS: dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]] = {
    "weights": lambda model, o, t: F.cross_entropy(o, t, reduction="sum") + squares(model),
    "outputs": lambda model, o, t: F.cross_entropy(o, t).nan_to_num(0) + o.pow(2).sum(),
    "other labels": lambda model, o, t: F.cross_entropy(o, t, reduction="sum") + F.cross_entropy(o, t.clamp_min(0)),
    "these samples alone": lambda model, o, t: F.cross_entropy(o, t, reduction="sum") + (t < 0).sum() * o.pow(2).sum(),
    "none": lambda model, o, t: F.cross_entropy(o, t),
}


@pytest.mark.parametrize("engine", ["replay", "linear"])
@pytest.mark.parametrize("term", TERMS)
def test_a_label_that_one_term_ignores_moves_what_the_others_say(term: str, engine: Any) -> None:
    rate = 1e-6 if engine == "linear" else 0.05
    (x, y), real = samples(), []
    y[[1, 4, 5]] = -100
    for source in range(len(x)):
        model = network()
        before = model(x).detach()
        TERMS[term](model, model(x[source : source + 1]), y[source : source + 1]).backward()
        torch.optim.SGD(model.parameters(), lr=rate).step()
        real.append(model(x).detach() - before)
    model = network()
    loss = partial(TERMS[term], model)
    change = le.measure(model, loss, (x, y), update=le.SGD(lr=rate), engine=engine).change
    close = {"rtol": 1e-3, "atol": 1e-10} if engine == "linear" else {"rtol": 1e-6, "atol": 1e-12}
    torch.testing.assert_close(change, torch.stack(real), **close)


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "texts", [["sgd:0.1", "sgd:0.10"], ["x=sgd:0.1", "adam:0.1", "x=adam:0.1"], ["sgd:0.12345671", "sgd:0.12345672"]]
)
def test_updates_of_one_name_are_refused(texts: list[str]) -> None:
    with pytest.raises(InputError, match="twice"):
        parse_updates(texts)
    assert list(parse_updates([f"{i}={text.rpartition('=')[2]}" for i, text in enumerate(texts)])) == [
        str(i) for i in range(len(texts))
    ]


@pytest.mark.parametrize(("how", "words"), [("half()", "as the images are"), ("to('meta')", "weights with data")])
def test_networks_that_the_command_cannot_train_are_refused(
    how: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    (tmp_path / "nets.py").write_text(
        f"from torch import nn\ndef net(n):\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, n)).{how}\n"
    )
    network = f"{tmp_path / 'nets.py'}:net"
    with pytest.raises(SystemExit) as ended:
        main(["track", "--classes", "0", "1", "--network", network, "--out", str(tmp_path / "run")])
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# -- what copies of an optimiser share with it -------------------------------------------------------------------------


class Counting(torch.optim.SGD):
    """The n-th step is n times as large; who counts is up to the subclass."""

    def count(self) -> int:
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        count = self.count()
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                p.sub_(p.grad, alpha=self.param_groups[0]["lr"] * count)


class ByClass(Counting):
    steps = 0

    def count(self) -> int:
        type(self).steps += 1
        return self.steps


class ByList(Counting):
    steps: ClassVar[list[int]] = []

    def count(self) -> int:
        self.steps.append(1)
        return len(self.steps)


GLOBAL_STEPS = 0


class ByGlobal(Counting):
    def count(self) -> int:
        global GLOBAL_STEPS
        GLOBAL_STEPS += 1
        return GLOBAL_STEPS


class ByClosure(Counting):
    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr)
        steps = 0

        def count() -> int:
            nonlocal steps
            steps += 1
            return steps

        self.count = count


class ByIdentity(Counting):
    """Keeps by the id of a parameter what it subtracts."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr)
        self.kept = {id(p): torch.ones_like(p) for p in self.param_groups[0]["params"]}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            self.state[id(p)]["step"] = self.state[id(p)].get("step", 0) + 1
            p.sub_(p.grad + self.kept.get(id(p), 0), alpha=self.param_groups[0]["lr"] * self.state[id(p)]["step"])


@pytest.mark.parametrize("kind", [ByClass, ByList, ByGlobal, ByClosure, ByIdentity])
def test_what_copies_of_an_optimizer_share_is_put_back(kind: type[Counting]) -> None:
    (x, y), model = samples(), network()
    optimizer = kind(model.parameters(), lr=0.05)
    change = le.measure(model, F.cross_entropy, (x, y), update=le.from_optimizer(optimizer), engine="replay").change
    F.cross_entropy(model(x[-1:]), y[-1:]).backward()
    optimizer.step()
    torch.testing.assert_close(change[-1], model(x).detach() - network()(x).detach(), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("drawn", [random.random, np.random.rand])
def test_a_step_that_draws_from_a_global_stream_is_refused(drawn: Callable[[], float]) -> None:
    class Drawing(Counting):
        def count(self) -> int:
            return int(drawn()) + 1

    (x, y), model = samples(), network()
    before = random.getstate(), np.random.get_state()[2]  # noqa: NPY002
    with pytest.raises(InputError, match="an optimiser whose step draws no random numbers"):
        le.measure(model, F.cross_entropy, (x, y), update=le.from_optimizer(Drawing(model.parameters(), lr=0.1)))
    assert before == (random.getstate(), np.random.get_state()[2])  # noqa: NPY002


# -- a run that is continued with other settings -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "train"}, "the mode"),
        ({"exclude_self": True}, "the self_pairs"),
        ({"limits": ("sgd:0.1",)}, "the limits"),
        ({"class_names": ["cat", "dog", "eel"]}, "the class_names"),
        ({"keep": "tables"}, "the keep"),
        ({"model": nn.Sequential(network(), nn.Linear(3, 4)).double()}, "the number of outputs"),
    ],
)
def test_a_run_is_not_continued_with_settings_that_change_its_numbers(
    options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with tracker(store=tmp_path / "run.zarr") as first:
        first.step()
    with pytest.raises(InputError, match=words):
        tracker(store=tmp_path / "run.zarr", resume=True, **options)
    assert le.open_run(tmp_path / "run.zarr").dataset.sizes["step"] == 1


@pytest.mark.parametrize("keep", ["pairs", "tables"])
def test_a_continued_run_keeps_what_it_kept(keep: Any, tmp_path: Path) -> None:
    for options in ({"keep": keep}, {"resume": True}):
        with tracker(store=tmp_path / "run.zarr", schedule=le.every(1), **options) as tracked:
            tracked.step()
    dataset = le.open_run(tmp_path / "run.zarr").dataset
    assert ("pairs" in dataset, "after" in dataset) == (keep == "pairs", False)
    assert dataset.sizes["step"] == 2


# -- optimisers whose real step fails, and wrappers --------------------------------------------------------------------


class Delegating(torch.optim.Optimizer):
    """Has nothing of its own, as the optimisers of training libraries: not even what the base class sets up."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    param_groups = property(lambda self: self.optimizer.param_groups)
    state = property(lambda self: self.optimizer.state)
    defaults = property(lambda self: self.optimizer.defaults)

    def step(self, closure: Any = None) -> None:
        self.optimizer.step(closure)


def test_a_wrapper_without_the_attributes_of_the_base_class() -> None:
    (x, y), model = samples(), network()
    optimizer = Delegating(torch.optim.AdamW(model.parameters(), lr=0.01))
    change = le.measure(model, F.cross_entropy, (x, y), update=le.from_optimizer(optimizer), engine="replay").change
    F.cross_entropy(model(x[-1:]), y[-1:]).backward()
    optimizer.step()
    torch.testing.assert_close(change[-1], model(x).detach() - network()(x).detach(), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("damage", ["setting", "shape", "dtype"])
def test_an_optimizer_that_cannot_step_is_refused(damage: str) -> None:
    (x, y), model = samples(), network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    state = optimizer.state[model[0].weight]
    if damage == "setting":
        del optimizer.param_groups[0]["betas"]
    else:
        state["exp_avg"] = state["exp_avg"][:2] if damage == "shape" else state["exp_avg"].float()
    with pytest.raises(InputError, match="can step on these gradients"):
        le.measure(model, F.cross_entropy, (x, y), update=le.from_optimizer(optimizer))


def test_a_tracker_warns_of_noise_with_what_a_tracker_takes() -> None:
    tracked = tracker(update=le.SGD(lr=2e-15))
    with pytest.warns(NoiseWarning, match="limits= of a Tracker"):
        tracked.snapshot()
