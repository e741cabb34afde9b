"""The tracker in data-parallel training: two processes, one store, and nobody waits for anybody."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import local_elasticity as le
from local_elasticity.impact.wrappers import check_alone, first_rank, inner_module


def run_ranks(script, folder):
    """The script as ranks 0 and 1; both are ended when one of them fails."""
    command = [sys.executable, str(Path(__file__).with_name(script)), str(folder)]
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen([*command, str(rank)], env=settings, stderr=subprocess.PIPE, text=True) for rank in range(2)
    ]
    try:
        for rank in ranks:
            _, errors = rank.communicate(timeout=200)
            assert rank.returncode == 0, errors[-2000:]
    finally:
        for rank in ranks:
            rank.kill()
    return [torch.load(folder / f"said-{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.exhaustive
def test_one_store_two_ranks(tmp_path):
    first, second = run_ranks("distributed_script.py", tmp_path)
    for said in (first, second):
        undisturbed = {name: value for name, value in said.items() if name.startswith("undisturbed")}
        assert len(undisturbed) == 4
        assert all(undisturbed.values()), undisturbed
        assert said["resume_step"] == [5, 5]
        assert "SyncBatchNorm" in said["train_mode"]
    assert first["right"]
    assert first["looks"] == [True, False, True, False, True]
    assert first["steps"] == [1, 3, 5]
    assert not any(second["looks"])
    assert second["steps"] == []
    assert (tmp_path / "commit-0").exists()
    assert not (tmp_path / "commit-1").exists()
    assert le.open_run(tmp_path / "run.zarr").dataset["step"].values.tolist() == [1, 3, 5]


@pytest.fixture
def _alone(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'one'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("_alone")
def test_wrappers_are_taken_off():
    net = nn.Sequential(nn.Linear(4, 3))
    for wrapper in (nn.parallel.DistributedDataParallel, nn.DataParallel):
        assert inner_module(wrapper(net)) is net
        assert inner_module(torch.compile(wrapper(net))) is net
        with pytest.raises(le.InputError, match=f"{wrapper.__name__} inside it, at '0'"):
            inner_module(nn.Sequential(wrapper(net)))
    assert inner_module(net) is net
    compiled = torch.compile(net)
    assert inner_module(compiled) is compiled
    assert first_rank(nn.parallel.DistributedDataParallel(net))
    check_alone(nn.Sequential(nn.SyncBatchNorm(3)), "train")  # nobody to wait for


@pytest.mark.usefixtures("_alone")
def test_sharded_weights_are_refused():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import distribute_module

    mesh = init_device_mesh("cpu", (1,))
    for sharded in (
        FullyShardedDataParallel(nn.Sequential(nn.Linear(4, 3)), device_id=torch.device("cpu")),
        distribute_module(nn.Sequential(nn.Linear(4, 3)), mesh),
    ):
        for wrapped in (sharded, nn.Sequential(sharded)):
            with pytest.raises(le.InputError, match="sharded over processes"):
                inner_module(wrapped)
    with pytest.raises(le.InputError, match="sharded over processes"):
        le.Tracker(sharded, F.cross_entropy, (torch.randn(3, 4), torch.arange(3)), update=le.SGD(lr=0.1))


class Unused(nn.parallel.DistributedDataParallel):
    """A wrapper whose own forward pass, which may wait for other ranks, must not be called."""

    def forward(self, *inputs, **keywords):
        raise AssertionError("the wrapper was called")


SAMPLES = (torch.randn(4, 6, generator=torch.Generator().manual_seed(1)), torch.arange(4) % 3)
LOOKS = {
    "tiles": lambda net, out: (
        le.measure_tiles(
            net, F.cross_entropy, SAMPLES, update=le.SGD(lr=0.1), out=out, tile=2, route="contract"
        ).change.values
    ),
    "gram": lambda net, out: le.gradient_gram(net, F.cross_entropy, SAMPLES, out=out, tile=2).gram.values,
    "kernel": lambda net, out: le.kernel(net, SAMPLES[0]),
    "kernel similarity": lambda net, out: le.s_ker(net, SAMPLES[0], form="limit"),
    "ripple": lambda net, out: le.ripple(net, F.cross_entropy, SAMPLES).after,
    "ranks": lambda net, out: le.measure_across_ranks(net, F.cross_entropy, SAMPLES, update=le.SGD(lr=0.1)).change,
    "collapse": lambda net, out: torch.tensor(
        [list(layer.values()) for layer in le.collapse.layer_metrics(net, *SAMPLES, ["0"]).values()]
    ),
    "measure": lambda net, out: le.measure(net, F.cross_entropy, SAMPLES, update=le.SGD(lr=0.1)).change,
}


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("look", LOOKS)
def test_every_look_goes_past_the_wrapper(look, tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1 if look == "kernel similarity" else 3))
    want = LOOKS[look](net, tmp_path / "plain.zarr")
    got = LOOKS[look](Unused(net), tmp_path / "wrapped.zarr")
    torch.testing.assert_close(torch.as_tensor(got), torch.as_tensor(want), rtol=0, atol=0)
