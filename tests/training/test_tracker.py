import copy
import itertools
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import local_elasticity as le
from local_elasticity.base.streams import random_state, set_random_state
from local_elasticity.runs.stores import OUTPUTS

CLASSES, FEATURES = 3, 6
VOLATILE = {"seconds"}  # times differ from run to run


def clusters(n=36, seed=5):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % CLASSES
    return torch.randn(n, FEATURES, generator=generator) + y[:, None], y


def probes(per_class=3):
    return clusters(per_class * CLASSES, seed=9)


def net(seed=0):
    """Dropout and BatchNorm: random streams and buffers to disturb."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, CLASSES)
        )


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def tracked(model, **options):
    settings = {"update": le.SGD(lr=0.01), "schedule": le.every(2), "route": "step", "chunk_size": 4} | options
    return le.Tracker(model, F.cross_entropy, settings.pop("probes", probes()), **settings)


def train(model, optimizer, updates, tracker=None, start=0, watch=None, **scalars):
    """One batch an update; the batch depends on the update's number only."""
    x, y = clusters()
    model.train()
    for update in range(start, updates):
        chosen = (torch.arange(12) + 5 * update) % len(x)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[chosen]), y[chosen])
        loss.backward()
        optimizer.step()
        if tracker is not None:
            tracker.step(loss=loss.item(), **scalars)
        if watch is not None:
            watch()


