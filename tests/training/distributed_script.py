"""Run twice by test_distributed.py, as ranks 0 and 1: training in DistributedDataParallel, with and without looks."""

import sys
from datetime import timedelta
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import local_elasticity as le

torch.set_num_threads(1)
out, rank = Path(sys.argv[1]), int(sys.argv[2])
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{out / 'meeting'}", rank=rank, world_size=2, timeout=timedelta(seconds=40)
)
PROBES = (torch.randn(9, 6, generator=torch.Generator().manual_seed(9)), torch.arange(9) % 3)
CHUNKS = {"route": "step", "chunk_size": 1}


def wrapped(**options):
    """Buffers, which the wrapper would broadcast in every forward pass of its own, and draws of random numbers."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))
    return nn.parallel.DistributedDataParallel(net, **options)


def train(model, store=None, looks=True, updates=5):
    """Every rank has batches of its own; bits of weights, buffers and streams at the end, the looks, the run."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    tracker = track(model, le.from_optimizer(optimizer), store=store) if looks else None
    torch.manual_seed(10 + rank)
    seen = []
    for _ in range(updates):
        x, y = torch.randn(12, 6), torch.randint(3, (12,))
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        if tracker is not None:
            seen.append(tracker.step() is not None)
    bits = [*(value.clone() for value in model.state_dict().values()), torch.get_rng_state()]
    return bits, seen, optimizer, tracker and tracker.finish()


def track(model, update, **options):
    return le.Tracker(
        model,
        F.cross_entropy,
        PROBES,
        update=update,
        schedule=le.every(2),
        before_commit=lambda step: (out / f"commit-{rank}").touch(),
        **CHUNKS,
        **options,
    )


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def refused(call):
    try:
        call()
    except le.InputError as error:
        return str(error)
    return "accepted"


said = {}
plain, *_ = train(wrapped(), looks=False)

model = wrapped()
bits, said["looks"], optimizer, run = train(model, store=out / "run.zarr")
said["undisturbed"] = same(plain, bits)
said["steps"] = run.dataset["step"].values.tolist()
if rank == 0:
    update = le.from_optimizer(optimizer)
    last = le.measure(model.module, F.cross_entropy, PROBES, update=update, engine="replay", **CHUNKS)
    said["right"] = bool((torch.as_tensor(run.dataset["after"].values[-1, 0]) == last.after).all())

torch.distributed.barrier()
again = track(model, le.from_optimizer(optimizer), store=out / "run.zarr", resume=True)
said["resume_step"] = [again.resume_step, again.updates_made]

for options in ({"gradient_as_bucket_view": True}, {"find_unused_parameters": True}, {"static_graph": True}):
    bits, *_ = train(wrapped(**options), looks=rank == 0)
    said[f"undisturbed by rank 0 alone, {options}"] = same(plain, bits)

synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(wrapped().module)
said["train_mode"] = refused(lambda: track(synchronised, le.SGD(lr=0.1), mode="train"))

torch.save(said, out / f"said-{rank}.pt")
torch.distributed.destroy_process_group()
