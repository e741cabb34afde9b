import copy
import math

import pytest
import torch
from torch import nn

import local_elasticity as le
from local_elasticity.base.errors import InputError
from local_elasticity.impact.kernel import kernel, kernel_diagonal
from local_elasticity.networks import MLP, SimpleConv


def jacobian(model, x):
    """Row by row, one backward pass a sample and output: the slow and obvious way."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for sample in x:
        outputs = model(sample[None]).reshape(-1)
        grads = [torch.autograd.grad(o, parameters, retain_graph=True, allow_unused=True) for o in outputs]
        rows.append(
            torch.stack(
                [
                    torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, one)])  # noqa: B905
                    for one in grads
                ]
            )
        )
    return torch.stack(rows)  # (n, K, weights)


class Bare(nn.Module):
    """A parameter that belongs to no layer, and a layer that is called twice."""

    def __init__(self):
        super().__init__()
        self.scale, self.layer, self.out = nn.Parameter(torch.randn(6)), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.out(torch.tanh(self.layer(torch.tanh(self.layer(x * self.scale)))))


class Scalar(nn.Module):
    """One number a sample, shape (batch,)."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x):
        return self.net(x).squeeze(1)


def attention():
    layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Unflatten(1, (1, 6)), layer, nn.Flatten(), nn.Linear(6, 2))


def conv():
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 3, 2, padding=1), nn.GroupNorm(1, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(36, 2),
    )  # fmt: skip


