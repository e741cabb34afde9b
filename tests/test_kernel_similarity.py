import pytest
import torch
from torch import nn

import local_elasticity as le
from local_elasticity.base.errors import InputError
from local_elasticity.networks import MLP
from local_elasticity.similarity.kernels import loss_function, normalised, relative, s_ker_of, symmetrised


def smooth(sigmoid=False):
    torch.manual_seed(0)
    layers = [nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 1)]
    return nn.Sequential(*layers, *([nn.Sigmoid()] if sigmoid else [])).double()


X = torch.randn(7, 4, generator=torch.Generator().manual_seed(1)).double()
Y = torch.randn(5, 4, generator=torch.Generator().manual_seed(2)).double()
LABELS = (torch.arange(7) % 2).double()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("lr", [None, 1e-3, 1.0])
def test_linear_models_have_the_geometry_of_the_inputs(bias, lr):
    """S_rel = |x.x'| / ||x||^2 for any step size; a bias adds 1 to each product (spec srel 2.1)."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1, bias=bias).double()
    expected = (X @ Y.T + bias).abs() / (X.square().sum(1) + bias)[:, None]
    if lr is None:
        found = le.s_rel_limit(model, X, Y)
    else:
        impact = le.measure(
            model, loss_function("mse"), (X, LABELS), Y, update=le.SGD(lr), outputs="values", check_pairs=0
        )
        found = le.s_rel(impact, "he_su")
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("loss", ["mse", "bce"])
def test_finite_steps_converge_to_the_limit_at_first_order(loss):
    """The error of S_rel and of S_ker falls like the step size, with the factor p(1 - p) where p is a probability."""
    model = smooth(sigmoid=loss == "bce")
    exact_rel, exact_ker = le.s_rel_limit(model, X, Y), le.s_ker(model, X, Y)
    slope = le.ripple(model, loss_function(loss), (X, LABELS), Y).slope[:, 0]
    errors = []
    for lr in (1e-2, 1e-3, 1e-4):
        impact = le.measure(
            model, loss_function(loss), (X, LABELS), Y, update=le.SGD(lr), outputs="values", check_pairs=0
        )
        kernelised = -impact.change[:, :, 0] / (lr * slope[:, None])
        errors.append([
            float((le.s_rel(impact, "he_su") - exact_rel).norm()), float((kernelised - exact_ker).norm()),
        ])  # fmt: skip
    errors = torch.tensor(errors)
    orders = (errors[:-1] / errors[1:]).log10()
    assert ((orders > 0.9) & (orders < 1.1)).all(), orders


def test_of_logits_is_of_the_sigmoid():
    logits = smooth()
    probabilities = nn.Sequential(logits, nn.Sigmoid())
    for xt in (None, Y):
        for function, extra in ((le.s_rel_limit, {}), (le.s_ker, {}), (le.s_ker, {"normalise": True})):
            torch.testing.assert_close(
                function(logits, X, xt, outputs="logits", **extra), function(probabilities, X, xt, **extra)
            )
    assert not torch.allclose(le.s_rel_limit(logits, X), le.s_rel_limit(logits, X, outputs="logits"))


def test_of_logits_survives_saturation():
    """p(1 - p) of a logit of 60 is e^-60, not 0."""
    model = nn.Linear(1, 1)
    with torch.no_grad():
        model.weight.fill_(1.0)
        model.bias.zero_()
    x = torch.tensor([[60.0], [61.0]])
    found = le.s_rel_limit(model, x, outputs="logits")[0, 1]
    torch.testing.assert_close(found, torch.tensor((60 * 61 + 1) / 3601 * 2.718281828**-1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("loss", ["mse", "bce"])
def test_published_form_is_near_the_limit_where_steps_are_visible(loss):
    """In float64 the smallest visible step is the first one tried, 1e-6, and its error is of that order."""
    model = smooth(sigmoid=loss == "bce")
    halved = 0.5 if loss == "bce" else 1.0
    published = le.s_ker(model, X, Y, form="published", labels=LABELS, loss=loss)
    torch.testing.assert_close(published, halved * le.s_ker(model, X, Y), rtol=1e-3, atol=1e-5)
    symmetric = le.s_ker(model, X, form="published", labels=LABELS, loss=loss, symmetrise=True, normalise=True)
    assert torch.equal(symmetric, symmetric.T)
    torch.testing.assert_close(symmetric, le.s_ker(model, X, normalise=True), rtol=1e-3, atol=1e-4)


def test_ripple_takes_the_first_visible_step():
    """Against the plain loop: restore, step, look, triple the rate."""
    torch.manual_seed(5)
    model = MLP(4, 1, depth=1, width=50)
    x = X.float()
    with torch.no_grad():
        before = model(x)
    y = before[:, 0] + 10.0 ** -torch.arange(7)  # residuals so small that float32 hides the first steps
    looked = le.ripple(model, loss_function("mse"), (x, y))
    for source in range(len(x)):
        lr = 1e-6
        while True:
            stepped = MLP(4, 1, depth=1, width=50)
            stepped.load_state_dict(model.state_dict())
            torch.nn.functional.mse_loss(stepped(x[source : source + 1]).flatten(), y[source : source + 1]).backward()
            torch.optim.SGD(stepped.parameters(), lr=lr).step()
            with torch.no_grad():
                after = stepped(x)
            if not torch.equal(after[source], before[source]):
                break
            lr *= 3
        assert float(looked.lr[source]) == pytest.approx(lr)
        torch.testing.assert_close(looked.after[source], after, rtol=0, atol=0)
    assert looked.moved.all()
    assert float(looked.lr.max()) > 1e-6, "float32 hides the first step of some source here"
    assert torch.equal(looked.change, looked.after - looked.before)
    torch.testing.assert_close(looked.slope[:, 0], 2 * (before[:, 0] - y))


def test_ripple_says_which_sources_no_step_moves():
    """A unit that is dead at one source: neither its output nor anything else moves there."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU())
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    x, y = torch.tensor([[1.0], [-1.0]]), torch.tensor([0.0, 1.0])
    looked = le.ripple(model, loss_function("mse"), (x, y))
    assert looked.moved.tolist() == [True, False]
    assert looked.lr.isnan().tolist() == [False, True]
    similarity = le.s_rel(looked, "he_su")
    assert similarity[1].isnan().all()
    assert similarity[0].isfinite().all()
    assert s_ker_of(looked)[1].isnan().all()
    assert le.s_rel_limit(model, x)[1].isnan().all()


