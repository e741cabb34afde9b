import functools

import pytest
import torch
from networks_under_test import NETWORKS, numbers
from torch import nn
from torch.nn import functional as F

from local_elasticity.base.errors import InputError
from local_elasticity.impact import measure
from local_elasticity.impact.pairs import products as contraction
from local_elasticity.impact.pairs.products import Contraction, contract, per_sample_gradients, unit_cotangents
from local_elasticity.impact.pairs.rules import RULES
from local_elasticity.impact.update import SGD, from_optimizer
from local_elasticity.networks import MLP

N, M = 4, 5


def make(name, n=N, m=M):
    torch.manual_seed(0)
    build, inputs, _ = NETWORKS[name]
    return build().double().eval(), inputs(n), inputs(m)


def jacobian(model, x):
    """(samples, outputs, numbers), one backward pass after the other: the slow twin."""
    chosen = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for sample in x.split(1):
        for value in model(sample).flatten():
            got = torch.autograd.grad(value, chosen, retain_graph=True, allow_unused=True)
            dense = [torch.zeros_like(p) if g is None else g for p, g in zip(chosen, got, strict=True)]
            rows.append(torch.cat([g.flatten() for g in dense]))
    return torch.stack(rows).unflatten(0, (len(x), -1))


def assert_close(one, other):
    assert float((one - other).norm()) <= 1e-10 * float(other.norm())
    assert other.norm() > 0


@pytest.mark.parametrize("name", NETWORKS)
def test_contraction_is_the_jacobian_product(name):
    model, x, y = make(name)
    jx, jy = jacobian(model, x), jacobian(model, y)
    k = jx.shape[1]
    u = torch.randn(N, k, dtype=torch.float64)
    v = unit_cotangents(M, k, u)
    expected = torch.einsum("nk,nkp,mcp->nmc", u, jx, jy)
    for chunk, block in ((None, 2**25), (3, 2**9), (1, 2**25)):
        prepared = Contraction(model, x, block_bytes=block)
        assert_close(contract(model, x, u, y, v, chunk_size=chunk, contraction=prepared), expected)
    units = unit_cotangents(N, k, u)
    assert_close(contract(model, x, u, x, units, chunk_size=2), torch.einsum("nk,nkp,mcp->nmc", u, jx, jx))
    kernel = contract(model, x, units, x, units, chunk_size=2)
    assert_close(kernel, torch.einsum("nkp,mcp->nkmc", jx, jx))
    assert_close(contract(model, x, u, x, u, chunk_size=2), torch.einsum("nk,nkp,mc,mcp->nm", u, jx, u, jx))
    flat = kernel.reshape(N * k, N * k)
    assert_close(flat, flat.T)
    assert float(torch.linalg.eigvalsh((flat + flat.T) / 2).min()) > -1e-12 * float(flat.norm())


@pytest.mark.parametrize("name", NETWORKS)
def test_who_falls_back(name):
    model, x, _ = make(name, n=9)
    prepared = Contraction(model, x)
    names = [key for key, p in model.named_parameters() if p.requires_grad]
    assert {names[i] for i in prepared.left_over} == NETWORKS[name][2]
    assert set(prepared.reasons) == set(prepared.left_over)
    if NETWORKS[name][2] != set(names):
        assert prepared.calls.total() > 0


@pytest.mark.parametrize("name", ["mlp", "convolutions", "vit", "gpt", "lstm", "bare", "positions"])
@pytest.mark.parametrize("form", ["pairs", "gradients"])
def test_both_forms_are_equal(name, form, monkeypatch):
    model, x, y = make(name)
    jx, jy = jacobian(model, x), jacobian(model, y)
    monkeypatch.setattr(contraction._Task, "_cheaper", lambda self: form)
    u, v = (torch.randn(len(j), j.shape[1], dtype=torch.float64) for j in (jx, jy))
    assert_close(contract(model, x, u, y, v), torch.einsum("nk,nkp,mc,mcp->nm", u, jx, v, jy))
    prepared = Contraction(model, x)
    units = unit_cotangents(N, jx.shape[1], u)
    whole, own = prepared.capture(x, units), torch.zeros(1, jx.shape[1], N, dtype=torch.float64)
    prepared.add_own(whole.combined(u.unsqueeze(1)), whole, own)
    prepared.add_left_over((x, u.unsqueeze(1)), (x, units), own, own=True)
    assert_close(own[0], torch.einsum("nk,nkp,ncp->cn", u, jx, jx))


