import copy
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from local_elasticity.base.errors import InputError, NoiseWarning
from local_elasticity.impact import measure
from local_elasticity.impact.update import SGD, Adam, from_optimizer
from local_elasticity.networks import MLP, SimpleConv
from local_elasticity.similarity.definitions import s_rel

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
N_SOURCES, N_TARGETS = 12, 9


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.out = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.out(self.lstm(x)[0][:, -1])


class Tied(nn.Module):
    """The same weights twice: once as they are, once by the same module under another name."""

    def __init__(self):
        super().__init__()
        self.first, self.out = nn.Linear(6, 6), nn.Linear(6, 3)
        self.second = self.first
        self.third = nn.Linear(6, 6)
        self.third.weight = self.first.weight

    def forward(self, x):
        return self.out(torch.tanh(self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))))


class Scalar(nn.Module):
    """One number a sample, shape (batch,), scaled by a scalar weight."""

    def __init__(self):
        super().__init__()
        self.net, self.scale = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)), nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.scale * self.net(x).squeeze(1)


class PartlyUsed(nn.Module):
    """A layer that the output never reaches."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x):
        return self.used(x)


def batchnorm_net():
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    )
    net(torch.randn(20, 1, 8, 8))  # running statistics that are not the initial ones
    return net


def partly_frozen():
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    net[0].requires_grad_(False)
    net[2].bias.requires_grad_(False)
    return net


class CalledTwice(nn.Module):
    """One convolution at two sizes of image: its outer taps see data at one of them only."""

    def __init__(self):
        super().__init__()
        self.conv, self.out = nn.Conv2d(2, 2, 3, padding=1), nn.Linear(2, 3)

    def forward(self, x):
        x = nn.functional.avg_pool2d(torch.tanh(self.conv(x)), 4)
        return self.out(torch.tanh(self.conv(x)).flatten(1))


def small_images():
    """Convolutions that mostly see padding, as in the last layers of a ResNet on small images."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.Tanh(),
        nn.Conv2d(6, 6, (3, 5), stride=2, padding=(1, 2), bias=False), nn.Tanh(), nn.Conv2d(6, 4, 3, padding=1),
        nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip


MODELS = {
    "mlp": (lambda: MLP(6, 3, depth=2, width=10), (6,)),
    "simple-conv": (lambda: SimpleConv(3), (1, 32, 32)),
    "small-images": (small_images, (1, 4, 4)),
    "called-twice": (CalledTwice, (2, 4, 4)),
    "batchnorm": (batchnorm_net, (1, 8, 8)),
    "layernorm": (lambda: nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3)), (6,)),
    "lstm": (Recurrent, (4, 4)),
    "tied": (Tied, (6,)),
    "scalar": (Scalar, (6,)),
    "frozen": (partly_frozen, (6,)),
    "partly-used": (PartlyUsed, (6,)),
}
NO_VMAP = ("lstm", "partly-used")
ADAMW = {"lr": 1e-2, "weight_decay": 0.1}
UPDATES = {
    "sgd": (lambda model: SGD(0.05), lambda p: torch.optim.SGD(p, lr=0.05)),
    "adam": (lambda model: Adam(1e-3), lambda p: torch.optim.Adam(p, lr=1e-3)),
}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(name="mlp", device="cpu", dtype=torch.float64):
    torch.manual_seed(1)
    build, shape = MODELS[name]
    model = build().to(device, dtype).eval()
    x = torch.randn(N_SOURCES, *shape, device=device, dtype=dtype)
    targets = torch.cat([torch.randn(N_TARGETS - 4, *shape, device=device, dtype=dtype), x[[3, 0, 0, 7]]])
    if name == "scalar":
        return model, F.mse_loss, x, torch.randn(N_SOURCES, device=device, dtype=dtype), targets
    return model, F.cross_entropy, x, torch.arange(N_SOURCES, device=device) % 3, targets


def trained(model, loss_fn, x, y, build):
    optimizer = build([p for p in model.parameters() if p.requires_grad])
    for _ in range(3):
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    return optimizer


def columns(output):
    return output if output.dim() == 2 else output.unsqueeze(1)


