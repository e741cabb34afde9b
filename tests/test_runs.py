import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import local_elasticity as le
from local_elasticity.runs.folders import prepare_folder

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(6) % 3
CONFIGURATION = {"schedule": "every(1)", "definitions": ["kl"], "seed": 0}


class Killed(BaseException):
    pass


def tracked(store, looks=(), resume=False, keep=None):
    """A tracker; it has looked once for each number, which decides the weights."""
    model = nn.Linear(4, 3)
    tracker = le.Tracker(
        model,
        F.cross_entropy,
        (X, Y),
        update=le.SGD(lr=0.1),
        store=store,
        resume=resume,
        route="step",
        chunk_size=3,
        schedule=le.every(1),
        keep=keep,
    )
    look(model, tracker, looks)
    return model, tracker


def look(model, tracker, numbers):
    for number in numbers:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter) * (1 + number))
        tracker.step(loss=float(number))


def same(one, other):
    assert set(one.variables) == set(other.variables)
    for name in set(map(str, one.variables)) - {"seconds"}:
        np.testing.assert_array_equal(one[name].values, other[name].values, err_msg=name)


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(le.InputError, match="nothing at"):
        le.open_run(tmp_path / "missing")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("hello")
    (tmp_path / "zarr").mkdir()
    (tmp_path / "zarr" / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "zarr.json").write_text('{"zarr_format": 3, "attri')
    for name in ("folder", "file", "zarr", "torn"):
        with pytest.raises(le.InputError, match="something that is not a run"):
            le.open_run(tmp_path / name)


def test_a_run_opens_by_its_store_and_by_its_folder(tmp_path):
    _, tracker = tracked(tmp_path / "out", [1, 2])  # a folder: the store is run.zarr in it
    run = tracker.finish()
    assert run.path == tmp_path / "out" / "run.zarr"
    for path in (tmp_path / "out", str(tmp_path / "out" / "run.zarr")):
        same(le.open_run(path).dataset, run.dataset)
    assert "2 snapshots" in repr(run)
    assert {"python", "torch", "zarr"} <= set(json.loads(run.dataset.attrs["versions"]))


def test_a_kill_while_the_run_is_made_leaves_nothing_in_its_place(tmp_path, monkeypatch):
    import zarr

    store = tmp_path / "run.zarr"

    def killed(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(zarr, "consolidate_metadata", killed)
        with pytest.raises(Killed):
            tracked(store, [0])
    assert not store.exists()
    _, tracker = tracked(store, [0, 1])
    assert tracker.finish().dataset["step"].values.tolist() == [1, 2]


def test_resuming_from_a_step_drops_the_rest_only_when_it_is_replaced(tmp_path):
    store = tmp_path / "run.zarr"
    tracked(store, range(4))[1].finish()
    model, tracker = tracked(store, resume=2)
    assert le.open_run(store).dataset["step"].values.tolist() == [1, 2, 3, 4]  # killed now, nothing would be lost
    look(model, tracker, [10])
    data = le.open_run(store).dataset.load()
    assert data["step"].values.tolist() == [1, 2, 3]
    assert data["loss"].values.tolist() == [0, 1, 10]
    tracked(store, resume=1)[1].finish()
    assert le.open_run(store).dataset["step"].values.tolist() == [1]


def test_a_run_with_no_look_at_all_opens(tmp_path):
    for store in (None, tmp_path / "run.zarr"):
        run = tracked(store)[1].finish()
        assert run.dataset.sizes.get("step", 0) == 0
    _, tracker = tracked(tmp_path / "run.zarr", [0], resume=True)
    assert tracker.finish().dataset["step"].values.tolist() == [1]


def test_a_folder_that_is_no_run_is_never_emptied(tmp_path):
    (tmp_path / "config.json").write_text('{"hidden_size": 768}')  # another program's
    (tmp_path / "weights.bin").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(le.InputError, match="something else"):
            prepare_folder(tmp_path, CONFIGURATION, overwrite)
    assert (tmp_path / "weights.bin").read_text() == "precious"


def test_a_folder_whose_making_was_killed_is_used(tmp_path):
    (tmp_path / "config.partial").write_text('{"sche')
    assert prepare_folder(tmp_path, CONFIGURATION, False) is False
    assert prepare_folder(tmp_path, CONFIGURATION, False) is False


def test_settings_may_change_until_something_is_written(tmp_path):
    assert prepare_folder(tmp_path, {**CONFIGURATION, "seed": 3}, False) is False
    assert prepare_folder(tmp_path, CONFIGURATION, False) is False
    (tmp_path / "run-0").mkdir()
    assert prepare_folder(tmp_path, CONFIGURATION, False) is False
    with pytest.raises(le.InputError, match=r"others for seed \(0 there, 1 now\)"):
        prepare_folder(tmp_path, {**CONFIGURATION, "seed": 1}, False)
    assert prepare_folder(tmp_path, {**CONFIGURATION, "seed": 1}, True) is False