def test_ripple_leaves_the_model_as_it_is():
    model = smooth()
    before = [p.detach().clone() for p in model.parameters()]
    le.ripple(model, loss_function("mse"), (X, LABELS), Y)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_functions_of_a_kernel():
    k = torch.tensor([[4.0, -2.0], [1.0, 1.0]])
    assert relative(k).tolist() == [[1.0, 0.5], [1.0, 1.0]]
    assert relative(k, slopes=torch.tensor([1.0, 0.5])).tolist() == [[1.0, 0.25], [2.0, 1.0]]
    assert normalised(k).tolist() == [[1.0, -1.0], [0.5, 1.0]]
    assert symmetrised(k).tolist() == [[4.0, -0.5], [-0.5, 1.0]]
    assert relative(torch.zeros(2, 2)).isnan().all()
    assert normalised(torch.tensor([[-1.0, 0.0], [0.0, 1.0]]))[0].isnan().all()


def test_normalised_kernel_is_a_cosine():
    cosine = le.s_ker(smooth(), X, normalise=True)
    torch.testing.assert_close(cosine.diagonal(), torch.ones(7).double())
    assert float(cosine.abs().max()) <= 1 + 1e-12
    torch.testing.assert_close(le.s_ker(smooth(), X, X.clone(), normalise=True), cosine)


def test_several_outputs_take_the_trace_or_one():
    torch.manual_seed(0)
    model = MLP(4, 3, depth=1, width=8).double()
    blocks = le.kernel(model, X)
    torch.testing.assert_close(le.s_ker(model, X), blocks.diagonal(dim1=2, dim2=3).sum(-1))
    torch.testing.assert_close(le.s_rel_limit(model, X, Y, output=2), le.s_rel_limit(model, X, output=2).new_tensor(
        (le.kernel(model, X, Y)[:, :, 2, 2].abs() / blocks[:, :, 2, 2].diagonal()[:, None]).tolist()
    ))  # fmt: skip


def test_bad_input():
    model = smooth()
    with pytest.raises(InputError, match="labels"):
        le.s_ker(model, X, form="published")
    with pytest.raises(InputError, match="loss: one of"):
        le.s_ker(model, X, form="published", labels=LABELS, loss="hinge")
    with pytest.raises(InputError, match="Sigmoid"):
        le.s_ker(model, X, form="published", labels=LABELS, loss="bce", outputs="logits")
    with pytest.raises(InputError, match="leave out xt"):
        le.s_ker(model, X, Y, symmetrise=True)
    with pytest.raises(InputError, match="one logit"):
        le.s_rel_limit(MLP(4, 3).double(), X, outputs="logits")
    with pytest.raises(InputError, match="outputs: one of"):
        le.s_rel_limit(model, X, outputs="logit")
    looked = le.ripple(MLP(4, 3).double(), nn.CrossEntropyLoss(), (X, LABELS.long()))
    with pytest.raises(InputError, match="one output"):
        s_ker_of(looked)
    saturated = nn.Sequential(nn.Linear(4, 1), nn.Sigmoid())
    with torch.no_grad():
        saturated[0].bias.fill_(200.0)
    with pytest.raises(InputError, match="derivative"):
        le.ripple(saturated, lambda f, y: (1 - f).sqrt().sum(), (X.float(), LABELS.float()))
