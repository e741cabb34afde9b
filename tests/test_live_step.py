"""The step that a loop takes: every class of torch.optim, with clipping and loss scaling, against the real step."""

import copy
import inspect
from collections import defaultdict
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import local_elasticity as le
from local_elasticity.base.errors import InputError
from local_elasticity.impact.update import SGD, Adam, from_optimizer, parse_update

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks", "ignore:There is a performance drop")
optim = torch.optim


class Net(nn.Module):
    """Matrices, vectors, a scalar, a layer that the loss never reaches, and a frozen one."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.unused = nn.Linear(5, 8), nn.Linear(8, 3), nn.Linear(2, 2)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return self.last(torch.tanh(self.frozen(torch.tanh(self.first(x)))) * self.scale)


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.mixing = nn.Parameter(torch.randn(5, 8, dtype=torch.complex64))
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        return self.last((x.to(self.mixing.dtype) @ self.mixing).abs())


class Words(nn.Module):
    """Rows of an embedding: their gradient is sparse, and the same row may be met twice."""

    def __init__(self, sparse=True):
        super().__init__()
        self.rows = nn.Embedding(5, 3, sparse=sparse)

    def forward(self, x):
        return self.rows((x > 0).long() + torch.arange(x.shape[1]) % 3).sum(1)


class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.last = Words(), nn.Linear(3, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.words(x)))


def make(network=Net, dtype=torch.float32):
    torch.manual_seed(0)
    model = network().to(dtype) if network is not Complex else network()
    return model, torch.randn(12, 5, dtype=dtype), torch.arange(12) % 3


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def matrices(model):
    return [p for p in model.parameters() if p.dim() == 2]


def state_of(value):
    return copy.deepcopy(value.state_dict())


def same(a, b):
    if isinstance(a, torch.Tensor):
        if a.layout != torch.strided:
            return torch.equal(a.to_dense(), b.to_dense())
        return a.dtype == b.dtype and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def real_step(model, optimizer, x, y, clip_grad_norm=None, clip_grad_value=None, scaler=None):
    """What a loop does, by torch's own functions."""
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    model.zero_grad()
    scaler.scale(F.cross_entropy(model(x), y)).backward()
    scaler.unscale_(optimizer)
    if clip_grad_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), clip_grad_norm)
    if clip_grad_value is not None:
        nn.utils.clip_grad_value_(model.parameters(), clip_grad_value)
    scaler.step(optimizer)
    scaler.update()


def probed(model, update, x, y, originals=None):
    """Name -> weight after the probe step at one sample, as an engine makes it."""
    parameters = trainable(model)
    step = update.bind(parameters, originals)
    loss = F.cross_entropy(model(x), y) * step.loss_scale
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    out = [torch.empty_like(p.data) for p in parameters.values()]
    with torch.no_grad():
        step.write(gradients, out)
        again = [torch.empty_like(o) for o in out]
        step.write([None if g is None else 3 * g for g in gradients], again)
        step.write(gradients, again)
    assert same(out, again)  # nothing of one source is left for the next
    return dict(zip(parameters, out, strict=True))


