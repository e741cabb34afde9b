"""Float32 in float32 during a measurement on CUDA, and everything as it was afterwards."""

import pytest
import torch
import torch.nn.functional as F

from local_elasticity.impact import measure
from local_elasticity.impact.arithmetic import exact_float32
from local_elasticity.updates import SGD

cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
NEW = hasattr(matmul, "fp32_precision")
SETTINGS = [(cudnn, "allow_tf32"), (matmul, "allow_tf32"), (cudnn, "benchmark"), (cudnn, "deterministic")]
SETTINGS += [(part, "fp32_precision") for part in ((cudnn.conv, cudnn.rnn, matmul) if NEW else ())]


def found():
    values = []
    for part, name in SETTINGS:
        try:
            values.append(getattr(part, name))
        except RuntimeError:  # torch refuses where the older and the newer setting contradict each other
            values.append("contradiction")
    return values


@pytest.fixture(autouse=True)
def restored():
    """Every setting as it was before the test, the newer ones last."""
    before = list(zip(SETTINGS, found(), strict=True))
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)
    for (part, name), value in before:
        setattr(part, name, value)
    assert found() == [value for _, value in before]


CALLERS = {
    "nothing set": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "matmul in TF32": lambda: setattr(matmul, "allow_tf32", True),
    "convolutions exact": lambda: setattr(cudnn, "allow_tf32", False),
    "algorithms chosen by time": lambda: setattr(cudnn, "benchmark", True),
}
if NEW:
    CALLERS["newer: matmul in TF32"] = lambda: setattr(matmul, "fp32_precision", "tf32")
    CALLERS["newer: convolutions exact"] = lambda: setattr(cudnn.conv, "fp32_precision", "ieee")


@pytest.mark.parametrize("caller", CALLERS)
def test_settings_are_exact_inside_and_the_callers_afterwards(caller):
    CALLERS[caller]()
    before = found()
    with exact_float32():
        assert "contradiction" in before or found()[:2] == [False, False]
        assert found()[2:] == [False, True, *["ieee"] * (len(SETTINGS) - 4)]
    assert found() == before
    with exact_float32(recurrent=True):
        assert not cudnn.enabled
    assert cudnn.enabled
    assert found() == before
    with pytest.raises(ZeroDivisionError), exact_float32():
        _ = 1 / 0
    assert found() == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_small_steps_of_convolutions_keep_their_digits():
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 32, 3), torch.nn.ReLU(), torch.nn.Conv2d(32, 32, 3), torch.nn.Flatten()]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(32 * 12 * 12, 3)).cuda()
    x, y = torch.randn(12, 3, 16, 16, device="cuda"), torch.arange(12, device="cuda") % 3
    torch.set_float32_matmul_precision("high")
    exact = measure(model, F.cross_entropy, (x, y), update=SGD(1e-3), dtype=torch.float64, engine="replay")
    ours = measure(model, F.cross_entropy, (x, y), update=SGD(1e-3), engine="replay")
    error = (ours.change.double() - exact.change).norm() / exact.change.norm()
    assert error < 1e-4  # in TF32 it is of order one hundredth
    assert torch.get_float32_matmul_precision() == "high"
