"""NeuralCollapse as a metric of torchmetrics, also across processes (played by threads)."""

import copy
import math
import threading

import pytest
import torch
from torch import nn

from local_elasticity import collapse
from local_elasticity.base.errors import InputError

torchmetrics = pytest.importorskip("torchmetrics")


def data(n=40, offset=0.0):
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(n) % 3
    x = torch.randn(n, 5, generator=generator, dtype=torch.float64) + y[:, None] + offset
    return x, y


def made(**options):
    return collapse.NeuralCollapseMetric(3, 5, **options)


def same(found, expected):
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(float(value), rel=1e-9, nan_ok=True), name


@pytest.mark.parametrize("keep", ["sums", "features"])
def test_update_compute_reset_and_forward(keep):
    (x, y), metric = data(), made(keep=keep)
    assert isinstance(metric, torchmetrics.Metric)
    for part in torch.arange(len(x)).chunk(4):
        batch = metric(x[part], y[part])  # forward: the batch's value, while everything accumulates
        same(batch, collapse.metrics(x[part], y[part]))
    same(metric.compute(), collapse.metrics(x, y))
    assert metric.compute()["nc1"].shape == ()
    metric.reset()
    metric.update(x[:12], y[:12])
    same(metric.compute(), collapse.metrics(x[:12], y[:12]))


def test_a_batch_without_a_class_gives_nan_and_a_warning():
    (x, y), metric = data(), made()
    with pytest.warns(UserWarning, match=r"no samples of the classes \[2\]"):
        assert math.isnan(metric(x[y != 2], y[y != 2])["nc1"])
    metric.update(x[y == 2], y[y == 2])
    same(metric.compute(), collapse.metrics(x, y))


def test_the_classifier_is_that_of_the_moment_and_no_part_of_the_metric():
    linear, (x, y) = nn.Linear(5, 3).double(), data()
    metric = made(classifier=linear, keep="features")
    metric.update(x, y)
    assert not list(metric.parameters())
    with torch.no_grad():
        linear.weight.mul_(-1)
    same(metric.compute(), collapse.metrics(x, y, linear.weight, linear.bias))


@pytest.mark.parametrize("keep", ["sums", "features"])
def test_merge_state_and_copies(keep):
    x, y = data()
    one, other = made(keep=keep), made(keep=keep)
    one.update(x[:15], y[:15])
    other.update(x[15:], y[15:])
    kept = copy.deepcopy(one)
    one.merge_state(other)
    same(one.compute(), collapse.metrics(x, y))
    same(kept.compute(), collapse.metrics(x[:15], y[:15]))


def test_in_a_collection_and_saved():
    x, y = data()
    group = torchmetrics.MetricCollection({"a": made(), "b": made(weighting="samples")}, compute_groups=False)
    group.update(x, y)
    assert float(group.compute()["a_nc1"] if "a_nc1" in group.compute() else group.compute()["nc1"]) > 0
    metric = made()
    metric.persistent(True)
    metric.update(x, y)
    again = made()
    again.persistent(True)
    again.load_state_dict(metric.state_dict())
    again._update_count = 1
    same(again.compute(), metric.compute())
    assert metric.float().counts.dtype == torch.float64  # as torchmetrics keeps it


@pytest.mark.parametrize("keep", ["sums", "features"])
@pytest.mark.parametrize("offset", [0.0, 1e7])
def test_processes_reduce_to_one_pass(keep, offset):
    """Three ranks, the last with classes 0 and 1 only; each gathers from all, as torch.distributed would."""
    x, y = data(offset=offset)
    shares = [slice(0, 9), slice(9, 30), slice(30, 32)]
    barrier, slots, found, failed = threading.Barrier(3, timeout=60), [None] * 3, [None] * 3, []

    def rank(number):
        def gather(tensor, group=None):
            slots[number] = tensor
            barrier.wait()
            everyone = [one.clone() for one in slots]
            barrier.wait()
            return everyone

        try:
            metric = made(keep=keep, dist_sync_fn=gather, distributed_available_fn=lambda: True)
            metric.update(x[shares[number]], y[shares[number]])
            first = metric.compute()
            metric.update(x[32 + number :: 3], y[32 + number :: 3])  # unsynced again: goes on from its own share
            found[number] = first, metric.compute()
        except BaseException as error:  # a thread's own
            failed.append(error)
            barrier.abort()

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    for early, late in found:
        rel = 1e-9 + 1e-15 * offset
        for values, expected in ((early, collapse.metrics(x[:32], y[:32])), (late, collapse.metrics(x, y))):
            for name, value in expected.items():
                assert float(values[name]) == pytest.approx(value, rel=100 * rel), name


def test_without_torchmetrics_the_extra_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    monkeypatch.delitem(sys.modules, "local_elasticity.collapse.metric", raising=False)
    with pytest.raises(InputError, match=r"local-elasticity\[metrics\]"):
        _ = collapse.NeuralCollapseMetric
    with pytest.raises(AttributeError):
        _ = collapse.NeuralColapse