def assert_probe_is_real_step(model, optimizer, x, y, **loop):
    weights, state = state_of(model), state_of(optimizer)
    scale = None if "scaler" not in loop else state_of(loop["scaler"])
    grads = [(p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    after = probed(model, from_optimizer(optimizer, **loop), x[:1], y[:1])
    assert same(state_of(model), weights)
    assert same(state_of(optimizer), state)
    assert scale is None or scale == state_of(loop["scaler"])
    for p, (grad, content) in zip(model.parameters(), grads, strict=True):
        assert p.grad is grad
        assert grad is None or same(grad, content)
    real_step(model, optimizer, x[:1], y[:1], **loop)
    for name, p in model.named_parameters():
        assert same(after.get(name, weights[name]), p.data), name
    return weights


OPTIMIZERS = {
    "SGD": optim.SGD,
    "SGD decay": partial(optim.SGD, weight_decay=0.05),
    "SGD momentum": partial(optim.SGD, momentum=0.9, dampening=0.3, weight_decay=0.01),
    "SGD nesterov": partial(optim.SGD, momentum=0.9, nesterov=True),
    "SGD maximize": partial(optim.SGD, momentum=0.9, maximize=True),
    "SGD foreach": partial(optim.SGD, momentum=0.9, foreach=True),
    "SGD fused": partial(optim.SGD, momentum=0.9, fused=True),
    "Adam": optim.Adam,
    "Adam amsgrad": partial(optim.Adam, amsgrad=True, weight_decay=0.01),
    "Adam foreach": partial(optim.Adam, foreach=True),
    "Adam fused": partial(optim.Adam, fused=True),
    "Adam decoupled": partial(optim.Adam, weight_decay=0.1, decoupled_weight_decay=True),
    "AdamW": optim.AdamW,
    "AdamW amsgrad maximize": partial(optim.AdamW, amsgrad=True, maximize=True),
    "Adamax": optim.Adamax,
    "NAdam": partial(optim.NAdam, weight_decay=0.01, decoupled_weight_decay=True),
    "RAdam": optim.RAdam,
    "RMSprop": optim.RMSprop,
    "RMSprop centered": partial(optim.RMSprop, centered=True, momentum=0.5),
    "Rprop": optim.Rprop,
    "ASGD": partial(optim.ASGD, t0=1),
    "Adadelta": optim.Adadelta,
    "Adagrad": partial(optim.Adagrad, lr_decay=0.1, initial_accumulator_value=0.1),
    "Adafactor": getattr(optim, "Adafactor", None),
    "Muon": getattr(optim, "Muon", None),
    "SparseAdam": optim.SparseAdam,
}
OPTIMIZERS = {name: kind for name, kind in OPTIMIZERS.items() if kind is not None}
LOOPS = {
    "plain": dict,
    "norm": lambda: {"clip_grad_norm": 0.05},
    "large norm": lambda: {"clip_grad_norm": 1e3},
    "value": lambda: {"clip_grad_value": 0.01},
    "scaler": lambda: {"scaler": torch.amp.GradScaler("cpu", init_scale=2.0**10)},
    "scaler norm": lambda: {"scaler": torch.amp.GradScaler("cpu", init_scale=3e3), "clip_grad_norm": 0.05},
    "scaler off": lambda: {"scaler": torch.amp.GradScaler("cpu", enabled=False)},
}


def test_all_classes_of_torch_are_listed():
    kinds = {kind.func if isinstance(kind, partial) else kind for kind in OPTIMIZERS.values()}
    known = {c for c in vars(optim).values() if inspect.isclass(c) and issubclass(c, optim.Optimizer)}
    assert known - kinds <= {optim.Optimizer, optim.LBFGS}


def build(name, lr=0.01):
    """A model and an optimiser of it: two groups, and what the class cannot take frozen."""
    kind = OPTIMIZERS[name]
    model, x, y = make(Words if name == "SparseAdam" else Net)
    if name == "SparseAdam":
        return model, kind(model.parameters(), lr=lr), x, y
    if name == "Muon":
        for p in model.parameters():
            p.requires_grad_(p.dim() == 2 and p.requires_grad)
        return model, kind(matrices(model), lr=lr), x, y
    groups = [{"params": model.first.parameters()}, {"params": list(model.parameters())[4:], "weight_decay": 0.02}]
    groups.insert(1, {"params": [model.first.weight]})
    groups[0]["params"] = [model.first.bias]
    groups[2]["params"] = [*model.last.parameters(), *model.unused.parameters(), model.scale]
    optimizer = kind(groups, lr=lr)
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"] * 0.3
    optimizer.add_param_group({"params": list(model.frozen.parameters())})
    return model, optimizer, x, y


CANNOT_CLIP_SPARSE = {("SparseAdam", loop) for loop in ("norm", "large norm", "value", "scaler norm")}
TRIED = [(name, loop) for name in OPTIMIZERS for loop in LOOPS if (name, loop) not in CANNOT_CLIP_SPARSE]


@pytest.mark.parametrize(("name", "loop"), TRIED)
def test_probe_is_the_step_of_the_loop(name, loop):
    for steps in (0, 3):
        model, optimizer, x, y = build(name)
        scheduler = optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        settings = LOOPS[loop]()
        for _ in range(steps):
            real_step(model, optimizer, x, y, **settings)
            scheduler.step()
        weights = assert_probe_is_real_step(model, optimizer, x, y, **settings)
        assert not same(weights, state_of(model))
        assert all(same(weights[key], value) for key, value in state_of(model).items() if key[:3] in ("unu", "fro"))


@pytest.mark.parametrize("name", ["SGD momentum", "Adam", "AdamW", "Adamax", "RAdam", "RMSprop", "Adadelta", "Adagrad"])
def test_learning_rate_as_a_tensor_and_averaging(name):
    model, optimizer, x, y = build(name, lr=torch.tensor(0.01))
    averaged = optim.swa_utils.AveragedModel(model)
    scheduler = optim.swa_utils.SWALR(optimizer, swa_lr=0.05, anneal_epochs=2)
    for _ in range(3):
        real_step(model, optimizer, x, y)
        averaged.update_parameters(model)
        scheduler.step()
    assert_probe_is_real_step(model, optimizer, x, y)


@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if n not in ("SparseAdam", "Muon", "Adafactor", "Adam fused")])
def test_complex_weights(name):
    model, x, y = make(Complex)
    optimizer = OPTIMIZERS[name](model.parameters(), lr=0.01)
    try:
        for _ in range(2):
            real_step(model, optimizer, x, y)
    except RuntimeError:
        pytest.skip("torch cannot step on complex weights with it")
    assert_probe_is_real_step(model, optimizer, x, y)
    assert_probe_is_real_step(model, optimizer, x, y, clip_grad_norm=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if n not in ("SparseAdam", "Muon")])
