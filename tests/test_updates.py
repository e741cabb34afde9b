import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from local_elasticity.base.errors import InputError
from local_elasticity.impact.update import SGD, Adam, from_optimizer, parse_update

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd-decay": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.05),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "sgd-dampening": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.01),
    "sgd-nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "sgd-maximize": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, maximize=True),
    "sgd-foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adam-decay": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.05, betas=(0.8, 0.95)),
    "adam-amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adam-tensor-lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01)),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adamw-decay": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.3, eps=1e-6),
    "adamw-amsgrad-maximize": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True, maximize=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, lr_decay=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
}
STATEFUL = ["sgd-momentum", "adam", "adamw-decay", "nadam"]


class Net(nn.Module):
    """An MLP with a scalar weight and a layer that the loss never reaches."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.unused = nn.Linear(5, 8), nn.Linear(8, 3), nn.Linear(2, 2)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)) * self.scale)


def make(device="cpu", dtype=torch.float32):
    torch.manual_seed(0)
    model = Net().to(device, dtype)
    x = torch.randn(16, 5, device=device, dtype=dtype)
    return model, x, torch.arange(16, device=device) % 3


def loss_of(model, x, y):
    return F.cross_entropy(model(x), y)


def train(model, optimizer, x, y, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        optimizer.step()


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@torch.enable_grad()
def gradients_of(model, x, y):
    return torch.autograd.grad(loss_of(model, x, y), list(trainable(model).values()), allow_unused=True)


def probe(model, update, x, y):
    parameters = trainable(model)
    step = update.bind(parameters)
    out = [torch.empty_like(p.data) for p in parameters.values()]
    with torch.no_grad():
        step.write(gradients_of(model, x, y), out)
    return dict(zip(parameters, out, strict=True))


def bits(value):
    return copy.deepcopy(value.state_dict())


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_probe_is_next_step(model, optimizer, x, y):
    weights, state = bits(model), bits(optimizer)
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    probed = probe(model, from_optimizer(optimizer), x[:1], y[:1])
    assert same(bits(model), weights)
    assert same(bits(optimizer), state)
    assert same([p.grad for p in model.parameters()], gradients)
    train(model, optimizer, x[:1], y[:1], 1)
    for name, p in model.named_parameters():
        assert torch.equal(probed.get(name, weights[name]), p.data), name
    return weights


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_live_optimizer_bit_for_bit(name, steps, device):
    model, x, y = make(device)
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, x, y, steps)
    weights = assert_probe_is_next_step(model, optimizer, x, y)
    assert not torch.equal(weights["first.weight"], model.first.weight.data)
    assert torch.equal(weights["unused.weight"], model.unused.weight.data)  # no gradient: it stays


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_live_optimizer_groups_and_frozen(name):
    model, x, y = make()
    model.first.bias.requires_grad_(False)
    kind = OPTIMIZERS[name]([{"params": model.first.parameters()}, {"params": model.last.parameters()}])
    kind.param_groups[1]["lr"] = kind.param_groups[0]["lr"] * 0.3
    kind.param_groups[1]["weight_decay"] = 0.2
    train(model, kind, x, y, 3)
    weights = assert_probe_is_next_step(model, kind, x, y)
    for still in ("first.bias", "scale", "unused.weight"):  # frozen; in no group; without gradient
        assert torch.equal(weights[still], model.state_dict()[still])


@pytest.mark.parametrize("name", STATEFUL)
def test_probe_is_repeatable(name):
    model, x, y = make()
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, x, y, 3)
    parameters = trainable(model)
    step = from_optimizer(optimizer).bind(parameters)
    out = [[torch.empty_like(p.data) for p in parameters.values()] for _ in range(3)]
    with torch.no_grad():
        for source, buffers in zip((0, 1, 0), out, strict=True):
            rows = slice(source, source + 1)
            step.write(gradients_of(model, x[rows], y[rows]), buffers)
    assert same(out[0], out[2])
    assert not same(out[0], out[1])


@pytest.mark.parametrize("name", STATEFUL)
def test_scheduler_attached(name):
    model, x, y = make()
    optimizer = OPTIMIZERS[name](model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    for _ in range(3):
        train(model, optimizer, x, y, 1)
        scheduler.step()
    assert_probe_is_next_step(model, optimizer, x, y)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_converted_copy(name):
    model, x, y = make()
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, x, y, 3)
    double = copy.deepcopy(model).double()
    step = from_optimizer(optimizer).bind(trainable(double), trainable(model))
    out = [torch.empty_like(p.data) for p in trainable(double).values()]
    with torch.no_grad():
        step.write([None if g is None else g.double() for g in gradients_of(model, x[:1], y[:1])], out)
    train(model, optimizer, x[:1], y[:1], 1)
    for stepped, p in zip(out, model.parameters(), strict=True):
        assert stepped.dtype == torch.float64
        torch.testing.assert_close(stepped, p.data.double(), rtol=1e-5, atol=1e-6)


ALL_UPDATES = {
    "SGD": lambda p: SGD(0.1),
    "SGD-decay": lambda p: SGD(0.1, weight_decay=0.05),
    "Adam": lambda p: Adam(0.01),
    "Adam-decay": lambda p: Adam(0.01, weight_decay=0.05),
    **{name: lambda p, build=build: from_optimizer(build(p)) for name, build in OPTIMIZERS.items()},
}


@pytest.mark.parametrize("name", ALL_UPDATES)
def test_direction_is_stepped_minus_weight(name):
    model, x, y = make(dtype=torch.float64)
    update = ALL_UPDATES[name](model.parameters())
    if hasattr(update, "optimizer"):
        train(model, update.optimizer, x, y, 2)
    gradients = gradients_of(model, x[:1], y[:1])
    parameters = trainable(model)
    step = update.bind(parameters)
    out = [torch.empty_like(p.data) for p in parameters.values()]
    with torch.no_grad():
        step.write(gradients, out)
        directions = step.directions(gradients)
        for index, (p, g) in enumerate(zip(parameters.values(), gradients, strict=True)):
            torch.testing.assert_close(directions[index], out[index] - p, rtol=1e-9, atol=1e-15)
            if step.elementwise and g is not None:
                assert torch.equal(step.stepped(index, p.data, g), out[index])
            if g is None:
                assert not directions[index].any()


def test_fresh_adam():
    model, x, y = make(dtype=torch.float64)
    gradients = dict(zip(trainable(model), gradients_of(model, x[:1], y[:1]), strict=True))
    probed = probe(model, Adam(lr=1e-3), x[:1], y[:1])
    weights = bits(model)
    for name, g in gradients.items():
        expected = weights[name] if g is None else weights[name] - 1e-3 * g / (g.abs() + 1e-8)
        torch.testing.assert_close(probed[name], expected, rtol=0, atol=1e-16)
    train(model, torch.optim.Adam(model.parameters(), lr=1e-3), x[:1], y[:1], 1)
    for name, p in model.named_parameters():
        moved, expected = probed[name] - weights[name], p.data - weights[name]
        assert (moved - expected).norm() <= 1e-6 * expected.norm()


def test_fresh_sgd_is_torch_sgd():
    model, x, y = make()
    probed = probe(model, SGD(0.1, weight_decay=0.05), x[:1], y[:1])
    train(model, torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.05), x[:1], y[:1], 1)
    assert all(torch.equal(probed[name], p.data) for name, p in model.named_parameters())


def test_refusals():
    model, _, _ = make()
    with pytest.raises(InputError, match="LBFGS"):
        from_optimizer(torch.optim.LBFGS(model.parameters()))
    with pytest.raises(InputError, match="optimizer: a torch optimiser"):
        from_optimizer("adam")
    other = torch.optim.SGD(make()[0].parameters(), lr=0.1)
    with pytest.raises(InputError, match="parameters of this model"):
        from_optimizer(other).bind(trainable(model))
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="lr"):
            SGD(bad)
        with pytest.raises(InputError, match="lr"):
            Adam(bad)
    with pytest.raises(InputError, match="weight_decay"):
        SGD(0.1, weight_decay=-1)


class NeedsClosure(torch.optim.SGD):
    def step(self, closure):
        return closure()


def test_optimizer_that_needs_a_closure():
    model, x, y = make()
    with pytest.raises(InputError, match="closure"):
        probe(model, from_optimizer(NeedsClosure(model.parameters(), lr=0.1)), x[:1], y[:1])


@pytest.mark.parametrize(
    ("text", "name", "update"),
    [
        ("sgd:0.01", "sgd:0.01", SGD(0.01)),
        ("adam:1e-4", "adam:0.0001", Adam(1e-4)),
        ("sgd:0", "sgd:0", SGD(0.0)),
        ("mine=sgd:1", "mine", SGD(1.0)),
        ("first step=adam:0.001", "first step", Adam(0.001)),
    ],
)
def test_parse_update(text, name, update):
    assert parse_update(text) == (name, update)


def test_parse_update_live():
    optimizer = torch.optim.SGD(make()[0].parameters(), lr=0.1)
    for text, expected in (("optimizer", "optimizer"), ("live=optimizer", "live")):
        name, update = parse_update(text, optimizer)
        assert name == expected
        assert update.optimizer is optimizer


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("optimizer", "nothing trains"),
        ("sdg:0.1", "did you mean 'sgd'"),
        ("adm:0.1", "did you mean 'adam'"),
        ("optimizer:0.1", "did you mean 'optimizer'"),
        ("", "expected sgd:LR"),
        ("sgd", "learning rate after 'sgd:'"),
        ("sgd:", "learning rate after 'sgd:'"),
        ("adam:fast", "'fast'"),
        ("sgd:-1", "lr: a finite number >= 0"),
        ("sgd:nan", "lr: a finite number >= 0"),
        ("adam:1e400", "lr: a finite number >= 0"),
        (0.1, "update: a text"),
        (None, "update: a text"),
        ("a=", "expected sgd:LR"),
    ],
)
def test_parse_update_errors(text, words):
    with pytest.raises(InputError, match=words):
        parse_update(text)


def test_building_warns_of_nothing():
    model, x, y = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in STATEFUL:
            probe(model, from_optimizer(OPTIMIZERS[name](model.parameters())), x[:1], y[:1])
