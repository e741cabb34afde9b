"""What a look puts back, what routes follow from, and what it may cost: counted, never timed."""

import functools
import gc
import types

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import local_elasticity as le
from local_elasticity.base.reach import MOST_ITEMS, Reach
from local_elasticity.impact import shadows
from local_elasticity.impact.subject import Subject
from local_elasticity.training.lockstep.chain import find_chain


def mlp(d=8, width=16, k=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(d, width), nn.Tanh(), nn.Linear(width, k)).double()


def data(n=12, d=8, k=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, d, generator=generator, dtype=torch.float64), torch.arange(n) % k


# --- stand-ins -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("write", ["add_", "data", "view", "norm"])
def test_every_write_is_noticed_and_undone(write, lazy, monkeypatch):
    if not lazy:
        monkeypatch.setattr(shadows, "_lazy_clone", None)
    weight, other = nn.Parameter(torch.randn(4, 3)), torch.randn(2)
    before, address, version = weight.detach().clone(), weight.data_ptr(), weight._version
    stand_ins = shadows.Shadows([weight, other])
    assert stand_ins.rewind() == []
    with torch.no_grad():
        if write == "add_":
            weight.add_(1.0)
        elif write == "data":
            weight.data.mul_(2.0)
        elif write == "view":
            weight[1].zero_()
        else:
            torch.embedding_renorm_(weight, torch.tensor([0, 1]), 1e-3, 2.0)
    assert stand_ins.written([weight])
    assert [id(t) for t in stand_ins.rewind()] == [id(weight)]
    assert torch.equal(weight, before)
    stand_ins.lift()
    assert (weight.data_ptr(), weight._version) == (address, version)
    assert torch.equal(weight, before)


def test_tensors_that_share_memory_go_on_sharing_it():
    whole = torch.arange(6.0)
    part = whole[2:4]
    stand_ins = shadows.Shadows([whole, part])
    part.zero_()
    assert whole[2:4].tolist() == [0.0, 0.0]
    assert len(stand_ins.rewind()) == 2
    assert whole.tolist() == [0, 1, 2, 3, 4, 5]
    assert stand_ins.aliases({id(whole), id(part)}) == {id(whole), id(part)}
    stand_ins.lift()
    assert part.data_ptr() == whole[2:].data_ptr()


def test_nothing_is_copied_unless_it_is_written():
    model = mlp()
    with Subject(model) as subject:
        subject.call(data()[0]).sum().backward()
        assert all(torch._C._is_cow_tensor(p) for p in model.parameters())


def test_weights_seen_through_a_view_of_them():
    """What is looked at after the step sees it through the view too, as after a step in place."""

    class Viewed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 8, dtype=torch.float64))
            self.seen = self.weight.detach().view(-1)

        def forward(self, x):
            return F.linear(x, self.weight) * self.seen.mean()

    torch.manual_seed(0)
    model, (x, y) = Viewed(), data()
    got = le.measure(model, F.cross_entropy, (x, y), update=le.SGD(lr=0.1), engine="replay")
    loss = F.cross_entropy(model(x[:1]), y[:1])
    stepped = (model.weight - 0.1 * torch.autograd.grad(loss, model.weight)[0]).detach()
    want = F.linear(x, stepped) * stepped.mean() - model(x).detach()
    torch.testing.assert_close(got.change[0], want)
    assert got.plan.route == "step"
    with pytest.raises(le.InputError, match="memory another tensor shares"):
        le.measure(model, F.cross_entropy, (x, y), update=le.SGD(lr=0.1), engine="linear")


# --- what is reached -----------------------------------------------------------------------------------------------


