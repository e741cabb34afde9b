import json
import os
import pickle
import sys

import numpy as np
import pytest
import torch

import local_elasticity as le
from local_elasticity.cli import main

pytest.importorskip("sklearn", reason="the digits are inside scikit-learn")

NETWORK = "mlp:depth=1,width=16"
SMALL = ["--data", "digits", "--classes", "0", "1", "8", "--per-class", "20", "--network", NETWORK]
TRACK = [
    "track", *SMALL, "--probes-per-class", "5", "--every", "2", "--epochs", "2", "--definition", "kl", "--seed", "3"
]  # fmt: skip
MEASURE = ["measure", "--data", "digits", "--classes", "0", "1", "--network", NETWORK, "--per-class", "4"]


def call(*arguments):
    """Exit status of the command line in this process."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return stop.value.code


def refused(capsys, *arguments):
    """The one line with which it refuses."""
    capsys.readouterr()
    assert call(*arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert "Traceback" not in error
    assert error.startswith("local-elasticity: ")
    return error


def changed(options):
    """The words of TRACK with other values for these options."""
    words = list(TRACK)
    for option in [word for word in options if str(word).startswith("--") and word in words]:
        start = end = words.index(option)
        while end + 1 < len(words) and not words[end + 1].startswith("--"):
            end += 1
        del words[start : end + 1]
    return [*words, *options]


@pytest.fixture
def no_pictures(monkeypatch):
    monkeypatch.setattr("local_elasticity.cli.track.finish", lambda run, out: 0)


@pytest.fixture
def run_folder(tmp_path, no_pictures):
    out = tmp_path / "run"
    assert call("track", *SMALL, "--probes-per-class", 2, "--every", 9, "--epochs", 1, "--out", out) == 0
    return out


# -- tracking ------------------------------------------------------------------------------------------------------


def test_the_same_command_continues_and_other_settings_are_refused(run_folder, capsys):
    same = ["track", *SMALL, "--probes-per-class", 2, "--every", 9, "--epochs", 1, "--out", run_folder]
    before = le.open_run(run_folder).dataset.load()
    assert call(*same) == 0
    np.testing.assert_array_equal(le.open_run(run_folder).dataset["after"].values, before["after"].values)
    error = refused(capsys, *same, "--lr", 0.5)
    assert "lr (0.001 there, 0.5 now)" in error
    assert "--overwrite" in error
    assert call(*same, "--lr", 0.5, "--overwrite") == 0
    assert le.open_run(run_folder).configuration["lr"] == 0.5


def test_a_refused_schedule_leaves_no_folder_behind(tmp_path, capsys):
    out = tmp_path / "run"
    for bad in (["--every", 0], ["--log-spaced", 9999], ["--log-spaced", 3, "--budget", 0.1], ["--budget", 2]):
        assert "expected" in refused(capsys, *changed(bad), "--out", out)
    assert not out.exists()


def test_a_folder_with_something_else_is_refused(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("precious")
    for more in ([], ["--overwrite"]):
        assert "something else" in refused(capsys, *TRACK, "--out", tmp_path, *more)
    assert "a file" in refused(capsys, *TRACK, "--out", tmp_path / "mine.txt")
    assert (tmp_path / "mine.txt").read_text() == "precious"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--data", "digitz"], "did you mean 'digits'"),
        (["--definition", "kll"], "did you mean 'kl'"),
        (["--update", "sgdd:0.1"], "sgd"),
        (["--update", "sgd:fast"], "sgd"),
        (["--network", "mlpp"], "did you mean 'mlp'"),
        (["--network", "mlp:deep=3"], "depth"),
        (["--network", "nowhere_at_all:build"], "nowhere_at_all"),
        (["--classes", "0", "11"], "11"),
        (["--optimizer", "adamm"], "did you mean 'adam'"),
        (["--epochs", "0"], "epochs"),
        (["--epochs", "few"], "epochs"),
        (["--probes-per-class", "21"], "21"),
        (["--probes-per-class", "0"], "0"),
        (["--device", "abacus"], "device"),
        (["--keep", "all"], "keep"),
        (["--no-such-option", "1"], "no-such-option"),
    ],
)
def test_bad_words_are_refused_in_one_line(tmp_path, capsys, arguments, says):
    out = tmp_path / "run"
    assert says in refused(capsys, *changed(arguments), "--out", out)
    assert not out.exists()


def test_other_commands_refuse_in_one_line(tmp_path, capsys):
    assert "is not a run" in refused(capsys, "report", tmp_path)
    assert "nothing at" in refused(capsys, "report", tmp_path / "missing")
    assert "nope" in refused(capsys, "reproduce", "nope")
    assert "nope" in refused(capsys, "bench", "nope")
    assert "nope" in refused(capsys, "data", "nope")
    assert "trakc" in refused(capsys, "trakc")


# -- measuring -----------------------------------------------------------------------------------------------------


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def weights(seed=7):
    torch.manual_seed(seed)
    return le.networks.build(NETWORK, 2, (1, 8, 8)).state_dict()


def measured(capsys, tmp_path, *more):
    out = tmp_path / "deep" / "table.json"
    assert call(*MEASURE, "--definition", "l2", "--out", out, *more) == 0
    assert "S_rel l2" in capsys.readouterr().out
    return json.loads(out.read_text())["tables"]["l2"]["data_vars"]["mean"]["data"]


def test_checkpoints_of_both_kinds_give_the_table_of_their_weights(tmp_path, capsys):
    torch.save(weights(), tmp_path / "plain.pt")
    torch.save({"model": weights(), "epoch": 3}, tmp_path / "nested.pt")
    plain = measured(capsys, tmp_path, "--checkpoint", tmp_path / "plain.pt")
    nested = measured(capsys, tmp_path, "--checkpoint", tmp_path / "nested.pt")
    np.testing.assert_allclose(nested, plain, rtol=1e-3)
    assert np.abs(np.array(measured(capsys, tmp_path)) - plain).max() > 1e-3  # fresh weights

    model = le.networks.build(NETWORK, 2, (1, 8, 8))
    model.load_state_dict(weights())
    images = le.data.load("digits").subset(["0", "1"])
    xs, ys = le.data.probes(images, per_class=4, seed=0)
    impact = le.measure(model, torch.nn.functional.cross_entropy, (xs, ys), update=le.SGD(lr=0.01))
    np.testing.assert_allclose(plain, le.by_class(le.s_rel(impact, "l2"), ys, ys).values, rtol=1e-3)


def test_a_safetensors_checkpoint(tmp_path, capsys):
    save_file = pytest.importorskip("safetensors.torch", reason="safetensors is an extra").save_file
    save_file(weights(), tmp_path / "w.safetensors")
    torch.save(weights(), tmp_path / "w.pt")
    one, other = (
        np.array(measured(capsys, tmp_path, "--checkpoint", tmp_path / f"w.{s}")) for s in ("safetensors", "pt")
    )
    np.testing.assert_allclose(one, other, rtol=1e-3)
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "w.safetensors").read_bytes()[:-20])
    assert "safetensors" in refused(capsys, *MEASURE, "--checkpoint", tmp_path / "cut.safetensors")


def test_bad_checkpoints_are_refused_and_never_executed(tmp_path, capsys):
    trap = tmp_path / "executed"
    torch.save({"model": Evil(trap)}, tmp_path / "evil.pt")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Evil(trap)))
    (tmp_path / "text.pt").write_text("not a checkpoint")
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    torch.save(le.networks.build(NETWORK, 5, (1, 8, 8)).state_dict(), tmp_path / "other.pt")
    torch.save(weights(), tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:-300])
    for name in ("evil.pt", "evil.pkl", "text.pt", "empty.pt", "tensor.pt", "other.pt", "cut.pt"):
        assert "checkpoint" in refused(capsys, *MEASURE, "--checkpoint", tmp_path / name), name
    assert "nothing at" in refused(capsys, *MEASURE, "--checkpoint", tmp_path / "missing.pt")
    assert "expected" in refused(capsys, *MEASURE, "--checkpoint", tmp_path)
    assert not trap.exists()


# -- the rest ------------------------------------------------------------------------------------------------------


def test_without_scikit_learn_the_extra_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert "local-elasticity[data]" in refused(capsys, *MEASURE)


def test_without_safetensors_the_extra_is_named(tmp_path, capsys, monkeypatch):
    (tmp_path / "w.safetensors").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    error = refused(capsys, *MEASURE, "--checkpoint", tmp_path / "w.safetensors")
    assert "local-elasticity[safetensors]" in error


def test_help_and_lists(capsys):
    for command in ("track", "measure", "report", "data", "bench", "reproduce"):
        assert call(command, "--help") == 0
        assert f"local-elasticity {command}" in capsys.readouterr().out
    assert call("data") == 0
    assert "digits" in capsys.readouterr().out
    assert call("data", "digits") == 0
    assert "1437 training images" in capsys.readouterr().out