def test_weights_of_16_bits_as_they_are(name, dtype):
    model, x, y = make(Net, dtype)
    optimizer = OPTIMIZERS[name](model.parameters(), lr=0.01)
    for _ in range(2):
        real_step(model, optimizer, x, y)
    assert_probe_is_real_step(model, optimizer, x, y)
    assert_probe_is_real_step(model, optimizer, x, y, clip_grad_norm=0.05)


@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if n not in ("SparseAdam", "Muon")])
def test_weights_of_16_bits_on_a_copy(name):
    """The state goes to 32 bits with the weights: the step is that of an optimiser which was loaded there."""
    model, x, y = make(Net, torch.bfloat16)
    optimizer = OPTIMIZERS[name](model.parameters(), lr=0.01)
    for _ in range(2):
        real_step(model, optimizer, x, y)
    wide = copy.deepcopy(model).float()
    state = state_of(optimizer)
    after = probed(wide, from_optimizer(optimizer), x[:1].float(), y[:1], trainable(model))
    assert same(state_of(optimizer), state)
    other = OPTIMIZERS[name](wide.parameters(), lr=0.01)
    other.load_state_dict(state)
    for value in other.state.values():
        value.update(
            {k: v.float() for k, v in value.items() if isinstance(v, torch.Tensor) and v.dtype == torch.bfloat16}
        )
    real_step(wide, other, x[:1].float(), y[:1])
    for key, p in trainable(wide).items():
        assert same(after[key], p.data), key


class Wide(optim.Optimizer):
    """SGD with momentum in float32 on weights of any dtype."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                state.setdefault("momentum", torch.zeros_like(p, dtype=torch.float32))
                state["momentum"].mul_(0.9).add_(p.grad.float())
                p.copy_(p.float() - group["lr"] * state["momentum"])


def test_state_of_another_precision_than_the_weights_stays():
    model, x, y = make(Net, torch.bfloat16)
    optimizer = Wide(model.parameters(), lr=0.01)
    for _ in range(3):
        real_step(model, optimizer, x, y)
    assert_probe_is_real_step(model, optimizer, x, y)


# --- optimisers that users write ------------------------------------------------------------------------------------


class Counting(optim.Optimizer):
    """Keeps a counter in the group, one on itself, and centres the gradient where it stands."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr, "k": 0})
        self.total, self.history = 0.0, []

    @torch.no_grad()
    def step(self, closure=None):
        self.total += 1.0
        for group in self.param_groups:
            group["k"] += 1
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.sub_(p.grad.mean())
                    self.history.append(float(p.grad.norm()))
                    p.add_(p.grad, alpha=-group["lr"] / (group["k"] + self.total))


class Lookahead(optim.Optimizer):
    """Wraps another optimiser, whose groups are its own, and keeps slow weights on itself."""

    def __init__(self, inner, every=2):
        self.inner, self.every, self.count = inner, every, 0
        self.defaults, self.state = inner.defaults, defaultdict(dict)
        self.slow = {}
        super().__init__([p for g in inner.param_groups for p in g["params"]], inner.defaults)
        self.param_groups = inner.param_groups
        self.slow = [[p.detach().clone() for p in g["params"]] for g in self.param_groups]

    @torch.no_grad()
    def step(self, closure=None):
        self.inner.step()
        self.count += 1
        if self.count % self.every:
            return
        for group, slow in zip(self.param_groups, self.slow, strict=True):
            for p, anchor in zip(group["params"], slow, strict=True):
                anchor.lerp_(p, 0.5)
                p.copy_(anchor)