def test_state_of_every_kind_is_put_back():
    class Counting(nn.Linear):
        calls = 0
        __slots__ = ("secret",)

        def forward(self, x):
            Counting.calls += 1
            self.secret = self.log[-1]
            self.log.append(len(self.log))
            self.record.total += 1
            self.table["last"] = x.sum()
            return super().forward(x) * (1 + 0.01 * Counting.calls)

    model = Counting(8, 3).double()
    model.log, model.record, model.table = [0], types.SimpleNamespace(total=0), {}
    counted = 0

    def loss_fn(outputs, labels, seen=[]):  # noqa: B006 (a default that keeps state, on purpose)
        nonlocal counted
        counted += 1
        seen.append(counted)
        return F.cross_entropy(outputs, labels) * (1 + counted)

    x, y = data()
    first = le.measure(model, loss_fn, (x, y), update=le.SGD(lr=0.1), engine="replay")
    again = le.measure(model, loss_fn, (x, y), update=le.SGD(lr=0.1), engine="replay")
    assert torch.equal(first.after, again.after)
    assert (Counting.calls, model.log, model.record.total, model.table, counted) == (0, [0], 0, {}, 0)
    assert loss_fn.__defaults__ == ([],)


def test_large_containers_are_not_entered_and_said():
    x, y = data()
    history = [torch.zeros(1) for _ in range(MOST_ITEMS + 1)]

    def loss_fn(outputs, labels):
        history.append(outputs.detach())
        return F.cross_entropy(outputs, labels)

    impact = le.measure(mlp(), loss_fn, (x, y), update=le.SGD(lr=0.1), engine="replay")
    assert len(history) == MOST_ITEMS + 1
    assert any("too large to be watched" in note for note in impact.plan.notes)


def test_running_iterators_are_refused_before_the_work():
    x, y = data()
    noise = iter([0.1] * 1000)
    with pytest.raises(le.InputError, match="iterator"):
        le.measure(mlp(), lambda o, t: F.cross_entropy(o, t) * (1 + next(noise)), (x, y), update=le.SGD(lr=0.1))
    assert len(list(noise)) == 1000


def test_a_walk_stops_at_libraries():
    optimizer = torch.optim.SGD(mlp().parameters(), lr=0.1)
    assert len(Reach(lambda: (optimizer, torch, F, data)).places) < 20
    assert not Reach(F.cross_entropy).places


def test_looks_keep_nothing_alive():
    gc.collect()
    model, (x, y) = mlp(), data()
    le.measure(model, F.cross_entropy, (x, y), update=le.SGD(lr=0.1))
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(5):
        le.measure(model, F.cross_entropy, (x, y), update=le.SGD(lr=0.1))
    gc.collect()
    assert len(gc.get_objects()) - before < 50


def test_hooks_of_a_look_may_write_to_lists_made_before_it():
    assert [name for name, _ in find_chain(mlp(), data()[0])] == ["0", "1", "2"]


# --- dtype -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held", ["list", "tuple", "partial", "module", "default"])
def test_a_loss_sees_the_converted_weights_however_it_holds_them(held):
    torch.manual_seed(0)
    model = nn.Linear(8, 3)
    x, y = data()
    weights = list(model.parameters())

    def penalised(o, t, held_weights):
        return F.cross_entropy(o, t) + sum(p.pow(2).sum() for p in held_weights)

    class Holding(nn.Module):
        def __init__(self):
            super().__init__()
            self.held = [model]

        def forward(self, o, t):
            return penalised(o, t, self.held[0].parameters())

    pair = tuple(weights)
    loss_fn = {
        "list": lambda o, t: penalised(o, t, weights),
        "tuple": lambda o, t: penalised(o, t, pair),
        "partial": functools.partial(penalised, held_weights=weights),
        "module": Holding(),
        "default": lambda o, t, ws=pair: penalised(o, t, ws),
    }[held]
    want = le.measure(
        model.double(), lambda o, t: penalised(o, t, model.parameters()), (x, y), update=le.SGD(lr=1e-3), route="step"
    ).change
    model.float()
    for setting in ({"engine": "replay"}, {"engine": "linear"}, {"route": "step"}):
        got = le.measure(model, loss_fn, (x.float(), y), update=le.SGD(lr=1e-3), dtype=torch.float64, **setting)
        torch.testing.assert_close(got.change, want, rtol=2e-3, atol=1e-7)
    assert model.weight.dtype == torch.float32
    assert weights[0] is model.weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_networks_of_16_bits(dtype, tmp_path):
    torch.manual_seed(0)
    model = nn.Linear(8, 3).to(dtype)
    x, y = data()
    x = x.to(dtype)
    wide = le.measure(model, F.cross_entropy, (x, y), update=le.SGD(lr=0.5))
    assert wide.change.dtype == torch.float32
    assert any("float32 copies" in note for note in wide.plan.notes)
    narrow = le.measure(model, F.cross_entropy, (x, y), update=le.SGD(lr=0.5), dtype="as_is", route="step")
    assert narrow.change.dtype == torch.float32
    assert float(narrow.noise_floor.min()) > float(wide.noise_floor.max())
    with torch.no_grad():
        copy = nn.Linear(8, 3).to(dtype)
        copy.load_state_dict(model.state_dict())
    F.cross_entropy(copy(x[:1]), y[:1]).backward()
    torch.optim.SGD(copy.parameters(), lr=0.5).step()
    assert torch.equal(narrow.after[0], copy(x).detach().float())
    with pytest.raises(le.InputError, match="16 bits"):
        le.measure(model, F.cross_entropy, (x, y), update=le.SGD(lr=0.5), dtype="as_is", engine="linear")
    tracker = le.Tracker(model, F.cross_entropy, (x, y), update=le.SGD(lr=0.5), schedule=le.every(1))
    tracker.step()
    assert bool(torch.isfinite(torch.as_tensor(tracker.finish().s_rel("kl").values)).all())
    tiles = le.measure_tiles(model, F.cross_entropy, (x, y), update=le.SGD(lr=0.5), out=tmp_path / "t.zarr", tile=8)
    assert tiles.change.shape == (12, 12, 3)
    ensemble = le.train_ensemble(
        lambda: nn.Linear(8, 3).to(dtype), (x, y), F.cross_entropy, lr=0.1, steps=3, replicas=2, probes=(x[:6], y[:6])
    )
    assert len(ensemble.replicas) == 2