def test_the_form_goes_by_the_operation_count():
    deep = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 2))
    for size, form in ((2, "pairs"), (16, "gradients")):
        x = torch.randn(40, 16, size, size)
        prepared = Contraction(deep, x)
        u = torch.randn(40, 2)
        contract(deep, x, u, x, u, contraction=prepared)
        assert prepared.forms[0] == form


def test_scales_multiply_each_parameter():
    model, x, y = make("mlp")
    scales = [float(i) for i in range(len(list(model.parameters())))]
    sizes = [torch.full((p.numel(),), s).double() for s, p in zip(scales, model.parameters(), strict=True)]
    jx, jy, u = jacobian(model, x), jacobian(model, y), torch.randn(N, 3, dtype=torch.float64)
    expected = torch.einsum("nk,nkp,p,mcp->nmc", u, jx, torch.cat(sizes), jy)
    assert_close(contract(model, x, u, y, unit_cotangents(M, 3, u), scales=scales), expected)


@pytest.mark.parametrize("name", ["mlp", "lstm"])
def test_per_sample_gradients_by_vmap_and_one_by_one(name):
    model, x, _ = make(name)
    j = jacobian(model, x)
    units = unit_cotangents(N, j.shape[1], j)
    assert_close(per_sample_gradients(model, list(model.parameters()), x, units), j)


UPDATES = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "decay": lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, dampening=0.3, weight_decay=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "groups": lambda p: torch.optim.SGD([{"params": p[:2], "lr": 0.5}, {"params": p[3:]}], lr=0.05, momentum=0.9),
}


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize(("network", "name"), [*(("mlp", name) for name in UPDATES), ("vit", "momentum")])
def test_contract_and_jvp_agree_for_every_affine_update(network, name, started):
    model, x, targets = make(network)
    targets = torch.cat([targets, x[[3, 0]]])  # some sources are targets, some are not
    y = torch.arange(N) % 3
    optimizer = UPDATES[name](list(model.parameters()))
    if started:
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        optimizer.zero_grad()
    update = from_optimizer(optimizer)
    for where in (targets, None):
        one, other = (
            measure(model, F.cross_entropy, (x, y), where, update=update, engine="linear", route=route)
            for route in ("contract", "jvp")
        )
        assert_close(one.change, other.change)
        assert_close(one.source_change, other.source_change)
        assert_close(one.losses, other.losses)
        assert one.linearization_error == pytest.approx(other.linearization_error, rel=1e-6)
    assert set(one.plan.ways) == {key for key, _ in model.named_parameters()}
    if network == "vit":
        assert one.plan.ways["cls"].startswith("fallback: ")


def test_a_live_copy_of_sgd_on_converted_weights():
    model, x, _ = make("mlp")
    model, optimizer = model.float(), None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    F.cross_entropy(model(x.float()), torch.arange(N) % 3).backward()
    optimizer.step()
    routes = [
        measure(model, F.cross_entropy, (x.float(), torch.arange(N) % 3), update=from_optimizer(optimizer),
                engine="linear", route=route, dtype=torch.float64)
        for route in ("contract", "jvp")
    ]  # fmt: skip
    assert_close(routes[0].change, routes[1].change)


def test_finite_step_converges_at_first_order():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)).double()
    x, y = torch.randn(6, 6, dtype=torch.float64), torch.arange(6) % 3
    rates, errors = torch.tensor([1e-2, 1e-3, 1e-4, 1e-5], dtype=torch.float64), []
    for rate in rates.tolist():
        finite, linear = (
            measure(model, F.cross_entropy, (x, y), update=SGD(rate), engine=engine).change / rate
            for engine in ("replay", "linear")
        )
        errors.append((finite - linear).norm() / linear.norm())
    slopes = (torch.stack(errors).log().diff() / rates.log().diff()).tolist()
    assert all(abs(slope - 1) < 0.1 for slope in slopes), slopes