class Split(optim.Optimizer):
    """Two optimisers in a list, for matrices and for the rest."""

    def __init__(self, model):
        rest = [p for p in model.parameters() if p.dim() != 2]
        self.parts = [optim.SGD(matrices(model), lr=0.1, momentum=0.9), optim.Adam(rest, lr=0.01)]
        super().__init__(model.parameters(), {})

    def step(self, closure=None):
        for part in self.parts:
            part.step()


class OwnNoise(Counting):
    def __init__(self, params, lr):
        super().__init__(params, lr)
        self.generator = torch.Generator().manual_seed(3)

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                p.add_(p.grad, alpha=-0.1)
                p.add_(torch.empty_like(p).normal_(generator=self.generator), alpha=0.01)


USERS = {
    "counting": lambda m: Counting(m.parameters(), lr=0.1),
    "lookahead of SGD": lambda m: Lookahead(optim.SGD(m.parameters(), lr=0.1, momentum=0.9)),
    "lookahead of Adam": lambda m: Lookahead(optim.Adam(m.parameters(), lr=0.01), every=3),
    "two in one": Split,
    "noise of its own": lambda m: OwnNoise(m.parameters(), lr=0.1),
}


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
@pytest.mark.parametrize("name", USERS)
def test_optimizers_that_users_write(name, steps):
    model, x, y = make()
    optimizer = USERS[name](model)
    for _ in range(steps):
        real_step(model, optimizer, x, y)
    kept = copy.deepcopy({key: value for key, value in vars(optimizer).items() if key in ("total", "count", "slow")})
    weights = state_of(model)
    after = probed(model, from_optimizer(optimizer), x[:1], y[:1])
    assert same(weights, state_of(model))
    assert same(kept, {key: vars(optimizer)[key] for key in kept})
    real_step(model, optimizer, x[:1], y[:1])
    for key, p in model.named_parameters():
        assert same(after.get(key, weights[key]), p.data), key


class GlobalNoise(optim.SGD):
    def step(self, closure=None):
        super().step()
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.add_(torch.randn_like(p), alpha=0.01)


class Asserting(optim.SGD):
    def step(self, closure=None):
        assert closure is not None, "needs a closure"


class Locked(optim.SGD):
    def __init__(self, params, lr):
        super().__init__(params, lr=lr)
        self.stream = iter(())
        self.frame = (x for x in ())


@pytest.mark.parametrize(
    ("kind", "words"),
    [(GlobalNoise, "draws no random numbers"), (Asserting, "without a closure"), (Locked, "can be copied")],
)
def test_optimizers_that_no_probe_can_follow(kind, words):
    model, x, y = make()
    stream, weights = torch.get_rng_state(), state_of(model)
    with pytest.raises(InputError, match=words):
        probed(model, from_optimizer(kind(model.parameters(), lr=0.1)), x[:1], y[:1])
    assert torch.equal(stream, torch.get_rng_state())
    assert same(weights, state_of(model))


def test_many_frozen_weights_are_not_copied():
    for build_optimizer, is_refused in ((USERS["counting"], False), (USERS["lookahead of SGD"], True)):
        model, x, y = make()
        model.base = nn.Linear(100, 100).requires_grad_(False)
        optimizer = build_optimizer(model)
        if is_refused:
            real_step(model, optimizer, x, y)
            with pytest.raises(InputError, match="step on these gradients"):
                probed(model, from_optimizer(optimizer), x[:1], y[:1])
        else:
            after = probed(model, from_optimizer(optimizer), x[:1], y[:1])
            real_step(model, optimizer, x[:1], y[:1])
            assert same(after, {name: p.data for name, p in trainable(model).items()})


def test_weights_that_a_step_reaches_by_a_closure_are_put_back():
    model, x, y = make()

    class Reaching(optim.SGD):
        def step(self, closure=None):
            for p in trainable(model).values():
                p.data.mul_(0.9)

    weights = state_of(model)
    with pytest.raises(InputError, match="in another way"):
        probed(model, from_optimizer(Reaching(model.parameters(), lr=0.1)), x[:1], y[:1])
    assert same(weights, state_of(model))