# --- routes by counting ----------------------------------------------------------------------------------------------


def route_of(model, n, k=3, m=None, d=8, **settings):
    x, y = data(max(n, m or n), d, k)
    impact = le.measure(
        model, F.cross_entropy, (x[:n], y[:n]), x[: m or n], update=le.SGD(lr=1e-4), check_pairs=8, **settings
    )
    return impact.plan.engine, impact.plan.route, impact.plan.chunk_size


ROUTES = [
    ("few sources", mlp(), 6, {"engine": "replay"}, ("replay", "step", 1)),
    ("small network", mlp(), 12, {"engine": "replay"}, ("replay", "vmap", 12)),
    ("many sources", mlp(), 40, {"engine": "replay"}, ("replay", "vmap", 32)),
    ("large network", mlp(width=3000), 32, {"engine": "replay"}, ("replay", "step", 1)),
    ("one source, three outputs", mlp(), 1, {"engine": "linear"}, ("linear", "jvp", 1)),
    ("two sources, three outputs", mlp(), 2, {"engine": "linear"}, ("linear", "contract", 2)),
    ("16 sources", mlp(), 16, {}, ("linear", "contract", 16)),
    ("15 sources", mlp(), 15, {}, ("replay", "vmap", 15)),
    ("many outputs", mlp(k=200), 16, {}, ("replay", "vmap", 16)),
]


@pytest.mark.parametrize(("model", "n", "settings", "expected"), [r[1:] for r in ROUTES], ids=[r[0] for r in ROUTES])
def test_routes_follow_from_counts(model, n, settings, expected):
    assert route_of(model, n, **settings) == expected


def test_convolutions_go_one_by_one():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Unflatten(1, (1, 2, 4)), nn.Conv2d(1, 2, 1), nn.Flatten(), nn.Linear(16, 3)).double()
    assert route_of(model, 12, engine="replay") == ("replay", "step", 1)


@pytest.mark.parametrize("n", [8, 40])
def test_the_check_of_a_call_costs_a_few_sources(n):
    """Passes through the network that are no source's own: at most those of six sources, however many there are."""
    PASSES[0] = 0

    class Counted(nn.Linear):
        def forward(self, x):
            PASSES[0] += 1
            return super().forward(x)

    model, (x, y) = Counted(8, 3).double(), data(n)
    le.measure(model, F.cross_entropy, (x, y), update=le.SGD(lr=0.1), route="step", check_pairs=0)
    assert 2 * n <= PASSES[0] <= 2 * n + 12


PASSES = np.zeros(2**24, dtype=np.int64)  # too large to be watched, so it counts what a look does
