import json
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import local_elasticity as le
from local_elasticity.base.errors import InputError
from local_elasticity.networks import MLP

STEPS = 60


def clusters(n=24, seed=3):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    return torch.randn(n, 6, generator=generator) + y[:, None], y


def train(store=None, make=None, **options):
    settings = {
        "lr": 0.05,
        "steps": STEPS,
        "replicas": 5,
        "chunk_size": 2,
        "validation": clusters(seed=8),
        "probes": clusters(seed=9),
        "probe": le.every(15),
        "collapse_layers": ["hidden.0"],
    } | options
    data = settings.pop("data", clusters())
    return le.train_ensemble(
        make or (lambda: MLP(6, 3, depth=1, width=8)), data, F.cross_entropy, store=store, **settings
    )


def same_bits(one, two):
    for name, values in one.log.items():
        np.testing.assert_array_equal(values, two.log[name], err_msg=name)
    for name, values in one.weights.items():
        assert torch.equal(values, two.weights[name]), name
    assert one.step == two.step


OPTIMIZERS = {
    "sgd": {},
    "momentum": {"momentum": 0.9, "weight_decay": 0.01, "batch_size": 3},
    "adam": {"optimizer": "adam", "lr": 0.01},
    "permutations": {"batch_size": 7, "replacement": False},
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("options", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_stopping_and_resuming_at_any_step_changes_no_bit(tmp_path, options):
    whole = train(**options)
    for stop in (0, 17, STEPS):
        folder = tmp_path / str(stop)
        part = train(folder, stop_at=stop, **options)
        assert part.step == stop
        same_bits(train(folder, resume=True, **options), whole)
    folder = tmp_path / "often"
    for stop in (3, 29, STEPS):
        part = train(folder, stop_at=stop, resume=folder.exists(), **options)
    same_bits(part, whole)


def test_the_random_streams_of_the_loop_are_resumed_too(tmp_path):
    def make():
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))

    options = {"make": make, "route": "loop", "batch_size": 4, "collapse_layers": []}
    whole = train(**options)
    train(tmp_path / "run", stop_at=23, **options)
    same_bits(train(tmp_path / "run", resume=True, **options), whole)


def test_a_tracker_is_resumed_with_the_ensemble(tmp_path):
    def maker(path):
        def make(model, resume):
            return le.Tracker(
                model,
                F.cross_entropy,
                clusters(6, seed=9),
                update=le.SGD(lr=0.01),
                schedule=le.every(15),
                route="step",
                store=path,
                resume=resume,
            )

        return make

    whole = train(trackers={2: maker(None)})
    train(tmp_path / "run", stop_at=20, trackers={2: maker(tmp_path / "two.zarr")})
    rest = train(tmp_path / "run", resume=True, trackers={2: maker(tmp_path / "two.zarr")})
    assert rest.runs[2].dataset["step"].values.tolist() == [1, 16, 31, 46]
    for name in ("before", "after"):
        np.testing.assert_array_equal(rest.runs[2].dataset[name].values, whole.runs[2].dataset[name].values)


def test_the_folder_reads_as_a_dataset(tmp_path):
    ensemble = train(tmp_path / "run", stop_at=40)
    data = le.open_ensemble(tmp_path / "run")
    assert dict(data["logits"].sizes) == {"step": 40, "replica": 5, "output": 3}
    np.testing.assert_array_equal(data["logits"].values, ensemble.logits[:40])
    np.testing.assert_array_equal(data["samples"].values, ensemble.samples[:40])
    assert data["probe_step"].values.max() <= 40
    assert data["layer"].values.tolist() == ["outputs", "hidden.0"]
    rows = len(data["probe_step"])
    np.testing.assert_array_equal(data["nc1"].values, ensemble.nc1[:rows])
    assert np.isfinite(data["probe_mean"].values).all()
    settings = json.loads(data.attrs["settings"])
    assert settings["seed"] == 0
    assert settings["rule"]["lr"] == 0.05
    memory = ensemble.to_xarray()
    assert set(memory.data_vars) == set(data.data_vars)


def test_batches_have_a_dimension_of_their_own(tmp_path):
    train(tmp_path / "run", batch_size=4)
    data = le.open_ensemble(tmp_path / "run")
    assert data["logits"].dims == ("step", "replica", "sample", "output")
    assert data["labels"].shape == (STEPS, 5, 4)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": 0.06}, "rule"),
        ({"seed": 1}, "seed"),
        ({"replicas": 6}, "replicas"),
        ({"data": clusters(seed=4)}, "data"),
        ({"validation": None}, "validation"),
        ({"make": lambda: MLP(6, 3, depth=1, width=9)}, "parameters"),
        ({"configuration": {"corruption": 0.1}}, "configuration"),
    ],
)
def test_a_resume_from_another_configuration_is_refused(tmp_path, options, words):
    train(tmp_path / "run", stop_at=5)
    with pytest.raises(InputError, match=f"others for .*{words}"):
        train(tmp_path / "run", resume=True, **options)


def test_a_place_that_is_taken_is_refused(tmp_path):
    train(tmp_path / "run", stop_at=5)
    with pytest.raises(InputError, match="resume=True"):
        train(tmp_path / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letters.txt").write_text("mine")
    with pytest.raises(InputError, match="an empty folder or an ensemble"):
        train(tmp_path / "other")
    with pytest.raises(InputError, match="the folder of an ensemble"):
        le.open_ensemble(tmp_path / "other")
    with pytest.raises(InputError, match=re.escape("nothing at")):
        le.open_ensemble(tmp_path / "nowhere")
