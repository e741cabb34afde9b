"""Run by torchrun in test_ranks.py: measures across ranks, rank 0 keeps what it got."""

import sys
from pathlib import Path

import torch

import local_elasticity as le

torch.set_num_threads(1)
out = Path(sys.argv[1])
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()


def problem():
    torch.manual_seed(0)
    model = le.networks.SimpleConv(3).double()
    x = torch.randn(7, 1, 32, 32, dtype=torch.float64)
    return model, x, torch.arange(7) % 3, torch.randn(4, 1, 32, 32, dtype=torch.float64)


model, x, y, t = problem()
loss_fn = torch.nn.functional.cross_entropy
found = {}
for name, engine, targets, n in (("replay", "replay", None, 7), ("linear", "linear", t, 7), ("few", "replay", t, 1)):
    impact = le.measure_across_ranks(model, loss_fn, (x[:n], y[:n]), targets, update=le.SGD(lr=0.1), engine=engine)
    found[name] = {k: getattr(impact, k) for k in ("before", "after", "change", "source_after", "losses", "self_index")}
    found[name]["notes"] = impact.plan.notes
if rank == 0:
    torch.save(found, out / "found.pt")


def refused(name, **changed):
    call = {"loss_fn": loss_fn, "sources": (x, y), "update": le.SGD(lr=0.1)} | changed
    try:
        le.measure_across_ranks(model, **call)
    except le.InputError as error:
        (out / f"{name}-{rank}").write_text(str(error))


refused("dealt", sources=(x + rank, y))  # as a sampler that deals samples out to the ranks would
refused("failed", sources=(x, torch.where(torch.arange(7) == 6, 3, y)))  # a label out of range, in rank 1's share
with torch.no_grad():
    next(model.parameters()).add_(rank)
refused("weights")
torch.distributed.destroy_process_group()