def test_a_step_replaced_on_the_instance_is_refused():
    model, _, _ = make()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    optim.lr_scheduler.StepLR(optimizer, 1)
    from_optimizer(optimizer)
    step = optimizer.step
    optimizer.step = lambda: step()
    with pytest.raises(InputError, match="replaced on the instance"):
        from_optimizer(optimizer)
    del optimizer.step
    from_optimizer(optimizer)


def test_a_step_replaced_on_the_class_is_followed(monkeypatch):
    model, x, y = make()
    optimizer = optim.SGD(model.parameters(), lr=0.1)

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                p.sub_(p.grad.sign(), alpha=0.01)

    monkeypatch.setattr(optim.SGD, "step", step)
    assert_probe_is_real_step(model, optimizer, x, y)


def test_distributed_optimizers_are_refused():
    kind = type("ZeroRedundancyOptimizer", (optim.SGD,), {"__module__": "torch.distributed.optim.zero"})
    with pytest.raises(InputError, match="other processes"):
        from_optimizer(kind(make()[0].parameters(), lr=0.1))


def test_optimizer_of_two_models():
    model, x, y = make()
    other = nn.Linear(3, 3)
    optimizer = optim.NAdam([*other.parameters(), *model.parameters()], lr=0.01)
    F.mse_loss(other(torch.ones(1, 3)), torch.ones(1, 3)).backward()
    optimizer.step()
    other.zero_grad()
    weights = state_of(other)
    assert_probe_is_real_step(model, optimizer, x, y)
    assert same(weights, state_of(other))


# --- sparse gradients -----------------------------------------------------------------------------------------------

SPARSE = {
    "SGD": lambda p: optim.SGD(p, lr=0.1),
    "SGD momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9),
    "Adagrad": lambda p: optim.Adagrad(p, lr=0.1),
    "SparseAdam": lambda p: optim.SparseAdam(p, lr=0.1),
}


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("name", SPARSE)
def test_sparse_gradients(name, steps):
    model, x, y = make(Words)
    optimizer = SPARSE[name](list(model.parameters()))
    for _ in range(steps):
        real_step(model, optimizer, x, y)
    assert_probe_is_real_step(model, optimizer, x, y)
    assert_probe_is_real_step(model, optimizer, x, y, scaler=torch.amp.GradScaler("cpu", init_scale=2.0**5))


def test_sparse_gradients_beside_dense_ones():
    model, x, y = make(Both)
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        real_step(model, optimizer, x, y)
        assert_probe_is_real_step(model, optimizer, x, y)


@pytest.mark.parametrize("update", [SGD(0.1), SGD(0.1, weight_decay=0.1), Adam(0.01), Adam(0.01, weight_decay=0.1)])
def test_sparse_gradients_of_named_updates(update):
    model, x, y = make(Words)
    dense = make(partial(Words, False))[0]
    dense.load_state_dict(model.state_dict())
    torch.testing.assert_close(probed(model, update, x[:1], y[:1]), probed(dense, update, x[:1], y[:1]))
    for engine in ("replay", "linear"):
        ours = le.measure(model, F.cross_entropy, (x, y), update=update, engine=engine)
        theirs = le.measure(dense, F.cross_entropy, (x, y), update=update, engine=engine)
        torch.testing.assert_close(ours.change, theirs.change)


@pytest.mark.parametrize(
    ("build_optimizer", "loop", "words"),
    [
        (optim.Adam, {}, "step on these gradients"),
        (partial(optim.SGD, weight_decay=0.1), {}, "step on these gradients"),
        (optim.SGD, {"clip_grad_norm": 1.0}, "sparse=False"),
        (optim.SGD, {"clip_grad_value": 1.0}, "sparse=False"),
    ],
)
def test_sparse_gradients_that_torch_refuses(build_optimizer, loop, words):
    model, x, y = make(Words)
    optimizer = build_optimizer(model.parameters(), lr=0.1)
    with pytest.raises(InputError, match=words):
        probed(model, from_optimizer(optimizer, **loop), x[:1], y[:1])
    with pytest.raises((RuntimeError, NotImplementedError)):
        real_step(model, optimizer, x[:1], y[:1], **loop)


# --- clipping and scaling -------------------------------------------------------------------------------------------