def one_real_step(model, optimizer, loss_fn, x, y):
    """A copy of model and optimiser that took one step."""
    model, groups = copy.deepcopy((model, optimizer.param_groups))  # together: the groups hold the copy's parameters
    taken = type(optimizer)(groups)
    owners = dict(
        zip([id(p) for g in optimizer.param_groups for p in g["params"]], taken_parameters(taken), strict=True)
    )
    for p, state in optimizer.state.items():
        taken.state[owners[id(p)]] = copy.deepcopy(state)
    taken.zero_grad()
    loss_fn(model(x), y).backward()
    taken.step()
    return model


def taken_parameters(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def naive(model, optimizer, loss_fn, x, y, targets):
    """The published way: copy the model, take a real step, look."""
    after, source_after = [], []
    for i in range(len(x)):
        stepped = one_real_step(model, optimizer, loss_fn, x[i : i + 1], y[i : i + 1])
        with torch.no_grad():
            after.append(columns(stepped(targets)))
            source_after.append(columns(stepped(x[i : i + 1]))[0])
    with torch.no_grad():
        return columns(model(targets)), torch.stack(after), columns(model(x)), torch.stack(source_after)


def assert_replay_equals(impact, expected, tolerance=1e-12):
    names = ("before", "after", "source_before", "source_after")
    for name, value in zip(names, expected, strict=True):
        torch.testing.assert_close(
            getattr(impact, name), value, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert torch.equal(impact.change, impact.after - impact.before)
    assert torch.equal(impact.source_change, impact.source_after - impact.source_before)
    assert impact.change.abs().amax() > 1e-6


SETTINGS = [
    {"route": "step"},
    {"route": "step", "target_chunk_size": 4},
    {"route": "vmap"},
    {"route": "vmap", "chunk_size": 5, "target_chunk_size": 3},
    {"route": "vmap", "chunk_size": 100},
    {"chunk_size": 1},
    {"chunk_size": 4},
    {},
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("update", ["sgd", "adam", "optimizer"])
@pytest.mark.parametrize("name", MODELS)
def test_replay_is_the_naive_loop(name, update, device):
    model, loss_fn, x, y, targets = make(name, device)
    with torch.backends.cudnn.flags(enabled=name != "lstm"):  # whose recurrent layers have no gradients in eval mode
        if update == "optimizer":
            optimizer = trained(model, loss_fn, x, y, lambda p: torch.optim.AdamW(p, **ADAMW))
            rule = from_optimizer(optimizer)
        else:
            rule, optimizer = UPDATES[update][0](model), UPDATES[update][1](model.parameters())
        expected = naive(model, optimizer, loss_fn, x, y, targets)
    settings = SETTINGS[1::2] if name == "simple-conv" else SETTINGS
    copied = update == "optimizer" and device == "cuda"  # a live optimiser runs as a copy, which vmap cannot batch
    for setting in SETTINGS[:2] if name in NO_VMAP or copied else settings:
        # torch.optim forms |g| as a square root of a square: where g is far below its eps, that rounds differently
        tolerance = 1e-9 if update == "adam" else 1e-12
        impact = measure(model, loss_fn, (x, y), targets, update=rule, outputs="values", **setting)
        assert_replay_equals(impact, expected, tolerance)
        assert impact.plan.engine == "replay"
    automatic = measure(model, loss_fn, (x, y), targets, update=rule, outputs="values")
    assert_replay_equals(automatic, expected, tolerance)


@pytest.mark.parametrize("build", [lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), torch.optim.NAdam])
def test_other_live_optimizers(build):
    model, loss_fn, x, y, targets = make()
    optimizer = trained(model, loss_fn, x, y, build)
    impact = measure(model, loss_fn, (x, y), targets, update=from_optimizer(optimizer))
    assert_replay_equals(impact, naive(model, optimizer, loss_fn, x, y, targets))


def test_fresh_adam_formula():
    model, loss_fn, x, y, targets = make()
    impact = measure(model, loss_fn, (x, y), targets, update=Adam(1e-3))
    for i in range(len(x)):
        stepped = copy.deepcopy(model)
        loss_fn(stepped(x[i : i + 1]), y[i : i + 1]).backward()
        with torch.no_grad():
            for p in stepped.parameters():
                p -= 1e-3 * p.grad / (p.grad.abs() + 1e-8)
            torch.testing.assert_close(impact.after[i], stepped(targets), rtol=0, atol=1e-12)


@pytest.mark.parametrize("route", ["step", "vmap"])
def test_source_is_read_from_the_target_batch(route):
    model, loss_fn, x, y, targets = make(dtype=torch.float32)
    impact = measure(model, loss_fn, (x, y), targets, update=SGD(0.05), route=route)
    first = {0: N_TARGETS - 3, 3: N_TARGETS - 4, 7: N_TARGETS - 1}
    assert impact.self_index.tolist() == [first.get(i, -1) for i in range(N_SOURCES)]
    for source, target in first.items():
        assert torch.equal(impact.source_after[source], impact.after[source, target])
        assert torch.equal(impact.source_before[source], impact.before[target])
    default = measure(model, loss_fn, (x, y), update=SGD(0.05), route=route)
    assert default.self_index.tolist() == list(range(N_SOURCES))
    assert torch.equal(default.source_after, default.after[range(N_SOURCES), range(N_SOURCES)])


@pytest.mark.parametrize("engine", ["replay", "linear"])
@pytest.mark.parametrize("definition", ["he_su", "l1", "l2", "kl"])
def test_self_pairs_are_one(definition, engine):
    model, loss_fn, x, y, _ = make()
    s = s_rel(measure(model, loss_fn, (x, y), update=SGD(0.05), engine=engine), definition, eps=0.0)
    torch.testing.assert_close(s.diagonal(), torch.ones(N_SOURCES, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("engine", ["replay", "linear"])
def test_linear_model_closed_form(engine):
    torch.manual_seed(0)
    model, x = nn.Linear(7, 3, bias=False).double(), torch.randn(10, 7, dtype=torch.float64)
    y = torch.arange(10) % 3
    s = s_rel(measure(model, F.cross_entropy, (x, y), update=SGD(0.1), engine=engine), "he_su")
    torch.testing.assert_close(s, (x @ x.T).abs() / (x * x).sum(1, keepdim=True), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("update", [SGD(0.05, weight_decay=0.1), Adam(1e-3)])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "simple-conv"])
def test_linear_engine_is_the_jacobian_product(name, update):
    model, loss_fn, x, y, targets = make(name)
    parameters = {key: p for key, p in model.named_parameters() if p.requires_grad}
    impact = measure(model, loss_fn, (x, y), targets, update=update, engine="linear", outputs="values")
    assert impact.plan.engine == "linear"
    assert torch.equal(impact.after, impact.before + impact.change)
    step = update.bind(parameters)
    rows = torch.cat([targets, x])
    outputs = columns(model(rows))
    jacobian = [
        [torch.autograd.grad(value, list(parameters.values()), retain_graph=True, allow_unused=True) for value in row]
        for row in outputs
    ]
    for i in range(len(x)):
        loss = loss_fn(model(x[i : i + 1]), y[i : i + 1])
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        directions = step.directions(gradients)
        expected = torch.stack([torch.stack([dot(grads, directions) for grads in row]) for row in jacobian])
        torch.testing.assert_close(impact.change[i], expected[:N_TARGETS], rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(impact.source_change[i], expected[N_TARGETS + i], rtol=1e-10, atol=1e-13)


def dot(gradients, directions):
    products = ((g * d).sum() for g, d in zip(gradients, directions, strict=True) if g is not None)
    return sum(products, torch.zeros((), dtype=torch.float64)).detach()


@pytest.mark.parametrize("engine", ["replay", "linear"])
def test_linearization_error_is_first_order(engine):
    model, loss_fn, x, y, targets = make("layernorm")
    errors = [
        measure(model, loss_fn, (x, y), targets, update=SGD(lr), engine=engine).linearization_error
        for lr in (1e-2, 1e-3, 1e-4)
    ]
    assert 8 < errors[0] / errors[1] < 12
    assert 8 < errors[1] / errors[2] < 12
    unchecked = measure(model, loss_fn, (x, y), targets, update=SGD(0.01), engine=engine, check_pairs=0)
    assert np.isnan(unchecked.linearization_error)


class Fragile(nn.Module):
    """Dropout, BatchNorm and a power iteration in a buffer: everything that a forward pass can disturb."""

    def __init__(self):
        super().__init__()
        self.first = nn.utils.parametrizations.spectral_norm(nn.Conv2d(1, 4, 3))
        self.norm, self.drop, self.out = nn.BatchNorm2d(4), nn.Dropout(0.3), nn.Linear(4, 3)

    def forward(self, x):
        if self.training:
            np.random.rand()  # noqa: NPY002
            random.random()
        return self.out(self.drop(F.relu(self.norm(self.first(x)))).mean((2, 3)))


def fragile(device="cpu"):
    torch.manual_seed(2)
    model = Fragile().to(device)
    model.drop.eval()  # flags that are not all alike
    x, y = torch.randn(10, 1, 6, 6, device=device), torch.arange(10, device=device) % 3
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, optimizer, x, y  # gradients are left in place


def fingerprint(model, optimizer):
    numbers = {
        "parameters": [(n, id(p), p.data_ptr(), p._version, p.detach().clone()) for n, p in model.named_parameters()],
        "buffers": [(n, id(b), b.data_ptr(), b.clone()) for n, b in model.named_buffers()],
        "gradients": [(id(p.grad), p.grad.clone()) for p in model.parameters()],
        "flags": [(id(m), m.training) for m in model.modules()],
        "requires": [p.requires_grad for p in model.parameters()],
        "optimizer": copy.deepcopy(optimizer.state_dict()),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": np.random.get_state(),  # noqa: NPY002
        "python": random.getstate(),
        "modes": (torch.is_grad_enabled(), torch.is_autocast_cache_enabled(), torch.is_inference_mode_enabled()),
    }
    return numbers


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_untouched(before, after):
    assert [key for key in before if not same(before[key], after[key])] == []


@pytest.mark.filterwarnings("ignore::local_elasticity.base.errors.NoiseWarning")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", ["eval", "train", "as_is"])
@pytest.mark.parametrize("live", [False, True])
def test_measuring_leaves_no_trace(mode, live, device):
    model, optimizer, x, y = fragile(device)
    update = from_optimizer(optimizer) if live else SGD(0.05)
    before = fingerprint(model, optimizer)
    for setting in (
        {},
        {"dtype": torch.float64},
        *([{"route": "vmap"}, {"engine": "linear"}] if mode == "eval" else []),
    ):
        if "route" in setting and device == "cuda" and live:
            continue  # on an accelerator a live optimiser runs as a copy, which vmap cannot batch
        impact = measure(model, F.cross_entropy, (x, y), update=update, mode=mode, **setting)
        assert impact.change.any()
        assert_untouched(before, fingerprint(model, optimizer))


@pytest.mark.parametrize("setting", [{"route": "step"}, {"route": "vmap"}, {"engine": "linear"}], ids=str)
def test_shared_modules_stay_shared(setting):
    model, loss_fn, x, y, targets = make("tied")
    before = [(name, id(p), p.detach().clone()) for name, p in model.named_parameters(remove_duplicate=False)]
    measure(model, loss_fn, (x, y), targets, update=SGD(0.05), **setting)
    after = [(name, id(p), p.detach().clone()) for name, p in model.named_parameters(remove_duplicate=False)]
    assert same(before, after)


class Broken(Exception):
    pass


@pytest.mark.parametrize(
    ("mode", "setting"),
    [(mode, setting) for mode in ("eval", "train", "as_is") for setting in ({"route": "step"}, {})]
    + [("eval", {"engine": "linear"})],
    ids=str,
)
def test_an_exception_leaves_no_trace(mode, setting):
    model, optimizer, x, y = fragile()
    before = fingerprint(model, optimizer)

    def loss_fn(output, label):
        if "engine" not in setting:  # the linear engine refuses losses that draw
            torch.rand(1), np.random.rand(), random.random()  # noqa: NPY002
        if int(label) == 2:  # not at the first source, which is asked before the work
            raise Broken
        return F.cross_entropy(output, label)

    with pytest.raises(Broken):
        measure(model, loss_fn, (x, y), update=SGD(0.05), mode=mode, **setting)
    assert_untouched(before, fingerprint(model, optimizer))


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_graph_that_was_built_before_still_works(mode):
    model, loss_fn, x, y, targets = make("batchnorm")
    model.train(mode == "train")
    expected = torch.autograd.grad(loss_fn(model(x), y), list(model.parameters()))
    loss = loss_fn(model(x), y)
    measure(model, loss_fn, (x, y), targets, update=SGD(0.05), mode=mode)
    assert same(torch.autograd.grad(loss, list(model.parameters())), expected)


@pytest.mark.filterwarnings("ignore::local_elasticity.base.errors.NoiseWarning")
def test_train_mode_sees_one_stream():
    """Dropout masks and buffers are the same before and after the step, so no step means no change."""
    model, _, x, y = fragile()
    still = measure(model, F.cross_entropy, (x, y), update=SGD(0.0), mode="train")
    assert not still.change.any()
    one, other = (measure(model, F.cross_entropy, (x, y), update=SGD(0.05), mode="train") for _ in range(2))
    assert torch.equal(one.after, other.after)
    reversed_ = measure(model, F.cross_entropy, (x.flip(0), y.flip(0)), x, update=SGD(0.05), mode="train")
    torch.testing.assert_close(reversed_.after.flip(0), one.after, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("route", ["step", "vmap", None])
@pytest.mark.parametrize("setting", [{}, {"dtype": torch.float64}, {"engine": "linear"}], ids=str)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=lambda c: c.__name__)
def test_under_no_grad_and_inference_mode(context, setting, route):
    model, loss_fn, x, y, targets = make(dtype=torch.float32)
    if "engine" in setting:
        route = {"step": "contract", "vmap": "jvp", None: None}[route]
    expected = measure(model, loss_fn, (x, y), targets, update=SGD(0.05), route=route, **setting)
    with context():
        impact = measure(model, loss_fn, (x, y), targets, update=SGD(0.05), route=route, **setting)
        inside = measure(model, loss_fn, (x + 0, y + 0), targets + 0, update=SGD(0.05), route=route, **setting)
    for other in (impact, inside):
        torch.testing.assert_close(other.change, expected.change, rtol=1e-3, atol=1e-6)
        assert other.change.any()
        assert not other.change.is_inference()


@pytest.mark.filterwarnings("ignore::local_elasticity.base.errors.NoiseWarning")
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("route", ["step", "vmap", None])
def test_inside_autocast(route, grad):
    model, loss_fn, x, y, targets = make(dtype=torch.float32)
    exact = measure(model, loss_fn, (x, y), targets, update=SGD(0.5), route=route)
    with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype=torch.bfloat16):
        model(x)  # fills autocast's cache with casts of the weights
        impact = measure(model, loss_fn, (x, y), targets, update=SGD(0.5), route=route)
        assert torch.is_autocast_cache_enabled()
    assert (impact.change.norm(dim=(1, 2)) > 0).all()
    assert (impact.change.float() - exact.change).norm() < 0.2 * exact.change.norm()


@pytest.mark.parametrize("live", [False, True])
def test_measured_in_float64(live):
    model, loss_fn, x, y, targets = make("scalar", dtype=torch.float32)
    optimizer = trained(model, loss_fn, x, y, lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1))
    double = copy.deepcopy(model).double()
    moved = torch.optim.SGD(double.parameters(), lr=0.05)
    update = SGD(0.05)
    if live:
        moved, update = torch.optim.Adam(double.parameters()), from_optimizer(optimizer)
        moved.load_state_dict(optimizer.state_dict())
    impact = measure(model, loss_fn, (x, y), targets, update=update, dtype=torch.float64, outputs="values")
    assert impact.after.dtype == torch.float64
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert_replay_equals(impact, naive(double, moved, loss_fn, x.double(), y.double(), targets.double()))


@pytest.mark.parametrize("route", ["step", "vmap", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_step_no_change(dtype, route):
    model, loss_fn, x, y, targets = make(dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error", NoiseWarning)
        impact = measure(model, loss_fn, (x, y), targets, update=SGD(0.0), route=route)
    assert not impact.change.any()
    assert not impact.source_change.any()
    assert impact.below_noise.all()
    assert s_rel(impact, "he_su").isnan().all()
    assert not measure(model, loss_fn, (x, y), targets, update=SGD(0.0), engine="linear").change.any()


@pytest.mark.parametrize("route", ["step", "vmap", None])
def test_source_without_gradient_moves_nothing(route):
    model, loss_fn, x, y, targets = make(dtype=torch.float32)

    def dead_for_class_1(output, label):
        return loss_fn(output, label) * (label != 1).sum()

    impact = measure(model, dead_for_class_1, (x, y), targets, update=SGD(0.5), route=route)
    assert torch.equal(impact.change.norm(dim=(1, 2)) == 0, y == 1)
    assert torch.equal(impact.source_change.norm(dim=1) == 0, y == 1)


def test_changes_below_the_noise_are_flagged():
    model, loss_fn, x, y, targets = make(dtype=torch.float32)
    with pytest.warns(NoiseWarning, match="float64"):
        tiny = measure(model, loss_fn, (x, y), targets, update=SGD(1e-7))
    assert tiny.below_noise.any()
    assert tiny.below_noise.shape == (N_SOURCES, N_TARGETS)
    floor = 4 * torch.finfo(torch.float32).eps * tiny.before.abs().amax(1)
    assert (tiny.noise_floor >= floor).all()
    assert (tiny.noise_floor <= 10 * floor).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error", NoiseWarning)
        assert not measure(model, loss_fn, (x, y), targets, update=SGD(0.5)).below_noise.all(0).any()
        assert not measure(model, loss_fn, (x, y), targets, update=SGD(1e-7), dtype=torch.float64).below_noise.any()


def test_plan():
    model, loss_fn, x, y, targets = make()
    step = measure(model, loss_fn, (x, y), targets, update=SGD(0.05), route="step", target_chunk_size=4).plan
    assert (step.engine, step.route, step.chunk_size, step.target_chunk_size) == ("replay", "step", 1, 4)
    assert step.threads == torch.get_num_threads()
    assert 0 < step.estimated_seconds < 60
    assert 0 < step.measured_seconds < 60
    weights = sum(p.numel() * 8 for p in model.parameters())
    assert (
        step.estimated_bytes == 2 * N_SOURCES * N_TARGETS * 3 * 8 + 2 * weights
    )  # after and change; step and gradient
    assert step.peak_bytes is None or step.peak_bytes >= 0
    vmap = measure(model, loss_fn, (x, y), targets, update=SGD(0.05), route="vmap", chunk_size=5).plan
    assert (vmap.route, vmap.chunk_size, vmap.target_chunk_size) == ("vmap", 5, N_TARGETS + 1)
    auto = measure(model, loss_fn, (x, y), targets, update=SGD(0.05)).plan
    assert (auto.route, auto.chunk_size) == ("vmap", N_SOURCES)
    linear = measure(model, loss_fn, (x, y), targets, update=SGD(0.05), engine="linear").plan
    assert (linear.engine, linear.route) == ("linear", "contract")
    assert linear.notes == [f"route contract: {N_SOURCES} sources, 3 outputs"]
    assert auto.as_dict()["notes"][0] == "engine auto: replay (fewer than 16 sources)"
    few = measure(model, loss_fn, (x[:3], y[:3]), targets, update=SGD(0.05)).plan
    assert (few.route, few.notes[-1]) == ("step", "route step: fewer than 8 sources")
    one = measure(model, loss_fn, (x[:1], y[:1]), targets, update=SGD(0.05), engine="linear").plan
    assert one.route == "jvp"  # one source, three outputs


def test_plan_notes_say_why_not_vmap():
    model, loss_fn, x, y, targets = make("lstm")
    assert any("vmap" in note for note in measure(model, loss_fn, (x, y), targets, update=SGD(0.05)).plan.notes)
    model, loss_fn, x, y, targets = make("partly-used")
    notes = measure(model, loss_fn, (x, y), targets, update=SGD(0.05), engine="replay").plan.notes
    assert notes == ["route step: parameters without gradient"]
    with pytest.raises(InputError, match="without gradient"):
        measure(model, loss_fn, (x, y), targets, update=SGD(0.05), route="vmap")


def test_fields():
    model, loss_fn, x, y, targets = make()
    impact = measure(model, loss_fn, (x, y), targets, update=SGD(0.05), progress=False)
    assert (impact.outputs, impact.update) == ("logits", "sgd:0.05")
    expected = torch.stack([loss_fn(model(x[i : i + 1]), y[i : i + 1]) for i in range(N_SOURCES)]).detach()
    torch.testing.assert_close(impact.losses, expected)
    assert not impact.after.requires_grad


BAD = {
    "label too high": ({"labels": torch.full((N_SOURCES,), 3)}, {}, r"labels in 0..2"),
    "label negative": ({"labels": torch.full((N_SOURCES,), -1)}, {}, r"labels in 0..2"),
    "label dtype": ({"labels": torch.zeros(N_SOURCES)}, {}, "int64"),
    "label count": ({"labels": torch.zeros(3, dtype=torch.int64)}, {}, "one label for each"),
    "not a pair": ({"sources": torch.zeros(3)}, {}, r"sources=\(inputs, labels\)"),
    "empty": ({"sources": (torch.zeros(0, 6), torch.zeros(0, dtype=torch.int64))}, {}, "at least one sample"),
    "no tensors": ({"sources": (np.zeros((3, 6)), np.zeros(3))}, {}, "torch tensor"),
    "empty targets": ({"targets": torch.zeros(0, 6, dtype=torch.float64)}, {}, "at least one sample"),
    "nan inputs": ({"targets": torch.full((2, 6), float("nan"), dtype=torch.float64)}, {}, "targets: finite numbers"),
    "engine": ({}, {"engine": "liner"}, "did you mean 'linear'"),
    "route": ({}, {"route": "vamp"}, "did you mean 'vmap'"),
    "mode": ({}, {"mode": "evil"}, "did you mean 'eval'"),
    "outputs": ({}, {"outputs": "logit"}, "did you mean 'logits'"),
    "memory": ({}, {"max_memory": 1000}, "max_memory"),
    "memory vmap": ({}, {"max_memory": 9000, "route": "vmap", "chunk_size": 12}, "max_memory"),
    "memory linear": ({}, {"max_memory": 1000, "engine": "linear"}, "max_memory"),
    "loss shape": ({"loss": lambda output, label: output}, {}, "one number"),
    "loss detached": ({"loss": lambda output, label: output.detach().sum()}, {"route": "step"}, "depends on the model"),
    "loss nan": ({"loss": lambda output, label: output.sum() * float("nan")}, {}, "finite loss"),
    "loss nan vmap": ({"loss": lambda output, label: output.sum() * float("nan")}, {"route": "vmap"}, "finite loss"),
    "loss nan linear": (
        {"loss": lambda output, label: output.sum() * float("nan")},
        {"engine": "linear"},
        "finite loss",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    replaced, setting, words = BAD[case]
    model, loss_fn, x, y, targets = make()
    sources = replaced.get("sources", (x, replaced.get("labels", y)))
    with pytest.raises(InputError, match=words):
        measure(
            model, replaced.get("loss", loss_fn), sources, replaced.get("targets", targets), update=SGD(0.05), **setting
        )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(bad):
    model, loss_fn, x, y, _ = make()
    with torch.no_grad():
        model.out.weight[0, 0] = bad
    with pytest.raises(InputError, match=r"'out.weight'"):
        measure(model, loss_fn, (x, y), update=SGD(0.05))


def test_bad_models():
    model, loss_fn, x, y, _ = make()
    with pytest.raises(InputError, match="require gradients"):
        measure(model.requires_grad_(False), loss_fn, (x, y), update=SGD(0.05))
    with pytest.raises(InputError, match=r"torch\.nn\.Module"):
        measure(lambda x: x, loss_fn, (x, y), update=SGD(0.05))
    deep = nn.Sequential(nn.Linear(6, 6), nn.Unflatten(1, (2, 3))).double()
    with pytest.raises(InputError, match=r"\(batch, K\)"):
        measure(deep, loss_fn, (x, y), update=SGD(0.05))
    norm = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    with pytest.raises(InputError, match="BatchNorm"):
        measure(norm, loss_fn, (x, y), update=SGD(0.05), mode="train")
    assert measure(norm, loss_fn, (x, y), update=SGD(0.05)).change.any()
    with pytest.raises(InputError, match="mode='eval'"):
        measure(
            nn.Sequential(nn.Linear(6, 3)).double(), loss_fn, (x, y), update=SGD(0.05), mode="train", engine="linear"
        )


def test_labels_are_free_where_the_model_emits_values():
    torch.manual_seed(0)
    model, x = nn.Linear(6, 3).double(), torch.randn(5, 6, dtype=torch.float64)
    for labels in (torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 1, dtype=torch.float64).expand(5, 3)):
        assert measure(model, F.mse_loss, (x, labels), update=SGD(0.05), outputs="values").change.any()