def test_two_layer_closed_form():
    """ReLU with biases (spec srel 2.7): K = s(z).s(z') + 1 + (x.x' + 1) sum a_j^2 1[z_j > 0] 1[z'_j > 0]."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 50), nn.ReLU(), nn.Linear(50, 1)).double()
    x = torch.randn(7, 4, dtype=torch.float64)
    units = unit_cotangents(7, 1, x)
    kernel = contract(net, x, units, x, units)[:, 0, :, 0]
    z, a = net[0](x).detach(), net[2].weight.detach()[0]
    gates = ((z > 0).double() * a**2) @ (z > 0).double().T
    assert_close(kernel, z.relu() @ z.relu().T + 1 + (x @ x.T + 1) * gates)


def test_autos_choice():
    torch.manual_seed(0)
    model = MLP(6, 3, depth=1, width=8).double()
    x, y = torch.randn(40, 6, dtype=torch.float64), torch.arange(40) % 3

    def plan(**setting):
        return measure(model, F.cross_entropy, (x, y), **{"update": SGD(1e-4), **setting}).plan

    small = plan()
    assert small.engine == "linear"
    assert any(note.startswith("engine auto: linear (first order is off by") for note in small.notes)
    cases = [
        ({"update": SGD(5.0)}, "more than 0.01"),
        ({"check_pairs": 0}, "check_pairs=0"),
        ({"update": from_optimizer(torch.optim.Adam(model.parameters()))}, "not affine"),
        ({"route": "step"}, "'step' was asked"),
        ({"mode": "train"}, "train mode"),
    ]
    for setting, words in cases:
        model.train(False)
        found = plan(**setting)
        assert found.engine == "replay"
        assert any("engine auto: replay" in note and words in note for note in found.notes), found.notes
    model.train(False)
    wide = MLP(6, 200, depth=1, width=8).double()  # 200 outputs to capture at each of 40 targets
    notes = measure(wide, F.cross_entropy, (x, y), update=SGD(1e-4)).plan.notes
    assert any("captures cost 16,040 passes, replaying 2,880" in note for note in notes), notes
    tiny = measure(model.float(), F.cross_entropy, (x.float(), y), update=SGD(1e-9)).plan
    assert any("lost in rounding" in note for note in tiny.notes)


class Mixing(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(6, 3)

    def forward(self, x):
        return self.out(x - x.mean(0))


class Detached(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(6, 3)

    def forward(self, x):
        return self.out(x).detach()


def test_bad_input():
    x, y = numbers(6)(20), torch.arange(20) % 3
    with pytest.raises(InputError, match="do not depend on the other samples"):
        measure(Mixing().double(), F.cross_entropy, (x, y), update=SGD(0.1), engine="linear")
    for bad in (Detached(), nn.Sequential(nn.Linear(6, 3), nn.Flatten()).requires_grad_(True)):
        if isinstance(bad, Detached):
            with pytest.raises(InputError, match="gradient"):
                Contraction(bad.double(), x)
    model = MLP(6, 3).double()
    with pytest.raises(InputError, match="max_memory"):
        measure(model, F.cross_entropy, (x, y), update=SGD(0.1), engine="linear", max_memory=50_000)
    adam = from_optimizer(torch.optim.Adam(model.parameters()))
    with pytest.raises(InputError, match="not affine"):
        measure(model, F.cross_entropy, (x, y), update=adam, engine="linear", route="contract")
    assert measure(model, F.cross_entropy, (x, y), update=adam, engine="linear").plan.route == "jvp"
    with pytest.raises(InputError, match="route: one of 'contract', 'jvp'"):
        measure(model, F.cross_entropy, (x, y), update=SGD(0.1), engine="linear", route="vmap")


def test_a_loss_that_reads_the_weights():
    model, x, _ = make("mlp")

    def penalised(output, label, by_label=False):
        penalty = sum((p**2).sum() for p in model.parameters())
        return F.cross_entropy(output, label) + penalty * (label.sum() if by_label else 1)

    y, slow = torch.arange(N) % 3, {"update": SGD(0.1), "engine": "linear", "route": "jvp"}
    impact = measure(model, penalised, (x, y), update=SGD(0.1), engine="linear")
    assert impact.plan.route == "contract"
    assert any("a term of the loss on the weights" in note for note in impact.plan.notes)
    assert_close(impact.change, measure(model, penalised, (x, y), **slow).change)
    scaled = functools.partial(penalised, by_label=True)
    impact = measure(model, scaled, (x, y), update=SGD(0.1), engine="linear")
    assert impact.plan.route == "jvp"  # the term is another at every label
    assert_close(impact.change, measure(model, scaled, (x, y), **slow).change)


def test_memory_limit_is_obeyed_and_changes_nothing():
    model, x, y = make("simple-conv", 10, 12)
    labels = torch.arange(10) % 3
    settings = {"update": SGD(0.1), "engine": "linear", "route": "contract"}  # the only one whose chunks may be large
    whole = measure(model, F.cross_entropy, (x, labels), y, **settings)
    tight = measure(model, F.cross_entropy, (x, labels), y, **settings, max_memory=4_000_000)
    assert tight.plan.chunk_size < whole.plan.chunk_size
    assert tight.plan.estimated_bytes <= 4_000_000
    assert_close(tight.change, whole.change)


class Broken(Exception):
    pass


def test_nothing_is_left_behind_after_an_exception():
    model, x, _ = make("vit")
    fused = torch.backends.mha.get_fastpath_enabled()
    calls = []

    def fail(module, arguments, output):
        calls.append(torch.overrides._len_torch_function_stack())
        if len(calls) == 4:
            raise Broken

    handle = model.out.register_forward_hook(fail)
    attributes = [sorted(vars(m)) for m in model.modules()]
    with pytest.raises(Broken):
        Contraction(model, x)
    handle.remove()
    assert max(calls) == 1  # inside, the calls are watched
    assert torch.overrides._len_torch_function_stack() == 0
    assert torch.backends.mha.get_fastpath_enabled() == fused
    assert [sorted(vars(m)) for m in model.modules()] == attributes
    assert all(not m._forward_hooks and not m._backward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.filterwarnings("ignore")
def test_compiled_models():
    model, x, y = make("mlp")
    compiled = torch.compile(model, backend="eager")
    labels = torch.arange(N) % 3
    expected = measure(model, F.cross_entropy, (x, labels), y, update=SGD(0.1), engine="linear")
    compiled(x)
    impact = measure(compiled, F.cross_entropy, (x, labels), y, update=SGD(0.1), engine="linear", route="contract")
    assert_close(impact.change, expected.change)
    assert impact.plan.ways["_orig_mod.out.weight"].startswith("rule")


def test_a_rule_is_one_function():
    """A user's own rule: without it the parameter falls back, with it not, and the numbers are the same."""
    from local_elasticity.impact.pairs.rules import Direct, rule

    class Sine(nn.Module):
        def __init__(self):
            super().__init__()
            self.frequency, self.out = nn.Parameter(torch.randn(6).double()), nn.Linear(6, 3).double()

        def forward(self, x):
            return self.out(torch.atan2(x, self.frequency))

    model, x = Sine(), numbers(6)(N)
    units = unit_cotangents(N, 3, x)
    plain = contract(model, x, units, x, units)
    assert Contraction(model, x).left_over == [0]

    @rule(torch.atan2)
    def atan2(call, input, other):
        slope = -input / (input**2 + other**2)
        yield Direct(other, lambda g: g * slope)

    try:
        assert Contraction(model, x).left_over == []
        assert_close(contract(model, x, units, x, units), plain)
    finally:
        del RULES[torch.atan2]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", ["mlp", "convolutions", "vit"])
def test_on_cuda(name):
    model, x, y = make(name)
    labels = torch.arange(N) % 3
    expected = measure(model, F.cross_entropy, (x, labels), y, update=SGD(0.1), engine="linear")
    impact = measure(
        model.cuda(), F.cross_entropy, (x.cuda(), labels.cuda()), y.cuda(), update=SGD(0.1), engine="linear"
    )
    assert_close(impact.change.cpu(), expected.change)