def looked_at(model, x, y, optimizer, steps_at, **loop):
    """The change of all outputs by the real step at each sample, on deep copies."""
    changes = []
    for source in range(steps_at):
        other, copied = copy.deepcopy((model, optimizer))
        real_step(other, copied, x[source : source + 1], y[source : source + 1], **copy.deepcopy(loop))
        changes.append(other(x).detach() - model(x).detach())
    return torch.stack(changes)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("name", ["SGD nesterov", "AdamW", "RMSprop"])
def test_measured_changes_are_those_of_the_loop(name, loop):
    model, x, y = make(Net, torch.float64)
    optimizer = OPTIMIZERS[name](model.parameters(), lr=1e-3)
    settings = LOOPS[loop]()
    for _ in range(2):
        real_step(model, optimizer, x, y, **settings)
    update = from_optimizer(optimizer, **settings)
    want = looked_at(model, x, y, optimizer, 12, **settings)
    impact = le.measure(model, F.cross_entropy, (x, y), update=update, engine="replay")
    torch.testing.assert_close(impact.change, want, rtol=1e-6, atol=1e-12)
    linear = le.measure(model, F.cross_entropy, (x, y), update=update, engine="linear")
    assert float((linear.change - want).norm()) <= 0.02 * float(want.norm())


def test_routes_and_trimming_know_a_clipped_step():
    model, x, y = make(Net, torch.float64)
    optimizer = optim.SGD([*model.first.parameters(), *model.last.parameters(), model.scale], lr=0.1)
    del model.unused
    by_value = from_optimizer(optimizer, clip_grad_value=0.01)
    ours = le.measure(model, F.cross_entropy, (x, y), update=by_value, engine="replay", route="vmap")
    want = looked_at(model, x, y, optimizer, 12, clip_grad_value=0.01)
    torch.testing.assert_close(ours.change, want, rtol=1e-6, atol=1e-12)
    for loop in ({"clip_grad_norm": 0.1}, {"scaler": torch.amp.GradScaler("cpu")}):
        step = from_optimizer(optimizer, **loop).bind(trainable(model))
        assert not step.elementwise
        assert step.affine() is None
        with pytest.raises(InputError, match="vmap"):
            le.measure(
                model, F.cross_entropy, (x, y), update=from_optimizer(optimizer, **loop), engine="replay", route="vmap"
            )


@pytest.mark.parametrize(
    "name", ["SGD", "SGD decay", "SGD momentum", "SGD nesterov", "Adam", "Adam decoupled", "AdamW"]
)
def test_plain_forms_go_by_formulas(name):
    model, optimizer, x, y = build(name)
    real_step(model, optimizer, x, y)
    assert from_optimizer(optimizer).bind(trainable(model)).elementwise
    assert from_optimizer(optimizer, clip_grad_value=1.0).bind(trainable(model)).elementwise


def test_part_of_a_step_clipped_by_value_is_the_same_part():
    model, x, y = make()
    optimizer = optim.Adam(model.parameters(), lr=0.01)
    real_step(model, optimizer, x, y)
    parameters = trainable(model)
    step = from_optimizer(optimizer, clip_grad_value=0.01).bind(parameters)
    part = (slice(1, 4), slice(0, 3))
    gradients = torch.autograd.grad(F.cross_entropy(model(x), y), list(parameters.values()), allow_unused=True)
    out = [torch.empty_like(p.data) for p in parameters.values()]
    index = list(parameters).index("first.weight")
    narrow = step.narrowed({index: part})
    parts = [torch.empty_like(weight) for weight in narrow.weights]
    step.write(gradients, out)
    narrow.write([g[part] if i == index else g for i, g in enumerate(gradients)], parts)
    assert torch.equal(parts[index], out[index][part])
    assert not torch.equal(parts[index], parameters["first.weight"].data[part])


def test_refreshed_weights_are_stepped_from():
    model, _, _ = make()
    for optimizer in (optim.SGD(model.parameters(), lr=0.1), optim.RMSprop(model.parameters(), lr=0.1)):
        step = from_optimizer(optimizer, clip_grad_norm=1.0).bind(trainable(model))
        step.weights[:] = [weight + 1 for weight in step.weights]
        out = [torch.empty_like(weight) for weight in step.weights]
        step.write([torch.zeros_like(weight) for weight in step.weights], out)
        assert same(out, step.weights)


