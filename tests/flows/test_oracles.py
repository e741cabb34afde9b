"""The same problem as a network, trained by small SGD steps and measured, must follow the closed form."""

import numpy as np
import pytest
import torch

import local_elasticity as le
from local_elasticity import flows
from local_elasticity.studies.dan2023.flows import exact, measured, problems, trained

PROBLEMS = problems(6)
T, STEPS = 0.8, (0.02, 0.01)
CONSTANT = ("linear regression", "diagonal, d = 1", "ReLU gate, population", "ReLU gate, glmtron")


@pytest.mark.parametrize("name", PROBLEMS)
def test_training_follows_the_flow_at_order_one(name):
    problem = PROBLEMS[name]
    twins = [trained(problem, step, T) for step in STEPS]
    weights = np.ravel(problem.flow.weights(T))
    off = []
    for twin in twins:
        found = torch.cat([p.detach().flatten() for p in twin.parameters()]).numpy()
        off.append(np.abs(found - weights[: len(found)]).max())
    assert off[1] < 0.03
    assert np.log2(off[0] / off[1]) == pytest.approx(1, abs=0.1)

    formula = exact(problem, T)
    for engine in ("replay", "linear"):
        errors = [np.nanmedian(np.abs(measured(problem, twin, engine) - formula)) for twin in twins]
        if name in CONSTANT:  # S_rel does not depend on the path
            assert max(errors) < 1e-7
        else:
            assert errors[1] < 0.02
            assert np.log2(errors[0] / errors[1]) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("name", [name for name in PROBLEMS if "softmax" not in name])
def test_jacobian_products_equal_the_small_step_form(name):
    problem = PROBLEMS[name]
    formula, found = exact(problem, 0.0), measured(problem, problem.model(), "linear", probe_lr=1e-9)
    closed = np.isnan(formula)
    np.testing.assert_allclose(found[~closed], formula[~closed], rtol=1e-10, atol=1e-12)
    assert np.isnan(found[closed]).all()


@pytest.mark.parametrize("definition", ["l2", "kl"])
def test_jacobian_products_equal_the_softmax_forms(definition):
    problem = PROBLEMS[f"softmax layer, {definition}"]
    impact = le.measure(
        problem.model(),
        torch.nn.functional.cross_entropy,
        sources=(torch.from_numpy(problem.x), torch.from_numpy(problem.label_of)),
        targets=torch.from_numpy(problem.x_prime),
        update=le.SGD(lr=1.0),
        engine="linear",
        check_pairs=0,
    )

    def moved(logits, change):
        p = torch.softmax(logits, -1)
        tilted = p * (change - (p * change).sum(-1, keepdim=True))  # (diag(p) - p p^T) change
        return tilted.norm(dim=-1) if definition == "l2" else (change * tilted).sum(-1)

    found = moved(impact.before, impact.change) / moved(impact.source_before, impact.source_change)[:, None]
    np.testing.assert_allclose(found.numpy(), exact(problem, 0.0), rtol=1e-10)


@pytest.mark.parametrize("activation", ["relu", "linear"])
@pytest.mark.parametrize("biased", [True, False])
def test_two_layer_kernels_equal_autograd(activation, biased):
    torch.manual_seed(3)
    first, second = torch.nn.Linear(4, 7, bias=biased), torch.nn.Linear(7, 1, bias=biased)
    act = torch.nn.ReLU() if activation == "relu" else torch.nn.Identity()
    model = torch.nn.Sequential(first, act, second).double()
    x, x_prime = torch.randn(5, 4).double(), torch.randn(5, 4).double()

    def gradient(z):
        return torch.cat([g.flatten() for g in torch.autograd.grad(model(z[None])[0, 0], list(model.parameters()))])

    expected = np.array([[float(gradient(a) @ gradient(b)) for b in x_prime] for a in x])
    numbers = [p.detach().numpy() for p in (first.weight, second.weight[0])]
    bias = first.bias.detach().numpy() if biased else None
    ntk = flows.TwoLayerNTK(*numbers, bias, 0.3 if biased else 0.0, activation=activation)
    found = ntk.kernel(x.numpy()[:, None], x_prime.numpy()[None])
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    impact = le.measure(
        model,
        torch.nn.functional.mse_loss,
        sources=(x, torch.zeros(5, 1).double()),
        targets=x_prime,
        update=le.SGD(lr=1e-6),
        engine="linear",
        outputs="values",
        check_pairs=0,
    )
    np.testing.assert_allclose(
        ntk.s_rel(0.0, x.numpy()[:, None], x_prime.numpy()[None]), le.s_rel(impact, "he_su").numpy(), rtol=1e-10
    )