class Tied(nn.Module):
    """The same weight in two layers: linear layers alone, and yet not covered by their factors."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.out(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Functional(nn.Module):
    """A layer's weight used once more behind the layer's back."""

    def __init__(self):
        super().__init__()
        self.first, self.out = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.out(torch.tanh(self.first(x)) @ self.first.weight.T)


def in_place():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 2))


MODELS = {
    "tied": Tied,
    "functional": Functional,
    "in_place": in_place,
    "mlp": lambda: MLP(6, 3, depth=2, width=7),
    "linear": lambda: nn.Linear(6, 3),
    "scalar": Scalar,
    "bare": Bare,
    "attention": attention,
    "conv": conv,
}


@pytest.fixture(params=sorted(MODELS))
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param]().double().eval()


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_equals_the_product_of_jacobians(model, chunk_size):
    torch.manual_seed(1)
    x, y = torch.randn(7, 6).double(), torch.randn(4, 6).double()
    a, b = jacobian(model, x), jacobian(model, y)
    full = torch.einsum("xkp,ylp->xykl", a, b)
    torch.testing.assert_close(kernel(model, x, y, chunk_size=chunk_size), full, rtol=1e-10, atol=1e-10)
    trace = full.diagonal(dim1=2, dim2=3).sum(-1)
    torch.testing.assert_close(kernel(model, x, y, form="trace", chunk_size=chunk_size), trace, rtol=1e-10, atol=1e-10)
    last = full.shape[-1] - 1
    torch.testing.assert_close(kernel(model, x, y, form=last), full[:, :, last, last], rtol=1e-10, atol=1e-10)
    own = torch.einsum("xkp,xkp->xk", a, a)
    torch.testing.assert_close(kernel_diagonal(model, x, form="trace"), own.sum(1), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(kernel_diagonal(model, x, form=last), own[:, last], rtol=1e-10, atol=1e-10)


def test_is_symmetric_and_positive_semidefinite(model):
    x = torch.randn(9, 6, generator=torch.Generator().manual_seed(2)).double()
    blocks = kernel(model, x, chunk_size=4)
    assert torch.equal(blocks, blocks.permute(1, 0, 3, 2))
    n, k = blocks.shape[0], blocks.shape[2]
    values = torch.linalg.eigvalsh(blocks.permute(0, 2, 1, 3).reshape(n * k, n * k))
    assert float(values.min()) >= -1e-12 * float(values.max())
    assert float(values.max()) > 0


def test_on_images():
    torch.manual_seed(0)
    model = SimpleConv(3).double()
    x = torch.randn(3, 1, 32, 32).double()
    a = jacobian(model, x)
    torch.testing.assert_close(kernel(model, x), torch.einsum("xkp,ylp->xykl", a, a), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("activation", [nn.Identity, nn.ReLU])
def test_two_layer_closed_forms(biases, activation):
    """Spec srel 2.7: linear x^T(W^T W + |a|^2 I)x'; ReLU s(Wx).s(Wx') + (x.x') sum a_j^2 1[..]1[..]; biases add 1."""
    torch.manual_seed(3)
    first, last = nn.Linear(5, 40, bias=biases).double(), nn.Linear(40, 1, bias=biases).double()
    x, y = torch.randn(6, 5).double(), torch.randn(8, 5).double()
    w, a = first.weight.detach(), last.weight.detach()[0]
    shift = first.bias.detach() if biases else 0.0
    one = float(biases)
    pre_x, pre_y = x @ w.T + shift, y @ w.T + shift
    if activation is nn.Identity:
        hidden, gates = pre_x @ pre_y.T, a @ a
        if not biases:
            torch.testing.assert_close(hidden + (x @ y.T) * gates, x @ (w.T @ w + a @ a * torch.eye(5).double()) @ y.T)
    else:
        hidden = pre_x.relu() @ pre_y.relu().T
        gates = (pre_x > 0).double() @ (a[:, None] ** 2 * (pre_y > 0).double().T)
    expected = hidden + one + (x @ y.T + one) * gates
    model = nn.Sequential(first, activation(), last)
    torch.testing.assert_close(kernel(model, x, y, form=0), expected, rtol=1e-12, atol=1e-12)
    own_hidden = pre_x.square().sum(1) if activation is nn.Identity else pre_x.relu().square().sum(1)
    own_gates = a @ a if activation is nn.Identity else (pre_x > 0).double() @ a**2
    own = own_hidden + one + (x.square().sum(1) + one) * own_gates
    torch.testing.assert_close(le.s_rel_limit(model, x, y), expected.abs() / own[:, None], rtol=1e-12, atol=1e-12)


def test_dtype_measures_on_a_copy():
    torch.manual_seed(0)
    model = MLP(4, 2, depth=1, width=8)
    x = torch.randn(5, 4)
    exact = kernel(copy.deepcopy(model).double(), x.double())
    found = kernel(model, x, dtype=torch.float64)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)
    assert kernel(model, x).dtype == torch.float32
    assert next(model.parameters()).dtype == torch.float32


def test_frozen_parameters_take_no_part():
    torch.manual_seed(0)
    model = MLP(4, 2, depth=1, width=8).double()
    model.hidden.requires_grad_(False)
    x = torch.randn(5, 4).double()
    hidden = model.hidden(x)
    torch.testing.assert_close(kernel(model, x, form=1), hidden @ hidden.T + 1)


def test_leaves_the_model_as_it_is():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2))
    model(torch.randn(20, 4)).sum().backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    grads = [p.grad.clone() for p in model.parameters()]
    state = torch.get_rng_state()
    with torch.no_grad():
        kernel(model, torch.randn(5, 4, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(torch.equal(g, p.grad) for g, p in zip(grads, model.parameters(), strict=True))
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_bad_input():
    model, x = MLP(4, 3, depth=1, width=8), torch.randn(5, 4)
    for form in (3, -1, "ful", True):
        with pytest.raises(InputError, match="form 'full'"):
            kernel(model, x, form=form)
    with pytest.raises(InputError, match="max_memory"):
        kernel(model, x, max_memory=100)
    with pytest.raises(InputError, match="mode='eval'"):
        kernel(model, x, mode="train")
    with pytest.raises(InputError, match="at least one sample"):
        kernel(model, x[:0])
    with pytest.raises(InputError, match="finite"):
        kernel(model, x * math.nan)
    with pytest.raises(InputError, match="parameters"):
        kernel(nn.ReLU(), x)