def plain_copy(x):
    """A copy that shares nothing and compares by bytes."""
    if torch.is_tensor(x):
        return (str(x.dtype), tuple(x.shape), x.detach().cpu().numpy().tobytes())
    if isinstance(x, np.ndarray):
        return (str(x.dtype), x.shape, x.tobytes())
    if isinstance(x, dict):
        return {key: plain_copy(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [plain_copy(value) for value in x]
    return x


def everything(model, optimizer):
    return plain_copy(
        {
            "state": model.state_dict(),
            "gradients": {name: p.grad for name, p in model.named_parameters()},
            "flags": [module.training for module in model.modules()],
            "requires": [p.requires_grad for p in model.parameters()],
            "optimizer": optimizer.state_dict(),
            "streams": random_state(),
        }
    )


def same(one, other, skip=VOLATILE):
    assert set(one.variables) == set(other.variables)
    for name in set(map(str, one.variables)) - skip:
        a, b = one[name], other[name]
        assert a.dims == b.dims, name
        np.testing.assert_array_equal(a.values, b.values, err_msg=name)


@pytest.fixture(autouse=True)
def _streams():
    before = random_state()
    torch.manual_seed(1)
    np.random.seed(2)  # noqa: NPY002
    random.seed(3)
    yield
    set_random_state(before)


# -- measuring does not disturb training ---------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("make_optimizer", [sgd, adamw])
def test_training_is_bit_identical_with_and_without_the_tracker(make_optimizer, mode):
    start = random_state()
    histories = []
    for with_tracker in (False, True):
        set_random_state(start)
        model = net()
        optimizer, history, tracker = make_optimizer(model), [], None
        if with_tracker:
            # BatchNorm cannot train on one sample: its layer stays in eval mode there.
            if mode == "train":
                model[1].eval()
            updates = {"live": le.from_optimizer(optimizer), "adam": le.Adam(lr=1e-3)}
            tracker = tracked(
                model,
                update=updates,
                schedule=le.every(1),
                mode="as_is" if mode == "train" else "eval",
                route=None,
                chunk_size=None,
            )
            tracker.snapshot()
            if mode == "train":
                model[1].train()
        for update in range(3):
            train(model, optimizer, update + 1, None, start=update)
            if tracker is not None:
                if mode == "train":
                    model[1].eval()
                tracker.step(loss=0.0, epoch=update // 2)
                if mode == "train":
                    model[1].train()
            random.random()
            np.random.rand()  # noqa: NPY002
            history.append(everything(model, optimizer))
        if tracker is not None:
            tracker.finish()
        histories.append(history)
    for step, (without, with_it) in enumerate(zip(*histories, strict=True)):
        for key in without:
            assert without[key] == with_it[key], f"{key} after update {step + 1}"


def test_a_failing_look_leaves_everything_as_it_was():
    model = net()
    optimizer = sgd(model)
    train(model, optimizer, 2)

    broken = []

    def loss(outputs, labels):
        if broken:
            raise RuntimeError("no loss today")
        return torch.nn.functional.cross_entropy(outputs, labels)

    before = everything(model, optimizer)
    tracker = le.Tracker(model, loss, probes(), update=le.SGD(lr=0.1))
    assert everything(model, optimizer) == before
    broken.append(True)
    with pytest.raises(le.InputError, match="loss_fn") as refusal:
        tracker.snapshot()
    assert str(refusal.value.__cause__) == "no loss today"
    assert everything(model, optimizer) == before


# -- what a snapshot holds -----------------------------------------------------------------------------------------


def test_accuracy_and_class_means_are_those_of_the_network_in_eval_mode():
    model = net()
    optimizer = sgd(model)
    tracker = tracked(model)
    train(model, optimizer, 3, tracker)
    data = tracker.finish().dataset
    xs, ys = probes()
    with torch.no_grad():
        outputs = copy.deepcopy(model).eval()(xs)
    last = data.isel(step=-1)
    assert int(last["step"]) == 3
    assert float(last["probe_accuracy"]) == pytest.approx(float((outputs.argmax(1) == ys).double().mean()))
    assert float(last["probe_loss"]) == pytest.approx(F.cross_entropy(outputs, ys).item(), rel=1e-5)
    means = torch.stack([outputs[ys == label].mean(0) for label in range(CLASSES)])
    np.testing.assert_allclose(last["class_mean_output"], means, rtol=1e-4, atol=1e-6)
    assert last["class_mean_output"].dims == ("class", "output")


def test_tables_and_pairs_are_those_of_a_measure_at_that_moment():
    model = net()
    optimizer = sgd(model)
    rules = {"sgd": le.SGD(lr=0.02), "adam": le.Adam(lr=1e-3)}
    tracker = tracked(model, update=rules, definitions=("kl", "he_su"), schedule=le.at([2]))
    train(model, optimizer, 3, tracker)
    run = tracker.finish()
    data = run.dataset
    assert data["step"].values.tolist() == [3]
    assert run.looked_at == [2]
    xs, ys = probes()
    for (name, rule), definition in itertools.product(rules.items(), ("kl", "he_su", "l2")):
        impact = le.measure(model, F.cross_entropy, (xs, ys), update=rule, route="step", chunk_size=4)
        expected = le.s_rel(impact, definition)
        found = run.s_rel(definition, update=name)
        assert found.dims == ("step", "source", "target")
        np.testing.assert_array_equal(found.values[0], expected.numpy())
        np.testing.assert_array_equal(run.s_rel(definition).sel(update=name).values, found.values)
        if definition in data["definition"].values:
            table = le.by_class(expected, ys, ys)
            cell = data.sel(update=name, definition=definition).isel(step=0)
            np.testing.assert_allclose(cell["mean"], table.values, rtol=1e-12)
            np.testing.assert_allclose(float(cell["intra"]), table.intra, rtol=1e-12)
            np.testing.assert_allclose(cell["interval_low"], table.interval_low, rtol=1e-12)


def test_one_update_needs_no_name():
    model = net()
    tracker = tracked(model)
    tracker.snapshot()
    run = tracker.finish()
    assert run.s_rel("l1").dims == ("step", "source", "target")
    assert run.dataset["step"].values.tolist() == [0]
    assert run.looked_at == []
    with pytest.raises(le.InputError, match="an update of this run"):
        run.s_rel("kl", update="rmsprop")


def test_memory_and_zarr_hold_the_same(tmp_path):
    start, runs = random_state(), []
    for store in (None, tmp_path / "run.zarr"):
        set_random_state(start)
        model = net()
        optimizer = adamw(model)
        tracker = tracked(
            model,
            update={"a": le.SGD(lr=0.01), "b": le.Adam(lr=1e-3)},
            definitions=("kl", "l2"),
            store=store,
            configuration={"note": "x"},
        )
        tracker.snapshot()  # without the scalar that the others have
        train(model, optimizer, 3, tracker, half=lambda: 0.5)
        runs.append(tracker.finish())
    memory, disk = (run.dataset for run in runs)
    same(memory, disk)
    assert memory["step"].values.tolist() == [0, 1, 3]
    assert np.isnan(memory["loss"].values[0])
    assert memory["half"].values[1:].tolist() == [0.5] * 2
    assert {k: v for k, v in memory.attrs.items() if k != "overhead"} == {
        k: v for k, v in disk.attrs.items() if k not in ("overhead", "format", "format_version", "checksums")
    }
    assert runs[1].configuration == {"note": "x"}
    assert runs[1].path == tmp_path / "run.zarr"
    same(le.open_run(tmp_path).dataset, disk, skip=set())


@pytest.mark.parametrize("keep", ["pairs", "tables"])
@pytest.mark.parametrize("stored", [False, True])
def test_less_can_be_kept(keep, stored, tmp_path):
    model = net()
    tracker = tracked(model, keep=keep, definitions=("kl", "l1"), store=tmp_path / "run.zarr" if stored else None)
    look = tracker.snapshot()
    run = tracker.finish()
    assert not set(OUTPUTS) & set(run.dataset.variables)
    assert ("pairs" in run.dataset) == (keep == "pairs")
    table = next(t for (_, definition), t in look.tables.items() if definition == "l1")
    np.testing.assert_array_equal(run.dataset["mean"].sel(definition="l1").values[0, 0], table.values)
    if keep == "pairs":
        impact = le.measure(model, F.cross_entropy, probes(), update=le.SGD(lr=0.01), route="step", chunk_size=4)
        np.testing.assert_allclose(run.s_rel("l1").values[0], le.s_rel(impact, "l1"), rtol=1e-12)
    with pytest.raises(le.InputError, match="kept its outputs"):
        run.s_rel("l2")


def test_a_class_with_one_probe_has_no_interval():
    xs, ys = clusters(5, seed=2)  # classes 0 and 1 twice, class 2 once
    tracker = tracked(net(), probes=(xs, ys))
    tracker.snapshot()
    low = tracker.finish().dataset["interval_low"].values.reshape(CLASSES, CLASSES)
    assert np.isnan(low[2]).all()
    assert np.isnan(low[:, 2]).all()
    assert np.isfinite(low[:2, :2]).all()


def test_the_epoch_restarts_the_count():
    model = net()
    optimizer = sgd(model)
    tracker = tracked(model, schedule=le.every(3, per="epoch"), keep="tables")
    for update in range(8):
        train(model, optimizer, update + 1, start=update)
        tracker.step(epoch=update // 4)
    assert tracker.finish().dataset["step"].values.tolist() == [1, 4, 5, 8]


# -- resuming ------------------------------------------------------------------------------------------------------


def saving(model, optimizer, saved):
    def save(step):
        saved[step] = copy.deepcopy((model.state_dict(), optimizer.state_dict(), random_state()))

    return save


def restored(saved, step, make_optimizer):
    model = net(seed=99)
    optimizer = make_optimizer(model)
    weights, state, streams = saved[step]
    model.load_state_dict(weights)
    optimizer.load_state_dict(copy.deepcopy(state))
    set_random_state(streams)
    return model, optimizer


def test_resuming_gives_the_numbers_of_an_uninterrupted_run(tmp_path):
    make_optimizer, start = adamw, random_state()
    model = net()
    optimizer = make_optimizer(model)
    tracker = tracked(model, update=le.from_optimizer(optimizer))
    train(model, optimizer, 5, tracker)
    whole = tracker.finish().dataset

    set_random_state(start)
    model, saved = net(), {}
    optimizer = make_optimizer(model)
    store = tmp_path / "run.zarr"
    tracker = tracked(
        model, update=le.from_optimizer(optimizer), store=store, before_commit=saving(model, optimizer, saved)
    )
    train(model, optimizer, 4, tracker)  # looked after 1 and 3; the fourth update is lost

    model, optimizer = restored(saved, 3, make_optimizer)
    tracker = tracked(model, update=le.from_optimizer(optimizer), store=store, resume=True, route=None, chunk_size=None)
    assert tracker.resume_step == 3
    train(model, optimizer, 5, tracker, start=3)
    run = tracker.finish()
    same(run.dataset, whole)
    assert run.dataset["step"].values.tolist() == [1, 3, 5]
    assert run.dataset.attrs["finished"]


def test_resuming_from_a_step_replaces_what_came_after(tmp_path):
    model, saved = net(), {}
    optimizer = sgd(model)
    store = tmp_path / "run.zarr"
    tracker = tracked(model, store=store, before_commit=saving(model, optimizer, saved))
    train(model, optimizer, 7, tracker, extra=1.0)
    first = tracker.finish().dataset.load()
    assert first["step"].values.tolist() == [1, 3, 5, 7]

    model, optimizer = restored(saved, 3, sgd)
    # Another schedule: the looks after 5 and 7 belong to a future that is no more.
    tracker = tracked(model, store=store, resume=3, schedule=le.at([7]))
    assert tracker.resume_step == 3
    train(model, optimizer, 8, tracker, start=3)
    second = tracker.finish().dataset
    assert second["step"].values.tolist() == [1, 3, 8]
    for name in ("after", "mean", "extra", "loss"):
        np.testing.assert_array_equal(second[name].values[:2], first[name].values[:2])
    assert np.isnan(second["extra"].values[2])  # not what lay at this place before


def test_resuming_inside_an_epoch_keeps_its_count(tmp_path):
    model = net()
    optimizer = sgd(model)
    store = tmp_path / "run.zarr"
    options = {"schedule": le.every(2, per="epoch"), "keep": "tables", "store": store}

    def follow(tracker, updates):
        for update in updates:
            train(model, optimizer, update + 1, start=update)
            tracker.step(epoch=update // 5)

    follow(tracked(model, **options), range(7))  # looks after 1, 3, 5 | 6, 8
    tracker = tracked(model, **options, resume=True)
    assert tracker.resume_step == 6
    follow(tracker, range(6, 9))
    assert tracker.finish().dataset["step"].values.tolist() == [1, 3, 5, 6, 8]


def test_a_second_look_at_the_same_step_replaces_the_first(tmp_path):
    for store in (None, tmp_path / "run.zarr"):
        model = net()
        tracker = tracked(model, store=store)
        tracker.snapshot(loss=1.0)
        tracker.snapshot(loss=2.0)
        data = tracker.finish().dataset
        assert data["step"].values.tolist() == [0]
        assert data["loss"].values.tolist() == [2.0]


# -- refusals ------------------------------------------------------------------------------------------------------


def test_a_store_that_holds_something_else_is_refused_and_left_alone(tmp_path):
    for place in (tmp_path / "a.zarr", tmp_path / "b" / "run.zarr"):
        place.mkdir(parents=True)
        (place / "mine.txt").write_text("precious")
        for resume in (False, True):
            with pytest.raises(le.InputError, match="something else"):
                tracked(net(), store=place if place.name == "a.zarr" else place.parent, resume=resume)
        assert (place / "mine.txt").read_text() == "precious"


def test_a_run_is_continued_only_when_asked_and_with_the_same_settings(tmp_path):
    store = tmp_path / "run.zarr"
    tracker = tracked(net(), store=store)
    tracker.snapshot()
    tracker.finish()
    before = le.open_run(store).dataset.load()
    with pytest.raises(le.InputError, match="resume=True"):
        tracked(net(), store=store)
    with pytest.raises(le.InputError, match="probes of the stored run"):
        tracked(net(), store=store, resume=True, probes=probes(2))
    with pytest.raises(le.InputError, match="definitions of the stored run"):
        tracked(net(), store=store, resume=True, definitions=("l1",))
    with pytest.raises(le.InputError, match="updates of the stored run"):
        tracked(net(), store=store, resume=True, update=le.SGD(lr=0.5))
    with pytest.raises(le.InputError, match="a store to resume"):
        tracked(net(), resume=True)
    same(before, le.open_run(store).dataset, skip=set())


def test_bad_settings_are_refused_with_what_to_do():
    with pytest.raises(le.InputError, match="did you mean 'he_su'"):
        tracked(net(), definitions=("he_sue",))
    with pytest.raises(le.InputError, match=r"labels in 0\.\.1"):
        tracked(net(), class_names=("cat", "dog"))
    with pytest.raises(le.InputError, match="keep: one of"):
        tracked(net(), keep="everything")
    with pytest.raises(le.InputError, match="dict name -> update"):
        tracked(net(), update={})
    with pytest.raises(le.InputError, match="integer dtype"):
        tracked(net(), probes=(probes()[0], probes()[1].double()))
    for ignored in (-100, -1):
        with pytest.raises(le.InputError, match=f"label {ignored} at probe 2"):
            tracked(net(), probes=(probes()[0], probes()[1].index_fill(0, torch.tensor(2), ignored)))
    tracker = tracked(net())
    with pytest.raises(le.InputError, match="a number for 'loss'"):
        tracker.step(loss="low")


@pytest.mark.parametrize("name", ["step", "mean", "before", "definition"])
def test_a_number_named_like_a_part_of_the_run_is_refused(name):
    with pytest.raises(le.InputError, match=name):
        tracked(net()).snapshot(**{name: 1.0})


# -- budget --------------------------------------------------------------------------------------------------------


def test_a_look_that_never_fits_the_budget_is_told_at_the_end(tmp_path):
    for store in (None, tmp_path / "run.zarr"):
        model = net()
        tracker = tracked(model, schedule=le.budget(1e-6), store=store)
        train(model, sgd(model), 3, tracker)
        with pytest.warns(UserWarning, match="no snapshot was taken.*budget"):
            run = tracker.finish()
        assert run.dataset.sizes.get("step", 0) == 0
        assert run.looked_at == []


def test_a_generous_budget_looks_and_can_be_replayed():
    start = random_state()
    model = net()
    tracker = tracked(model, schedule=le.budget(0.999), keep="tables")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        train(model, sgd(model), 4, tracker)
        run = tracker.finish()
    set_random_state(start)
    model = net()
    again = tracked(model, schedule=le.at(run.looked_at), keep="tables")
    train(model, sgd(model), 4, again)
    same(run.dataset, again.finish().dataset)


# -- neural collapse -----------------------------------------------------------------------------------------------

LAYERS = ("0", "penultimate", "outputs")


def test_collapse_is_that_of_the_layers_in_eval_mode():
    model = net()
    tracker = tracked(model, collapse_layers=LAYERS)
    train(model, sgd(model), 3, tracker)
    run = tracker.finish()
    xs, ys = probes()
    quiet = copy.deepcopy(model).eval()
    with torch.no_grad():
        hidden, outputs = quiet[:4](xs), quiet(xs)
        features = {"0": quiet[0](xs), "penultimate": hidden, "outputs": outputs}
    assert run.collapse["nc1"].dims == ("step", "layer")
    assert run.collapse["layer"].values.tolist() == list(LAYERS)
    assert run.collapse["step"].values.tolist() == [1, 3]
    for layer, x in features.items():
        head = (quiet[4].weight, quiet[4].bias) if layer == "penultimate" else ()
        expected = le.collapse.metrics(x, ys, *head)
        last = run.collapse.sel(layer=layer).isel(step=-1)
        assert set(last.data_vars) == {*le.collapse.GEOMETRY, *le.collapse.CLASSIFIER}
        for name in last.data_vars:
            np.testing.assert_allclose(float(last[name]), expected.get(name, np.nan), rtol=1e-5, atol=1e-6)
    assert "nc4" not in _looked(net(), collapse_layers="0").collapse  # without the classifier there is none
    with pytest.raises(le.InputError, match="collapse_layers"):
        _ = _looked(net()).collapse


def _looked(model, **options):
    tracker = tracked(model, **options)
    tracker.snapshot()
    return tracker.finish()


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_looking_at_collapse_leaves_training_bit_identical(mode):
    start, histories = random_state(), []
    for layers in (None, LAYERS):
        set_random_state(start)
        model = net()
        optimizer, history = adamw(model), []
        options = {"collapse_layers": layers} if layers else {}
        tracker = tracked(model, schedule=le.every(1), mode="eval", **options) if layers else None
        for update in range(4):
            train(model, optimizer, update + 1, None, start=update)
            if tracker is not None:
                if mode == "train":  # dropout draws and BatchNorm counts in this pass
                    with_flags = copy.copy(tracker)
                    with_flags.mode = "train"
                    with_flags._collapse()
                tracker.step(loss=0.0)
            history.append(everything(model, optimizer))
            assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        histories.append(history)
    assert histories[0] == histories[1]


def test_a_run_with_collapse_is_resumed_to_the_same_numbers(tmp_path):
    start = random_state()
    model = net()
    optimizer = adamw(model)
    tracker = tracked(model, collapse_layers=LAYERS)
    train(model, optimizer, 5, tracker)
    whole = tracker.finish().dataset

    set_random_state(start)
    model, saved = net(), {}
    optimizer = adamw(model)
    store = tmp_path / "run.zarr"
    tracker = tracked(model, collapse_layers=LAYERS, store=store, before_commit=saving(model, optimizer, saved))
    train(model, optimizer, 4, tracker)
    model, optimizer = restored(saved, 3, adamw)
    for layers in ((), ("outputs",)):
        with pytest.raises(le.InputError, match="collapse_layers of the stored run"):
            tracked(model, store=store, resume=True, collapse_layers=layers)
    tracker = tracked(model, collapse_layers=LAYERS, store=store, resume=True)
    train(model, optimizer, 5, tracker, start=3)
    run = tracker.finish()
    same(run.dataset, whole)
    assert run.collapse["nc1"].sizes == {"step": 3, "layer": 3}


def test_collapse_of_labels_with_gaps_and_bad_layers():
    xs, ys = probes()
    run = _looked(net(), collapse_layers=("penultimate",), probes=(xs[ys != 1], ys[ys != 1]))
    model = net().eval()
    with torch.no_grad():
        features = model[:4](xs[ys != 1])
    head = model[4].weight[[0, 2]], model[4].bias[[0, 2]]
    expected = le.collapse.metrics(features, ys[ys != 1] // 2, *head)
    for name, value in expected.items():
        np.testing.assert_allclose(run.collapse[name].values, [[value]], rtol=1e-5, atol=1e-6)
    with pytest.raises(le.InputError, match="a layer of the network"):
        tracked(net(), collapse_layers=("hidden",))
    with pytest.raises(le.InputError, match="at least 2 classes"):
        tracked(net(), collapse_layers=("0",), probes=(xs[ys == 1], ys[ys == 1]))
    with pytest.raises(le.InputError, match="nc1"):
        tracked(net(), collapse_layers=("0",)).snapshot(nc1=1.0)
