"""Float32 in float32 during a measurement on CUDA, and everything as it was afterwards."""

import contextlib
import os
import traceback
import warnings

import pytest
import torch
import torch.nn.functional as F

from local_elasticity.base.arithmetic import exact_float32, has_new_switches
from local_elasticity.impact import measure
from local_elasticity.impact.update import SGD

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that copy themselves (no Windows)")
CALLERS = {
    "nothing": "",
    "high": "torch.set_float32_matmul_precision('high')",
    "medium": "torch.set_float32_matmul_precision('medium')",
    "products in TF32": "torch.backends.cuda.matmul.allow_tf32 = True",
    "convolutions exact": "cudnn.allow_tf32 = False",
    "algorithms chosen by time": "cudnn.benchmark = True",
}
if has_new_switches():
    CALLERS |= {
        "newer: products in TF32": "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
        "newer: convolutions exact": "cudnn.conv.fp32_precision = 'ieee'",
        "newer: convolutions in TF32": "cudnn.conv.fp32_precision = 'tf32'",
        "newer: all in TF32": "torch.backends.fp32_precision = 'tf32'",
        "newer: all exact": "torch.backends.fp32_precision = 'ieee'",
        "newer: CUDA in TF32": "cudnn.fp32_precision = 'tf32'",
        "both": "torch.set_float32_matmul_precision('high'); torch.backends.mkldnn.matmul.fp32_precision = 'ieee'",
    }
LATER = {"nothing": ""}
if has_new_switches():
    LATER |= {
        "all in TF32": "torch.backends.fp32_precision = 'tf32'",
        "all exact": "torch.backends.fp32_precision = 'ieee'",
    }


def found():
    """Every switch; None where torch refuses to say because an older and a newer one contradict each other."""
    cudnn, matmul, mkldnn = torch.backends.cudnn, torch.backends.cuda.matmul, torch.backends.mkldnn
    readers = {
        "benchmark": lambda: cudnn.benchmark,
        "deterministic": lambda: cudnn.deterministic,
        "older convolutions": lambda: cudnn.allow_tf32,
        "older products": lambda: matmul.allow_tf32,
        "precision": torch.get_float32_matmul_precision,
    }
    if has_new_switches():
        parts = {"root": torch.backends, "cuda": cudnn, "conv": cudnn.conv, "matmul": matmul, "cpu": mkldnn.matmul}
        for name, part in parts.items():
            readers[name] = lambda part=part: part.fp32_precision
    values = {}
    for name, read in readers.items():
        try:
            values[name] = read()
        except RuntimeError:
            values[name] = None
    return values


def in_a_child(work):
    """What some work returns in a copy of this process: not every switch can be set back."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            answer = repr(work())
        except BaseException:
            answer = traceback.format_exc()
        os.write(writing, answer.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    assert "Traceback" not in answer, answer
    return answer


def set_and_measured(caller, later, measured):
    """Switches at the end: set by the caller, measured under, set again."""
    names = {"torch": torch, "cudnn": torch.backends.cudnn}
    warnings.simplefilter("ignore")
    exec(CALLERS[caller], names)
    before = found()
    if measured:
        with contextlib.suppress(ZeroDivisionError), exact_float32():
            check(found(), before, older="newer" not in caller)
            _ = 1 / 0
        assert found() == before
    exec(LATER[later], names)
    return found()


def check(inside, before, older):
    assert inside["benchmark"] is False
    assert inside["deterministic"] is True
    if "conv" in inside:
        assert inside["conv"] == "ieee" or inside["older convolutions"] is False
        assert inside["matmul"] in ("ieee", "none")
    else:
        assert not inside["older convolutions"]
        assert not inside["older products"]
    if older:  # the model's own code may read what it could read before
        assert [name for name in before if before[name] is not None and inside[name] is None] == []


@pytest.mark.parametrize("caller", CALLERS)
def test_settings_are_exact_inside_and_the_callers_afterwards(caller):
    in_a_child(lambda: set_and_measured(caller, "nothing", True))


@pytest.mark.parametrize("caller", [name for name in CALLERS if "newer: all" in name or "newer: CUDA" in name])
@pytest.mark.parametrize("later", [name for name in LATER if name != "nothing"])
def test_what_the_caller_sets_later_reaches_what_it_would_have_reached(caller, later):
    measured, not_measured = (in_a_child(lambda m=m: set_and_measured(caller, later, m)) for m in (True, False))
    assert measured == not_measured


def test_recurrent_layers_go_without_cudnn():
    with exact_float32(recurrent=True):
        assert not torch.backends.cudnn.enabled
    assert torch.backends.cudnn.enabled
    with exact_float32():
        assert torch.backends.cudnn.enabled
        with torch.backends.cudnn.flags(enabled=False):  # as some models and losses do
            assert not torch.backends.cudnn.enabled


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_small_steps_of_convolutions_keep_their_digits():
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 32, 3), torch.nn.ReLU(), torch.nn.Conv2d(32, 32, 3), torch.nn.Flatten()]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(32 * 12 * 12, 3)).cuda()
    x, y = torch.randn(12, 3, 16, 16, device="cuda"), torch.arange(12, device="cuda") % 3
    exact = measure(model, F.cross_entropy, (x, y), update=SGD(1e-3), dtype=torch.float64, engine="replay")
    ours = measure(model, F.cross_entropy, (x, y), update=SGD(1e-3), engine="replay")
    error = (ours.change.double() - exact.change).norm() / exact.change.norm()
    assert error < 1e-4  # in TF32 it is of order one hundredth
