"""The simulate command and its expressions."""

import json

import numpy as np
import pytest

import local_elasticity as le
from local_elasticity.cli import main
from local_elasticity.lesde.expressions import parse


def test_expressions_are_arithmetic():
    t = np.linspace(0, 3, 7)
    assert np.allclose(parse("0.02*exp(-t/2000)")(t), 0.02 * np.exp(-t / 2000))
    assert np.allclose(parse("-max(t, 1)**2 + sqrt(t)/pi - e")(t), -(np.maximum(t, 1) ** 2) + np.sqrt(t) / np.pi - np.e)
    assert parse("-0.002")(t).shape == t.shape


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "t.__class__",
        "(lambda: 1)()",
        "[t for t in (1,)]",
        "open('x')",
        "t if t else 1",
        "'a'*3",
        "True",
        "1j",
        "exp(t, t)",
        "exp(x=t)",
        "x + 1",
        "t[0]",
        "",
        "1 +",
        "t < 1",
        "f'{t}'",
        "9" * 400,
        "-" * 600 + "1",
    ],
)
def test_anything_else_is_refused(text):
    with pytest.raises(le.InputError, match="arithmetic"):
        parse(text, "alpha")


def test_powers_do_not_hang():
    assert np.isinf(parse("9**9**9**9")(0.0))


COMMAND = ["simulate", "--beta", "-0.01", "--steps", "300"]
ALPHA = ["--alpha", "0.05*exp(-t/200)"]
SMALL = ["--samples-per-class", "12", "--paths", "9", "--save", "11", "--separability-paths", "4"]


def run(*arguments):
    with pytest.raises(SystemExit) as status:
        main([*COMMAND, *SMALL, *arguments])
    return status.value.code


@pytest.mark.exhaustive
def test_simulate_writes_what_it_says(tmp_path, capsys):
    out = tmp_path / "sde"
    assert run(*ALPHA, "--out", str(out)) == 0
    shown = capsys.readouterr().out
    assert "limit:" in shown
    assert "about" in shown
    with np.load(out / "simulation.npz") as file:
        assert file["class_means"].shape == (9, 11, 3, 3)
        assert file["t"][-1] == 300
        a = 0.05 * 200 * (1 - np.exp(-300 / 200))
        assert file["A"][-1] == pytest.approx(a)
        assert file["B"][-1] == pytest.approx(-3)
        z = (file["class_means"].mean(axis=0) - file["mean"])[1:] / (file["standard_deviation"][1:] / 3)
        assert np.abs(z).max() < 5
    numbers = json.loads((out / "numbers.json").read_text())
    assert 0 <= numbers["separable_at_end"] <= 1
    assert json.loads((out / "config.json").read_text())["alpha"] == "0.05*exp(-t/200)"
    for name in ("paths", "separability"):
        assert (out / "figures" / f"{name}.png").stat().st_size > 5000
    assert run(*ALPHA, "--out", str(out)) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (
        run(*ALPHA, "--out", str(out), "--overwrite", "--method", "discrete", "--drift", "isotropic", "--features", "2")
        == 0
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--alpha", "import os"], "alpha as arithmetic"),
        (["--classes", "1"], "--classes: a whole number >= 2"),
        (["--features", "5"], "p = K"),
        (["--sigma", "-1"], "at least 0"),
        (["--alpha", "1/t"], "finite alpha"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, arguments, says):
    assert run("--out", str(tmp_path / "x"), *arguments) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
