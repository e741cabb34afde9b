"""One model over several processes (``torchrun``): every rank measures its share of the sources."""

from __future__ import annotations

import hashlib
from typing import Any, Literal

import torch
from torch import Tensor, nn

from local_elasticity.errors import InputError
from local_elasticity.impact.measurement import Impact, measure
from local_elasticity.impact.problem import LossFunction, match_rows
from local_elasticity.updates import Update

_BY_SOURCE = ("after", "change", "source_before", "source_after", "source_change", "losses")


def measure_across_ranks(
    model: nn.Module,
    loss_fn: LossFunction,
    sources: tuple[Tensor, Tensor],
    targets: Tensor | None = None,
    *,
    update: Update,
    engine: Literal["replay", "linear"] = "replay",
    group: Any = None,
    **settings: Any,
) -> Impact:
    """As ``measure``, the sources shared out over the ranks of a process group; every rank gets the whole impact.

    Call it on every rank with the same arguments, after ``torch.distributed.init_process_group`` (any backend; a model
    wrapped in ``DistributedDataParallel`` is unwrapped). Without a process group it is ``measure``.

    Args:
        model: the network, with the same weights on every rank.
        loss_fn: as in ``measure``.
        sources: all sources, the same on every rank.
        targets: all targets; the sources by default.
        update: as in ``measure``.
        engine: "replay" or "linear"; not chosen by timing, so that all ranks do the same.
        group: the process group; the default one unless given.
        **settings: other arguments of ``measure``.

    Raises:
        InputError: when the ranks hold different weights, and for what ``measure`` refuses.
    """
    dist = torch.distributed
    model = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    inputs, labels = sources
    looked_at = inputs if targets is None else targets
    if not dist.is_available() or not dist.is_initialized():
        return measure(model, loss_fn, sources, targets, update=update, engine=engine, **settings)
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    _check_same_weights(model, world, group)
    share = torch.arange(len(inputs)).tensor_split(world)[rank]
    mine = share if len(share) else torch.tensor([0])  # more ranks than sources: what is measured then is left out
    place = mine.to(inputs.device)
    found = measure(model, loss_fn, (inputs[place], labels[place]), looked_at, update=update, engine=engine, **settings)
    parts: list[Any] = [None] * world
    own = {name: getattr(found, name)[: len(share)].cpu() for name in _BY_SOURCE}
    dist.all_gather_object(parts, own, group=group)
    whole = {name: torch.cat([part[name] for part in parts]).to(found.before.device) for name in _BY_SOURCE}
    found.plan.notes.append(f"{len(share)} of {len(inputs)} sources on rank {rank} of {world}")
    return Impact(
        before=found.before,
        **whole,
        self_index=match_rows(inputs, looked_at),
        outputs=found.outputs,
        update=found.update,
        plan=found.plan,
        noise_floor=found.noise_floor,
        linearization_error=found.linearization_error,
    )


def _check_same_weights(model: nn.Module, world: int, group: Any) -> None:
    digest = hashlib.sha256()
    for value in model.state_dict().values():
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    digests: list[Any] = [None] * world
    torch.distributed.all_gather_object(digests, digest.hexdigest(), group=group)
    if len(set(digests)) > 1:
        raise InputError(
            expected="the same weights and buffers on every rank",
            got=f"{len(set(digests))} different ones on {world} ranks",
            do="broadcast them first, or train with DistributedDataParallel",
        )