def test_skipped_step_moves_nothing():
    model, x, y = make()
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    real_step(model, optimizer, x, y)
    scaler = torch.amp.GradScaler("cpu", init_scale=3e38)
    weights = state_of(model)
    scaled = torch.autograd.grad(scaler.scale(F.cross_entropy(100 * model(x), y)), model.last.weight)[0]
    assert not scaled.isfinite().all()
    step = from_optimizer(optimizer, scaler=scaler).bind(trainable(model))
    out = [torch.empty_like(weight) for weight in step.weights]
    gradients = [None if "unused" in name else torch.full_like(p, float("inf")) for name, p in trainable(model).items()]
    step.write(gradients, out)
    assert same(out, step.weights)
    assert not any(bool(d.any()) for d in step.directions(gradients))
    assert same(weights, state_of(model))
    finite = [None if g is None else torch.ones_like(g) for g in gradients]
    step.write(finite, out)
    assert not same(out, step.weights)


def test_loss_scale_lifts_gradients_of_half_precision():
    """In float16 a small loss has no gradient; scaled it has, and the probe step is the loop's."""
    model, x, y = make()
    optimizer = optim.SGD(model.parameters(), lr=100.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    reached = ("first.weight", "last.weight")

    def small(model):
        with torch.autocast("cpu", dtype=torch.float16):
            return F.cross_entropy(model(x[:1]), y[:1]) * 1e-6

    update = from_optimizer(optimizer, scaler=scaler)
    step = update.bind(trainable(model))
    assert step.loss_scale == 2.0**14
    out = {}
    for scale in (1.0, step.loss_scale):
        loss = small(model) * scale
        gradients = torch.autograd.grad(loss, list(trainable(model).values()), allow_unused=True)
        values = [torch.empty_like(p.data) for p in trainable(model).values()]
        step.write([None if g is None else g * (step.loss_scale / scale) for g in gradients], values)
        out[scale] = dict(zip(trainable(model), values, strict=True))
    scaler.scale(small(model)).backward()
    scaler.step(optimizer)
    for name in reached:
        assert same(out[step.loss_scale][name], model.state_dict()[name])
        assert not same(out[1.0][name], model.state_dict()[name])


@pytest.mark.parametrize(
    ("loop", "words"),
    [
        ({"clip_grad_norm": -1.0}, "clip_grad_norm: a finite number >= 0"),
        ({"clip_grad_norm": "1"}, "clip_grad_norm=1, without quotes"),
        ({"clip_grad_norm": float("nan")}, "clip_grad_norm"),
        ({"clip_grad_norm": True}, "clip_grad_norm"),
        ({"clip_grad_value": -0.1}, "clip_grad_value"),
        ({"clip_grad_value": torch.tensor(0.1)}, r"clip_grad_value\.item\(\)"),
        ({"clip_grad_value": np.ones(2)}, "clip_grad_value"),
        ({"clip_grad_norm": 1.0, "clip_grad_value": 1.0}, "one way of clipping"),
        ({"scaler": 65536.0}, r"torch\.amp\.GradScaler"),
        ({"scaler": torch.amp.GradScaler}, r"torch\.amp\.GradScaler"),
    ],
)
def test_wrong_settings_of_the_loop(loop, words):
    with pytest.raises(InputError, match=words):
        from_optimizer(optim.SGD(make()[0].parameters(), lr=0.1), **loop)


def test_infinite_limits_clip_nothing():
    model, x, y = make()
    assert_probe_is_real_step(model, optim.SGD(model.parameters(), lr=0.1), x, y, clip_grad_norm=float("inf"))
    assert_probe_is_real_step(model, optim.SGD(model.parameters(), lr=0.1), x, y, clip_grad_norm=0.0)


@pytest.mark.parametrize(
    ("network", "dtype", "loop", "words"),
    [
        (Complex, torch.float32, {"clip_grad_value": 0.1}, "clip_grad_norm"),
        (Complex, torch.float32, {"scaler": torch.amp.GradScaler("cpu")}, "complex"),
        (Net, torch.float16, {"scaler": torch.amp.GradScaler("cpu")}, "float16"),
    ],
)
def test_parameters_that_torch_cannot_clip_or_unscale(network, dtype, loop, words):
    model, x, y = make(network, dtype)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InputError, match=words):
        from_optimizer(optimizer, **loop).bind(trainable(model))
    with pytest.raises((RuntimeError, NotImplementedError, ValueError)):
        real_step(model, optimizer, x, y, **loop)


def test_norm_of_gradients_that_nobody_unscales():
    model, _, _ = make()
    optimizer = optim.SGD(model.first.parameters(), lr=0.1)
    update = from_optimizer(optimizer, clip_grad_norm=1.0, scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(InputError, match="stay scaled"):
        update.bind(trainable(model))


def test_norm_is_that_of_all_trainable_parameters():
    model, x, y = make()
    optimizer = optim.SGD(model.first.parameters(), lr=0.1)
    assert_probe_is_real_step(model, optimizer, x, y, clip_grad_norm=0.05)


# --- named updates --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("network", [Net, Complex])
def test_named_updates_are_fresh_optimizers(network, decay):
    for update, kind in ((SGD(0.1, weight_decay=decay), optim.SGD), (Adam(0.1, weight_decay=decay), optim.Adam)):
        model, x, y = make(network)
        weights, after = state_of(model), probed(model, update, x[:1], y[:1])
        real_step(model, kind(model.parameters(), lr=0.1, weight_decay=decay), x[:1], y[:1])
        for name, p in trainable(model).items():
            moved, want = after[name] - weights[name], p.data - weights[name]
            assert float((moved - want).abs().max()) <= 1e-5 * float(want.abs().max()), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_named_updates_in_16_bits_are_bit_for_bit(dtype):
    for update, kind in ((SGD(0.1, weight_decay=0.1), optim.SGD), (Adam(0.1, weight_decay=0.1), optim.Adam)):
        model, x, y = make(Net, dtype)
        after = probed(model, update, x[:1], y[:1])
        real_step(model, kind(model.parameters(), lr=0.1, weight_decay=0.1), x[:1], y[:1])
        assert all(same(after[name], p.data) for name, p in trainable(model).items())


def test_directions_of_complex_adam():
    model, x, y = make(Complex)
    parameters = trainable(model)
    step = Adam(1e-2).bind(parameters)
    gradients = torch.autograd.grad(F.cross_entropy(model(x), y), list(parameters.values()))
    out = [torch.empty_like(p.data) for p in parameters.values()]
    with torch.no_grad():
        step.write(gradients, out)
        for direction, stepped, weight in zip(step.directions(gradients), out, step.weights, strict=True):
            torch.testing.assert_close(weight + direction, stepped)


@pytest.mark.parametrize(
    ("make_update", "words"),
    [
        (lambda: SGD(lr="0.1"), r"write lr=0\.1, without quotes"),
        (lambda: SGD(lr=None), "lr: a finite number >= 0"),
        (lambda: SGD(lr=True), "lr: a finite number >= 0"),
        (lambda: SGD(lr=10**400), "lr: a finite number >= 0"),
        (lambda: SGD(lr=torch.tensor(0.1)), r"lr\.item\(\)"),
        (lambda: SGD(0.1, weight_decay="a"), "weight_decay"),
        (lambda: Adam(eps=-1), "eps"),
        (lambda: Adam(betas=(0.9, 1.0)), r"betas\[1\].*< 1"),
        (lambda: Adam(betas=(-0.1, 0.9)), r"betas\[0\]"),
        (lambda: Adam(betas=0.9), "two numbers"),
        (lambda: Adam(betas="ab"), "two numbers"),
        (lambda: Adam(betas=("a", 0.9)), r"betas\[0\]"),
        (lambda: from_optimizer("sgd"), "optimizer: a torch optimiser"),
        (lambda: from_optimizer(optim.SGD), r"make one: SGD\(model\.parameters\(\)"),
        (lambda: parse_update("optimizer", "sgd"), "optimizer: a torch optimiser"),
    ],
)
def test_wrong_arguments(make_update, words):
    with pytest.raises(InputError, match=words):
        make_update()


def test_numbers_of_numpy_are_numbers():
    assert SGD(np.float32(0.5)) == SGD(0.5)
    assert Adam(1, betas=[np.float64(0.5), 0]) == Adam(1.0, betas=(0.5, 0.0))
    assert SGD(np.int64(1)).name == "sgd:1"


def test_lazy_parameters_are_refused():
    model = nn.Sequential(nn.LazyLinear(3))
    for update in (SGD(0.1), Adam(0.1), from_optimizer(optim.SGD(model.parameters(), lr=0.1))):
        with pytest.raises(InputError, match="lazy"):
            update.bind(trainable(model))
